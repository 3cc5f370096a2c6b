"""Stopping a run in time.

Owns :class:`TimeLimit`. Layer L5.
"""

import logging
import time

from ignite.engine import Engine

from distckpt.backends.detect import current
from distckpt.consensus import agree
from distckpt.handlers.arguments import check_timeout
from distckpt.handlers.places import take_place

__all__ = ["TimeLimit"]


class TimeLimit:
    """Handler that stops the run when its time is over, on every rank at the same iteration.

    Attach it on all ranks. The time runs from construction, by the monotonic clock; the first rank whose time is over
    stops all.

    Args:
        limit_sec: seconds, an int.
        timeout_s: seconds to wait for the other ranks; None for ``DISTCKPT_TIMEOUT_S``, or 300.

    Attributes:
        limit_sec: see above.
        start_time: seconds of the monotonic clock at construction.

    Raises:
        TypeError: `limit_sec` is no int.
        ValueError: it is a bool, or not positive.

    Example:
        >>> from ignite.engine import Events
        >>> trainer = Engine(lambda engine, batch: None)
        >>> trainer.add_event_handler(Events.ITERATION_COMPLETED, TimeLimit(3600)) and None
    """

    def __init__(self, limit_sec: int = 28800, *, timeout_s: float | None = None) -> None:
        if not isinstance(limit_sec, int):
            msg = f"Argument limit_sec should be an integer. Given {type(limit_sec)}"
            raise TypeError(msg)
        if isinstance(limit_sec, bool) or limit_sec <= 0:
            msg = f"Argument limit_sec should be a positive integer. Given {limit_sec!r}"
            raise ValueError(msg)
        check_timeout(timeout_s)
        self.limit_sec = limit_sec
        self.start_time = time.monotonic()
        self.timeout_s = timeout_s
        self.logger = logging.getLogger(f"{__name__}.{type(self).__name__}")
        self._seat = agree.Seat(type(self).__name__)

    def __call__(self, engine: Engine) -> None:
        """Collective. One reduction while there is time."""
        backend = current()
        if backend.world_size == 1:
            ranks: tuple[int, ...] = (0,) if self._is_over() else ()
        else:
            place = take_place(self._seat, backend, engine, timeout_s=self.timeout_s)
            ranks = agree.vote(backend, place("looking at the clock"), self._is_over, timeout_s=self.timeout_s)
        if ranks:
            first = ", ".join(str(rank) for rank in ranks)
            self.logger.info("Reached the time limit: %s sec. Stop training (on rank %s)", self.limit_sec, first)
            engine.terminate()

    def _is_over(self) -> bool:
        return time.monotonic() - self.start_time > self.limit_sec
