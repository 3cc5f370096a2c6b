"""The decision on a save and on what it replaces: a pure function of every rank's :class:`SaveIntent`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any

from distckpt.errors import DesyncError
from distckpt.policy import naming, policies, retention
from distckpt.policy.history import History
from distckpt.policy.policies import Policy, SavedFile
from distckpt.policy.scores import ScoreRule, agreed_score


class RemovalOrder(IntEnum):
    """When evicted files are removed. Where the ranks differ, the highest value counts."""

    NEVER = 0
    """The save handler cannot remove files."""
    AFTER = 1
    """After the new file is durable. Each name is a file of its own."""
    AFTER_KEEPING = 2
    """After the new file is durable. Two names may be the same file, so the new file is kept from removal."""
    BEFORE = 3
    """Before the new file is written. Two names may be the same file, and only the save handler knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavePolicy:
    """How a Checkpoint names its files, which of them it keeps, and which score counts.

    Attributes:
        prefix: ``filename_prefix``.
        name: the single object's key, or ``checkpoint``.
        ext: the extension, without its dot.
        pattern: the user's ``filename_pattern``; None for the default pattern.
        score_name: the score's name in the file name; None for none.
        n_saved: the number of checkpoints to keep, without `keep`; None keeps all.
        keep: the policies; None for `n_saved`.
        greater_or_equal: whether a checkpoint of equal priority replaces the lowest one.
        score_rule: which score counts when the ranks' scores differ.
    """

    prefix: str
    name: str
    ext: str
    pattern: str | None
    score_name: str | None
    n_saved: int | None
    greater_or_equal: bool
    score_rule: ScoreRule
    keep: tuple[Policy, ...] | None = None

    def filename(self, *, score: str | None, global_step: Any) -> str:
        """Return the name of a checkpoint's file.

        Args:
            score: the score as text; None if the name has no score.
            global_step: the step; None if the name has no step.

        Raises:
            KeyError: the user's pattern holds an unknown field.
        """
        pattern = self.pattern
        if pattern is None:
            pattern = naming.default_pattern(
                with_prefix=bool(self.prefix),
                with_score=score is not None,
                with_score_name=score is not None and self.score_name is not None,
                with_global_step=global_step is not None,
            )
        fields = {
            "filename_prefix": self.prefix,
            "ext": self.ext,
            "name": self.name,
            "score_name": self.score_name,
            "score": score,
            "global_step": global_step,
        }
        return naming.render(pattern, fields)

    def policies(self, *, is_scored: bool) -> tuple[Policy, ...]:
        """Return the policies by which checkpoints are kept; none keeps all."""
        return policies.policies_of(self.keep, self.n_saved, is_scored=is_scored)

    def to_plain(self) -> dict[str, Any]:
        """Return the policy as plain values."""
        keep = None if self.keep is None else policies.to_plain(self.keep)
        return {one.name: getattr(self, one.name) for one in fields(self)} | {"keep": keep}

    @classmethod
    def from_plain(cls, found: Mapping[str, Any]) -> "SavePolicy":
        """Return the policy from the value of :meth:`to_plain`."""
        keep = found["keep"]
        return cls(**{**found, "keep": None if keep is None else policies.from_plain(keep)})


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveIntent:
    """What one rank knows before the ranks decide.

    Attributes:
        policy: how files are named and kept.
        save_on_rank: the coordinator.
        global_step: the step for the file name, and for the priority if there is no score.
        score: the score; None without a score function.
        history: the kept checkpoints.
        orphans: files that an earlier save had to remove and could not.
        directory: the local directory to save into; None if there is none.
        needs_consolidation: whether some object's state is distributed over the ranks.
        knows_writers: whether this rank knows which ranks write the file.
        removal: when evicted files are removed.
        replaces_file: whether the save replaces a file of its name. Otherwise that file is removed before the save.
        handler: the handler's identity, the same in the next run; None without manifests.
        run: the run that the save belongs to, as in a manifest.
        number: the number of checkpoints that the run has saved.
        data: this rank's position in the training data, as plain JSON.
        former: the names in `history` that former runs saved.
        digest: of `history`, `orphans` and `former`, which are equal on ranks with equal digests.
        is_mid_epoch: whether the step is the number of an epoch that is not over.
        is_final: whether the run ends here, so that the state has to be saved.
        is_saved: whether the present iteration has been saved.
        step: the global step if it is a number, else the outermost engine's iteration.
        time_s: the wall time in whole minutes, in seconds since 1970; None if no policy asks for it.
    """

    policy: SavePolicy
    save_on_rank: int
    global_step: Any
    score: int | float | None
    history: History
    orphans: tuple[str, ...]
    directory: str | None = None
    needs_consolidation: bool = False
    knows_writers: bool = True
    removal: int = RemovalOrder.AFTER
    replaces_file: bool = True
    handler: Mapping[str, Any] | None = None
    run: Mapping[str, Any] | None = None
    number: int = 0
    data: Mapping[str, Any] = field(default_factory=dict)
    former: frozenset[str] = frozenset()
    digest: str = ""
    is_mid_epoch: bool = False
    is_final: bool = False
    is_saved: bool = False
    step: int | float | None = None
    time_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveDecision:
    """A save that all ranks carry out.

    Attributes:
        filename: the new checkpoint's name.
        priority: the new checkpoint's priority; higher is better.
        metadata: ``basename``, ``score_name`` and ``priority``, for the save handler.
        kept: the history after the commit.
        evicted: the files to remove.
        replaced: the file of the new checkpoint's name, if it has to be removed before the save. Else none.
        reasons: why policies keep the new checkpoint, in words.
    """

    filename: str
    priority: int | float
    metadata: Mapping[str, Any]
    kept: History
    evicted: tuple[str, ...]
    reasons: tuple[str, ...]
    replaced: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreedSave:
    """What the ranks agreed on, the same on every rank.

    Attributes:
        coordinator: the rank that decides and commits.
        intent: the coordinator's intent. All ranks take over its history and its run.
        scores: every rank's score if they differ, else None.
        score: the score that counts; None without a score function.
        decision: the save; None if nothing is saved.
        needs_consolidation: whether it is set on any rank.
        knows_writers: whether it is set on all ranks.
        removal: the highest of all ranks.
        data: every rank's position, in rank order.
    """

    coordinator: int
    intent: SaveIntent
    scores: tuple[int | float, ...] | None
    score: int | float | None
    decision: SaveDecision | None
    needs_consolidation: bool
    knows_writers: bool
    removal: int
    data: tuple[Mapping[str, Any], ...]


