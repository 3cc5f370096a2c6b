"""Read NumPy arrays and scalars from a pickle without executing code.

torch's ``weights_only`` unpickler knows no NumPy names. NumPy's own functions must not be added to its list: a crafted
``dtype`` state makes NumPy use numbers as addresses of objects. So functions of this module are added instead. They
check their arguments, and build arrays by NumPy's public functions, from a dtype without objects and the right number
of bytes. An array is pickled as a call followed by a state; until all is read, placeholders replace the arrays.

NumPy is imported only for a file that has arrays. Empty bytes are pickled as a call too.

Source: ``array_reduce`` and ``arraydescr_reduce`` of NumPy 1.26 and 2.3 (``numpy/_core/src/multiarray``).
"""

import contextlib
import math
import re
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from distckpt.ptformat.sharded import TensorShard, find_paths, key_to_text

if TYPE_CHECKING:
    import numpy as np

_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
"""In NumPy 1 and NumPy 2."""
NAMES = frozenset(
    {"numpy.dtype", "numpy.ndarray", "numpy.memmap", "builtins.bytes", "__builtin__.bytes"}
    | {f"{one}.{name}" for one in _MODULES for name in ("_reconstruct", "scalar")}
)
"""Names that a pickle may call."""

_OBJECTS = re.compile(rb"X\x02\x00\x00\x00O[48](?:q.|r.{4})?(?:\x89|K\x00)(?:\x88|K\x01)\x87", re.DOTALL)
"""Arguments of the object dtype in a pickle of protocol 2 or 3."""
_CODE = re.compile(r"(?:b1|[iufcSUVMm]\d{1,9})\Z")
_UNIT = re.compile(r"[A-Za-z]{1,7}\Z")
_STATE_FIELDS = 8
_ARRAY_FIELDS = 5
_ALIGNED = 0x80
"""NumPy's flag of a dtype whose fields are aligned as in C."""
_UNSPELLABLE = "\n"
"""Prefix of names that no pickle can call, because the unpickler reads names by the line."""
_SEARCHED = frozenset({dict, OrderedDict, Counter, list, tuple})
"""Types of the containers in which placeholders are replaced."""
_LEAVES = frozenset(
    {
        *(str, int, float, bool, complex, bytes, bytearray, type(None)),
        *(torch.Size, torch.dtype, torch.device, TensorShard),
    }
)
_TENSORS = (torch.Tensor, torch.nn.Parameter)
_LOST = "a NumPy array or dtype is in an object that is no mapping, list or tuple"
_LOCK = threading.Lock()
_NDARRAY = object()
"""Replaces NumPy's array class. A memmap is pickled with its data, and loads as an array."""


class NumpyRefused(Exception):  # noqa: N818 - a reason, always caught
    """A NumPy object cannot be read; the text says why."""


class _Placeholder:
    """Replaces an object whose state follows in the pickle."""

    __slots__ = ("is_built", "value")
    __hash__ = None  # type: ignore[assignment]  # not hashable, as an array

    def __init__(self, value: Any = None) -> None:
        self.value = value
        self.is_built = False

    def build(self, value: Any) -> None:
        if self.is_built:
            raise NumpyRefused("its state is given twice")
        self.is_built, self.value = True, value


class _DType(_Placeholder):
    """Replaces a dtype; holds the dtype of its name until its state is set."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        self.build(_dtype_of(self.value, state))


class _Array(_Placeholder):
    """Replaces an array."""

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
def allow_numpy() -> Iterator[Callable[[Any], Any]]:
    """Let torch's ``weights_only`` unpickler read NumPy arrays while the body runs.

    Yields:
        A function that takes what was read and returns it with arrays in place of the placeholders.

    Raises:
        NumpyRefused: in the body, for an array of objects or a malformed one.
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
    allowed += [(kind, _UNSPELLABLE + kind.__name__) for kind in (_Array, _DType)]  # the unpickler may set their states
    with _LOCK, torch.serialization.safe_globals(allowed):
        yield lambda tree: _restored(tree, arrays)


def may_allow_numpy() -> bool:
    """Return True unless the program has added NumPy names to torch's list itself."""
    added = torch.serialization.get_safe_globals()
    names = [one[1] if isinstance(one, tuple) else getattr(one, "__module__", "") for one in added]
    return not any(isinstance(name, str) and name.split(".")[0] == "numpy" for name in names)


def holds_objects(data: bytes) -> bool:
    """Return True if a pickle with NumPy arrays, of protocol 2 or 3, has an array of objects."""
    return _OBJECTS.search(data) is not None


def find_lost_arrays(state: Any, *, most: int) -> list[str]:
    """Return the paths of the first arrays and dtypes of a state that cannot be read back from its pickle.

    These are in an object that is no mapping, list or tuple, or in a key or a set.

    Args:
        state: before it is pickled.
        most: number of paths to return.
    """
    found: list[str] = []
    todo: list[tuple[str, Any]] = [("", state)]
    seen: set[int] = set()
    while todo and len(found) < most:
        path, one = todo.pop()
        kind = type(one)
        if id(one) in seen or _is_numpy(one):
            continue
        seen.add(id(one))
        if kind not in _SEARCHED:
            found += find_paths(one, _is_numpy, path, most=most - len(found))
            continue
        lead = f"{path}." if path else ""
        pairs = list(enumerate(one) if kind in (list, tuple) else one.items())
        keys = [key for key, _ in pairs if type(key) not in _LEAVES]
        found += [f"{lead}{key_to_text(key)}" for key in keys if find_paths(key, _is_numpy, most=1)]
        todo += [(f"{lead}{key_to_text(key)}", item) for key, item in reversed(pairs) if not _is_leaf(item)]
        if kind is OrderedDict:
            todo.append((path, vars(one)))
    return found[:most]


