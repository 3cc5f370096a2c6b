"""Plain Python numbers out of what users and libraries hand over.

Owns what counts as a number here: a score may be a bool, an int, a float or a NumPy scalar, and becomes
Python's own, so that it travels exactly and can be loaded again under ``weights_only``.
"""

import math
import numbers
import sys
from typing import Any

__all__ = ["has_plain_twin", "is_nan", "is_numpy_scalar", "plain_score"]


_PLAIN_KINDS = frozenset("biufcSU")
_PLAIN_TYPES = frozenset({bool, int, float, complex, bytes, str})


def is_numpy_scalar(value: Any) -> bool:
    """Tell whether `value` is a NumPy scalar, without importing NumPy: torch does not require it."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.generic)


def has_plain_twin(scalar: Any) -> bool:
    """Tell whether a NumPy scalar's ``item()`` is Python's own of its value: a date's, say, is less, or another type.

    Args:
        scalar: NumPy's.
    """
    return scalar.dtype.kind in _PLAIN_KINDS and type(scalar.item()) in _PLAIN_TYPES


def plain_score(score: Any) -> int | float:
    """Return a user's score as a plain Python number.

    Args:
        score: a bool, int, float, NumPy scalar or another real number. A tensor is refused: its value would have
            to be fetched from the device unasked.

    Raises:
        ValueError: it is no real number.

    Example:
        >>> plain_score(True), plain_score(0.5)
        (True, 0.5)
    """
    value = score.item() if is_numpy_scalar(score) else score
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Number) and not isinstance(value, complex):
        return float(value)  # type: ignore[arg-type]  # Fraction, Decimal and the like
    msg = f"Output of score_function should be a number, but given {type(score)}"
    raise ValueError(msg)


def is_nan(score: float | None) -> bool:
    """Tell whether a score is NaN (``None`` is not)."""
    return isinstance(score, float) and math.isnan(score)
