"""Ranks of a torch.distributed job: NCCL, Gloo, and any other backend that a build registers.

Owns the backend over torch.distributed's default process group. Host values travel on a Gloo group of our
own (:mod:`distckpt.backends.host_group`), whatever the job's backend, so that they never pair with the
job's collectives and have time limits of their own. Tensors on a device go by the job's group. Layer L2.
"""

import functools
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from distckpt.backends.base import Backend, ReduceOp, TensorOp, default_timeout_s
from distckpt.backends.host_group import HostGroup, call_the_roll
from distckpt.errors import RanksDriftedApart

__all__ = ["TorchDistBackend"]

_TENSOR_OPS = {
    "SUM": dist.ReduceOp.SUM,
    "PRODUCT": dist.ReduceOp.PRODUCT,
    "MIN": dist.ReduceOp.MIN,
    "MAX": dist.ReduceOp.MAX,
    "AND": dist.ReduceOp.BAND,
    "OR": dist.ReduceOp.BOR,
}
_GLOO_REDUCES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int8, torch.uint8}
)
_FOLD: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "SUM": torch.add,
    "PRODUCT": torch.mul,
    "MIN": torch.minimum,
    "MAX": torch.maximum,
    "AND": torch.bitwise_and,
    "OR": torch.bitwise_or,
}
_DRIFT_S = 1.0
_LOCAL_RANK_VARIABLES = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
_LOCAL_SIZE_VARIABLES = ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
_NODE_VARIABLES = ("GROUP_RANK", "SLURM_NODEID")


class TorchDistBackend(Backend):
    """One rank of the live default process group.

    Args:
        group: torch.distributed's default process group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._rank = dist.get_rank(group)
        self._world_size = dist.get_world_size(group)
        self.name = str(dist.get_backend(group))
        self._local_rank, self._node = _place(self._rank)
        self._num_tickets: dict[str, int] = {}

    @functools.cached_property
    def _store(self) -> dist.Store:
        """The job's store, under a prefix of this backend's own. Not touched for identity alone.

        A forked data loader may ask for its rank, and must not speak on the store's connection.
        """
        root = c10d._get_default_store()  # noqa: SLF001 - the job's store has no public name
        # The same number on every rank: each counts the backends that it used on this store.
        return dist.PrefixStore(f"distckpt/{root.add(f'distckpt/made/{self._rank}', 1)}", root)

    @functools.cached_property
    def _host(self) -> HostGroup:
        return HostGroup(dist.PrefixStore("host", self._store), self._rank, self._world_size)

    @property
    def rank(self) -> int:
        """Rank in the default process group."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Size of the default process group."""
        return self._world_size

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

    def reduce_host(self, values: torch.Tensor, op: ReduceOp, *, what: str, timeout_s: float | None) -> torch.Tensor:
        """Collective. Reduce over our own Gloo group."""
        limit_s = default_timeout_s() if timeout_s is None else timeout_s
        return self._host.reduce(values, op, what=what, timeout_s=limit_s)

    def gather_host(self, data: bytes, num_bytes: int, *, what: str, timeout_s: float | None) -> list[bytes]:
        """Collective. Gather over our own Gloo group."""
        limit_s = default_timeout_s() if timeout_s is None else timeout_s
        return self._host.gather_bytes(data, num_bytes, what=what, timeout_s=limit_s)

    def reduce_tensor(self, tensor: torch.Tensor, op: TensorOp) -> torch.Tensor:
        """Collective. Reduce over our own group on the CPU, over the job's elsewhere."""
        if tensor.dtype is torch.bool:  # neither NCCL nor Gloo reduces bools
            instead: TensorOp = {"AND": "MIN", "OR": "MAX"}.get(op, op)  # type: ignore[assignment]
            return self.reduce_tensor(tensor.to(torch.uint8), instead).to(torch.bool)
        if tensor.device.type == "cpu" and tensor.dtype not in _GLOO_REDUCES:
            return functools.reduce(_FOLD[op], self.gather_tensor(tensor))
        if tensor.device.type == "cpu":
            limit_s = default_timeout_s()
            return self._host.reduce(tensor, _TENSOR_OPS[op], what="all_reduce", timeout_s=limit_s)
        result = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, _TENSOR_OPS[op])
        return result

    def gather_tensor(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Collective. Gather over our own group on the CPU, over the job's elsewhere."""
        if tensor.device.type == "cpu":
            limit_s = default_timeout_s()
            return self._host.gather(tensor, what="all_gather", timeout_s=limit_s)
        mine = tensor.detach().contiguous()
        result = [torch.empty_like(mine) for _ in range(self._world_size)]
        dist.all_gather(result, mine)
        return result

    def broadcast_tensor(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """Collective. Broadcast over our own group on the CPU, over the job's elsewhere."""
        if tensor.device.type == "cpu":
            limit_s = default_timeout_s()
            return self._host.broadcast(tensor, src, what="broadcast", timeout_s=limit_s)
        result = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(result, src=src)
        return result

    def close(self) -> None:
        """End the host group, if there is one."""
        if "_host" in vars(self):
            self._host.close()

    def take_ticket(self, kind: str) -> str | None:
        """Return ``kind#n``, counting from 0 on this process group."""
        number = self._num_tickets.get(kind, 0)
        self._num_tickets[kind] = number + 1
        return f"{kind}#{number}"

    def post_note(self, ticket: str, text: str) -> None:
        """Leave a note in the job's store."""
        self._store.set(f"note/{ticket}", text)

    def roll_call(self, name: str, *, watch: str | None, timeout_s: float | None) -> str | None:
        """Wait in the job's store until every rank has called `name`.

        Raises:
            RanksDriftedApart: every rank waits, at different names: none can ever come to the other.
        """
        self._store.set(f"at/{self._rank}", name)
        drift = _Drift(self._store, self._world_size)

        def news() -> str | None:
            self._host.refuse_if_given_up(name)
            drift.look(name)
            key = f"note/{watch}"
            found = watch is not None and self._store.check([key])
            return self._store.get(key).decode("utf-8") if found else None

        note = call_the_roll(
            dist.PrefixStore(f"roll/{name}", self._store),
            self._rank,
            self._world_size,
            what=name,
            timeout_s=default_timeout_s() if timeout_s is None else timeout_s,
            watch=news,
        )
        self._store.set(f"at/{self._rank}", "")
        return note


class _Drift:
    """Finds out that all ranks wait, but not for each other.

    A rank that has just left a roll is written down there for a moment longer: only what lasts counts.
    """

    def __init__(self, store: dist.Store, world_size: int) -> None:
        self._store = store
        self._keys = [f"at/{rank}" for rank in range(world_size)]
        self._since_s: float | None = None
        self._seen: list[str] = []

    def look(self, mine: str) -> None:
        if not self._store.check(self._keys):
            return
        places = [self._store.get(key).decode("utf-8") for key in self._keys]
        if not all(places) or all(place == mine for place in places) or places != self._seen:
            self._seen, self._since_s = places, time.monotonic()
        elif self._since_s is not None and time.monotonic() - self._since_s > _DRIFT_S:
            where = "; ".join(f"rank {rank} is at {place}" for rank, place in enumerate(places))
            msg = (
                f"The ranks wait at different places, and none can come to the other: {where}. Handlers have to be "
                "built and attached on all ranks, in the same order."
            )
            raise RanksDriftedApart(msg)


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
