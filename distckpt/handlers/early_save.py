"""When an iteration has been saved, so that a save before its time is not made twice."""

import weakref
from typing import Any

from ignite.engine import Engine

from distckpt.handlers.engine_votes import get_run_number

__all__ = ["Moment"]


class Moment:
    """An iteration of an engine's run; a copy, or one without an engine, is never now."""

    def __init__(self, engine: Engine | None = None) -> None:
        self._engine = None if engine is None else weakref.ref(engine)
        self._when = None if engine is None else (get_run_number(engine), engine.state.iteration)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the engine behind."""
        return (Moment, ())

    def is_now(self, engine: Engine) -> bool:
        """Tell whether the engine is still there, in the same iteration of the same run."""
        if self._engine is None or self._engine() is not engine:
            return False
        return self._when == (get_run_number(engine), engine.state.iteration)
