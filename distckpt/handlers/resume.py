"""Resume an interrupted run from the newest whole checkpoint, the same one on all ranks.

:mod:`distckpt.loading.select` chooses the checkpoint, :mod:`distckpt.handlers.resume_histories` restores the handlers'
histories, and :mod:`distckpt.handlers.fast_forward` continues the first epoch.
"""

import functools
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ignite.engine import Engine

from distckpt._messages import log_level
from distckpt._values import check_timeout, valid_timeout
from distckpt.backends.detect import current
from distckpt.coordination import phases
from distckpt.errors import LoadError
from distckpt.handlers.checkpoint import Checkpoint
from distckpt.handlers.disk_saver import DiskSaver
from distckpt.handlers.fast_forward import FastForward
from distckpt.handlers.object_trees import find_path, iter_objects
from distckpt.handlers.restored_state import RestoredState, SavedInEvent
from distckpt.handlers.resume_histories import find_handlers, restore_histories
from distckpt.handlers.resume_point import ResumePoint, find_engine, find_resume_point
from distckpt.handlers.run_record import note_resume
from distckpt.handlers.save_handler import directory_of
from distckpt.handlers.save_intent import coordinator_of, name_of
from distckpt.loading import api, select
from distckpt.loading.restore import PreparedLoad, check_complete, prepare
from distckpt.loading.verify_on_ranks import LoadContext
from distckpt.ptformat.reader import OpenCheckpoint
from distckpt.ptformat.records import parse_record, read_records

_logger = logging.getLogger(__name__)
_PlainPath = type(Path())


