"""Host values over a Gloo group of our own.

The group is made on the job's store, not by ``torch.distributed.new_group``. That function pairs groups by a count of
all groups made so far, and blocks for the process group's own timeout if a rank stays away.
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
from distckpt.backends.transport import TensorMaxWork, Transport

TENSOR_OPS = {
    "SUM": dist.ReduceOp.SUM,
    "PRODUCT": dist.ReduceOp.PRODUCT,
    "MIN": dist.ReduceOp.MIN,
    "MAX": dist.ReduceOp.MAX,
    "AND": dist.ReduceOp.BAND,
    "OR": dist.ReduceOp.BOR,
}
"""torch.distributed's name of each operation."""

_CLOSE_LIMIT_S = 1.5  # how long close() waits for a failed operation; Gloo's own limit comes a second after ours
_PAUSE_S = 0.025
_EXTRA_S = 1.0  # by how much Gloo's limit exceeds ours, so that the control group explains what happened


class GlooTransport(Transport):
    """One rank of a Gloo group.

    Args:
        store: the job's store, under a prefix that no other group uses.
        rank: this rank.
        world_size: number of ranks.
    """

    can_share_memory = True

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._group: Any = None  # ProcessGroupGloo, whose operations have no types
        self._pending: list[Any] = []  # works that were not known to have ended

    def connect(self, timeout_s: float) -> None:
        self._group = dist.ProcessGroupGloo(self._store, self._rank, self._world_size, timedelta(seconds=timeout_s))

    def reduce(self, result: torch.Tensor, op: TensorOp, timeout_s: float) -> Any:
        options = c10d.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(TENSOR_OPS[op])
        return self._track(self._group.allreduce([result], _limited(options, timeout_s)))

    def gather(self, result: Sequence[torch.Tensor], mine: torch.Tensor, timeout_s: float) -> Any:
        options = _limited(c10d.AllgatherOptions(), timeout_s)
        return self._track(self._group.allgather([list(result)], [mine], options))

    def broadcast(self, result: torch.Tensor, src: int, timeout_s: float) -> Any:
        options = c10d.BroadcastOptions()
        options.rootRank = src
        options.rootTensor = 0
        return self._track(self._group.broadcast([result], _limited(options, timeout_s)))

    def exchange(
        self,
        result: torch.Tensor,
        mine: torch.Tensor,
        num_received: Sequence[int],
        num_sent: Sequence[int],
        timeout_s: float,
    ) -> Any:
        """Send parts of `mine`, uint8 (n,), to each rank, and fill `result`, uint8 (m,), with what each rank sends."""
        options = _limited(c10d.AllToAllOptions(), timeout_s)
        return self._track(self._group.alltoall_base(result, mine, list(num_received), list(num_sent), options))

    def start_max(self, values: list[int], timeout_s: float) -> TensorMaxWork:
        result = torch.tensor(values)
        return TensorMaxWork(self.reduce(result, "MAX", timeout_s), result)

    def close(self) -> None:
        """End the group's threads."""
        group, self._group = self._group, None
        if group is None:
            return
        deadline = time.monotonic() + _CLOSE_LIMIT_S
        while any(not work.is_completed() for work in self._pending):
            if time.monotonic() > deadline:
                # The group's destructor would wait for the operation's own limit: half an hour while a checkpoint is
                # written. A process that has to end keeps the group instead.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
                return
            time.sleep(_PAUSE_S)

    def _track(self, work: Any) -> Any:
        self._pending = [*(other for other in self._pending if not other.is_completed()), work]
        return work


def _limited(options: Any, timeout_s: float) -> Any:
    options.timeout = timedelta(seconds=timeout_s + _EXTRA_S)
    return options
