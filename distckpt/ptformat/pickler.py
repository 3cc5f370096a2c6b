"""Make a state's ``data.pkl`` and the list of its storages, without copying them.

A plain state is pickled by :mod:`distckpt.ptformat.fast_pickle`. Any other gets the bytes that ``torch.save`` writes, a
few times as fast for plain tensors. Only a tensor whose storage does not consist of whole elements gets other bytes,
because ``torch.load`` cannot read what ``torch.save`` writes of it.

Source: ``torch.serialization._save`` and ``torch.Tensor.__reduce_ex__`` of torch 2.9 to 2.13.
"""

import contextlib
import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from distckpt.errors import ShardedStateError
from distckpt.ptformat.fast_pickle import (
    TYPES,
    Form,
    NotPlain,
    PlainWalk,
    TensorLocation,
    is_freed,
    is_plain,
    pickle_plain,
)
from distckpt.ptformat.loadable import CALLED, RefusedObject, find_refused
from distckpt.ptformat.sharded import (
    TensorShard,
    as_whole,
    describe_shard,
    find_paths,
    key_to_text,
    may_be_sharded,
    sharded_error,
)
from distckpt.ptformat.storage_facts import StorageFacts

PLAIN_PROTOCOL = 2
"""The protocol of plain pickles, and the only one that ``torch.load(weights_only=True)`` reads."""
_NEVER_STORAGES = frozenset(
    {str, int, float, bool, type(None), tuple, list, dict, OrderedDict, torch.Tensor, torch.Size}
)
_LEVELS = 16
"""Tensors below this level get no name in the manifest."""


@dataclass(frozen=True, slots=True)
class PickledState:
    """A pickled state and its storages.

    Attributes:
        data: the pickle.
        storages: the live storages, in the order of their numbers; each once.
        forms: name, form and number of the storage of each tensor in nested mappings and sequences.
        refused: the first objects that loading will refuse; empty if there are none.
        walk: what was read of a plain state; None for others.
        facts: of the storages, if they are known.
        sharded: what a :data:`~distckpt.ptformat.state_form.Reader` has found, if the pickle was made before.
    """

    data: bytes
    storages: tuple[torch.UntypedStorage, ...]
    forms: Sequence[tuple[str, Form, int]]
    refused: Sequence[RefusedObject] = ()
    walk: PlainWalk | None = None
    facts: StorageFacts | None = None
    sharded: Any = None

    def tensors(self) -> Iterator[TensorLocation]:
        """Yield the tensors that have names. Any thread."""
        known: dict[Form, tuple[str, tuple[int, ...], int, int]] = {}
        for name, form, number in self.forms:
            found = known.get(form)
            if found is None:
                size, text = form.dtype.itemsize, str(form.dtype).removeprefix("torch.")
                found = known[form] = (text, form.shape, form.offset * size, math.prod(form.shape) * size)
            text, shape, begin_bytes, num_bytes = found
            yield TensorLocation(name, text, shape, number, begin_bytes, num_bytes)


def pickle_state(
    state: Any, *, protocol: int = 2, num_shards: int = 0, shards: Mapping[int, TensorShard] | None = None
) -> PickledState:
    """Pickle `state` so that ``torch.load`` returns the same as from a file by ``torch.save``. Rank-local.

    Args:
        state: to pickle.
        protocol: of the pickle; ``torch.load(weights_only=True)`` reads 2 only.
        num_shards: number of the first storage; the numbers below are those of sharded tensors.
        shards: what stands for sharded tensors, by their ids, where the state still holds the tensors themselves.

    Raises:
        ShardedStateError: it holds another tensor of which this rank has a shard.
        RuntimeError: two storages view the same memory as different types.
        Exception: the error of a user's object that cannot be pickled.

    Example:
        >>> pickled = pickle_state({"a": torch.ones(2), "b": 1})
        >>> [storage.nbytes() for storage in pickled.storages], [tensor.name for tensor in pickled.tensors()]
        ([8], ['a'])
    """
    if protocol == PLAIN_PROTOCOL:
        with contextlib.suppress(NotPlain):
            walk = pickle_plain(state, num_shards)
            return PickledState(walk.data, tuple(walk.storages), tuple(walk.tensors()), walk=walk)
    return pickle_like_torch(state, protocol=protocol, num_shards=num_shards, shards=shards)


