"""Saving and loading objects during a run.

Owns :class:`Checkpoint`: what a user asks for, on an engine's event. How the ranks agree, how a file becomes
durable, and in which order, lies below.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ignite.engine import Engine, Events, State

from distckpt._values import check_timeout, is_numpy_scalar, plain_score
from distckpt.backends.detect import current
from distckpt.coordination.phases import HandlerId
from distckpt.coordination.votes import Answer, VoteKind
from distckpt.handlers import arguments
from distckpt.handlers.background_saves import Flights
from distckpt.handlers.checkpoint_helpers import CheckpointHelpers
from distckpt.handlers.checkpoint_history import ON_DISK, KnownEngines
from distckpt.handlers.checkpoint_saving import CheckpointSaving
from distckpt.handlers.compat import accept_older_order, deprecated
from distckpt.handlers.disk_saver import DiskSaver
from distckpt.handlers.early_save import Moment
from distckpt.handlers.engine_events import (
    find_engine_handling_exception,
    get_firing_engines,
    is_iteration_event,
    restore_event_name,
)
from distckpt.handlers.engine_votes import Voter, announce_errors, count_votes, is_nonfinite
from distckpt.handlers.ignite_hooks import CheckpointEvents, get_handlers
from distckpt.handlers.progress import num_completed_epochs, position_of
from distckpt.handlers.runs import Origin, num_saved
from distckpt.handlers.save_handler import BaseSaveHandler, refuse_overrides
from distckpt.policy import retention
from distckpt.policy.decision import SaveIntent, SavePolicy
from distckpt.policy.naming import check_name
from distckpt.policy.scores import check_rule
from distckpt.saving.capture import needs_consolidation

__all__ = ["Checkpoint", "UserFacts", "name_of"]

_LAST = (Events.COMPLETED, Events.TERMINATE)
_SERIALS = itertools.count()
"""Tells which of two handlers was made before the other."""
_OLDER_ORDER = (
    "to_save",
    "save_handler",
    "filename_prefix",
    "score_function",
    "score_name",
    "n_saved",
    "global_step_transform",
    "archived",
    "filename_pattern",
    "include_self",
    "greater_or_equal",
    "save_on_rank",
)
_INSTEAD = {
    "_setup_checkpoint": "Put objects into `to_save` whose `state_dict` returns what is to be saved.",
    "_check_objects": "Give the objects in `to_save` a `state_dict`, or wrap them in a class that has one.",
    "_get_filename_pattern": "Pass `filename_pattern`.",
    "_check_lt_n_saved": "Pass `n_saved`, or a `score_function`.",
    "_compare_fn": "Pass `greater_or_equal`, or a `score_function`.",
}


class UserFacts(NamedTuple):
    """What the user's functions return on this rank.

    Attributes:
        global_step: the step that the file is named by; None if it is named by a score alone.
        score: the score; None without a ``score_function``.
    """

    global_step: Any
    score: int | float | None


class Checkpoint(CheckpointHelpers, CheckpointSaving, Voter):
    """Handler that saves objects during a run, the same on every rank, and keeps the best or latest of them.

    Attach it on all ranks. What is saved, under which name, and what it replaces is decided once from every rank's
    facts. A call returns when the file is durable; only then is an older one removed. An error on any rank is raised
    on every rank, and what was saved before is untouched. With a :class:`DiskSaver` that saves in the background a call
    returns earlier, and the rest follows a few iterations later.

    Args:
        to_save: objects with ``state_dict`` and ``load_state_dict``, in mappings and lists nested at will.
            DistributedDataParallel, DataParallel and torch.compile are seen through.
        save_handler: a directory (str or Path), a :class:`BaseSaveHandler`, or a callable that takes
            ``(checkpoint, filename, metadata)`` or ``(checkpoint, filename)``. A custom one is called on every rank.
        filename_prefix: leads the file name.
        score_function: takes the engine, returns a number; the highest are kept. NaN is never better than anything:
            it saves nothing.
        score_name: goes into the file name. Alone it means ``get_default_score_fn(score_name)``.
        n_saved: how many are kept; None for all.
        global_step_transform: takes ``(engine, event_name)``, returns the global step;
            see :func:`global_step_from_engine`.
        filename_pattern: with the fields ``filename_prefix``, ``name``, ``score``, ``score_name``, ``global_step`` and
            ``ext``.
        include_self: save this handler's own state too, under ``checkpointer``.
        greater_or_equal: whether a checkpoint of the same score replaces the lowest one.
        save_on_rank: the coordinator, which saves. A :class:`DiskSaver`'s own ``save_on_rank`` comes first.
        archived: without effect, deprecated.
        score_rule: which score counts when the ranks' differ: ``"mean"``, ``"min"``, ``"max"``, or the
            ``"coordinator"``'s. Equal scores are taken as they are.
        timeout_s: seconds to wait for the other ranks; None for ``DISTCKPT_TIMEOUT_S``, or 300.

    Attributes:
        to_save: see above.
        save_handler: see above; may be assigned.
        ext: the files' extension, ``pt``.
        last_save_s: how many seconds the last save took on this rank; 0.0 before the first.

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
    vote_kind = VoteKind.SAVE_WANTED
    may_run_early = False  # what it saves is the state of its own call
    lag = None
    every = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_overrides(cls, _INSTEAD)

    @accept_older_order(_OLDER_ORDER, lambda given: isinstance(given.get("filename_pattern"), bool))
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
        score_rule: str = "mean",
        timeout_s: float | None = None,
    ) -> None:
        arguments.check_values(to_save, save_handler, filename_prefix, n_saved, score_name, filename_pattern)
        arguments.check_callables(score_function, global_step_transform)
        arguments.check_include_self(to_save, include_self=include_self)
        arguments.check_rank(save_on_rank)
        check_timeout(timeout_s)
        self.score_rule = check_rule(score_rule)
        if archived is not None:
            deprecated(
                "Argument archived is deprecated and has no effect: checkpoints are not compressed", stacklevel=4
            )
        self.to_save = to_save
        self.filename_prefix = filename_prefix
        self.save_handler: Callable[..., Any] | BaseSaveHandler = (
            DiskSaver(save_handler, create_dir=True, save_on_rank=save_on_rank)
            if isinstance(save_handler, str | Path)
            else save_handler
        )
        self.score_name = score_name
        if score_name is not None and score_function is None:
            score_function = self.get_default_score_fn(score_name)
        self.score_function = score_function
        self.n_saved = n_saved
        self.ext = "pt"
        self.global_step_transform = global_step_transform
        self.filename_pattern = filename_pattern
        self.include_self = include_self
        self.greater_or_equal = greater_or_equal
        self.save_on_rank = save_on_rank
        self.timeout_s = timeout_s
        if filename_prefix and isinstance(self.save_handler, DiskSaver):
            check_name(f"{filename_prefix}_", what="filename_prefix")
        self._saved: list[Checkpoint.Item] = []
        self._strays: tuple[str, ...] = ()
        # The saving rank's, which may be another than this rank's; of the handler it was heard for.
        self._directory: tuple[Any, str | None] = (None, None)
        self._is_agreed = False
        self._known = KnownEngines()
        self._origin: Origin | None = None
        self._former = frozenset[str]()
        self._run_key: tuple[Any, ...] | None = None
        self._is_untouched = True
        self._is_given = False
        self._saved_iteration: int | None = None
        self._saved_in: dict[str, str] = {}
        self._serial = next(_SERIALS)
        self._unseen: Any = None
        self._facts: UserFacts | None = None
        self._asked_on: Engine | None = None
        self._is_wanted = False
        self.last_save_s = 0.0
        self._saved_at = self._ended_at = Moment()
        self._unsaved = (Moment(), "")
        self._is_early = self._is_forced = False
        self._flights = Flights(timeout_s)
        self._handler_id = HandlerId("Checkpoint")
        self._warned: set[str] = set()

    # -- saving ------------------------------------------------------------------------------------

    def __call__(self, engine: Engine, *_args: Any, **_kwargs: Any) -> None:
        """Collective. Save if this event deserves it, unless the step is voted NaN.

        1. (all ranks) hold the vote: of the engine, and of those in whose events it runs. A score of an event of each
           iteration is put on the same ballot, so that nothing more is reduced where no rank wants to save.
        2. (all ranks) save the state of this call; see :mod:`distckpt.saving.protocol` for the protocol.

        While an engine handles an exception (``EXCEPTION_RAISED``) this is rank-local: the saving rank saves alone,
        since the other ranks may never come.

        Raises:
            RemoteRankError: something failed on some rank; alike on every rank, and of the type that was raised there.
            SaveError: in a world of one, the checkpoint could not be written.
            CommitNotDurable: it is there, but may not survive a power cut.
        """
        restore_event_name(engine)
        handling = find_engine_handling_exception()
        if handling is not None and current().world_size > 1:
            handlers = get_handlers(handling, Events.EXCEPTION_RAISED)
            # ignite takes an exception for caught where some handler of EXCEPTION_RAISED does not raise. To save is not
            # to catch: on one rank of several the run cannot go on.
            announce_errors(handling, is_uncaught=all(isinstance(handler, Checkpoint) for handler in handlers))
            self._save_alone(engine, lambda: self._intend(engine))
            return
        # Without a function of the user's it saves whenever it is called. Elsewhere its calls are too few to ask first.
        decides = self.score_function is not None or self.global_step_transform is not None
        backend = current()
        has_others = backend.world_size > 1
        asks = decides and has_others and is_iteration_event(engine)
        self._asked_on, self._facts, self._is_wanted = (engine if asks else None), None, not asks
        try:
            count_votes(engine, self, backend if has_others else None, asks=asks)
        finally:
            self._asked_on = None
        facts = self._facts
        if is_nonfinite(engine):
            self._log_unsaved(engine, "it was voted NaN")
        elif self._is_wanted and not self._ended_at.is_now(engine):
            self._save(engine, lambda: self._intend(engine, facts))
        elif facts is not None and not self._is_wanted:
            self._log_refused(engine, facts.score, self._history())

    def on_attach(self, engine: Engine, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note where the handler is attached, and with what."""
        self._known.add(engine)
        for given in (*args, *kwargs.values()):
            if isinstance(given, Mapping) and given:
                self._known.names.add(name_of(given))

    def _probe(self, engine: Engine) -> Answer:
        if engine is not self._asked_on:
            return None  # by its name alone: ranks of which only some save come from different places
        facts = self._facts = self._find_facts(engine)
        return _nothing_to_tell if self._may_want(engine, facts) else None

    def _act(self, engine: Engine, said: Mapping[int, Any]) -> None:
        del engine, said
        self._is_wanted = True

    def _may_want(self, engine: Engine, facts: UserFacts) -> bool:
        """Tell whether this rank's facts call for a save. Where no rank's do, the agreed score's would not either."""
        if not self._is_agreed or self._is_forced:
            return True
        priority, history = retention.rank_candidate(
            self._saved,
            score=facts.score,
            global_step=facts.global_step,
            is_mid_epoch=self._is_of_begun_epoch(facts, next(iter(get_firing_engines()), engine)),
            former=self._former,
        )
        return retention.wants(history, priority, n_saved=self.n_saved, greater_or_equal=self.greater_or_equal)

    def _is_of_begun_epoch(self, facts: UserFacts, outermost: Engine) -> bool:
        """Return True if a save under an epoch's number comes before that epoch's end, which is to replace it."""
        if self.global_step_transform is None or facts.score is not None:
            return False
        step, epoch = facts.global_step, outermost.state.epoch
        # Outside of a run the state may have been made by hand: what was trained is not known.
        is_whole = bool(get_firing_engines()) and type(step) in (int, float) and step == epoch
        return self._is_early or (is_whole and num_completed_epochs(outermost) < epoch)

    def _object_id(self) -> str | None:
        return self.save_handler.ticket if isinstance(self.save_handler, DiskSaver) else None

    def has_saved_at(self, engine: Engine) -> bool:
        """Tell whether the engine's present iteration has been saved. The same on every rank."""
        return self._saved_at.is_now(engine)

    def save_early(self, engine: Engine, event: Any, calls: Sequence[Callable[[Engine], Any]] = ()) -> None:
        """Collective. Save what is there as the run is ended, as `event` would, which may not have come yet.

        The file is named as on `event`. In the middle of an epoch, where `event` counts epochs, half a step is taken
        off its priority: the end of that epoch, after a resume, replaces it. What has been saved at this iteration is
        not saved again, neither now nor on another event.

        Args:
            engine: whose run is ended.
            event: what the handler is attached to.
            calls: how it is called there, with what else it was attached with; empty for a call with the engine alone.
        """
        if self.has_saved_at(engine):
            self._ended_at = self._saved_at
            return
        present, is_within = engine.last_event_name, is_iteration_event(engine)
        self._is_early, self._is_forced = is_within and State.event_to_attr.get(event) != "iteration", True
        try:
            for call in calls or (self,):
                engine.last_event_name = event  # a listener to the save before may have fired others
                call(engine)
        finally:
            engine.last_event_name, self._is_early, self._is_forced = present, False, False
        if self.has_saved_at(engine):
            self._ended_at = self._saved_at

    def _find_facts(self, engine: Engine) -> UserFacts:
        """Rank-local. Call the user's functions."""
        global_step: Any = None
        if self.global_step_transform is not None:
            global_step = self.global_step_transform(engine, engine.last_event_name)
        score = None
        if self.score_function is not None:
            score = plain_score(self.score_function(engine))
        elif global_step is None:
            global_step = engine.state.get_event_attrib_value(Events.ITERATION_COMPLETED)
        else:
            _check_is_number(global_step)
        return UserFacts(global_step.item() if is_numpy_scalar(global_step) else global_step, score)

    def _intend(self, engine: Engine, facts: UserFacts | None = None) -> SaveIntent:
        if facts is None:
            facts = self._find_facts(engine)
        engines = (*get_firing_engines(), engine)
        outermost = engines[0]
        run = self._enter_run(engines)
        return SaveIntent(
            policy=self._rules(),
            save_on_rank=self._coordinator(),
            global_step=facts.global_step,
            score=facts.score,
            history=self._history(),
            orphans=self._strays,
            directory=str(self.save_handler.dirname) if isinstance(self.save_handler, ON_DISK) else None,
            needs_consolidation=needs_consolidation(self.to_save),
            knows_writers=not isinstance(self.save_handler, DiskSaver) or self.save_handler.knows_writers(current()),
            removal=int(self._removal()),
            handler=self._owner(engines).identity if isinstance(self.save_handler, ON_DISK) else None,
            run=run.as_json(),
            number=num_saved(outermost),
            data=position_of(outermost),
            former=tuple(sorted(self._former)),
            is_mid_epoch=self._is_of_begun_epoch(facts, outermost),
            is_final=self._is_forced or (len(engines) > 1 and outermost.last_event_name in _LAST),
            is_saved=self._saved_at.is_now(engine) or self._is_saved_before(outermost),
        )

    def _rules(self) -> SavePolicy:
        return SavePolicy(
            prefix=self.filename_prefix,
            name=name_of(self.to_save),
            ext=self.ext,
            pattern=self.filename_pattern,
            score_name=self.score_name,
            n_saved=self.n_saved,
            greater_or_equal=self.greater_or_equal,
            score_rule=self.score_rule,
        )

    def _coordinator(self) -> int:
        return self.save_handler.save_on_rank if isinstance(self.save_handler, ON_DISK) else self.save_on_rank


def name_of(to_save: Mapping[str, Any]) -> str:
    """Return the constant part of the names of files that hold these objects."""
    return str(next(iter(to_save))) if len(to_save) == 1 else "checkpoint"


def _nothing_to_tell() -> None:
    """Return what a rank tells of its wish to save."""


def _check_is_number(global_step: Any) -> None:
    """Refuse what could not be a priority: as text, "9" would be higher than "10"."""
    try:
        plain_score(global_step)
    except ValueError:
        msg = f"Output of global_step_transform should be a number, but given {type(global_step)}"
        raise ValueError(msg) from None
