"""State -> ``data.pkl`` and the storages that it refers to, without a byte of theirs being copied.

Owns the pickle inside a ``.pt``: made in one walk where the state is plain (:mod:`distckpt.storage.emitting`), else the
same bytes that ``torch.save`` writes there, a few times faster for plain tensors. Must not know where the storages come
to lie. Layer L2, below :mod:`distckpt.storage.ptfile`.

Source: ``torch.serialization._save`` and ``torch.Tensor.__reduce_ex__`` of torch 2.9 to 2.13, whose format this is.
"""

import contextlib
import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distckpt.errors import ShardedStateError
from distckpt.sharded import find_paths, needs_a_look, refusal, shard_of, whole
from distckpt.storage.emitting import TYPES, NotPlain, TensorAt, emit, is_plain

__all__ = ["Pickled", "TensorAt", "pickle_exactly", "pickle_state"]

_EMITTED_PROTOCOL = 2
_NEVER_STORAGES = frozenset(
    {str, int, float, bool, type(None), tuple, list, dict, OrderedDict, torch.Tensor, torch.Size}
)
_LEVELS = 16
"""How far down the state's tensors are named."""


@dataclass(frozen=True, slots=True)
class Pickled:
    """A state, with its storages apart.

    Attributes:
        data: the pickle.
        storages: what it refers to, by number; shared ones once. They are the live ones, not copies.
        forms: of the tensors that stand in nested mappings and sequences: name, dtype, shape, number of the storage,
            offset in elements.
    """

    data: bytes
    storages: tuple[torch.UntypedStorage, ...]
    forms: Sequence[tuple[str, torch.dtype, tuple[int, ...], int, int]]

    def tensors(self) -> Iterator[TensorAt]:
        """Yield what the manifest says of the named tensors. Any thread."""
        for name, dtype, shape, number, offset in self.forms:
            size, text = dtype.itemsize, str(dtype).removeprefix("torch.")
            yield TensorAt(name, text, tuple(shape), number, offset * size, math.prod(shape) * size)


def pickle_state(state: Any, *, protocol: int = 2) -> Pickled:
    """Pickle `state`: what ``torch.load`` gets from it is what it would get from ``torch.save``'s.

    Rank-local; issues no collectives.

    Args:
        state: what ``torch.save`` takes.
        protocol: pickle's; torch's readers without code know 2 alone.

    Raises:
        ShardedStateError: it holds a tensor of which this rank has a part.
        RuntimeError: two storages view the same memory as different types.
        Exception: whatever pickling an object of the user's raises.

    Example:
        >>> pickled = pickle_state({"a": torch.ones(2), "b": 1})
        >>> [storage.nbytes() for storage in pickled.storages], [tensor.name for tensor in pickled.tensors()]
        ([8], ['a'])
    """
    if protocol == _EMITTED_PROTOCOL:
        with contextlib.suppress(NotPlain):
            data, storages, forms = emit(state)
            return Pickled(data, tuple(storages), forms)
    return pickle_exactly(state, protocol=protocol)


