"""Host values over XLA: every operation is one all-reduce of int32, exact on every device (a TPU's float64 is not).

Two rules keep the collectives safe:

1. **Pending computations of the program run first, in a graph of their own.** Replicas complete a collective only
   if they run the same program. A pending value of one replica, such as a metric on rank 0, would change its program.
2. **Replicas of one process wait for each other at a gate, and then enter a collective at once.** A replica that enters
   alone cannot come back: on a CPU the runtime ends the process after ten seconds. At the gate it has a time limit, and
   learns which replicas are missing. Between the gate and the collective nothing else is computed:
   ``torch_xla.sync()`` with nothing to do waits for the first device (torch_xla 2.9), where another replica may be
   waiting for this one.

The graphs have few shapes, so that each is compiled once: twelve numbers for a vote, and 16 * 4**k words for a gather.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch_xla
import torch_xla.core.xla_model as xm

from distckpt.backends.base import TensorOp, default_timeout_s
from distckpt.backends.control_backend import FOLD
from distckpt.backends.transport import TensorMaxWork, Transport, from_bytes, to_bytes

REDUCE_OPS = {"SUM": xm.REDUCE_SUM, "PRODUCT": xm.REDUCE_MUL, "MIN": xm.REDUCE_MIN, "MAX": xm.REDUCE_MAX}
_MIN_WORDS = 16
_MAX_WORDS = 65536
_INT32 = 2**31
_TRACING = threading.Lock()


class XlaTransport(Transport):
    """Carries one replica's host values; the replicas of this process wait for each other at `gate`."""

    def __init__(self, rank: int, world_size: int, device: torch.device, gate: "Gate") -> None:
        self._rank = rank
        self._world_size = world_size
        self._device = device
        self._gate = gate
        self._num_works = 0

    def reduce(self, result: torch.Tensor, op: TensorOp, timeout_s: float) -> "_Work":
        """Reduce a CPU tensor of any dtype in place: every replica gathers all, and folds them in rank order."""
        del timeout_s  # the control group looks at the clock
        mine = to_bytes(result).clone()

        def exchange() -> None:
            parts = [from_bytes(data.clone(), result) for data in self._gather(mine)]
            result.copy_(functools.reduce(FOLD[op], parts))

        return self.begin(exchange)

    def gather(self, result: Sequence[torch.Tensor], mine: torch.Tensor, timeout_s: float) -> "_Work":

        def exchange() -> None:
            for chunk, sent in zip(result, self._gather(mine), strict=True):
                chunk.copy_(sent)

        return self.begin(exchange)

    def broadcast(self, result: torch.Tensor, src: int, timeout_s: float) -> "_Work":

        def exchange() -> None:
            words = _to_words(result if self._rank == src else torch.zeros_like(result))
            sent = torch.cat([self._all_reduce(xm.REDUCE_SUM, chunk) for chunk in torch.split(words, _MAX_WORDS)])
            result.copy_(sent.view(torch.uint8)[: result.numel()])

        return self.begin(exchange)

    def start_max(self, values: Sequence[int | torch.Tensor], timeout_s: float) -> TensorMaxWork:
        """Start to reduce twelve numbers with MAX. Unknown ones are bool () or integers () on this replica's device."""
        known = [0 if isinstance(value, torch.Tensor) else value for value in values]
        if any(not -_INT32 <= value < _INT32 for value in known):
            raise OverflowError(f"numbers that XLA reduces have to fit into int32, but given {known}")
        mine = torch.tensor(known, dtype=torch.int32).to(self._device)
        for index, value in enumerate(values):
            if isinstance(value, torch.Tensor):
                number = value.detach().reshape(1).to(torch.int32)
                mine = mine + torch.nn.functional.pad(number, (index, len(known) - 1 - index))
        # Pending computations run now, and with them the numbers that depend on them, in one graph. Nothing waits.
        torch_xla.sync()
        result = torch.zeros(len(known), dtype=torch.int32)
        work = _Work(self._gate, self._next(), self._rank, lambda: result.copy_(self._all_reduce(xm.REDUCE_MAX, mine)))
        return TensorMaxWork(work, result)

    def withdraw(self, work: Any) -> bool:
        own: _Work = work.work if isinstance(work, TensorMaxWork) else work
        return own.withdraw()

    def begin(self, exchange: Callable[[], None]) -> "_Work":
        """Return an operation that calls `exchange`, which is collective, when all replicas have arrived."""
        return _Work(self._gate, self._next(), self._rank, exchange)

    def _next(self) -> int:
        self._num_works += 1
        return self._num_works

    def _gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """Return every rank's bytes, uint8 (n,)."""
        gathered = []
        for chunk in torch.split(_to_words(mine), _MAX_WORDS):
            rows = torch.zeros(self._world_size, chunk.numel(), dtype=torch.int32)
            rows[self._rank] = chunk
            gathered.append(self._all_reduce(xm.REDUCE_SUM, rows))
        rows = torch.cat(gathered, dim=1)
        return [row.contiguous().view(torch.uint8)[: mine.numel()] for row in rows]

    def _all_reduce(self, op: str, values: torch.Tensor) -> torch.Tensor:
        """Reduce int32, and copy the result to the host. All other collectives are made of this one."""
        result = trace_all_reduce(op, values.to(self._device))
        torch_xla.sync()
        on_host: torch.Tensor = result.cpu()
        return on_host


