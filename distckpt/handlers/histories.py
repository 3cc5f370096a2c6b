"""What handlers had saved before a resume: each one's own newest file says it.

The handler that is resumed from takes what the chosen file says. All others that are known then take what their own
newest file of the same runs says, and those that are not, in the first save of the resumed run.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine

from distckpt.backends.base import Backend
from distckpt.coordination import phases
from distckpt.handlers.checkpoint import Checkpoint
from distckpt.handlers.checkpoint_history import ON_DISK
from distckpt.handlers.engine_events import get_tracked_handlers
from distckpt.handlers.object_trees import iter_objects
from distckpt.handlers.own_files import OwnFiles
from distckpt.handlers.runs import Origin, go_on_from
from distckpt.ptformat.records import Record

__all__ = ["handlers_beside", "take_histories"]


def take_histories(
    backend: Backend,
    given: tuple[Checkpoint | None, Mapping[str, Any], Engine | None],
    record: Record | None,
    chosen: Path,
    passed_over: Collection[Path],
    *,
    timeout_s: float | None,
) -> str:
    """Collective. Let handlers and engines go on from a checkpoint.

    1. (each handler's coordinator) where the checkpoint has a record, look what the handler has in its directory, and
       what its newest file says.
    2. (all ranks) take it over.

    Args:
        backend: the job's.
        given: the handler that is resumed from, the objects that are loaded, and the engine, as they were given.
        record: the checkpoint's; None if it has none.
        chosen: the checkpoint.
        passed_over: newer files that are not whole.
        timeout_s: seconds to wait for the other ranks.

    Returns:
        A phrase about the history of the handler that is resumed from; empty if there is none.
    """
    source, to_load, engine = given
    known = () if source is None else source._known.with_others(())  # noqa: SLF001 - a friend's
    engines = [one for one in (engine, *(one for _, one in iter_objects(to_load)), *known) if isinstance(one, Engine)]
    handlers = handlers_beside(source, to_load, engines)
    origin = Origin(run=None if record is None else record.run)
    for one in engines:
        go_on_from(one, origin)
    for handler in handlers:
        handler._go_on(origin)  # noqa: SLF001 - a friend's
    if record is None:
        return ""

    def look() -> list[list[Any] | None]:
        return [
            _found(one, engines, record, chosen if one is source else None, passed_over)
            if one._coordinator() == backend.rank  # noqa: SLF001 - a friend's
            else None
            for one in handlers
        ]

    place = phases.SyncPoint(handler="resume", phase="looking for what the handlers have saved", step=0)
    answers = phases.run(backend, place, look, timeout_s=timeout_s)
    told = ""
    for at, handler in enumerate(handlers):
        coordinator = handler._coordinator()  # noqa: SLF001 - a friend's
        answer = answers[coordinator][at] if coordinator < len(answers) and at < len(answers[coordinator]) else None
        if answer is not None:
            kept, strays, iteration = answer
            handler._take_history(((priority, name) for priority, name in kept), strays, iteration, origin)  # noqa: SLF001 - the same
        if handler is source:
            told = f"the handler's history is what the checkpoint says of {len(handler.state_dict()['_saved'])} files"
    return told


def handlers_beside(
    source: Checkpoint | None, to_load: Mapping[str, Any], engines: Iterable[Engine]
) -> list[Checkpoint]:
    """Return the handlers whose history is found: the source, those that are loaded, those on the engines."""
    loaded = [one for _, one in iter_objects(to_load)]
    attached = [one for engine in engines for one in get_tracked_handlers(engine)]
    found = [one for one in (source, *loaded, *attached) if isinstance(one, Checkpoint)]
    return [one for one in {id(one): one for one in found}.values() if isinstance(one.save_handler, ON_DISK)]


def _found(
    handler: Checkpoint, engines: Sequence[Engine], record: Record, chosen: Path | None, passed_over: Collection[Path]
) -> list[Any] | None:
    """Rank-local. Return a handler's history, its strays and its iteration; None if there is no file of its own."""
    directory = Path(handler.save_handler.dirname)  # type: ignore[union-attr]  # it is on disk
    files = handler._survey(engines)  # noqa: SLF001 - a friend's
    own = OwnFiles(handler, engines)
    if chosen is not None:
        name: str | None = chosen.relative_to(directory).as_posix()
    else:
        name = own.newest_of(files, record.run.root, [one for one in files if directory / one in passed_over])
    history = None if name is None else own.recorded_history(name, files)
    return None if history is None else [history.kept, history.strays, history.iteration]
