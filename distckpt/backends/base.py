"""The contract of a backend: this process's place among the ranks, and a few small, exact collectives.

A runtime implements the identity and the primitives. All other collectives follow from those.
"""

import hashlib
import math
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch

from distckpt.backends import wire
from distckpt.errors import DesyncError, DistckptError, ShardedStateError

ReduceOp = Literal["SUM", "MIN", "MAX"]
TensorOp = Literal["SUM", "PRODUCT", "MIN", "MAX", "AND", "OR"]

DEFAULT_TIMEOUT_S = 300.0
TIMEOUT_VARIABLE = "DISTCKPT_TIMEOUT_S"
_HASH_BITS = 0x7FFFFFFF  # XLA's exact reduction is of int32


def default_timeout_s() -> float:
    """Return how many seconds a collective waits for the other ranks.

    ``DISTCKPT_TIMEOUT_S`` in the environment overrides the default of 300.

    Raises:
        ValueError: the variable holds no positive number.
    """
    text = os.environ.get(TIMEOUT_VARIABLE)
    if text is None:
        return DEFAULT_TIMEOUT_S
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < math.inf:
        raise ValueError(f"{TIMEOUT_VARIABLE} should be a positive number of seconds, but is {text!r}")
    return value


class KeyValueStore(Protocol):
    """Text that all ranks of a job can write and read, outside its collectives. Any thread.

    Every method raises TimeoutError without an answer within `limit_s`, and ConnectionError if the store is gone.
    """

    def set(self, key: str, text: str, *, limit_s: float) -> None:
        """Write a value."""

    def set_default(self, key: str, text: str, *, limit_s: float) -> str:
        """Write a value unless the key has one; return the key's value."""

    def get_many(self, keys: Sequence[str], *, limit_s: float) -> list[str | None]:
        """Return the values of several keys; None for those without one."""

    def add(self, key: str, amount: int, *, limit_s: float) -> int:
        """Add to a number that starts at 0; return the sum."""

    def is_open(self) -> bool:
        """Return True if this process still belongs to the store's job. Rank-local; does not wait."""

    def host(self) -> str:
        """Return where the store is: ``this process``, ``this machine``, ``elsewhere``; empty if it has no host."""


class PeerMonitor(Protocol):
    """What is known of the other ranks outside the collectives; see :mod:`distckpt.coordination.heartbeat`."""

    def failure(self, wait_s: float = 0.0) -> DistckptError | None:
        """Return the job's failure if there is one, or one comes within `wait_s`. The training thread."""

    def describe(self, ranks: Sequence[int]) -> str:
        """Return what is known of `ranks`, as text; empty if nothing is."""


