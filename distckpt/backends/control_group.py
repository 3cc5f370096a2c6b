"""A process group of our own for host values, over all ranks of a job.

The group is formed by its first operation. The values travel by a transport (:mod:`distckpt.backends.transport`): Gloo,
Horovod or XLA.

Either every rank finishes an operation or none does. If an operation took long, some rank may have aborted the group
meanwhile: the first outcome, "done" or "aborted", that a rank writes to the key-value store holds for all.
"""

import atexit
import contextlib
import itertools
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch

from distckpt.backends.base import KeyValueStore, PeerMonitor, TensorOp
from distckpt.backends.shared_memory import NUM_WORDS, ROOM_BYTES, SharedMemory, SharedOperation, create_offer
from distckpt.backends.store_notes import (
    ANSWER_LIMIT_S,
    GroupNotes,
    decode_abort,
    format_ranks,
    store_barrier,
    store_lost_error,
)
from distckpt.backends.transport import Transport, from_bytes, to_bytes
from distckpt.backends.wire import bytes_of
from distckpt.errors import CollectiveError, CollectiveTimeout, DistckptError

SHARED_MEMORY_VARIABLE = "DISTCKPT_SHARED_MEMORY"
"""``0`` turns the use of shared memory off."""

FindStore = Callable[[object, float], KeyValueStore | None]

_PATIENCE_S = 1.0  # how long an operation runs before this rank notes its arrival and looks for failures
_PAUSE_S = 0.25  # how often it looks afterwards
_GRACE_S = 2.0  # how long the others may take to note their arrival after an operation has failed
_TIMEOUT_GRACE_S = 1.1  # ... and after one has timed out
_LENGTH_BYTES = 8
_OFFER_BYTES = 512


@dataclass(slots=True)
class _Operation:
    """An operation in progress."""

    work: Any  # the transport's or the shared memory's
    what: object
    timeout_s: float
    number: int
    was_idle: bool  # so much time had passed before it that another rank may have aborted the group
    is_finished: bool = False  # it has ended well

    @property
    def is_in_memory(self) -> bool:
        return isinstance(self.work, SharedOperation)


