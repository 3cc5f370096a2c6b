"""Flatten a state into named tensors and a text, for formats that hold only named tensors.

The text is JSON. It has the containers, the keys with their types, and the values that are not tensors, so that
:func:`unflatten` rebuilds the state exactly. Tensors that viewed the same elements become one tensor again.
"""

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from distckpt.ptformat.sharded import key_to_text

STRUCTURE, MANIFEST = "distckpt.structure", "distckpt.manifest"
"""Names under which ``distckpt convert`` stores texts in other formats."""
_LEVELS = 64
_VERBATIM = (str, int, bool, type(None))


def is_plain_tensor(value: Any) -> bool:
    """Return True for a tensor with one dense storage: neither sparse nor quantised."""
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized


class FlatState(NamedTuple):
    """A flattened state.

    Attributes:
        tensors: the tensors by name; a name is the keys that lead to the tensor, joined by dots.
        structure: the text; None if the state is just a mapping from these names to these tensors.
        refused: names of values that cannot be kept, with their types.
        num_separated: number of tensors that share part of their memory with another tensor, which the format loses.
    """

    tensors: Mapping[str, torch.Tensor]
    structure: str | None
    refused: tuple[str, ...]
    num_separated: int


def flatten(state: Any) -> FlatState:
    """Return a state as named tensors and a text.

    Example:
        >>> flat = flatten({"model": {"w": torch.ones(2)}, "lr": 0.1})
        >>> list(flat.tensors), flat.refused
        (['model.w'], ())
    """
    walk = _Walk()
    structure = walk.encode(state, "", 0)
    is_flat = type(state) is dict and list(state) == list(walk.tensors) and not walk.ties and not walk.num_parameters
    text = None if is_flat else json.dumps(structure, separators=(",", ":"), allow_nan=False)
    storages = {tensor.untyped_storage()._cdata for tensor in walk.tensors.values() if tensor.numel()}  # noqa: SLF001 - torch's identity of a storage
    num_filled = sum(tensor.numel() > 0 for tensor in walk.tensors.values())
    return FlatState(walk.tensors, text, tuple(walk.refused), num_filled - len(walk.ties) - len(storages))


class _Walk:
    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.refused: list[str] = []
        self.ties: list[str] = []
        self.num_parameters = 0
        self._seen: dict[tuple[Any, ...], str] = {}

    def encode(self, item: Any, name: str, level: int) -> Any:
        kind = type(item)
        encoders: dict[type, Callable[[], Any]] = {
            float: lambda: item if math.isfinite(item) else {"float": str(item)},
            torch.Size: lambda: {"Size": list(item)},
            bytes: lambda: {"bytes": item.hex()},
            complex: lambda: {"complex": [str(item.real), str(item.imag)]},
            torch.dtype: lambda: {"dtype": str(item).removeprefix("torch.")},
            torch.device: lambda: {"device": str(item)},
        }
        if level < _LEVELS:
            encoders |= dict.fromkeys((dict, OrderedDict), lambda: self._mapping(item, name, level))
            encoders |= dict.fromkeys((list, tuple), lambda: self._sequence(item, name, level))
        if is_plain_tensor(item):
            encoders |= dict.fromkeys((torch.Tensor, nn.Parameter), lambda: self._tensor(item, name))
        if kind in _VERBATIM:
            return item
        if kind in encoders:
            return encoders[kind]()
        self.refused.append(f"{name or 'the state'} ({kind.__module__}.{kind.__qualname__})")
        return None

    def _sequence(self, item: Any, name: str, level: int) -> dict[str, Any]:
        encoded = [self.encode(one, _join(name, str(at)), level + 1) for at, one in enumerate(item)]
        return {type(item).__name__: encoded}

    def _tensor(self, tensor: torch.Tensor, name: str) -> dict[str, Any]:
        found, number = name, 2
        while found in self.tensors:
            found, number = f"{name}#{number}", number + 1
        self.tensors[found] = tensor
        encoded: dict[str, Any] = {"tensor": found}
        if isinstance(tensor, nn.Parameter):
            encoded["parameter"] = tensor.requires_grad
            self.num_parameters += 1
        if tensor.numel():
            storage = tensor.untyped_storage()._cdata  # noqa: SLF001 - as above
            key = (storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            first = self._seen.setdefault(key, found)
            if first != found:
                self.ties.append(found)
                encoded["tied"] = first
        return encoded

    def _mapping(self, item: Mapping[Any, Any], name: str, level: int) -> dict[str, Any]:
        pairs = []
        for key, value in item.items():
            if type(key) not in (*_VERBATIM, float, tuple):
                self.refused.append(f"a key of {name or 'the state'} ({type(key).__name__})")
                continue
            text = _join(name, key_to_text(key))
            pairs.append([self.encode(key, text, level + 1), self.encode(value, text, level + 1)])
        encoded: dict[str, Any] = {type(item).__name__: pairs}
        if type(item) is OrderedDict and vars(item):  # a module's `_metadata`
            encoded["attributes"] = self.encode(dict(vars(item)), _join(name, "(attributes)"), level + 1)
        return encoded


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def unflatten(structure: str, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return the state that :func:`flatten` was given.

    Raises:
        ValueError: the text is damaged, or names a tensor that is not in `tensors`.
    """
    try:
        return _decode(json.loads(structure), tensors, {})
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError, StopIteration) as error:
        raise ValueError(f"its structure is damaged: {error!r}") from error


def _decode(item: Any, tensors: Mapping[str, torch.Tensor], done: dict[str, torch.Tensor]) -> Any:
    if type(item) in (*_VERBATIM, float):
        return item
    if "tensor" in item:
        name = item.get("tied", item["tensor"])
        if name not in done:
            done[name] = tensors[name]
        return nn.Parameter(done[name], item["parameter"]) if "parameter" in item else done[name]
    kind, value = next(iter(item.items()))
    if kind in ("dict", "OrderedDict"):
        pairs = [(_decode(key, tensors, done), _decode(one, tensors, done)) for key, one in value]
        if kind == "dict":
            return dict(pairs)
        ordered: OrderedDict[Any, Any] = OrderedDict(pairs)
        ordered.__dict__.update(_decode(item["attributes"], tensors, done) if "attributes" in item else {})
        return ordered
    if kind in ("list", "tuple"):
        found = [_decode(one, tensors, done) for one in value]
        return found if kind == "list" else tuple(found)
    simple: dict[str, Callable[[Any], Any]] = {
        "float": float,
        "Size": torch.Size,
        "bytes": bytes.fromhex,
        "complex": lambda one: complex(float(one[0]), float(one[1])),
        "dtype": _dtype,
        "device": torch.device,
    }
    return simple[kind](value)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name!r} is no dtype")
    return found
