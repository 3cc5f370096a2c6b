"""What the rest of distckpt asks of the ranks: who am I, and a few small exact collectives.

Owns the contract that every backend honours, and the collectives that follow from its two primitives. Must
not know about checkpoints or handlers, nor which runtimes exist.
"""

import math
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch

from distckpt.backends import wire
from distckpt.errors import DesyncError, DistckptError

__all__ = ["DEFAULT_TIMEOUT_S", "Backend", "Board", "ReduceOp", "TensorOp", "Watcher", "default_timeout_s"]

ReduceOp = Literal["SUM", "MIN", "MAX"]
TensorOp = Literal["SUM", "PRODUCT", "MIN", "MAX", "AND", "OR"]

DEFAULT_TIMEOUT_S = 300.0
_HASH_BITS = 0x7FFFFFFF  # XLA's exact reduction is of int32
TIMEOUT_VARIABLE = "DISTCKPT_TIMEOUT_S"


def default_timeout_s() -> float:
    """Return how long a collective waits for the other ranks, in seconds.

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
        msg = f"{TIMEOUT_VARIABLE} should be a positive number of seconds, but is {text!r}"
        raise ValueError(msg)
    return value


class Board(Protocol):
    """Notes that every rank of a job can read, beside its collectives. Any thread; no call waits longer than told.

    Every method raises TimeoutError when no answer came within `limit_s`, and ConnectionError when the board is gone.
    """

    def put(self, key: str, text: str, *, limit_s: float) -> None:
        """Write a note, over an older one."""

    def claim(self, key: str, text: str, *, limit_s: float) -> str:
        """Write a note unless there is one; return what stands."""

    def look(self, keys: Sequence[str], *, limit_s: float) -> list[str | None]:
        """Read several notes; None for those that are not there."""

    def count(self, key: str, amount: int, *, limit_s: float) -> int:
        """Add to a number that begins at 0; return what it is now."""

    def is_open(self) -> bool:
        """Tell whether the job that it belongs to is still this process's. Rank-local; waits for nothing."""

    def host(self) -> str:
        """Tell where the notes are kept: ``this process``, ``this machine``, ``elsewhere``; or empty for nowhere."""


class Watcher(Protocol):
    """What is known of the other ranks beside the collectives; see :mod:`distckpt.coordination.liveness`."""

    def news(self, wait_s: float = 0.0) -> DistckptError | None:
        """Return the error that ends this rank's waiting, if there is a reason within `wait_s`. The training thread."""

    def tell(self, ranks: Sequence[int]) -> str:
        """Return what is known of `ranks`, as a phrase; empty for nothing."""


