"""Scores: the default score function, and the one score that counts when the ranks' scores differ."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Literal, get_args

from distckpt._values import is_nan

ScoreRule = Literal["mean", "min", "max", "coordinator"]


def get_default_score_fn(metric_name: str, score_sign: float = 1.0) -> Callable[[Any], float]:
    """Return a score function that reads a metric of the engine that it is called with.

    Args:
        metric_name: the key in ``engine.state.metrics``.
        score_sign: 1.0, or -1.0 for a metric of which smaller values are better.

    Raises:
        ValueError: `score_sign` is neither 1.0 nor -1.0.

    Example:
        >>> from ignite.engine import Engine
        >>> engine = Engine(lambda engine, batch: None)
        >>> engine.state.metrics["loss"] = 0.25
        >>> get_default_score_fn("loss", -1.0)(engine)
        -0.25
    """
    if score_sign not in (1.0, -1.0):
        raise ValueError("Argument score_sign should be 1 or -1")
    return lambda engine: score_sign * engine.state.metrics[metric_name]


def check_rule(rule: str) -> ScoreRule:
    """Return `rule` if it is a :data:`ScoreRule`.

    Raises:
        ValueError: it is none.
    """
    known = get_args(ScoreRule)
    if rule not in known:
        raise ValueError(f"Argument score_rule should be one of {known}, but given {rule!r}")
    return rule  # type: ignore[return-value]


def agreed_score(scores: Sequence[float], rule: ScoreRule, coordinator: int) -> tuple[int | float, bool]:
    """Return the score that counts on all ranks, and whether the ranks' scores differ.

    Equal scores are returned unchanged: without rounding, and with their type. NaN on some ranks only is a difference,
    and makes mean, min and max NaN.

    Args:
        scores: one per rank, in rank order.
        rule: which score counts when they differ.
        coordinator: the rank whose score ``"coordinator"`` takes.

    Example:
        >>> agreed_score([0.1, 0.1], "mean", 0), agreed_score([1, 2], "mean", 0)
        ((0.1, False), (1.5, True))
    """
    own = scores[coordinator]
    num_nan = sum(is_nan(score) for score in scores)
    if num_nan == len(scores) or (num_nan == 0 and all(score == own for score in scores)):
        return own, False
    if rule == "coordinator":
        return own, True
    if num_nan:
        return math.nan, True
    if rule == "mean":
        return _mean(scores), True
    return (min(scores) if rule == "min" else max(scores)), True


def _mean(scores: Sequence[float]) -> float:
    infinite = {score for score in scores if isinstance(score, float) and math.isinf(score)}
    if infinite:
        return infinite.pop() if len(infinite) == 1 else math.nan  # inf and -inf have no mean
    exact = sum(map(Fraction, scores)) / len(scores)  # rounds once, and cannot overflow
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf
