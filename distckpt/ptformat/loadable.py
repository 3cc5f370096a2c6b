"""What loading refuses: found while a state is pickled, or in a file.

Loading calls nothing by name but what torch's ``weights_only`` allows, what the program added to that by
``torch.serialization.add_safe_globals``, and NumPy's arrays and scalars. Saving and loading share that list here.

The pickler notes the types that it meets, which costs nothing. A pickle is read only where one of them is not known.
"""

import io
import pickle
import types
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from distckpt.ptformat.numpy_arrays import NAMES, holds_objects
from distckpt.ptformat.sharded import find_paths

__all__ = ["CALLED", "Refused", "find_refused", "names_refused", "paths_of_refused"]

_HARMLESS: Final = frozenset(
    {
        *(dict, OrderedDict, Counter, list, tuple, set),
        *(str, int, float, bool, bytes, bytearray, complex, type(None)),
        *(torch.Tensor, nn.Parameter, torch.Size, torch.device, torch.dtype, torch.layout),
    }
)
"""The types whose pickles call nothing but what every ``weights_only`` allows."""
CALLED: Final = (type, types.FunctionType, types.BuiltinFunctionType)
"""The types of what a pickle calls by name."""
_LONG: Final = b"\x8b"
"""The opcode of an integer of more than 255 bytes, which ``weights_only`` does not know."""
_LONG_BITS: Final = 255 * 8
_NEWEST_PROTOCOL: Final = 3
_MOST: Final = 3


class Refused(NamedTuple):
    """An object in a state that loading refuses.

    Attributes:
        path: the keys that lead to it, joined by dots; empty for the state itself.
        what: its class, or why it is refused.
    """

    path: str
    what: str


def find_refused(
    state: Any, data: bytes, *, kinds: Iterable[type], called: Iterable[Any], protocol: int
) -> tuple[Refused, ...]:
    """Return what loading refuses of a state that was just pickled: a few of them. Any thread.

    Args:
        state: what was pickled.
        data: its pickle.
        kinds: the types of the objects in it that pickle has no opcodes for.
        called: the classes and functions that it names.
        protocol: the pickle's.
    """
    if protocol > _NEWEST_PROTOCOL:
        return (Refused("", f"pickle_protocol={protocol}, above {_NEWEST_PROTOCOL}"),)
    odd = [*called, *(kind for kind in kinds if kind not in _HARMLESS)]
    has_arrays = any(kind.__module__.partition(".")[0] == "numpy" for kind in odd if isinstance(kind, type))
    if not names_refused(map(_name_of, odd)) and _LONG not in data and not (has_arrays and holds_objects(data)):
        return ()
    names = _refused_in(data)
    return paths_of_refused(state, names) if names else ()


def paths_of_refused(state: Any, names: Collection[str]) -> tuple[Refused, ...]:
    """Return where in a state the first objects are that pickle to some of the refused names. Slow: for messages."""
    found: list[Refused] = []
    whats: list[str] = []

    def is_refused(one: Any) -> bool:
        kind = type(one)
        is_odd = (kind is int and one.bit_length() >= _LONG_BITS) or (kind is bytes and not one)
        if kind in _HARMLESS and not is_odd:
            return False
        refused = _refused_alone(one)
        if refused is None:  # another pickler can pickle it, by names of its own
            whats.append(_name_of(kind))
            return True
        if not refused.intersection(names):
            return False
        own = _name_of(one if isinstance(one, CALLED) else type(one))
        whats.append(own if own in refused else min(refused.intersection(names)))
        return True

    paths = find_paths(state, is_refused, most=_MOST)
    found.extend(Refused(path, what) for path, what in zip(paths, whats, strict=True))
    return tuple(found) or tuple(Refused("", name) for name in sorted(names))


def names_refused(names: Iterable[str]) -> list[str]:
    """Return those of the names in a pickle that loading does not call."""
    unpickling: Any = torch._weights_only_unpickler  # noqa: SLF001 - as torch's get_unsafe_globals_in_checkpoint
    allowed = {*unpickling._get_allowed_globals(), *unpickling._get_user_allowed_globals(), *NAMES}  # noqa: SLF001
    return sorted(set(names) - allowed)


def _refused_in(data: bytes) -> list[str]:
    unpickling: Any = torch._weights_only_unpickler  # noqa: SLF001 - as above
    try:
        called = unpickling.get_globals_in_pkl(io.BytesIO(data))
        return names_refused(called | {"numpy.object_"} if called & NAMES and holds_objects(data) else called)
    except (pickle.UnpicklingError, EOFError) as error:
        return [str(error).splitlines()[0] if str(error) else type(error).__name__]


def _refused_alone(one: Any) -> set[str] | None:
    """Return the refused names in the pickle of one object; None where it cannot be pickled."""
    buffer = io.BytesIO()
    try:
        _Alone(buffer, 2).dump(one)
    except Exception:  # noqa: BLE001 - a user's own method
        return None
    return set(_refused_in(buffer.getvalue()))


class _Alone(pickle.Pickler):
    """A pickler that leaves storages out."""

    def persistent_id(self, obj: Any) -> Any:
        is_storage = isinstance(obj, torch.storage.TypedStorage) or torch.is_storage(obj)
        return "storage" if is_storage else None


def _name_of(one: Any) -> str:
    module = getattr(one, "__module__", None)
    name: str = getattr(one, "__qualname__", type(one).__name__)
    return f"{module}.{name}"
