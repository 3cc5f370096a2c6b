"""Stop a run after a given time: :class:`TimeLimit`."""

import logging
import time
from collections.abc import Mapping
from typing import Any

from ignite.engine import Engine

from distckpt._messages import log_level
from distckpt.backends.detect import current
from distckpt.coordination.votes import Answer, VoteKind
from distckpt.handlers.engine_votes import Voter, is_off_schedule, stop_reason, stop_run


class TimeLimit(Voter):
    """Handler that stops the run when its time is over, on every rank at the same iteration.

    Attach it on all ranks. The time runs from construction, on the monotonic clock; the largest elapsed time of all
    ranks counts. All handlers that vote share one reduction per event.

    Args:
        limit_sec: the limit in seconds, an int.
        lag: 0 to stop in the iteration in which the time is over, 1 one iteration later; see :class:`TerminateOnNan`.
        every: hold the vote, and stop, every N iterations only; as for :class:`~distckpt.Preemption`.
        timeout_s: seconds to wait for the other ranks; None for ``DISTCKPT_TIMEOUT_S``, or 300.

    Attributes:
        limit_sec: the limit in seconds.
        start_time: construction time on the monotonic clock, in seconds.

    Raises:
        TypeError: `limit_sec` is not an int.
        ValueError: `limit_sec` is a bool or not positive, or `lag` or `every` has a wrong value.

    Example:
        >>> from ignite.engine import Events
        >>> trainer = Engine(lambda engine, batch: None)
        >>> trainer.add_event_handler(Events.ITERATION_COMPLETED, TimeLimit(3600)) and None
    """

    vote_kind = VoteKind.TIME_OVER

    def __init__(
        self,
        limit_sec: int = 28800,
        *,
        lag: int | None = None,
        every: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        if not isinstance(limit_sec, int):
            raise TypeError(f"Argument limit_sec should be an integer. Given {type(limit_sec)}")
        if isinstance(limit_sec, bool) or limit_sec <= 0:
            raise ValueError(f"Argument limit_sec should be a positive integer. Given {limit_sec!r}")
        self._init_voter(__name__, lag=lag, every=every, timeout_s=timeout_s)
        self.limit_sec = limit_sec
        self.start_time = time.monotonic()

    def __call__(self, engine: Engine) -> None:
        """Collective, after the event: one reduction with all handlers that vote."""
        backend = current()
        if backend.world_size > 1:
            self._vote(engine, backend)
        elif self._probe(engine) is not None:
            self._act(engine, {0: self._elapsed_s()})

    def _elapsed_s(self) -> float:
        return time.monotonic() - self.start_time

    def _probe(self, engine: Engine) -> Answer:
        return self._elapsed_s if self._elapsed_s() > self.limit_sec else None

    def _act(self, engine: Engine, reports: Mapping[int, Any]) -> None:
        if is_off_schedule(engine, self):
            return  # the next vote finds the same
        first = max(reports, key=lambda rank: reports[rank])
        is_new = stop_reason(engine) != "time_limit"  # with a lag the pending vote has found the same
        self.logger.log(
            log_level(current().rank, {0, *reports}) if is_new else logging.DEBUG,
            "Reached the time limit: %s sec. Stop training (iteration %d; %.1f s have passed on rank %d)",
            self.limit_sec,
            engine.state.iteration,
            reports[first],
            first,
        )
        stop_run(engine, "time_limit")
