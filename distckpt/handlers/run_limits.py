"""The limits of a run: a program may call ``engine.run()`` several times, with rising limits.

After a resume each of these calls is repeated. Those that had returned before the interruption return at once, and the
next one continues. The statements between them are repeated, too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ignite.engine import Engine

from distckpt.handlers.restored_state import RestoredState
from distckpt.handlers.rng_state import RngState


@dataclass(frozen=True, slots=True)
class RunLimits:
    """The limits of one call of ``engine.run()``.

    Attributes:
        max_epochs: number of epochs; None if the limit is in iterations.
        max_iters: number of iterations; None if the limit is in epochs.
    """

    max_epochs: int | None
    max_iters: int | None

    def is_above(self, other: "RunLimits") -> bool:
        """Return True if a run with these limits continues one with the other limits."""
        if self.max_iters is not None or other.max_iters is not None:
            return self.max_iters is not None and other.max_iters is not None and self.max_iters > other.max_iters
        return self.max_epochs is not None and other.max_epochs is not None and self.max_epochs > other.max_epochs


class ReachedLimits:
    """The calls of a resumed engine's ``run()`` that had nothing left to train.

    Args:
        engine: the engine, with the limits that the checkpoint holds.
        restored: the restored objects.
        rng_states: those among them that hold generators' states.
    """

    def __init__(self, engine: Engine, restored: RestoredState, rng_states: Sequence[RngState]) -> None:
        self._saved = RunLimits(engine.state.max_epochs, engine.state.max_iters)
        self._reached: RunLimits | None = None
        self._restored = restored
        self._rng_states = rng_states

    def are_passed_by(self, limits: RunLimits) -> bool:
        """Return True if a call with these limits continues the run; False if it starts a new run, as in ignite."""
        return self._reached is None or limits.is_above(self._reached)

    def reach(self, limits: RunLimits, excluded: Sequence[Any]) -> None:
        """Prepare for the statements after a call that returns at once.

        If the checkpoint was saved in a later call, it has their effects, which :meth:`leave` undoes. Otherwise the
        statements start with the saved states of the generators.

        Args:
            limits: those of the call.
            excluded: see :meth:`RestoredState.capture`.
        """
        self._reached = limits
        if self._saved.is_above(limits):
            self._restored.capture(excluded)
        else:
            for one in self._rng_states:
                one.restore_loaded()

    def leave(self) -> list[Callable[[], None]]:
        """Collective if a call has returned at once. End the statements after that call.

        Returns:
            Functions that set the generators as the statements left them; none if the saved states are to be set.
        """
        if self._reached is None:
            return []
        if not self._saved.is_above(self._reached):
            return [one.capture_current() for one in self._rng_states]
        self._restored.restore_changed("statements between two calls of run()")
        return []
