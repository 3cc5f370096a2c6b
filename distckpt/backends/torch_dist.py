"""Ranks of a torch.distributed job: NCCL, Gloo, and any other backend that a build registers.

Owns the backend over torch.distributed's default process group. Host values travel on a Gloo group of our
own (:mod:`distckpt.backends.host_group`), whatever the job's backend, so that they never pair with the
job's collectives and have time limits of their own. Tensors on a device go by the job's group. Layer L2.
"""

import contextlib
import functools
import os
import time
import weakref
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from distckpt.backends.base import Backend, Board, ReduceOp, TensorOp, Watcher, default_timeout_s
from distckpt.backends.host_group import HostGroup, board_is_gone, call_the_roll
from distckpt.backends.store_board import StoreBoard
from distckpt.errors import CollectiveError, RanksDriftedApart

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
# How long the board is asked for news in a roll, and how long the watcher for the reason why it is silent.
_NOTE_S = 1.0
_REASON_S = 5.0
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
        self._group = weakref.ref(group)
        self._watcher: Watcher | None = None

    @functools.cached_property
    def _store(self) -> dist.Store:
        """The job's store, under a prefix of this backend's own. Not touched for identity alone.

        A forked data loader may ask for its rank, and must not speak on the store's connection.
        """
        root = c10d._get_default_store()  # noqa: SLF001 - the job's store has no public name
        # The same number on every rank: each counts the backends that it used on this store.
        key, limit_s = f"distckpt/made/{self._rank}", default_timeout_s()
        try:
            with contextlib.closing(StoreBoard(root, lambda: True, is_guest=True)) as guest:
                number = guest.count(key, 1, limit_s=limit_s)
        except OSError as error:
            raise board_is_gone(self._rank, "the first use of it", error) from error
        return dist.PrefixStore(f"distckpt/{number}", root)

    @functools.cached_property
    def _host(self) -> HostGroup:
        host = HostGroup(dist.PrefixStore("host", self._store), self._board, self._rank, self._world_size)
        host.watcher = self._watcher
        return host

    @functools.cached_property
    def _board(self) -> StoreBoard:
        group = self._group  # not through self, which the board's thread must not keep alive
        return StoreBoard(self._store, lambda: dist.is_initialized() and dist.group.WORLD is group())

    @property
    def watcher(self) -> Watcher | None:  # the host group has to know it too
        """Asked while a collective waits, if there is one."""
        return self._watcher

    @watcher.setter
    def watcher(self, watcher: Watcher | None) -> None:
        self._watcher = watcher
        if "_host" in vars(self):
            self._host.watcher = watcher

    def board(self) -> StoreBoard:
        """Return the board in the job's store."""
        return self._board

    def break_off(self) -> None:
        """Abort the job's process group. NCCL's collectives end then; Gloo's do not hear of it while they wait."""
        group = self._group()
        if group is not None:
            with contextlib.suppress(RuntimeError):
                group.abort()

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

    def reduce_host(self, values: torch.Tensor, op: ReduceOp, *, what: object, timeout_s: float | None) -> torch.Tensor:
        """Collective. Reduce over our own Gloo group."""
        limit_s = default_timeout_s() if timeout_s is None else timeout_s
        return self._host.reduce(values, op, what=what, timeout_s=limit_s)

    def start_max(self, values: Sequence[int], *, what: object, timeout_s: float | None) -> Callable[[], list[int]]:
        """Collective. Start to reduce over our own group, or through shared memory."""
        limit_s = default_timeout_s() if timeout_s is None else timeout_s
        return self._host.start_max(values, what=what, timeout_s=limit_s)

    def gather_host(self, data: bytes, num_bytes: int, *, what: object, timeout_s: float | None) -> list[bytes]:
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
        self._board.put(f"note/{ticket}", text, limit_s=default_timeout_s())

    def roll_call(self, name: str, *, watch: str | None, timeout_s: float | None) -> str | None:
        """Wait in the job's store until every rank has called `name`.

        Raises:
            RanksDriftedApart: every rank waits, at different names: none can ever come to the other.
            CollectiveError: a rank is lost, or the job's store.
        """
        limit_s = default_timeout_s() if timeout_s is None else timeout_s
        try:
            self._board.put(f"at/{self._rank}", name, limit_s=limit_s)
            note = self._call_the_roll(name, watch, limit_s)
            self._board.put(f"at/{self._rank}", "", limit_s=limit_s)
        except OSError as gone:
            self._raise_reason()
            raise board_is_gone(self._rank, name, gone) from gone
        except CollectiveError as error:
            if not error.missing:
                self._raise_reason()
            raise
        return note

    def _raise_reason(self) -> None:
        """Raise why the board cannot be reached, where the watcher knows."""
        reason = None if self._watcher is None else self._watcher.news(_REASON_S)
        if reason is not None:
            raise reason

    def _call_the_roll(self, name: str, watch: str | None, timeout_s: float) -> str | None:
        drift = _Drift(self._board, self._world_size)

        def news() -> str | None:
            bad = None if self._watcher is None else self._watcher.news()
            if bad is not None:
                raise bad
            self._host.refuse_if_given_up(name)
            drift.look(name)
            return None if watch is None else self._board.look([f"note/{watch}"], limit_s=_NOTE_S)[0]

        return call_the_roll(
            self._board,
            f"roll/{name}",
            self._rank,
            self._world_size,
            what=name,
            timeout_s=timeout_s,
            watch=news,
        )


class _Drift:
    """Finds out that all ranks wait, but not for each other.

    A rank that has just left a roll is written down there for a moment longer: only what lasts counts.
    """

    def __init__(self, board: Board, world_size: int) -> None:
        self._board = board
        self._keys = [f"at/{rank}" for rank in range(world_size)]
        self._since_s: float | None = None
        self._seen: list[str] = []

    def look(self, mine: str) -> None:
        notes = self._board.look(self._keys, limit_s=_NOTE_S)
        places = [note for note in notes if note]
        if len(places) < len(notes) or all(place == mine for place in places) or places != self._seen:
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
