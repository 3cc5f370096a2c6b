"""A Checkpoint's background saves: when the ranks vote on whether a save is done, and when they wait for it.

The save itself is a :class:`~distckpt.saving.pending_save.PendingSave`.
"""

import functools
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ignite.engine import Engine

from distckpt.backends.base import default_timeout_s
from distckpt.backends.detect import current
from distckpt.coordination.phases import HandlerId
from distckpt.coordination.votes import Answer, VoteKind
from distckpt.errors import RemoteRankError
from distckpt.handlers.engine_events import find_engine_handling_exception, get_running_engines
from distckpt.handlers.engine_votes import Poller, hold_votes, start_polling, stop_polling
from distckpt.saving.pending_save import PendingSave

_logger = logging.getLogger(__name__)

T = TypeVar("T")
OnEnd = Callable[[PendingSave, BaseException | None], None]
"""Called on all ranks when a save has ended: with None if it is committed, else with the error."""


class BackgroundSaves(Poller):
    """The pending save of one Checkpoint, if any.

    It votes with the outermost running engine as the save starts. After each of that engine's iterations all ranks
    vote on whether a rank is still writing, together with the other votes. No iteration waits for a
    rank that is still writing.

    Args:
        timeout_s: seconds to wait for the other ranks; None for the default.
    """

    vote_kind = VoteKind.SAVE_PENDING
    lag = None
    every = None

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s = timeout_s
        self._handler_id = HandlerId("Checkpoint in the background")
        self._pending: PendingSave | None = None
        self._voted_on: PendingSave | None = None
        self._engine: Engine | None = None
        self._on_end: OnEnd | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the pending save out of copies and pickles."""
        return (BackgroundSaves, (self.timeout_s,))

    def __bool__(self) -> bool:
        """Return True if a save is pending. The same on every rank."""
        return self._pending is not None

    def add(self, engine: Engine, pending: PendingSave, on_end: OnEnd) -> None:
        """All ranks. Poll a save that has started on an event of `engine`; call `on_end` when it has ended."""
        self._pending, self._on_end = pending, on_end
        self._engine = next(iter(get_running_engines()), engine)
        start_polling(self._engine, self)

    def poll(self, engine: Engine) -> None:
        """All ranks. Vote on the pending save."""
        if self._pending is not None:
            self._vote(engine, current())

    def _probe(self, engine: Engine) -> Answer:
        self._voted_on = self._pending
        return _report_nothing if self._pending is not None and self._pending.is_pending else None

    def _act(self, engine: Engine, reports: Mapping[int, Any]) -> None:
        """Collective. Advance the save, since no rank is writing any more."""
        if self._pending is not None and self._pending is self._voted_on:
            self._advance()

    def wait(self) -> None:
        """Collective. Block until no save is pending.

        While an engine handles an exception in a job of several ranks, :meth:`abort` the save instead.

        Raises:
            RemoteRankError: the save failed on some rank; raised on every rank. With one rank: the original error.
        """
        if find_engine_handling_exception() is not None and current().world_size > 1:
            self.abort(handled_exception())
            return
        if self._pending is not None and self._engine is not None:
            hold_votes(self._engine)
        if self._pending is not None:  # disks may be slow, but a rank that does not come here is named in time
            self._run(functools.partial(self._pending.meet, self.timeout_s))
        while self._pending is not None:
            self._advance()

    def wait_all(self, engine: Engine) -> None:
        """Collective. Block until no save is pending, at the end of the engine's run."""
        self.wait()

    def abort(self, error: BaseException) -> None:
        """Wait for the pending save when an exception leaves the engine's run.

        Collective if all ranks are sure to come here: then the save completes. Otherwise each rank finishes its own
        work. A rank that writes alone commits the file, and :func:`~distckpt.resume` finds it.
        """
        pending = self._pending
        if pending is None:
            return
        try:
            if pending.backend is current() and (pending.backend.world_size == 1 or isinstance(error, RemoteRankError)):
                while self._pending is not None:
                    # Without a heartbeat monitor only the time-out ends a wait for a rank that went elsewhere.
                    self._advance(default_timeout_s() if self.timeout_s is None else self.timeout_s)
                return
        except Exception as failure:  # noqa: BLE001 - the run's own error is the one to raise
            _log_aborted(pending, f"{type(failure).__name__}: {failure}")
            return
        pending.wait_local()
        pending.give_up()
        self._end(pending, error)
        _log_aborted(
            pending, f"rank {pending.backend.rank} has ended its part, and another rank was to commit the file"
        )

    def _advance(self, timeout_s: float | None = None) -> None:
        pending = self._pending
        if pending is None:
            return
        if self._run(functools.partial(pending.advance, timeout_s=timeout_s)):
            self._end(pending, None)

    def _run(self, step: Callable[[], T]) -> T:
        pending = self._pending
        try:
            return step()
        except BaseException as error:
            if pending is not None:
                self._end(pending, error)
            raise

    def _end(self, pending: PendingSave, error: BaseException | None) -> None:
        engine, on_end = self._engine, self._on_end
        self._pending = self._engine = self._on_end = None
        if engine is not None:
            stop_polling(engine, self)
        if on_end is not None:
            on_end(pending, error)


def handled_exception() -> BaseException:
    """Return the exception that an engine handles; a new one if EXCEPTION_RAISED was fired without one."""
    return sys.exc_info()[1] or RuntimeError("EXCEPTION_RAISED was fired without an exception")


def _log_aborted(pending: PendingSave, reason: str) -> None:
    """Log whether this rank has committed a save that was pending as the run failed; `reason` if it has not."""
    level = logging.WARNING if pending.writes else logging.DEBUG
    if pending.has_committed:
        _logger.log(level, "Checkpoint: %s was being saved as the run failed, and is on the disk", pending.filename)
    else:
        message = "Checkpoint: %s was being saved as the run failed, and may not be on the disk: %s"
        _logger.log(level, message, pending.filename, reason)


def _report_nothing() -> None:
    """Report a yes without a detail."""
