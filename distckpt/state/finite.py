"""Is every number in an output finite?

Owns what counts as a number in a nested output, and how it is looked at cheaply. Must not know who asks. Layer L2.
"""

import cmath
import math
import numbers
import sys
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import torch

__all__ = ["all_finite"]


def all_finite(output: Any) -> bool:
    """Tell whether `output` holds neither NaN nor infinity. A Python float is finite if float64 says so.

    Args:
        output: a number, a tensor of any dtype, shape and device, a NumPy array or scalar, text, None; or a mapping
            or sequence of them, nested at will.

    Raises:
        TypeError: it holds something else.

    Example:
        >>> all_finite([1.0, {"loss": torch.tensor([1.0, float("inf")])}, None])
        False
    """
    # In the order of what training loops return, since this runs in every iteration.
    if type(output) is float:
        return math.isfinite(output)
    if isinstance(output, torch.Tensor):
        return _tensor_is_finite(output)
    if isinstance(output, Mapping):
        return all(all_finite(item) for item in output.values())
    if isinstance(output, Sequence) and not isinstance(output, str | bytes):
        return all(all_finite(item) for item in output)
    return _scalar_is_finite(output)


def _scalar_is_finite(value: Any) -> bool:
    if value is None or isinstance(value, str | bytes | numbers.Rational):  # an int or a Fraction of any size
        return True
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
        return bool(numpy.isfinite(value).all()) if value.dtype.kind in "fc" else True
    if isinstance(value, complex):
        return cmath.isfinite(value)
    if isinstance(value, Decimal):
        return value.is_finite()
    if isinstance(value, numbers.Number):
        return math.isfinite(value)  # type: ignore[arg-type]  # a real number of some other library
    msg = f"x must contain numbers, tensors, NumPy arrays, dicts or lists; found {type(value)}"
    raise TypeError(msg)


def _tensor_is_finite(tensor: torch.Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True  # integers, bools, quantised integers
    if tensor.is_nested:
        return all(map(_tensor_is_finite, tensor.detach().unbind()))
    if tensor.layout is not torch.strided:
        tensor = tensor.detach().coalesce().values() if tensor.layout is torch.sparse_coo else tensor.detach().values()
    if tensor.dtype.itemsize == 1:  # float8 can neither be summed nor compared
        tensor = tensor.float()
    if tensor.dtype is torch.complex32:  # nor this one
        tensor = tensor.to(torch.complex64)
    # One kernel in the usual case: a finite sum has only finite terms. It may overflow, so ask again before saying no.
    total = tensor.item() if tensor.numel() == 1 else tensor.detach().sum().item()
    return cmath.isfinite(total) or bool(torch.isfinite(tensor).all())
