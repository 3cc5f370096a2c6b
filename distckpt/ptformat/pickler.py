"""State -> ``data.pkl`` and the storages that it refers to, without a byte of theirs being copied.

Owns the pickle inside a ``.pt``: made in one walk where the state is plain (:mod:`distckpt.ptformat.fast_pickle`),
else the same bytes that ``torch.save`` writes there, a few times faster for plain tensors. Must not know where the
storages come to lie.

Source: ``torch.serialization._save`` and ``torch.Tensor.__reduce_ex__`` of torch 2.9 to 2.13, whose format this is.
"""

import contextlib
import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distckpt.errors import ShardedStateError
from distckpt.ptformat.fast_pickle import TYPES, Form, NotPlain, TensorAt, emit, is_plain
from distckpt.ptformat.loadable import CALLED, Refused, find_refused
from distckpt.ptformat.sharded import find_paths, needs_a_look, refusal, shard_of, text_of_key, whole

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
        forms: of the tensors that stand in nested mappings and sequences: name, form, number of the storage.
        refused: a few of the objects that loading will refuse; empty where it will refuse none.
    """

    data: bytes
    storages: tuple[torch.UntypedStorage, ...]
    forms: Sequence[tuple[str, Form, int]]
    refused: Sequence[Refused] = ()

    def tensors(self) -> Iterator[TensorAt]:
        """Yield what the manifest says of the named tensors. Any thread."""
        known: dict[Form, tuple[str, tuple[int, ...], int, int]] = {}
        for name, form, number in self.forms:
            told = known.get(form)
            if told is None:
                size, text = form.dtype.itemsize, str(form.dtype).removeprefix("torch.")
                told = known[form] = (text, form.shape, form.offset * size, math.prod(form.shape) * size)
            text, shape, begin_bytes, num_bytes = told
            yield TensorAt(name, text, shape, number, begin_bytes, num_bytes)


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
            return Pickled(data, tuple(storages), tuple(forms))
    return pickle_exactly(state, protocol=protocol)


def pickle_exactly(state: Any, *, protocol: int = 2) -> Pickled:
    """Pickle `state` to the very bytes of ``torch.save``; else as :func:`pickle_state` does."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, protocol)
    with naming_what_is_sharded(state):
        pickler.dump(state)
    data = buffer.getvalue()
    kinds, called = pickler.kinds.values(), pickler.called.values()
    refused = find_refused(state, data, kinds=kinds, called=called, protocol=protocol)
    return Pickled(data, tuple(pickler.storages), tuple(_named(state, pickler.numbers)), refused)


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
        self.kinds: dict[int, type] = {}  # the types of objects that pickle has no opcodes for
        self.called: dict[int, Any] = {}  # classes and functions that are named
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
            if isinstance(obj, CALLED):
                self.called[id(obj)] = obj
            else:
                self.kinds[id(kind)] = kind
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


def _named(state: Any, numbers: Mapping[int, str]) -> Iterator[tuple[str, Form, int]]:
    """Yield what the manifest says of the tensors that can be named.

    The state is saved whatever it holds. So what raises when it is asked for its keys, its shape or its storage has no
    name; the objects are the user's, and may raise anything.
    """
    todo: list[tuple[str, Any, int]] = [("", state, 0)]
    seen: set[int] = set()  # a container is named where it is first met; it may hold itself
    while todo:
        path, item, level = todo.pop()
        try:
            if isinstance(item, torch.Tensor):
                form, storage = _form_of(item)
                if storage in numbers:
                    yield path, form, int(numbers[storage])
            elif id(item) not in seen and level < _LEVELS:
                seen.add(id(item))
                pairs = list(item.items() if isinstance(item, dict) else enumerate(item))
                lead = f"{path}." if path else ""
                todo += [
                    (f"{lead}{text_of_key(key)}", value, level + 1)
                    for key, value in reversed(pairs)
                    if isinstance(value, torch.Tensor | dict | list | tuple)
                ]
        except Exception:  # noqa: BLE001, S112 - see above
            continue


def _form_of(tensor: torch.Tensor) -> tuple[Form, int]:
    """Return a tensor's form, and torch's identity of its storage.

    Raises:
        Exception: it has none.
    """
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - what the pickler sees, no subclass's own answers
        if tensor.layout is not torch.strided or tensor.device.type == "meta":
            raise NotPlain
        form = Form(tensor.dtype, tuple(map(int, tensor.shape)), int(tensor.storage_offset()))
        return form, tensor.untyped_storage()._cdata  # noqa: SLF001 - as in the pickler
