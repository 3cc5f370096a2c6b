"""Going on with a run that was interrupted.

Owns :func:`resume`: what is resumed, from where, and what is said of it. How a checkpoint is chosen lies in
:mod:`distckpt.loading.select`, how the first epoch goes on in :mod:`distckpt.handlers.fast_forward`.
"""

import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ignite.engine import Engine
from ignite.handlers.checkpoint import DiskSaver as _IgniteDiskSaver

from distckpt._messages import log_level
from distckpt._values import check_timeout
from distckpt.backends.base import Backend
from distckpt.backends.detect import current
from distckpt.coordination import phases
from distckpt.errors import LoadError
from distckpt.handlers.checkpoint import Checkpoint, name_of
from distckpt.handlers.disk_saver import DiskSaver
from distckpt.handlers.fast_forward import FastForward
from distckpt.handlers.histories import handlers_beside, take_histories
from distckpt.handlers.object_trees import leaves, path_to
from distckpt.handlers.own_files import OwnFiles
from distckpt.handlers.restored_state import Restored
from distckpt.handlers.resume_extras import Beside, find_beside
from distckpt.handlers.resume_point import StartPoint, start_of_record, start_of_state
from distckpt.handlers.resumed import Facts, Resumed
from distckpt.loading import api, select
from distckpt.loading.api import LoadReport
from distckpt.loading.restore import PreparedLoad, check_complete, prepare
from distckpt.loading.verify_on_ranks import LoadContext
from distckpt.ptformat.reader import OpenCheckpoint
from distckpt.ptformat.records import parse_record, survey

__all__ = ["resume"]

_logger = logging.getLogger(__name__)
_ON_DISK = (DiskSaver, _IgniteDiskSaver)


