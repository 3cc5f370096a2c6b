"""Time between events: :class:`Timer`. Rank-local."""

import time
from typing import Any

from ignite.engine import Engine, Events


class Timer:
    """Measures the total or average time between events on this rank. It runs from construction.

    Args:
        average: whether to divide the total time by the number of steps.

    Attributes:
        total: seconds until the last pause.
        step_count: number of steps.
        running: whether time is being measured.

    Example:
        >>> timer = Timer(average=True)
        >>> for _ in range(4):
        ...     timer.step()
        >>> timer.step_count, timer.running, timer.value() > 0
        (4.0, True, True)
    """

    def __init__(self, average: bool = False) -> None:
        self._average = average
        self.reset()

    def attach(
        self,
        engine: Engine,
        start: Any = Events.STARTED,
        pause: Any = Events.COMPLETED,
        resume: Any = None,
        step: Any = None,
    ) -> "Timer":
        """Attach the timer's methods to an engine's events.

        Args:
            engine: the engine.
            start: event that resets the timer; it then runs.
            pause: event that pauses it.
            resume: event that resumes it, or None.
            step: event that counts a step, or None.

        Returns:
            The timer.
        """
        engine.add_event_handler(start, self.reset)
        engine.add_event_handler(pause, self.pause)
        if resume is not None:
            engine.add_event_handler(resume, self.resume)
        if step is not None:
            engine.add_event_handler(step, self.step)
        return self

    def reset(self, *_args: Any) -> "Timer":
        """Restart from zero; return the timer."""
        self._since = time.perf_counter()
        self.total = 0.0
        self.step_count = 0.0
        self.running = True
        return self

    def pause(self, *_args: Any) -> None:
        """Pause. Does nothing while paused."""
        if self.running:
            self.total += self._elapsed()
            self.running = False

    def resume(self, *_args: Any) -> None:
        """Resume. Does nothing while running."""
        if not self.running:
            self.running = True
            self._since = time.perf_counter()

    def value(self) -> float:
        """Return the measured seconds: the total, or the average per step."""
        total = self.total + (self._elapsed() if self.running else 0.0)
        return total / max(self.step_count, 1.0) if self._average else total

    def step(self, *_args: Any) -> None:
        """Count a step."""
        self.step_count += 1.0

    def _elapsed(self) -> float:
        return time.perf_counter() - self._since
