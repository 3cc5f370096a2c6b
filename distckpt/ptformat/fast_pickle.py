"""Pickle a plain state in one walk, and note its storages: tensors, numbers and text in dicts, lists and tuples.

Other states are left to :mod:`distckpt.ptformat.pickler`. Python's pickler needs about ten microseconds a tensor, while
training waits; this one needs two. It writes what tensors have in common once, into the pickle's memo, and tensors of
one form share their bytes.

Source: ``pickletools`` of Python 3.11, protocol 2. ``torch._weights_only_unpickler`` of torch 2.9 to 2.13 knows all
opcodes that are used here.
"""

import struct
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch

from distckpt.ptformat.sharded import TensorShard

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
"""The storage types by which a pickle names dtypes. Other dtypes have none."""

_STRIDED, _COMPLEX = torch.strided, frozenset({torch.complex64, torch.complex128})

_PROTOCOL, _STOP = b"\x80\x02", b"."
_MARK, _REDUCE, _BUILD, _SET_ITEMS, _APPEND_ITEMS, _TUPLE, _PERSISTENT_ID = b"(", b"R", b"b", b"u", b"e", b"t", b"Q"
_EMPTY_DICT, _EMPTY_LIST, _EMPTY_TUPLE = b"}", b"]", b")"
_NONE, _TRUE, _FALSE = b"N", b"\x88", b"\x89"
_SHORT_TUPLES = {1: b"\x85", 2: b"\x86", 3: b"\x87"}
_LEVELS: Final = 64
"""Most levels of a plain state."""


_TensorForm = tuple[torch.dtype, int, torch.device | None, int, tuple[int, ...], tuple[int, ...], bool]
"""dtype, bytes of the storage, device unless it is the CPU, offset, shape, strides, requires_grad."""


class NotPlain(Exception):  # noqa: N818 - a reason, always caught
    """The state holds an object that is not plain, or one object twice."""


class Form(NamedTuple):
    """What tensors of one form have in common.

    Attributes:
        dtype: of the elements.
        shape: sizes.
        offset: of the first element in its storage, in elements.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class TensorLocation(NamedTuple):
    """A tensor of a state, for the manifest.

    Attributes:
        name: the keys that lead to it, joined by dots.
        dtype: such as ``float32``.
        shape: its sizes.
        storage: number of its storage.
        begin_bytes: offset of its first element in that storage.
        num_bytes: length of its elements.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    storage: int
    begin_bytes: int
    num_bytes: int


def pickle_plain(state: Any, num_shards: int = 0) -> "PlainWalk":
    """Pickle a plain state by protocol 2, and return what was read of it. Rank-local; issues no collectives.

    Args:
        state: to pickle.
        num_shards: number of the first storage; the numbers below are those of sharded tensors.

    Raises:
        NotPlain: it is not plain.
        RuntimeError: two storages view the same memory as different types.

    Example:
        >>> pickled = pickle_plain({"a": torch.ones(2), "b": 1})
        >>> len(pickled.storages), [name for name, _, _ in pickled.tensors()]
        (1, ['a'])
    """
    walk = PlainWalk(num_shards)
    walk.put(state, "", 0)
    return walk


def join_parts(parts: Sequence[bytes]) -> bytes:
    """Return the pickle that consists of the parts of a :class:`PlainWalk`."""
    return b"".join((_PROTOCOL, *parts, _STOP))


def is_plain(tensor: torch.Tensor) -> bool:
    """Return True if storage, sizes and strides say everything about a tensor whose dtype is in `TYPES`."""
    return (
        tensor.layout is _STRIDED
        and (tensor.is_cpu or tensor.is_cuda)
        and not tensor.is_neg()
        and not tensor.is_nested
        and not (tensor.dtype in _COMPLEX and tensor.is_conj())
        and not tensor.__dict__
        and not tensor._backward_hooks  # noqa: SLF001 - torch warns of them where it pickles
    )