def pickle_exactly(state: Any, *, protocol: int = 2) -> Pickled:
    """Pickle `state` to the very bytes of ``torch.save``; else as :func:`pickle_state` does."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, protocol)
    with naming_what_is_sharded(state):
        pickler.dump(state)
    forms = []
    for name, tensor in _tensors(state, "", 0):
        if tensor.layout is torch.strided and tensor.device.type != "meta":
            number = pickler.numbers.get(tensor.untyped_storage()._cdata)  # noqa: SLF001 - as in the pickler
            if number is not None:
                forms.append((name, tensor.dtype, tensor.shape, int(number), int(tensor.storage_offset())))
    return Pickled(buffer.getvalue(), tuple(pickler.storages), forms)


@contextlib.contextmanager
def naming_what_is_sharded(state: Any) -> Iterator[None]:
    """Give the error of a sharded tensor that is met in the body the key that it stands at in `state`."""
    try:
        yield
    except ShardedStateError as error:
        sharded: list[str] = []

        def is_sharded(one: Any) -> bool:
            problem = shard_of(one) if isinstance(one, torch.Tensor) else None
            sharded.extend([problem] if problem is not None else [])
            return problem is not None

        paths = find_paths(state, is_sharded, most=1)
        if not paths:
            raise
        raise refusal(f"Key {paths[0]!r} of the state", sharded[0]) from error


class _Storage:
    """A plain tensor's storage in the pickle, in the place of torch's wrapper, which takes longer to make."""

    __slots__ = ("pid",)

    def __init__(self, pid: tuple[Any, ...]) -> None:
        self.pid = pid


class _Pickler(pickle.Pickler):
    def __init__(self, buffer: io.BytesIO, protocol: int) -> None:
        super().__init__(buffer, protocol)
        self.storages: list[torch.UntypedStorage] = []
        self.numbers: dict[int, str] = {}  # torch's identity of a storage -> its number
        self._dtypes: dict[int, torch.dtype] = {}  # where its data lie -> their dtype

    def persistent_id(self, obj: Any) -> Any:
        kind = type(obj)
        if kind in _NEVER_STORAGES:  # the pickler asks of every object there is
            return None
        if kind is _Storage:
            return obj.pid
        if kind is torch.storage.TypedStorage or isinstance(obj, torch.storage.TypedStorage):
            # torch's own accessors would warn of their removal.
            name = obj._pickle_storage_type()  # noqa: SLF001
            return self._pid_of(obj._untyped_storage, obj.dtype, getattr(torch, name), obj._size())  # noqa: SLF001
        if torch.is_storage(obj):
            storage: Any = obj
            return self._pid_of(storage, torch.uint8, torch.UntypedStorage, storage.nbytes())
        return None

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is OrderedDict and not obj and not vars(obj):  # each tensor has one, of hooks
            return OrderedDict, ()
        if kind is not torch.Tensor:
            if needs_a_look(kind):
                plain: Any = whole(obj)
                if plain is not obj:
                    found = self.reducer_override(plain)
                    return plain.__reduce_ex__(_EMITTED_PROTOCOL) if found is NotImplemented else found
            return NotImplemented
        dtype = obj.dtype
        storage_type = TYPES.get(dtype)
        if storage_type is None or not is_plain(obj):
            return NotImplemented
        storage = obj.untyped_storage()
        pid = self._pid_of(storage, dtype, storage_type, storage.nbytes() // dtype.itemsize)
        args: tuple[Any, ...] = (
            _Storage(pid),
            obj.storage_offset(),
            tuple(obj.size()),
            obj.stride(),
            obj.requires_grad,
            OrderedDict(),
        )
        return torch._utils._rebuild_tensor_v2, args  # noqa: SLF001 - by this name every .pt calls it

    def _pid_of(self, storage: torch.UntypedStorage, dtype: torch.dtype, kind: Any, numel: int) -> tuple[Any, ...]:
        device = storage.device
        if device.type != "meta":
            at = storage.data_ptr()
            if at != 0 and self._dtypes.setdefault(at, dtype) is not dtype:
                msg = "Cannot save multiple tensors or storages that view the same data as different types"
                raise RuntimeError(msg)
        identity = storage._cdata  # noqa: SLF001 - torch's identity of a storage, whatever Python wraps it
        key = self.numbers.get(identity)
        if key is None:
            key = self.numbers[identity] = str(len(self.numbers))
            self.storages.append(storage)
        location = "cpu" if device.type == "cpu" else torch.serialization.location_tag(storage)
        return ("storage", kind, key, location, numel)


def _tensors(tree: Any, path: str, level: int) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield path, tree
        return
    if level == _LEVELS or not isinstance(tree, dict | list | tuple):
        return
    for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(item, torch.Tensor | dict | list | tuple):
            yield from _tensors(item, f"{path}.{key}" if path else str(key), level + 1)