def resume(
    to_load: Mapping[str, Any],
    dirname_or_handler: str | os.PathLike[str] | DiskSaver | Checkpoint,
    engine: Engine | None = None,
    *,
    skip_batches: bool = True,
    timeout_s: float | None = None,
    verify: bool = True,
    **kwargs: Any,
) -> Resumed | None:
    """Collective. Load the newest checkpoint that is whole, the same one on all ranks; with none, start afresh.

    Call it on all ranks when everything is built, before ``engine.run(data, ...)``, with the arguments that the
    interrupted run had.

    1. (coordinator) list the candidates in its directory, and order them, the newest first: as they were saved, say
       their manifests; after those the files without a record, by the iteration inside.
    2. (all ranks) verify one after the other, the newest first, the ranks of a machine each its share. One that is
       damaged on some rank, is not the same file on all ranks, or lacks an object is passed over on all ranks with a
       warning that says why.
    3. (all ranks) try it on the objects. If it does not fit on one rank, that is raised on every rank, and no object of
       any rank has been touched.
    4. (all ranks) load it: on each rank all objects, or none. An error on one rank is raised on every rank.
    5. (all ranks) take over what the handlers had kept, so that they go on removing what they replace: the handler that
       is given, those in `to_load`, and those on the engine. Others find it in their first save.
    6. (all ranks) let the engine's next run go on at the first batch that was not trained: see `skip_batches`. What
       its handlers of STARTED, and of EPOCH_STARTED in a begun epoch, change of the restored objects is put back. If
       the run had come to its end, ``engine.run()`` up to the same end returns at once.

    Args:
        to_load: what was saved: objects with ``load_state_dict``, in mappings and lists nested at will. Put an
            :class:`~distckpt.RngState` among them for a run that ends bit for bit where one left alone does.
        dirname_or_handler: a directory, of which every ``*.pt`` is a candidate; a :class:`~distckpt.DiskSaver`, whose
            directory it is; or a :class:`~distckpt.Checkpoint`, of which only its own files are candidates: those whose
            manifests say so, and those without a record that it could have named so. The coordinator is the handler's
            ``save_on_rank``, else rank 0.
        engine: the trainer. If it is not among `to_load`, it gets the one state of an engine's that the checkpoint
            holds beside them. None for the engine among `to_load`; if there are several, the one that ran when the
            checkpoint was saved.
        skip_batches: where the checkpoint was made in the middle of a pass over the data, draw and drop the batches
            that were trained in it. Data that are restored themselves, as a loader or sampler among `to_load`, and a
            DeterministicEngine's know where to go on: there nothing is dropped. False for others that know it.
        timeout_s: seconds to wait for the other ranks; None for ``DISTCKPT_TIMEOUT_S``, or 300, and for no less than
            1800 while they read and load.
        verify: compare the files with their checksums.
        kwargs: for ``nn.Module.load_state_dict``, e.g. ``strict=False``; modules only.

    Returns:
        The checkpoint's path, and what is known of its run (see :class:`~distckpt.handlers.resumed.Resumed`); None if
        there is nothing to resume from. The path is the same on every rank.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument has a wrong value, or an optimizer's groups differ from the checkpoint's.
        RuntimeError: a module's keys or shapes differ from the checkpoint's.
        LoadError: there are checkpoints, but none of them is whole and fits, or a rank does not see them.
        RemoteRankError: something failed on some rank; alike on every rank, and of the type that was raised there.

    Example:
        >>> import tempfile
        >>> from distckpt import RngState
        >>> from torch import nn
        >>> from ignite.engine import Events
        >>> def make(folder):
        ...     trainer = Engine(lambda engine, batch: None)
        ...     objects = {"model": nn.Linear(1, 1), "trainer": trainer, "rng": RngState(trainer)}
        ...     saver = Checkpoint(objects, DiskSaver(folder, require_empty=False))
        ...     trainer.add_event_handler(Events.EPOCH_COMPLETED, saver) and None
        ...     found = resume(objects, saver, engine=trainer)
        ...     return trainer, found and found.name
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer, found = make(folder)
        ...     trainer.run([0, 1], max_epochs=3) and None
        ...     again, resumed = make(folder)
        >>> found, resumed, again.state.epoch
        (None, 'checkpoint_6.pt', 3)
    """
    begin_s = time.monotonic()
    backend = current()
    source: list[_Source] = []

    def look() -> dict[str, Any]:
        check_timeout(timeout_s)
        api.check_to_load(to_load)
        if engine is not None and not isinstance(engine, Engine):
            msg = f"Argument engine should be an instance of Engine or None, but given {type(engine)}"
            raise TypeError(msg)
        source.append(_source_of(dirname_or_handler))
        return source[0].listed(backend.rank, path_to(engine, to_load), to_load)

    place = phases.SyncPoint(handler="resume", phase="looking for checkpoints", step=0)
    answers = phases.run(backend, place, look, timeout_s=timeout_s)
    coordinator = _coordinator_of([answer["coordinator"] for answer in answers])
    listing, level = answers[coordinator], log_level(backend.rank, {coordinator})
    directory, names = Path(listing["directory"]), listing["names"]
    if not names:
        _tell_of_nothing(directory, listing["num_others"], level=level)
        return None
    context = LoadContext(backend=backend, name="resume", coordinator=coordinator, timeout_s=timeout_s)
    chosen = select.select_checkpoint(
        context, directory, names, check=lambda state: check_complete(to_load, state), verify=verify
    )
    found: list[tuple[Beside, PreparedLoad]] = []
    record: dict[str, Any] = {}

    def fit_here() -> None:
        nonlocal engine
        record.update(_record_of(chosen))
        engine = engine or _engine_in(to_load, record)
        by_name = source[0].handler if parse_record(record) is None else None
        beside = find_beside(by_name, chosen, listing["provable"], to_load, engine)
        unread = chosen.file if chosen.file.look() else None
        found.append((beside, prepare(to_load, chosen.state, kwargs, unread, beside.pairs)))
        chosen.state = None  # what nobody refers to any more is not read
        found[0][1].fill()

    def load_here() -> None:
        passed_over.append(found[0][1].load())

    passed_over: list[LoadReport] = []
    with chosen.file:
        load_again = _loader_of(chosen, to_load, kwargs)
        for doing, work in (("fitting", fit_here), ("loading", load_here)):
            context.run_phase(f"{doing} {chosen.name}", work)
    beside = found[0][0]
    for what in beside.warnings:
        warnings.warn(f"resume: {what}", stacklevel=2)
    _log_left_out(chosen, passed_over[0], level)
    history = take_histories(
        backend,
        (source[0].handler, to_load, engine),
        parse_record(record),
        chosen.path,
        {directory / name for name in chosen.refused},
        timeout_s=context.limit_s,
    )
    start = None
    if engine is not None and beside.is_engine_known:
        start = _start_of(engine, to_load, record, backend)
        restored = Restored(
            _named(to_load, beside), handlers_beside(source[0].handler, to_load, [engine]), load_again, timeout_s
        )
        FastForward(engine, start, restored, skip_batches=skip_batches, timeout_s=timeout_s)
    facts = _facts_of(chosen, engine, start, record)
    _tell(
        chosen,
        to_load,
        engine,
        beside,
        history or beside.history,
        time.monotonic() - begin_s,
        level=level,
        has_ended=facts.has_ended,
    )
    return Resumed(chosen.path, facts)


