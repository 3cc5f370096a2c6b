"""The histories of handlers after a resume: each handler's own newest file records its history.

The handler to resume from takes the history that the selected file records. The other known handlers take what their
own newest files of the same runs record. Handlers that are not known yet do so in the first save of the resumed run.

A process that is killed after a commit leaves the files that the new file replaces. They are removed here: the resumed
run may have nothing left to save.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine

from distckpt.backends.base import Backend
from distckpt.coordination import phases
from distckpt.handlers.checkpoint import Checkpoint
from distckpt.handlers.engine_events import get_tracked_handlers
from distckpt.handlers.object_trees import iter_objects
from distckpt.handlers.runs import Origin, run_of
from distckpt.handlers.save_handler import directory_of, storage_saver
from distckpt.handlers.save_intent import coordinator_of
from distckpt.policy.decision import RemovalOrder
from distckpt.policy.naming import check_name
from distckpt.ptformat.records import Record, read_record
from distckpt.saving.pending_save import Problems
from distckpt.saving.protocol import remove_local
from distckpt.storage.new_file import sync_directory_at

_logger = logging.getLogger(__name__)


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
    3. (each handler's coordinator) remove the files, if any, that a killed save has replaced and left. Those that
       cannot be removed are left to the next save.

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

    def search(handler: Checkpoint) -> list[Any] | None:
        return _search_history(handler, engines, record, selected if handler is source else None, damaged)

    clause, phase = "", "looking for what the handlers have saved"
    found = _ask_coordinators(backend, handlers, phase, search, timeout_s=timeout_s)
    for handler, answer in zip(handlers, found, strict=True):
        if answer is not None:
            entries, orphans, iteration = answer
            entries = [(priority, name) for priority, name in entries]
            handler._history.replace(entries, orphans, iteration=iteration, origin=origin)  # noqa: SLF001 - as above
        if handler is source:
            num_files = len(handler._history.kept)  # noqa: SLF001 - as above
            clause = f"the handler's history is what the checkpoint says of {num_files} files"
    with_orphans = [
        handler for handler, answer in zip(handlers, found, strict=True) if answer is not None and answer[1]
    ]
    if with_orphans:
        _remove_orphans(backend, with_orphans, engines, timeout_s=timeout_s)
    return clause


def _ask_coordinators(
    backend: Backend,
    handlers: Sequence[Checkpoint],
    phase: str,
    work: Callable[[Checkpoint], Any],
    *,
    timeout_s: float | None,
) -> list[Any]:
    """Collective. Call `work` for each handler on its coordinator; return the results, the same on every rank."""

    def work_here() -> list[Any]:
        return [work(one) if coordinator_of(one) == backend.rank else None for one in handlers]

    point = phases.SyncPoint(handler="resume", phase=phase, step=0)
    answers = phases.run(backend, point, work_here, timeout_s=timeout_s)
    given = {(rank, index): one for rank, row in enumerate(answers) for index, one in enumerate(row)}
    return [given.get((coordinator_of(handler), index)) for index, handler in enumerate(handlers)]


def _remove_orphans(
    backend: Backend, handlers: Sequence[Checkpoint], engines: Sequence[Engine], *, timeout_s: float | None
) -> None:
    """Collective. Remove the handlers' orphans. Those that cannot be removed are left to the next save."""

    def remove(handler: Checkpoint) -> Problems:
        return _remove_orphans_here(handler, engines)

    phase = "removing what killed saves have replaced"
    answers = _ask_coordinators(backend, handlers, phase, remove, timeout_s=timeout_s)
    for handler, problems in zip(handlers, answers, strict=True):
        history = handler._history  # noqa: SLF001 - the other half of a resume
        history.orphans = tuple(name for name in history.orphans if name in problems and not problems[name][0])


def _remove_orphans_here(handler: Checkpoint, engines: Sequence[Engine]) -> Problems:
    """Rank-local. Remove a handler's orphans, if each name is a file of its own."""
    history, saver = handler._history, storage_saver(handler.save_handler)  # noqa: SLF001 - as above
    if saver is None or saver.removal_order != RemovalOrder.AFTER:
        return {name: [False, ""] for name in history.orphans}
    directory, own = directory_of(saver) or Path(), handler._find_own_files(engines)  # noqa: SLF001 - as above
    kept = [name for _, name in history.kept]

    def remove(name: str) -> None:
        check_name(name)
        own.refuse_removal(name, read_record(directory / name))
        saver.refuse_last_loadable(name, kept)
        for folder in {(directory / name).parent for name in kept}:
            sync_directory_at(folder)  # the killed process may not have
        saver.storage.remove(name)
        _logger.info("resume: removed %s, which a killed save has replaced", directory / name)

    problems = remove_local(history.orphans, remove)
    for gone, problem in problems.values():
        _logger.warning("resume: %s.%s", problem, "" if gone else " The next save tries again.")
    return problems


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
