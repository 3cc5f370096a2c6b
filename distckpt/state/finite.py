"""Is every number in an output finite?

Owns what counts as a number in a nested output, and how it is looked at cheaply. Must not know who asks. Layer L2.
"""

import cmath
import math
import numbers
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

__all__ = ["all_finite"]


def all_finite(output: Any) -> bool:  # noqa: ANN401 - whatever a process function returned
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
    kind = type(output)
    if kind is float:
        return math.isfinite(output)
    if isinstance(output, torch.Tensor):
        return _tensor_is_finite(output)
    if output is None or isinstance(output, str | bytes | int):
        return True
    if isinstance(output, Mapping):
        return all(all_finite(item) for item in output.values())
    if isinstance(output, Sequence):
        return all(all_finite(item) for item in output)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(output, numpy.ndarray | numpy.generic):
        return bool(numpy.isfinite(output).all()) if output.dtype.kind in "fc" else True
    if isinstance(output, numbers.Number):
        return cmath.isfinite(output) if isinstance(output, complex) else math.isfinite(output)  # type: ignore[arg-type]
    msg = f"x must contain numbers, tensors, NumPy arrays, dicts or lists; found {kind}"
    raise TypeError(msg)


def _tensor_is_finite(tensor: torch.Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True  # integers, bools, quantised integers
    if tensor.layout is not torch.strided:
        tensor = tensor.detach().coalesce().values() if tensor.layout is torch.sparse_coo else tensor.detach().values()
    if tensor.numel() == 1 and not tensor.is_complex():
        return math.isfinite(tensor.item())
    if tensor.dtype.itemsize == 1:  # float8 has no isfinite
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())
