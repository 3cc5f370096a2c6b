"""The Checkpoint handler: its arguments, its events and its history. :mod:`distckpt.handlers.checkpoint_save` saves."""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ignite.base.mixins import Serializable
from ignite.engine import Engine, Events, State

from distckpt._values import plain_score, without_dimensions
from distckpt.backends.base import Backend
from distckpt.backends.detect import current
from distckpt.backends.serial import SingleRank
from distckpt.coordination.liveness import ensure_monitor
from distckpt.coordination.phases import HandlerId
from distckpt.coordination.votes import Answer, VoteKind
from distckpt.handlers import compat
from distckpt.handlers.arguments import check_settings
from distckpt.handlers.background_saves import BackgroundSaves, handled_exception
from distckpt.handlers.checkpoint_history import AttachedEngines, CheckpointHistory, RunIteration
from distckpt.handlers.checkpoint_history import Item as _Item
from distckpt.handlers.checkpoint_save import CheckpointSave
from distckpt.handlers.disk_saver import DiskSaver
from distckpt.handlers.engine_events import (
    find_engine_handling_exception,
    get_tracked_handlers,
    is_iteration_event,
    restore_event_name,
)
from distckpt.handlers.engine_votes import Voter, announce_errors, hold_votes, is_nonfinite, next_sync_point
from distckpt.handlers.ignite_hooks import CheckpointEvents, get_handlers
from distckpt.handlers.own_files import FileNaming, OwnFiles
from distckpt.handlers.save_handler import BaseSaveHandler, directory_of, is_same_directory, storage_saver
from distckpt.handlers.save_intent import UserFacts, call_user_functions, coordinator_of, may_want, name_of, policy_of
from distckpt.handlers.save_log import SkipLog
from distckpt.loading import api
from distckpt.loading.api import LoadReport
from distckpt.policy.naming import check_name, default_pattern, format_score
from distckpt.policy.policies import Policy
from distckpt.policy.scores import check_rule, get_default_score_fn

_SERIALS = itertools.count()


