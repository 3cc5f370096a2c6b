"""What one rank knows before the ranks decide on a save: the user's functions, and the handler's settings."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ignite.engine import Engine, Events

from distckpt._values import is_numpy_scalar, plain_score, without_dimensions
from distckpt.backends.detect import current
from distckpt.handlers.checkpoint_history import CheckpointHistory
from distckpt.handlers.compat import CHECKPOINT_OVERRIDES, refuse_overrides
from distckpt.handlers.engine_events import find_engine_handling_exception, get_running_engines
from distckpt.handlers.global_step import may_count_epochs
from distckpt.handlers.object_trees import find_path
from distckpt.handlers.own_files import OwnFiles
from distckpt.handlers.progress import num_completed_epochs, position_of
from distckpt.handlers.runs import run_of
from distckpt.handlers.save_handler import directory_of, removal_order_of, replaces_file, storage_saver
from distckpt.policy.decision import RemovalOrder, SaveIntent, SavePolicy
from distckpt.policy.policies import EveryHours, Policy, policies_of, whole_minutes
from distckpt.policy.retention import rank_candidate, wants
from distckpt.policy.scores import ScoreRule
from distckpt.saving.capture import needs_consolidation

_RUN_ENDS = (Events.COMPLETED, Events.TERMINATE)


class Settings(Protocol):
    """The public attributes of a :class:`~distckpt.Checkpoint`. Users may assign them between saves."""

    to_save: Mapping[str, Any]
    save_handler: Any
    filename_prefix: str
    score_function: Callable[..., Any] | None
    score_name: str | None
    n_saved: int | None
    keep: Sequence[Policy] | None
    ext: str
    global_step_transform: Callable[..., int] | None
    filename_pattern: str | None
    include_self: bool
    greater_or_equal: bool
    save_on_rank: int
    score_rule: ScoreRule
    timeout_s: float | None

    @property
    def last_checkpoint(self) -> str | Path | None:
        """The kept checkpoint of highest priority."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return the handler's state."""
        ...


class UserFacts(NamedTuple):
    """The results of the user's functions on this rank.

    Attributes:
        global_step: the step in the file name; None if the name holds a score alone.
        score: the score; None without a ``score_function``.
        may_count_epochs: whether the step may be the number of an epoch. A float may be a part of epochs.
    """

    global_step: Any
    score: int | float | None
    may_count_epochs: bool


def name_of(to_save: Mapping[str, Any]) -> str:
    """Return the name of the objects in file names: the single object's key, or ``checkpoint``."""
    return str(next(iter(to_save))) if len(to_save) == 1 else "checkpoint"


def coordinator_of(handler: Settings) -> int:
    """Return the rank that decides and commits, according to this rank's settings."""
    saver = handler.save_handler
    return int(handler.save_on_rank if directory_of(saver) is None else saver.save_on_rank)


def policy_of(handler: Settings) -> SavePolicy:
    """Return the policy of a handler's present settings."""
    return SavePolicy(
        prefix=handler.filename_prefix,
        name=name_of(handler.to_save),
        ext=handler.ext,
        pattern=handler.filename_pattern,
        score_name=handler.score_name,
        n_saved=handler.n_saved,
        greater_or_equal=handler.greater_or_equal,
        score_rule=handler.score_rule,
        keep=None if handler.keep is None else tuple(handler.keep),
    )


def call_user_functions(handler: Settings, engine: Engine) -> UserFacts:
    """Rank-local. Return the step and the score of the present event.

    Raises:
        ValueError: one of them is not a number.
        TypeError: the handler, or its class, was given a method which ignite calls and distckpt does not.
    """
    refuse_overrides(handler, CHECKPOINT_OVERRIDES)
    step: Any = None
    transform, event = handler.global_step_transform, engine.last_event_name
    if transform is not None:
        step = without_dimensions(transform(engine, event))
    score = None
    if handler.score_function is not None:
        score = plain_score(handler.score_function(engine))
    elif step is None:
        step = engine.state.get_event_attrib_value(Events.ITERATION_COMPLETED)
    else:
        try:
            number = plain_score(step)  # as text, "9" would rank above "10"
        except ValueError:
            raise ValueError(f"Output of global_step_transform should be a number, but given {type(step)}") from None
        step = step if isinstance(step, int | float) else number
    step = step.item() if is_numpy_scalar(step) else step
    return UserFacts(step, score, type(step) is int and may_count_epochs(transform, event))


