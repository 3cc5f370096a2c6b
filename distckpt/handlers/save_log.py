"""The log lines about saves, and about iterations that are not saved. Rank-local."""

import logging
import os
import time
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ignite.engine import Engine

from distckpt._messages import log_level
from distckpt._values import is_nan
from distckpt.backends.detect import current
from distckpt.handlers.checkpoint_history import CheckpointHistory, RunIteration
from distckpt.handlers.save_intent import Settings, coordinator_of, policy_of
from distckpt.policy.decision import AgreedSave, SavePolicy
from distckpt.policy.naming import describe_handler
from distckpt.policy.retention import find_rival

_logger = logging.getLogger(__name__)
_DIGITS = 6


class SkipLog:
    """Logs and warns of what a Checkpoint does not save, without repetition."""

    def __init__(self) -> None:
        self._last = (RunIteration(), "")
        self._warned: set[str] = set()

    def refused(
        self, handler: Settings, history: CheckpointHistory, engine: Engine, score: float | None, step: Any
    ) -> None:
        """All ranks. Log that the priority is too low to save."""
        if is_nan(score) or (score is None and is_nan(step)):
            self.write(handler, engine, f"the {'step' if score is None else 'score'} is NaN")
        elif score is None and not history.saved_at.is_present(engine):
            policies = policy_of(handler).policies(is_scored=False)
            step, name = find_rival(history.kept, policies, is_scored=False) or history.kept[0]
            kept = "those kept" if step == history.kept[0][0] else "the newest"
            reason = f"its step is not above that of {name}, {step}, the lowest of {kept}"
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
    """Measures a save from construction on, and logs one line when it is committed: at INFO on the coordinator.

    Attributes:
        begin_at_s: wall time of the beginning, in seconds since 1970.
    """

    def __init__(self) -> None:
        self.begin_at_s = time.time()
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

    def timings(self) -> tuple[float, float]:
        """Return the seconds that training stood still, and those until the commit; both end now at the latest."""
        now_s = time.monotonic() - self._begin_s
        self._stall_s = now_s if self._stall_s is None else self._stall_s
        return self._stall_s, now_s if self._durable_s is None else self._durable_s

    def facts(self, agreed: AgreedSave, orphans: Collection[str]) -> dict[str, Any]:
        """Return what the record of events says of the committed save. `orphans`: see :meth:`write`."""
        intent, decision, (stall_s, durable_s) = agreed.intent, agreed.decision, self.timings()
        filename = "" if decision is None else decision.filename
        return {
            "at_s": self.begin_at_s,
            "run": None if intent.run is None else intent.run["id"],
            "file": filename,
            "handler": None if intent.handler is None else describe_handler(intent.handler),
            "score": agreed.score,
            "num_bytes": _size_of(str(Path(intent.directory or "", filename))),
            "stall_s": round(stall_s, _DIGITS),
            "durable_s": round(durable_s, _DIGITS),
            "removed": [name for name in (() if decision is None else decision.evicted) if name not in orphans],
        }

    def write(self, rank: int, agreed: AgreedSave, policy: SavePolicy, orphans: Collection[str]) -> None:
        """Log the line. `orphans` are evicted files that could not be removed; another message gives the reason."""
        decision, level = agreed.decision, log_level(rank, {agreed.coordinator}, logging.INFO)
        if decision is None or not _logger.isEnabledFor(level):
            return
        stall_s, durable_s = self.timings()
        directory = agreed.intent.directory
        path = decision.filename if directory is None else str(Path(directory, decision.filename))
        num_bytes = None if directory is None else _size_of(path)
        size = "" if num_bytes is None else f"{num_bytes} bytes, "
        clauses = [f"saved {path}: {size}stall {stall_s:.3f} s, durable after {durable_s:.3f} s"]
        if policy.keep is not None and decision.reasons:
            clauses.append(f"kept as {', '.join(decision.reasons)}")
        ranked_by = "step" if agreed.score is None else policy.score_name or "score"
        named = {decision.filename, *decision.evicted}
        before = {name: priority for priority, name in agreed.intent.history if name in named}
        if decision.filename in before:
            clauses.append(f"replaced the file of that name ({ranked_by} {before[decision.filename]})")
        wanted_by = ", ".join(map(str, policy.policies(is_scored=agreed.score is not None)))
        why = f"n_saved={policy.n_saved}" if policy.keep is None else f"not kept by {wanted_by}"
        for name in decision.evicted:
            if name in orphans:
                continue
            if name in before:
                clauses.append(f"evicted {name} ({ranked_by} {before[name]}): {why}")
            else:
                clauses.append(f"removed {name}, which an earlier save had to leave")
        _logger.log(level, "Checkpoint: %s", "; ".join(clauses))


def _size_of(path: str) -> int | None:
    try:
        return os.stat(path).st_size  # noqa: PTH116 - a name on the coordinator's disk, unchanged
    except OSError:
        return None
