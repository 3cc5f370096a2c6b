"""The backend of a torch.distributed job: NCCL, Gloo, and any other backend that a build registers.

Host values travel on a Gloo group of our own (:mod:`distckpt.backends.gloo`), whatever the job's backend: they never
pair with the job's collectives, and have time limits of their own. Tensors on a device use the job's process group.
"""

import contextlib
import functools
import os
import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from distckpt.backends.base import TensorOp, default_timeout_s
from distckpt.backends.control_backend import ControlGroupBackend, limit_of
from distckpt.backends.gloo import TENSOR_OPS, GlooTransport
from distckpt.backends.key_value_store import TorchKeyValueStore
from distckpt.backends.store_notes import store_lost_error

_GLOO_REDUCES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int8, torch.uint8}
)
_LOCAL_RANK_VARIABLES = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
_LOCAL_SIZE_VARIABLES = ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
_NODE_VARIABLES = ("GROUP_RANK", "SLURM_NODEID")


class TorchDistBackend(ControlGroupBackend):
    """One rank of the default process group.

    Args:
        group: torch.distributed's default process group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        rank = dist.get_rank(group)
        local_size, local_rank = _first_number(_LOCAL_SIZE_VARIABLES), _first_number(_LOCAL_RANK_VARIABLES)
        if local_rank is None:  # without a launcher, as if there were one node
            local_rank = rank if local_size is None else rank % local_size
        node = _first_number(_NODE_VARIABLES)
        if node is None:
            node = 0 if local_size is None else rank // local_size
        super().__init__(rank, dist.get_world_size(group), local_rank, node)
        self.name = str(dist.get_backend(group))
        self._group = weakref.ref(group)

    @functools.cached_property
    def _store(self) -> dist.Store:
        """The job's store, under a prefix of this backend's own. Not used for the identity.

        A forked data loader may ask for its rank, and must not use the store's connection.
        """
        root = c10d._get_default_store()  # noqa: SLF001 - the job's store has no public name
        # The same number on every rank: each counts the backends that it used on this store.
        key, limit_s = f"distckpt/made/{self.rank}", default_timeout_s()
        try:
            with contextlib.closing(TorchKeyValueStore(root, lambda: True, is_guest=True)) as guest:
                number = guest.add(key, 1, limit_s=limit_s)
        except OSError as error:
            raise store_lost_error(self.rank, "the first use of it", error) from error
        return dist.PrefixStore(f"distckpt/{number}", root)

    def _make_transport(self) -> GlooTransport:
        return GlooTransport(dist.PrefixStore("control/gloo", self._store), self.rank, self.world_size)

    def _make_store(self, what: object, timeout_s: float) -> TorchKeyValueStore:
        del what, timeout_s  # the launcher hosts the store
        group = self._group  # not through self, which the store's thread must not keep alive
        return TorchKeyValueStore(self._store, lambda: dist.is_initialized() and dist.group.WORLD is group())

    def abort(self) -> None:
        """Abort the job's process group. This ends NCCL's collectives, but not Gloo's that wait already."""
        group = self._group()
        if group is not None:
            with contextlib.suppress(RuntimeError):
                group.abort()

    def exchange_host(
        self, parts: Sequence[bytes | bytearray], num_received: Sequence[int], *, what: object, timeout_s: float | None
    ) -> list[memoryview]:
        return self._control_group.exchange(parts, num_received, what=what, timeout_s=limit_of(timeout_s))

    def _can_reduce(self, tensor: torch.Tensor, op: TensorOp) -> bool:
        return tensor.device.type != "cpu" or tensor.dtype in _GLOO_REDUCES

    def _reduce_on_device(self, tensor: torch.Tensor, op: TensorOp) -> torch.Tensor:
        result = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, TENSOR_OPS[op])
        return result

    def gather_tensor(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        if tensor.device.type == "cpu":
            return super().gather_tensor(tensor)
        mine = tensor.detach().contiguous()
        result = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(result, mine)
        return result

    def broadcast_tensor(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        if tensor.device.type == "cpu":
            return super().broadcast_tensor(tensor, src)
        result = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(result, src=src)
        return result


def _first_number(variables: tuple[str, ...]) -> int | None:
    for variable in variables:
        text = os.environ.get(variable, "")
        if text.isdecimal():
            return int(text)
    return None
