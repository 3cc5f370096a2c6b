"""The histories of handlers after a resume: each handler's own newest file records its history.

The handler to resume from takes the history that the selected file records. The other known handlers take what their
own newest files of the same runs record. Handlers that are not known yet do so in the first save of the resumed run.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine

from distckpt.backends.base import Backend
from distckpt.coordination import phases
from distckpt.handlers.checkpoint import Checkpoint
from distckpt.handlers.engine_events import get_tracked_handlers
from distckpt.handlers.object_trees import iter_objects
from distckpt.handlers.runs import Origin, run_of
from distckpt.handlers.save_handler import directory_of
from distckpt.handlers.save_intent import coordinator_of
from distckpt.ptformat.records import Record


def restore_histories(
    backend: Backend,
    source: Checkpoint | None,
    to_load: Mapping[str, Any],
    engine: Engine | None,
    record: Record | None,
    selected: Path,
    damaged: Collection[Path],
    *,
    timeout_s: float | None,
) -> str:
    """Collective. Let handlers and engines resume the run of a checkpoint.

    1. (each handler's coordinator) if the checkpoint has a record: search the handler's directory for its newest file.
    2. (all ranks) take over the history that the file records.

    Args:
        backend: the job's backend.
        source: the handler to resume from; None if there is none.
        to_load: the loaded objects.
        engine: the trainer; None if it is not given.
        record: the record of the selected checkpoint; None if it has none.
        selected: the selected checkpoint.
        damaged: newer files that are damaged.
        timeout_s: seconds to wait for the other ranks.

    Returns:
        A clause about the source's history; empty if there is none.
    """
    attached = () if source is None else source._engines.union(())  # noqa: SLF001 - the other half of a resume
    engines = [
        one for one in (engine, *(one for _, one in iter_objects(to_load)), *attached) if isinstance(one, Engine)
    ]
    handlers = find_handlers(source, to_load, engines)
    origin = Origin(run=None if record is None else record.run)
    for one in engines:
        run_of(one).resume(origin)
    for handler in handlers:
        handler._history.resume_from(origin)  # noqa: SLF001 - as above
    if record is None:
        return ""

    def search() -> list[list[Any] | None]:
        return [
            _search_history(one, engines, record, selected if one is source else None, damaged)
            if coordinator_of(one) == backend.rank
            else None
            for one in handlers
        ]

    point = phases.SyncPoint(handler="resume", phase="looking for what the handlers have saved", step=0)
    answers = phases.run(backend, point, search, timeout_s=timeout_s)
    clause = ""
    for index, handler in enumerate(handlers):
        coordinator = coordinator_of(handler)
        answer = (
            answers[coordinator][index] if coordinator < len(answers) and index < len(answers[coordinator]) else None
        )
        if answer is not None:
            entries, orphans, iteration = answer
            entries = [(priority, name) for priority, name in entries]
            handler._history.replace(entries, orphans, iteration=iteration, origin=origin)  # noqa: SLF001 - as above
        if handler is source:
            num_files = len(handler._history.kept)  # noqa: SLF001 - as above
            clause = f"the handler's history is what the checkpoint says of {num_files} files"
    return clause


def find_handlers(source: Checkpoint | None, to_load: Mapping[str, Any], engines: Iterable[Engine]) -> list[Checkpoint]:
    """Return the handlers whose histories are restored: the source, the loaded ones, and those on the engines."""
    loaded = [one for _, one in iter_objects(to_load)]
    attached = [one for engine in engines for one in get_tracked_handlers(engine)]
    found = {id(one): one for one in (source, *loaded, *attached) if isinstance(one, Checkpoint)}
    return [one for one in found.values() if directory_of(one.save_handler) is not None]


def _search_history(
    handler: Checkpoint, engines: Sequence[Engine], record: Record, selected: Path | None, damaged: Collection[Path]
) -> list[Any] | None:
    """Rank-local. Return a handler's entries, orphans and iteration; None if it has no file."""
    directory = directory_of(handler.save_handler) or Path()
    own = handler._find_own_files(engines)  # noqa: SLF001 - as above
    files = own.survey()
    if selected is not None:
        name: str | None = selected.relative_to(directory).as_posix()
    else:
        name = own.find_newest(files, record.run.root, [one for one in files if directory / one in damaged])
    history = None if name is None else own.recorded_history(name, files)
    return None if history is None else [history.entries, history.orphans, history.iteration]
