"""A Gloo group of our own for host values, over the job's store.

Owns how the group is formed, how an operation on it is waited for, and how it is found out which ranks did
not come. It is made straight on the store, not by ``torch.distributed.new_group``: that one pairs by a count of all
groups made so far, and blocks for the process group's own timeout when a rank stays away. Must not know
what the values mean. Layer L2.
"""

import atexit
import contextlib
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from distckpt.backends.base import ReduceOp
from distckpt.errors import CollectiveError, CollectiveTimeout

__all__ = ["HostGroup", "call_the_roll"]

_REDUCE = {"SUM": dist.ReduceOp.SUM, "MIN": dist.ReduceOp.MIN, "MAX": dist.ReduceOp.MAX}
# How long an operation is waited for before this rank writes down that it came, and looks for bad news.
_PATIENCE_S = 1.0
# How long the others get to write down that they came, once an operation has failed.
_GRACE_S = 2.0
_LENGTH_BYTES = 8


def call_the_roll(
    store: dist.Store,
    rank: int,
    world_size: int,
    *,
    what: str,
    timeout_s: float,
    watch: Callable[[], str | None] = lambda: None,
) -> str | None:
    """Write down that this rank came to `what`, and wait until all have.

    Polls the store instead of waiting in it: a wait would hold the store's connection, which other threads share.

    Args:
        store: the job's, under a prefix of this roll's own.
        rank: this rank.
        world_size: how many have to come.
        what: what the ranks come to, for the error.
        timeout_s: seconds to wait.
        watch: asked between looks; an answer other than None ends the waiting.

    Returns:
        None when all came; what `watch` answered when that came first.

    Raises:
        CollectiveTimeout: some did not come; it names them.
        CollectiveError: the store is gone.
    """
    deadline = time.monotonic() + timeout_s
    pause_s = 0.001
    try:
        # Counted once, however often this rank calls.
        num_here = store.add("num_here", int(store.add(f"here/{rank}", 1) == 1))
        while True:
            if (news := watch()) is not None:
                return news
            if num_here >= world_size:
                return None
            if time.monotonic() >= deadline:
                break
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, 0.05)
            num_here = store.add("num_here", 0)
        missing = _absent(store, "here", world_size)
    except RuntimeError as error:
        raise _store_is_gone(rank, what, error) from error
    if not missing:
        return None
    msg = (
        f"rank {rank}: waited {timeout_s:g} s for {what}, but {_ranks(missing)} did not come. Is it there on every "
        "rank, and is every rank still running? Handlers have to be built and attached on all ranks alike."
    )
    raise CollectiveTimeout(msg, missing)


