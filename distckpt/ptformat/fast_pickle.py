"""A plain state -> its pickle, in one walk that also notes every storage and every tensor's form.

Owns the fast way for what most checkpoints are: tensors, numbers and text in dicts, lists and tuples. What is not plain
is another's business (:mod:`distckpt.ptformat.pickler`). Must not know where the storages come to lie.

A tensor costs Python's own pickler some ten microseconds, of each save's time, with training standing still. Here it
costs two: what tensors have in common is kept in the pickle's memo, and tensors of one form share their bytes.

Source: ``pickletools`` of Python 3.11, of protocol 2; ``torch._weights_only_unpickler`` of torch 2.9 to 2.13, which
knows no other opcodes than are used here.
"""

import struct
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import torch

__all__ = ["TYPES", "Emitted", "Form", "NotPlain", "TensorAt", "emit", "is_plain"]

TYPES: Final[Mapping[torch.dtype, Any]] = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
    torch.complex64: torch.ComplexFloatStorage,
    torch.complex128: torch.ComplexDoubleStorage,
}
"""The dtypes whose storages have a type of their own, by which a pickle names them."""

_STRIDED, _COMPLEX = torch.strided, frozenset({torch.complex64, torch.complex128})

_PROTOCOL, _STOP = b"\x80\x02", b"."
_MARK, _REDUCE, _BUILD, _SET_ITEMS, _APPEND_ITEMS, _TUPLE, _PERSISTENT_ID = b"(", b"R", b"b", b"u", b"e", b"t", b"Q"
_EMPTY_DICT, _EMPTY_LIST, _EMPTY_TUPLE = b"}", b"]", b")"
_NONE, _TRUE, _FALSE = b"N", b"\x88", b"\x89"
_SHORT_TUPLES = {1: b"\x85", 2: b"\x86", 3: b"\x87"}
_LEVELS: Final = 64
"""How deep a plain state may be."""


class NotPlain(Exception):  # noqa: N818 - it is no error, but an answer
    """The state holds something that this way does not know, or one object twice."""


class Form(NamedTuple):
    """What tensors of one form have in common.

    Attributes:
        dtype: theirs.
        shape: their sizes.
        offset: where in its storage each one's first element lies, in elements.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class TensorAt(NamedTuple):
    """One tensor of a state, as the manifest names it.

    Attributes:
        name: the keys that lead to it, joined by dots.
        dtype: e.g. ``float32``.
        shape: its sizes.
        storage: which of the storages it views.
        begin_bytes: where in that storage its first element lies.
        num_bytes: of its elements.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    storage: int
    begin_bytes: int
    num_bytes: int


class Emitted(NamedTuple):
    """What a walk brought.

    Attributes:
        data: the pickle.
        storages: by number; shared ones once. The live ones, not copies.
        tensors: of each tensor the name, the form, and the number of its storage.
    """

    data: bytes
    storages: list[torch.UntypedStorage]
    tensors: Iterator[tuple[str, Form, int]]


def emit(state: Any) -> Emitted:
    """Pickle a plain state in protocol 2. Rank-local; issues no collectives.

    Args:
        state: what ``torch.save`` takes.

    Raises:
        NotPlain: it is not plain.
        RuntimeError: two storages view the same memory as different types.

    Example:
        >>> emitted = emit({"a": torch.ones(2), "b": 1})
        >>> len(emitted.storages), [name for name, _, _ in emitted.tensors]
        (1, ['a'])
    """
    walk = _Walk()
    walk.put(state, "", 0)
    tensors = zip(walk.names, walk.forms, walk.numbers, strict=True)
    return Emitted(b"".join((_PROTOCOL, *walk.out, _STOP)), walk.storages, tensors)


def is_plain(tensor: torch.Tensor) -> bool:
    """Tell whether nothing of a tensor is left out where its storage, sizes and strides are kept.

    Args:
        tensor: of one of `TYPES`: then it is not quantised, and conjugate only if it is complex.
    """
    return (
        tensor.layout is _STRIDED
        and (tensor.is_cpu or tensor.is_cuda)
        and not tensor.is_neg()
        and not tensor.is_nested
        and not (tensor.dtype in _COMPLEX and tensor.is_conj())
        and not tensor.__dict__
        and not tensor._backward_hooks  # noqa: SLF001 - torch warns of them where it pickles
    )


