"""The policies that say which checkpoints are kept: pure functions over the files of one handler.

A file is kept if any policy wants it. :func:`explain` is the definition; the command line uses it as it is, and
:func:`distckpt.policy.retention.admit` finds the same files without looking at each.

``LastN`` and ``BestN`` want the files that are highest in an order. ``EveryNSteps`` and ``EveryHours`` divide steps and
time into periods, and want the first file of each: a file that they want once, they want forever.
"""

import functools
import math
import numbers
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from distckpt._values import is_nan

_HOUR_S, _MINUTE_S = 3600, 60
LATEST_S = 1e11
"""A later time is invalid."""


class SavedFile(NamedTuple):
    """What policies know of a file.

    Attributes:
        name: its name.
        priority: its score; without scores its step. NaN is no score.
        step: the step in its name, or the iteration; None if unknown.
        time_s: when it was saved, in whole minutes and in seconds since 1970; None if unknown.
    """

    name: str
    priority: int | float
    step: int | float | None = None
    time_s: float | None = None


def whole_minutes(time_s: float) -> int:
    """Return a time without the seconds of its minute.

    Ranks exchange the time of each save. Rounded times of several clocks are nearly always equal, and need no gather.
    """
    return int(time_s // _MINUTE_S) * _MINUTE_S


@dataclass(frozen=True, slots=True, repr=False)
class _Counted:
    n: int

    def __post_init__(self) -> None:
        name, number = type(self).__name__, self.n
        if not isinstance(number, numbers.Integral) or isinstance(number, bool):
            raise TypeError(f"{name} should be given an int, but given {type(number)}")
        if number < 1:
            raise ValueError(f"{name} should be given a positive int, but given {number}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.n})"


class LastN(_Counted):
    """Policy that keeps the newest `n` checkpoints.

    A handler without scores counts the checkpoints of the highest steps as the newest.

    Example:
        >>> LastN(3)
        LastN(3)
    """

    __slots__ = ()


class BestN(_Counted):
    """Policy that keeps the `n` checkpoints of the highest scores. Of equal scores the newer counts as the higher.

    Example:
        >>> BestN(2)
        BestN(2)
    """

    __slots__ = ()


class EveryNSteps(_Counted):
    """Policy that keeps the first checkpoint at or after each multiple of `n` steps.

    The step is the global step in the file name. If the name has none, it is the trainer's iteration.

    Example:
        >>> policy = EveryNSteps(100)
        >>> [policy.period_of(SavedFile("a.pt", 0, step)) for step in (90, 100, 110, 205)]
        [None, 1, 1, 2]
    """

    __slots__ = ()

    def is_unknown(self, file: SavedFile) -> bool:
        """Return True if the file's step is unknown. Such a file is kept."""
        return file.step is None or (isinstance(file.step, float) and not math.isfinite(file.step))

    def period_of(self, file: SavedFile) -> int | None:
        """Return the number of the file's period; None before the first one."""
        step = file.step or 0
        return int(step // self.n) if step >= self.n or step == 0 else None

    def describe_first(self, file: SavedFile) -> str:
        """Return why the first file of a period is kept."""
        multiple = int((file.step or 0) // self.n) * self.n
        return f"step {multiple}" if file.step == multiple else f"first from step {multiple}"

    def describe_unknown(self) -> str:
        """Return why a file is kept whose period is unknown."""
        return "its step is unknown"


@dataclass(frozen=True, slots=True, repr=False)
class EveryHours:
    """Policy that keeps the first checkpoint of each period of `hours` hours. The periods begin at midnight UTC.

    The coordinator's clock counts, in whole minutes. Periods of, for example, 5 hours are counted from the
    beginning of 1970.

    Example:
        >>> EveryHours(6), EveryHours(0.5)
        (EveryHours(6), EveryHours(0.5))
    """

    hours: float

    def __post_init__(self) -> None:
        if not isinstance(self.hours, numbers.Real) or isinstance(self.hours, bool):
            raise TypeError(f"EveryHours should be given a number of hours, but given {type(self.hours)}")
        if not (self._period_s >= _MINUTE_S and self._period_s < LATEST_S):
            msg = f"EveryHours should be given a number of hours of at least a minute, but given {self.hours}"
            raise ValueError(msg)

    def __repr__(self) -> str:
        return f"EveryHours({self.hours:g})"

    @property
    def _period_s(self) -> float:
        return float(self.hours) * _HOUR_S

    def is_unknown(self, file: SavedFile) -> bool:
        """Return True if it is unknown when the file was saved. Such a file is kept."""
        return file.time_s is None or not 0 <= file.time_s < LATEST_S

    def period_of(self, file: SavedFile) -> int:
        """Return the number of the file's period."""
        return int((file.time_s or 0.0) // self._period_s)

    def describe_first(self, file: SavedFile) -> str:
        """Return why the first file of a period is kept."""
        begin = datetime.fromtimestamp(self.period_of(file) * self._period_s, tz=UTC)
        return f"first from {begin:%Y-%m-%d %H:%M} UTC"

    def describe_unknown(self) -> str:
        """Return why a file is kept whose period is unknown."""
        return "its time is unknown"


Policy = LastN | BestN | EveryNSteps | EveryHours
"""What may be in the argument ``keep``."""
_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (LastN, BestN, EveryNSteps, EveryHours)}


def check_policies(policies: object, *, is_scored: bool) -> None:
    """Check the argument ``keep``.

    Raises:
        TypeError: it is no sequence of policies.
        ValueError: it is empty, or asks for the best checkpoints of a handler without scores.
    """
    wanted = "a list of LastN, BestN, EveryNSteps and EveryHours"
    if not isinstance(policies, Sequence) or isinstance(policies, str):
        raise TypeError(f"Argument keep should be {wanted}, but given {type(policies)}")
    for policy in policies:
        if not isinstance(policy, Policy):
            raise TypeError(f"Argument keep should be {wanted}, but given {policy!r} in it")
    if not policies:
        msg = f"Argument keep should be {wanted}, but is empty. Without it, n_saved=None keeps all checkpoints"
        raise ValueError(msg)
    if not is_scored and any(isinstance(policy, BestN) for policy in policies):
        raise ValueError("BestN in argument keep needs a score: give score_function or score_name")


def to_plain(policies: Iterable[Policy]) -> list[list[Any]]:
    """Return policies as plain JSON.

    Example:
        >>> to_plain([LastN(3), EveryHours(0.5)])
        [['LastN', 3], ['EveryHours', 0.5]]
    """
    return [
        [type(policy).__name__, float(policy.hours) if isinstance(policy, EveryHours) else int(policy.n)]
        for policy in policies
    ]


def from_plain(found: Iterable[Any]) -> tuple[Policy, ...]:
    """Return the policies from the value of :func:`to_plain`.

    Raises:
        KeyError: a policy is unknown.
        TypeError: it is something else.
        ValueError: as TypeError.
    """
    return tuple(_KINDS[name](number) for name, number in found)


@functools.lru_cache(maxsize=64)  # it may run in every iteration
def policies_of(keep: tuple[Policy, ...] | None, n_saved: int | None, *, is_scored: bool) -> tuple[Policy, ...]:
    """Return the policies of a handler; none if it keeps all checkpoints.

    The newest checkpoint is always kept, because a resume needs it: ``LastN(1)`` is added. If all policies are BestN,
    this is not needed: such a handler saves only checkpoints that are among the best, so the newest one is kept.

    Args:
        keep: the handler's argument; None for `n_saved`.
        n_saved: the number of checkpoints to keep; None keeps all.
        is_scored: whether the handler has scores.

    Example:
        >>> policies_of(None, 2, is_scored=True), policies_of((EveryNSteps(10),), 1, is_scored=False)
        ((BestN(2),), (EveryNSteps(10), LastN(1)))
    """
    if keep is None:
        return () if n_saved is None else ((BestN if is_scored else LastN)(n_saved),)
    has_newest = any(isinstance(policy, LastN) for policy in keep) or all(isinstance(policy, BestN) for policy in keep)
    return keep if has_newest else (*keep, LastN(1))


def explain(
    files: Sequence[SavedFile], policies: Iterable[Policy], *, is_scored: bool
) -> dict[str, list[tuple[Policy, str]]]:
    """Return the names of the files that policies keep, and for each name those policies with a reason in words.

    Args:
        files: the files of one handler, in the order of their saves.
        policies: the policies.
        is_scored: whether the priorities are scores.

    Example:
        >>> files = [SavedFile(f"{step}.pt", step, step) for step in range(10, 60, 10)]
        >>> for name, reasons in explain(files, [LastN(2), EveryNSteps(20)], is_scored=False).items():
        ...     print(name, *reasons)
        50.pt (LastN(2), 'newest')
        40.pt (LastN(2), '2nd newest') (EveryNSteps(20), 'step 40')
        20.pt (EveryNSteps(20), 'step 20')
    """
    kept: dict[str, list[tuple[Policy, str]]] = {}
    ranked = sorted((file for file in files if not is_nan(file.priority)), key=lambda file: file.priority)
    for policy in policies:
        if isinstance(policy, BestN | LastN):
            order = ranked if isinstance(policy, BestN) or not is_scored else files
            for place, file in enumerate(reversed(order[-policy.n :]), start=1):
                kept.setdefault(file.name, []).append((policy, describe_place(policy, place)))
        else:
            for file, reason in firsts(files, policy):
                kept.setdefault(file.name, []).append((policy, reason))
    return kept


def firsts(files: Iterable[SavedFile], policy: EveryNSteps | EveryHours) -> Iterator[tuple[SavedFile, str]]:
    """Yield the files that a policy keeps, in the order of their saves, and why."""
    seen = set[int | None]([None])
    for file in files:
        if policy.is_unknown(file):
            yield file, policy.describe_unknown()
        elif (period := policy.period_of(file)) not in seen:
            seen.add(period)
            yield file, policy.describe_first(file)


def describe_place(policy: LastN | BestN, place: int) -> str:
    """Return why a file is kept that is at a place, from 1, in the order of a policy."""
    what = "best" if isinstance(policy, BestN) else "newest"
    return what if place == 1 else f"{ordinal(place)} {what}"


def ordinal(number: int) -> str:
    """Return an ordinal number.

    Example:
        >>> [ordinal(number) for number in (1, 2, 3, 4, 11, 22, 113)]
        ['1st', '2nd', '3rd', '4th', '11th', '22nd', '113th']
    """
    is_teen = number % 100 // 10 == 1
    return f"{number}{'th' if is_teen else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"
