"""The encoding of small objects that travel between ranks: JSON, with marks for the types that JSON lacks.

Decoded values are equal to the encoded ones: type, float64 bits, big integers, non-ASCII text. Decoding never executes
code.
"""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distckpt._values import has_python_value, is_numpy_scalar

_MARK = "$"


def encode(value: Any) -> bytes:
    """Encode a small value.

    Args:
        value: None, bool, int, float, complex, str, bytes, Path, a tensor of any dtype and shape (decoded on the CPU),
            a NumPy scalar with a Python value (decoded as that), and dicts, lists, tuples and sets of them.

    Returns:
        ASCII bytes.

    Raises:
        TypeError: the value, or one inside it, has another type.

    Example:
        >>> decode(encode({"naïve": (1, None, 2**70)}))
        {'naïve': (1, None, 1180591620717411303424)}
    """
    return json.dumps(_pack(value), ensure_ascii=True, separators=(",", ":")).encode("ascii")


def decode(data: bytes) -> Any:
    """Decode the bytes that :func:`encode` returned."""
    return _unpack(json.loads(data))


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Return a copy of the bytes of a CPU tensor, of any dtype and shape. Without NumPy: torch does not require it.

    Example:
        >>> bytes_of(torch.tensor([97, 98], dtype=torch.uint8))
        b'ab'
    """
    if not tensor.numel():
        return b""
    flat = tensor.reshape(-1).view(torch.uint8)
    memory = bytearray(flat.numel())
    torch.frombuffer(memory, dtype=torch.uint8).copy_(flat)
    return bytes(memory)


def _pack(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list):
        return [_pack(item) for item in value]
    if is_numpy_scalar(value) and has_python_value(value):
        return _pack(value.item())
    for kind, pack in _PACK:
        if isinstance(value, kind):
            return pack(value)
    msg = f"cannot send {type(value)} between ranks; send numbers, text, bytes, tensors, and dicts or lists of them"
    raise TypeError(msg)


def _pack_dict(value: dict[Any, Any]) -> dict[str, Any]:
    if all(type(key) is str for key in value) and _MARK not in value:
        return {key: _pack(item) for key, item in value.items()}
    return {_MARK: "dict", "v": [[_pack(key), _pack(item)] for key, item in value.items()]}


def _pack_items(mark: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {_MARK: mark, "v": [_pack(item) for item in value]}


def _pack_bytes(value: bytes | bytearray) -> dict[str, Any]:
    return {_MARK: "bytes", "v": base64.b64encode(value).decode("ascii")}


def _pack_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    plain = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    dtype = str(plain.dtype).removeprefix("torch.")
    return {**_pack_bytes(bytes_of(plain)), _MARK: "tensor", "dtype": dtype, "shape": list(plain.shape)}


# The first type that fits. bool, int, float and str stand here for their subclasses, such as an IntEnum.
_PACK: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (dict, _pack_dict),
    (tuple, _pack_items("tuple")),
    (set, _pack_items("set")),
    (frozenset, _pack_items("frozenset")),
    (bytes, _pack_bytes),
    (bytearray, _pack_bytes),
    (complex, lambda value: {_MARK: "complex", "v": [value.real, value.imag]}),
    (Path, lambda value: {_MARK: "path", "v": str(value)}),
    (torch.Tensor, _pack_tensor),
    (int, int),
    (float, float),
    (str, str),
)


def _unpack_tensor(packed: dict[str, Any]) -> torch.Tensor:
    dtype = getattr(torch, packed["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"no such dtype: {packed['dtype']!r}")
    raw = bytearray(base64.b64decode(packed["v"]))
    flat = torch.frombuffer(raw, dtype=torch.uint8).view(dtype) if raw else torch.empty(0, dtype=dtype)
    return flat.reshape(packed["shape"])


_UNPACK: dict[str, Callable[[Any], Any]] = {
    "dict": lambda pairs: {_unpack(key): _unpack(item) for key, item in pairs},
    "tuple": lambda items: tuple(_unpack(item) for item in items),
    "set": lambda items: {_unpack(item) for item in items},
    "frozenset": lambda items: frozenset(_unpack(item) for item in items),
    "bytes": base64.b64decode,
    "complex": lambda parts: complex(*parts),
    "path": Path,
}


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    mark = value.get(_MARK)
    if mark is None:
        return {key: _unpack(item) for key, item in value.items()}
    if mark == "tensor":
        return _unpack_tensor(value)
    return _UNPACK[mark](value["v"])