def is_mid_epoch(handler: Settings, facts: UserFacts, engine: Engine, *, is_early: bool) -> bool:
    """Return True if the step is the number of an unfinished epoch, at whose end a save is to replace this one.

    The save at the epoch's end has the same step, and of two equal steps only the first is saved. So this save has a
    lower priority, unlike ignite's. Whether a user's function counts iterations or epochs cannot be known while both
    have the same number, as in the first iteration.

    Args:
        handler: the Checkpoint.
        facts: the results of its functions.
        engine: see :func:`find_trainer`.
        is_early: whether the run is being ended in the middle of an epoch. ignite makes no such save.
    """
    if handler.global_step_transform is None or facts.score is not None:
        return False
    step, epoch = facts.global_step, engine.state.epoch
    if is_early:
        return bool(step % 1 == 0)  # a part of epochs is below the number at their end already
    # Outside of a run a user may have set the state: it does not show what was trained.
    is_epoch = bool(get_running_engines()) and facts.may_count_epochs and step == epoch
    return is_epoch and num_completed_epochs(engine) < epoch


def find_trainer(engines: Sequence[Engine], to_save: Mapping[str, Any]) -> Engine:
    """Return the engine whose position a file records: the outermost running one in `to_save`, else the outermost one.

    An engine around the trainer, such as a search over settings, is not in the file, and cannot continue from it.

    Args:
        engines: the running engines, outermost first, and the engine on whose event the Checkpoint saves.
        to_save: the objects of the Checkpoint.
    """
    if all(engine is engines[0] for engine in engines):
        return engines[0]
    return next((engine for engine in engines if find_path(engine, to_save) is not None), engines[0])


def may_want(
    handler: Settings, history: CheckpointHistory, facts: UserFacts, engine: Engine, *, is_early: bool
) -> bool:
    """Return True if this rank's facts call for a save. If no rank's do, then the agreed score does not either."""
    trainer = find_trainer((*get_running_engines(), engine), handler.to_save)
    priority, entries = rank_candidate(
        history.kept,
        score=facts.score,
        global_step=facts.global_step,
        is_mid_epoch=is_mid_epoch(handler, facts, trainer, is_early=is_early),
        former=history.former,
    )
    # Without a SavePolicy: this may run in every iteration.
    is_scored, keep = facts.score is not None, None if handler.keep is None else tuple(handler.keep)
    policies = policies_of(keep, handler.n_saved, is_scored=is_scored)
    return wants(entries, priority, policies=policies, is_scored=is_scored, greater_or_equal=handler.greater_or_equal)


def make_intent(
    handler: Settings,
    history: CheckpointHistory,
    own: OwnFiles,
    engines: Sequence[Engine],
    facts: UserFacts,
    *,
    is_early: bool,
    is_forced: bool,
) -> SaveIntent:
    """Rank-local. Return what this rank knows. A resumed run's first save restores the history that files record.

    Args:
        handler: the Checkpoint.
        history: its history.
        own: identifies its files.
        engines: the running engines, outermost first, and the engine on whose event it saves.
        facts: the results of its functions.
        is_early: see :func:`is_mid_epoch`.
        is_forced: whether the run is being ended.
    """
    backend, coordinator, saver = current(), coordinator_of(handler), handler.save_handler
    searches = backend.rank == coordinator or find_engine_handling_exception() is not None
    run = history.enter_run(engines, own, is_coordinator=searches)
    directory, stored = directory_of(saver), storage_saver(saver)
    outermost, is_nested, trainer = engines[0], len(engines) > 1, find_trainer(engines, handler.to_save)
    policy, step = policy_of(handler), facts.global_step
    if searches:
        history.look_at_files(own, policy.keep)
    has_time = any(isinstance(one, EveryHours) for one in policy.keep or ())
    return SaveIntent(
        policy=policy,
        save_on_rank=coordinator,
        global_step=facts.global_step,
        score=facts.score,
        history=history.kept,
        orphans=history.orphans,
        directory=None if directory is None else str(directory),
        needs_consolidation=needs_consolidation(handler.to_save),
        knows_writers=stored is None or stored.knows_writers(backend),
        removal=int(RemovalOrder.BEFORE if history.unseen_handler is saver else removal_order_of(saver)),
        replaces_file=replaces_file(saver),
        handler=None if directory is None else own.identity,
        run=run.as_json(),
        number=run_of(outermost).num_saved,
        data=position_of(trainer),
        former=history.former,
        digest=history.digest,
        is_mid_epoch=is_mid_epoch(handler, facts, trainer, is_early=is_early),
        is_final=is_forced or (is_nested and outermost.last_event_name in _RUN_ENDS),
        is_saved=history.saved_at.is_present(engines[-1]) or history.is_saved_before(outermost),
        step=step if isinstance(step, int | float) else outermost.state.iteration,
        time_s=whole_minutes(time.time()) if has_time else None,
    )
