"""The run that checkpoints belong to: its id, the runs that it resumed, and how many checkpoints it has saved.

A run belongs to the outermost running engine, and gets its id with its first save: all ranks take the coordinator's.
The files of one run are ordered by a count, the files of several runs by the times at which the runs started. A run's
time is later than those of the runs that it resumes, even if a clock was set back. Rank-local.
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ignite.engine import Engine

from distckpt.handlers.engine_events import get_run, set_run
from distckpt.handlers.run_record import RunRecord
from distckpt.ptformat.records import Run

_LATER_S = 1e-3
"""The least time between two runs. A float of seconds since 1970 can hold it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a run resumes.

    Attributes:
        run: the run that saved the file; None if the file has no record.
    """

    run: Run | None


class EngineRun:
    """The run of one engine; kept on the engine.

    Attributes:
        run: the current run; None before its first save.
        origin: what the next run resumes; None if nothing.
        num_saved: the number of checkpoints that the run has saved.
        num_starts: the number of calls of ``engine.run()``.
        start_iteration: the engine's iteration at the last call; 0 before the first one.
        record: the record of its events.
    """

    def __init__(self) -> None:
        self.run: Run | None = None
        self.origin: Origin | None = None
        self.num_saved = 0
        self.num_starts = 0
        self.start_iteration = 0
        self.record = RunRecord()
        self._is_resumed = False

    def resume(self, origin: Origin) -> None:
        """Let the next run resume `origin`."""
        self.run, self.origin, self._is_resumed = None, origin, True

    def begin(self, engine: Engine) -> None:
        """Note that the engine fires STARTED."""
        self.num_starts += 1
        self.start_iteration = engine.state.iteration
        if not self._is_resumed and engine.state.iteration == 0:
            self.run = self.origin = None
        self._is_resumed = False
        self.record.begin(engine)

    def end(self, engine: Engine, error: BaseException | None) -> None:
        """Note that a call of ``engine.run()`` returns (None) or raises."""
        self.record.end(engine, error)


def run_of(engine: Engine) -> EngineRun:
    """Return the run of an engine."""
    found: EngineRun | None = get_run(engine)
    if found is None:
        found = EngineRun()
        set_run(engine, found)
    return found


def untrained_iteration(engine: Engine) -> int | None:
    """Return the engine's iteration if its run was resumed and has not trained since; else None."""
    start = run_of(engine).start_iteration
    return start if start and start == engine.state.iteration else None


def run_key(engine: Engine) -> tuple[Any, ...]:
    """Return a value that differs between two calls of ``engine.run()``, and between resumed and new runs."""
    found = run_of(engine)
    return (None if found.run is None else found.run.id, found.num_starts)


def propose_run(engines: Sequence[Engine], origin: Origin | None, newest_s: float) -> Run:
    """Return the current run, or a new one.

    Args:
        engines: the running engines, outermost first. An inner one may be the one that was resumed.
        origin: what the handler resumes; used if no engine resumes anything.
        newest_s: the time at which the newest known run started; 0.0 for none.
    """
    current = run_of(engines[0]).run
    if current is not None:
        return current
    origins = [found.origin for found in map(get_run, engines) if found is not None]
    former = next((one.run for one in (*origins, origin) if one is not None), None)
    newest_s = max(newest_s, 0.0 if former is None else former.started_s)
    return Run(
        id=uuid.uuid4().hex[:16],
        started_s=max(time.time(), newest_s + _LATER_S),
        lineage=() if former is None else former.ids,
    )