class Backend(ABC):
    """One rank's view of a job.

    All ranks call the collective methods in the same order, and get the same result. Host values are exact: int64 and
    float64. Only the training thread may use a backend, but any thread may call :meth:`post_note`.

    `what` says what the ranks are doing; it is formatted only for error messages. `timeout_s` is the time limit in
    seconds; None for :func:`default_timeout_s`. A collective that some ranks do not enter in time raises
    :class:`~distckpt.errors.CollectiveTimeout`, which names them. If a peer died it raises
    :class:`~distckpt.errors.CollectiveError`. In both cases the control group is aborted, and every later collective on
    it fails at once.

    Attributes:
        name: ``serial``, or torch.distributed's name of the backend.
        rank: this process's rank in the job, from 0.
        world_size: number of ranks in the job.
        local_rank: this process's rank among those on its node, from 0.
        node: index of this process's node, from 0.
        monitor: asked while a collective waits; None if there is none.
        can_reduce_lazily: whether :meth:`start_sync_check` takes tensors on this rank's device that are not computed
            yet.
        passthrough_errors: the runtime's own exceptions, which have to reach the user unchanged.
    """

    name: str
    rank: int
    world_size: int
    local_rank: int
    node: int
    monitor: PeerMonitor | None = None
    can_reduce_lazily: bool = False
    passthrough_errors: tuple[type[BaseException], ...] = ()

    def device(self) -> torch.device:
        """Return this rank's device: the current CUDA device if there is one, else the CPU. Rank-local."""
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    # -- the primitives ----------------------------------------------------------------------------

    @abstractmethod
    def reduce_host(self, values: torch.Tensor, op: ReduceOp, *, what: object, timeout_s: float | None) -> torch.Tensor:
        """Collective. Reduce a small host tensor element by element.

        `values` are int64 or float64, shape (n,), with the same n and dtype on every rank. The result is a new tensor.
        MIN and MAX over a NaN depend on the runtime.
        """

    def start_max(self, values: Sequence[int], *, what: object, timeout_s: float | None) -> Callable[[], list[int]]:
        """Collective. Start to reduce up to twelve int64 with MAX; return a function that waits for the result.

        One such reduction may be in progress at a time. :meth:`check_in_sync` gives values that fit into int32.
        """
        result: list[int] = self.reduce_host(torch.tensor(values), "MAX", what=what, timeout_s=timeout_s).tolist()
        return lambda: result

    @abstractmethod
    def gather_host(self, data: bytes, num_bytes: int, *, what: object, timeout_s: float | None) -> list[bytes]:
        """Collective. Return the bytes of every rank, in rank order.

        Lengths may differ between ranks. `num_bytes` is the same on every rank, and no length exceeds it.
        """

    def exchange_host(
        self, parts: Sequence[bytes | bytearray], num_received: Sequence[int], *, what: object, timeout_s: float | None
    ) -> list[memoryview]:
        """Collective. Send bytes to each rank, and return what each rank has sent to this one.

        Args:
            parts: for each rank.
            num_received: number of bytes from each rank.
            what: see :class:`Backend`.
            timeout_s: see :class:`Backend`.

        Raises:
            ShardedStateError: the runtime cannot do it; on every rank.
        """
        raise ShardedStateError(
            f"sharded state and the stages of a pipeline cannot be saved on {self.name}, whose ranks cannot exchange "
            "bytes. Nothing was saved. Use a job of torch.distributed (NCCL, Gloo)"
        )

    @abstractmethod
    def reduce_tensor(self, tensor: torch.Tensor, op: TensorOp) -> torch.Tensor:
        """Collective. Reduce a tensor of any shape on its device; return a new one."""

    @abstractmethod
    def gather_tensor(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Collective. Return every rank's tensor; shape and dtype are the same on all."""

    @abstractmethod
    def broadcast_tensor(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """Collective. Return the tensor of rank `src`; shape and dtype are the same on all."""

    def sync_device(self, tree: Any, *, to_host: bool) -> Any:
        """All ranks. Compute the pending values of a state, if the runtime computes lazily. Issues no collectives.

        With `to_host` the result has host tensors in place of device tensors that cannot be written directly.
        """
        return tree

    def generators(self) -> Mapping[str, Any]:
        """Return the runtime's own random number generators, by name; each has ``get_state`` and ``set_state``."""
        return {}

    def key_value_store(self, *, timeout_s: float | None = None) -> KeyValueStore | None:
        """Return the job's key-value store; None if the runtime has none. Rank-local; issues no collectives.

        Raises:
            CollectiveTimeout: the rank that hosts it did not arrive within `timeout_s`.
        """
        return None

    def abort(self) -> None:  # noqa: B027 - not every runtime can
        """Make the job's own waiting collectives fail, if the runtime can do so. Rank-local; any thread."""

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Close this backend's threads and connections. Rank-local; the backend cannot be used after it."""

    @abstractmethod
    def next_object_id(self, kind: str) -> str | None:
        """Return ``kind#n``, the id of the next object of a kind; None if there are no other ranks. Rank-local.

        Ranks that construct the same objects in the same order give them the same ids.
        """

    @abstractmethod
    def post_note(self, object_id: str, text: str) -> None:
        """Publish text about an object, for :meth:`store_barrier` on other ranks. Rank-local; any thread.

        Does nothing if the job has no key-value store.
        """

    @abstractmethod
    def store_barrier(self, name: str, *, depends_on: str | None, timeout_s: float | None) -> str | None:
        """All ranks. Block until every rank has called `name`; through the key-value store, if the job has one.

        A name is used once in a job. `depends_on` is the id of an object; a note about it ends the waiting.

        Returns:
            None if all ranks have arrived, else the note about `depends_on`.

        Raises:
            CollectiveTimeout: some ranks did not arrive in time.
        """

    # -- derived collectives -----------------------------------------------------------------------

    def check_in_sync(
        self,
        key: str,
        numbers: Sequence[int] = (),
        *,
        sequence: int = 0,
        description: object = None,
        timeout_s: float | None,
    ) -> list[int]:
        """Collective. Check that all ranks are at the same sync point, and reduce a few numbers with MAX.

        Every collective of distckpt begins with this header of twelve int64. Ranks at different sync points find that
        out here, before they enter different collectives.

        1. (all ranks) reduce the key's digest and the sequence number, each with its negative, and the numbers.
        2. (all ranks) only if digest or sequence number differ: gather what each rank is doing.

        Args:
            key: has to be equal on all ranks.
            numbers: at most eight, each below 2**31.
            sequence: has to be equal on all ranks.
            description: text for messages in place of the key; formatted only for an error.
            timeout_s: see :class:`Backend`.

        Returns:
            The largest of each of `numbers`.

        Raises:
            DesyncError: the ranks are at different sync points; on every rank, naming all of them.
        """
        return self.start_sync_check(key, numbers, sequence=sequence, description=description, timeout_s=timeout_s)()

    def start_sync_check(
        self,
        key: str,
        numbers: Sequence[int] = (),
        *,
        sequence: int = 0,
        description: object = None,
        timeout_s: float | None,
    ) -> Callable[[], list[int]]:
        """Collective. Start :meth:`check_in_sync`; return a function that waits for its result, and takes step 2."""
        what = description or key
        digest = zlib.crc32(key.encode()) & _HASH_BITS
        finish = self.start_max((digest, -digest, sequence, -sequence, *numbers), what=what, timeout_s=timeout_s)

        def finish_check() -> list[int]:
            total = finish()
            if total[0] == -total[1] and total[2] == -total[3]:
                return total[4 : 4 + len(numbers)]
            data = f"{what} (sequence {sequence})".encode()
            why = "telling the ranks where each of them is"
            num_bytes = self.all_reduce_ints([len(data)], "MAX", what=why, timeout_s=timeout_s)[0]
            points = [chunk.decode() for chunk in self.gather_host(data, num_bytes, what=why, timeout_s=timeout_s)]
            all_points = "; ".join(f"rank {rank} is at: {point}" for rank, point in enumerate(points))
            raise DesyncError(
                f"The ranks entered one collective at different points. {all_points}. Handlers have to be built and "
                "attached on all ranks, in the same order, and all ranks have to run the same iterations."
            )

        return finish_check

    def gather_in_sync(
        self, key: str, data: bytes, *, sequence: int = 0, description: object = None, timeout_s: float | None
    ) -> list[bytes]:
        """Collective. Check that all ranks are at the same sync point, and return the bytes of every rank.

        1. (all ranks) :meth:`check_in_sync`, with the length of the bytes, and two numbers of their digest, each with
           its negative.
        2. (all ranks) only if the digests differ: gather the bytes.

        Args:
            key: has to be equal on all ranks.
            data: this rank's bytes.
            sequence: has to be equal on all ranks.
            description: text for messages in place of the key; formatted only for an error.
            timeout_s: see :class:`Backend`.

        Returns:
            The bytes of each rank, in rank order.

        Raises:
            DesyncError: the ranks are at different sync points; on every rank, naming all of them.
        """
        digest = hashlib.blake2b(data, digest_size=8).digest()
        first, second = (int.from_bytes(half) & _HASH_BITS for half in (digest[:4], digest[4:]))
        num_bytes, *largest = self.check_in_sync(
            key,
            [len(data), first, -first, second, -second],
            sequence=sequence,
            description=description,
            timeout_s=timeout_s,
        )
        if largest == [first, -first, second, -second]:  # on every rank, or on none
            return [data] * self.world_size
        return self.gather_host(data, num_bytes, what=description or key, timeout_s=timeout_s)

    def all_reduce_ints(
        self, values: Sequence[int], op: ReduceOp = "SUM", *, what: str = "all_reduce", timeout_s: float | None = None
    ) -> list[int]:
        """Collective. Reduce a vector of int64.

        Example:
            >>> from distckpt.backends.serial import SerialBackend
            >>> SerialBackend().all_reduce_ints([1, 2**53 + 1], "MAX")
            [1, 9007199254740993]
        """
        result = self.reduce_host(torch.tensor(list(values), dtype=torch.int64), op, what=what, timeout_s=timeout_s)
        return [int(value) for value in result.tolist()]

    def gather_objects(self, value: Any, *, what: str = "gather", timeout_s: float | None = None) -> list[Any]:
        """Collective. Return every rank's small object, in rank order.

        1. (all ranks) encode the object, see :func:`distckpt.backends.wire.encode`; on failure the error.
        2. (all ranks) gather, see :meth:`gather_in_sync`.

        Raises:
            TypeError: some rank's object cannot be sent; on every rank.
        """
        try:
            data, problem = wire.encode([True, value]), None
        except Exception as error:  # noqa: BLE001 - the other ranks wait, whatever the error is
            text = str(error) if isinstance(error, TypeError) else f"{type(error).__name__}: {error}"
            data, problem = wire.encode([False, text]), error
        answers = [wire.decode(chunk) for chunk in self.gather_in_sync(what, data, timeout_s=timeout_s)]
        refused = [f"rank {rank}: {answer[1]}" for rank, answer in enumerate(answers) if not answer[0]]
        if refused:
            raise TypeError("; ".join(refused)) from problem
        return [answer[1] for answer in answers]

    def broadcast_object(
        self, value: Any, src: int = 0, *, what: str = "broadcast", timeout_s: float | None = None
    ) -> Any:
        """Collective. Return the small object of rank `src`, as :meth:`gather_objects` does.

        Raises:
            ValueError: there is no rank `src`.
        """
        self.check_rank(src, "src")
        return self.gather_objects(value if self.rank == src else None, what=what, timeout_s=timeout_s)[src]

    def barrier(self, *, what: str = "barrier", timeout_s: float | None = None) -> None:
        """Collective. Block until every rank has arrived."""
        self.check_in_sync(what, timeout_s=timeout_s)

    def is_passthrough(self, error: BaseException) -> bool:
        """Return True if an exception leaves its rank unchanged: KeyboardInterrupt, SystemExit, the runtime's own."""
        return not isinstance(error, Exception) or isinstance(error, self.passthrough_errors)

    def check_rank(self, rank: int, what: str) -> None:
        """Raise ValueError unless `rank`, the value of argument `what`, is a rank of this job. Rank-local."""
        if not isinstance(rank, int) or not 0 <= rank < self.world_size:
            msg = f"Argument {what} should be a rank of this job (0 to {self.world_size - 1}), but given {rank!r}"
            raise ValueError(msg)
