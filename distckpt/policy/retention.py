"""Which checkpoints a handler keeps: pure functions over its history of priorities and file names."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from distckpt._values import is_nan

Entry = tuple[int | float, str]
"""A kept checkpoint: its priority (higher is better) and its file name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retained:
    """The history after a checkpoint was added.

    Attributes:
        kept: the new history, lowest priority first. It holds the new checkpoint.
        evicted: the names of the files to remove. The new checkpoint's name is never among them.
    """

    kept: tuple[Entry, ...]
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


def admit(history: Sequence[Entry], entry: Entry, *, n_saved: int | None) -> Retained:
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
    kept = [old for old in history if old[1] != entry[1]]
    num_evicted = 0 if n_saved is None else max(0, len(kept) - n_saved + 1)
    evicted = tuple(name for _, name in kept[:num_evicted])
    return Retained(kept=tuple(sorted([*kept[num_evicted:], entry], key=_sort_key)), evicted=evicted)


def _sort_key(entry: Entry) -> tuple[bool, int | float]:
    # Histories of older releases may hold NaN: it sorts before all numbers, and is evicted first.
    return (False, 0) if is_nan(entry[0]) else (True, entry[0])


def rank_candidate(
    history: Sequence[Entry],
    *,
    score: float | None,
    global_step: Any,
    is_mid_epoch: bool,
    former: Collection[str],
) -> tuple[int | float, Sequence[Entry]]:
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
        >>> history = [(20, "a.pt"), (30, "b.pt")]
        >>> rank_candidate(history, score=None, global_step=3, is_mid_epoch=False, former=["a.pt", "b.pt"])
        (3, ((-inf, 'a.pt'), (-inf, 'b.pt')))
    """
    if score is not None:
        return score, history
    priority = global_step - 0.5 if is_mid_epoch else global_step
    if not any(value >= priority for value, name in history if name in former):
        return priority, history
    lowered = [(-math.inf, name) for _, name in history if name in former]
    return priority, (*lowered, *((value, name) for value, name in history if name not in former))
