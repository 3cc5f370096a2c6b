"""The log's line about a save: what was written, how long it took, what it replaced and why. Rank-local."""

import logging
import os
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from distckpt._messages import log_level
from distckpt.policy.decision import AgreedSave, SaveDecision

__all__ = ["SaveLog"]

_logger = logging.getLogger(__name__)


class SaveLog:
    """Times a save from its beginning, and logs one line about it once it is committed: at INFO on the coordinator."""

    def __init__(self) -> None:
        self._begin_s = time.monotonic()
        self._stall_s: float | None = None
        self._durable_s: float | None = None

    def training_goes_on(self) -> None:
        """Take the time: from here on the save goes on beside training."""
        self._stall_s = time.monotonic() - self._begin_s

    def committed(self, at_s: float | None = None) -> float:
        """Take the time, and return it in seconds since the beginning.

        Args:
            at_s: when the file became durable, on the monotonic clock, in seconds; None for now.
        """
        self._durable_s = (time.monotonic() if at_s is None else at_s) - self._begin_s
        return self._durable_s

    def write(
        self, rank: int, agreed: AgreedSave, *, n_saved: int | None, score_name: str | None, left: Collection[str]
    ) -> None:
        """Log it.

        Args:
            rank: this rank.
            agreed: what was saved; it holds a decision.
            n_saved: how many are kept; None for all.
            score_name: the score's name; None for ``score``.
            left: evicted files that are still there; another message says why.
        """
        decision, level = agreed.decision, log_level(rank, {agreed.coordinator}, logging.INFO)
        if decision is None or not _logger.isEnabledFor(level):
            return
        now_s = time.monotonic() - self._begin_s
        stall_s, durable_s = (now_s if one is None else one for one in (self._stall_s, self._durable_s))
        path = decision.filename if agreed.directory is None else str(Path(agreed.directory, decision.filename))
        size = "" if agreed.directory is None else _size_of(path)
        line = f"saved {path}: {size}stall {stall_s:.3f} s, durable after {durable_s:.3f} s"
        removed = [name for name in decision.evicted if name not in left]
        replaced = _replaced(agreed, decision, removed, n_saved=n_saved, score_name=score_name)
        _logger.log(level, "Checkpoint: %s", "; ".join([line, *replaced]))


def _size_of(path: str) -> str:
    try:
        return f"{os.stat(path).st_size} bytes, "  # noqa: PTH116 - a name on the coordinator's disk, as it stands
    except OSError:
        return ""


def _replaced(
    agreed: AgreedSave, decision: SaveDecision, removed: Sequence[str], *, n_saved: int | None, score_name: str | None
) -> list[str]:
    """Say of each older checkpoint that goes why it does."""
    what = "step" if agreed.score is None else score_name or "score"
    before = {name: priority for priority, name in agreed.history}
    reasons = []
    if decision.filename in before:
        reasons.append(f"replaced the file of that name ({what} {before[decision.filename]})")
    for name in removed:
        if name in before:
            reasons.append(f"evicted {name} ({what} {before[name]}): n_saved={n_saved}")
        else:
            reasons.append(f"removed {name}, which an earlier save had to leave")
    return reasons
