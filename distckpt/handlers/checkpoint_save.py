"""One save of a Checkpoint: decide, write, commit, take over the history, remove what is evicted, fire the event.

The order of the steps is that of :mod:`distckpt.saving.protocol`.
"""

import contextlib
import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ignite.engine import Engine

from distckpt._messages import log_level
from distckpt.backends.base import Backend
from distckpt.backends.detect import current
from distckpt.backends.serial import SingleRank
from distckpt.coordination import phases
from distckpt.coordination.phases import SyncPoint
from distckpt.handlers.background_saves import BackgroundSaves
from distckpt.handlers.build_manifest import build_manifest
from distckpt.handlers.checkpoint_history import CheckpointHistory, RunIteration
from distckpt.handlers.engine_events import get_running_engines
from distckpt.handlers.ignite_hooks import CheckpointEvents, register_checkpoint_events
from distckpt.handlers.own_files import OwnFiles
from distckpt.handlers.run_record import record_directory_of
from distckpt.handlers.runs import run_of
from distckpt.handlers.save_handler import (
    BaseSaveHandler,
    StorageSaver,
    call_handler,
    directory_of,
    storage_saver,
)
from distckpt.handlers.save_intent import Settings, UserFacts, make_intent, name_of, policy_of
from distckpt.handlers.save_log import SaveLog, SkipLog, describe_last
from distckpt.policy.decision import AgreedSave, RemovalOrder, SaveDecision, SaveIntent
from distckpt.policy.naming import check_name
from distckpt.ptformat.records import read_record
from distckpt.saving import protocol
from distckpt.saving.capture import capture, consolidate, find_optimizer_storages, find_replicas, refuse_unconsolidated
from distckpt.saving.object_forms import CapturedObjects, captured_objects
from distckpt.saving.pending_save import PendingSave, Problems
from distckpt.saving.shards import Shards
from distckpt.storage.written_files import WrittenFiles

_logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class CheckpointSave:
    """One save of a Checkpoint.

    Attributes:
        handler: the Checkpoint.
        history: its history.
        find_own_files: takes the running engines, and returns what identifies its files.
        find_facts: calls the user's functions.
        engine: the engine on whose event it saves.
        backend: the job's backend, or a :class:`SingleRank`.
        skip_log: logs the iterations that are not saved.
        is_early: whether the run is being ended in the middle of an epoch.
        is_forced: whether the run is being ended.
        log: measures the save.
        sync_point: makes the sync point of a phase from its description. Set by :meth:`decide`, like all below.
        agreed: what the ranks agreed on.
        decision: the decision, if the ranks save.
    """

    handler: Settings
    history: CheckpointHistory
    find_own_files: Callable[[Sequence[Engine]], OwnFiles]
    find_facts: Callable[[], UserFacts]
    engine: Engine
    backend: Backend
    skip_log: SkipLog
    is_early: bool
    is_forced: bool
    log: SaveLog = field(default_factory=SaveLog)
    sync_point: Callable[[str], SyncPoint] = field(init=False)
    agreed: AgreedSave = field(init=False)
    decision: SaveDecision = field(init=False)
    _outermost: Engine = field(init=False)  # of the running engines
    _position: dict[str, Any] = field(init=False)
    _objects: CapturedObjects = field(init=False)
    _gathered: dict[int, Any] = field(default_factory=dict)
    _has_shards: bool = False  # whether sharded tensors can be saved
    _problems: list[str] = field(default_factory=list)
    _orphans: tuple[str, ...] = ()
    _version: int = field(init=False)  # of the history that the decision is about
    _removes_at_commit: bool = False

    def decide(self, sync_point: Callable[[str], SyncPoint]) -> bool:
        """Collective. Decide with all ranks, and take over the coordinator's history. Return True if they save.

        Args:
            sync_point: makes the sync points of this save.

        Raises:
            RemoteRankError: a user's function failed on some rank; raised on every rank.
            DesyncError: the ranks came with different handlers.
            ValueError: the ranks name different coordinators, or one that does not exist.
            KeyError: the user's pattern holds an unknown field.
        """
        engines, is_alone = (*get_running_engines(), self.engine), isinstance(self.backend, SingleRank)

        def make() -> SaveIntent:
            facts, own = self.find_facts(), self.find_own_files(engines)
            intent = make_intent(
                self.handler, self.history, own, engines, facts, is_early=self.is_early, is_forced=self.is_forced
            )
            return replace(intent, save_on_rank=0) if is_alone else intent

        self.sync_point, self._outermost = sync_point, engines[0]
        self._objects = captured_objects(self.backend.world_size)
        agreed = protocol.decide(self.backend, sync_point, make, timeout_s=self.handler.timeout_s)
        self.agreed = replace(agreed, coordinator=self.backend.rank) if is_alone else agreed
        self._position = {"iteration": engines[0].state.iteration, "epoch": engines[0].state.epoch}
        self.history.adopt(agreed, engines[0])
        self._version = self.history.version
        self.history.directory = (self.handler.save_handler, agreed.intent.directory)
        self.history.is_agreed = self.history.is_agreed or not is_alone
        if agreed.scores is not None:
            found = f"the ranks have different scores, {list(agreed.scores)}; their {self.handler.score_rule} counts"
            self.skip_log.warn_once("scores", f"{found}, {agreed.score}. Reduce the metric over all ranks.")
        if agreed.decision is None:
            self.skip_log.refused(self.handler, self.history, self.engine, agreed.score, agreed.intent.global_step)
            return False
        self.decision = agreed.decision
        return True

    def run(self, background_saves: BackgroundSaves) -> None:
        """Collective. Save in the foreground, or start a save in the background.

        Raises:
            RemoteRankError: the save failed on some rank; raised on every rank, with the type of the error there.
            SaveError: with one rank, the file could not be written.
            CommitNotDurable: the file is in place, but may not survive a power cut.
        """
        saver = storage_saver(self.handler.save_handler)
        if saver is not None and saver.saves_in_steps:
            self._run_in_steps(saver, background_saves)
        else:
            self.run_by_handler()

    def run_by_handler(self) -> None:
        """Collective. Let the save handler write, and return when the file is durable."""
        saver = storage_saver(self.handler.save_handler)
        written = self._watch_writes()
        try:
            protocol.save_by_handler(
                self.backend,
                self.sync_point,
                self.agreed,
                consolidate=self._consolidate
                if self.agreed.needs_consolidation and not isinstance(self.backend, SingleRank)
                else None,
                capture=self._capture,
                objects=self._objects,
                remove_first=self._remove_first,
                write=self._write,
                all_write=saver is None or not saver.writes_on_one_rank,
                timeout_s=self.handler.timeout_s,
            )
        except BaseException as error:
            self.history.fail(self.agreed, error)
            raise
        self.history.saved_at = RunIteration(self.engine)
        self.history.commit(self.agreed, took_s=self.log.committed())
        if self.agreed.removal == RemovalOrder.BEFORE:
            self.history.orphans = tuple(name for name in self._orphans if name != self.decision.filename)
        else:
            self._remove_after(written)
        self._log_saved()
        self._fire_event()

    def run_alone(self, error: BaseException) -> None:
        """Rank-local. Decide and save on this rank while an exception is handled; the other ranks may never come.

        Args:
            error: the handled exception.

        Raises:
            BaseException: `error`, with a note, if the save failed.
        """
        event, step = self.engine.last_event_name, self.engine.state.iteration
        event_name = getattr(event, "name", event)

        def sync_point(phase: str) -> SyncPoint:
            return SyncPoint(handler="Checkpoint", phase=f"on {event_name}, {phase}", step=step)

        try:
            if self.decide(sync_point):
                refuse_unconsolidated(self.handler.to_save, rank=self.backend.rank)
                self.run_by_handler()
        except Exception as failure:
            if error is failure:
                raise
            text = f"rank {self.backend.rank}, iteration {step}: no checkpoint was saved for this error"
            reason = f"{type(failure).__name__}: {failure}. {describe_last(self.handler.last_checkpoint)}"
            _logger.warning("Checkpoint: %s: %s", text, reason)
            error.add_note(f"{text}: {reason}")
            context = error.__context__
            try:
                raise error
            finally:
                error.__context__ = context

    def _run_in_steps(self, saver: StorageSaver, background_saves: BackgroundSaves) -> None:
        """Collective. Let the Checkpoint write into the saver's storage itself, in the background if the saver does."""
        group = saver.find_group(
            self.backend, self.sync_point, is_known=self.agreed.knows_writers, timeout_s=self.handler.timeout_s
        )
        own, written = self.find_own_files(get_running_engines()), self._watch_writes()
        filename, rank, step = self.decision.filename, self.backend.rank, self.sync_point("").step
        evicted, agreed = self.decision.evicted, self.agreed
        self._has_shards = True
        self._removes_at_commit = saver.writes_on_one_rank and agreed.removal == RemovalOrder.AFTER
        pending = protocol.start_save(
            self.backend,
            self.sync_point,
            filename=filename,
            coordinator=agreed.coordinator,
            consolidate=self._consolidate if agreed.needs_consolidation else None,
            capture=self._capture,
            objects=self._objects,
            replicas=lambda: find_replicas(self.handler.to_save, world_size=self.backend.world_size),
            optimizer_storages=lambda: find_optimizer_storages(self.handler.to_save),
            make_writer=lambda: saver.make_writer(
                self.backend, filename, self._build_manifest(), group, self._object_key()
            ),
            group=group,
            remove_replaced=(lambda: self._remove_local(evicted, lambda name: self._remove_stored(name, own, saver)))
            if self._removes_at_commit
            else None,
            shards=Shards(rank, self.backend.world_size),
            shard_writers=saver.shard_writers(self.backend, timeout_s=self.handler.timeout_s),
            annotate=lambda error: protocol.add_context(error, rank, step, filename, agreed.intent.history),
            in_background=saver.background,
            timeout_s=self.handler.timeout_s,
        )
        self.history.saved_at = RunIteration(self.engine)

        def end(pending: PendingSave, error: BaseException | None) -> None:
            if error is None:
                self._end(pending, written)
            else:
                self._end_with_error(pending, error)

        if saver.background:
            self.log.training_continues()
            background_saves.add(self.engine, pending, end)
        else:
            try:
                while not pending.advance():
                    pass
            except BaseException as error:
                end(pending, error)
                raise
            end(pending, None)
        if pending.layout_difference is not None:
            text = f"the ranks cannot write {filename} together: {pending.layout_difference}"
            self.skip_log.warn_once("layouts", f"{text}. Rank {agreed.coordinator} writes all of it.")

    @property
    def _is_current(self) -> bool:
        """Whether no load or reset has replaced the history since. After one, all files stay."""
        return self.history.version == self._version

    def _end(self, pending: PendingSave, written: WrittenFiles | None) -> None:
        """Collective. Take over a save that is committed."""
        if self._is_current:
            self.history.commit(self.agreed, took_s=self.log.committed())
        if self._removes_at_commit:
            self._take_over(protocol.merge_problems(self.decision.evicted, pending.problems))
        else:
            self._remove_after(written)
        self.log.committed(pending.committed_at_s)
        self._log_saved()
        self._fire_event()

    def _end_with_error(self, pending: PendingSave, error: BaseException) -> None:
        """Rank-local. Take over the save if this rank has committed it; else note the failure.

        The other ranks take over the coordinator's history with the next save.
        """
        self.history.saved_at = RunIteration()
        pending.wait_local()  # an interrupt has not ended this rank's work
        if self._is_current and not pending.has_committed:
            self.history.fail(self.agreed, error)
        elif self._is_current:
            self.history.commit(self.agreed, took_s=self.log.committed())
            if self._removes_at_commit:
                self._take_over(protocol.merge_problems(self.decision.evicted, [pending.own_problems]))
        if pending.has_committed:
            self.log.committed(pending.committed_at_s)
            self._log_saved()

    def _consolidate(self) -> None:
        self._gathered.update(consolidate(self.handler.to_save, save_on_rank=self.agreed.coordinator))

    def _capture(self) -> dict[str, Any]:
        gathered, self._gathered = self._gathered, {}  # a background save must not keep it in memory
        checkpoint = capture(
            self.handler.to_save,
            rank=self.backend.rank,
            save_on_rank=self.agreed.coordinator,
            gathered=gathered,
            has_shards=self._has_shards,
            objects=self._objects,
        )
        if self.handler.include_self:
            own = self.handler.state_dict()  # a subclass may add to it
            checkpoint["checkpointer"] = OrderedDict({**own, "_saved": list(self.decision.kept)})
        elif len(checkpoint) == 1:
            (checkpoint,) = checkpoint.values()
        return checkpoint

    def _object_key(self) -> str:
        """Return the key of the object whose bare state the file holds; empty if it holds a mapping."""
        return "" if self.handler.include_self or len(self.handler.to_save) != 1 else name_of(self.handler.to_save)

    def _build_manifest(self) -> Any:
        return build_manifest(current(), self.engine, self.agreed, self.handler.to_save, self._object_key() or None)

    def _write(self, checkpoint: Any) -> None:
        filename, metadata = self.decision.filename, dict(self.decision.metadata)
        saver = storage_saver(self.handler.save_handler)
        if saver is None:
            call_handler(self.handler.save_handler, checkpoint, filename, metadata)
        else:
            saver.save_with_manifest(checkpoint, filename, self._build_manifest(), self._object_key(), metadata)

    def _watch_writes(self) -> WrittenFiles | None:
        """Return an object that finds the written files; None if no removal depends on them."""
        directory = directory_of(self.handler.save_handler)
        if self.agreed.removal != RemovalOrder.AFTER_KEEPING or not self.decision.evicted or directory is None:
            return None
        saver = storage_saver(self.handler.save_handler)
        return WrittenFiles(directory, self.decision.filename, is_only_one=saver is not None and saver.writes_one_file)

    def _remove_first(self) -> list[str]:
        """Collective. Remove evicted files before the write, if the handler needs that; return the removed ones."""
        if self.agreed.removal != RemovalOrder.BEFORE:
            return []
        names = (*self.decision.replaced, *self.decision.evicted)
        self._remove(self.sync_point("removing evicted files first"), names, None)
        self._orphans = self.history.orphans
        removed = [name for name in names if name not in self._orphans]
        self.history.remove(removed)
        return removed

    def _remove_after(self, written: WrittenFiles | None) -> None:
        """Collective. Remove evicted files now that the new file is durable.

        A save handler that overrides DiskSaver's methods may store several names in one file. The files that it has
        written are kept from removal. If they are not found in its directory, then nothing is removed now, and evicted
        files are removed before each later save, as ignite does.
        """
        evicted = self.decision.evicted
        if self.agreed.removal == RemovalOrder.NEVER:
            self.history.orphans = ()
            return
        if self.agreed.removal == RemovalOrder.AFTER or not evicted:
            self._remove(self.sync_point("removing evicted files"), evicted, None)
            return
        try:
            # Keep the files on all ranks before any rank removes: a handler need not check its rank.
            point, keep = self.sync_point("keeping the written files"), lambda: written is not None and written.keep()
            if any(phases.run(self.backend, point, keep, timeout_s=self.handler.timeout_s)):
                self._remove(self.sync_point("removing evicted files"), evicted, written)
            else:
                self.history.unseen_handler = self.handler.save_handler
        finally:
            if written is not None:
                written.put_back()

    def _remove(self, point: SyncPoint, evicted: Sequence[str], written: WrittenFiles | None) -> None:
        """Collective. Remove evicted files. Those that cannot be removed are orphans."""
        own, timeout_s = self.find_own_files(get_running_engines()), self.handler.timeout_s
        remove_one = functools.partial(self._remove_one, own=own, written=written)
        remove = functools.partial(self._remove_local, evicted, remove_one)
        answers = phases.run(self.backend, point, remove, timeout_s=timeout_s) if evicted else []
        self._take_over(protocol.merge_problems(evicted, answers))

    def _remove_local(self, names: Sequence[str], remove: Callable[[str], None]) -> Problems:
        """Rank-local. Remove files, unless the history was replaced. Callable from any thread."""
        return protocol.remove_local(names if self._is_current else (), remove)

    def _remove_one(self, filename: str, own: OwnFiles, written: WrittenFiles | None) -> None:
        """Rank-local. Let the save handler remove a file that is the Checkpoint's own."""
        handler = self.handler.save_handler
        saver, directory = storage_saver(handler), directory_of(handler)
        if directory is not None:
            check_name(filename)
            own.refuse_removal(filename, read_record(directory / filename))
        if saver is not None and self.agreed.removal != RemovalOrder.BEFORE:
            saver.refuse_last_loadable(filename, self._kept_names, self.decision.filename)
        with contextlib.ExitStack() as stack:
            if self.history.unseen_handler is handler:  # an earlier name may have been of the same file
                stack.enter_context(contextlib.suppress(FileNotFoundError))
            if written is not None and saver is not None:
                stack.enter_context(saver.keeping(written.identities))
            if isinstance(handler, BaseSaveHandler):
                handler.remove(filename)

    @property
    def _kept_names(self) -> list[str]:
        return [name for _, name in self.decision.kept]

    def _remove_stored(self, filename: str, own: OwnFiles, saver: StorageSaver) -> None:
        """Rank-local, on the coordinator. Remove a file from the storage. Callable from any thread."""
        directory = directory_of(saver)
        check_name(filename)
        own.refuse_removal(filename, None if directory is None else read_record(directory / filename))
        saver.refuse_last_loadable(filename, self._kept_names, self.decision.filename)
        saver.storage.remove(filename)

    def _take_over(self, problems: Problems) -> None:
        if not self._is_current:
            return
        self.history.orphans = tuple(name for name, (is_gone, _) in problems.items() if not is_gone)
        self._problems += [
            f"{text}.{'' if is_gone else ' The next save tries again.'}" for is_gone, text in problems.values()
        ]

    def _log_saved(self) -> None:
        self.log.write(self.backend.rank, self.agreed, policy_of(self.handler), self.history.orphans)
        directory = record_directory_of(self.handler.save_handler)
        if directory is not None:
            facts = self.log.facts(self.agreed, self.history.orphans)
            run_of(self._outermost).record.save(self._outermost, directory, self._position | facts)

    def _fire_event(self) -> None:
        register_checkpoint_events(self.engine)
        event = self.engine.last_event_name
        try:
            self.engine.fire_event(CheckpointEvents.SAVED_CHECKPOINT)
        finally:
            # The next handler on the same event reads its name, and so does the engine's loop.
            self.engine.last_event_name = event
        if self._problems:
            level = log_level(current().rank, {self.agreed.coordinator})
            _logger.log(level, "Checkpoint: while removing older checkpoints: %s", " ".join(self._problems))
