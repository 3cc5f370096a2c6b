"""The header of a safetensors file: which tensors it holds, and where.

A safetensors file is the header's length in 8 bytes, the header (JSON, padded with spaces), and the tensors' bytes
without gaps. It has no checksums.

Source: README.md of https://github.com/huggingface/safetensors, and ``safetensors/src/tensor.rs``, version 0.6.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from distckpt.storage.base import Readable

_LENGTH = struct.Struct("<Q")
_MOST_HEADER_BYTES = 100_000_000
_ALIGNMENT = 8
_METADATA = "__metadata__"
DTYPES: Mapping[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}
"""torch's names of the dtypes, by safetensors'."""


class SafetensorsEntry(NamedTuple):
    """A tensor of a safetensors file.

    Attributes:
        name: its key.
        dtype: safetensors' name of its dtype.
        shape: its sizes.
        offset: of its first byte in the file.
        num_bytes: its length.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class SafetensorsHeader(NamedTuple):
    """The header of a safetensors file: its tensors in the order of their bytes, and texts by name."""

    entries: tuple[SafetensorsEntry, ...]
    metadata: Mapping[str, str]


def read_safetensors_header(file: Readable) -> SafetensorsHeader:
    """Return the header of a file. The file may be damaged or malicious.

    Raises:
        ValueError: it is no safetensors file, or is damaged; the text says how.
        OSError: it cannot be read.
    """
    begin = file.read(0, _LENGTH.size)
    length = _LENGTH.unpack(begin)[0] if len(begin) == _LENGTH.size else 0
    data = file.read(_LENGTH.size, length) if 1 < length <= _MOST_HEADER_BYTES else b""
    if not data.startswith(b"{") or len(data) != length:
        raise ValueError("it does not begin with the header of a safetensors file, or is cut short in it")
    try:
        found = json.loads(data, object_pairs_hook=_unique)
        metadata = found.pop(_METADATA, {})
        first = _LENGTH.size + length
        entries = sorted((_entry(name, one, first) for name, one in found.items()), key=lambda one: one.offset)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is invalid: {error}") from error
    at = first
    for entry in entries:
        if entry.offset != at:
            raise ValueError(f"tensor {entry.name!a} does not begin where the one before it ends")
        at += entry.num_bytes
    if at != file.num_bytes:
        raise ValueError(f"its tensors end at byte {at}, but it has {file.num_bytes} bytes")
    return SafetensorsHeader(tuple(entries), metadata if _is_texts(metadata) else {})


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _is_texts(metadata: object) -> bool:
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())


def _entry(name: str, found: Any, first: int) -> SafetensorsEntry:
    begin, end = found["data_offsets"]
    shape = tuple(found["shape"])
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)) or end < begin:
        raise ValueError(f"tensor {name!a} has invalid sizes or offsets")
    size = item_bytes(found["dtype"])
    if size is not None and math.prod(shape) * size != end - begin:
        raise ValueError(f"tensor {name!a} has {end - begin} bytes, which its shape and dtype do not need")
    return SafetensorsEntry(name, str(found["dtype"]), shape, first + begin, end - begin)


def item_bytes(dtype: str) -> int | None:
    """Return the length of an element of a dtype; None for one that is unknown here.

    Example:
        >>> item_bytes("BF16"), item_bytes("F8_E4M3"), item_bytes("F4")
        (2, 1, None)
    """
    if dtype not in DTYPES:
        return None
    digits = "".join(one for one in dtype.partition("_")[0] if one.isdigit())
    return int(digits) // 8 if digits else 1


def build_safetensors_header(tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes before the tensors' own.

    Args:
        tensors: name, safetensors' dtype and shape of each, in the order of their bytes.
        metadata: texts by name.

    Raises:
        ValueError: the header would be longer than safetensors' readers accept.

    Example:
        >>> len(build_safetensors_header([("a", "F32", [2])], {})) % 8
        0
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    begin = 0
    for name, dtype, shape in tensors:
        end = begin + math.prod(shape) * (item_bytes(dtype) or 0)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > _MOST_HEADER_BYTES:
        raise ValueError(f"its header would have {len(text)} bytes, and readers accept {_MOST_HEADER_BYTES}")
    return _LENGTH.pack(len(text)) + text