def decide_from(intents: Sequence[SaveIntent]) -> AgreedSave:
    """Decide what all ranks save. Equal intents give equal decisions.

    Args:
        intents: one per rank, in rank order.

    Raises:
        DesyncError: the ranks came with different handlers.
        ValueError: the ranks name different coordinators, or one that does not exist.
        KeyError: the user's pattern holds an unknown field.
    """
    coordinator = find_coordinator(intents)
    own = intents[coordinator]
    score, scores = own.score, None
    if score is not None:
        known = [score if intent.score is None else intent.score for intent in intents]
        score, differ = agreed_score(known, own.policy.score_rule, coordinator)
        scores = tuple(intent.score for intent in intents if intent.score is not None) if differ else None
    priority, history = retention.rank_candidate(
        own.history,
        score=score,
        global_step=own.global_step,
        is_mid_epoch=own.is_mid_epoch,
        former=own.former,
    )
    is_forced = own.is_final and score is None and not own.is_saved
    is_scored = score is not None
    is_saved = is_forced or retention.wants(
        own.history if own.is_saved else history,  # what was saved before replaces nothing under a lower step
        priority,
        policies=own.policy.policies(is_scored=is_scored),
        is_scored=is_scored,
        greater_or_equal=own.policy.greater_or_equal,
    )
    return AgreedSave(
        coordinator=coordinator,
        intent=own,
        scores=scores,
        score=score,
        decision=_make_decision(own, history, score, priority) if is_saved else None,
        needs_consolidation=any(intent.needs_consolidation for intent in intents),
        knows_writers=all(intent.knows_writers for intent in intents),
        removal=max(intent.removal for intent in intents),
        data=tuple(intent.data for intent in intents),
    )


def _make_decision(own: SaveIntent, history: History, score: float | None, priority: float) -> SaveDecision:
    policy = own.policy
    score_text = None if score is None else naming.format_score(score)
    filename = policy.filename(score=score_text, global_step=own.global_step)
    is_scored = score is not None
    retained = retention.admit(
        history,
        SavedFile(filename, priority, own.step, own.time_s),
        policies=policy.policies(is_scored=is_scored),
        is_scored=is_scored,
    )
    orphans = [name for name in own.orphans if name != filename and name not in retained.evicted]
    is_there = history.has_name(filename) or filename in own.orphans
    return SaveDecision(
        filename=filename,
        priority=priority,
        metadata={
            "basename": naming.basename(policy.prefix, policy.name),
            "score_name": policy.score_name,
            "priority": priority,
        },
        kept=retained.kept,
        evicted=(*retained.evicted, *orphans),
        reasons=retained.reasons,
        replaced=(filename,) if is_there and not own.replaces_file else (),
    )


def find_coordinator(intents: Sequence[SaveIntent]) -> int:
    """Return the rank that decides, if all ranks came with the same handler.

    Raises:
        DesyncError: the ranks came with different handlers.
        ValueError: the ranks name different coordinators, or one that does not exist.
    """
    _check_same_handler(intents)
    named = [intent.save_on_rank for intent in intents]
    if len(set(named)) > 1:
        raise ValueError(f"Argument save_on_rank should be the same on every rank, but is, by rank: {named}")
    if named[0] >= len(intents):
        last = len(intents) - 1
        raise ValueError(f"Argument save_on_rank should be a rank of this job (0 to {last}), but given {named[0]}")
    return named[0]


def _check_same_handler(intents: Sequence[SaveIntent]) -> None:
    # Prefix and pattern may differ: programs make them from the clock. The coordinator's values count.
    names = [(one.policy.name, one.policy.ext, one.policy.score_name, one.score is not None) for one in intents]
    if len(set(names)) > 1:
        by_rank = "; ".join(f"rank {rank}: {name}" for rank, name in enumerate(names))
        raise DesyncError(
            "The ranks came to one save with different handlers (name, extension, score's name, has a score): "
            f"{by_rank}. Handlers have to be built and attached on all ranks, in the same order."
        )
