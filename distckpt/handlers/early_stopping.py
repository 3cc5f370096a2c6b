"""Stop a run that no longer improves: :class:`EarlyStopping`."""

import logging
import numbers
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ignite.base.mixins import ResettableHandler, Serializable
from ignite.engine import Engine, Events

from distckpt._messages import log_level
from distckpt._values import check_timeout, is_array, is_nan, plain_score
from distckpt.backends.detect import current
from distckpt.coordination import phases
from distckpt.handlers.compat import deprecated
from distckpt.handlers.engine_votes import next_sync_point, stop_reason, stop_run
from distckpt.policy.scores import agreed_score, check_rule

# Everything a decision depends on, besides the score.
_SETTINGS = (
    "counter",
    "best_score",
    "patience",
    "threshold",
    "threshold_mode",
    "cumulative",
    "mode",
    "score_rule",
)


def _renamed_attribute(old: str, new: str) -> Any:
    """Return a property with a deprecated name for another attribute."""

    def warn() -> None:
        deprecated(f"{old} is deprecated. Please use '{new}' instead.", stacklevel=4)

    def get(self: object) -> Any:
        warn()
        return getattr(self, new)

    def set_(self: object, value: Any) -> None:
        warn()
        setattr(self, new, value)

    return property(get, set_, doc=f"Deprecated name of ``{new}``.")