class Backend(ABC):
    """One job's ranks, as one of them sees it.

    The identity (``rank``, ``world_size``, ``local_rank``, ``node``) is known without any collective. Every
    method said to be collective is entered by all ranks, in the same order; it returns the same on each.
    Host values are exact: int64 and float64 in, the same bits out. A backend is not thread-safe, and only the
    thread that trains may use it; :meth:`post_note` alone may be called from any thread.

    A collective that some ranks do not enter ends after `timeout_s` with
    :class:`~distckpt.errors.CollectiveTimeout`, which names them; one whose peer died ends with
    :class:`~distckpt.errors.CollectiveError`. Either way the backend's host group is given up and every later
    collective on it fails at once.
    """

    name: str
    """What the backend is called: ``serial``, or the name that torch.distributed knows it by."""

    watcher: Watcher | None = None
    """Asked while a collective waits, if there is one."""

    takes_lazy_numbers: bool = False
    """Whether a number of :meth:`start_meeting` may be a tensor on this rank's device that is not computed yet."""

    untouched: tuple[type[BaseException], ...] = ()
    """Exceptions of the runtime's own that have to reach its user as they are."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """Rank of this process in the job, from 0."""

    @property
    @abstractmethod
    def world_size(self) -> int:
        """Number of ranks in the job."""

    @property
    @abstractmethod
    def local_rank(self) -> int:
        """Rank of this process among those on its node, from 0."""

    @property
    @abstractmethod
    def node(self) -> int:
        """Number of this process's node, from 0."""

    @abstractmethod
    def device(self) -> torch.device:
        """Return the device this rank computes on. Rank-local; issues no collectives."""

    # -- the primitives ----------------------------------------------------------------------------

    @abstractmethod
    def reduce_host(self, values: torch.Tensor, op: ReduceOp, *, what: object, timeout_s: float | None) -> torch.Tensor:
        """Collective. Reduce a small host tensor element by element.

        Args:
            values: int64 or float64, shape (n,), the same n and dtype on every rank.
            op: SUM, MIN or MAX.
            what: what the ranks are doing, for error messages; made into text only for them.
            timeout_s: seconds to wait for the other ranks; None for :func:`default_timeout_s`.

        Returns:
            A new tensor of the same shape and dtype.
        """

    def start_max(self, values: Sequence[int], *, what: object, timeout_s: float | None) -> Callable[[], list[int]]:
        """Collective. Start to reduce up to twelve int64 with MAX; what is returned waits for the end.

        They are of int32's size where `meet` brings them.

        One may be under way at a time. Where a runtime cannot do it beside other work, it is done here and now.
        """
        result: list[int] = self.reduce_host(torch.tensor(values), "MAX", what=what, timeout_s=timeout_s).tolist()
        return lambda: result

    @abstractmethod
    def gather_host(self, data: bytes, num_bytes: int, *, what: object, timeout_s: float | None) -> list[bytes]:
        """Collective. Give every rank every rank's bytes.

        Args:
            data: at most `num_bytes` bytes; lengths may differ between ranks.
            num_bytes: the most that any rank brings, the same on every rank.
            what: what the ranks are doing, for error messages; made into text only for them.
            timeout_s: seconds to wait for the other ranks; None for :func:`default_timeout_s`.

        Returns:
            One entry a rank, in rank order, each of the length it was given with.
        """

    @abstractmethod
    def reduce_tensor(self, tensor: torch.Tensor, op: TensorOp) -> torch.Tensor:
        """Collective. Reduce a tensor of any shape where it lies; returns a new one."""

    @abstractmethod
    def gather_tensor(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Collective. Give every rank every rank's tensor; shape and dtype are the same on all."""

    @abstractmethod
    def broadcast_tensor(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """Collective. Give every rank `src`'s tensor; shape and dtype are the same on all."""

    def sync_device(self, tree: Any, *, to_host: bool) -> Any:
        """All ranks. Compute what of a state is pending, where the runtime computes late. Issues no collectives.

        Args:
            tree: nested containers with tensors.
            to_host: whether this rank needs the tensors' values.

        Returns:
            The same, with tensors of the host where the runtime cannot write those of its devices.
        """
        del to_host
        return tree

    def generators(self) -> Mapping[str, Any]:
        """Return the runtime's own random number generators, by name; each has ``get_state`` and ``set_state``."""
        return {}

    def board(self, *, timeout_s: float | None = None) -> Board | None:
        """Return the job's board for notes, or None where the runtime has none. Rank-local; issues no collectives.

        Args:
            timeout_s: seconds to wait for the rank that keeps it, where one does and the others have to find it; None
                for :func:`default_timeout_s`.

        Raises:
            CollectiveTimeout: that rank did not come.
        """
        del timeout_s
        return None

    def break_off(self) -> None:  # noqa: B027 - not every runtime can
        """Make the job's own collectives that wait end with an error, where the runtime can. Rank-local; any thread."""

    def close(self) -> None:  # noqa: B027 - most have nothing to end
        """Let go of threads and connections of this backend's own. Rank-local; nothing may be asked of it after."""

    @abstractmethod
    def take_ticket(self, kind: str) -> str | None:
        """Number the objects of one kind that this rank makes. Rank-local; issues no collectives.

        Ranks that make the same objects in the same order get the same tickets, so that a note about one
        finds its counterpart on another rank.

        Returns:
            ``kind#n``, or None where the runtime has no store to leave notes in.
        """

    @abstractmethod
    def post_note(self, ticket: str, text: str) -> None:
        """Leave a note about `ticket` that other ranks read in :meth:`roll_call`. Rank-local; any thread.

        Where a runtime has no common store (Horovod, XLA) nothing is left.
        """

    @abstractmethod
    def roll_call(self, name: str, *, watch: str | None, timeout_s: float | None) -> str | None:
        """Wait until every rank has called `name`, without a collective. All ranks.

        Args:
            name: what is called, e.g. a handler; once in a job.
            watch: a ticket; a note about it ends the waiting.
            timeout_s: seconds to wait for the other ranks; None for :func:`default_timeout_s`.

        Returns:
            None when all ranks have come, or the note about `watch`.

        Raises:
            CollectiveTimeout: some ranks did not come in time.
        """

    # -- what follows from them --------------------------------------------------------------------

    def meet(
        self,
        where: str,
        numbers: Sequence[int] = (),
        *,
        turn: int = 0,
        told: object = None,
        timeout_s: float | None,
    ) -> list[int]:
        """Collective. Find out that all ranks are at the same place, and reduce a few numbers with MAX on the way.

        The header of twelve int64 with which every collective of distckpt begins: ranks that came from different places
        meet in it and are told so, instead of pairing wrong collectives.

        1. (all ranks) reduce place and turn, each with its negative, and the numbers.
        2. (all ranks) place or turn differ: gather what each rank is doing.

        Args:
            where: the place; has to be equal on all ranks.
            numbers: at most eight, each below 2**31.
            turn: has to be equal on all ranks.
            told: the place for people, if it says more; made into text only for an error.
            timeout_s: seconds to wait for the other ranks; None for :func:`default_timeout_s`.

        Returns:
            The largest of each of `numbers`.

        Raises:
            DesyncError: the ranks are not at the same place; on every rank, naming all places.
        """
        return self.start_meeting(where, numbers, turn=turn, told=told, timeout_s=timeout_s)()

    def start_meeting(
        self,
        where: str,
        numbers: Sequence[int] = (),
        *,
        turn: int = 0,
        told: object = None,
        timeout_s: float | None,
    ) -> Callable[[], list[int]]:
        """Collective. Start :meth:`meet`, and return what waits for its end and returns its result.

        The same arguments. Step 2 is walked in what is returned.
        """
        what = told or where
        digest = zlib.crc32(where.encode()) & _HASH_BITS
        finish = self.start_max((digest, -digest, turn, -turn, *numbers), what=what, timeout_s=timeout_s)
        return lambda: self._read_header(finish(), len(numbers), turn, what, timeout_s)

    def _read_header(
        self, total: list[int], num_numbers: int, turn: int, what: object, timeout_s: float | None
    ) -> list[int]:
        if total[0] == -total[1] and total[2] == -total[3]:
            return total[4 : 4 + num_numbers]
        data = f"{what} (turn {turn})".encode()
        why = "telling the ranks where each one is"
        num_bytes = self.all_reduce_ints([len(data)], "MAX", what=why, timeout_s=timeout_s)[0]
        places = [part.decode() for part in self.gather_host(data, num_bytes, what=why, timeout_s=timeout_s)]
        where_all = "; ".join(f"rank {rank} is at: {text}" for rank, text in enumerate(places))
        msg = (
            f"The ranks came to one collective from different places. {where_all}. Handlers have to be built and "
            "attached on all ranks, in the same order, and all ranks have to run the same iterations."
        )
        raise DesyncError(msg)

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

    def all_reduce_floats(
        self, values: Sequence[float], op: ReduceOp = "SUM", *, what: str = "all_reduce", timeout_s: float | None = None
    ) -> list[float]:
        """Collective. Reduce a vector of float64. MIN and MAX over a NaN depend on the runtime: reduce a flag."""
        result = self.reduce_host(torch.tensor(list(values), dtype=torch.float64), op, what=what, timeout_s=timeout_s)
        return [float(value) for value in result.tolist()]

    def any(self, flag: bool, *, what: str = "any", timeout_s: float | None = None) -> bool:  # noqa: FBT001
        """Collective. Tell whether the flag is set on at least one rank."""
        return self.meet(what, [int(flag)], timeout_s=timeout_s)[0] == 1

    def all(self, flag: bool, *, what: str = "all", timeout_s: float | None = None) -> bool:  # noqa: FBT001
        """Collective. Tell whether the flag is set on every rank."""
        return self.meet(what, [int(not flag)], timeout_s=timeout_s)[0] == 0

    def gather_objects(self, value: Any, *, what: str = "gather", timeout_s: float | None = None) -> list[Any]:
        """Collective. Give every rank every rank's small object.

        1. (all ranks) encode the object; a rank that cannot says so instead of staying away.
        2. (all ranks) agree on the longest.
        3. (all ranks) gather.

        Args:
            value: see :func:`distckpt.backends.wire.encode`.
            what: what the ranks are doing, for error messages; made into text only for them.
            timeout_s: seconds to wait for the other ranks; None for :func:`default_timeout_s`.

        Returns:
            One entry a rank, in rank order.

        Raises:
            TypeError: some rank's object cannot be sent; on every rank.
        """
        try:
            data, problem = wire.encode([True, value]), None
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks wait for an answer
            text = str(error) if isinstance(error, TypeError) else f"{type(error).__name__}: {error}"
            data, problem = wire.encode([False, text]), error
        num_bytes = self.meet(what, [len(data)], timeout_s=timeout_s)[0]
        answers = [wire.decode(part) for part in self.gather_host(data, num_bytes, what=what, timeout_s=timeout_s)]
        refused = [f"rank {rank}: {answer[1]}" for rank, answer in enumerate(answers) if not answer[0]]
        if refused:
            raise TypeError("; ".join(refused)) from problem
        return [answer[1] for answer in answers]

    def broadcast_object(
        self, value: Any, src: int = 0, *, what: str = "broadcast", timeout_s: float | None = None
    ) -> Any:
        """Collective. Give every rank the small object of rank `src`; what the others bring is ignored.

        Raises:
            ValueError: there is no rank `src`.
            TypeError: the object cannot be sent; on every rank.
        """
        self.check_rank(src, "src")
        return self.gather_objects(value if self.rank == src else None, what=what, timeout_s=timeout_s)[src]

    def barrier(self, *, what: str = "barrier", timeout_s: float | None = None) -> None:
        """Collective. Return when every rank has come."""
        self.meet(what, timeout_s=timeout_s)

    def passes(self, error: BaseException) -> bool:
        """Tell whether an exception leaves its rank as it is, and no error of all ranks takes its place.

        KeyboardInterrupt and SystemExit do, and what the runtime itself has to hear of.
        """
        return not isinstance(error, Exception) or isinstance(error, self.untouched)

    def check_rank(self, rank: int, what: str) -> None:
        """Refuse a rank that this job does not have. Rank-local; issues no collectives.

        Raises:
            ValueError: `rank` is not between 0 and ``world_size - 1``.
        """
        if not 0 <= rank < self.world_size:
            msg = f"Argument {what} should be a rank of this job (0 to {self.world_size - 1}), but given {rank}"
            raise ValueError(msg)
