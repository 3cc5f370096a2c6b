"""Find the objects of a state that loading will refuse.

Loading calls by name only what torch's ``weights_only`` allows, what the program has added by
``torch.serialization.add_safe_globals``, and NumPy's arrays and scalars.

The pickler notes the types of all objects, which costs nothing. The pickle is examined only if one of them is unknown.
"""

import io
import pickle
import re
import types
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from distckpt.ptformat.numpy_arrays import NAMES, find_lost_arrays, holds_objects
from distckpt.ptformat.sharded import find_paths

_HARMLESS: Final = frozenset(
    {
        *(dict, OrderedDict, Counter, list, tuple, set),
        *(str, int, float, bool, bytes, bytearray, complex, type(None)),
        *(torch.Tensor, nn.Parameter, torch.Size, torch.device, torch.dtype, torch.layout),
    }
)
"""Types whose pickles call only what ``weights_only`` always allows."""
CALLED: Final = (type, types.FunctionType, types.BuiltinFunctionType)
"""Types of what a pickle calls by name."""
_LONG: Final = b"\x8b"
_TUPLE_ENDS: Final = re.compile(rb"0[hj]"), re.compile(rb"1[hj]")
"""Opcodes of a pickle of protocol 2 that ``weights_only`` does not know: that of an integer of more than 255 bytes, and
those that end a tuple which contains itself. Text and numbers match too. A search for a pattern that begins with a
literal is twenty times as fast."""
_LONG_BITS: Final = 255 * 8
_PROTOCOL: Final = 2
_NEWEST_PROTOCOL: Final = 3
_UNKNOWN_OPERAND: Final = "Unsupported operand "
_TUPLE: Final = "a tuple that contains itself"
_OPERANDS: Final = {
    **dict.fromkeys(("48", "49"), _TUPLE),
    **dict.fromkeys(("66", "67"), "bytes by pickle_protocol=3"),
    "139": "an integer of more than 255 bytes",
}
"""What pickles to opcodes that ``weights_only`` does not know, by their numbers."""
_MOST: Final = 3


class RefusedObject(NamedTuple):
    """An object of a state that loading refuses.

    Attributes:
        path: the keys that lead to it, joined by dots; empty for the state itself.
        what: its class, or why it is refused.
    """

    path: str
    what: str


def find_refused(
    state: Any, data: bytes, *, kinds: Iterable[type], called: Iterable[Any], protocol: int
) -> tuple[RefusedObject, ...]:
    """Return the first objects of a state that loading will refuse. Any thread.

    Args:
        state: what was pickled to `data`.
        data: the pickle.
        kinds: types of its objects that pickle has no opcodes for.
        called: classes and functions that the pickle names.
        protocol: version of the pickle format.
    """
    if protocol > _NEWEST_PROTOCOL:
        return (RefusedObject("", f"pickle_protocol={protocol}, above {_NEWEST_PROTOCOL}"),)
    odd = [*called, *(kind for kind in kinds if kind not in _HARMLESS)]
    has_arrays = any(kind.__module__.partition(".")[0] == "numpy" for kind in odd if isinstance(kind, type))
    is_odd = protocol != _PROTOCOL or _LONG in data or any(one.search(data) for one in _TUPLE_ENDS)
    if is_odd or (has_arrays and holds_objects(data)) or refused_names(map(_name_of, odd)):
        names = _refused_in(data)
        if names:
            return locate_refused(state, names, protocol=protocol)
    lost = find_lost_arrays(state, most=_MOST) if has_arrays else []
    return tuple(RefusedObject(path, "a NumPy array or dtype where none can be read") for path in lost)


def locate_refused(state: Any, names: Collection[str], *, protocol: int = _PROTOCOL) -> tuple[RefusedObject, ...]:
    """Return the first objects of a state that pickle to one of the refused names. Slow: for messages."""
    found: list[RefusedObject] = []
    whats: list[str] = []

    def is_refused(one: Any) -> bool:
        kind = type(one)
        is_odd = (
            (kind is int and one.bit_length() >= _LONG_BITS) or kind is bytes or (kind is tuple and _TUPLE in names)
        )
        if kind in _HARMLESS and not is_odd:
            return False
        refused = _refused_names_of(one, protocol)
        if refused is None:  # only another pickler can pickle it, with its own names
            whats.append(_name_of(kind))
            return True
        if not refused.intersection(names):
            return False
        own = _name_of(one if isinstance(one, CALLED) else type(one))
        whats.append(own if own in refused else min(refused.intersection(names)))
        return True

    paths = find_paths(state, is_refused, most=_MOST)
    found.extend(RefusedObject(path, what) for path, what in zip(paths, whats, strict=True))
    return tuple(found) or tuple(RefusedObject("", name) for name in sorted(names))


def find_unreadable(data: bytes) -> str | None:
    """Return a phrase for the first value of a pickle with an opcode that ``weights_only`` does not know; else None."""
    try:
        torch._weights_only_unpickler.get_globals_in_pkl(io.BytesIO(data))  # noqa: SLF001 - as below
    except Exception as error:  # noqa: BLE001 - of what a damaged pickle holds
        what = describe_unreadable(error)
        return what if what in _OPERANDS.values() else None
    return None


def describe_unreadable(error: Exception) -> str:
    """Return what torch's unpickler cannot read, as a phrase, from the error that it has raised."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return _OPERANDS.get(text.removeprefix(_UNKNOWN_OPERAND), text)


def refused_names(names: Iterable[str]) -> list[str]:
    """Return those of a pickle's names that loading refuses to call."""
    unpickling: Any = torch._weights_only_unpickler  # noqa: SLF001 - as torch's get_unsafe_globals_in_checkpoint
    allowed = {*unpickling._get_allowed_globals(), *unpickling._get_user_allowed_globals(), *NAMES}  # noqa: SLF001
    return sorted(set(names) - allowed)


def _refused_in(data: bytes) -> list[str]:
    unpickling: Any = torch._weights_only_unpickler  # noqa: SLF001 - as above
    try:
        called = unpickling.get_globals_in_pkl(io.BytesIO(data))
        return refused_names(called | {"numpy.object_"} if called & NAMES and holds_objects(data) else called)
    except (pickle.UnpicklingError, EOFError) as error:
        return [describe_unreadable(error)]


def _refused_names_of(one: Any, protocol: int) -> set[str] | None:
    """Return the refused names in the pickle of one object; None if it cannot be pickled."""
    buffer = io.BytesIO()
    try:
        _WithoutStorages(buffer, protocol).dump(one)
    except Exception:  # noqa: BLE001 - a user's own method
        return None
    return set(_refused_in(buffer.getvalue()))


class _WithoutStorages(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        is_storage = isinstance(obj, torch.storage.TypedStorage) or torch.is_storage(obj)
        return "storage" if is_storage else None


def _name_of(one: Any) -> str:
    module = getattr(one, "__module__", None)
    name: str = getattr(one, "__qualname__", type(one).__name__)
    return f"{module}.{name}"
