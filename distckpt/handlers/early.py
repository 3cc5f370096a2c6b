"""A save before its time: what tells it from the one that it stands in for.

Owns when an iteration has been saved, and the priority of a file that its epoch's end is to replace. Layer L5.
"""

import dataclasses
import weakref
from typing import Any

from ignite.engine import Engine

from distckpt import retention
from distckpt.consensus.decision import SaveDecision
from distckpt.handlers.voting import num_runs

__all__ = ["Moment", "half_a_step_lower"]


class Moment:
    """An iteration of an engine's run; a copy, or one without an engine, is never now."""

    def __init__(self, engine: Engine | None = None) -> None:
        self._engine = None if engine is None else weakref.ref(engine)
        self._when = None if engine is None else (num_runs(engine), engine.state.iteration)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the engine behind."""
        return (Moment, ())

    def is_now(self, engine: Engine) -> bool:
        """Tell whether the engine is still there, in the same iteration of the same run."""
        if self._engine is None or self._engine() is not engine:
            return False
        return self._when == (num_runs(engine), engine.state.iteration)


def half_a_step_lower(decision: SaveDecision) -> SaveDecision:
    """Return `decision` with another priority. The same on every rank."""
    priority = decision.priority - 0.5
    kept = retention.admit(decision.kept, (priority, decision.filename), n_saved=None).kept
    return dataclasses.replace(
        decision, priority=priority, metadata={**decision.metadata, "priority": priority}, kept=kept
    )