class ControlGroup:
    """A group over all ranks of a job, for host values.

    If all ranks are processes of one machine, frequent small operations (:meth:`start_max`, :meth:`gather_bytes`) go
    through shared memory, unless the transport forbids it.

    Args:
        transport: carries the values; used by this group only.
        find_store: takes what the ranks are doing and a limit in seconds, and returns the job's key-value store. None
            if it has none: missing ranks cannot be named then.
        rank: this rank.
        world_size: number of ranks.

    Attributes:
        monitor: asked while an operation waits; None if there is none.
    """

    def __init__(self, transport: Transport, find_store: FindStore, rank: int, world_size: int) -> None:
        self.monitor: PeerMonitor | None = None
        self._transport = transport
        self._find_store: FindStore | None = find_store
        self._notes = GroupNotes(rank, world_size)
        self._rank = rank
        self._world_size = world_size
        self._aborted: str | None = None  # during what
        self._num_operations = 0
        self._last_end_s = time.monotonic()
        self._is_formed = False
        self._memory: SharedMemory | None = None
        self._open: _Operation | None = None  # of start_max

    def close(self) -> None:
        """Close the transport. Rank-local; a second call does nothing.

        IMPORTANT: call it before the interpreter ends. Afterwards a thread of Gloo's that releases a tensor would ask
        for an interpreter that is gone, and the process would be aborted.
        """
        self._aborted = self._aborted or "this process left the job"
        self._transport.close()
        if self._memory is not None:
            self._memory.close()

    # -- operations --------------------------------------------------------------------------------

    def reduce(self, values: torch.Tensor, op: TensorOp, *, what: object, timeout_s: float) -> torch.Tensor:
        """Collective. Reduce a CPU tensor; return a new one."""
        result = values.detach().clone(memory_format=torch.contiguous_format)
        self.run(lambda transport: transport.reduce(result, op, timeout_s), what=what, timeout_s=timeout_s)
        return result

    def start_max(self, values: Sequence[int], *, what: object, timeout_s: float) -> Callable[[], list[int]]:
        """Collective. Start to reduce up to twelve int64 with MAX; return a function that waits for the result."""
        padded = [*values, *[0] * (NUM_WORDS - len(values))]
        if self._open is not None:
            self._finish(self._open)  # the memory keeps a few operations only
        memory = self._memory
        if memory is not None and self._aborted is None and not self._was_idle(timeout_s):
            # _start without its checks: this runs in every iteration.
            self._num_operations += 1
            work = memory.start_max(self._num_operations, padded)
            operation = _Operation(work, what, timeout_s, self._num_operations, was_idle=False)
        else:
            operation = self._start(lambda: self._start_max(padded, timeout_s), what, timeout_s)
        self._open = operation

        def finish() -> list[int]:
            work = operation.work
            if self._open is operation and self._aborted is None and not operation.was_idle and work.is_done():
                self._open = None
                self._last_end_s = time.monotonic()
            else:
                self._finish(operation)
            result: list[int] = work.values[: len(values)]
            return result

        return finish

    def _start_max(self, values: list[int], timeout_s: float) -> Any:
        if self._memory is not None:
            return self._memory.start_max(self._num_operations, values)
        return self._transport.start_max(values, timeout_s)

    def gather(self, tensor: torch.Tensor, *, what: object, timeout_s: float) -> list[torch.Tensor]:
        """Collective. Return every rank's CPU tensor; shape and dtype are the same on all."""
        mine = to_bytes(tensor)
        result = [torch.empty_like(mine) for _ in range(self._world_size)]
        if mine.numel():
            self.run(lambda transport: transport.gather(result, mine, timeout_s), what=what, timeout_s=timeout_s)
        return [from_bytes(chunk, tensor) for chunk in result]

    def exchange(
        self, parts: Sequence[bytes | bytearray], num_received: Sequence[int], *, what: object, timeout_s: float
    ) -> list[memoryview]:
        """Collective. Send a part to each rank; return what each rank has sent."""
        num_sent = [len(part) for part in parts]
        memory = bytearray(sum(num_received) + 1)  # torch takes no empty buffer
        mine = torch.frombuffer(bytearray().join((*parts, b"\0")), dtype=torch.uint8)[:-1]
        result = torch.frombuffer(memory, dtype=torch.uint8)[:-1]
        self.run(
            lambda transport: transport.exchange(result, mine, num_received, num_sent, timeout_s),
            what=what,
            timeout_s=timeout_s,
        )
        data, ends = memoryview(memory), itertools.accumulate(num_received)
        return [data[end - num_bytes : end] for end, num_bytes in zip(ends, num_received, strict=True)]

    def broadcast(self, tensor: torch.Tensor, src: int, *, what: object, timeout_s: float) -> torch.Tensor:
        """Collective. Return the CPU tensor of rank `src`, as a new one."""
        result = to_bytes(tensor).clone()
        if result.numel():
            self.run(lambda transport: transport.broadcast(result, src, timeout_s), what=what, timeout_s=timeout_s)
        return from_bytes(result, tensor)

    def gather_bytes(self, data: bytes, num_bytes: int, *, what: object, timeout_s: float) -> list[bytes]:
        """Collective. Return every rank's bytes: at most `num_bytes`, which is the same on all ranks."""
        memory = self._memory
        if memory is not None and num_bytes <= ROOM_BYTES:
            operation = self._start(lambda: memory.start_gather(self._num_operations, data), what, timeout_s)
            self._finish(operation)
            return [operation.work.by_rank[rank] for rank in range(self._world_size)]
        padded = torch.zeros(_LENGTH_BYTES + num_bytes, dtype=torch.uint8)
        framed = len(data).to_bytes(_LENGTH_BYTES, "little") + data
        padded[: len(framed)] = torch.frombuffer(bytearray(framed), dtype=torch.uint8)
        parts = [bytes_of(chunk) for chunk in self.gather(padded, what=what, timeout_s=timeout_s)]
        lengths = [int.from_bytes(chunk[:_LENGTH_BYTES], "little") for chunk in parts]
        return [chunk[_LENGTH_BYTES : _LENGTH_BYTES + length] for chunk, length in zip(parts, lengths, strict=True)]

    def run(self, start: Callable[[Any], Any], *, what: object, timeout_s: float) -> None:
        """Collective. Run one of the transport's operations: `start` starts it, and returns its work."""
        self._finish(self._start(lambda: start(self._transport), what, timeout_s))

    # -- forming the group -------------------------------------------------------------------------

    def find_store(self, what: object, timeout_s: float) -> None:
        """Find the job's key-value store, unless that was done before; raise CollectiveError on failure. Rank-local."""
        if self._find_store is not None:
            self._notes.store = self._find_store(what, timeout_s)
            self._find_store = None

    def _form(self, what: object, timeout_s: float) -> None:
        """Collective. Connect the ranks, after all have arrived."""
        self.find_store(what, timeout_s)
        if (store := self._notes.store) is not None:
            store_barrier(
                store,
                "control/form",
                self._rank,
                self._world_size,
                what=what,
                timeout_s=timeout_s,
                check=self._notes.read_abort,
            )
        self.raise_if_aborted(what)
        try:
            self._transport.connect(timeout_s)
        except self._transport.passthrough_errors:
            raise
        except RuntimeError as error:
            self._raise_failure(_GRACE_S)
            raise CollectiveError(f"rank {self._rank}: the ranks could not be connected for {what}: {error}") from error
        self._is_formed = True
        atexit.register(_close_if_alive, weakref.ref(self))
        if self._transport.can_share_memory:
            self._share_memory(what, timeout_s)

    def _share_memory(self, what: object, timeout_s: float) -> None:
        """Collective. Find out whether all ranks can map one memory; use it if so."""
        is_off = os.environ.get(SHARED_MEMORY_VARIABLE) == "0"
        own, offer = (None, b"{}") if is_off else create_offer(self._world_size)
        offers = self.gather_bytes(offer, _OFFER_BYTES, what=what, timeout_s=timeout_s)
        memory = SharedMemory.join(own, offers, self._rank)
        answers = self.gather_bytes(b"no" if memory is None else b"yes", 3, what=what, timeout_s=timeout_s)
        if all(answer == b"yes" for answer in answers):
            self._memory = memory
        elif memory is not None:
            memory.close()

    # -- one operation -----------------------------------------------------------------------------

    def _start(self, start: Callable[[], Any], what: object, timeout_s: float) -> _Operation:
        if self._aborted is not None:
            msg = f"rank {self._rank}: {what} cannot run: the control group was aborted earlier ({self._aborted})"
            raise CollectiveError(msg)
        if self._open is not None:
            self._finish(self._open)  # the memory keeps a few operations only, and each of the others counts too
        was_idle = self._was_idle(timeout_s)
        with self._abort_on_error(what, timeout_s):
            if not self._is_formed:
                self._form(what, timeout_s)
            elif was_idle:
                self.raise_if_aborted(what)
        self._num_operations += 1
        operation = _Operation(None, what, timeout_s, self._num_operations, was_idle)
        with self._abort_on_error(what, timeout_s, operation):
            operation.work = start()
        return operation

    def _was_idle(self, timeout_s: float) -> bool:
        """Return True if ranks that have waited since about the end of the last operation may have timed out."""
        return time.monotonic() - self._last_end_s > min(_PATIENCE_S, timeout_s / 2)

    def _finish(self, operation: _Operation) -> None:
        if operation is self._open:
            self._open = None
        elif operation.is_finished:
            return  # another operation had to start
        if self._aborted is not None:
            msg = f"rank {self._rank}: {operation.what} ended: the control group was aborted ({self._aborted})"
            raise CollectiveError(msg)
        with self._abort_on_error(operation.what, operation.timeout_s, operation):
            was_slow = self._wait(operation)
            if (was_slow or operation.was_idle) and self._notes.decide_outcome(operation.number, "done") != "done":
                self.raise_if_aborted(operation.what)
        operation.is_finished = True  # only now: if it failed because another had to start, it fails again
        self._last_end_s = time.monotonic()

    def _wait(self, operation: _Operation) -> bool:
        """Wait for the work; return True if it took so long that another rank may have aborted the group."""
        work = operation.work
        deadline = time.monotonic() + operation.timeout_s
        was_slow = False
        while True:
            left_s = deadline - time.monotonic()
            try:
                work.wait(timedelta(seconds=max(min(_PAUSE_S if was_slow else _PATIENCE_S, left_s), 0.001)))
            except RuntimeError as error:
                if work.is_completed():
                    work.wait()  # returns if it has just ended well, else raises its error
                    return was_slow
                failure = self._get_failure()
                if failure is not None or time.monotonic() >= deadline:
                    if (
                        not self._transport.withdraw(work)
                        or self._notes.decide_outcome(operation.number, "aborted") == "done"
                    ):
                        work.wait(timedelta(seconds=1))  # another rank has just finished it
                        return was_slow
                    if failure is not None:
                        raise failure  # noqa: B904 - its cause is on another rank; this error is its context
                    self._raise_explained(error, operation.what, operation, operation.timeout_s, timed_out=True)
                if not was_slow:
                    with contextlib.suppress(OSError):
                        self._notes.write_arrival(operation.number, operation.what)
                    was_slow = True
                with contextlib.suppress(TimeoutError):
                    if self._notes.read_abort() is not None:
                        raise
            else:
                return was_slow

    @contextlib.contextmanager
    def _abort_on_error(self, what: object, timeout_s: float, operation: _Operation | None = None) -> Iterator[None]:
        """Abort the group if an operation fails in the block, and raise an error that explains why."""
        try:
            yield
        except DistckptError as error:
            if self._aborted is None:
                self._abort(what, getattr(error, "missing", ()))
            raise
        except self._transport.passthrough_errors:  # the runtime itself can go on from it
            # Noted if there is a store: Horovod forgets operations that started while it was ending.
            if operation is not None:
                with contextlib.suppress(OSError):
                    self._notes.write_arrival(operation.number, operation.what)
            self._abort(what, ())
            raise
        except OSError as error:
            self._aborted = str(what)
            self._raise_failure(ANSWER_LIMIT_S)
            raise store_lost_error(self._rank, what, error) from error
        except RuntimeError as error:
            self._raise_explained(error, what, operation, timeout_s, timed_out=False)
        except BaseException:  # an interrupt: this rank is out of step now
            if operation is not None and operation.work is not None:
                self._transport.withdraw(operation.work)
            self._abort(what, ())
            raise

    # -- failures ----------------------------------------------------------------------------------

    def raise_if_aborted(self, what: object) -> None:
        """Raise CollectiveError if another rank has aborted the group; it names the missing ranks. Rank-local."""
        try:
            note = self._notes.read_abort()
        except TimeoutError:  # a slow store proves nothing
            return
        except OSError as error:
            raise store_lost_error(self._rank, what, error) from error
        if note is None:
            return
        missing, where = decode_abort(note)
        who = f", because {format_ranks(missing)} did not come" if missing else ""
        msg = f"rank {self._rank}: {what} cannot run: another rank gave up in {where}{who}{self._describe(missing)}"
        raise CollectiveError(msg, missing)

    def _get_failure(self, wait_s: float = 0.0) -> DistckptError | None:
        return None if self.monitor is None else self.monitor.failure(wait_s)

    def _raise_failure(self, wait_s: float) -> None:
        """Raise the monitor's failure, if there is one; its cause is on another rank."""
        if (failure := self._get_failure(wait_s)) is not None:
            raise failure

    def _describe(self, missing: Sequence[int]) -> str:
        text = "" if self.monitor is None or not missing else self.monitor.describe(missing)
        return f" ({text})" if text else ""

    def _abort(self, what: object, missing: Sequence[int]) -> None:
        """Make every later operation fail at once, on this rank and on ranks that arrive late."""
        self._aborted = str(what)
        self._notes.write_abort(what, missing)

    def _raise_explained(
        self, error: RuntimeError, what: object, operation: _Operation | None, timeout_s: float, *, timed_out: bool
    ) -> NoReturn:
        """Find out which ranks are missing from a failed operation, abort the group, and raise."""
        self._abort(what, ())
        missing: list[int] = []
        if operation is not None and timed_out and operation.is_in_memory and not self._notes.is_silent:
            # The memory shows it, without notes in the store.
            missing = [rank for rank in range(self._world_size) if not self._is_in_memory(rank, operation)]
        elif operation is not None and self._notes.store is not None:
            try:
                missing = self._find_missing(operation, _TIMEOUT_GRACE_S if timed_out else _GRACE_S)
            except OSError as gone:
                self._raise_failure(ANSWER_LIMIT_S)
                raise store_lost_error(self._rank, what, gone) from error
            # On a busy machine a rank may have had no time to note its arrival.
            missing = [rank for rank in missing if not self._is_in_memory(rank, operation)]
        self._abort(what, missing)
        reason = "the connection broke" if self._notes.store is not None or not timed_out else "not all ranks came"
        if missing:
            reason = f"{format_ranks(missing)} did not come{self._describe(missing)}"
        if timed_out:
            msg = f"rank {self._rank}: waited {timeout_s:g} s in {what}, but {reason}"
            raise CollectiveTimeout(msg, missing) from error
        raise CollectiveError(f"rank {self._rank}: {what} failed: {reason} ({error})", missing) from error

    def _is_in_memory(self, rank: int, operation: _Operation) -> bool:
        """Return True if the shared memory shows that `rank` has arrived at an operation."""
        if not operation.is_in_memory or self._memory is None:
            return False
        return rank == self._rank or self._memory.read(rank, operation.number) is not None

    def _find_missing(self, operation: _Operation, grace_s: float) -> list[int]:
        """Return the ranks that have not arrived at an operation within `grace_s` of the store's first answer.

        Raises:
            OSError: the store is gone, or is silent and there is no monitor.
            DistckptError: the monitor's failure.
        """
        silence_deadline = time.monotonic() + operation.timeout_s
        deadline: float | None = None
        while True:
            try:
                if deadline is None:
                    self._notes.write_arrival(operation.number, operation.what)
                    deadline = time.monotonic() + grace_s
                missing = self._notes.find_absent(operation.number)
            except TimeoutError:
                if self.monitor is None or time.monotonic() > silence_deadline:
                    raise
            else:
                if not missing or time.monotonic() > deadline:
                    return missing
            if (failure := self._get_failure()) is not None:
                raise failure
            time.sleep(0.02)


def _close_if_alive(group: "weakref.ref[ControlGroup]") -> None:
    alive = group()
    if alive is not None:
        alive.close()
