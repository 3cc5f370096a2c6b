"""Compare what was saved with what was loaded, to the bit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Comparison:
    """True if nothing differs; a failed `assert` shows the first difference."""

    difference: str = ""

    def __bool__(self) -> bool:
        return not self.difference

    def __repr__(self) -> str:
        return self.difference or "no difference"


def equal(one: Any, other: Any) -> Comparison:
    """Compare trees of containers, tensors, arrays and plain values.

    Types, the order of keys, dtypes, shapes, strides and the bits of all numbers count: NaN equals itself, and 0.0 does
    not equal -0.0.
    """
    return Comparison(_difference(one, other, ""))


def _difference(one: Any, other: Any, where: str) -> str:
    if type(one) is not type(other):
        return f"{where}: {type(one)} and {type(other)}"
    if isinstance(one, Mapping):
        if list(one) != list(other):
            return f"{where}: keys {list(one)} and {list(other)}"
        pairs = [(f"{where}[{key!r}]", one[key], other[key]) for key in one]
    elif isinstance(one, Sequence) and not isinstance(one, str | bytes):
        if len(one) != len(other):
            return f"{where}: {one} and {other}"
        pairs = [(f"{where}[{index}]", *pair) for index, pair in enumerate(zip(one, other, strict=True))]
    else:
        return "" if _is_same_value(one, other) else f"{where}: {one!r} and {other!r}"
    return next(filter(None, (_difference(first, second, place) for place, first, second in pairs)), "")


def _is_same_value(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return _is_same_tensor(one, other)
    if isinstance(one, np.ndarray):
        if (one.dtype, one.shape, one.strides) != (other.dtype, other.shape, other.strides):
            return False
        # The bytes between the fields of a structure mean nothing.
        return np.array_equal(one, other) if one.dtype.names else one.tobytes() == other.tobytes()
    if isinstance(one, np.generic):
        return bool(one.dtype == other.dtype and one.tobytes() == other.tobytes())
    return repr(one) == repr(other) if isinstance(one, float | complex) else bool(one == other)


def _is_same_tensor(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.layout is torch.sparse_coo and other.layout is torch.sparse_coo:
        return _is_same_tensor(one.to_dense(), other.to_dense())
    is_like = (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
    return is_like and torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().resolve_conj().resolve_neg().cpu()
    return plain.contiguous().reshape(-1).view(torch.uint8)
