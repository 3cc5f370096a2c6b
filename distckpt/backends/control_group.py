"""A group of our own for host values, over all ranks of a job.

Owns when the group is formed, how an operation on it is waited for, and how it is found out which ranks did
not come. The values travel by a transport (:mod:`distckpt.backends.transport`): Gloo, Horovod or XLA.
"""

import atexit
import contextlib
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch

from distckpt.backends.base import KeyValueStore, PeerMonitor, TensorOp
from distckpt.backends.shared_memory import NUM_WORDS, ROOM_BYTES, Meeting, SharedMemory, offer_of
from distckpt.backends.transport import NullKeyValueStore, Transport
from distckpt.backends.wire import bytes_of
from distckpt.errors import CollectiveError, CollectiveTimeout, DistckptError

__all__ = ["ABORTED", "SHARED_MEMORY_VARIABLE", "ControlGroup", "encode_abort", "store_barrier", "store_lost_error"]

SHARED_MEMORY_VARIABLE = "DISTCKPT_SHARED_MEMORY"
"""``0`` lets ranks of one machine reduce and gather over Gloo too."""

T = TypeVar("T")
ABORTED = "host/given_up"
"""Where on the board it stands that a rank has given the group up."""
FindStore = Callable[[object, float], KeyValueStore | None]

# How long an operation is waited for before this rank writes down that it came, and looks for bad news.
_PATIENCE_S = 1.0
# How often it looks after that.
_PAUSE_S = 0.25
# How long the others get to write down that they came, once an operation has failed; and once its time is over.
_GRACE_S = 2.0
_LAST_GRACE_S = 1.1
# How long a note may take to be written or read. The board's host may be frozen, or beyond a broken link: once it did
# not answer, it is asked more briefly, or a rank that has to end would spend seconds on notes that nobody reads.
_NOTE_S = 1.0
_BRIEF_NOTE_S = 0.25
_LENGTH_BYTES = 8
_OFFER_BYTES = 512


def store_barrier(
    board: KeyValueStore,
    prefix: str,
    rank: int,
    world_size: int,
    *,
    what: object,
    timeout_s: float,
    watch: Callable[[], str | None] = lambda: None,
) -> str | None:
    """Write down that this rank came to `what`, and wait until all have.

    Args:
        board: the job's.
        prefix: of this roll's notes.
        rank: this rank.
        world_size: how many have to come.
        what: what the ranks come to, for the error.
        timeout_s: seconds to wait.
        watch: asked between looks; an answer other than None ends the waiting.

    Returns:
        None when all came; what `watch` answered when that came first.

    Raises:
        CollectiveTimeout: some did not come; it names them.
        CollectiveError: the board is gone, or does not answer.
    """
    deadline = time.monotonic() + timeout_s
    pause_s = 0.001
    try:
        # Counted once, however often this rank calls.
        is_first = board.add(f"{prefix}/here/{rank}", 1, limit_s=timeout_s) == 1
        num_here = board.add(f"{prefix}/num_here", int(is_first), limit_s=timeout_s)
        while True:
            with contextlib.suppress(TimeoutError):  # no news: a silent board is waited for below
                if (news := watch()) is not None:
                    return news
            if num_here >= world_size:
                return None
            if (left_s := deadline - time.monotonic()) <= 0:
                break
            time.sleep(min(pause_s, left_s))
            pause_s = min(pause_s * 1.5, 0.05)
            num_here = board.add(f"{prefix}/num_here", 0, limit_s=max(left_s, _NOTE_S))
        missing = _absent(board, f"{prefix}/here", world_size)
    except OSError as error:
        raise store_lost_error(rank, what, error) from error
    if not missing:
        return None
    msg = (
        f"rank {rank}: waited {timeout_s:g} s for {what}, but {_ranks(missing)} did not come. Is it there on every "
        "rank, and is every rank still running? Handlers have to be built and attached on all ranks alike."
    )
    raise CollectiveTimeout(msg, missing)


@dataclass(slots=True)
class _Operation:
    """One operation under way."""

    work: Any
    what: object
    timeout_s: float
    number: int
    is_late: bool
    is_finished: bool = False

    @property
    def is_in_memory(self) -> bool:
        """Whether it goes through shared memory."""
        return isinstance(self.work, Meeting)


class ControlGroup:
    """A group over all ranks of a job, for host values only. Formed by its first operation.

    Where all ranks are processes of one machine, the frequent small reduction (:meth:`start_max`) goes through shared
    memory, if the transport allows it; so does what ranks say in a few bytes (:meth:`gather_bytes`).

    Either every rank finishes an operation or none does: where some rank waited long, the first of "done" and "given
    up" to be written down on the board holds for all.

    Args:
        transport: how the values travel; of no other group's.
        find_store: takes what the ranks are doing and a limit in seconds, and returns the job's board for notes, or
            None where it has none: nobody can tell then which ranks did not come.
        rank: this rank.
        world_size: number of ranks.

    Attributes:
        monitor: asked while an operation is waited for; None for nobody.
    """

    def __init__(self, transport: Transport, find_store: FindStore, rank: int, world_size: int) -> None:
        self.monitor: PeerMonitor | None = None
        self._transport = transport
        self._find_store: FindStore | None = find_store
        self._board: KeyValueStore = NullKeyValueStore(world_size)
        self._has_store = False
        self._rank = rank
        self._world_size = world_size
        self._given_up: str | None = None
        self._num_operations = 0
        self._last_end_s = time.monotonic()
        self._is_formed = False
        self._memory: SharedMemory | None = None
        self._open: _Operation | None = None  # a reduction that start_max began
        self._is_store_silent = False

    def close(self) -> None:
        """Let go of the transport. Rank-local; does nothing the second time.

        IMPORTANT: before the interpreter ends. A thread of Gloo's that lets go of a tensor then, after the last
        collective, asks for an interpreter that is no more, and the process is aborted.
        """
        self._given_up = self._given_up or "this process left the job"
        self._transport.close()
        if self._memory is not None:
            self._memory.close()

    def reduce(self, values: torch.Tensor, op: TensorOp, *, what: object, timeout_s: float) -> torch.Tensor:
        """Collective. Reduce a CPU tensor; returns a new one."""
        result = values.detach().clone(memory_format=torch.contiguous_format)
        self._run(lambda: self._transport.reduce(result, op, timeout_s), what, timeout_s)
        return result

    def start_max(self, values: Sequence[int], *, what: object, timeout_s: float) -> Callable[[], list[int]]:
        """Collective. Start to reduce up to twelve int64 with MAX; what is returned waits for the end.

        It goes through shared memory where that was found to be there, else by the transport.
        """
        padded = [*values, *[0] * (NUM_WORDS - len(values))]
        if self._open is not None:
            self._finish(self._open)  # the memory keeps a few operations only
        if self._memory is not None and self._given_up is None and not self._is_late(timeout_s):
            # What _start does in the usual case: this is called in each iteration.
            self._num_operations += 1
            work = self._memory.write(self._num_operations, padded)
            operation = _Operation(work, what, timeout_s, self._num_operations, False)  # noqa: FBT003 - its last field
        else:
            operation = self._start(lambda: self._begin_max(padded, timeout_s), what, timeout_s)
        self._open = operation

        def finish() -> list[int]:
            work = operation.work
            if self._open is operation and self._given_up is None and not operation.is_late and work.is_done():
                self._open = None
                self._last_end_s = time.monotonic()
            else:
                self._finish(operation)
            result: list[int] = work.values[: len(values)]
            return result

        return finish

    def _begin_max(self, values: list[int], timeout_s: float) -> Any:
        if self._memory is not None:
            return self._memory.write(self._num_operations, values)
        return self._transport.maximum(values, timeout_s)

    def gather(self, tensor: torch.Tensor, *, what: object, timeout_s: float) -> list[torch.Tensor]:
        """Collective. Give every rank every rank's CPU tensor; shape and dtype are the same on all."""
        mine = _as_bytes(tensor)
        result = [torch.empty_like(mine) for _ in range(self._world_size)]
        if mine.numel():
            self._run(lambda: self._transport.gather(result, mine, timeout_s), what, timeout_s)
        return [_from_bytes(part, tensor) for part in result]

    def broadcast(self, tensor: torch.Tensor, src: int, *, what: object, timeout_s: float) -> torch.Tensor:
        """Collective. Give every rank the CPU tensor of rank `src`; returns a new one."""
        result = _as_bytes(tensor).clone()
        if result.numel():
            self._run(lambda: self._transport.broadcast(result, src, timeout_s), what, timeout_s)
        return _from_bytes(result, tensor)

    def gather_bytes(self, data: bytes, num_bytes: int, *, what: object, timeout_s: float) -> list[bytes]:
        """Collective. Give every rank every rank's bytes: no more than `num_bytes`, which is the same on all ranks."""
        if self._memory is not None and num_bytes <= ROOM_BYTES:
            return self._gather_in(self._memory, data, what, timeout_s)
        padded = torch.zeros(_LENGTH_BYTES + num_bytes, dtype=torch.uint8)
        framed = len(data).to_bytes(_LENGTH_BYTES, "little") + data
        padded[: len(framed)] = torch.frombuffer(bytearray(framed), dtype=torch.uint8)
        parts = [bytes_of(part) for part in self.gather(padded, what=what, timeout_s=timeout_s)]
        lengths = [int.from_bytes(part[:_LENGTH_BYTES], "little") for part in parts]
        return [part[_LENGTH_BYTES : _LENGTH_BYTES + length] for part, length in zip(parts, lengths, strict=True)]

    def _gather_in(self, memory: SharedMemory, data: bytes, what: object, timeout_s: float) -> list[bytes]:
        operation = self._start(lambda: memory.bring(self._num_operations, data), what, timeout_s)
        self._finish(operation)
        return [operation.work.by_rank[rank] for rank in range(self._world_size)]

    def carry(self, start: Callable[[Any], Any], *, what: object, timeout_s: float) -> None:
        """Collective. Run an operation of the transport's own.

        Args:
            start: takes the transport, begins the operation and returns its work.
            what: what the ranks are doing, for error messages; made into text only for them.
            timeout_s: seconds to wait for the other ranks.
        """
        self._run(lambda: start(self._transport), what, timeout_s)

    def find_store(self, what: object, timeout_s: float) -> None:
        """Get hold of the job's board, if that was not done before. Rank-local.

        Raises:
            CollectiveError: it cannot be found; where that is because a rank did not come, the error names it.
        """
        if self._find_store is not None:
            board = self._find_store(what, timeout_s)
            self._find_store = None
            if board is not None:
                self._board, self._has_store = board, True

    def _form(self, what: object, timeout_s: float) -> None:
        """Collective. Connect the ranks, after all have come."""
        self.find_store(what, timeout_s)
        store_barrier(
            self._board,
            "host/roll",
            self._rank,
            self._world_size,
            what=what,
            timeout_s=timeout_s,
            watch=self._who_gave_up,
        )
        self.refuse_if_given_up(what)
        try:
            self._transport.connect(timeout_s)
        except self._transport.passthrough_errors:
            raise
        except RuntimeError as error:
            self._raise_news(_GRACE_S)
            msg = f"rank {self._rank}: the ranks could not be connected for {what}: {error}"
            raise CollectiveError(msg) from error
        self._is_formed = True
        atexit.register(_close_if_alive, weakref.ref(self))
        if self._transport.shares_memory:
            self._share_memory(what, timeout_s)

    def _share_memory(self, what: object, timeout_s: float) -> None:
        """Collective. Find out whether all ranks can see one memory, and take it if so."""
        own, offer = (None, b"{}") if os.environ.get(SHARED_MEMORY_VARIABLE) == "0" else offer_of(self._world_size)
        offers = self.gather_bytes(offer, _OFFER_BYTES, what=what, timeout_s=timeout_s)
        memory = SharedMemory.join(own, offers, self._rank)
        answers = self.gather_bytes(b"no" if memory is None else b"yes", 3, what=what, timeout_s=timeout_s)
        if all(answer == b"yes" for answer in answers):
            self._memory = memory
        elif memory is not None:
            memory.close()

    def _run(self, start: Callable[[], Any], what: object, timeout_s: float) -> None:
        self._finish(self._start(start, what, timeout_s))

    def _start(self, start: Callable[[], Any], what: object, timeout_s: float) -> _Operation:
        if self._given_up is not None:
            msg = f"rank {self._rank}: {what} cannot run: the ranks' host group was given up earlier ({self._given_up})"
            raise CollectiveError(msg)
        if self._open is not None:
            self._finish(self._open)  # the memory keeps a few operations only, and each of the others counts too
        is_late = self._is_late(timeout_s)
        with self._giving_up(what, timeout_s):
            if not self._is_formed:
                self._form(what, timeout_s)
            elif is_late:
                self.refuse_if_given_up(what)
        self._num_operations += 1
        operation = _Operation(None, what, timeout_s, self._num_operations, is_late)
        with self._giving_up(what, timeout_s, operation):
            operation.work = start()
        return operation

    def _is_late(self, timeout_s: float) -> bool:
        """Tell whether others may have given up: they have waited since about the end of the last operation."""
        return time.monotonic() - self._last_end_s > min(_PATIENCE_S, timeout_s / 2)

    def _finish(self, operation: _Operation) -> None:
        if operation is self._open:
            self._open = None
        elif operation.is_finished:
            return  # another one had to begin
        if self._given_up is not None:
            msg = f"rank {self._rank}: {operation.what} ended: the ranks' host group was given up ({self._given_up})"
            raise CollectiveError(msg)
        with self._giving_up(operation.what, operation.timeout_s, operation):
            was_slow = self._wait(operation)
            if (was_slow or operation.is_late) and self._verdict(operation, "done") != "done":
                self.refuse_if_given_up(operation.what)
        operation.is_finished = True  # not before: where it failed for another one that had to begin, it fails again
        self._last_end_s = time.monotonic()

    @contextlib.contextmanager
    def _giving_up(self, what: object, timeout_s: float, operation: _Operation | None = None) -> Iterator[None]:
        """Give the group up when an operation fails in here, and explain why."""
        try:
            yield
        except DistckptError as error:
            if self._given_up is None:
                self._give_up(what, getattr(error, "missing", ()))
            raise
        except self._transport.passthrough_errors:  # the runtime knows how to go on from it
            # Told where there is a board: Horovod forgets operations that were begun while it was ending.
            if operation is not None:
                with contextlib.suppress(OSError):
                    self._note_that_it_came(operation)
            self._give_up(what, ())
            raise
        except OSError as error:
            self._given_up = str(what)
            self._raise_news(_NOTE_S)
            raise store_lost_error(self._rank, what, error) from error
        except RuntimeError as error:
            self._explain(error, what, operation, timeout_s, timed_out=False)
        except BaseException:  # an interrupt: this rank is out of step now
            if operation is not None and operation.work is not None:
                self._transport.withdraw(operation.work)
            self._give_up(what, ())
            raise

    def _wait(self, operation: _Operation) -> bool:
        """Wait for the transport's work; return whether it took so long that some rank may have given up."""
        work, what = operation.work, operation.what
        deadline = time.monotonic() + operation.timeout_s
        was_slow = False
        while True:
            left_s = deadline - time.monotonic()
            try:
                work.wait(timedelta(seconds=max(min(_PAUSE_S if was_slow else _PATIENCE_S, left_s), 0.001)))
            except RuntimeError as error:
                if work.is_completed():
                    work.wait()  # returns if it ended well just now, else raises what ended it
                    return was_slow
                news = self._news()
                if news is not None or time.monotonic() >= deadline:
                    if not self._transport.withdraw(work) or self._verdict(operation, "given up") == "done":
                        work.wait(timedelta(seconds=1))  # another rank has just finished it
                        return was_slow
                    if news is not None:
                        raise news  # noqa: B904 - it has a cause of its own, on another rank; this one is its context
                    self._explain(error, what, operation, operation.timeout_s, timed_out=True)
                if not was_slow:
                    with contextlib.suppress(OSError):
                        self._note_that_it_came(operation)
                    was_slow = True
                with contextlib.suppress(TimeoutError):
                    if self._who_gave_up() is not None:
                        raise
            else:
                return was_slow

    def _news(self, wait_s: float = 0.0) -> DistckptError | None:
        return None if self.monitor is None else self.monitor.failure(wait_s)

    def _raise_news(self, wait_s: float) -> None:
        """Raise the monitor's news, if there is any; with the cause that it has on another rank, not this rank's."""
        if (news := self._news(wait_s)) is not None:
            raise news

    def _ask(self, call: Callable[[float], T], limit_s: float = _NOTE_S) -> T:
        """Ask the board, within `limit_s`; more briefly if it did not answer the last time."""
        try:
            answer = call(min(limit_s, _BRIEF_NOTE_S) if self._is_store_silent else limit_s)
        except TimeoutError:
            self._is_store_silent = True
            raise
        self._is_store_silent = False
        return answer

    def _verdict(self, operation: _Operation, mine: str) -> str:
        """Write down how this operation ended, unless another rank has; return what stands."""
        key = f"host/verdict/{operation.number}"
        if mine == "done":
            self._is_store_silent = False  # nobody waits for this rank to end, and it has just heard of all others
        try:
            return self._ask(lambda limit_s: self._board.set_default(key, mine, limit_s=limit_s))
        except OSError:  # the board's host has ended, or is frozen; there is nobody left to differ with
            return mine

    def _who_gave_up(self) -> str | None:
        return self._ask(lambda limit_s: self._board.get_many([ABORTED], limit_s=limit_s))[0]

    def refuse_if_given_up(self, what: object) -> None:
        """Raise where another rank has given the group up. Rank-local.

        Raises:
            CollectiveError: it names the ranks that did not come, as far as known.
        """
        try:
            news = self._who_gave_up()
        except TimeoutError:  # the board is slow, which is no proof of anything
            return
        except OSError as error:
            raise store_lost_error(self._rank, what, error) from error
        if news is None:
            return
        numbers, _, where = news.partition(" ")
        missing = [int(number) for number in numbers.split(",") if number]
        who = f", because {_ranks(missing)} did not come" if missing else ""
        msg = f"rank {self._rank}: {what} cannot run: another rank gave up waiting in {where}{who}{self._tell(missing)}"
        raise CollectiveError(msg, missing)

    def _give_up(self, what: object, missing: Sequence[int]) -> None:
        """Make every later operation fail at once, here and on the ranks that come late."""
        self._given_up = str(what)
        with contextlib.suppress(OSError):  # the board may be gone as well
            text = encode_abort(what, missing)
            self._ask(lambda limit_s: self._board.set(ABORTED, text, limit_s=limit_s))

    def _note_that_it_came(self, operation: _Operation) -> None:
        key = f"host/came/{operation.number}/{self._rank}"
        self._ask(lambda limit_s: self._board.set(key, str(operation.what), limit_s=limit_s))

    def _tell(self, missing: Sequence[int]) -> str:
        told = "" if self.monitor is None or not missing else self.monitor.describe(missing)
        return f" ({told})" if told else ""

    def _explain(
        self, error: RuntimeError, what: object, operation: _Operation | None, timeout_s: float, *, timed_out: bool
    ) -> NoReturn:
        """Find out who came to the failed operation, give the group up, and raise."""
        self._give_up(what, ())
        missing: list[int] = []
        if operation is not None and timed_out and operation.is_in_memory and not self._is_store_silent:
            # There it can be seen, and nobody needs time to write it down.
            missing = [rank for rank in range(self._world_size) if not self._has_written(rank, operation)]
        elif operation is not None and self._has_store:
            try:
                missing = self._who_is_missing(operation, _LAST_GRACE_S if timed_out else _GRACE_S)
            except OSError as gone:
                self._raise_news(_NOTE_S)
                raise store_lost_error(self._rank, what, gone) from error
            # On a busy machine a rank may have no time to note that it came.
            missing = [rank for rank in missing if not self._has_written(rank, operation)]
        self._give_up(what, missing)
        who = "the connection broke" if self._has_store or not timed_out else "not all ranks came"
        if missing:
            who = f"{_ranks(missing)} did not come{self._tell(missing)}"
        if timed_out:
            msg = f"rank {self._rank}: waited {timeout_s:g} s in {what}, but {who}"
            raise CollectiveTimeout(msg, missing) from error
        msg = f"rank {self._rank}: {what} broke off: {who} ({error})"
        raise CollectiveError(msg, missing) from error

    def _has_written(self, rank: int, operation: _Operation) -> bool:
        """Tell whether the shared memory shows that a rank came to an operation."""
        if not operation.is_in_memory or self._memory is None:
            return False
        return rank == self._rank or self._memory.read(rank, operation.number) is not None

    def _who_is_missing(self, operation: _Operation, grace_s: float) -> list[int]:
        """Return who has not come to an operation within `grace_s`.

        While the board does not answer nothing is known of anybody, until it does, or the monitor gives it up.

        Raises:
            OSError: the board is gone, or is silent and nobody watches.
            DistckptError: the monitor's news.
        """
        came = f"host/came/{operation.number}"
        silent_until = time.monotonic() + operation.timeout_s
        until: float | None = None
        while True:
            try:
                if until is None:
                    self._note_that_it_came(operation)
                    until = time.monotonic() + grace_s
                missing = self._ask(lambda limit_s: _absent(self._board, came, self._world_size, limit_s))
            except TimeoutError:
                if self.monitor is None or time.monotonic() > silent_until:
                    raise
            else:
                if not missing or time.monotonic() > until:
                    return missing
            if (news := self._news()) is not None:
                raise news
            time.sleep(0.02)


