"""One score out of every rank's.

Owns what a score is when the ranks do not have the same: pure arithmetic over the gathered list. Must not
know what the score is for.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, get_args

from distckpt._values import is_nan

__all__ = ["ScoreRule", "agreed_score", "check_rule"]

ScoreRule = Literal["mean", "min", "max", "coordinator"]


def check_rule(rule: str) -> ScoreRule:
    """Return `rule` if it is one.

    Raises:
        ValueError: it is none.
    """
    known = get_args(ScoreRule)
    if rule not in known:
        msg = f"Argument score_rule should be one of {known}, but given {rule!r}"
        raise ValueError(msg)
    return rule  # type: ignore[return-value]


def agreed_score(scores: Sequence[float], rule: ScoreRule, coordinator: int) -> tuple[int | float, bool]:
    """Return the score that all ranks take, and whether they differed.

    Equal scores are taken as they are: no averaging, hence no rounding and no change of type. NaN on some
    ranks only counts as a difference, and makes mean, min and max NaN.

    Args:
        scores: one a rank, in rank order.
        rule: what to take when they differ.
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
        return infinite.pop() if len(infinite) == 1 else math.nan  # those of both signs have no mean
    exact = sum(map(Fraction, scores)) / len(scores)  # rounded once, and no sum that overflows
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf
