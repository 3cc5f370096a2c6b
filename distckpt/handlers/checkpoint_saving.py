"""How a Checkpoint saves: decide, save in one of three ways, take over what became of it.

Owns the part of :class:`~distckpt.Checkpoint` that walks a save with all ranks, from a decision to the history. When it
is called for lies in :mod:`distckpt.handlers.checkpoint`, the order of a save's hops in
:mod:`distckpt.saving.protocol` and :mod:`distckpt.saving.pending_save`.
"""

import contextlib
import dataclasses
import functools
import logging
import sys
import warnings
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ignite.engine import Engine

from distckpt._messages import log_level
from distckpt._values import is_nan
from distckpt.backends.base import Backend
from distckpt.backends.detect import current
from distckpt.coordination import phases
from distckpt.coordination.liveness import ensure_monitor
from distckpt.coordination.phases import HandlerId, SyncPoint
from distckpt.errors import CommitNotDurable
from distckpt.handlers.background_saves import Flights
from distckpt.handlers.build_manifest import about
from distckpt.handlers.checkpoint_history import ON_DISK, CheckpointHistory, IgniteDiskSaver, Owner
from distckpt.handlers.disk_saver import DiskSaver, is_own
from distckpt.handlers.early_save import Moment
from distckpt.handlers.engine_events import find_engine_handling_exception, get_firing_engines
from distckpt.handlers.engine_votes import is_nonfinite, next_sync_point
from distckpt.handlers.ignite_hooks import CheckpointEvents, register_checkpoint_events
from distckpt.handlers.own_files import History, OwnFiles
from distckpt.handlers.rank_alone import RankAlone
from distckpt.handlers.runs import adopt, present_run, propose, run_key, untrained_at
from distckpt.handlers.save_handler import BaseSaveHandler, hand_over
from distckpt.handlers.save_log import SaveLog
from distckpt.policy.decision import AgreedSave, RemovalOrder, SaveDecision, SaveIntent
from distckpt.policy.naming import check_name
from distckpt.policy.retention import Entry
from distckpt.ptformat.manifest import Manifest
from distckpt.ptformat.records import Record, Run, read_record, read_records
from distckpt.saving import protocol
from distckpt.saving.capture import capture, consolidate, find_optimizer_storages, find_replicas, refuse_unconsolidated
from distckpt.saving.pending_save import PendingSave
from distckpt.storage.written_files import WrittenFiles

__all__ = ["CheckpointSaving"]

_logger = logging.getLogger(__name__)

PlaceOf = Callable[[str], SyncPoint]


class CheckpointSaving(CheckpointHistory):
    """The part of :class:`~distckpt.Checkpoint` that saves."""

    to_save: Mapping[str, Any]
    include_self: bool
    n_saved: int | None
    score_name: str | None
    score_rule: Any
    timeout_s: float | None
    last_save_s: float
    _handler_id: HandlerId
    _flights: Flights
    _saved_at: Moment
    _unsaved: tuple[Moment, str]
    _is_forced: bool
    _unseen: Any
    _warned: set[str]

    @abstractmethod
    def _object_id(self) -> str | None:
        """Return what notes about the save handler's construction stand under."""

    @abstractmethod
    def _coordinator(self) -> int:
        """Return the rank that saves."""

    @property
    def is_in_flight(self) -> bool:
        """Whether a save in the background is under way. The same on every rank."""
        return bool(self._flights)

    def wait_until_finished(self) -> None:
        """Collective. Wait until nothing is being saved in the background any more.

        Call it on all ranks. Afterwards the save is in the history, and ``last_checkpoint`` tells of it.

        Raises:
            RemoteRankError: the save failed on some rank; on every rank, and of the type that was raised there.
            SaveError: in a world of one, the checkpoint could not be written.
        """
        if find_engine_handling_exception() is not None and current().world_size > 1:
            self._flights.abort(_error_under_way())
        else:
            self._flights.land()

    def _stands(self) -> str:
        last = self.last_checkpoint
        return "There is no earlier checkpoint." if last is None else f"The last one is {last}."

    def _history(self) -> tuple[tuple[int | float, str], ...]:
        return tuple((item.priority, item.filename) for item in self._saved)

    def _save(self, engine: Engine, intend: Callable[[], SaveIntent]) -> None:
        """Collective. Save if the ranks agree to."""
        log = SaveLog()
        saver = _disk_saver_of(self.save_handler)
        if self._flights:
            if saver is not None and saver.when_busy == "skip" and not self._is_forced:
                self._log_unsaved(engine, "the last save is still under way (when_busy='skip')")
                return
            self._flights.land()
        backend = current()
        monitor = ensure_monitor(backend, self.timeout_s)
        if monitor is not None:
            monitor.clear_caught_failure()
        place = next_sync_point(
            self._handler_id, backend, engine, depends_on=self._object_id(), timeout_s=self.timeout_s
        )
        agreed = protocol.decide(
            backend,
            place("deciding what to save"),
            lambda: dataclasses.replace(intend(), history=self._history(), orphans=self._strays),
            timeout_s=self.timeout_s,
        )
        self._is_agreed = True
        self._adopt_run(engine, agreed)
        self._saved = [CheckpointHistory.Item(*entry) for entry in agreed.history]
        self._strays = agreed.orphans
        self._directory = (self.save_handler, agreed.directory)
        self._warn_of_scores(agreed)
        decision = agreed.decision
        if decision is None:
            self._log_refused(engine, agreed.score, agreed.history)
            return
        if saver is not None and saver.saves_in_parts:
            self._save_in_parts(engine, backend, place, agreed, saver, log)
        else:
            self._save_at_once(engine, backend, place, agreed, log)

    def _adopt_run(self, engine: Engine, agreed: AgreedSave) -> None:
        """All ranks. Take over the run that the save belongs to, and count the save."""
        if agreed.run is None:
            return
        outermost = next(iter(get_firing_engines()), engine)
        adopt(outermost, Run.from_json(agreed.run), agreed.number + (agreed.decision is not None))
        self._run_key, self._origin, self._is_untouched, self._is_given = run_key(outermost), None, False, False
        saved = set() if agreed.decision is None else {agreed.decision.filename}
        self._former = frozenset(agreed.former) - saved
        if agreed.decision is not None:
            self._saved_iteration = outermost.state.iteration
            known = {name for _, name in agreed.history} | set(agreed.orphans)
            self._saved_in = {name: run_id for name, run_id in self._saved_in.items() if name in known}
            self._saved_in[agreed.decision.filename] = str(agreed.run["id"])

    def _enter_run(self, engines: Sequence[Engine]) -> Run:
        """Rank-local. Return the run that a save belongs to, as far as this rank knows.

        In the first save of a run that goes on from another, the coordinator looks for what the handler had saved.

        Args:
            engines: those that fire, outermost first.
        """
        outermost = engines[0]
        run, is_new = present_run(outermost), self._run_key != run_key(outermost)
        looks = find_engine_handling_exception() is not None or current().rank == self._coordinator()
        files = self._survey(engines) if looks and is_new and (run is None or self._is_untouched) else {}
        if run is None:
            started_s = [record.run.started_s for record in files.values() if record is not None]
            run = propose(outermost, self._origin, max(started_s, default=0.0))
        if is_new and self._is_untouched and run.lineage:
            history = self._recorded_history(files, run.root, engines)
            if history is not None:
                self._take_history(history.kept, history.strays, history.iteration, self._origin)
        if is_new:
            self._former = frozenset(() if self._is_given else [item.filename for item in self._saved])
        return run

    def _survey(self, engines: Iterable[Engine] = ()) -> dict[str, Record | None]:
        """Rank-local. Return the files in the handler's directory, and their records."""
        if not isinstance(self.save_handler, ON_DISK):
            return {}
        directory = Path(self.save_handler.dirname)
        try:
            return read_records(directory, self.ext, is_nested=OwnFiles(self, engines).is_nested)
        except NotADirectoryError:  # the write raises it, with rank, step and path
            return {}
        except OSError as error:  # no reason to lose a save
            message = "Checkpoint: the files in %s cannot be listed, and older ones stay: %s"
            _logger.warning(message, directory, error)
            return {}

    def _recorded_history(
        self,
        files: Mapping[str, Record | None],
        root: str,
        engines: Iterable[Engine] = (),
    ) -> History | None:
        """Rank-local. Return what the handler's newest file of the runs says that it had saved; None without one."""
        own = OwnFiles(self, engines)
        name = own.newest_of(files, root)
        return None if name is None else own.recorded_history(name, files)

    def _is_saved_before(self, outermost: Engine) -> bool:
        """Return True if the run has trained nothing since the handler saved, in a run before this one."""
        return self._saved_iteration is not None and self._saved_iteration == untrained_at(outermost)

    def _save_alone(self, engine: Engine, intend: Callable[[], SaveIntent]) -> None:
        """Rank-local. Save for an exception that is being handled, on the saving rank; the other ranks may never come.

        Raises:
            BaseException: the one that is being handled, where it could not be saved; a note says why.
        """
        live, error = current(), _error_under_way()
        self._flights.abort(error)
        handler = self.save_handler
        if isinstance(handler, DiskSaver) and handler.writes_on_one_rank and live.rank != self._coordinator():
            return
        if self._saved_at.is_now(engine):  # ignite handles an exception twice: where it is raised, and around the run
            return
        if is_nonfinite(engine):
            self._log_unsaved(engine, "it was voted NaN")
            return
        try:
            self._decide_and_save_alone(engine, RankAlone(live), intend)
        except Exception as failure:
            if error is failure:
                raise
            text = f"rank {live.rank}, iteration {engine.state.iteration}: no checkpoint was saved for this error"
            why = f"{type(failure).__name__}: {failure}. {self._stands()}"
            _logger.warning("Checkpoint: %s: %s", text, why)
            error.add_note(f"{text}: {why}")
            _raise_again(error)

    def _decide_and_save_alone(self, engine: Engine, alone: RankAlone, intend: Callable[[], SaveIntent]) -> None:
        log, name = SaveLog(), getattr(engine.last_event_name, "name", engine.last_event_name)

        def place(doing: str) -> SyncPoint:
            return SyncPoint(handler="Checkpoint", phase=f"on {name}, {doing}", step=engine.state.iteration)

        intent = dataclasses.replace(intend(), save_on_rank=0)  # of a world of one
        agreed = protocol.decide(alone, place("deciding what to save"), lambda: intent, timeout_s=self.timeout_s)
        agreed = dataclasses.replace(agreed, coordinator=alone.rank)
        self._adopt_run(engine, agreed)
        if agreed.decision is None:
            self._log_refused(engine, agreed.score, agreed.history)
            return
        refuse_unconsolidated(self.to_save, rank=alone.rank)
        self._directory = (self.save_handler, agreed.directory)
        self._save_at_once(engine, alone, place, agreed, log)

    def _save_at_once(self, engine: Engine, backend: Backend, place: PlaceOf, agreed: AgreedSave, log: SaveLog) -> None:
        """Collective. Save, and return when it is durable."""
        handler, decision = self.save_handler, _made(agreed.decision)
        gathered: dict[int, Any] = {}
        written, problems, left = self._files_to_be_written(agreed, decision), list[str](), tuple[str, ...]()

        def remove_first() -> list[str]:
            nonlocal left
            if agreed.removal != RemovalOrder.BEFORE:
                return []
            problems.extend(self._remove(backend, place("removing what is evicted"), decision.evicted))
            left = self._strays
            removed = [name for name in decision.evicted if name not in left]
            # What the history is should the save fail.
            self._saved = [item for item in self._saved if item.filename not in removed]
            self._strays = tuple(name for name in left if name not in [item.filename for item in self._saved])
            return removed

        try:
            protocol.save_by_handler(
                backend,
                place,
                agreed,
                consolidate=lambda: gathered.update(
                    {} if isinstance(backend, RankAlone) else consolidate(self.to_save, save_on_rank=agreed.coordinator)
                ),
                capture=lambda: self._capture(backend, agreed.coordinator, decision, gathered),
                remove_first=remove_first,
                write=lambda checkpoint: _hand_over(
                    handler, checkpoint, decision, about(current(), engine, agreed, self.to_save), self._only_key()
                ),
                all_write=not (isinstance(handler, DiskSaver) and handler.writes_on_one_rank),
                timeout_s=self.timeout_s,
            )
        except BaseException as error:
            self._note_failure(agreed, error)
            raise
        self._saved_at = Moment(engine)
        self._take_over(agreed, took_s=log.committed())
        if agreed.removal == RemovalOrder.BEFORE:
            self._strays = left
        else:
            problems += self._remove_after(backend, place, agreed, written)
        self._log_saved(backend, agreed, log)
        self._tell(engine, agreed, problems)

    def _save_in_parts(
        self, engine: Engine, backend: Backend, place: PlaceOf, agreed: AgreedSave, saver: DiskSaver, log: SaveLog
    ) -> None:
        """Collective. Save in the background, or with several ranks that write."""
        group = saver.writer_group(backend, place, is_known=agreed.knows_writers, timeout_s=self.timeout_s)
        decision = _made(agreed.decision)
        gathered: dict[int, Any] = {}
        is_removed_early = saver.writes_on_one_rank and agreed.removal == RemovalOrder.AFTER
        written = self._files_to_be_written(agreed, decision)
        point = place("")
        flight = protocol.start_save(
            backend,
            place,
            filename=decision.filename,
            coordinator=agreed.coordinator,
            consolidate=(lambda: gathered.update(consolidate(self.to_save, save_on_rank=agreed.coordinator)))
            if agreed.needs_consolidation
            else None,
            capture=lambda: self._capture(backend, agreed.coordinator, decision, gathered),
            replicas=lambda: find_replicas(self.to_save, world_size=backend.world_size),
            optimizer_storages=lambda: find_optimizer_storages(self.to_save),
            make_writer=lambda: saver.rank_writer(
                backend, decision.filename, about(backend, engine, agreed, self.to_save), group, self._only_key()
            ),
            group=group,
            remove_replaced=functools.partial(
                protocol.remove_local,
                decision.evicted,
                functools.partial(_remove_own, saver, decision, self._owner(get_firing_engines())),
            )
            if is_removed_early
            else None,
            annotate=lambda error: protocol.add_context(
                error, backend.rank, point.step, decision.filename, agreed.history
            ),
            timeout_s=self.timeout_s,
        )
        self._saved_at = Moment(engine)
        history = self._saved

        def landed(flight: PendingSave, error: BaseException | None) -> None:
            if error is not None:
                self._saved_at = Moment()
                flight.wait_local()  # an interrupt has not ended it
                if self._saved is history:
                    self._take_over_what_is_there(agreed, flight, error, is_removed=is_removed_early)
                if flight.has_committed:
                    log.committed(flight.committed_at_s)
                    self._log_saved(backend, agreed, log)
                return
            if self._saved is history:  # else it was loaded or reset meanwhile: the file stays, and is not ours
                self._take_over(agreed, took_s=flight.duration_s)
            problems = (
                self._told(protocol.merge_removals(decision.evicted, flight.problems))
                if is_removed_early
                else self._remove_after(backend, place, agreed, written)
            )
            log.committed(flight.committed_at_s)
            self._log_saved(backend, agreed, log)
            self._tell(engine, agreed, problems)

        if saver.background:
            log.training_goes_on()
            self._flights.begin(engine, flight, landed)
        else:
            try:
                while not flight.advance():
                    pass
            except BaseException as error:
                landed(flight, error)
                raise
            landed(flight, None)
        self._warn_of_difference(flight)

    def _take_over_what_is_there(
        self, agreed: AgreedSave, flight: PendingSave, error: BaseException, *, is_removed: bool
    ) -> None:
        """Take over what this rank has committed though the save ended with an error elsewhere; else note the failure.

        The other ranks hear of it with the next save: then the saving rank's history is everybody's.
        """
        if not flight.has_committed:
            self._note_failure(agreed, error)
            return
        self._take_over(agreed, took_s=flight.duration_s)
        if is_removed:
            self._told(protocol.merge_removals(_made(agreed.decision).evicted, [flight.own_problems]))

    def _warn_of_difference(self, flight: PendingSave) -> None:
        if flight.layout_difference is not None:
            self._warn_once(
                "shares",
                f"the ranks cannot write {flight.filename} together: {flight.layout_difference}. Rank "
                f"{flight.coordinator} writes all of it.",
            )

    def _note_failure(self, agreed: AgreedSave, error: BaseException) -> None:
        """Keep in mind what a save that failed may have left."""
        decision = _made(agreed.decision)
        is_overwritten = decision.filename in [name for _, name in agreed.history]
        if isinstance(error, CommitNotDurable):
            if is_overwritten:  # what it replaced is gone: the new one is what there is
                self._saved = [CheckpointHistory.Item(*entry) for entry in decision.kept]
                self._strays = (*decision.evicted,)
            else:  # it stands beside the older one, which was kept; the next save removes it
                self._strays = (*self._strays, decision.filename)
        elif not isinstance(error, Exception) and not is_overwritten:
            # After an interrupt nobody knows whether the file was renamed into place; the next save removes it.
            self._strays = (*self._strays, decision.filename)

    def _take_over(self, agreed: AgreedSave, *, took_s: float) -> None:
        decision = _made(agreed.decision)
        self._saved = [CheckpointHistory.Item(*entry) for entry in decision.kept]
        self._strays = decision.evicted
        self.last_save_s = took_s

    def _capture(
        self, backend: Backend, coordinator: int, decision: SaveDecision, gathered: Mapping[int, Any]
    ) -> dict[str, Any]:
        checkpoint = capture(self.to_save, rank=backend.rank, save_on_rank=coordinator, gathered=gathered)
        if self.include_self:
            checkpoint["checkpointer"] = OrderedDict(_saved=list(decision.kept))
        elif len(checkpoint) == 1:
            (checkpoint,) = checkpoint.values()
        return checkpoint

    def _only_key(self) -> str:
        """Return the key of the object that the file holds the bare state of; empty where it holds a mapping."""
        return "" if self.include_self or len(self.to_save) != 1 else str(next(iter(self.to_save)))

    def _removal(self) -> RemovalOrder:
        """Return when this rank's save handler lets evicted files be removed."""
        handler = self.save_handler
        if not isinstance(handler, BaseSaveHandler):
            return RemovalOrder.NEVER
        if not isinstance(handler, ON_DISK) or self._unseen is handler:
            return RemovalOrder.BEFORE
        methods = ("__call__", "_save_func", "remove")
        is_known = is_own(handler, *methods) or is_own(handler, *methods, of=IgniteDiskSaver)
        return RemovalOrder.AFTER if is_known else RemovalOrder.AFTER_KEEPING

    def _files_to_be_written(self, agreed: AgreedSave, decision: SaveDecision) -> WrittenFiles | None:
        """Return what finds out, on this rank, which files the save writes; None where nobody has to know."""
        handler = self.save_handler
        if agreed.removal != RemovalOrder.AFTER_KEEPING or not decision.evicted or not isinstance(handler, ON_DISK):
            return None
        return WrittenFiles(
            Path(handler.dirname), decision.filename, is_only_one=is_own(handler, "__call__", "_save_func")
        )

    def _remove_after(
        self, backend: Backend, place: PlaceOf, agreed: AgreedSave, written: WrittenFiles | None
    ) -> list[str]:
        """Collective. Remove what was evicted, now that the new file is durable; return what to say.

        A save handler that overrides :class:`DiskSaver`'s methods may take several names for one file. The files that
        it wrote are kept meanwhile. Where they are not found in its directory, nothing is removed now; from then on
        evicted files are removed before each save, as ignite does.
        """
        decision = _made(agreed.decision)
        evicted = decision.evicted
        if agreed.removal == RemovalOrder.NEVER:
            self._strays = ()
            return []
        if agreed.removal == RemovalOrder.AFTER or not evicted:
            return self._remove(backend, place("removing what was evicted"), evicted, decision)
        try:
            # On all ranks before any of them removes: a handler need not look at its rank.
            found = phases.run(
                backend,
                place("keeping what was written"),
                lambda: written is not None and written.keep(),
                timeout_s=self.timeout_s,
            )
            if not any(found):
                self._unseen = self.save_handler
                return []
            return self._remove(backend, place("removing what was evicted"), evicted, decision, written)
        finally:
            if written is not None:
                written.put_back()

    def _remove(
        self,
        backend: Backend,
        place: SyncPoint,
        evicted: tuple[str, ...],
        decision: SaveDecision | None = None,
        written: WrittenFiles | None = None,
    ) -> list[str]:
        """Collective. Remove what was evicted, keep what could not be removed for the next save; return what to say."""
        handler, owner = self.save_handler, self._owner(get_firing_engines())

        def remove_one(filename: str) -> None:
            if isinstance(handler, ON_DISK):
                check_name(filename)
                owner.refuse(filename, read_record(Path(handler.dirname) / filename))
            if isinstance(handler, DiskSaver) and decision is not None:
                _spare(handler, filename, decision)
            with contextlib.ExitStack() as stack:
                if self._unseen is handler:  # the file of a save before may have been this one's too
                    stack.enter_context(contextlib.suppress(FileNotFoundError))
                if written is not None and isinstance(handler, DiskSaver):
                    stack.enter_context(handler.keeping(written.identities))
                if isinstance(handler, BaseSaveHandler):
                    handler.remove(filename)

        return self._told(protocol.remove(backend, place, evicted, remove_one, timeout_s=self.timeout_s))

    def _told(self, removals: list[protocol.Removal]) -> list[str]:
        """Keep what could not be removed for the next save; return what to say."""
        self._strays = tuple(one.filename for one in removals if one.problem is not None and not one.gone)
        told = [one for one in removals if one.problem is not None]
        return [f"{one.problem}.{'' if one.gone else ' The next save tries again.'}" for one in told]

    def _tell(self, engine: Engine, agreed: AgreedSave, problems: list[str]) -> None:
        register_checkpoint_events(engine)
        before = engine.last_event_name
        try:
            engine.fire_event(CheckpointEvents.SAVED_CHECKPOINT)
        finally:
            # The next handler on the same event asks for its name; so does the engine's loop.
            engine.last_event_name = before
        if problems:
            level = log_level(current().rank, {agreed.coordinator})
            _logger.log(level, "Checkpoint: while removing older checkpoints: %s", " ".join(problems))

    def _log_saved(self, backend: Backend, agreed: AgreedSave, log: SaveLog) -> None:
        log.write(backend.rank, agreed, n_saved=self.n_saved, score_name=self.score_name, left=self._strays)

    def _log_refused(self, engine: Engine, score: float | None, history: Sequence[Entry]) -> None:
        """All ranks. Log why nothing is saved.

        A score that is no better is usual, and so is another event of the step that was just saved.
        """
        if is_nan(score):
            self._log_unsaved(engine, "the score is NaN")
        elif score is None and not self._saved_at.is_now(engine):
            step, name = history[0]
            self._log_unsaved(engine, f"its step is not above that of {name}, {step}, the lowest of those kept")
        else:
            self._log_unsaved(engine, "it is no better than what is kept", level=logging.DEBUG)

    def _log_unsaved(self, engine: Engine, why: str, *, level: int = logging.WARNING) -> None:
        """All ranks. Log that a save is left out, once where several events of an iteration ask for it."""
        at, before = self._unsaved
        if why == before and at.is_now(engine):
            return
        self._unsaved = (Moment(engine), why)
        here = log_level(current().rank, {self._coordinator()}, level)
        if _logger.isEnabledFor(here):  # it may be so in every iteration
            stands = self._stands()
            _logger.log(here, "Checkpoint: iteration %d is not saved: %s. %s", engine.state.iteration, why, stands)

    def _warn_of_scores(self, agreed: AgreedSave) -> None:
        if agreed.scores is not None:
            self._warn_once(
                "differ",
                f"the ranks have different scores, {list(agreed.scores)}; their {self.score_rule} counts, "
                f"{agreed.score}. Reduce the metric over all ranks.",
            )

    def _warn_once(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"Checkpoint: {text} This is said once.", stacklevel=4)


