"""What all ranks save, and what it replaces: a pure function of every rank's facts.

Owns the dataclasses that travel before a save and the arithmetic between them. No collective is issued here, and no
file touched.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from distckpt.errors import DesyncError
from distckpt.policy import naming, retention
from distckpt.policy.retention import Entry
from distckpt.policy.scores import ScoreRule, agreed_score

__all__ = [
    "Agreed",
    "NameRules",
    "RemovalOrder",
    "SaveDecision",
    "SaveIntent",
    "comparable",
    "decide_from",
    "filename_of",
    "step_priority",
]


class RemovalOrder(IntEnum):
    """When evicted files are removed. Where ranks differ, the highest counts."""

    NEVER = 0
    """The save handler removes none."""
    AFTER = 1
    """After the new one is durable: the save handler has one file for each name."""
    AFTER_KEEPING = 2
    """As before; but two names may be one file, so what was written is kept meanwhile."""
    BEFORE = 3
    """Before the new one is written: two names may be one place, and nobody else can look into it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NameRules:
    """How a saver names its files and what it keeps.

    Attributes:
        prefix: ``filename_prefix``.
        name: the single object's key, or ``checkpoint``.
        ext: the extension, without its dot.
        pattern: the user's ``filename_pattern``, if any.
        score_name: goes into the name, if given.
        n_saved: how many are kept; None for all.
        greater_or_equal: whether a tie replaces.
        score_rule: which score counts when the ranks' differ.
    """

    prefix: str
    name: str
    ext: str
    pattern: str | None
    score_name: str | None
    n_saved: int | None
    greater_or_equal: bool
    score_rule: ScoreRule


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveIntent:
    """What one rank knows before the ranks have spoken.

    Attributes:
        rules: see :class:`NameRules`.
        save_on_rank: the coordinator, as this rank was told.
        global_step: for the name and, without a score, for the priority.
        score: None when there is no score function.
        history: what this rank believes to be kept, lowest priority first.
        strays: files that should have been removed and could not be.
        directory: where this rank would save; None where that is no local directory.
        needs_consolidation: whether some object's state is spread over the ranks.
        knows_writers: whether this rank knows who writes, where ranks may write together.
        removal: see :class:`RemovalOrder`.
        handler: what names the handler's files, the same in the next run; None where its manifests do not tell.
        run: the run that the save belongs to, as a manifest has it.
        number: how many checkpoints that run has saved before.
        data: which data this rank's engine has trained, as plain JSON.
        former: those of the history that were saved before this run began or went on.
        is_begun: whether it is saved under the number of an epoch that is not over.
        is_last: whether it has to be saved, for the run ends.
        is_saved: whether this iteration has been saved already.
    """

    rules: NameRules
    save_on_rank: int
    global_step: Any
    score: int | float | None
    history: tuple[Entry, ...]
    strays: tuple[str, ...]
    directory: str | None = None
    needs_consolidation: bool = False
    knows_writers: bool = True
    removal: int = RemovalOrder.AFTER
    handler: Mapping[str, Any] | None = None
    run: Mapping[str, Any] | None = None
    number: int = 0
    data: Mapping[str, Any] = field(default_factory=dict)
    former: tuple[str, ...] = ()
    is_begun: bool = False
    is_last: bool = False
    is_saved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveDecision:
    """What all ranks do now.

    Attributes:
        filename: of the new checkpoint.
        priority: of the new checkpoint; higher is better.
        metadata: for the save handler: ``basename``, ``score_name``, ``priority``.
        kept: the history once it is committed.
        evicted: files to remove once it is committed.
    """

    filename: str
    priority: int | float
    metadata: Mapping[str, Any]
    kept: tuple[Entry, ...]
    evicted: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """What came out of step 2.

    Attributes:
        coordinator: the rank that saves.
        history: the coordinator's history, now everybody's.
        strays: the coordinator's strays.
        directory: the coordinator's directory.
        scores: every rank's score when they differed, else None.
        score: the one that counts.
        decision: None when nothing is to be saved.
        needs_consolidation: whether some object's state is spread over the ranks, as some rank says.
        know_writers: whether all ranks know who writes.
        removal: see :class:`RemovalOrder`.
        handler: the coordinator's handler, as in its intent.
        run: the coordinator's run.
        number: how many checkpoints that run has saved before.
        data: each rank's, in rank order.
        former: those of the coordinator's history that were saved before this run began or went on.
    """

    coordinator: int
    history: tuple[Entry, ...]
    strays: tuple[str, ...]
    directory: str | None
    scores: tuple[int | float, ...] | None
    score: int | float | None
    decision: SaveDecision | None
    needs_consolidation: bool = False
    know_writers: bool = True
    removal: int = RemovalOrder.AFTER
    handler: Mapping[str, Any] | None = None
    run: Mapping[str, Any] | None = None
    number: int = 0
    data: tuple[Mapping[str, Any], ...] = ()
    former: tuple[str, ...] = ()


