"""Which checkpoints a handler keeps: pure functions over its history of priorities and file names."""

import bisect
import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from distckpt._values import is_nan

Entry = tuple[int | float, str]
"""A kept checkpoint: its priority (higher is better) and its file name."""

_MAX_CHANGED_NAMES = 256


def digest_of(value: object) -> str:
    """Return a digest of a plain value."""
    return hashlib.blake2b(repr(value).encode(errors="surrogatepass"), digest_size=16).hexdigest()


class History(Sequence[Entry]):
    """The kept checkpoints, lowest priority first. It does not change.

    Adding a checkpoint to a history of thousands copies references, and does not sort or hash the others again.

    Args:
        entries: the kept checkpoints.

    Attributes:
        entries: the same.
        digest: text. Histories with equal digests are equal. Equal ones have equal digests if the same was added to
            equal ones, and removed.

    Example:
        >>> history = History([(1, "a.pt"), (3, "c.pt")])
        >>> history.replace({"a.pt"}, (2, "b.pt")).entries
        ((2, 'b.pt'), (3, 'c.pt'))
    """

    __slots__ = ("_are_changed", "_is_regular", "_names", "digest", "entries")

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        found = tuple(entries)
        keys, names = [_sort_key(entry) for entry in found], frozenset(name for _, name in found)
        # A history that a user loads may be in another order, or hold a name twice.
        is_regular = keys == sorted(keys) and len(names) == len(found)
        self._fill(found, digest_of(found), names, {}, is_regular=is_regular)

    def _fill(
        self,
        entries: tuple[Entry, ...],
        digest: str,
        names: frozenset[str],
        are_changed: dict[str, bool],
        *,
        is_regular: bool,
    ) -> None:
        self.entries, self.digest, self._is_regular = entries, digest, is_regular
        self._names, self._are_changed = names, are_changed  # True for a name that was added to `names` since

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Entry, ...]: ...
    def __getitem__(self, index: int | slice) -> Entry | tuple[Entry, ...]:
        return self.entries[index]

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def has_name(self, name: str) -> bool:
        """Return True if a checkpoint of that file name is kept."""
        return self._are_changed.get(name, name in self._names)

    def from_highest(self, priority: float) -> Iterator[Entry]:
        """Return the checkpoints from the highest down; those below `priority` may be missing."""
        for entry in reversed(self.entries):
            if self._is_regular and entry[0] < priority:
                return
            yield entry

    def replace(self, removed: Collection[str], added: Entry | None = None) -> "History":
        """Return the history without the `removed` names, and with an added checkpoint.

        Among equal priorities the added checkpoint counts as the highest one.
        """
        entries, num_removed, num_lowest = self.entries, sum(map(self.has_name, removed)), 0
        while num_lowest < num_removed and entries[num_lowest][1] in removed:
            num_lowest += 1
        if num_lowest == num_removed and self._is_regular:
            entries = entries[num_lowest:]
        else:
            entries = tuple(entry for entry in entries if entry[1] not in removed)
        if not self._is_regular:
            return History(entries if added is None else sorted([*entries, added], key=_sort_key))
        if added is not None:
            at = bisect.bisect_right(entries, _sort_key(added), key=_sort_key)
            entries = entries[:at] + (added,) + entries[at:]  # noqa: RUF005 - a third of the time
        names, are_changed = self._names, {**self._are_changed, **dict.fromkeys(removed, False)}
        if added is not None:
            are_changed[added[1]] = True
        if len(are_changed) > _MAX_CHANGED_NAMES:
            names, are_changed = frozenset(name for _, name in entries), {}
        digest = digest_of((self.digest, sorted(removed), added))
        made = History.__new__(History)
        made._fill(entries, digest, names, are_changed, is_regular=True)  # noqa: SLF001 - an object of this class
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Retained:
    """The history after a checkpoint was added.

    Attributes:
        kept: the new history. It holds the new checkpoint.
        evicted: the names of the files to remove. The new checkpoint's name is never among them.
    """

    kept: History
    evicted: tuple[str, ...]


def wants(history: Sequence[Entry], priority: float, *, n_saved: int | None, greater_or_equal: bool) -> bool:
    """Return True if a checkpoint of `priority` is to be saved. NaN is never saved.

    Args:
        history: the kept checkpoints, lowest priority first.
        priority: the new checkpoint's priority.
        n_saved: the number of checkpoints to keep; None keeps all.
        greater_or_equal: whether a checkpoint of equal priority replaces the lowest one.

    Example:
        >>> wants([(0.5, "a.pt")], 0.5, n_saved=1, greater_or_equal=False)
        False
    """
    if is_nan(priority):
        return False
    if n_saved is None or len(history) < n_saved:
        return True
    lowest = history[0][0]
    if is_nan(lowest):
        return True
    return priority >= lowest if greater_or_equal else priority > lowest


def admit(history: Iterable[Entry], entry: Entry, *, n_saved: int | None) -> Retained:
    """Add `entry` to `history`, and choose the files to evict.

    An entry of the same file name is replaced, because its file was overwritten; nothing else is evicted then. Among
    equal priorities the newer entry counts as the higher one.

    Args:
        history: the kept checkpoints, lowest priority first.
        entry: the new checkpoint.
        n_saved: the number of checkpoints to keep; None keeps all.

    Example:
        >>> admit([(1, "a.pt"), (2, "b.pt")], (3, "c.pt"), n_saved=2).evicted
        ('a.pt',)
    """
    kept = history if isinstance(history, History) else History(history)
    if kept.has_name(entry[1]):
        kept = kept.replace([entry[1]])
    num_evicted = 0 if n_saved is None else max(0, len(kept) - n_saved + 1)
    evicted = tuple(name for _, name in kept[:num_evicted])
    return Retained(kept=kept.replace(evicted, entry), evicted=evicted)


def _sort_key(entry: Entry) -> tuple[bool, int | float]:
    # Histories of older releases may hold NaN: it sorts before all numbers, and is evicted first.
    return (False, 0) if is_nan(entry[0]) else (True, entry[0])


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
    epoch, under the epoch's number, ranks half a step lower, so that the epoch's end replaces it.

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
    priority = global_step - 0.5 if is_mid_epoch else global_step
    if not any(value >= priority for value, name in history.from_highest(priority) if name in former):
        return priority, history
    lowered = [(-math.inf, name) for _, name in history if name in former]
    return priority, History([*lowered, *((value, name) for value, name in history if name not in former)])
