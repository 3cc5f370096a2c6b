"""One score out of every rank's: arithmetic over lists."""

import math
import statistics
from typing import get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from distckpt.policy.scores import ScoreRule, agreed_score, check_rule

RULES: tuple[ScoreRule, ...] = get_args(ScoreRule)
SCORES = st.one_of(st.floats(), st.integers(), st.booleans())
HUGE = 10**400
FINITE = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300)


def bits(score: float) -> tuple[type, str]:
    """Type and exact value, so that NaN equals itself and -0.0 differs from 0.0."""
    return type(score), repr(score)


@pytest.mark.parametrize("rule", RULES)
@given(score=SCORES, num=st.integers(1, 6), data=st.data())
def test_equal_scores_are_taken_as_they_are(rule: ScoreRule, score: float, num: int, data: st.DataObject) -> None:
    coordinator = data.draw(st.integers(0, num - 1))
    agreed, differed = agreed_score([score] * num, rule, coordinator)
    assert bits(agreed) == bits(score)
    assert not differed


@given(st.lists(SCORES, min_size=1, max_size=6), st.data())
def test_coordinators_score_is_taken_bit_for_bit(scores: list[float], data: st.DataObject) -> None:
    coordinator = data.draw(st.integers(0, len(scores) - 1))
    agreed, _ = agreed_score(scores, "coordinator", coordinator)
    assert bits(agreed) == bits(scores[coordinator])


@given(st.lists(FINITE, min_size=2, max_size=6))
def test_mean_is_rounded_once_and_lies_between(scores: list[float]) -> None:
    assume(len(set(scores)) > 1)
    agreed, differed = agreed_score(scores, "mean", 0)
    assert differed
    assert min(scores) <= agreed <= max(scores)
    assert agreed == pytest.approx(statistics.fmean(scores), rel=1e-12, abs=1e-300)


@given(st.lists(st.one_of(FINITE, st.integers()), min_size=2, max_size=6))
def test_smallest_and_largest(scores: list[float]) -> None:
    assume(len(set(scores)) > 1)
    assert agreed_score(scores, "min", 0) == (min(scores), True)
    assert agreed_score(scores, "max", 0) == (max(scores), True)


@given(st.permutations([0.1, 0.2, 0.3, 1e16, -1e16]), st.sampled_from(["mean", "min", "max"]))
def test_order_of_the_ranks_does_not_matter(scores: list[float], rule: ScoreRule) -> None:
    assert agreed_score(scores, rule, 0) == agreed_score(sorted(scores), rule, 0)


@pytest.mark.parametrize(
    ("scores", "rule", "agreed", "differed"),
    [
        ([1, 2], "mean", 1.5, True),
        ([1, 3], "mean", 2.0, True),
        ([False, True], "mean", 0.5, True),
        ([math.inf, 1.0], "mean", math.inf, True),
        ([-math.inf, 1.0], "mean", -math.inf, True),
        ([math.inf, -math.inf], "mean", math.nan, True),
        ([math.inf, math.inf, -math.inf], "mean", math.nan, True),
        ([math.inf, -math.inf], "min", -math.inf, True),
        ([math.inf, -math.inf], "max", math.inf, True),
        ([math.inf, math.inf], "mean", math.inf, False),
        ([math.nan, math.nan], "mean", math.nan, False),
        ([math.nan, math.nan], "max", math.nan, False),
        ([1.0, math.nan], "mean", math.nan, True),
        ([1.0, math.nan], "min", math.nan, True),
        ([math.nan, 1.0], "max", math.nan, True),
        ([1.0, math.nan], "coordinator", 1.0, True),
        ([math.nan, 1.0], "coordinator", math.nan, True),
        ([2**53, 2**53 + 1], "max", 2**53 + 1, True),
    ],
)
def test_scores_that_differ(scores: list[float], rule: ScoreRule, agreed: float, *, differed: bool) -> None:
    value, differ = agreed_score(scores, rule, 0)
    assert bits(value) == bits(agreed)
    assert differ is differed


@pytest.mark.parametrize("scores", [[1.7e308, 1.6e308], [1.7e308, 1.6e308, 1.5e308], [-1.7e308, -1.6e308]])
def test_mean_of_huge_scores_does_not_overflow(scores: list[float]) -> None:
    agreed, _ = agreed_score(scores, "mean", 0)
    assert min(scores) <= agreed <= max(scores)


@pytest.mark.parametrize(
    ("scores", "largest", "mean"),
    [
        ([HUGE, 1], HUGE, math.inf),
        ([-HUGE, 1], 1, -math.inf),
        ([HUGE, math.nan], math.nan, math.nan),
        ([HUGE, math.inf], math.inf, math.inf),
        ([HUGE, -HUGE], HUGE, 0.0),
        ([HUGE, HUGE], HUGE, HUGE),
    ],
    ids=["above", "below", "nan", "inf", "both", "equal"],
)
def test_ints_beyond_the_range_of_floats_are_scores_too(scores: list[float], largest: float, mean: float) -> None:
    assert bits(agreed_score(scores, "max", 0)[0]) == bits(largest)
    assert bits(agreed_score(scores, "mean", 0)[0]) == bits(mean)


@pytest.mark.parametrize("rule", RULES)
def test_rules_are_known(rule: ScoreRule) -> None:
    assert check_rule(rule) == rule


@pytest.mark.parametrize("rule", ["median", "", "MEAN", None])
def test_other_rules_are_refused_and_the_known_ones_named(rule: str) -> None:
    with pytest.raises(ValueError, match="Argument score_rule should be one of") as caught:
        check_rule(rule)
    assert all(known in str(caught.value) for known in (*RULES, repr(rule)))
