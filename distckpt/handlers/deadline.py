"""The time that is left for a save before the process is killed.

Owns what the log says of it.
"""

import logging
import threading
import time

__all__ = ["Deadline"]

_PATIENCE_S = 10.0
"""For a log that takes its time."""


class Deadline:
    """Logs whether a save can end, and has ended, before the process is killed.

    Args:
        logger: where to.
        step: the engine's iteration.
        end_s: when the process is killed, on the monotonic clock, in seconds; None if unknown.
        usual_s: how long the last save took, in seconds.
        reports: whether this rank logs it; the others do at DEBUG.
    """

    def __init__(
        self, logger: logging.Logger, step: int, end_s: float | None, usual_s: float, *, reports: bool
    ) -> None:
        self._logger = logger
        self._reports = reports
        self._step = step
        self._end_s = end_s
        self._usual_s = usual_s
        self._begin_s = time.monotonic()
        self._timer: threading.Timer | None = None

    def __enter__(self) -> None:
        if self._end_s is None:
            return
        left_s = self._end_s - self._begin_s
        if self._usual_s > left_s:
            self._log(
                logging.WARNING,
                "Preemption: %.1f s are left, and the last save took %.1f s: that of iteration %d may not end in time",
                left_s,
                self._usual_s,
                self._step,
            )
        self._timer = threading.Timer(max(left_s, 0.0), self._say_late)
        self._timer.daemon = True
        self._timer.start()

    def _log(self, level: int, message: str, *args: object) -> None:
        self._logger.log(level if self._reports else logging.DEBUG, message, *args)

    def _say_late(self) -> None:
        self._log(
            logging.ERROR,
            "Preemption: the time that was left is over and the save of iteration %d has not ended; if the process is "
            "killed now, the checkpoint before it stands",
            self._step,
        )

    def __exit__(self, *raised: object) -> None:
        if self._timer is None or self._end_s is None:
            return
        self._timer.cancel()
        now_s = time.monotonic()
        self._timer.join(_PATIENCE_S)  # what it has begun to say is said before what follows
        if raised[0] is None:
            self._log(
                logging.INFO,
                "Preemption: the save of iteration %d took %.1f s and ended %.1f s %s the deadline",
                self._step,
                now_s - self._begin_s,
                abs(self._end_s - now_s),
                "before" if now_s <= self._end_s else "after",
            )
