"""A Checkpoint's save that goes on beside training: who asks for it, when it is over, and where a run waits for it.

Owns the poll after each iteration and the drains at a run's ends. How a save goes on lies in
:mod:`distckpt.saving.pending_save`.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from ignite.engine import Engine

from distckpt.backends.base import default_timeout_s
from distckpt.backends.detect import current
from distckpt.coordination.phases import HandlerId
from distckpt.coordination.votes import Answer, VoteKind
from distckpt.errors import RemoteRankError
from distckpt.handlers.engine_events import get_firing_engines
from distckpt.handlers.engine_votes import Poller, count_votes, start_polling, stop_polling
from distckpt.saving.pending_save import PendingSave

__all__ = ["Flights"]

_logger = logging.getLogger(__name__)

Landed = Callable[[PendingSave, BaseException | None], None]
"""Takes over what became of a flight: committed, or the error."""


class Flights(Poller):
    """What one Checkpoint has in flight: nothing, or one save.

    It polls the outermost engine that fires as the save begins: after each iteration all ranks vote on whether somebody
    is still at work, together with all else that is voted on, and nothing is waited for.

    Args:
        timeout_s: seconds to wait for the other ranks; None for the default.
    """

    vote_kind = VoteKind.SAVE_PENDING
    lag = None
    every = None

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s = timeout_s
        self._handler_id = HandlerId("Checkpoint in the background")
        self._flight: PendingSave | None = None
        self._voted_on: PendingSave | None = None
        self._engine: Engine | None = None
        self._landed: Landed | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Flights":
        """Return a new one: a copy of a Checkpoint has nothing in flight."""
        return Flights(self.timeout_s)

    def __reduce__(self) -> tuple[Any, ...]:
        """Start anew in another process."""
        return (Flights, (self.timeout_s,))

    def __bool__(self) -> bool:
        """Tell whether something is in flight. The same on every rank."""
        return self._flight is not None

    def begin(self, engine: Engine, flight: PendingSave, landed: Landed) -> None:
        """All ranks. Take a flight that has begun.

        Args:
            engine: on whose event.
            flight: see there.
            landed: called on all ranks when it is over, in an event of the engine that is polled or where somebody
                waited for it.
        """
        self._flight, self._landed = flight, landed
        self._engine = next(iter(get_firing_engines()), engine)
        start_polling(self._engine, self)

    def poll(self, engine: Engine) -> None:
        """All ranks. Vote."""
        if self._flight is not None:
            self._vote(engine, current())

    def _probe(self, engine: Engine) -> Answer:
        del engine
        self._voted_on = self._flight
        return _nothing_to_tell if self._flight is not None and self._flight.is_pending else None

    def _act(self, engine: Engine, said: Mapping[int, Any]) -> None:
        """Collective: no rank is at work on it any more."""
        del engine, said
        if self._flight is not None and self._flight is self._voted_on:
            self._advance()

    def land(self) -> None:
        """Collective. Wait until nothing is in flight.

        Raises:
            RemoteRankError: it failed on some rank; on every rank. In a world of one what was raised.
        """
        if self._flight is not None and self._engine is not None:
            count_votes(self._engine)
        while self._flight is not None:
            self._advance()

    def _advance(self, patience_s: float | None = None) -> None:
        flight = self._flight
        if flight is None:
            return
        try:
            is_over = flight.advance(timeout_s=patience_s)
        except BaseException as error:
            self._end(flight, error)
            raise
        if is_over:
            self._end(flight, None)

    def _end(self, flight: PendingSave, error: BaseException | None) -> None:
        engine, landed = self._engine, self._landed
        self._flight = self._engine = self._landed = None
        if engine is not None:
            stop_polling(engine, self)
        if landed is not None:
            landed(flight, error)

    def wait_all(self, engine: Engine) -> None:
        """Collective. Wait until nothing is in flight, for the engine's run ends."""
        del engine
        self.land()

    def abort(self, error: BaseException) -> None:
        """Wait for what is in flight, for an exception leaves the engine's run.

        It is taken over where all ranks are bound to come here. Else each rank finishes its own work: a rank that
        writes alone commits the file, and :func:`~distckpt.resume` finds it.
        """
        flight = self._flight
        if flight is None:
            return
        try:
            if flight.backend is current() and (flight.backend.world_size == 1 or isinstance(error, RemoteRankError)):
                while self._flight is not None:
                    # Without a watch nobody tells a rank that waits for one which went another way.
                    self._advance(default_timeout_s() if self.timeout_s is None else self.timeout_s)
                return
        except Exception as failure:  # noqa: BLE001 - the run's own error is the one that is raised
            _log_left(flight, f"{type(failure).__name__}: {failure}")
            return
        flight.wait_local()
        flight.give_up()
        self._end(flight, error)
        _log_left(flight, f"rank {flight.backend.rank} has ended its part, and another rank was to commit the file")


def _log_left(flight: PendingSave, why_not: str) -> None:
    """Log what became of a save that was under way as the run failed. Rank-local: each rank that writes knows its own.

    Args:
        flight: it is over on this rank.
        why_not: why this rank has not committed it, if it has not.
    """
    level = logging.WARNING if flight.writes else logging.DEBUG
    if flight.has_committed:
        _logger.log(level, "Checkpoint: %s was being saved as the run failed, and is on the disk", flight.filename)
    else:
        message = "Checkpoint: %s was being saved as the run failed, and may not be on the disk: %s"
        _logger.log(level, message, flight.filename, why_not)


def _nothing_to_tell() -> None:
    """Return what a rank tells of its being at work."""