class Checkpoint(Serializable, Voter):
    """Handler that saves objects during a run, the same on every rank, and keeps the best or the latest checkpoints.

    Attach it on all ranks. The ranks decide together what is saved, under which name, and what it replaces. A call
    returns when the file is durable, and only then older files are removed. An error on one rank is raised on every
    rank, and earlier checkpoints stay as they are. With a :class:`DiskSaver` that saves in the background, a call
    returns earlier, and the save completes a few iterations later.

    Args:
        to_save: objects with ``state_dict`` and ``load_state_dict``, in nested mappings and lists.
            DistributedDataParallel, DataParallel and torch.compile are unwrapped.
        save_handler: a directory (str or Path), a :class:`BaseSaveHandler`, or a callable that takes
            ``(checkpoint, filename, metadata)`` or ``(checkpoint, filename)``. A custom one is called on every rank.
        filename_prefix: the beginning of the file name.
        score_function: takes the engine and returns a number. The checkpoints with the highest scores are kept. A
            checkpoint whose score is NaN is not saved.
        score_name: the score's name in the file name. Without `score_function`,
            ``get_default_score_fn(score_name)`` gives the score.
        n_saved: the number of checkpoints to keep; None keeps all. Not used if `keep` is given.
        global_step_transform: takes ``(engine, event_name)`` and returns the global step; see
            :func:`global_step_from_engine`.
        filename_pattern: a pattern with the fields ``filename_prefix``, ``name``, ``score``, ``score_name``,
            ``global_step`` and ``ext``.
        include_self: whether to save this handler's state too, under the key ``checkpointer``.
        greater_or_equal: whether a checkpoint of equal score replaces the lowest one.
        save_on_rank: the coordinator, which writes. A :class:`DiskSaver`'s own ``save_on_rank`` takes precedence.
        archived: deprecated, without effect.
        keep: policies such as :class:`LastN`. A checkpoint is kept if any policy wants it. None to use `n_saved`.
        score_rule: which score counts when the ranks' scores differ: ``"mean"``, ``"min"``, ``"max"``, or the
            ``"coordinator"``'s.
        timeout_s: seconds to wait for the other ranks; None for ``DISTCKPT_TIMEOUT_S``, or 300.

    Attributes:
        to_save: the objects.
        save_handler: the save handler. It may be assigned.
        ext: the extension of the files, ``pt``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument has a wrong value.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from ignite.engine import Engine, Events
        >>> trainer = Engine(lambda engine, batch: None)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     handler = Checkpoint({"model": nn.Linear(1, 1)}, folder, n_saved=2)
        ...     trainer.add_event_handler(Events.EPOCH_COMPLETED, handler) and None
        ...     trainer.run([0, 1], max_epochs=3) and None
        ...     handler.last_checkpoint.name
        'model_6.pt'
    """

    SAVED_CHECKPOINT = CheckpointEvents.SAVED_CHECKPOINT
    Item = _Item
    keeps_history: bool = False
    """Whether :meth:`reset` keeps the history; True before the first batch of a resumed run."""
    resumes_with: Callable[[], None] | None = None
    """What a call does instead of a save, in an event that a resumed run repeats."""
    vote_kind = VoteKind.SAVE_WANTED
    may_run_early = False  # a call saves the state at its own place among the handlers
    lag = None
    every = None
    _state_dict_all_req_keys = ("_saved",)

    setup_filename_pattern = staticmethod(default_pattern)
    """Return a file name pattern with the chosen fields; see :func:`distckpt.policy.naming.default_pattern`."""
    get_default_score_fn = staticmethod(get_default_score_fn)
    """Return a score function that reads a metric; see :func:`distckpt.policy.scores.get_default_score_fn`."""
    load_objects = staticmethod(api.load_objects)
    """Load a checkpoint into objects, all of them or none; see :func:`distckpt.loading.api.load_objects`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        compat.refuse_overrides(cls, compat.CHECKPOINT_OVERRIDES)

    @compat.accept_older_order(compat.CHECKPOINT_ORDER, lambda given: isinstance(given.get("filename_pattern"), bool))
    def __init__(
        self,
        to_save: Mapping[str, Any],
        save_handler: str | Path | Callable[..., Any] | BaseSaveHandler,
        filename_prefix: str = "",
        score_function: Callable[[Engine], int | float] | None = None,
        score_name: str | None = None,
        n_saved: int | None = 1,
        global_step_transform: Callable[..., int] | None = None,
        filename_pattern: str | None = None,
        include_self: bool = False,
        greater_or_equal: bool = False,
        save_on_rank: int = 0,
        *,
        archived: bool | None = None,
        keep: Sequence[Policy] | None = None,
        score_rule: str = "mean",
        timeout_s: float | None = None,
    ) -> None:
        if archived is not None:
            compat.deprecated(compat.ARCHIVED, stacklevel=4)
        self.to_save = to_save
        self.save_handler: Any = save_handler
        self.filename_prefix = filename_prefix
        self.score_name = score_name
        self.score_function: Callable[..., Any] | None = score_function
        self.n_saved = n_saved
        self.keep = keep
        self.ext = "pt"
        self.global_step_transform = global_step_transform
        self.filename_pattern = filename_pattern
        self.include_self = include_self
        self.greater_or_equal = greater_or_equal
        self.save_on_rank = save_on_rank
        self.score_rule = check_rule(score_rule)
        self.timeout_s = timeout_s
        check_settings(self)
        if isinstance(save_handler, str | Path):
            self.save_handler = DiskSaver(save_handler, create_dir=True, save_on_rank=save_on_rank)
        if score_name is not None and score_function is None:
            self.score_function = self.get_default_score_fn(score_name)
        if filename_prefix and storage_saver(self.save_handler) is not None:
            check_name(f"{filename_prefix}_", what="filename_prefix")
        self._history = CheckpointHistory()
        self._background_saves = BackgroundSaves(timeout_s)
        self._handler_id = HandlerId("Checkpoint")
        self._engines = AttachedEngines()
        self._serial = next(_SERIALS)
        self._skip_log = SkipLog()
        self._asking_engine: Engine | None = None  # the engine on whose vote round it asks whether to save
        self._facts: UserFacts | None = None
        self._is_wanted = self._is_early = self._is_forced = False
        self._ended_at = RunIteration()

    def __call__(self, engine: Engine, *_args: Any, **_kwargs: Any) -> None:
        """Collective. Save if this event calls for it, unless the step was voted NaN.

        1. (all ranks) hold the votes of the engine, and of the engines in whose events it runs. On an event of every
           iteration, a handler with a score function or a step transform also votes on whether to save: if no rank
           wants to, no other collective follows.
        2. (all ranks) save the present state; see :mod:`distckpt.saving.protocol`.

        While an engine handles an exception (``EXCEPTION_RAISED``), a call is rank-local: the coordinator saves alone,
        because the other ranks may never come.

        Raises:
            RemoteRankError: the save failed on some rank; raised on every rank, with the type of the error there.
            SaveError: with one rank, the checkpoint could not be written.
            CommitNotDurable: the file is in place, but may not survive a power cut.
        """
        restore_event_name(engine)
        if self.resumes_with is not None:
            self.resumes_with()
            return
        backend = current()
        has_others = backend.world_size > 1
        failing = find_engine_handling_exception()
        if failing is not None and has_others:
            handlers = get_handlers(failing, Events.EXCEPTION_RAISED)
            # ignite treats an exception as handled if no handler of EXCEPTION_RAISED raises it. A Checkpoint does
            # not catch it: with one rank missing the run cannot continue.
            announce_errors(failing, is_uncaught=all(isinstance(handler, Checkpoint) for handler in handlers))
            self._save_alone(engine, backend)
            return
        # Without user functions every call saves. On events other than iterations a vote costs more than it avoids.
        has_functions = self.score_function is not None or self.global_step_transform is not None
        asks = has_functions and has_others and is_iteration_event(engine)
        self._asking_engine, self._facts, self._is_wanted = (engine if asks else None), None, not asks
        try:
            hold_votes(engine, self, backend if has_others else None, asks=asks)
        finally:
            self._asking_engine = None
        if is_nonfinite(engine):
            self._skip_log.write(self, engine, "it was voted NaN")
        elif self._is_wanted and not self._ended_at.is_present(engine):
            self._save(engine, backend, self._facts)
        elif self._facts is not None and not self._is_wanted:
            self._skip_log.refused(self, self._history, engine, self._facts.score, self._facts.global_step)

    def _probe(self, engine: Engine) -> Answer:
        if engine is not self._asking_engine:
            return None  # only registers the handler: by its name, ranks at different places are detected
        facts = self._facts = self._find_facts(engine)
        is_wanted = not self._history.is_agreed or self._is_forced
        is_wanted = is_wanted or may_want(self, self._history, facts, engine, is_early=self._is_early)
        return (lambda: None) if is_wanted else None  # a yes has no details

    def _act(self, engine: Engine, reports: Mapping[int, Any]) -> None:
        self._is_wanted = True

    def _find_facts(self, engine: Engine) -> UserFacts:
        return call_user_functions(self, engine)

    def has_saved_at(self, engine: Engine) -> bool:
        """Return True if the engine's present iteration has been saved. The same on every rank."""
        return self._history.saved_at.is_present(engine)

    def save_early(self, engine: Engine, event: Any, calls: Sequence[Callable[[Engine], Any]] = ()) -> None:
        """Collective. Save the present state, as on `event`, because the run is being ended.

        The file is named as on `event`. In the middle of an epoch, if `event` counts epochs, the priority is below
        the step, unless the step has a fraction: after a resume the end of that epoch replaces the file. An iteration
        is saved only once, by this call or on another event.

        Args:
            engine: the engine whose run is ended.
            event: the event that the handler is attached to.
            calls: functions that call the handler with its arguments on that event; empty to call it with the engine
                alone.
        """
        if not self.has_saved_at(engine):
            present, is_within_epoch = engine.last_event_name, is_iteration_event(engine)
            self._is_early = is_within_epoch and State.event_to_attr.get(event) != "iteration"
            self._is_forced = True
            try:
                for call in calls or (self,):
                    engine.last_event_name = event  # listeners to an earlier save may have fired other events
                    call(engine)
            finally:
                engine.last_event_name, self._is_early, self._is_forced = present, False, False
        if self.has_saved_at(engine):
            self._ended_at = self._history.saved_at

    def _save(self, engine: Engine, backend: Backend, facts: UserFacts | None) -> None:
        """Collective. Save, if the ranks decide to."""
        save, saver = self._make_save(engine, backend, facts), storage_saver(self.save_handler)
        if self._background_saves:
            if saver is not None and saver.when_busy == "skip" and not self._is_forced:
                self._skip_log.write(self, engine, "the last save is still pending (when_busy='skip')")
                return
            self._background_saves.wait()
        monitor = ensure_monitor(backend, self.timeout_s)
        if monitor is not None:
            monitor.clear_caught_failure()
        object_id = self._object_id()
        sync_point = next_sync_point(self._handler_id, backend, engine, depends_on=object_id, timeout_s=self.timeout_s)
        if save.decide(sync_point):
            save.run(self._background_saves)

    def _save_alone(self, engine: Engine, backend: Backend) -> None:
        """Rank-local. Save on the coordinator while an exception is handled; the other ranks may never come."""
        error, saver = handled_exception(), storage_saver(self.save_handler)
        self._background_saves.abort(error)
        if saver is not None and saver.writes_on_one_rank and backend.rank != coordinator_of(self):
            return
        if self.has_saved_at(engine):  # ignite handles an exception twice: where it is raised, and around the run
            return
        if is_nonfinite(engine):
            self._skip_log.write(self, engine, "it was voted NaN")
        else:
            self._make_save(engine, SingleRank(backend)).run_alone(error)

    def _make_save(self, engine: Engine, backend: Backend, facts: UserFacts | None = None) -> CheckpointSave:
        return CheckpointSave(
            handler=self,
            history=self._history,
            find_own_files=self._find_own_files,
            find_facts=lambda: self._find_facts(engine) if facts is None else facts,
            engine=engine,
            backend=backend,
            skip_log=self._skip_log,
            is_early=self._is_early,
            is_forced=self._is_forced,
        )

    def _object_id(self) -> str | None:
        saver = storage_saver(self.save_handler)
        return None if saver is None else saver.object_id

    def on_attach(self, engine: Engine, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note the engine that the handler is attached to, and the objects in its arguments."""
        self._engines.add(engine)
        for value in (*args, *kwargs.values()):
            if isinstance(value, Mapping) and value:
                self._engines.names.add(name_of(value))

    def _find_own_files(self, engines: Iterable[Engine] = (), *, loaded_name: str | None = None) -> OwnFiles:
        """Return what tells this handler's files from those of other handlers on its engines and on `engines`."""
        directory = directory_of(self.save_handler)
        known = [one for engine in self._engines.union(engines) for one in get_tracked_handlers(engine)]
        handlers = {id(one): one for one in known if isinstance(one, Checkpoint) and one is not self}.values()
        own, *others = (
            FileNaming(
                policy=policy_of(one),
                names=one._object_names(),  # noqa: SLF001 - a Checkpoint's
                is_scored=one.score_function is not None,
                has_transform=one.global_step_transform is not None,
                serial=one._serial,  # noqa: SLF001
                kept=one._history.kept,  # noqa: SLF001
            )
            for one in (self, *(one for one in handlers if is_same_directory(one.save_handler, self.save_handler)))
        )
        return OwnFiles(directory, own, others, saved_in=self._history.saved_in, loaded_name=loaded_name)

    def _object_names(self) -> frozenset[str]:
        """Return the names of the objects in the handler's files; empty if they are not known yet."""
        return frozenset({name_of(self.to_save)})

    @property
    def _saved(self) -> list[_Item]:
        return self._history.items  # ignite's name

    @_saved.setter
    def _saved(self, entries: Iterable[tuple[int | float, str]]) -> None:
        Checkpoint.load_state_dict(self, {"_saved": entries})

    @property
    def last_checkpoint(self) -> str | Path | None:
        """The kept checkpoint of highest priority: with a score the best one, else the latest.

        A path if the save handler is a :class:`DiskSaver`, else the file name; None if there is none.
        """
        if not self._history.kept:
            return None
        (_, filename), directory = self._history.kept[-1], directory_of(self.save_handler)
        if directory is None:
            return filename
        handler, agreed = self._history.directory
        return Path(agreed if handler is self.save_handler and agreed is not None else directory) / filename

    @property
    def last_save_s(self) -> float:
        """The duration of the last save on this rank in seconds; 0.0 before the first one."""
        return self._history.last_save_s

    @property
    def has_pending_save(self) -> bool:
        """Whether a save in the background is pending. The same on every rank."""
        return bool(self._background_saves)

    def wait_until_finished(self) -> None:
        """Collective. Block until no save in the background is pending. Call it on all ranks.

        Afterwards the save is in the history, and ``last_checkpoint`` returns it.

        Raises:
            RemoteRankError: the save failed on some rank; raised on every rank, with the type of the error there.
            SaveError: with one rank, the checkpoint could not be written.
        """
        self._background_saves.wait()

    def reset(self) -> None:
        """Forget the saved checkpoints, for an engine that runs several times independently. The files stay.

        In a resumed run, a call before the first batch, as by a handler of STARTED, keeps the history.
        """
        if not self.keeps_history:
            self._history.replace()

    def state_dict(self) -> "OrderedDict[str, list[tuple[int | float, str]]]":
        """Return the history: ``_saved``, a list of (priority, file name), lowest priority first."""
        return OrderedDict(_saved=list(self._history.kept))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replace the history. If only the coordinator loads it, all ranks use it from the next event on.

        Args:
            state_dict: the result of :meth:`state_dict`. The key ``saved`` of older releases is accepted.

        Raises:
            TypeError: `state_dict` is not a mapping.
            ValueError: it lacks ``_saved``.
        """
        if isinstance(state_dict, Mapping) and "_saved" not in state_dict and "saved" in state_dict:
            state_dict = {"_saved": state_dict["saved"]}
        super().load_state_dict(state_dict)
        entries = [(plain_score(without_dimensions(priority)), str(name)) for priority, name in state_dict["_saved"]]
        self._history.replace(entries, is_user_given=True)

    def reload_objects(
        self,
        to_load: Mapping[str, Any],
        load_kwargs: Mapping[str, Any] | None = None,
        *,
        verify: bool = True,
        **filename_components: Any,
    ) -> LoadReport:
        """Load one of this handler's files into objects; see :meth:`load_objects`.

        Args:
            to_load: objects with ``load_state_dict``.
            load_kwargs: keyword arguments of ``nn.Module.load_state_dict``.
            verify: whether to compare the file with its checksums before any object is changed.
            filename_components: ``name``, ``score`` and ``global_step``, which make the file name.

        Returns:
            The keys that a load with ``strict=False`` has ignored.

        Raises:
            AttributeError: the save handler is not a :class:`DiskSaver`.
            Exception: as :meth:`load_objects`.
        """
        directory = directory_of(self.save_handler)
        if directory is None:
            msg = f"Checkpoint's `save_handler` should be of type `DiskSaver`, given {type(self.save_handler)}"
            raise AttributeError(msg)
        policy, score = policy_of(self), filename_components.get("score")
        has_score = self.score_function is not None or policy.pattern is not None
        filename = replace(policy, name=filename_components.get("name", policy.name)).filename(
            score=(format_score(score) if isinstance(score, float) else str(score)) if has_score else None,
            global_step=filename_components.get("global_step"),
        )
        return api.load_objects(to_load, directory / filename, verify=verify, **(load_kwargs or {}))
