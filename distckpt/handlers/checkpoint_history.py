"""The checkpoints that one handler keeps, and the run that saved them."""

import weakref
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from ignite.engine import Engine

from distckpt.errors import CommitNotDurable
from distckpt.handlers.own_files import OwnFiles
from distckpt.handlers.runs import Origin, propose_run, run_key, run_of, untrained_iteration
from distckpt.policy.decision import AgreedSave
from distckpt.policy.history import Entry, History, digest_of
from distckpt.policy.policies import EveryHours, Policy
from distckpt.ptformat.records import Run


class Item(NamedTuple):
    """A kept checkpoint."""

    priority: int | float
    filename: str


class RunIteration:
    """An iteration of an engine's run. Without an engine, and in a copy, it is never the present one."""

    def __init__(self, engine: Engine | None = None) -> None:
        self._engine = None if engine is None else weakref.ref(engine)
        self._number = None if engine is None else (run_of(engine).num_starts, engine.state.iteration)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the engine out of copies and pickles."""
        return (RunIteration, ())

    def is_present(self, engine: Engine) -> bool:
        """Return True if the engine is in this iteration of this run."""
        if self._engine is None or self._engine() is not engine:
            return False
        return self._number == (run_of(engine).num_starts, engine.state.iteration)


class AttachedEngines:
    """The engines that a handler is attached to. A copy of the handler is attached to none.

    Attributes:
        names: the names of the objects that the handler was attached with.
    """

    def __init__(self) -> None:
        self._engines: weakref.WeakSet[Engine] = weakref.WeakSet()
        self.names: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the engines out of copies and pickles."""
        return (AttachedEngines, ())

    def add(self, engine: Engine) -> None:
        """Add an engine."""
        self._engines.add(engine)
        run_of(engine)  # so that the engine's runs are counted and recorded

    def union(self, engines: Iterable[Engine]) -> list[Engine]:
        """Return the engines that are alive, and `engines`, each once."""
        return list({id(engine): engine for engine in (*self._engines, *engines)}.values())