def trace_all_reduce(op: str, values: torch.Tensor) -> torch.Tensor:
    """Return the lazy result of a reduction over the replicas.

    One replica at a time: torch_xla shares state of all devices here, and replicas of one process that trace at the
    same moment crash now and then (torch_xla 2.9).
    """
    with _TRACING:
        result: torch.Tensor = xm.all_reduce(op, values)
    return result


def _to_words(data: torch.Tensor) -> torch.Tensor:
    """Return bytes as int32, padded with zeros to 16 * 4**k words, or to a multiple of the most words."""
    num_words = -(-data.numel() // 4)
    size = _MIN_WORDS
    while size < min(num_words, _MAX_WORDS):
        size *= 4
    if num_words > _MAX_WORDS:
        size = -(-num_words // _MAX_WORDS) * _MAX_WORDS
    padded = torch.zeros(4 * size, dtype=torch.uint8)
    padded[: data.numel()] = data
    return padded.view(torch.int32)


class _Work:
    """An operation in progress. `exchange`, a collective, runs when all replicas of this process have arrived."""

    def __init__(self, gate: "Gate", number: int, rank: int, exchange: Callable[[], object]) -> None:
        self._gate = gate
        self._number = number
        self._rank = rank
        self._exchange = exchange
        self._has_arrived = self._has_ended = False

    def wait(self, timeout: timedelta | None = None) -> None:
        # Raises RuntimeError if not all have arrived within `timeout`, or the runtime does.
        if self._has_ended:
            return
        if not self._has_arrived:
            self._has_arrived = True
            torch_xla.sync()  # the module's first rule
            self._gate.arrive(self._number, self._rank)
        limit_s = default_timeout_s() if timeout is None else timeout.total_seconds()
        if not self._gate.wait(self._number, limit_s):
            raise RuntimeError(f"not all replicas of this process have come within {limit_s:g} s")
        self._has_ended = True
        self._exchange()

    def is_completed(self) -> bool:
        return self._has_ended

    def withdraw(self) -> bool:
        return not self._has_ended and self._gate.withdraw(self._number, self._rank)


class Gate:
    """Where replicas that are threads of one process wait for each other before a collective."""

    def __init__(self, num_replicas: int) -> None:
        self._num_replicas = num_replicas
        self._arrived: dict[int, set[int]] = {}
        self._all_arrived = threading.Condition()
        self._last = 0  # number of the last operation at which all have arrived

    def arrive(self, number: int, rank: int) -> None:
        """Note that a replica has arrived at an operation."""
        with self._all_arrived:
            arrived = self._arrived.setdefault(number, set())
            arrived.add(rank)
            if len(arrived) == self._num_replicas:
                del self._arrived[number]
                self._last = max(self._last, number)
                self._all_arrived.notify_all()

    def wait(self, number: int, limit_s: float) -> bool:
        """Wait until all have arrived; return False if they do not within the limit."""
        with self._all_arrived:
            return self._all_arrived.wait_for(lambda: self._last >= number, limit_s)

    def withdraw(self, number: int, rank: int) -> bool:
        """Take back a replica's arrival; return False if all have arrived by now."""
        with self._all_arrived:
            if self._last >= number:
                return False
            self._arrived.get(number, set()).discard(rank)
            return True


class ReplicaGroup:
    """What the replicas of one job that are threads of this process share.

    Attributes:
        num_replicas: their number.
        gate: where they wait for each other.
        store: of their key-value store.
    """

    _groups: ClassVar[dict[int, "ReplicaGroup"]] = {}
    _lock = threading.Lock()

    def __init__(self, job_number: int, num_replicas: int) -> None:
        self.num_replicas = num_replicas
        self.gate = Gate(num_replicas)
        self.store = dist.HashStore()
        self._job_number = job_number
        self._num_left = 0

    @classmethod
    def of_job(cls, job_number: int, num_replicas: int) -> "ReplicaGroup":
        """Return the group of the job of this number: every replica counts its jobs."""
        with cls._lock:
            return cls._groups.setdefault(job_number, cls(job_number, num_replicas))

    def leave(self) -> None:
        """Note that a replica has left."""
        with self._lock:
            self._num_left += 1
            if self._num_left == self.num_replicas:
                self._groups.pop(self._job_number, None)
