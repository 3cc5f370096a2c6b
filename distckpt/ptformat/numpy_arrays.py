"""NumPy arrays and scalars in a checkpoint, read without executing anything.

Owns what stands for NumPy's own names in a pickle. Must not know where the pickle comes from.

torch's unpickler for ``weights_only`` knows none of NumPy's names. Its list can be added to for a while, but NumPy's
own functions must not be on it: a crafted ``dtype`` state makes NumPy take numbers for addresses of objects. So
functions of this module stand there. They check what they are given, and build arrays by NumPy's public functions, of a
dtype without objects and as many bytes as it needs. An array's pickle is a call and then a state; so until all is read,
placeholders stand where arrays go.

NumPy is imported where a file has arrays, and only there. Bytes of no length are pickled as a call, too.

Source: ``array_reduce`` and ``arraydescr_reduce`` of NumPy 1.26 and 2.3 (``numpy/_core/src/multiarray``).
"""

import contextlib
import math
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import numpy as np

__all__ = ["NAMES", "NumpyRefused", "holds_objects", "is_left_to_us", "numpy_allowed"]

_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
"""Of NumPy 1 and 2."""
NAMES = frozenset(
    {"numpy.dtype", "numpy.ndarray", "numpy.memmap", "builtins.bytes", "__builtin__.bytes"}
    | {f"{one}.{name}" for one in _MODULES for name in ("_reconstruct", "scalar")}
)
"""What may be called by name."""

_OBJECTS = re.compile(rb"X\x02\x00\x00\x00O[48](?:q.|r.{4})?(?:\x89|K\x00)(?:\x88|K\x01)\x87", re.DOTALL)
"""The arguments of the dtype of objects in a pickle of protocol 2 or 3."""
_CODE = re.compile(r"(?:b1|[iufcSUVMm]\d{1,9})\Z")
_UNIT = re.compile(r"[A-Za-z]{1,7}\Z")
_STATE_FIELDS = 8
_ARRAY_FIELDS = 5
_ALIGNED = 0x80
"""NumPy's flag of a dtype whose fields stand where C would have them."""
_UNSPELLABLE = "\n"
"""Begins names that stand in torch's list and that no pickle can name: it reads them by the line."""
_LOCK = threading.Lock()
_NDARRAY = object()
"""Stands for the class, which is only passed on. A memmap is pickled with its data, and loads as an array."""


class NumpyRefused(Exception):  # noqa: N818 - a reason, always caught
    """What NumPy wrote there is not read; the text says why."""


class _Placeholder:
    """Stands for what its state will tell of."""

    __slots__ = ("is_built", "value")
    __hash__ = None  # type: ignore[assignment]  # as an array: it is no key, and in no set

    def __init__(self, value: Any = None) -> None:
        self.value = value
        self.is_built = False

    def build(self, value: Any) -> None:
        if self.is_built:
            msg = "its state is given twice"
            raise NumpyRefused(msg)
        self.is_built, self.value = True, value


class _DType(_Placeholder):
    """A dtype: of its name at first."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        self.build(_dtype_of(self.value, state))


class _Array(_Placeholder):
    """An array that is to come."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        np = _numpy()
        _require(type(state) is tuple and len(state) == _ARRAY_FIELDS, "an array's state")
        _, shape, dtype, is_fortran, data = state
        _require(type(shape) is tuple and all(type(one) is int and one >= 0 for one in shape), "an array's shape")
        found = _without_objects(dtype)
        num_bytes = math.prod(shape) * found.itemsize
        _require(type(data) is bytes and len(data) == num_bytes, "an array's bytes")
        order = "F" if is_fortran else "C"
        if not num_bytes:
            self.build(np.empty(shape, found, order=order))
            return
        self.build(np.frombuffer(data, found).reshape(shape, order=order).copy(order))


@contextlib.contextmanager
def numpy_allowed() -> Iterator[Callable[[Any], Any]]:
    """Have torch's ``weights_only`` unpickler read NumPy's arrays while the body runs.

    Yields:
        What puts the arrays where their placeholders stand in what was read; takes and returns the tree.

    Raises:
        NumpyRefused: in the body: something is no array, or one of objects.
    """
    arrays: list[_Array] = []

    def reconstruct(kind: Any, _shape: Any, _code: Any) -> _Array:
        _require(kind is _NDARRAY, "an array's class")
        arrays.append(_Array())
        return arrays[-1]

    allowed: list[Any] = [(_dtype, "numpy.dtype"), (_no_bytes, "builtins.bytes")]
    allowed += [(_NDARRAY, "numpy.ndarray"), (_NDARRAY, "numpy.memmap")]
    for module in _MODULES:
        allowed += [(reconstruct, f"{module}._reconstruct"), (_scalar, f"{module}.scalar")]
    allowed += [(kind, _UNSPELLABLE + kind.__name__) for kind in (_Array, _DType)]  # their states may be set
    with _LOCK, torch.serialization.safe_globals(allowed):
        yield lambda tree: _restored(tree, arrays)


def is_left_to_us() -> bool:
    """Return True if the program has not told torch of a way of its own to read NumPy's arrays."""
    told = torch.serialization.get_safe_globals()
    names = [one[1] if isinstance(one, tuple) else getattr(one, "__module__", "") for one in told]
    return not any(isinstance(name, str) and name.split(".")[0] == "numpy" for name in names)


