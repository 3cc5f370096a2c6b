"""The base class of backends with a control group: host values travel on a group of our own, apart from the job's."""

import functools
import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch

from distckpt.backends.base import Backend, KeyValueStore, PeerMonitor, ReduceOp, TensorOp, default_timeout_s
from distckpt.backends.control_group import ControlGroup
from distckpt.backends.store_notes import ANSWER_LIMIT_S, DesyncDetector, store_barrier, store_lost_error
from distckpt.backends.transport import Transport
from distckpt.errors import CollectiveError

FOLD: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "SUM": torch.add,
    "PRODUCT": torch.mul,
    "MIN": torch.minimum,
    "MAX": torch.maximum,
    "AND": torch.bitwise_and,
    "OR": torch.bitwise_or,
}
"""How each operation reduces two tensors to one."""

# For bools, which neither NCCL nor Gloo nor Horovod reduces: they are reduced as uint8, by another operation.
_BOOL_OPS: dict[TensorOp, TensorOp] = {"SUM": "MAX", "PRODUCT": "MIN", "AND": "MIN", "OR": "MAX"}

_REASON_S = 5.0  # how long the monitor may take to find out why the store is silent


class ControlGroupBackend(Backend):
    """One rank of a job with a control group.

    The arguments are the attributes of the same names.
    """

    def __init__(self, rank: int, world_size: int, local_rank: int, node: int) -> None:
        self.rank, self.world_size, self.local_rank, self.node = rank, world_size, local_rank, node
        self._num_objects: dict[str, int] = {}
        self._monitor: PeerMonitor | None = None
        self._finding = threading.Lock()  # any thread may post notes
        self._found_store: KeyValueStore | None = None
        self._is_store_found = False
        self._store_lost_in: str | None = None

    @abstractmethod
    def _make_transport(self) -> Transport:
        """Return the control group's transport. Rank-local; called once, at the first use."""

    @abstractmethod
    def _make_store(self, what: object, timeout_s: float) -> KeyValueStore | None:
        """Return the job's key-value store, or None if the runtime has none. Rank-local; called once, at first use.

        Args:
            what: what the store is needed for.
            timeout_s: seconds to wait for the rank that hosts it.

        Raises:
            OSError: it cannot be reached.
            CollectiveTimeout: the rank that hosts it did not arrive.
        """

    def _can_reduce(self, tensor: torch.Tensor, op: TensorOp) -> bool:
        """Return True if the runtime reduces tensors of this device and dtype. No dtype is bool."""
        return True

    @abstractmethod
    def _reduce_on_device(self, tensor: torch.Tensor, op: TensorOp) -> torch.Tensor:
        """Collective. Reduce a tensor that is not on the CPU; return a new one."""

    @functools.cached_property
    def _control_group(self) -> ControlGroup:
        group = ControlGroup(self._make_transport(), self._find_store, self.rank, self.world_size)
        group.monitor = self._monitor
        return group

    def _find_store(self, what: object, timeout_s: float) -> KeyValueStore | None:
        """Return the job's key-value store, which is made at the first call."""
        with self._finding:
            if self._store_lost_in is not None:
                where = self._store_lost_in
                msg = f"rank {self.rank}: {what} cannot run: the control group was aborted earlier ({where})"
                raise CollectiveError(msg)
            if not self._is_store_found:
                try:
                    self._found_store = self._make_store(what, timeout_s)
                except (OSError, CollectiveError) as error:
                    self._store_lost_in = str(what)
                    if isinstance(error, CollectiveError):
                        raise
                    raise store_lost_error(self.rank, what, error) from error
                self._is_store_found = True
            return self._found_store

    @property
    def monitor(self) -> PeerMonitor | None:
        return self._monitor

    @monitor.setter
    def monitor(self, monitor: PeerMonitor | None) -> None:
        self._monitor = monitor
        if "_control_group" in vars(self):
            self._control_group.monitor = monitor

    def key_value_store(self, *, timeout_s: float | None = None) -> KeyValueStore | None:
        return self._find_store("the first use of the job's store", limit_of(timeout_s))

    def reduce_host(self, values: torch.Tensor, op: ReduceOp, *, what: object, timeout_s: float | None) -> torch.Tensor:
        return self._control_group.reduce(values, op, what=what, timeout_s=limit_of(timeout_s))

    def start_max(self, values: Sequence[int], *, what: object, timeout_s: float | None) -> Callable[[], list[int]]:
        return self._control_group.start_max(values, what=what, timeout_s=limit_of(timeout_s))

    def gather_host(self, data: bytes, num_bytes: int, *, what: object, timeout_s: float | None) -> list[bytes]:
        return self._control_group.gather_bytes(data, num_bytes, what=what, timeout_s=limit_of(timeout_s))

    def reduce_tensor(self, tensor: torch.Tensor, op: TensorOp) -> torch.Tensor:
        if tensor.dtype is torch.bool:
            return self.reduce_tensor(tensor.to(torch.uint8), _BOOL_OPS.get(op, op)).to(torch.bool)
        if not self._can_reduce(tensor, op):
            return functools.reduce(FOLD[op], self.gather_tensor(tensor))
        if tensor.device.type == "cpu":
            return self._control_group.reduce(tensor, op, what="all_reduce", timeout_s=default_timeout_s())
        return self._reduce_on_device(tensor, op)

    def gather_tensor(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        parts = self._control_group.gather(tensor.detach().cpu(), what="all_gather", timeout_s=default_timeout_s())
        return [chunk.to(tensor.device) for chunk in parts]

    def broadcast_tensor(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        mine, limit_s = tensor.detach().cpu(), default_timeout_s()
        return self._control_group.broadcast(mine, src, what="broadcast", timeout_s=limit_s).to(tensor.device)

    def close(self) -> None:
        if "_control_group" in vars(self):
            self._control_group.close()

    def next_object_id(self, kind: str) -> str | None:
        number = self._num_objects.get(kind, 0)
        self._num_objects[kind] = number + 1
        return f"{kind}#{number}"

    def post_note(self, object_id: str, text: str) -> None:
        store = self._find_store(f"a note of {object_id}", default_timeout_s())
        if store is not None:
            store.set(f"note/{object_id}", text, limit_s=default_timeout_s())

    def store_barrier(self, name: str, *, depends_on: str | None, timeout_s: float | None) -> str | None:
        """All ranks. Block until every rank has called `name`; by a collective if the job has no key-value store.

        Raises:
            DesyncError: every rank waits, but at different barriers.
            CollectiveError: a rank is lost, or the job's store.
        """
        limit_s = limit_of(timeout_s)
        store = self._find_store(name, limit_s)
        if store is None:
            self.barrier(what=name, timeout_s=limit_s)
            return None
        group = self._control_group
        group.find_store(name, limit_s)
        detector = DesyncDetector(store, self.world_size)

        def check() -> str | None:
            failure = None if self._monitor is None else self._monitor.failure()
            if failure is not None:
                raise failure
            group.raise_if_aborted(name)
            detector.check(name)
            return None if depends_on is None else store.get_many([f"note/{depends_on}"], limit_s=ANSWER_LIMIT_S)[0]

        try:
            store.set(f"at/{self.rank}", name, limit_s=limit_s)
            note = store_barrier(
                store, f"barrier/{name}", self.rank, self.world_size, what=name, timeout_s=limit_s, check=check
            )
            store.set(f"at/{self.rank}", "", limit_s=limit_s)
        except (OSError, CollectiveError) as error:
            # The monitor may know why the store cannot be reached.
            is_lost = isinstance(error, OSError) or not error.missing
            if is_lost and self._monitor is not None and (failure := self._monitor.failure(_REASON_S)) is not None:
                raise failure  # noqa: B904 - its cause is on another rank; this error is its context
            if isinstance(error, OSError):
                raise store_lost_error(self.rank, name, error) from error
            raise
        return note


def limit_of(timeout_s: float | None) -> float:
    """Return a time limit in seconds; None stands for the default."""
    return default_timeout_s() if timeout_s is None else timeout_s