class EarlyStopping(Serializable, ResettableHandler):
    """Handler that stops a run after a number of events without improvement, on every rank at the same event.

    Attach it on all ranks, usually to an evaluator. All ranks use one score and have the same state. NaN is never an
    improvement. The first score only sets the best score.

    Args:
        patience: number of events without improvement after which the run stops.
        score_function: takes the engine, returns a number.
        trainer: the engine to stop.
        threshold: a change counts as improvement if it is larger than this.
        cumulative: measure the change since the last improvement; otherwise since the best score so far.
        threshold_mode: ``"abs"``: an improvement exceeds best + threshold; ``"rel"``: best * (1 + threshold).
        mode: whether a higher (``"max"``) or a lower (``"min"``) score is better.
        min_delta: deprecated name of `threshold`.
        min_delta_mode: deprecated name of `threshold_mode`.
        cumulative_delta: deprecated name of `cumulative`.
        score_rule: combines different scores of the ranks: ``"mean"``, ``"min"``, ``"max"``, or ``"coordinator"`` for
            rank 0's. Equal scores are used as they are.
        timeout_s: seconds to wait for the other ranks; None for ``DISTCKPT_TIMEOUT_S``, or 300.

    Attributes:
        counter: events since the last improvement.
        best_score: the best score so far; None before the first.

    Raises:
        TypeError: `score_function` is not callable, or `trainer` is not an Engine.
        ValueError: an argument has a wrong value.

    Example:
        >>> trainer = Engine(lambda engine, batch: None)
        >>> evaluator = Engine(lambda engine, batch: None)
        >>> handler = EarlyStopping(patience=2, score_function=lambda engine: 0.5, trainer=trainer)
        >>> evaluator.add_event_handler(Events.COMPLETED, handler) and None
        >>> for _ in range(3):
        ...     evaluator.run([0]) and None
        >>> handler.counter, trainer.should_terminate
        (2, True)
    """

    # States from ignite before 0.5.4 lack `threshold_mode`.
    _state_dict_all_req_keys = ("counter", "best_score")

    def __init__(
        self,
        patience: int,
        score_function: Callable[[Engine], int | float],
        trainer: Engine,
        threshold: float = 0.0,
        cumulative: bool = False,
        threshold_mode: Literal["abs", "rel"] = "abs",
        mode: Literal["min", "max"] = "max",
        min_delta: float | None = None,
        min_delta_mode: Literal["abs", "rel"] | None = None,
        cumulative_delta: bool | None = None,
        *,
        score_rule: str = "mean",
        timeout_s: float | None = None,
    ) -> None:
        if min_delta is not None:
            deprecated("'min_delta' is deprecated. Please use 'threshold' instead.")
            threshold = min_delta
        if min_delta_mode is not None:
            deprecated("'min_delta_mode' is deprecated. Please use 'threshold_mode' instead.")
            threshold_mode = min_delta_mode
        if cumulative_delta is not None:
            deprecated("'cumulative_delta' is deprecated. Please use 'cumulative' instead.")
            cumulative = cumulative_delta
        _check_arguments(patience, score_function, trainer, threshold, threshold_mode, mode)
        check_timeout(timeout_s)
        self.score_rule = check_rule(score_rule)
        self.score_function = score_function
        self.patience = patience
        self.threshold = threshold
        self.threshold_mode = threshold_mode
        self.cumulative = cumulative
        self.mode = mode
        self.trainer = trainer
        self.timeout_s = timeout_s
        self.counter = 0
        self.best_score: float | None = None
        self.logger = logging.getLogger(f"{__name__}.{type(self).__name__}")
        self._handler_id = phases.HandlerId(type(self).__name__)
        self._warned = False

    def __call__(self, engine: Engine | None) -> None:
        """Collective. Count this event; stop the trainer on every rank when patience is exhausted.

        1. (all ranks) call the score function; gather the scores and the coordinator's state.
        2. (all ranks) compute the score and the new state from them, by the same arithmetic.

        Raises:
            RemoteRankError: the score function failed on a rank; raised on every rank. With one rank: its own error.
        """
        backend = current()
        point = next_sync_point(self._handler_id, backend, engine, timeout_s=self.timeout_s)("comparing the score")
        found = phases.run(backend, point, lambda: self._score_and_settings(engine), timeout_s=self.timeout_s)
        scores = [score for score, _ in found]
        # Rank 0's: a state loaded, or an argument given, on rank 0 alone applies to all ranks.
        for name, value in found[0][1].items():
            setattr(self, name, value)
        score, differed = agreed_score(scores, check_rule(self.score_rule), 0)
        if differed and not self._warned:
            self._warned = True
            warnings.warn(
                f"EarlyStopping: the ranks have different scores, {scores}; their {self.score_rule} is used, {score}. "
                "Reduce the metric over all ranks. This warning appears once.",
                stacklevel=2,
            )
        self._count(score)

    def _score_and_settings(self, engine: Engine | None) -> tuple[int | float, dict[str, Any]]:
        score = _plain(self.score_function(engine))  # type: ignore[arg-type]  # None if the caller gave None
        return score, {name: getattr(self, name) for name in _SETTINGS}

    def _count(self, score: float) -> None:
        if (self.best_score is None and not is_nan(score)) or self._is_improvement(score):
            self.best_score = score
            self.counter = 0
            return
        if not self.cumulative and not is_nan(score) and self.best_score is not None:
            better = max if self.mode == "max" else min
            self.best_score = better(score, self.best_score)
        self.counter += 1
        self.logger.debug("EarlyStopping: %i / %i", self.counter, self.patience)
        if self.counter >= self.patience:
            is_new = stop_reason(self.trainer) != "early_stop"  # an evaluation may run again before the run ends
            self.logger.log(
                log_level(current().rank, {0}) if is_new else logging.DEBUG,
                "EarlyStopping: Stop training (iteration %d: %d times no improvement; best score %s, last score %s)",
                self.trainer.state.iteration,
                self.counter,
                self.best_score,
                score,
            )
            stop_run(self.trainer, "early_stop")

    def _is_improvement(self, score: float) -> bool:
        if is_nan(score) or self.best_score is None:
            return False
        threshold = -self.threshold if self.mode == "min" else self.threshold
        limit = self.best_score + threshold if self.threshold_mode == "abs" else self.best_score * (1 + threshold)
        return score > limit if self.mode == "max" else score < limit

    def attach(
        self,
        engine: Engine,
        event: Any = Events.COMPLETED,
        reset_engine: Engine | None = None,
        reset_event: Any = Events.STARTED,
        *_args: Any,
        **_kwargs: Any,
    ) -> None:
        """Attach the handler and its reset.

        Args:
            engine: the engine whose events are counted, usually an evaluator.
            event: the event to count.
            reset_engine: the engine whose event resets the handler; None for `engine`.
            reset_event: the event that resets the handler.
        """
        engine.add_event_handler(event, self)
        (reset_engine or engine).add_event_handler(reset_event, self.reset)

    def reset(self) -> None:
        """Reset the best score and the counter."""
        self.counter = 0
        self.best_score = None

    def state_dict(self) -> "OrderedDict[str, Any]":
        """Return ``counter``, ``best_score`` and ``threshold_mode``."""
        return OrderedDict(counter=self.counter, best_score=self.best_score, threshold_mode=self.threshold_mode)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state. A state loaded on rank 0 alone applies to every rank from the next event on.

        Args:
            state_dict: the result of :meth:`state_dict`, here or in an older release of ignite.

        Raises:
            TypeError: `state_dict` is not a mapping.
            ValueError: it lacks a key.
        """
        super().load_state_dict(state_dict)
        self.counter = state_dict["counter"]
        best = state_dict["best_score"]
        self.best_score = None if best is None else _plain(best)
        self.threshold_mode = state_dict.get("threshold_mode", self.threshold_mode)

    min_delta = _renamed_attribute("min_delta", "threshold")
    min_delta_mode = _renamed_attribute("min_delta_mode", "threshold_mode")
    cumulative_delta = _renamed_attribute("cumulative_delta", "cumulative")


def _plain(score: Any) -> int | float:
    # ignite compares any value: a tensor or array of one element is a score here, though not for Checkpoint.
    return plain_score(score.item() if is_array(score) else score)


def _check_arguments(
    patience: Any, score_function: Any, trainer: Any, threshold: Any, threshold_mode: Any, mode: Any
) -> None:
    if not callable(score_function):
        raise TypeError(f"Argument score_function should be a function. Given {type(score_function)}")
    for name, value in (("patience", patience), ("threshold", threshold)):
        if not isinstance(value, numbers.Real):
            raise TypeError(f"Argument {name} should be a number. Given {type(value)}")
    if patience < 1:
        raise ValueError(f"Argument patience should be positive integer. Given {patience!r}")
    if not isinstance(trainer, Engine):
        raise TypeError(f"Argument trainer should be an instance of Engine. Given {type(trainer)}")
    if threshold < 0.0:
        raise ValueError(f"Argument threshold should not be a negative number. Given {threshold!r}")
    choices = (("threshold_mode", threshold_mode, "abs", "rel"), ("mode", mode, "min", "max"))
    for name, value, one, other in choices:
        if value not in (one, other):
            raise ValueError(f"Argument {name} should be either '{one}' or '{other}'. Given {value!r}")