class Resumed(_PlainPath):  # type: ignore[valid-type, misc]  # the class of this platform's paths
    """The checkpoint that a run continues from: its path, and facts about its run. Paths made from it are plain.

    Attributes:
        iteration: trained iterations; None without an engine's state.
        epoch: completed epochs; None likewise.
        has_ended: True if nothing is left to train: ``engine.run()`` with the same limits returns at once, or after
            EPOCH_COMPLETED and COMPLETED if the file was saved before these.
        skipped: names of newer checkpoints that were not loaded, each with the reason.
        world_size: number of ranks that saved it; None if unknown.
        run_id: id of the run that saved it; None if unknown.

    Example:
        >>> found = Resumed("checkpoints/checkpoint_6.pt", iteration=6, epoch=3)
        >>> found.name, found.iteration, found == Path("checkpoints/checkpoint_6.pt")
        ('checkpoint_6.pt', 6, True)
    """

    iteration: int | None = None
    epoch: int | None = None
    has_ended: bool = False
    skipped: tuple[tuple[str, str], ...] = ()
    world_size: int | None = None
    run_id: str | None = None

    def __new__(cls, path: Any, **facts: Any) -> Self:
        """Make a path; the facts are for ``__init__``."""
        del facts
        made: Self = super().__new__(cls, path)
        return made

    def __init__(self, path: Any, **facts: Any) -> None:
        if sys.version_info >= (3, 12):
            super().__init__(path)
        self._facts = facts
        self.__dict__.update(facts)

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the facts in copies."""
        return functools.partial(Resumed, **self._facts), (str(self),)

    if sys.version_info >= (3, 12):

        def with_segments(self, *segments: Any) -> Path:
            """Return a plain path."""
            return Path(*segments)
    else:
        _from_parsed_parts = _PlainPath._from_parsed_parts  # type: ignore[attr-defined]  # noqa: SLF001 - the same in Python 3.11

    @property
    def path(self) -> Path:
        """Return the plain path."""
        return Path(str(self))


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
    """Collective. Load the newest whole checkpoint, the same one on all ranks; without one, start afresh.

    Call it on all ranks after all objects are made and before ``engine.run(data, ...)``, with the interrupted run's
    arguments.

    1. (coordinator) list the candidates and order them, newest first: in the order in which they were saved, by their
       manifests; after those, files without a record, by the iteration inside.
    2. (all ranks) verify them in that order; the ranks of a machine read a part of the file each. Skip a checkpoint on
       all ranks if it is damaged on some rank, differs between ranks or lacks an object, and log the reason.
    3. (all ranks) check that it fits the objects. If it does not fit on some rank, raise on all ranks; no object
       has changed.
    4. (all ranks) load it: all objects on all ranks, or none. If a rank fails, raise on all ranks.
    5. (all ranks) restore the histories of `dirname_or_handler` and of the handlers in `to_load` and on the engine, so
       that they continue to remove old checkpoints. Other handlers restore theirs in their first save. Remove the
       checkpoints that a killed save had still to remove.
    6. (all ranks) let the engine's next run start at the first batch that was not trained: see `skip_batches`. Changes
       to the restored objects by handlers of STARTED, or of EPOCH_STARTED in an interrupted epoch, are reverted. If the
       run was complete, ``engine.run()`` with the same limits returns at once.

    Args:
        to_load: the saved objects, with ``load_state_dict``, in nested mappings and lists. Include an
            :class:`~distckpt.RngState` for a run that ends bit-equal to an uninterrupted one.
        dirname_or_handler: a directory, in which every ``*.pt`` is a candidate; a :class:`~distckpt.DiskSaver`, for its
            directory; or a :class:`~distckpt.Checkpoint`, whose own files are the candidates: by their manifests, or,
            without a record, by their names. The coordinator is the handler's ``save_on_rank``, else rank 0.
        engine: the trainer. If it is not in `to_load`, it gets the only other engine state in the checkpoint. None for
            the engine in `to_load`; of several, the one that ran during the save.
        skip_batches: draw and drop the batches of the present pass that were trained before. No batches are
            dropped of data that are restored themselves (a loader or sampler in `to_load`) or a DeterministicEngine's:
            these continue on their own. Give False for other data that do.
        timeout_s: seconds to wait for the other ranks; None for ``DISTCKPT_TIMEOUT_S``, or 300, but at least 1800
            while the ranks read and load.
        verify: compare the files with their checksums.
        kwargs: for ``nn.Module.load_state_dict``, e.g. ``strict=False``.

    Returns:
        The checkpoint's path, the same on every rank, with facts about its run: see
        :class:`~distckpt.handlers.resume.Resumed`. None if there is no checkpoint.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value, or an optimizer's groups differ from the checkpoint's.
        RuntimeError: a module's keys or shapes differ from the checkpoint's.
        LoadError: there are checkpoints, but none is whole and complete, or a rank does not see them.
        RemoteRankError: a rank failed. The same on every rank, and of the type that was raised there.

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
    start_s = time.monotonic()
    backend = current()
    handler = dirname_or_handler if isinstance(dirname_or_handler, Checkpoint) else None

    def list_candidates() -> dict[str, Any]:
        check_timeout(timeout_s)
        api.check_to_load(to_load)
        if engine is not None and not isinstance(engine, Engine):
            raise TypeError(f"Argument engine should be an instance of Engine or None, but given {type(engine)}")
        directory, coordinator = _find_source(dirname_or_handler)
        answer = {"coordinator": coordinator, "directory": str(directory)}
        return answer | (_list_candidates(directory, handler, engine, to_load) if backend.rank == coordinator else {})

    sync_point = phases.SyncPoint(handler="resume", phase="looking for checkpoints", step=0)
    answers = phases.run(backend, sync_point, list_candidates, timeout_s=valid_timeout(timeout_s))
    coordinator = _agree_on_coordinator([answer["coordinator"] for answer in answers])
    listing, level = answers[coordinator], log_level(backend.rank, {coordinator})
    directory = Path(listing["directory"])
    if not listing["names"]:
        foreign = f"; {listing['num_others']} files there are not this handler's" if listing["num_others"] else ""
        _logger.log(level, "resume: nothing to resume from in %s: starting afresh%s", directory, foreign)
        return None
    context = LoadContext(backend=backend, name="resume", coordinator=coordinator, timeout_s=timeout_s)
    chosen = select.select_checkpoint(
        context, directory, listing["names"], check=functools.partial(check_complete, to_load), verify=verify
    )
    with chosen.file:
        load_again = _make_reloader(chosen, to_load, kwargs)
        loaded = _load(context, chosen, listing["provable"], (handler, to_load, engine), kwargs)
    engine = loaded.engine
    if loaded.warning:
        warnings.warn(f"resume: {loaded.warning}", stacklevel=2)
    for verb, keys in {"lacks": loaded.report.missing, "has unused keys:": loaded.report.unexpected}.items():
        if keys:
            _logger.log(level, "resume: %s %s %s", chosen.path, verb, ", ".join(keys))
    history = restore_histories(
        backend,
        handler,
        to_load,
        engine,
        parse_record(loaded.record),
        chosen.path,
        {directory / name for name in chosen.refused},
        timeout_s=context.limit_s,
    )
    names, point = [".".join(map(str, path)) for path, _ in iter_objects(to_load)], None
    if engine is not None and loaded.has_engine_state:
        point = find_resume_point(engine, to_load, loaded.record, backend.rank, backend.world_size)
        objects = dict(zip(names, (obj for _, obj in iter_objects(to_load)), strict=True))
        objects |= {f"the {type(obj).__name__}": obj for obj, _ in loaded.extras}
        handlers = find_handlers(handler, to_load, [engine])
        saved = SavedInEvent(chosen.name, loaded.saved_on)
        restored = RestoredState(objects, handlers, saved, load_again, timeout_s)
        FastForward(engine, point, restored, skip_batches=skip_batches, timeout_s=timeout_s)
    resumed = _describe(chosen, engine, point, loaded.record)
    note_resume(engine, resumed, loaded.record, time.monotonic() - start_s)
    names += ["the engine" for obj, _ in loaded.extras if obj is engine]
    where = "" if chosen.iteration < 0 else f" of iteration {chosen.iteration}"
    if engine is not None and point is not None:
        where = f" of iteration {engine.state.iteration}, epoch {engine.state.epoch}"
    history, took_s = history or loaded.history, time.monotonic() - start_s
    _logger.log(
        level,
        "resume: continuing from %s%s: loaded %s in %.2f s%s",
        chosen.path,
        where,
        ", ".join(names),
        took_s,
        f"; {history}" if history else "",
    )
    if resumed.has_ended:
        _logger.log(level, "resume: nothing is left to train in that run, unless the limits of engine.run() are higher")
    return resumed


