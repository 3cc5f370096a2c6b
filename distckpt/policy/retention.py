"""Which checkpoints a handler saves, keeps and evicts: pure functions over its history and its policies."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from distckpt._values import is_nan
from distckpt.policy.history import Entry, History, PolicyKey, Settled
from distckpt.policy.policies import BestN, EveryHours, EveryNSteps, LastN, Policy, SavedFile, describe_place, firsts


@dataclass(frozen=True, slots=True, kw_only=True)
class Retained:
    """The history after a checkpoint was added.

    Attributes:
        kept: the new history. It holds the new checkpoint.
        evicted: the names of the files to remove. The new checkpoint's name is never among them.
        reasons: why policies keep the new checkpoint, in words.
    """

    kept: History
    evicted: tuple[str, ...]
    reasons: tuple[str, ...]


def wants(
    history: Sequence[Entry],
    priority: float,
    *,
    policies: Sequence[Policy],
    is_scored: bool,
    greater_or_equal: bool,
) -> bool:
    """Return True if a checkpoint of `priority` is to be saved. NaN is never saved.

    If priorities are scores, and a policy keeps the newest checkpoint whatever its score, every checkpoint is saved.

    Args:
        history: the kept checkpoints, lowest priority first.
        priority: the new checkpoint's priority.
        policies: by which checkpoints are kept; none keeps all. See :func:`~distckpt.policy.policies.policies_of`.
        is_scored: whether priorities are scores; else they are steps.
        greater_or_equal: whether a checkpoint is saved whose priority equals that of the one to replace.

    Example:
        >>> wants([(0.5, "a.pt")], 0.5, policies=[BestN(1)], is_scored=True, greater_or_equal=False)
        False
    """
    if is_nan(priority):
        return False
    if not policies or (is_scored and any(isinstance(policy, LastN) for policy in policies)):
        return True
    rival = find_rival(history, policies, is_scored=is_scored)
    if rival is None or is_nan(rival[0]):
        return True
    return priority >= rival[0] if greater_or_equal else priority > rival[0]


def find_rival(history: Sequence[Entry], policies: Iterable[Policy], *, is_scored: bool) -> Entry | None:
    """Return the checkpoint that a new one has to rank above to be saved; None if there is room for it."""
    limit = _num_ranked(policies, is_scored=is_scored)
    return history[-limit] if 0 < limit <= len(history) else None


def _num_ranked(policies: Iterable[Policy], *, is_scored: bool) -> int:
    """Return the number of checkpoints that are kept for their priority."""
    kind = BestN if is_scored else LastN
    return max((policy.n for policy in policies if isinstance(policy, kind)), default=0)


def admit(history: Iterable[Entry], added: SavedFile, *, policies: Sequence[Policy], is_scored: bool) -> Retained:
    """Add a checkpoint to `history`, and choose the files to evict: those that no policy keeps.

    An entry of the same file name is replaced, because its file was overwritten. Among equal priorities the newer entry
    counts as the higher one.

    Args:
        history: the kept checkpoints, lowest priority first.
        added: the new checkpoint.
        policies: by which checkpoints are kept; none keeps all.
        is_scored: whether priorities are scores; else they are steps.

    Example:
        >>> history = [(1, "a.pt"), (2, "b.pt")]
        >>> admit(history, SavedFile("c.pt", 3), policies=[LastN(2)], is_scored=False).evicted
        ('a.pt',)
    """
    before = history if isinstance(history, History) else History(history)
    if before.has_name(added.name):
        before = before.replace([added.name])
    if not policies:
        return Retained(kept=before.replace((), added), evicted=(), reasons=())
    num_ranked, rival = _num_ranked(policies, is_scored=is_scored), find_rival(before, policies, is_scored=is_scored)
    # Without scores the new checkpoint is the newest even if its step is not above the others'.
    is_ranked = num_ranked > 0 and (not is_scored or rival is None or not added.priority < rival[0])
    first = max(0, len(before) - (num_ranked - is_ranked))  # this one and those above are kept for their priorities
    first_of: list[Policy] = []
    if all(isinstance(policy, BestN if is_scored else LastN) for policy in policies):
        evicted = tuple(name for _, name in before[:first])
        kept = before.replace(evicted, added)
    else:
        kept, key = before.replace((), added), (tuple(policies), is_scored)
        settled, first_of = _settle_added(before.settled, added, key) or _settle(kept, added, key)
        wanted = {added.name, *settled.recent, *(name for _, name in before[first:])}
        evicted = tuple(name for name in settled.loose if name not in wanted)
        kept = kept.replace(evicted) if evicted else kept
        kept.settled = settled._replace(loose=tuple(name for name in settled.loose if name in wanted))
    return Retained(kept=kept, evicted=evicted, reasons=_reasons(before, added, policies, first_of))


def _settle(history: History, added: SavedFile, key: PolicyKey) -> tuple[Settled, list[Policy]]:
    """Look at all files. Return what the next decision needs, and the policies that have `added` first in a period."""
    files, kept, periods, first_of = history.files, set[str](), list[int | None](), list[Policy]()
    for policy in filter(_has_periods, key[0]):
        names = {file.name for file, _ in firsts(files, policy)}
        numbers = [policy.period_of(file) for file in files if not policy.is_unknown(file)]
        periods.append(max((number for number in numbers if number is not None), default=None))
        first_of += [policy] if added.name in names else []
        kept |= names
    settled = Settled(
        key=key,
        loose=tuple(file.name for file in files if file.name not in kept),
        recent=_newest([file.name for file in files], key),
        periods=tuple(periods),
    )
    return settled, first_of


def _settle_added(settled: Settled | None, added: SavedFile, key: PolicyKey) -> tuple[Settled, list[Policy]] | None:
    """Return the result of :func:`_settle` from what the last decision left; None if all files have to be looked at."""
    if settled is None or settled.key != key:
        return None
    periods, first_of = list[int | None](), list[Policy]()
    for policy, last in zip(filter(_has_periods, key[0]), settled.periods, strict=True):
        number = None if policy.is_unknown(added) else policy.period_of(added)
        if number is not None and last is not None and number < last:
            return None
        if policy.is_unknown(added) or (number is not None and number != last):
            first_of.append(policy)
        periods.append(last if number is None else number)
    settled = Settled(
        key=key,
        loose=settled.loose if first_of else (*settled.loose, added.name),
        recent=_newest((*settled.recent, added.name), key),
        periods=tuple(periods),
    )
    return settled, first_of


def _has_periods(policy: Policy) -> TypeGuard[EveryNSteps | EveryHours]:
    return isinstance(policy, EveryNSteps | EveryHours)


def _newest(names: Sequence[str], key: PolicyKey) -> tuple[str, ...]:
    """Return those of `names`, in the order of the saves, that LastN keeps; none if priorities say which they are."""
    policies, is_scored = key
    num = max((policy.n for policy in policies if isinstance(policy, LastN)), default=0) if is_scored else 0
    return tuple(names[max(0, len(names) - num) :])


def _reasons(
    before: History, added: SavedFile, policies: Iterable[Policy], first_of: Collection[Policy]
) -> tuple[str, ...]:
    """Return why policies keep the new checkpoint, in words."""
    reasons = []
    for policy in policies:
        if isinstance(policy, LastN):
            reasons.append(describe_place(policy, 1))
        elif isinstance(policy, BestN):
            place = 1 + sum(value > added.priority for value, _ in before[max(0, len(before) - policy.n) :])
            reasons += [describe_place(policy, place)] if place <= policy.n else []
        elif policy in first_of:
            reasons.append(policy.describe_unknown() if policy.is_unknown(added) else policy.describe_first(added))
    return tuple(dict.fromkeys(reasons))


def below_epoch_end(step: float) -> int | float:
    """Return the priority of a file that was saved under an epoch's number before the epoch's end.

    It is above all lower steps, and below the epoch's end, which then replaces the file.

    Example:
        >>> below_epoch_end(3), 2.75 < below_epoch_end(3.0) < 3.0  # floats may be parts of epochs
        (2.5, True)
    """
    return step - 0.5 if isinstance(step, int) else math.nextafter(step, -math.inf)


def rank_candidate(
    history: History,
    *,
    score: float | None,
    global_step: Any,
    is_mid_epoch: bool,
    former: Collection[str],
) -> tuple[int | float, History]:
    """Return the priority of a checkpoint to save, and the history that it is compared with.

    The priority is the score, if there is one, else the global step. A checkpoint that is saved in the middle of an
    epoch, under the epoch's number, ranks below the epoch's end, which replaces it: see :func:`below_epoch_end`.

    Files of former runs are older than the new checkpoint. If their steps say otherwise, the runs count steps in
    different units: then the files of former runs rank below all others.

    Args:
        history: the kept checkpoints, lowest priority first.
        score: the new checkpoint's score; None if checkpoints are ranked by step.
        global_step: the new checkpoint's step.
        is_mid_epoch: whether the step is the number of an epoch that is not over.
        former: the names in `history` that former runs saved.

    Example:
        >>> history = History([(20, "a.pt"), (30, "b.pt")])
        >>> _, ranked = rank_candidate(history, score=None, global_step=3, is_mid_epoch=False, former=["a.pt", "b.pt"])
        >>> ranked.entries
        ((-inf, 'a.pt'), (-inf, 'b.pt'))
    """
    if score is not None:
        return score, history
    priority = below_epoch_end(global_step) if is_mid_epoch else global_step
    if not any(value >= priority for value, name in history.from_highest(priority) if name in former):
        return priority, history
    lowered = [(-math.inf, name) for _, name in history if name in former]
    others = ((value, name) for value, name in history if name not in former)
    return priority, history.with_priorities([*lowered, *others])