def pickle_like_torch(
    state: Any, *, protocol: int = 2, num_shards: int = 0, shards: Mapping[int, TensorShard] | None = None
) -> PickledState:
    """Pickle `state` to the bytes that ``torch.save`` writes; otherwise as :func:`pickle_state` does."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, protocol, num_shards, shards or {})
    with name_sharded_tensor(state):
        pickler.dump(state)
    data = buffer.getvalue()
    kinds, called = pickler.kinds.values(), pickler.called.values()
    refused = find_refused(state, data, kinds=kinds, called=called, protocol=protocol)
    for has_any, is_unreadable, what in (
        (pickler.has_freed, is_freed, "a tensor whose storage was freed"),
        (pickler.has_odd, _is_odd, "a tensor whose storage does not consist of whole elements"),
    ):
        paths = (find_paths(state, is_unreadable) or [""]) if has_any else []
        refused += tuple(RefusedObject(path, what) for path in paths)
    return PickledState(data, tuple(pickler.storages), tuple(_named(state, pickler.numbers, shards or {})), refused)


@contextlib.contextmanager
def name_sharded_tensor(state: Any) -> Iterator[None]:
    """Add the key of the tensor in `state` to a ShardedStateError of the body."""
    try:
        yield
    except ShardedStateError as error:
        sharded: list[str] = []

        def is_sharded(one: Any) -> bool:
            problem = describe_shard(one) if isinstance(one, torch.Tensor) else None
            sharded.extend([problem] if problem is not None else [])
            return problem is not None

        paths = find_paths(state, is_sharded, most=1)
        if not paths:
            raise
        raise sharded_error(f"Key {paths[0]!r} of the state", sharded[0]) from error


class _Storage:
    """Stands for a plain tensor's storage; torch's wrapper takes longer to create."""

    __slots__ = ("pid",)

    def __init__(self, pid: tuple[Any, ...]) -> None:
        self.pid = pid


class _Pickler(pickle.Pickler):
    def __init__(self, buffer: io.BytesIO, protocol: int, num_shards: int, shards: Mapping[int, TensorShard]) -> None:
        super().__init__(buffer, protocol)
        self._num_shards = num_shards
        self._shards = shards
        self.storages: list[torch.UntypedStorage] = []
        self.numbers: dict[int, str] = {}  # torch's identity of a storage -> its number
        self.kinds: dict[int, type] = {}  # types without opcodes of their own
        self.called: dict[int, Any] = {}  # classes and functions
        self.has_freed = False  # whether a tensor's storage lacks some of its elements
        self.has_odd = False  # whether a storage that does not consist of whole elements is pickled by its type
        self._dtypes: dict[int, torch.dtype] = {}  # address of the data -> dtype

    def persistent_id(self, obj: Any) -> Any:
        kind = type(obj)
        if kind in _NEVER_STORAGES:  # called for every object
            return None
        if kind is _Storage:
            return obj.pid
        if kind is torch.storage.TypedStorage or isinstance(obj, torch.storage.TypedStorage):
            # torch's own accessors would warn of their removal.
            name = obj._pickle_storage_type()  # noqa: SLF001
            self.has_odd = self.has_odd or _is_odd(obj)
            return self._pid_of(obj._untyped_storage, obj.dtype, getattr(torch, name), obj._size())  # noqa: SLF001
        if torch.is_storage(obj):
            storage: Any = obj
            return self._pid_of(storage, torch.uint8, torch.UntypedStorage, storage.nbytes())
        return None

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is OrderedDict and not obj and not vars(obj):  # each tensor has one, for hooks
            return OrderedDict, ()
        if kind is not torch.Tensor:
            found = self._reduce_sharded(obj, kind)
            if found is not None:
                return found
            if isinstance(obj, CALLED):
                self.called[id(obj)] = obj
            else:
                self.kinds[id(kind)] = kind
            return NotImplemented
        self.has_freed = self.has_freed or is_freed(obj)
        dtype = obj.dtype
        storage_type = TYPES.get(dtype)
        if storage_type is None or not is_plain(obj):
            return NotImplemented
        storage = obj.untyped_storage()
        numel, rest = divmod(storage.nbytes(), dtype.itemsize)
        location: tuple[Any, ...] = (
            obj.storage_offset(),
            tuple(obj.size()),
            obj.stride(),
            obj.requires_grad,
            OrderedDict(),
        )
        if rest:
            pid = self._pid_of(storage, dtype, torch.UntypedStorage, storage.nbytes())
            return torch._utils._rebuild_tensor_v3, (_Storage(pid), *location, dtype)  # noqa: SLF001 - as below
        pid = self._pid_of(storage, dtype, storage_type, numel)
        return torch._utils._rebuild_tensor_v2, (_Storage(pid), *location)  # noqa: SLF001 - the name that every .pt file calls

    def _reduce_sharded(self, obj: Any, kind: type) -> Any:
        """Return how a sharded or replicated tensor is pickled; None for other objects."""
        if kind is TensorShard:
            return _reduce_shard(obj)
        if not may_be_sharded(kind):
            return None
        if id(obj) in self._shards:
            return _reduce_shard(self._shards[id(obj)])
        plain: Any = as_whole(obj)
        if plain is obj:
            return None
        found = self.reducer_override(plain)
        return plain.__reduce_ex__(PLAIN_PROTOCOL) if found is NotImplemented else found

    def _pid_of(self, storage: torch.UntypedStorage, dtype: torch.dtype, kind: Any, numel: int) -> tuple[Any, ...]:
        device = storage.device
        if device.type != "meta":
            at = storage.data_ptr()
            if at != 0 and self._dtypes.setdefault(at, dtype) is not dtype:
                msg = "Cannot save multiple tensors or storages that view the same data as different types"
                raise RuntimeError(msg)
        identity = storage._cdata  # noqa: SLF001 - torch's identity of a storage
        key = self.numbers.get(identity)
        if key is None:
            key = self.numbers[identity] = str(self._num_shards + len(self.numbers))
            self.storages.append(storage)
        location = "cpu" if device.type == "cpu" else torch.serialization.location_tag(storage)
        return ("storage", kind, key, location, numel)


def _is_odd(one: Any) -> bool:
    """Return True for a tensor or typed storage whose bytes are no multiple of its element size."""
    if isinstance(one, torch.Tensor):
        if one.layout is not torch.strided or one.is_nested or one.is_quantized:
            return False
        storage = one.untyped_storage()
    elif isinstance(one, torch.storage.TypedStorage):
        storage = one._untyped_storage  # noqa: SLF001 - its own accessor warns
    else:
        return False
    return bool(storage.nbytes() % one.dtype.itemsize)


def _reduce_shard(shard: TensorShard) -> tuple[Any, ...]:
    """Return how a sharded tensor is pickled: as the whole tensor would be."""
    if shard.is_parameter:
        rebuild: Any = torch._utils._rebuild_parameter  # noqa: SLF001 - the name that every .pt file calls; below too
        return rebuild, (replace(shard, is_parameter=False), shard.requires_grad, OrderedDict())
    kind = TYPES.get(shard.dtype)
    numel = shard.num_bytes if kind is None else math.prod(shard.shape)
    pid = ("storage", torch.UntypedStorage if kind is None else kind, str(shard.number), "cpu", numel)
    args: tuple[Any, ...] = (_Storage(pid), 0, shard.shape, shard.strides, shard.requires_grad, OrderedDict())
    if kind is None:
        return torch._utils._rebuild_tensor_v3, (*args, shard.dtype)  # noqa: SLF001
    return torch._utils._rebuild_tensor_v2, args  # noqa: SLF001


def _named(
    state: Any, numbers: Mapping[int, str], shards: Mapping[int, TensorShard]
) -> Iterator[tuple[str, Form, int]]:
    """Yield name, form and number of the storage of the tensors.

    A user's object may raise anything when its keys, shape or storage are read. It is saved, but has no names.
    """
    todo: list[tuple[str, Any, int]] = [("", state, 0)]
    seen: set[int] = set()  # a container may hold itself
    while todo:
        path, item, level = todo.pop()
        try:
            shard = item if isinstance(item, TensorShard) else shards.get(id(item))
            if shard is not None:
                yield path, Form(shard.dtype, shard.shape, 0), shard.number
            elif isinstance(item, torch.Tensor):
                form, storage = _form_of(item)
                if storage in numbers:
                    yield path, form, int(numbers[storage])
            elif id(item) not in seen and level < _LEVELS:
                seen.add(id(item))
                pairs = list(item.items() if isinstance(item, dict) else enumerate(item))
                lead = f"{path}." if path else ""
                todo += [
                    (f"{lead}{key_to_text(key)}", value, level + 1)
                    for key, value in reversed(pairs)
                    if isinstance(value, torch.Tensor | TensorShard | dict | list | tuple)
                ]
        except Exception:  # noqa: BLE001, S112 - see above
            continue


def _form_of(tensor: torch.Tensor) -> tuple[Form, int]:
    """Return a tensor's form and torch's identity of its storage; raise an exception if it has none."""
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - as the pickler sees it, without a subclass's methods
        if tensor.layout is not torch.strided or tensor.device.type == "meta":
            raise NotPlain
        form = Form(tensor.dtype, tuple(map(int, tensor.shape)), int(tensor.storage_offset()))
        return form, tensor.untyped_storage()._cdata  # noqa: SLF001 - as in the pickler