def _is_leaf(one: Any) -> bool:
    """Return True for a value that holds no other one: most values, and quick to find out."""
    kind = type(one)
    return kind in _LEAVES or (kind in _TENSORS and not one.__dict__)


def _is_numpy(one: Any) -> bool:
    """Return True for an array or dtype."""
    np = sys.modules.get("numpy")
    return np is not None and isinstance(one, np.ndarray | np.dtype)


def _numpy() -> Any:
    try:
        import numpy as np  # noqa: PLC0415 - only for a file that has arrays
    except ImportError as error:
        raise NumpyRefused("NumPy arrays, and NumPy is not installed here") from error
    return np


def _restored(tree: Any, arrays: list[_Array]) -> Any:
    """Replace placeholders by their arrays; raise NumpyRefused if one is in an object that is not searched."""
    filling = _Filling()
    found = filling.fill(tree)
    if len(filling.met) != len(arrays):
        raise NumpyRefused(_LOST)
    return found


def _require_none_in(value: Any) -> None:
    """Raise NumpyRefused if there is a placeholder in an object that is not searched."""
    if find_paths(value, lambda one: isinstance(one, _Placeholder), most=1):
        raise NumpyRefused(_LOST)


class _Filling:
    """A walk over a tree that replaces placeholders; `met` has the identities of those it has found."""

    def __init__(self) -> None:
        self.met: set[int] = set()
        self._seen: dict[int, Any] = {}  # a container's identity -> its replacement

    def fill(self, value: Any) -> Any:
        """Return a value's replacement. Containers are changed in place, except tuples."""
        kind = type(value)
        if kind is _Array:
            _require(value.is_built, "an array without a state")
            self.met.add(id(value))
            return value.value
        if kind is _DType:
            return value.value
        if kind not in _SEARCHED:
            if not _is_leaf(value):
                _require_none_in(value)
            return value
        if id(value) not in self._seen:
            self._fill_container(value, kind)
        return self._seen[id(value)]

    def _fill_container(self, value: Any, kind: type) -> None:
        if kind is tuple:
            items = [self.fill(item) for item in value]
            is_same = all(one is other for one, other in zip(items, value, strict=True))
            self._seen[id(value)] = value if is_same else tuple(items)
            return
        self._seen[id(value)] = value
        for key, item in list(enumerate(value) if kind is list else value.items()):
            new = self.fill(item)
            if new is not item:
                value[key] = new
        if kind is OrderedDict:
            vars(value).update({key: self.fill(item) for key, item in vars(value).items()})


def _dtype(code: Any, _align: Any = False, _copy: Any = False) -> _DType:  # noqa: FBT002 - as NumPy's pickles call it
    np = _numpy()
    if code in ("O", "O4", "O8"):
        raise NumpyRefused("a NumPy array of Python objects")
    _require(type(code) is str and _CODE.match(code) is not None, "a dtype's name")
    return _DType(np.dtype(code))


def _dtype_of(base: "np.dtype[Any]", state: Any) -> Any:
    """Return the dtype that a state makes of a plain one."""
    np = _numpy()
    _require(type(state) is tuple and len(state) >= _STATE_FIELDS, "a dtype's state")
    _, order, sub, names, fields, num_bytes, _, flags, *_ = state
    _require(order in ("<", ">", "|", "="), "a dtype's byte order")
    if sub is not None:
        _require(type(sub) is tuple and len(sub) == 2, "a dtype's items")  # noqa: PLR2004 - a dtype and a shape
        shape = sub[1] if type(sub[1]) is tuple else (sub[1],)
        _require(all(type(one) is int and one >= 0 for one in shape), "the shape of a dtype's items")
        return np.dtype((_without_objects(sub[0]), shape))
    if names is not None:
        _require(type(names) is tuple and type(fields) is dict, "a dtype's fields")
        given = [fields[name] for name in names]
        return np.dtype(
            {
                "names": list(names),
                "formats": [_without_objects(one[0]) for one in given],
                "offsets": [one[1] for one in given],
                "titles": [one[2] if len(one) > 2 else None for one in given],  # noqa: PLR2004 - dtype, offset, title
                "itemsize": num_bytes,
            },
            align=type(flags) is int and bool(flags & _ALIGNED),
        )
    if base.kind in "mM" and len(state) > _STATE_FIELDS:
        unit, number, *_ = state[_STATE_FIELDS][-1]
        unit = unit.decode() if type(unit) is bytes else unit
        _require(type(unit) is str and _UNIT.match(unit) is not None and type(number) is int, "a dtype's unit")
        base = np.dtype(f"{base.kind}8" if unit == "generic" else f"{base.kind}8[{number}{unit}]")
    ordered = base.newbyteorder(order) if order in ("<", ">") else base
    return base if ordered.isnative else ordered  # memoryviews refuse an explicit byte order, though it is native


def _no_bytes() -> bytes:
    """Replace the class ``bytes``, which a pickle calls without arguments for empty bytes."""
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
        raise NumpyRefused("a NumPy array of Python objects")
    return found


def _require(is_so: bool, what: str) -> None:  # noqa: FBT001 - a condition
    if not is_so:
        raise NumpyRefused(f"{what} is not what NumPy writes")
