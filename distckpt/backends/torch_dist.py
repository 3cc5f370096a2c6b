"""Ranks of a torch.distributed job: NCCL, Gloo, and any other backend that a build registers.

Owns the backend over torch.distributed's default process group. Host values travel on a Gloo group of our
own (:mod:`distckpt.backends.gloo`), whatever the job's backend, so that they never pair with the
job's collectives and have time limits of their own. Tensors on a device go by the job's group.
"""

import contextlib
import functools
import os
import weakref

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from distckpt.backends.base import TensorOp, default_timeout_s
from distckpt.backends.control_backend import FOLD, ControlGroupBackend
from distckpt.backends.control_group import store_lost_error
from distckpt.backends.gloo import TENSOR_OPS, GlooTransport
from distckpt.backends.key_value_store import TorchKeyValueStore

__all__ = ["TorchDistBackend"]

_GLOO_REDUCES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int8, torch.uint8}
)
_LOCAL_RANK_VARIABLES = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
_LOCAL_SIZE_VARIABLES = ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
_NODE_VARIABLES = ("GROUP_RANK", "SLURM_NODEID")


class TorchDistBackend(ControlGroupBackend):
    """One rank of the live default process group.

    Args:
        group: torch.distributed's default process group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self.name = str(dist.get_backend(group))
        self._local_rank, self._node = _place(self._rank)
        self._group = weakref.ref(group)

    @functools.cached_property
    def _store(self) -> dist.Store:
        """The job's store, under a prefix of this backend's own. Not touched for identity alone.

        A forked data loader may ask for its rank, and must not speak on the store's connection.
        """
        root = c10d._get_default_store()  # noqa: SLF001 - the job's store has no public name
        # The same number on every rank: each counts the backends that it used on this store.
        key, limit_s = f"distckpt/made/{self._rank}", default_timeout_s()
        try:
            with contextlib.closing(TorchKeyValueStore(root, lambda: True, is_guest=True)) as guest:
                number = guest.add(key, 1, limit_s=limit_s)
        except OSError as error:
            raise store_lost_error(self._rank, "the first use of it", error) from error
        return dist.PrefixStore(f"distckpt/{number}", root)

    def _make_transport(self) -> GlooTransport:
        return GlooTransport(dist.PrefixStore("host/gloo", self._store), self._rank, self._world_size)

    def _make_store(self, what: object, timeout_s: float) -> TorchKeyValueStore:
        del what, timeout_s  # the launcher keeps the store
        group = self._group  # not through self, which the board's thread must not keep alive
        return TorchKeyValueStore(self._store, lambda: dist.is_initialized() and dist.group.WORLD is group())

    def abort(self) -> None:
        """Abort the job's process group. NCCL's collectives end then; Gloo's do not hear of it while they wait."""
        group = self._group()
        if group is not None:
            with contextlib.suppress(RuntimeError):
                group.abort()

    @property
    def local_rank(self) -> int:
        """As the launcher says (``LOCAL_RANK`` and its kin); else the rank, as if there were one node."""
        return self._local_rank

    @property
    def node(self) -> int:
        """As the launcher says (``GROUP_RANK``, ``SLURM_NODEID``); else 0."""
        return self._node

    def device(self) -> torch.device:
        """Return the current CUDA device if there is one, else the CPU."""
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    def reduce_tensor(self, tensor: torch.Tensor, op: TensorOp) -> torch.Tensor:
        """Collective. Reduce over our own group on the CPU, over the job's elsewhere."""
        if tensor.dtype is torch.bool:  # neither NCCL nor Gloo reduces bools
            instead: TensorOp = {"AND": "MIN", "OR": "MAX"}.get(op, op)  # type: ignore[assignment]
            return self.reduce_tensor(tensor.to(torch.uint8), instead).to(torch.bool)
        if tensor.device.type == "cpu" and tensor.dtype not in _GLOO_REDUCES:
            return functools.reduce(FOLD[op], self.gather_tensor(tensor))
        if tensor.device.type == "cpu":
            limit_s = default_timeout_s()
            return self._control_group.reduce(tensor, op, what="all_reduce", timeout_s=limit_s)
        result = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, TENSOR_OPS[op])
        return result

    def gather_tensor(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Collective. Gather over our own group on the CPU, over the job's elsewhere."""
        if tensor.device.type == "cpu":
            limit_s = default_timeout_s()
            return self._control_group.gather(tensor, what="all_gather", timeout_s=limit_s)
        mine = tensor.detach().contiguous()
        result = [torch.empty_like(mine) for _ in range(self._world_size)]
        dist.all_gather(result, mine)
        return result

    def broadcast_tensor(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """Collective. Broadcast over our own group on the CPU, over the job's elsewhere."""
        if tensor.device.type == "cpu":
            limit_s = default_timeout_s()
            return self._control_group.broadcast(tensor, src, what="broadcast", timeout_s=limit_s)
        result = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(result, src=src)
        return result


def _place(rank: int) -> tuple[int, int]:
    """Return local rank and node as the launcher's environment tells them."""
    local_rank = _first_number(_LOCAL_RANK_VARIABLES)
    local_size = _first_number(_LOCAL_SIZE_VARIABLES)
    node = _first_number(_NODE_VARIABLES)
    if local_rank is None:
        local_rank = rank if local_size is None else rank % local_size
    if node is None:
        node = 0 if local_size is None else rank // local_size
    return local_rank, node


def _first_number(variables: tuple[str, ...]) -> int | None:
    for variable in variables:
        text = os.environ.get(variable, "")
        if text.isdecimal():
            return int(text)
    return None
