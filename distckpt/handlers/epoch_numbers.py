"""The numbers in an engine's output and metrics, as plain JSON for a checkpoint's record, and back.

Numbers, NumPy's scalars, tensors without dimensions and short texts are kept, in dicts, lists and tuples. All else is
left out.
"""

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from distckpt._values import is_numpy_scalar

NOTHING: Any = object()
"""Stands for a value of which nothing can be recorded."""
_MOST = 256
"""Largest number of values in one container, and of characters in a text."""
_MOST_LEVELS = 8
_KINDS = "biuf"
_DTYPES: dict[str, torch.dtype] = {
    str(one).removeprefix("torch."): one
    for one in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    )
}


def encode(value: Any, lacking: list[str], name: str = "", level: int = 0) -> Any:
    """Return a value's numbers as JSON; `NOTHING` if it has none.

    Args:
        value: a value of any type.
        lacking: a list that gets the names of what is left out.
        name: the value's name.
        level: number of containers around it; it may contain itself.

    Example:
        >>> lacking = []
        >>> encode({"loss": (1.5, torch.ones(2))}, lacking, "output"), lacking
        ({'dict': {'loss': {'tuple': [1.5, None]}}}, ["output['loss'][1]"])
    """
    kind = type(value)
    if kind in (bool, int, type(None)) or (kind is float and math.isfinite(value)) or _is_short_text(value):
        return value
    if kind is float:
        return {"float": str(value)}
    if is_numpy_scalar(value) and value.dtype.kind in _KINDS:
        return {"numpy": [value.dtype.name, encode(value.item(), lacking, name)]}
    if kind is torch.Tensor and value.dim() == 0 and _dtype_name(value) in _DTYPES and not value.is_meta:
        return {"tensor": [_dtype_name(value), encode(value.item(), lacking, name)]}
    if kind in (dict, list, tuple) and len(value) <= _MOST and level < _MOST_LEVELS:
        return _encode_items(value, lacking, name, level + 1)
    lacking.append(f"{name} ({kind.__name__})" if not name.endswith("]") else name)
    return NOTHING


def _encode_items(value: Any, lacking: list[str], name: str, level: int) -> Any:
    found = {}
    for key, item in value.items() if type(value) is dict else enumerate(value):
        path = f"{name}[{key!r}]"
        if type(value) is dict and type(key) is not str:  # JSON has no other keys
            lacking.append(path)
            found[key] = NOTHING
        else:
            found[key] = encode(item, lacking, path, level)
    if found and all(item is NOTHING for item in found.values()):
        return NOTHING
    if type(value) is dict:
        return {"dict": {key: item for key, item in found.items() if item is not NOTHING}}
    items = [None if item is NOTHING else item for item in found.values()]
    return items if type(value) is list else {"tuple": items}


def decode(form: Any) -> Any:
    """Return the value that :func:`encode` turned into JSON; `NOTHING` if it is malformed.

    Example:
        >>> decode({"tuple": [1, {"float": "nan"}, {"tensor": ["float32", 0.5]}]})
        (1, nan, tensor(0.5000))
    """
    try:
        return _decode(form)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError, RecursionError):
        return NOTHING


def _decode(form: Any) -> Any:
    if isinstance(form, list):
        return [_decode(item) for item in form]
    if not isinstance(form, dict):
        return form
    ((tag, inner),) = form.items()
    return _DECODERS[tag](inner)


def _decode_scalar(inner: Any) -> Any:
    name, number = inner
    numpy: Any = sys.modules.get("numpy")
    if numpy is None or numpy.dtype(name).kind not in _KINDS:
        raise ValueError(name)
    return numpy.dtype(name).type(_decode(number))


def _decode_tensor(inner: Any) -> torch.Tensor:
    name, number = inner
    return torch.tensor(_decode(number), dtype=_DTYPES[name], device="cpu")


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "tuple": lambda inner: tuple(map(_decode, inner)),
    "dict": lambda inner: {key: _decode(item) for key, item in inner.items()},
    "numpy": _decode_scalar,
    "tensor": _decode_tensor,
}


def _is_short_text(value: Any) -> bool:
    return type(value) is str and len(value) <= _MOST


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def encode_all(metrics: Mapping[str, Any], lacking: list[str]) -> dict[str, Any]:
    """Return the numbers of an engine's metrics, by name."""
    found = {key: encode(item, lacking, f"metrics[{key!r}]") for key, item in metrics.items() if type(key) is str}
    return {key: item for key, item in found.items() if item is not NOTHING}
