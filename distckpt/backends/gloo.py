"""Host values over a Gloo group of our own.

Owns the group: it is made straight on the job's store, not by ``torch.distributed.new_group``, which pairs by a count
of all groups made so far, and blocks for the process group's own timeout when a rank stays away.
"""

import ctypes
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from distckpt.backends.base import TensorOp
from distckpt.backends.transport import Transport

__all__ = ["TENSOR_OPS", "GlooTransport"]

TENSOR_OPS = {
    "SUM": dist.ReduceOp.SUM,
    "PRODUCT": dist.ReduceOp.PRODUCT,
    "MIN": dist.ReduceOp.MIN,
    "MAX": dist.ReduceOp.MAX,
    "AND": dist.ReduceOp.BAND,
    "OR": dist.ReduceOp.BOR,
}
"""torch.distributed's name of each operation."""

# How long an operation that failed here is waited for at the end; Gloo's own limit comes a second after ours.
_LEAVE_S = 1.5
_PAUSE_S = 0.025
# By how much Gloo's limit is longer than ours, so that we are the ones who explain what happened.
_LATER_S = 1.0


class GlooTransport(Transport):
    """One rank's end of a Gloo group.

    Args:
        store: the job's store, under a prefix that no other group uses.
        rank: this rank.
        world_size: number of ranks.
    """

    shares_memory = True

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._group: Any = None  # ProcessGroupGloo, whose operations have no types
        self._under_way: list[Any] = []  # works that were not known to have ended

    def connect(self, timeout_s: float) -> None:
        """Collective. Form the group."""
        self._group = dist.ProcessGroupGloo(self._store, self._rank, self._world_size, timedelta(seconds=timeout_s))

    def reduce(self, result: torch.Tensor, op: TensorOp, timeout_s: float) -> Any:
        """Reduce a CPU tensor in place."""
        options = c10d.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(TENSOR_OPS[op])
        return self._keep(self._group.allreduce([result], _limited(options, timeout_s)))

    def gather(self, result: Sequence[torch.Tensor], mine: torch.Tensor, timeout_s: float) -> Any:
        """Fill `result` with every rank's `mine`."""
        options = _limited(c10d.AllgatherOptions(), timeout_s)
        return self._keep(self._group.allgather([list(result)], [mine], options))

    def broadcast(self, result: torch.Tensor, src: int, timeout_s: float) -> Any:
        """Fill `result` with that of rank `src`."""
        options = c10d.BroadcastOptions()
        options.rootRank = src
        options.rootTensor = 0
        return self._keep(self._group.broadcast([result], _limited(options, timeout_s)))

    def maximum(self, values: list[int], timeout_s: float) -> "_Maximum":
        """Reduce twelve int64 with MAX."""
        result = torch.tensor(values)
        return _Maximum(self.reduce(result, "MAX", timeout_s), result)

    def close(self) -> None:
        """Let the group's threads end."""
        group, self._group = self._group, None
        if group is not None and not self._ends_within(_LEAVE_S):
            # Gloo waits for what is under way before it lets its threads end, as long as that one's own limit is: half
            # an hour where a checkpoint was being written. A process that has to end must not: it keeps the group.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))

    def _keep(self, work: Any) -> Any:
        self._under_way = [*(one for one in self._under_way if not one.is_completed()), work]
        return work

    def _ends_within(self, limit_s: float) -> bool:
        """Wait until nothing is under way in Gloo's threads any more; tell whether it is so."""
        deadline = time.monotonic() + limit_s
        while any(not work.is_completed() for work in self._under_way):
            if time.monotonic() > deadline:
                return False
            time.sleep(_PAUSE_S)
        return True


class _Maximum:
    """A reduction over Gloo, with the face of one in shared memory."""

    def __init__(self, work: Any, result: torch.Tensor) -> None:
        self._result = result
        self.wait = work.wait
        self.is_completed = work.is_completed

    def is_done(self) -> bool:
        """Return False: it has to be waited for."""
        return False

    @property
    def values(self) -> list[int]:
        """The result, once it is done."""
        values: list[int] = self._result.tolist()
        return values


def _limited(options: Any, timeout_s: float) -> Any:
    options.timeout = timedelta(seconds=timeout_s + _LATER_S)
    return options
