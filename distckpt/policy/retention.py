"""Which checkpoints to keep, and because of what: pure functions over a saver's history.

Owns the order of checkpoints and the choice of what a new one replaces. Must not know how checkpoints are
named, stored or removed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Entry", "Retained", "admit", "wants"]

Entry = tuple[int | float, str]
"""One kept checkpoint: its priority (higher is better) and its file name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retained:
    """What a saver keeps after a new checkpoint was admitted.

    Attributes:
        kept: the new history, lowest priority first; the new checkpoint is among it.
        evicted: file names that lost their place. The new checkpoint's own name is never among them.
    """

    kept: tuple[Entry, ...]
    evicted: tuple[str, ...]


def wants(history: Sequence[Entry], priority: float, *, n_saved: int | None, greater_or_equal: bool) -> bool:
    """Tell whether a checkpoint of `priority` deserves to be saved.

    Args:
        history: what is kept now, lowest priority first.
        priority: of the candidate. NaN never deserves a place: it is not better than anything.
        n_saved: how many may be kept; ``None`` for all.
        greater_or_equal: whether a tie with the lowest one replaces it.

    Example:
        >>> wants([(0.5, "a.pt")], 0.5, n_saved=1, greater_or_equal=False)
        False
    """
    if _is_nan(priority):
        return False
    if n_saved is None or len(history) < n_saved:
        return True
    lowest = history[0][0]
    if _is_nan(lowest):
        return True
    return priority >= lowest if greater_or_equal else priority > lowest


def admit(history: Sequence[Entry], entry: Entry, *, n_saved: int | None) -> Retained:
    """Add `entry` to `history` and say what has to go.

    An entry of the same file name is replaced (its file was overwritten) and then nothing else goes.
    Among equal priorities the newer one counts as the higher.

    Args:
        history: what is kept now, lowest priority first.
        entry: the checkpoint that was committed.
        n_saved: how many may be kept; ``None`` for all.

    Example:
        >>> admit([(1, "a.pt"), (2, "b.pt")], (3, "c.pt"), n_saved=2).evicted
        ('a.pt',)
    """
    kept = [old for old in history if old[1] != entry[1]]
    evicted: list[str] = []
    if n_saved is not None:
        while len(kept) >= n_saved:
            evicted.append(kept.pop(0)[1])
    # A NaN can only come from a history that an older release wrote: it goes first, before all numbers.
    kept = sorted([*kept, entry], key=_order)
    return Retained(kept=tuple(kept), evicted=tuple(evicted))


def _order(entry: Entry) -> tuple[bool, int | float]:
    missing = _is_nan(entry[0])
    return (not missing, 0 if missing else entry[0])


def _is_nan(priority: float) -> bool:
    return isinstance(priority, float) and math.isnan(priority)  # an int may be beyond the range of floats