def has_elements(dtype: torch.dtype, num_bytes: int, offset: int, shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Return True if a storage contains all elements of a tensor.

    Args:
        dtype: of the tensor.
        num_bytes: of the storage.
        offset: of the tensor's first element, in elements.
        shape: sizes.
        stride: in elements.

    Example:
        >>> has_elements(torch.float32, 8, 0, (2,), (1,)), has_elements(torch.float32, 8, 1, (2,), (1,))
        (True, False)
    """
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return 0 in shape or (last + 1) * dtype.itemsize <= num_bytes


def is_freed(tensor: torch.Tensor) -> bool:
    """Return True for a dense tensor whose storage lacks some of its elements, as after ``storage.resize_(0)``."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not _STRIDED:
        return False
    if tensor.is_meta or tensor.is_nested or tensor.is_quantized:
        return False
    num_bytes = tensor.untyped_storage().nbytes()
    return not has_elements(tensor.dtype, num_bytes, int(tensor.storage_offset()), tensor.shape, tensor.stride())


class PlainWalk:
    """A walk over a plain state.

    IMPORTANT: whatever it reads of a state must be compared by :mod:`distckpt.ptformat.state_form` too.

    Args:
        num_shards: number of the first storage.

    Attributes:
        num_shards: the storages of lower numbers are sharded tensors.
        out: the pickle in parts, see :func:`join_parts`.
        scalars_at: for each number and text that is no key, the index of its bytes in `out`.
        storages: the live storages, in the order of their numbers; each once.
        names: of the tensors.
        forms: of the tensors, for the manifest.
        numbers: of the tensors' storages.
        tensor_forms: all that was read of each tensor, except for its storage's number: dtype, bytes of its storage,
            device unless it is the CPU, offset, shape, strides, requires_grad. Tensors of one form share it.
    """

    def __init__(self, num_shards: int = 0) -> None:
        self.num_shards = num_shards
        self.out: list[bytes] = []
        self.scalars_at: list[int] = []
        self.storages: list[torch.UntypedStorage] = []
        # One item a tensor. No tuples: many new objects make the garbage collector examine all.
        self.names: list[str] = []
        self.forms: list[Form] = []
        self.numbers: list[int] = []
        self.tensor_forms: list[_TensorForm] = []
        self._memo: dict[Any, bytes] = {}  # what is written once -> the bytes that refer to it
        self._seen: set[int] = set()  # containers and tensors
        self._numbers: dict[int, int] = {}  # torch's identity of a storage -> its number
        self._dtypes: dict[int, torch.dtype] = {}  # address of the data -> dtype
        self._forms: dict[_TensorForm, tuple[bytes, bytes, Form, _TensorForm]] = {}
        self._keys: dict[str, bytes] = {}  # many mappings have the same keys

    @property
    def data(self) -> bytes:
        """The pickle."""
        return join_parts(self.out)

    def tensors(self) -> Iterator[tuple[str, Form, int]]:
        """Yield name, form and number of the storage of each tensor."""
        return zip(self.names, self.forms, self.numbers, strict=True)

    def without_shards(self) -> "PlainWalk":
        """Return what was read of the tensors that are not sharded. Their storages are numbered from 0."""
        found = PlainWalk()
        plain = [index for index, number in enumerate(self.numbers) if number >= self.num_shards]
        found.forms = [self.forms[index] for index in plain]
        found.numbers = [self.numbers[index] - self.num_shards for index in plain]
        found.tensor_forms = [self.tensor_forms[index] for index in plain]
        return found

    def put(self, value: Any, path: str, level: int) -> None:
        """Pickle an object that is at `path`, inside of `level` containers; raise NotPlain if it is not plain."""
        kind = type(value)
        if kind is torch.Tensor:
            self._put_tensor(value, path)
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
        elif kind is TensorShard:
            self._put_shard(value, path)
        else:
            self.scalars_at.append(len(self.out))
            self.out.append(scalar_bytes(value))

    def _see(self, value: Any, level: int) -> None:
        """Raise NotPlain for an object that pickle would write once and refer to later, or that contains itself."""
        if id(value) in self._seen or level > _LEVELS:
            raise NotPlain
        self._seen.add(id(value))

    def _put_items(self, items: Any, path: str, level: int) -> None:
        for number, item in enumerate(items):
            self.put(item, f"{path}.{number}" if path else str(number), level + 1)

    def _put_tuple(self, value: tuple[Any, ...], path: str, level: int) -> None:
        if level > _LEVELS:
            raise NotPlain
        if tuple in map(type, value):  # a flat tuple may occur twice, as the betas of an optimizer do
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
                    out.append(scalar_bytes(key))
                if type(item) is torch.Tensor:
                    self._put_tensor(item, f"{lead}{key}")
                else:
                    self.put(item, f"{lead}{key}", level + 1)
            out.append(_SET_ITEMS)
        if is_ordered and vars(value):  # a module's `_metadata`
            self.put(vars(value), "", level + 1)
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
            number = self._numbers[identity] = self.num_shards + len(self.storages)
            self.storages.append(storage)
        at = storage.data_ptr()
        if self._dtypes.setdefault(at, dtype) is not dtype and at != 0:
            raise RuntimeError("Cannot save multiple tensors or storages that view the same data as different types")
        shape, offset = tensor.shape, int(tensor.storage_offset())
        device = None if tensor.is_cpu else tensor.device
        form = (dtype, storage.nbytes(), device, offset, shape, tensor.stride(), tensor.requires_grad)
        self._put_form(form, storage, number, path)

    def _put_shard(self, shard: TensorShard, path: str) -> None:
        if shard.dtype not in TYPES or shard.is_parameter or id(shard) in self._seen:
            raise NotPlain
        self._seen.add(id(shard))
        form = (shard.dtype, shard.num_bytes, None, 0, shard.shape, shard.strides, shard.requires_grad)
        self._put_form(form, None, shard.number, path)

    def _put_form(self, form: _TensorForm, storage: torch.UntypedStorage | None, number: int, path: str) -> None:
        dtype, num_bytes, _, offset, shape, stride, _ = form
        found = self._forms.get(form)
        if found is None:
            if num_bytes % dtype.itemsize or not has_elements(dtype, num_bytes, offset, shape, stride):
                raise NotPlain
            # Twice: the first tensor writes its parts in full, and later ones refer to them.
            found = (*self._form_of(*form, storage), Form(dtype, tuple(shape), offset), form)
            self._forms[form] = (*self._form_of(*form, storage), *found[2:])
        self.out += (found[0], _storage_key(number), found[1])
        self.names.append(path)
        self.forms.append(found[2])
        self.tensor_forms.append(found[3])
        self.numbers.append(number)

    def _form_of(
        self,
        dtype: torch.dtype,
        num_bytes: int,
        device: torch.device | None,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        requires_grad: bool,  # noqa: FBT001 - a field of a form
        storage: torch.UntypedStorage | None,
    ) -> tuple[bytes, bytes]:
        """Return a tensor's bytes before and after the number of its storage."""
        kind = TYPES[dtype]
        location = "cpu" if device is None or storage is None else torch.serialization.location_tag(storage)
        before = (
            self._global("torch._utils", "_rebuild_tensor_v2")
            + _MARK + _MARK + self._text_once("storage") + self._global(kind.__module__, kind.__name__)
        )  # fmt: skip
        after = (
            self._text_once(location) + _integer(num_bytes // dtype.itemsize) + _TUPLE + _PERSISTENT_ID
            + _integer(offset) + self._integers(shape) + self._integers(stride) + (_TRUE if requires_grad else _FALSE)
            + _NONE + _TUPLE + _REDUCE  # no hooks; torch writes an empty dict for very old readers
        )  # fmt: skip
        return before, after

    def _global(self, module: str, name: str) -> bytes:
        return self._once((module, name), f"c{module}\n{name}\n".encode())

    def _text_once(self, text: str) -> bytes:
        return self._once(text, _text(text))

    def _integers(self, values: tuple[int, ...]) -> bytes:
        if not values:
            return _EMPTY_TUPLE
        data, short = b"".join(map(_integer, values)), _SHORT_TUPLES.get(len(values))
        return self._once(values, _MARK + data + _TUPLE if short is None else data + short)

    def _once(self, what: Any, data: bytes) -> bytes:
        """Return `data` the first time, and then bytes that refer to it."""
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


def _storage_key(number: int) -> bytes:
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


def scalar_bytes(value: Any) -> bytes:
    """Return the opcodes of None, a bool, int, float or str; raise NotPlain for anything else."""
    kind = type(value)
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