def _error_under_way() -> BaseException:
    """Return the exception that is being handled; a new one where an event was fired without one."""
    return sys.exc_info()[1] or RuntimeError("EXCEPTION_RAISED was fired without an exception")


def _raise_again(error: BaseException) -> NoReturn:
    """Raise an exception that is being handled, with the context that it has."""
    context = error.__context__
    try:
        raise error
    finally:
        error.__context__ = context


def _disk_saver_of(handler: Any) -> DiskSaver | None:
    """Return a handler that writes as DiskSaver does; one of a user's may do more."""
    return handler if isinstance(handler, DiskSaver) and type(handler).__call__ is DiskSaver.__call__ else None


def _hand_over(
    handler: Callable[..., Any], checkpoint: Any, decision: SaveDecision, manifest: Manifest, key: str
) -> None:
    saver = _disk_saver_of(handler)
    if saver is not None:
        saver.save_with(checkpoint, decision.filename, manifest, key)
    else:
        hand_over(handler, checkpoint, decision.filename, dict(decision.metadata))


def _spare(saver: DiskSaver, filename: str, decision: SaveDecision) -> None:
    """Raise StillNeeded for the newest file that loads, if the new file does not load."""
    kept = [name for _, name in decision.kept if name != decision.filename]
    saver.spare(filename, written=decision.filename, kept=kept)


def _remove_own(saver: DiskSaver, decision: SaveDecision, owner: Owner, filename: str) -> None:
    owner.refuse(filename, read_record(saver.dirname / filename))
    _spare(saver, filename, decision)
    saver.remover()(filename)


def _made(decision: SaveDecision | None) -> SaveDecision:
    if decision is None:
        msg = "a save that was not decided"
        raise AssertionError(msg)
    return decision