class HostGroup:
    """A Gloo group over all ranks of a job, for host values only. Formed by its first operation.

    Either every rank finishes an operation or none does: where some rank waited long, the first of "done" and "given
    up" to be written down in the store holds for all.

    Args:
        store: the job's store, under a prefix that no other group uses.
        rank: this rank.
        world_size: number of ranks.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._given_up: str | None = None
        self._num_operations = 0
        self._last_end_s = time.monotonic()
        self._group: Any = None  # ProcessGroupGloo, whose operations have no types

    def close(self) -> None:
        """Let the group's threads end. Rank-local; does nothing the second time.

        IMPORTANT: before the interpreter does. A thread of Gloo's that lets go of a tensor then, after the last
        collective, asks for an interpreter that is no more, and the process is aborted.
        """
        self._given_up = self._given_up or "this process left the job"
        self._group = None

    def reduce(
        self, values: torch.Tensor, op: dist.ReduceOp.RedOpType | ReduceOp, *, what: str, timeout_s: float
    ) -> torch.Tensor:
        """Collective. Reduce a CPU tensor; returns a new one."""
        options = c10d.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(_REDUCE[op] if isinstance(op, str) else op)
        result = values.detach().clone(memory_format=torch.contiguous_format)
        self._run(lambda: self._group.allreduce([result], options), options, what, timeout_s)
        return result

    def gather(self, tensor: torch.Tensor, *, what: str, timeout_s: float) -> list[torch.Tensor]:
        """Collective. Give every rank every rank's CPU tensor; shape and dtype are the same on all."""
        options = c10d.AllgatherOptions()
        mine = _as_bytes(tensor)
        result = [torch.empty_like(mine) for _ in range(self._world_size)]
        if mine.numel():
            self._run(lambda: self._group.allgather([result], [mine], options), options, what, timeout_s)
        return [_from_bytes(part, tensor) for part in result]

    def broadcast(self, tensor: torch.Tensor, src: int, *, what: str, timeout_s: float) -> torch.Tensor:
        """Collective. Give every rank the CPU tensor of rank `src`; returns a new one."""
        options = c10d.BroadcastOptions()
        options.rootRank = src
        options.rootTensor = 0
        result = _as_bytes(tensor).clone()
        if result.numel():
            self._run(lambda: self._group.broadcast([result], options), options, what, timeout_s)
        return _from_bytes(result, tensor)

    def gather_bytes(self, data: bytes, num_bytes: int, *, what: str, timeout_s: float) -> list[bytes]:
        """Collective. Give every rank every rank's bytes, each padded to `num_bytes` on the way."""
        padded = torch.zeros(_LENGTH_BYTES + num_bytes, dtype=torch.uint8)
        framed = len(data).to_bytes(_LENGTH_BYTES, "little") + data
        padded[: len(framed)] = torch.frombuffer(bytearray(framed), dtype=torch.uint8)
        parts = [bytes(part.numpy()) for part in self.gather(padded, what=what, timeout_s=timeout_s)]
        lengths = [int.from_bytes(part[:_LENGTH_BYTES], "little") for part in parts]
        return [part[_LENGTH_BYTES : _LENGTH_BYTES + length] for part, length in zip(parts, lengths, strict=True)]

    def _form(self, what: str, timeout_s: float) -> None:
        """Collective. Connect the ranks, after all have come."""
        call_the_roll(
            self._store, self._rank, self._world_size, what=what, timeout_s=timeout_s, watch=self._who_gave_up
        )
        self.refuse_if_given_up(what)
        gloo = dist.PrefixStore("gloo", self._store)
        try:
            self._group = dist.ProcessGroupGloo(gloo, self._rank, self._world_size, timedelta(seconds=timeout_s))
        except RuntimeError as error:
            msg = f"rank {self._rank}: the ranks could not be connected over Gloo for {what}: {error}"
            raise CollectiveError(msg) from error
        atexit.register(_close_if_alive, weakref.ref(self))

    def _run(self, start: Callable[[], Any], options: Any, what: str, timeout_s: float) -> None:
        if self._given_up is not None:
            msg = f"rank {self._rank}: {what} cannot run: the ranks' host group was given up earlier ({self._given_up})"
            raise CollectiveError(msg)
        # Whoever waits for this rank has done so since about the end of the last operation.
        is_late = time.monotonic() - self._last_end_s > min(_PATIENCE_S, timeout_s / 2)
        # The operation's own limit comes a second after ours, so that we are the ones who explain it.
        options.timeout = timedelta(seconds=timeout_s + 1.0)
        try:
            if self._group is None:
                self._form(what, timeout_s)
            elif is_late:
                self.refuse_if_given_up(what)
            self._num_operations += 1
            was_slow = self._wait(start(), what, timeout_s)
            if (was_slow or is_late) and self._verdict("done") != "done":
                self.refuse_if_given_up(what)
        except CollectiveError as error:
            if self._given_up is None:
                self._give_up(what, error.missing)
            raise
        except RuntimeError as error:
            self._explain(error, what, timeout_s, timed_out=False)
        except BaseException:  # an interrupt: this rank is out of step now
            self._give_up(what, ())
            raise
        self._last_end_s = time.monotonic()

    def _wait(self, work: Any, what: str, timeout_s: float) -> bool:
        """Wait for torch's `work`; return whether it took so long that some rank may have given up."""
        deadline = time.monotonic() + timeout_s
        was_slow = False
        while True:
            left_s = deadline - time.monotonic()
            try:
                work.wait(timedelta(seconds=max(min(_PATIENCE_S, left_s), 0.001)))
            except RuntimeError as error:
                if work.is_completed():
                    work.wait()  # returns if it ended well just now, else raises what ended it
                    return was_slow
                if time.monotonic() >= deadline:
                    if self._verdict("given up") == "done":
                        work.wait(timedelta(seconds=1))  # another rank has just finished it
                        return was_slow
                    self._explain(error, what, timeout_s, timed_out=True)
                if not was_slow:
                    self._note("came", what)
                    was_slow = True
                if self._who_gave_up() is not None:
                    raise
            else:
                return was_slow

    def _verdict(self, mine: str) -> str:
        """Write down how this operation ended, unless another rank has; return what stands."""
        try:
            stands: bytes = self._store.compare_set(f"verdict/{self._num_operations}", "", mine)
        except RuntimeError:  # the store's host has ended; there is nobody left to differ with
            return mine
        return stands.decode("utf-8")

    def _who_gave_up(self) -> str | None:
        return self._store.get("given_up").decode("utf-8") if self._store.check(["given_up"]) else None

    def refuse_if_given_up(self, what: str) -> None:
        """Raise where another rank has given the group up. Rank-local.

        Raises:
            CollectiveError: it names the ranks that did not come, as far as known.
        """
        news = self._who_gave_up()
        if news is None:
            return
        numbers, _, where = news.partition(" ")
        missing = [int(number) for number in numbers.split(",") if number]
        who = f", because {_ranks(missing)} did not come" if missing else ""
        msg = f"rank {self._rank}: {what} cannot run: another rank gave up waiting in {where}{who}"
        raise CollectiveError(msg, missing)

    def _give_up(self, what: str, missing: Sequence[int]) -> None:
        """Make every later operation fail at once, here and on the ranks that come late."""
        self._given_up = what
        with contextlib.suppress(RuntimeError):  # the store may be gone as well
            self._store.set("given_up", f"{','.join(str(rank) for rank in missing)} {what}")

    def _note(self, key: str, text: str) -> None:
        self._store.set(f"{key}/{self._num_operations}/{self._rank}", text)

    def _explain(self, error: RuntimeError, what: str, timeout_s: float, *, timed_out: bool) -> None:
        """Find out who came to the failed operation, give the group up, and raise."""
        self._give_up(what, ())
        try:
            self._note("came", what)
            until = time.monotonic() + _GRACE_S
            missing = _absent(self._store, f"came/{self._num_operations}", self._world_size)
            while missing and time.monotonic() < until:
                time.sleep(0.02)
                missing = _absent(self._store, f"came/{self._num_operations}", self._world_size)
        except RuntimeError as gone:
            raise _store_is_gone(self._rank, what, gone) from error
        self._give_up(what, missing)
        who = f"{_ranks(missing)} did not come" if missing else "every rank came, but the connection broke"
        if timed_out:
            msg = f"rank {self._rank}: waited {timeout_s:g} s in {what}, but {who}"
            raise CollectiveTimeout(msg, missing) from error
        msg = f"rank {self._rank}: {what} broke off: {who} ({error})"
        raise CollectiveError(msg, missing) from error


def _close_if_alive(group: "weakref.ref[HostGroup]") -> None:
    alive = group()
    if alive is not None:
        alive.close()


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a CPU tensor, uint8 (n,): Gloo does not carry every dtype, but every dtype is bytes."""
    flat = tensor.detach().contiguous().reshape(-1)
    return (torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).view(torch.uint8)


def _from_bytes(data: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return data.view(like.dtype).reshape(like.shape)


def _absent(store: dist.Store, key: str, world_size: int) -> list[int]:
    if store.check([f"{key}/{rank}" for rank in range(world_size)]):
        return []
    return [rank for rank in range(world_size) if not store.check([f"{key}/{rank}"])]


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(str(rank) for rank in ranks)}"


def _store_is_gone(rank: int, what: str, error: RuntimeError) -> CollectiveError:
    msg = (
        f"rank {rank}: lost the job's store during {what}; the process that hosts it (often rank 0) has ended: {error}"
    )
    return CollectiveError(msg)