class CheckpointHistory:
    """The history of one Checkpoint. Rank-local; issues no collectives.

    Attributes:
        orphans: files that an earlier save had to remove and could not. The next save removes them.
        is_agreed: whether all ranks have the same history.
        former: names of the kept checkpoints that former runs saved.
        saved_in: the id of the run in which this process saved a file, by file name. It may hold files that are gone.
        saved_at: the iteration of the last save.
        last_save_s: the duration of the last save on this rank in seconds; 0.0 before the first one.
        unseen_handler: the save handler if its files were not found where it saves; else None.
        directory: the save handler of the last save, and the coordinator's directory. This rank's may differ.
        version: changes when the history is replaced, by a load or a reset.
    """

    def __init__(self) -> None:
        self._kept = History()
        self._items: list[Item] | None = None  # of _kept, once a program has asked for them
        self.orphans: tuple[str, ...] = ()
        self.is_agreed = False
        self.former = frozenset[str]()
        self.saved_in: dict[str, str] = {}
        self.saved_at = RunIteration()
        self.last_save_s = 0.0
        self.unseen_handler: Any = None
        self.directory: tuple[Any, str | None] = (None, None)
        self.version = 0
        self._origin: Origin | None = None
        self._run_key: tuple[Any, ...] | None = None
        self._iteration: int | None = None
        self._is_searched = False
        self._is_user_given = False
        self._known_for: tuple[Policy, ...] = ()  # the policies for which the files were looked at
        self._digested = self.former, digest_of(())

    @property
    def kept(self) -> History:
        """The kept checkpoints, with what a program has changed in :attr:`items`."""
        if self._items is not None and list(map(tuple, self._items)) != list(self._kept):
            self._kept = self._kept.with_priorities((item.priority, item.filename) for item in self._items)
            self._known_for = ()
        return self._kept

    @kept.setter
    def kept(self, kept: History) -> None:
        self._kept, self._items = kept, None

    @property
    def items(self) -> list[Item]:
        """The kept checkpoints, lowest priority first. Programs may change the list, as MONAI's do."""
        if self._items is None:
            self._items = [Item(*entry) for entry in self._kept]
        return self._items

    @property
    def digest(self) -> str:
        """A digest of all that the ranks take over from the coordinator; not computed anew for each save."""
        former, digest = self._digested
        if former is not self.former:
            digest = digest_of(sorted(self.former))
            self._digested = self.former, digest
        return digest_of((self.kept.digest, self.orphans, digest))

    def replace(
        self,
        entries: Iterable[Entry] = (),
        orphans: Iterable[str] = (),
        *,
        iteration: int | None = None,
        origin: Origin | None = None,
        is_user_given: bool = False,
    ) -> None:
        """Replace the history by a loaded one.

        Args:
            entries: the kept checkpoints, lowest priority first.
            orphans: files that the next save removes.
            iteration: the engine's iteration at the last save; None if unknown.
            origin: what the next run resumes.
            is_user_given: whether a user loaded it. Then it counts as this run's, not as a former run's.
        """
        self.kept, self.orphans = History(entries), tuple(orphans)
        self.is_agreed, self._is_searched, self._is_user_given = False, True, is_user_given
        self._run_key, self._iteration, self._origin = None, iteration, origin
        self.saved_in, self._known_for = {}, ()
        self.version += 1

    def resume_from(self, origin: Origin) -> None:
        """Treat the history as that of the runs that the next run resumes."""
        self._origin, self._is_user_given = origin, False

    def enter_run(self, engines: Sequence[Engine], own: OwnFiles, *, is_coordinator: bool) -> Run:
        """Return the run that a save belongs to, as this rank knows it.

        In the first save of a resumed run the coordinator searches the directory for the handler's former files.
        """
        run, is_new = run_of(engines[0]).run, self._run_key != run_key(engines[0])
        files = own.survey() if is_coordinator and is_new and (run is None or not self._is_searched) else {}
        if run is None:
            started_s = [record.run.started_s for record in files.values() if record is not None]
            run = propose_run(engines, self._origin, max(started_s, default=0.0))
        if is_new and not self._is_searched and run.lineage:
            newest = own.find_newest(files, run.root)
            found = None if newest is None else own.recorded_history(newest, files)
            if found is not None:
                self.replace(found.entries, found.orphans, iteration=found.iteration, origin=self._origin)
        if is_new:
            self.former = frozenset(() if self._is_user_given else [name for _, name in self.kept])
        return run

    def look_at_files(self, own: OwnFiles, keep: tuple[Policy, ...] | None) -> None:
        """Read the steps and times that policies ask for from the kept files' records.

        They are unknown after a load of the history, and after a change of the policies.
        """
        if keep is None or keep == self._known_for:
            return
        needs_time = any(isinstance(policy, EveryHours) for policy in keep)
        files = self.kept.files
        unknown = [file for file in files if file.step is None or (needs_time and file.time_s is None)]
        if unknown:
            names = {file.name for file in unknown}
            found = own.look_at(unknown)
            known = [file for file in files if file.name not in names]
            self.kept = History(self.kept, [*found, *known])
        self._known_for = keep

    def is_saved_before(self, outermost: Engine) -> bool:
        """Return True if a former run saved the present state: nothing was trained since."""
        return self._iteration is not None and self._iteration == untrained_iteration(outermost)

    def adopt(self, agreed: AgreedSave, outermost: Engine) -> None:
        """All ranks. Take over the coordinator's history and, for the outermost engine, its run; count the save."""
        intent = agreed.intent
        self.kept, self.orphans = intent.history, intent.orphans
        if intent.run is None:
            return
        run = run_of(outermost)
        run.run, run.num_saved = Run.from_json(intent.run), intent.number + (agreed.decision is not None)
        self._run_key, self._origin, self._is_searched, self._is_user_given = run_key(outermost), None, True, False
        self.former = intent.former
        if agreed.decision is not None:
            filename = agreed.decision.filename
            if filename in self.former:
                self.former -= {filename}
            self._iteration = outermost.state.iteration
            if len(self.saved_in) > 2 * (len(intent.history) + len(intent.orphans) + 1):  # not in every save
                known = {name for _, name in intent.history}.union(intent.orphans)
                self.saved_in = {name: run_id for name, run_id in self.saved_in.items() if name in known}
            self.saved_in[filename] = str(intent.run["id"])

    def commit(self, agreed: AgreedSave, *, took_s: float) -> None:
        """Take over a committed save. What it evicts is an orphan until it is removed."""
        if agreed.decision is not None:
            self.kept, self.orphans = agreed.decision.kept, agreed.decision.evicted
        self.last_save_s = took_s

    def remove(self, removed: Collection[str]) -> None:
        """Drop files that are removed before a save. The others stay in the history if the save fails."""
        self.kept = self.kept.replace(removed)
        self.orphans = tuple(name for name in self.orphans if not self.kept.has_name(name))

    def fail(self, agreed: AgreedSave, error: BaseException) -> None:
        """Note the file that a failed save may have left."""
        if agreed.decision is None:
            return
        filename = agreed.decision.filename
        is_overwritten = self.kept.has_name(filename)  # False if it was removed before the save
        is_removed = bool(agreed.decision.replaced) and filename not in self.orphans
        if isinstance(error, CommitNotDurable) and is_overwritten:
            self.kept, self.orphans = agreed.decision.kept, agreed.decision.evicted  # the older file is replaced
        elif not is_overwritten and (
            is_removed or isinstance(error, CommitNotDurable) or not isinstance(error, Exception)
        ):
            # The file may be there: its directory was not synced, an interrupt came during the rename, or the save
            # handler, which replaces no file, has left a part of it.
            self.orphans = (*self.orphans, filename)
