"""The run that checkpoints belong to: its identity, which runs it went on from, and how many checkpoints it has saved.

A run belongs to the outermost engine that fires. It gets its identity with its first save. All ranks take over the
coordinator's, which travels with the intents of that save. Rank-local; issues no collectives.

Files of one run are ordered by their number, files of several by the time at which the runs were started. That time is
raised above everything that the run goes on from, so a clock that was set back changes nothing.
"""

import time
import uuid
from dataclasses import dataclass
from typing import Any

from ignite.engine import Engine

from distckpt.handlers.engine_events import get_run, set_run
from distckpt.ptformat.records import Run

__all__ = ["Origin", "adopt", "go_on_from", "num_saved", "present_run", "propose", "run_key", "untrained_at"]

_LATER_S = 1e-3
"""By how much a run is later than what it goes on from; a float holds this of seconds since 1970."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a run goes on from.

    Attributes:
        run: the run that saved it; None where the file has no record.
    """

    run: Run | None


class EngineRun:
    """The run of one engine; kept on the engine.

    Attributes:
        run: the run under way; None before its first save.
        origin: what the next run goes on from; None for nothing.
        num_saved: how many checkpoints the run has saved.
        num_parts: how often ``engine.run()`` has begun or gone on.
        began_at: the engine's iteration then; 0 before the first time.
    """

    def __init__(self) -> None:
        self.run: Run | None = None
        self.origin: Origin | None = None
        self.num_saved = 0
        self.num_parts = 0
        self.began_at = 0
        self._is_resumed = False

    def resumed(self, origin: Origin) -> None:
        """Let the next run go on from `origin`."""
        self.run, self.origin, self._is_resumed = None, origin, True

    def begin(self, engine: Engine) -> None:
        """Called as the engine fires STARTED."""
        self.num_parts += 1
        self.began_at = engine.state.iteration
        if not self._is_resumed and engine.state.iteration == 0:
            self.run = self.origin = None
        self._is_resumed = False


def go_on_from(engine: Engine, origin: Origin) -> None:
    """Let the engine's next run go on from what was loaded."""
    _of(engine).resumed(origin)


def present_run(engine: Engine) -> Run | None:
    """Return the run under way; None before its first save."""
    return _of(engine).run


def untrained_at(engine: Engine) -> int | None:
    """Return the engine's iteration where its run has gone on and has not trained since; else None."""
    began_at = _of(engine).began_at
    return began_at if began_at and began_at == engine.state.iteration else None


def run_key(engine: Engine) -> tuple[Any, ...]:
    """Return what differs between two calls of ``engine.run()``, and between what was resumed and what is new."""
    found = _of(engine)
    return (None if found.run is None else found.run.id, found.num_parts)


def propose(engine: Engine, origin: Origin | None, newest_s: float) -> Run:
    """Return the run that a save on this engine belongs to.

    Args:
        engine: the outermost one that fires.
        origin: what a handler goes on from; it counts where the engine itself goes on from nothing.
        newest_s: when the newest run that is known of was started; 0.0 for none.
    """
    found = _of(engine)
    if found.run is not None:
        return found.run
    former = (found.origin or origin or Origin(run=None)).run
    newest_s = max(newest_s, 0.0 if former is None else former.started_s)
    return Run(
        id=uuid.uuid4().hex[:16],
        started_s=max(time.time(), newest_s + _LATER_S),
        lineage=() if former is None else former.ids,
    )


def adopt(engine: Engine, run: Run, num_saved: int) -> None:
    """All ranks. Take over the run that was agreed on, and how many checkpoints it has saved."""
    found = _of(engine)
    found.run, found.num_saved = run, num_saved


def num_saved(engine: Engine) -> int:
    """Return how many checkpoints the engine's run has saved."""
    return _of(engine).num_saved


def _of(engine: Engine) -> EngineRun:
    found: EngineRun | None = get_run(engine)
    if found is None:
        found = EngineRun()
        set_run(engine, found)
    return found