def holds_objects(data: bytes) -> bool:
    """Return True if a pickle that holds NumPy's arrays holds one of objects.

    Args:
        data: of protocol 2 or 3.
    """
    return _OBJECTS.search(data) is not None


def _numpy() -> Any:
    try:
        import numpy as np  # noqa: PLC0415 - only where a file has arrays
    except ImportError as error:
        msg = "NumPy arrays, and NumPy is not installed here"
        raise NumpyRefused(msg) from error
    return np


def _restored(tree: Any, arrays: list[_Array]) -> Any:
    """Put arrays where their placeholders stand.

    Raises:
        NumpyRefused: one of them stands in something that is not looked into.
    """
    filling = _Filling()
    found = filling.filled(tree)
    if len(filling.met) != len(arrays):
        msg = "a NumPy array stands in an object that is no mapping, list or tuple"
        raise NumpyRefused(msg)
    return found


class _Filling:
    """One walk over a tree that puts arrays where their placeholders stand.

    Attributes:
        met: the placeholders that it has come to, by their identity.
    """

    def __init__(self) -> None:
        self.met: set[int] = set()
        self._seen: dict[int, Any] = {}  # a container's identity -> what is in its place

    def filled(self, value: Any) -> Any:
        """Return what is to be in a value's place: a container is the same one, but for tuples."""
        kind = type(value)
        if kind is _Array:
            _require(value.is_built, "an array without a state")
            self.met.add(id(value))
            return value.value
        if kind is _DType:
            return value.value
        if kind not in (dict, OrderedDict, Counter, list, tuple):
            return value
        if id(value) not in self._seen:
            self._fill(value, kind)
        return self._seen[id(value)]

    def _fill(self, value: Any, kind: type) -> None:
        if kind is tuple:
            items = [self.filled(item) for item in value]
            is_same = all(one is other for one, other in zip(items, value, strict=True))
            self._seen[id(value)] = value if is_same else tuple(items)
            return
        self._seen[id(value)] = value
        for key, item in list(enumerate(value) if kind is list else value.items()):
            new = self.filled(item)
            if new is not item:
                value[key] = new
        if kind is OrderedDict:
            vars(value).update({key: self.filled(item) for key, item in vars(value).items()})


def _dtype(code: Any, _align: Any = False, _copy: Any = False) -> _DType:  # noqa: FBT002 - as NumPy's pickles call it
    np = _numpy()
    if code in ("O", "O4", "O8"):
        msg = "a NumPy array of Python objects"
        raise NumpyRefused(msg)
    _require(type(code) is str and _CODE.match(code) is not None, "a dtype's name")
    return _DType(np.dtype(code))


def _dtype_of(base: "np.dtype[Any]", state: Any) -> Any:
    """Return the dtype that a state makes of a plain one; it says nothing else that counts."""
    np = _numpy()
    _require(type(state) is tuple and len(state) >= _STATE_FIELDS, "a dtype's state")
    _, order, part, names, fields, num_bytes, _, flags, *_ = state
    _require(order in ("<", ">", "|", "="), "a dtype's byte order")
    if part is not None:
        _require(type(part) is tuple and len(part) == 2, "a dtype's items")  # noqa: PLR2004 - a dtype and a shape
        shape = part[1] if type(part[1]) is tuple else (part[1],)
        _require(all(type(one) is int and one >= 0 for one in shape), "the shape of a dtype's items")
        return np.dtype((_without_objects(part[0]), shape))
    if names is not None:
        _require(type(names) is tuple and type(fields) is dict, "a dtype's fields")
        told = [fields[name] for name in names]
        return np.dtype(
            {
                "names": list(names),
                "formats": [_without_objects(one[0]) for one in told],
                "offsets": [one[1] for one in told],
                "titles": [one[2] if len(one) > 2 else None for one in told],  # noqa: PLR2004 - dtype, offset, title
                "itemsize": num_bytes,
            },
            align=type(flags) is int and bool(flags & _ALIGNED),
        )
    if base.kind in "mM" and len(state) > _STATE_FIELDS:
        unit, number, *_ = state[_STATE_FIELDS][-1]
        unit = unit.decode() if type(unit) is bytes else unit
        _require(type(unit) is str and _UNIT.match(unit) is not None and type(number) is int, "a dtype's unit")
        base = np.dtype(f"{base.kind}8" if unit == "generic" else f"{base.kind}8[{number}{unit}]")
    return base.newbyteorder(order) if order in ("<", ">") else base


def _no_bytes() -> bytes:
    """Stand for the class, which pickle calls without arguments for the bytes of an empty array."""
    return b""


def _scalar(dtype: Any, data: Any) -> Any:
    np = _numpy()
    found = _without_objects(dtype)
    _require(type(data) is bytes and len(data) == found.itemsize, "a number's bytes")
    return np.frombuffer(data, found).copy()[0] if data else np.zeros((), found)[()]


def _without_objects(dtype: Any) -> "np.dtype[Any]":
    _require(type(dtype) is _DType, "a dtype")
    found: np.dtype[Any] = dtype.value
    if found.hasobject:
        msg = "a NumPy array of Python objects"
        raise NumpyRefused(msg)
    return found


def _require(is_so: bool, what: str) -> None:  # noqa: FBT001 - a condition
    if not is_so:
        msg = f"{what} is not what NumPy writes"
        raise NumpyRefused(msg)
