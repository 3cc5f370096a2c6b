"""The log lines about saves, and about iterations that are not saved. Rank-local."""

import logging
import os
import time
import warnings
from collections.abc import Collection
from pathlib import Path

from ignite.engine import Engine

from distckpt._messages import log_level
from distckpt._values import is_nan
from distckpt.backends.detect import current
from distckpt.handlers.checkpoint_history import CheckpointHistory, RunIteration
from distckpt.handlers.save_intent import Settings, coordinator_of
from distckpt.policy.decision import AgreedSave, SavePolicy

_logger = logging.getLogger(__name__)


class SkipLog:
    """Logs and warns of what a Checkpoint does not save, without repetition."""

    def __init__(self) -> None:
        self._last = (RunIteration(), "")
        self._warned: set[str] = set()

    def refused(self, handler: Settings, history: CheckpointHistory, engine: Engine, score: float | None) -> None:
        """All ranks. Log that the priority is too low to save."""
        if is_nan(score):
            self.write(handler, engine, "the score is NaN")
        elif score is None and not history.saved_at.is_present(engine):
            step, name = history.kept[0]
            reason = f"its step is not above that of {name}, {step}, the lowest of those kept"
            self.write(handler, engine, reason)
        else:  # usual: a score that is no better, or another event of an iteration that is saved
            self.write(handler, engine, "it is no better than what is kept", level=logging.DEBUG)

    def write(self, handler: Settings, engine: Engine, reason: str, *, level: int = logging.WARNING) -> None:
        """All ranks. Log that an iteration is not saved, once if several events of the iteration ask for a save."""
        iteration, before = self._last
        if reason == before and iteration.is_present(engine):
            return
        self._last = (RunIteration(engine), reason)
        level = log_level(current().rank, {coordinator_of(handler)}, level)
        if _logger.isEnabledFor(level):  # this may run in every iteration
            last = describe_last(handler.last_checkpoint)
            _logger.log(level, "Checkpoint: iteration %d is not saved: %s. %s", engine.state.iteration, reason, last)

    def warn_once(self, what: str, text: str) -> None:
        """Warn, unless `what` was warned of before."""
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"Checkpoint: {text} This warning appears once.", stacklevel=4)


def describe_last(last_checkpoint: str | Path | None) -> str:
    """Return a sentence about the last checkpoint."""
    return "There is no earlier checkpoint." if last_checkpoint is None else f"The last one is {last_checkpoint}."


class SaveLog:
    """Measures a save from now on, and logs one line when it is committed: at INFO on the coordinator."""

    def __init__(self) -> None:
        self._begin_s = time.monotonic()
        self._stall_s: float | None = None
        self._durable_s: float | None = None

    def training_continues(self) -> None:
        """Note the time at which training continues while the save is pending."""
        self._stall_s = time.monotonic() - self._begin_s

    def committed(self, at_s: float | None = None) -> float:
        """Note the time of the commit, on the monotonic clock; None for now. Return the seconds since the beginning."""
        self._durable_s = (time.monotonic() if at_s is None else at_s) - self._begin_s
        return self._durable_s

    def write(self, rank: int, agreed: AgreedSave, policy: SavePolicy, orphans: Collection[str]) -> None:
        """Log the line. `orphans` are evicted files that could not be removed; another message gives the reason."""
        decision, level = agreed.decision, log_level(rank, {agreed.coordinator}, logging.INFO)
        if decision is None or not _logger.isEnabledFor(level):
            return
        now_s = time.monotonic() - self._begin_s
        stall_s, durable_s = (now_s if one is None else one for one in (self._stall_s, self._durable_s))
        directory = agreed.intent.directory
        path = decision.filename if directory is None else str(Path(directory, decision.filename))
        size = "" if directory is None else _describe_size(path)
        clauses = [f"saved {path}: {size}stall {stall_s:.3f} s, durable after {durable_s:.3f} s"]
        ranked_by = "step" if agreed.score is None else policy.score_name or "score"
        named = {decision.filename, *decision.evicted}
        before = {name: priority for priority, name in agreed.intent.history if name in named}
        if decision.filename in before:
            clauses.append(f"replaced the file of that name ({ranked_by} {before[decision.filename]})")
        for name in decision.evicted:
            if name in orphans:
                continue
            if name in before:
                clauses.append(f"evicted {name} ({ranked_by} {before[name]}): n_saved={policy.n_saved}")
            else:
                clauses.append(f"removed {name}, which an earlier save had to leave")
        _logger.log(level, "Checkpoint: %s", "; ".join(clauses))


def _describe_size(path: str) -> str:
    try:
        return f"{os.stat(path).st_size} bytes, "  # noqa: PTH116 - a name on the coordinator's disk, unchanged
    except OSError:
        return ""
