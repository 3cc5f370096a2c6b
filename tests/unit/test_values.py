"""Python's own numbers out of whatever a score function returns."""

import math
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distckpt._values import is_nan, is_numpy_scalar, plain_score, without_dimensions


@pytest.mark.parametrize(
    ("score", "plain"),
    [
        (True, True),
        (False, False),
        (3, 3),
        (2**70, 2**70),
        (0.1, 0.1),
        (-0.0, -0.0),
        (math.inf, math.inf),
        (np.bool_(True), True),  # noqa: FBT003 - NumPy's bool is the point
        (np.int8(-3), -3),
        (np.uint64(2**64 - 1), 2**64 - 1),
        (np.float64(0.1), 0.1),
        (np.float32(0.1), float(np.float32(0.1))),
        (np.float16(0.5), 0.5),
        (np.longdouble(0.5), 0.5),
        (Fraction(1, 4), 0.25),
        (Decimal("0.1"), 0.1),
    ],
    ids=repr,
)
def test_score_becomes_pythons_own_number(score: object, plain: float) -> None:
    value = plain_score(score)
    assert type(value) is type(plain)
    assert value == plain
    assert math.copysign(1, value) == math.copysign(1, plain)


@pytest.mark.parametrize("score", [math.nan, np.float32("nan"), Decimal("NaN")], ids=repr)
def test_nan_stays_nan(score: object) -> None:
    value = plain_score(score)
    assert type(value) is float
    assert math.isnan(value)


@given(st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans()))
def test_plain_number_comes_back_bit_for_bit(score: float) -> None:
    value = plain_score(score)
    assert type(value) is type(score)
    assert repr(value) == repr(score)


@pytest.mark.parametrize(
    "score",
    [
        torch.tensor(0.5),
        torch.tensor(1),
        np.array(0.5),
        np.array([0.5]),
        np.complex128(1j),
        1j,
        "0.5",
        None,
        [0.5],
        object(),
        np.str_("0.5"),
    ],
    ids=lambda score: type(score).__name__,
)
def test_anything_else_is_refused_and_its_type_named(score: object) -> None:
    with pytest.raises(ValueError, match="Output of score_function should be a number") as caught:
        plain_score(score)
    assert str(type(score)) in str(caught.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(1), True),
        (np.bool_(False), True),  # noqa: FBT003 - NumPy's bool is the point
        (np.str_("a"), True),
        (np.array(1.0), False),
        (1.0, False),
        (torch.tensor(1.0), False),
        (None, False),
    ],
    ids=repr,
)
def test_numpy_scalars_are_recognised(value: object, *, expected: bool) -> None:
    assert is_numpy_scalar(value) is expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.array(4), 4),
        (np.array(0.5, dtype=np.float32), 0.5),
        (torch.tensor(4), 4),
        (torch.tensor(0.5), 0.5),
        (3, 3),
        ("a", "a"),
    ],
    ids=repr,
)
def test_a_value_without_dimensions_becomes_pythons_own(value: object, expected: object) -> None:
    found = without_dimensions(value)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize("value", [np.array([4]), torch.tensor([4]), np.int64(4)], ids=repr)
def test_another_value_stays_as_it_is(value: object) -> None:
    assert without_dimensions(value) is value


def test_without_numpy_nothing_is_its_scalar(monkeypatch: pytest.MonkeyPatch) -> None:
    value = np.float64(1)
    monkeypatch.delitem(sys.modules, "numpy")
    assert not is_numpy_scalar(value)
    assert "numpy" not in sys.modules


@pytest.mark.parametrize(
    ("score", "expected"),
    [(math.nan, True), (np.float64("nan"), True), (None, False), (0.0, False), (math.inf, False), (10**400, False)],
    ids=repr,
)
def test_only_nan_is_nan(score: float | None, *, expected: bool) -> None:
    assert is_nan(score) is expected