class _Walk:
    """One walk over a state."""

    def __init__(self) -> None:
        self.out: list[bytes] = []
        self.storages: list[torch.UntypedStorage] = []
        # Of each tensor. No tuples: so many new objects would have the garbage collector look through all there are.
        self.names: list[str] = []
        self.forms: list[Form] = []
        self.numbers: list[int] = []
        self._memo: dict[Any, bytes] = {}  # what is written once -> how it is referred to
        self._seen: set[int] = set()  # containers and tensors
        self._numbers: dict[int, int] = {}  # torch's identity of a storage -> its number
        self._dtypes: dict[int, torch.dtype] = {}  # where its data lie -> their dtype
        self._forms: dict[Any, tuple[bytes, bytes, Form]] = {}
        self._keys: dict[str, bytes] = {}  # mappings have the same ones again and again

    def put(self, value: Any, path: str, level: int) -> None:
        kind = type(value)
        if kind is torch.Tensor:
            self._put_tensor(value, path)
        elif kind is str:
            self.out.append(_text(value))
        elif kind is dict or kind is OrderedDict:
            self._put_mapping(value, path, level)
        elif kind is list:
            self._see(value, level)
            self.out.append(_EMPTY_LIST)
            if value:
                self.out.append(_MARK)
                self._put_items(value, path, level)
                self.out.append(_APPEND_ITEMS)
        elif kind is tuple:
            self._put_tuple(value, path, level)
        else:
            self.out.append(_scalar(value, kind))

    def _see(self, value: Any, level: int) -> None:
        """Refuse what pickle would write once and refer to later, and what contains itself."""
        if id(value) in self._seen or level > _LEVELS:
            raise NotPlain
        self._seen.add(id(value))

    def _put_items(self, items: Any, path: str, level: int) -> None:
        for number, item in enumerate(items):
            self.put(item, f"{path}.{number}" if path else str(number), level + 1)

    def _put_tuple(self, value: tuple[Any, ...], path: str, level: int) -> None:
        if level > _LEVELS:
            raise NotPlain
        if tuple in map(type, value):  # else many, as an optimizer's betas, may be one
            self._see(value, level)
        if not value:
            self.out.append(_EMPTY_TUPLE)
        elif len(value) in _SHORT_TUPLES:
            self._put_items(value, path, level)
            self.out.append(_SHORT_TUPLES[len(value)])
        else:
            self.out.append(_MARK)
            self._put_items(value, path, level)
            self.out.append(_TUPLE)

    def _put_mapping(self, value: Any, path: str, level: int) -> None:
        self._see(value, level)
        is_ordered = type(value) is OrderedDict
        out, keys = self.out, self._keys
        if is_ordered:
            out.append(self._global("collections", "OrderedDict") + _EMPTY_TUPLE + _REDUCE)
        else:
            out.append(_EMPTY_DICT)
        if value:
            out.append(_MARK)
            lead = f"{path}." if path else ""
            for key, item in value.items():
                if type(key) is str:
                    data = keys.get(key)
                    if data is None:
                        data = keys[key] = _text(key)
                    out.append(data)
                else:
                    out.append(_scalar(key, type(key)))
                if type(item) is torch.Tensor:
                    self._put_tensor(item, f"{lead}{key}")
                else:
                    self.put(item, f"{lead}{key}", level + 1)
            out.append(_SET_ITEMS)
        if is_ordered and vars(value):  # a module's `_metadata`
            self.put(dict(vars(value)), "", level + 1)
            out.append(_BUILD)

    def _put_tensor(self, tensor: torch.Tensor, path: str) -> None:
        dtype = tensor.dtype
        if dtype not in TYPES or id(tensor) in self._seen or not is_plain(tensor):
            raise NotPlain
        self._seen.add(id(tensor))
        storage = tensor.untyped_storage()
        identity = storage._cdata  # noqa: SLF001 - torch's identity of a storage
        number = self._numbers.get(identity)
        if number is None:
            number = self._numbers[identity] = len(self.storages)
            self.storages.append(storage)
        at = storage.data_ptr()
        if self._dtypes.setdefault(at, dtype) is not dtype and at != 0:
            msg = "Cannot save multiple tensors or storages that view the same data as different types"
            raise RuntimeError(msg)
        shape, offset = tensor.shape, int(tensor.storage_offset())
        device = None if tensor.is_cpu else tensor.device
        form = (dtype, storage.nbytes(), device, offset, shape, tensor.stride(), tensor.requires_grad)
        found = self._forms.get(form)
        if found is None:
            # Twice: what is new in it is written in full now, and is referred to by all that come after it.
            found = (*self._form_of(*form, storage), Form(dtype, tuple(shape), offset))
            self._forms[form] = (*self._form_of(*form, storage), found[2])
        self.out += (found[0], _key_of(number), found[1])
        self.names.append(path)
        self.forms.append(found[2])
        self.numbers.append(number)

    def _form_of(
        self,
        dtype: torch.dtype,
        num_bytes: int,
        device: torch.device | None,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        requires_grad: bool,  # noqa: FBT001 - one of a form's fields, as they stand in it
        storage: torch.UntypedStorage,
    ) -> tuple[bytes, bytes]:
        """Return the bytes of such tensors: those before the number of the storage, and those after it."""
        kind = TYPES[dtype]
        location = "cpu" if device is None else torch.serialization.location_tag(storage)
        before = (
            self._global("torch._utils", "_rebuild_tensor_v2")
            + _MARK + _MARK + self._word("storage") + self._global(kind.__module__, kind.__name__)
        )  # fmt: skip
        after = (
            self._word(location) + _integer(num_bytes // dtype.itemsize) + _TUPLE + _PERSISTENT_ID
            + _integer(offset) + self._integers(shape) + self._integers(stride) + (_TRUE if requires_grad else _FALSE)
            + _NONE + _TUPLE + _REDUCE  # no hooks: torch writes an empty dict of them, for a reader of long ago
        )  # fmt: skip
        return before, after

    def _global(self, module: str, name: str) -> bytes:
        return self._once((module, name), f"c{module}\n{name}\n".encode())

    def _word(self, text: str) -> bytes:
        return self._once(text, _text(text))

    def _integers(self, values: tuple[int, ...]) -> bytes:
        if not values:
            return _EMPTY_TUPLE
        data, short = b"".join(map(_integer, values)), _SHORT_TUPLES.get(len(values))
        return self._once(values, _MARK + data + _TUPLE if short is None else data + short)

    def _once(self, what: Any, data: bytes) -> bytes:
        """Return bytes the first time, what refers to them afterwards."""
        found = self._memo.get(what)
        if found is not None:
            return found
        number = len(self._memo)
        put, get, length = (b"q", b"h", 1) if number < _BYTE else (b"r", b"j", 4)
        at = number.to_bytes(length, "little")
        self._memo[what] = get + at
        return data + put + at


_LENGTH = struct.Struct("<I")
_INT, _FLOAT = struct.Struct("<i"), struct.Struct(">d")
_BYTE, _TWO_BYTES, _FOUR_BYTES = 1 << 8, 1 << 16, 1 << 31
_MOST_LONG_BYTES = 255


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + _LENGTH.pack(len(data)) + data


def _key_of(number: int) -> bytes:
    """Return a storage's name in the pickle."""
    digits = b"%d" % number
    return b"X%c\0\0\0" % len(digits) + digits


def _integer(value: int) -> bytes:
    if 0 <= value < _BYTE:
        return b"K" + bytes((value,))
    if 0 <= value < _TWO_BYTES:
        return b"M" + value.to_bytes(2, "little")
    if -_FOUR_BYTES <= value < _FOUR_BYTES:
        return b"J" + _INT.pack(value)
    length = (value.bit_length() >> 3) + 1
    if length > _MOST_LONG_BYTES:
        raise NotPlain
    return b"\x8a" + bytes((length,)) + value.to_bytes(length, "little", signed=True)


def _scalar(value: Any, kind: type) -> bytes:
    if value is None:
        return _NONE
    if kind is bool:
        return _TRUE if value else _FALSE
    if kind is int:
        return _integer(value)
    if kind is float:
        return b"G" + _FLOAT.pack(value)
    if kind is str:
        return _text(value)
    raise NotPlain
