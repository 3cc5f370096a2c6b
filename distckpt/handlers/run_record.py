"""The record of a run's events: start, resume, saves, stop, signal, error, end, and how far it came.

Each coordinator writes the events of a run into the directories of the engine's Checkpoints whose savers ask for it;
see docs/events.md. The record costs no collectives and nothing in an iteration. A record that cannot be written is
logged once, and the run goes on. Rank-local: ranks that coordinate no save write nothing.
"""

import logging
import numbers
import os
import secrets
import threading
import time
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine

from distckpt.backends.detect import current
from distckpt.handlers.engine_events import (
    get_enclosing_engines,
    get_run,
    get_running_engines,
    get_tracked_handlers,
)
from distckpt.handlers.progress import progress_of
from distckpt.handlers.save_handler import directory_of, storage_saver
from distckpt.policy.naming import EVENTS_NAME
from distckpt.storage.event_file import append_events
from distckpt.storage.new_file import text_of

_logger = logging.getLogger(__name__)
RECORD_VARIABLE = "DISTCKPT_RECORD_EVENTS"
_FORMAT = 1
_PERIOD_S = 1.0
_PERIODS_A_RUN = 100
"""Progress is recorded every second; in a long session, at intervals of a hundredth of the time since its start."""
_MAX_CHARS = 400
_COUNTERS = ("max_epochs", "max_iters", "epoch_length")


def records_by_default() -> bool:
    """Return True if ``DISTCKPT_RECORD_EVENTS=1`` is in the environment."""
    return os.environ.get(RECORD_VARIABLE) == "1"


def record_directory_of(save_handler: object) -> Path | None:
    """Return the directory whose record this rank keeps for a save handler; None if it keeps none."""
    saver = storage_saver(save_handler)
    if saver is None or not getattr(saver, "record_events", False) or current().rank != saver.save_on_rank:
        return None
    return directory_of(saver)