def _close_if_alive(group: "weakref.ref[ControlGroup]") -> None:
    alive = group()
    if alive is not None:
        alive.close()


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a CPU tensor, uint8 (n,): Gloo does not carry every dtype, but every dtype is bytes."""
    flat = tensor.detach().contiguous().reshape(-1)
    return (torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).view(torch.uint8)


def _from_bytes(data: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return data.view(like.dtype).reshape(like.shape)


def _absent(board: KeyValueStore, key: str, world_size: int, limit_s: float = _NOTE_S) -> list[int]:
    notes = board.get_many([f"{key}/{rank}" for rank in range(world_size)], limit_s=limit_s)
    return [rank for rank, note in enumerate(notes) if note is None]


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(str(rank) for rank in ranks)}"


def encode_abort(what: object, missing: Sequence[int]) -> str:
    """Return the note by which a rank tells the others that it waits no longer, since `missing` did not come."""
    return f"{','.join(str(rank) for rank in missing)} {what}"


def store_lost_error(rank: int, what: object, error: OSError) -> CollectiveError:
    """Return the error for a board that is gone, or does not answer."""
    msg = (
        f"rank {rank}: lost the job's store during {what}; the process that hosts it (often rank 0, or the launcher) "
        f"has ended or cannot be reached: {error}"
    )
    return CollectiveError(msg)
