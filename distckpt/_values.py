"""Check numbers from users and libraries, and make them plain Python numbers, which load under ``weights_only``.

Also replace or copy values at given places of nested containers.
"""

import copy
import functools
import math
import numbers
import operator
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_PLAIN_KINDS = frozenset("biufcSU")
_PLAIN_TYPES = frozenset({bool, int, float, complex, bytes, str})


def is_numpy_scalar(value: Any) -> bool:
    """Return True for a NumPy scalar. Does not import NumPy, which torch does not require."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.generic)


def has_python_value(scalar: Any) -> bool:
    """Return True if a NumPy scalar's ``item()`` has the same value and a builtin type; a date's, for one, does not."""
    return scalar.dtype.kind in _PLAIN_KINDS and type(scalar.item()) in _PLAIN_TYPES


def is_array(value: Any) -> bool:
    """Return True for a tensor or a NumPy array. Imports neither torch nor NumPy."""
    kinds = ((sys.modules.get("torch"), "Tensor"), (sys.modules.get("numpy"), "ndarray"))
    return any(module is not None and isinstance(value, getattr(module, name, ())) for module, name in kinds)


def without_dimensions(value: Any) -> Any:
    """Return the number in a tensor or NumPy array without dimensions. Other values are returned unchanged."""
    return value.item() if is_array(value) and value.ndim == 0 else value


def plain_score(score: Any) -> int | float:
    """Return a user's score as a plain Python number.

    Args:
        score: a bool, int, float, NumPy scalar or another real number. A tensor is refused, because reading its value
            would wait for the device.

    Raises:
        ValueError: `score` is not a real number.

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
    raise ValueError(f"Output of score_function should be a number, but given {type(score)}")


def is_nan(score: float | None) -> bool:
    """Return True if a score is NaN; None is not."""
    return isinstance(score, float) and math.isnan(score)


def is_timeout(timeout_s: object) -> bool:
    """Return True for a positive, finite number of seconds; None is not."""
    return _is_number(timeout_s) and 0 < timeout_s < math.inf  # type: ignore[operator]  # a number


def valid_timeout(timeout_s: Any) -> Any:
    """Return a time limit; None if it is none, for the collective in which all ranks learn that."""
    return timeout_s if is_timeout(timeout_s) else None


def check_timeout(timeout_s: object) -> None:
    """Check the argument ``timeout_s``: a positive number of seconds, or None.

    Raises:
        TypeError: it is neither a number nor None.
        ValueError: it is not positive, or not finite.
    """
    if timeout_s is not None and not is_timeout(timeout_s):
        given = repr(timeout_s) if _is_number(timeout_s) else type(timeout_s)
        msg = f"Argument timeout_s should be a positive number of seconds or None, but given {given}"
        raise ValueError(msg) if _is_number(timeout_s) else TypeError(msg)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def to_json_value(value: Any) -> Any:
    """Return a value for JSON: keys, and numbers that are not finite, which JSON does not have, become text.

    Example:
        >>> to_json_value({1: (float("inf"), None)})
        {'1': ['inf', None]}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): to_json_value(item) for key, item in value.items()}
    return [to_json_value(item) for item in value] if isinstance(value, list | tuple) else value


def replace_at(state: Any, items: Iterable[tuple[Sequence[Any], Any]]) -> Any:
    """Return a copy of a state with items at the given paths; the containers of the original stay as they are.

    Args:
        state: nested mappings and sequences.
        items: each with the keys that lead to its place.

    Example:
        >>> replace_at({"a": {"b": 1, "c": 2}}, [(("a", "b"), 3)])
        {'a': {'b': 3, 'c': 2}}
    """
    twin, below = copy.copy(state), dict[Any, list[tuple[Sequence[Any], Any]]]()
    for (key, *rest), item in items:
        if rest:
            below.setdefault(key, []).append((rest, item))
        else:
            twin[key] = item
    for key, inner in below.items():
        twin[key] = replace_at(state[key], inner)
    return twin


def copy_at(state: Any, paths: Sequence[Sequence[Any]]) -> Any:
    """Return a state with deep copies in place of the values at some paths; `state` itself if there are none."""
    if not paths:
        return state
    return replace_at(state, [(path, copy.deepcopy(functools.reduce(operator.getitem, path, state))) for path in paths])