# -- which checkpoint ------------------------------------------------------------------------------


def _find_source(given: object) -> tuple[Path, int]:
    """Return the directory of the candidates, and the coordinator."""
    if isinstance(given, Checkpoint):
        directory = directory_of(given.save_handler)
        if directory is None:
            kind = type(given.save_handler)
            msg = f"Argument dirname_or_handler is a Checkpoint whose save_handler is no DiskSaver but {kind}"
            raise TypeError(msg)
        return directory, coordinator_of(given)
    directory = directory_of(given)
    if directory is not None:
        return directory, given.save_on_rank  # type: ignore[attr-defined]  # a DiskSaver
    if isinstance(given, str | os.PathLike):
        return Path(given).expanduser(), 0
    msg = f"Argument dirname_or_handler should be a directory, a DiskSaver or a Checkpoint, but given {type(given)}"
    raise TypeError(msg)


def _list_candidates(
    directory: Path, handler: Checkpoint | None, engine: Engine | None, to_load: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the candidates' names, newest first, those that are provably the handler's, and the number of others."""
    engines = [obj for _, obj in iter_objects(to_load) if isinstance(obj, Engine)]
    own = None
    if handler is not None:
        own = handler._find_own_files(engines, loaded_name=name_of(to_load))  # noqa: SLF001 - resume's half
    ext = "pt" if handler is None else handler.ext
    files = read_records(directory, ext, is_nested=own is not None and own.is_nested)
    names = list(files) if own is None else own.candidates(files)
    return {
        "names": select.sort_newest_first(directory, {name: files[name] for name in names}, find_path(engine, to_load)),
        "provable": [] if own is None else [name for name in names if own.is_own(name, files)],
        "num_others": len(files) - len(names),
    }


def _agree_on_coordinator(named: Sequence[int]) -> int:
    if len(set(named)) > 1 or named[0] >= len(named):
        msg = f"save_on_rank should be one rank of this job (0 to {len(named) - 1}), but is, by rank: {list(named)}"
        raise ValueError(msg)
    return named[0]


# -- loading -----------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class _Loaded:
    """The result of :func:`_load`."""

    record: Mapping[str, Any]  # the checkpoint's; empty without one
    engine: Engine | None  # as given, or found in `to_load`
    has_engine_state: bool  # whether the engine gets a state
    extras: list[tuple[Any, Any]]  # the engine and the handler with their states, if they are not in `to_load`
    warning: str  # that the engine's state is missing, or empty
    history: str  # a phrase about the handler's history, or empty
    saved_on: str | None = None  # name of the event of the save; None if unknown
    report: api.LoadReport = field(default_factory=api.LoadReport)


def _load(
    context: LoadContext,
    chosen: select.SelectedCheckpoint,
    names: Sequence[str],
    given: tuple[Checkpoint | None, Mapping[str, Any], Engine | None],
    options: Mapping[str, Any],
) -> _Loaded:
    """Collective. Load all objects on all ranks, or none; `names` are the files that may belong to the history.

    1. (all ranks) pair the objects with their states, and check that these fit.
    2. (all ranks) load.
    """
    handler, to_load, engine = given
    fitted: list[tuple[_Loaded, PreparedLoad]] = []

    def fit() -> None:
        head = chosen.file.head()
        record = {} if head is None or head.record is None else head.record
        nameless = handler if parse_record(record) is None else None
        loaded = _find_extras(nameless, chosen, names, to_load, engine or find_engine(to_load, record), record)
        loaded.saved_on = None if head is None else head.reason
        unread = chosen.file if chosen.file.read_structure() else None
        fitted.append((loaded, prepare(to_load, chosen.state, options, unread, loaded.extras)))
        chosen.state = None  # tensors without a reference are not read
        fitted[0][1].fill()

    context.run_phase(f"fitting {chosen.name}", fit)
    loaded, prepared = fitted[0]
    loaded.report = api.load_on_all_ranks(context, chosen.name, prepared)
    return loaded


def _find_extras(
    handler: Checkpoint | None,
    chosen: select.SelectedCheckpoint,
    names: Sequence[str],
    to_load: Mapping[str, Any],
    engine: Engine | None,
    record: Mapping[str, Any],
) -> _Loaded:
    """Find the states of the engine and of the handler, if they are to be loaded in addition to `to_load`."""
    objects, states = dict(iter_objects(to_load)), dict(select.find_engine_states(chosen.state))
    extras: list[tuple[Any, Any]] = []
    path, state, warning = find_path(engine, to_load), None, ""
    if path is not None:
        state = states.get((), states.get(path))
    elif engine is not None:
        free = {path: state for path, state in states.items() if path not in objects}
        if len(free) > 1:
            keys = ", ".join(".".join(map(str, path)) for path in free)
            msg = f"{chosen.path} holds several states of engines ({keys}): put the engine into to_load under its own"
            raise ValueError(msg)
        state = next(iter(free.values()), None)
        if state is None:
            warning = f"{chosen.path} holds no state of an engine: the engine starts at iteration 0"
        else:
            extras.append((engine, state))
    history = ""
    if handler is not None and not any(obj is handler for obj in objects.values()):
        entries, history = _find_history(handler, chosen, names, state)
        extras.extend([] if entries is None else [(handler, entries)])
    return _Loaded(
        record=record,
        engine=engine,
        has_engine_state=engine is not None and not warning,
        extras=extras,
        warning=warning,
        history=history,
    )


def _find_history(
    handler: Checkpoint,
    chosen: select.SelectedCheckpoint,
    names: Sequence[str],
    engine_state: Mapping[str, Any] | None,
) -> tuple[Mapping[str, Any] | None, str]:
    """Return the handler's history as of a checkpoint without a record, and a phrase about it."""
    saved = chosen.state.get("checkpointer") if isinstance(chosen.state, Mapping) else None
    if isinstance(saved, Mapping) and ("_saved" in saved or "saved" in saved):
        return saved, "the handler's history is the checkpoint's"
    if engine_state is None:
        states = dict(select.find_engine_states(chosen.state))
        engine_state = next(iter(states.values())) if len(states) == 1 else {}
    length = engine_state.get("epoch_length")
    num_epochs, in_epoch = divmod(engine_state["iteration"], length) if length else (0, 0)
    unfinished_epoch = num_epochs + 1 if in_epoch else None
    others = [name for name in names if name not in chosen.refused]
    entries = None
    if chosen.name in names:
        own = handler._find_own_files()  # noqa: SLF001 - resume's half
        entries = own.named_history(chosen.name, others, unfinished_epoch=unfinished_epoch)
    if entries is None:
        return None, "the handler's history is unknown, and older files stay (include_self=True saves it)"
    return {"_saved": entries}, f"the handler's history is read from the names of {len(entries)} files"


def _make_reloader(
    chosen: select.SelectedCheckpoint, to_load: Mapping[str, Any], options: Mapping[str, Any]
) -> Callable[[Sequence[Any]], None]:
    """Return a function that loads some objects again from the chosen file."""
    fingerprint = [*chosen.file.fingerprint(), *chosen.file.identity()]

    def load_again(objects: Sequence[Any]) -> None:
        with OpenCheckpoint(chosen.path) as file:
            if [*file.fingerprint(), *file.identity()] != fingerprint:
                raise LoadError(
                    f"{chosen.path} was replaced by another file after the resume. What handlers of STARTED or "
                    f"EPOCH_STARTED have changed cannot be restored. Leave the file in place until the first batch"
                )
            state = file.state()
            prepared = prepare(to_load, state, options, file if file.read_structure() else None, only=objects)
            del state  # tensors without a reference are not read
            prepared.load()

    return load_again


def _describe(
    chosen: select.SelectedCheckpoint, engine: Engine | None, point: ResumePoint | None, record: Mapping[str, Any]
) -> Resumed:
    run, skipped = record.get("run"), tuple(chosen.refused.items())
    run_id = run.get("id") if isinstance(run, Mapping) else None
    run_id = run_id if isinstance(run_id, str) else None
    if engine is None or point is None:
        iteration = chosen.iteration if chosen.iteration >= 0 else None
        return Resumed(chosen.path, skipped=skipped, run_id=run_id, iteration=iteration)
    return Resumed(
        chosen.path,
        skipped=skipped,
        run_id=run_id,
        iteration=point.trained,
        epoch=point.epoch,
        has_ended=point.is_run_complete(engine.state.max_epochs, engine.state.max_iters),
        world_size=point.world_size,
    )