def decide_from(intents: Sequence[SaveIntent]) -> Agreed:
    """Decide what all ranks do, from what each one knows. The same intents give the same decision.

    Args:
        intents: one a rank, in rank order.

    Raises:
        DesyncError: the ranks met in one event, but with handlers of another making.
        ValueError: the ranks name different coordinators, or one that does not exist.
        KeyError: the pattern names an unknown field.
    """
    _refuse_strangers(intents)
    coordinator = _coordinator_of(intents)
    chief = intents[coordinator]
    rules = chief.rules
    scores = [intent.score for intent in intents]
    score, differed = chief.score, False
    if score is not None:
        known = [chief.score if one is None else one for one in scores]
        score, differed = agreed_score([one for one in known if one is not None], rules.score_rule, coordinator)
    priority, history, is_forced = score, chief.history, False
    if priority is None:
        priority = step_priority(chief.global_step, is_begun=chief.is_begun)
        if not chief.is_saved:
            history, is_forced = comparable(history, chief.former, priority), chief.is_last
    decision = None
    if is_forced or retention.wants(history, priority, n_saved=rules.n_saved, greater_or_equal=rules.greater_or_equal):
        decision = _decision(chief, history, score, priority)
    return Agreed(
        coordinator=coordinator,
        history=chief.history,
        strays=chief.strays,
        directory=chief.directory,
        scores=tuple(one for one in scores if one is not None) if differed else None,
        score=score,
        decision=decision,
        needs_consolidation=any(intent.needs_consolidation for intent in intents),
        know_writers=all(intent.knows_writers for intent in intents),
        removal=max(intent.removal for intent in intents),
        handler=chief.handler,
        run=chief.run,
        number=chief.number,
        data=tuple(intent.data for intent in intents),
        former=chief.former,
    )


def filename_of(rules: NameRules, *, score: str | None, global_step: Any) -> str:
    """Return the name of a checkpoint.

    Args:
        rules: how the saver names its files.
        score: as it stands in the name; None for a name without.
        global_step: None for a name without.

    Raises:
        KeyError: the user's pattern names an unknown field.
    """
    pattern = rules.pattern
    if pattern is None:
        pattern = naming.default_pattern(
            with_prefix=bool(rules.prefix),
            with_score=score is not None,
            with_score_name=score is not None and rules.score_name is not None,
            with_global_step=global_step is not None,
        )
    fields = {
        "filename_prefix": rules.prefix,
        "ext": rules.ext,
        "name": rules.name,
        "score_name": rules.score_name,
        "score": score,
        "global_step": global_step,
    }
    return naming.render(pattern, fields)


def step_priority(global_step: Any, *, is_begun: bool) -> int | float:
    """Return the priority of what is saved under a step: half of one lower where that is an epoch that is not over."""
    priority: int | float = global_step - 0.5 if is_begun else global_step
    return priority


def comparable(history: Sequence[Entry], former: Collection[str], priority: float) -> tuple[Entry, ...]:
    """Return a history of steps as it compares with what is saved now.

    Whatever was saved before this run is older. Where its steps say otherwise, they were counted in another way: then
    all of it counts as older than everything.

    Args:
        history: lowest priority first.
        former: what of it was saved before this run.
        priority: of what is saved now.

    Example:
        >>> comparable([(20, "a.pt"), (30, "b.pt")], ["a.pt", "b.pt"], 3)
        ((-inf, 'a.pt'), (-inf, 'b.pt'))
    """
    entries = tuple((value, name) for value, name in history)
    if not any(value >= priority for value, name in entries if name in former):
        return entries
    older = tuple((-math.inf, name) for _, name in entries if name in former)
    return older + tuple(entry for entry in entries if entry[1] not in former)


def _decision(chief: SaveIntent, history: Sequence[Entry], score: float | None, priority: float) -> SaveDecision:
    rules = chief.rules
    told = None if score is None else naming.format_score(score)
    filename = filename_of(rules, score=told, global_step=chief.global_step)
    retained = retention.admit(history, (priority, filename), n_saved=rules.n_saved)
    strays = [name for name in chief.strays if name != filename and name not in retained.evicted]
    return SaveDecision(
        filename=filename,
        priority=priority,
        metadata={
            "basename": naming.basename(rules.prefix, rules.name),
            "score_name": rules.score_name,
            "priority": priority,
        },
        kept=retained.kept,
        evicted=(*retained.evicted, *strays),
    )


def _coordinator_of(intents: Sequence[SaveIntent]) -> int:
    named = [intent.save_on_rank for intent in intents]
    if len(set(named)) > 1:
        msg = f"Argument save_on_rank should be the same on every rank, but is, by rank: {named}"
        raise ValueError(msg)
    if named[0] >= len(intents):
        last = len(intents) - 1
        msg = f"Argument save_on_rank should be a rank of this job (0 to {last}), but given {named[0]}"
        raise ValueError(msg)
    return named[0]


def _refuse_strangers(intents: Sequence[SaveIntent]) -> None:
    """Raise where the ranks met in one event, but with handlers of another making."""
    # Not prefix and pattern: a program may make them from its clock, and the coordinator's count.
    names = [(one.rules.name, one.rules.ext, one.rules.score_name, one.score is not None) for one in intents]
    if len(set(names)) > 1:
        told = "; ".join(f"rank {rank}: {name}" for rank, name in enumerate(names))
        msg = (
            "The ranks came to one save with different handlers (name, extension, score's name, has a score): "
            f"{told}. Handlers have to be built and attached on all ranks, in the same order."
        )
        raise DesyncError(msg)