def _record_of(chosen: select.SelectedCheckpoint) -> Mapping[str, Any]:
    head = chosen.file.head()
    return {} if head is None or head.record is None else head.record


def _engine_in(to_load: Mapping[str, Any], record: Mapping[str, Any]) -> Engine | None:
    """Return the engine among the objects: the only one, or the one that ran when the checkpoint was saved."""
    engines = {path: one for path, one in leaves(to_load) if isinstance(one, Engine)}
    if len({id(one) for one in engines.values()}) == 1:
        return next(iter(engines.values()))
    return engines.get(_key_in(record) or ())


def _key_in(record: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return where in the checkpoint the engine's state is that ran when it was saved; None if it is not known."""
    found = record.get("engine")
    key = found.get("key") if isinstance(found, Mapping) else None
    return tuple(key) if isinstance(key, list) else None


def _start_of(engine: Engine, to_load: Mapping[str, Any], record: Mapping[str, Any], backend: Backend) -> StartPoint:
    """Return what the engine's run has behind it: as recorded on this rank, else as the engine's state says."""
    known, key = record.get("engine"), _key_in(record)
    path = path_to(engine, to_load)
    is_its = key == path if key is not None and path is not None else True
    if is_its and isinstance(known, Mapping) and known.get("iteration") == engine.state.iteration:
        data = record.get("data")
        positions = data if isinstance(data, list) else [data]
        start = start_of_record(positions[backend.rank] if len(positions) == backend.world_size else positions[0])
        if start is not None:
            return start
    return start_of_state(engine)


def _named(to_load: Mapping[str, Any], beside: Beside) -> dict[str, Any]:
    """Return the objects that were loaded, by name."""
    objects = {".".join(map(str, path)): one for path, one in leaves(to_load)}
    return objects | {f"the {type(one).__name__}": one for one, _ in beside.pairs}


def _loader_of(
    chosen: select.SelectedCheckpoint, to_load: Mapping[str, Any], options: Mapping[str, Any]
) -> Callable[[Sequence[Any]], None]:
    """Return what loads some objects again, from the file that was chosen."""
    fingerprint = [*chosen.file.fingerprint(), *chosen.file.inode()]

    def load_again(objects: Sequence[Any]) -> None:
        with OpenCheckpoint(chosen.path) as file:
            if [*file.fingerprint(), *file.inode()] != fingerprint:
                msg = (
                    f"{chosen.path} is another file now than the one resumed from. What handlers of STARTED or "
                    f"EPOCH_STARTED have changed cannot be put back: let them leave it alone"
                )
                raise LoadError(msg)
            state = file.state()
            prepared = prepare(to_load, state, options, file if file.look() else None, only=objects)
            del state  # what nobody refers to any more is not read
            prepared.load()

    return load_again


def _facts_of(
    chosen: select.SelectedCheckpoint, engine: Engine | None, start: StartPoint | None, record: Mapping[str, Any]
) -> Facts:
    run = record.get("run")
    passed_over = tuple(chosen.refused.items())
    run_id = run.get("id") if isinstance(run, Mapping) else None
    known = Facts(passed_over=passed_over, run_id=run_id if isinstance(run_id, str) else None)
    if engine is None or start is None:
        return replace(known, iteration=chosen.iteration if chosen.iteration >= 0 else None)
    return replace(
        known,
        iteration=start.trained,
        epoch=start.epoch,
        has_ended=start.is_at_end(engine.state.max_epochs, engine.state.max_iters),
        world_size=start.world_size,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where to look, as this rank was told."""

    directory: Path
    coordinator: int
    handler: Checkpoint | None

    def listed(self, rank: int, engine_at: tuple[Any, ...] | None, to_load: Mapping[str, Any]) -> dict[str, Any]:
        """Rank-local. List the candidates, newest first, where this is the coordinator.

        Args:
            rank: this one.
            engine_at: where the engine is among the objects.
            to_load: the objects.

        Raises:
            NotADirectoryError: there is something else in the directory's place.
            OSError: it cannot be read.
        """
        answer = {"coordinator": self.coordinator, "directory": str(self.directory), "names": [], "num_others": 0}
        answer["provable"] = []
        if rank != self.coordinator:
            return answer
        engines = [one for _, one in leaves(to_load) if isinstance(one, Engine)]
        own = None if self.handler is None else OwnFiles(self.handler, engines, objects_name=name_of(to_load))
        ext = "pt" if self.handler is None else self.handler.ext
        files = survey(self.directory, ext, is_nested=own is not None and own.is_nested)
        names = list(files) if own is None else own.candidates(files)
        answer["names"] = select.sort_newest_first(self.directory, {name: files[name] for name in names}, engine_at)
        answer["provable"] = [] if own is None else [name for name in names if own.is_own(name, files)]
        answer["num_others"] = len(files) - len(names)
        return answer


def _log_left_out(chosen: select.SelectedCheckpoint, report: LoadReport, level: int) -> None:
    """Say which keys a load that is not strict has passed over."""
    kinds = {"lacks": report.missing, "has, and no object takes,": report.unexpected}
    for verb, keys in kinds.items():
        if keys:
            _logger.log(level, "resume: %s %s %s", chosen.path, verb, ", ".join(keys))


def _source_of(given: object) -> _Source:
    if isinstance(given, Checkpoint):
        saver = given.save_handler
        if not isinstance(saver, _ON_DISK):
            msg = f"Argument dirname_or_handler is a Checkpoint whose save_handler is no DiskSaver but {type(saver)}"
            raise TypeError(msg)
        coordinator = given._coordinator()  # noqa: SLF001 - a friend's
        return _Source(directory=Path(saver.dirname), coordinator=coordinator, handler=given)
    if isinstance(given, _ON_DISK):
        return _Source(directory=Path(given.dirname), coordinator=given.save_on_rank, handler=None)
    if isinstance(given, str | os.PathLike):
        return _Source(directory=Path(given).expanduser(), coordinator=0, handler=None)
    msg = f"Argument dirname_or_handler should be a directory, a DiskSaver or a Checkpoint, but given {type(given)}"
    raise TypeError(msg)


def _coordinator_of(named: Sequence[int]) -> int:
    if len(set(named)) > 1 or named[0] >= len(named):
        msg = f"save_on_rank should be one rank of this job (0 to {len(named) - 1}), but is, by rank: {list(named)}"
        raise ValueError(msg)
    return named[0]


def _tell_of_nothing(directory: Path, num_others: int, *, level: int) -> None:
    told = f"; {num_others} files there are not this handler's" if num_others else ""
    _logger.log(level, "resume: nothing to resume from in %s: starting afresh%s", directory, told)


def _tell(
    chosen: select.SelectedCheckpoint,
    to_load: Mapping[str, Any],
    engine: Engine | None,
    beside: Beside,
    history: str,
    took_s: float,
    *,
    level: int,
    has_ended: bool,
) -> None:
    names = [".".join(map(str, path)) for path, _ in leaves(to_load)]
    if engine is not None and any(one is engine for one, _ in beside.pairs):
        names.append("the engine")
    where = "" if chosen.iteration < 0 else f" of iteration {chosen.iteration}"
    if engine is not None and beside.is_engine_known:
        where = f" of iteration {engine.state.iteration}, epoch {engine.state.epoch}"
    history = f"; {history}" if history else ""
    _logger.log(
        level,
        "resume: going on from %s%s: loaded %s in %.2f s%s",
        chosen.path,
        where,
        ", ".join(names),
        took_s,
        history,
    )
    if has_ended:
        _logger.log(
            level, "resume: that run had come to its end: engine.run() returns at once, unless it is to go further"
        )