class RunRecord:
    """The events of one engine. A call of ``engine.run()`` outside of other engines' runs is a session.

    Attributes:
        resumed: the event of a resume, which the next session continues; None if there is none.
    """

    def __init__(self) -> None:
        self.resumed: dict[str, Any] | None = None
        self._session: str | None = None
        self._opening: list[dict[str, Any]] = []  # what a directory's record gets before the session's other events
        self._directories: set[Path] = set()
        self._unwritable: set[Path] = set()
        self._is_stopped = False
        self._progress: _ProgressThread | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Return a new object: a copy of an engine has its own record."""
        return (RunRecord, ())

    def begin(self, engine: Engine) -> None:
        """Begin a session, as the engine fires STARTED."""
        if get_enclosing_engines(engine):
            return  # it runs within the run of another engine, whose session this is
        self._close()
        self._open(engine, engine.state.iteration)
        handlers = (getattr(handler, "save_handler", None) for handler in get_tracked_handlers(engine))
        for directory in {found for found in map(record_directory_of, handlers) if found is not None}:
            self._write(engine, directory, [])

    def save(self, engine: Engine, directory: Path, facts: Mapping[str, Any]) -> None:
        """Record a committed save.

        Args:
            engine: the outermost engine that fired as the save began.
            directory: see :func:`record_directory_of`.
            facts: the event, without its session.
        """
        if self._session is None and get_running_engines():
            self._open(engine, None)  # of a Checkpoint that is attached to another engine
        self._write(engine, directory, [{"event": "save", **facts}])

    def add(self, engine: Engine, event: str, **facts: Any) -> None:
        """Record an event of the session. Does nothing outside of one."""
        line = {"event": event, "at_s": time.time(), **_position(engine), **facts}
        for directory in tuple(self._directories):
            self._write(engine, directory, [line])

    def stop(self, engine: Engine, reason: str) -> None:
        """Record that a handler stops the run."""
        self._is_stopped = True
        self.add(engine, "stop", reason=reason)

    def end(self, engine: Engine, error: BaseException | None) -> None:
        """End the session, as ``engine.run()`` returns or raises."""
        if self._session is None:
            return
        if error is None or (self._is_stopped and isinstance(error, SystemExit)):
            self.add(engine, "end")
        else:
            text = " ".join(str(error).split())
            self.add(engine, "error", type=type(error).__name__, text=text[:_MAX_CHARS])
        self._close()

    def _open(self, engine: Engine, iteration: int | None) -> None:
        backend, resumed = current(), self.resumed
        self._session, self.resumed, self._is_stopped = secrets.token_hex(4), None, False
        start = {
            "event": "start",
            "at_s": time.time(),
            "format": _FORMAT,
            "iteration": _as_int(iteration),
            **{name: _as_int(getattr(engine.state, name, None)) for name in _COUNTERS},
            "world_size": backend.world_size,
            "backend": backend.name,
        }
        self._opening = [start] if resumed is None else [resumed, start]

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.end()
        self._session, self._progress, self._opening = None, None, []
        self._directories = set()

    def _write(self, engine: Engine, directory: Path, events: Iterable[Mapping[str, Any]]) -> None:
        if self._session is not None and directory not in self._directories:
            self._directories.add(directory)
            events = [*(_seen_from(directory, event) for event in self._opening), *events]
        if self._session is not None and self._progress is None:
            self._progress = _ProgressThread(self, engine)
            self._progress.start()
        try:
            append_events(directory, [{**event, "session": self._session} for event in events])
        except OSError as error:
            if directory not in self._unwritable:
                self._unwritable.add(directory)
                message = "the record of events %s cannot be written (%s); the run goes on (record_events=False: none)"
                _logger.warning(message, directory / EVENTS_NAME, text_of(error))


def note_resume(engine: Engine | None, resumed: Any, record: Mapping[str, Any], took_s: float) -> None:
    """Let the engine's next session record that it continues from a checkpoint.

    Args:
        engine: the trainer; None records nothing.
        resumed: a :class:`~distckpt.handlers.resume.Resumed`.
        record: the checkpoint's record; empty without one.
        took_s: how long the resume took, in seconds.
    """
    found, run = (None if engine is None else get_run(engine)), record.get("run")
    if found is not None:
        found.record.resumed = {
            "event": "resume",
            "at_s": time.time(),
            "file": str(resumed),
            "run": resumed.run_id,
            "lineage": run.get("lineage", []) if isinstance(run, Mapping) else [],
            "iteration": resumed.iteration,
            "epoch": resumed.epoch,
            "took_s": took_s,
            "skipped": [[name, reason[:_MAX_CHARS]] for name, reason in resumed.skipped],
        }


class _ProgressThread(threading.Thread):
    """Records how far the run has come, in case the process is killed."""

    def __init__(self, record: RunRecord, engine: Engine) -> None:
        super().__init__(name="distckpt-record", daemon=True)
        self._record = record
        self._engine = weakref.ref(engine)
        self._has_ended = threading.Event()
        self._begin_s = time.monotonic()
        self._last = progress_of(engine).trained

    def run(self) -> None:
        """Record until the session ends."""
        while not self._has_ended.wait(max(_PERIOD_S, (time.monotonic() - self._begin_s) / _PERIODS_A_RUN)):
            engine = self._engine()
            if engine is None:
                return
            trained = progress_of(engine).trained
            if trained != self._last:
                self._last = trained
                self._record.add(engine, "progress")
            del engine

    def end(self) -> None:
        """End the thread; wait for a line that is being written, but not for a disk that hangs."""
        self._has_ended.set()
        self.join(1.0)


def _seen_from(directory: Path, event: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an event with the name of a file in `directory` instead of its path."""
    path = Path(event.get("file", "."))
    return {**event, "file": str(path.relative_to(directory))} if path.is_relative_to(directory) else event


def _position(engine: Engine) -> dict[str, int | None]:
    return {"iteration": progress_of(engine).trained, "epoch": _as_int(engine.state.epoch)}


def _as_int(value: object) -> int | None:
    return int(value) if isinstance(value, numbers.Integral) else None  # a program may have assigned anything
