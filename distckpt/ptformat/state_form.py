"""The form of a plain state: keys, types, shapes and whatever else its pickle depends on, but not numbers and text.

A job saves states of one form again and again. :class:`StateForms` compares a state with those of the last saves, which
takes a fraction of the time to pickle it, and returns the earlier pickle with the present numbers and text in it.

IMPORTANT: everything that :mod:`distckpt.ptformat.fast_pickle` reads of a state is compared here. A difference that is
overlooked writes a file that torch reads as another state.
"""

import contextlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Final, NamedTuple

import torch

from distckpt.ptformat.fast_pickle import NotPlain, PlainWalk, join_parts, scalar_bytes
from distckpt.ptformat.pickler import PickledState
from distckpt.ptformat.sharded import dtensor_type
from distckpt.ptformat.tensor_forms import Differs, TensorForms

_SCALARS: Final = frozenset({str, int, float, bool, type(None)})
_CONTAINERS: Final = frozenset({dict, OrderedDict, list, tuple})
_KEYS: Final = frozenset({str, int, bool, type(None)})
"""Types of keys whose bytes are equal if the keys are. Floats are not among them: 0.0 equals -0.0."""
_MOST_FORMS: Final = 4


Reader = Callable[[list[Any]], tuple[Any, list[torch.Tensor]]]
"""Compares DTensors, in the order of the pickle, with those of an earlier state; raises :class:`Differs`.

Returns what it found of the sharded ones, for :attr:`PickledState.sharded`, and the others as plain tensors.
"""
MakeReader = Callable[[list[Any], list[int]], Reader]
"""Takes a state's DTensors and the numbers of their storages in the pickle; returns what compares others with them."""


class StateForms:
    """The forms of the last few states that were pickled. Any thread. A copy of the object has none.

    Example:
        >>> from distckpt.ptformat.pickler import pickle_state
        >>> forms, state = StateForms(), {"a": torch.ones(2), "step": 1}
        >>> forms.match(state) is None
        True
        >>> pickled = forms.keep(state, pickle_state(state))
        >>> again = forms.match({"a": torch.zeros(2), "step": 2})
        >>> again == forms.match({"a": torch.zeros(2), "step": 2.0})
        False
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forms: list[_StateForm] = []  # the last matched one first

    def match(self, state: Any, key: Any = None) -> PickledState | None:
        """Return what :func:`~distckpt.ptformat.pickler.pickle_state` would return; None if the form is a new one.

        Args:
            state: the state. If it has DTensors, the result has :attr:`PickledState.sharded`.
            key: has to equal the key with which the form was kept.
        """
        with self._lock:
            for number, form in enumerate(self._forms):
                if form.key != key:
                    continue
                try:
                    found = form.pickle(state)
                except Differs:
                    continue
                self._forms.insert(0, self._forms.pop(number))
                return found
        return None

    def keep(
        self, state: Any, pickled: PickledState, make_reader: MakeReader | None = None, key: Any = None
    ) -> PickledState:
        """Keep the form of a state that was just pickled; return its pickle, without the walk.

        Args:
            state: the state. It may hold DTensors where the pickled one had what stands for them.
            pickled: its pickle.
            make_reader: returns what compares these DTensors with others; None if there are none.
            key: see :meth:`match`.
        """
        if pickled.walk is not None:
            with contextlib.suppress(Differs):
                form = _StateForm(state, pickled.walk, pickled, make_reader, key)
                with self._lock:
                    self._forms = [form, *self._forms[: _MOST_FORMS - 1]]
        return replace(pickled, walk=None)

    def __reduce__(self) -> tuple[Any, ...]:
        return (StateForms, ())


class _StateForm:
    """The form of one state, and its pickle in parts."""

    def __init__(
        self,
        state: Any,
        walk: PlainWalk,
        pickled: PickledState,
        make_reader: MakeReader | None,
        key: Any,
    ) -> None:
        self.key = key
        self._kind = type(state)
        self._root = _form_of(state, {})
        self._tensors = TensorForms(walk.without_shards())
        self._pickled = replace(pickled, storages=(), walk=None)  # the storages are not to be kept alive
        leaves = _Leaves()
        self._root.read(state, leaves)
        self._scalars = leaves.scalars
        self._is_plain = [number >= walk.num_shards for number in walk.numbers]
        self._is_dtensor = [type(tensor) is not torch.Tensor for tensor in leaves.tensors]
        pairs = zip(self._is_dtensor, self._is_plain, strict=True)
        self._wholes_at = [index for index, (is_dtensor, is_plain) in enumerate(pairs) if is_dtensor and is_plain]
        dtensors = list(itertools.compress(leaves.tensors, self._is_dtensor))
        if bool(dtensors) != (make_reader is not None):
            raise Differs
        numbers = list(itertools.compress(walk.numbers, self._is_dtensor))
        self._reader = None if make_reader is None else make_reader(dtensors, numbers)
        # Bytes of numbers and text have odd indices.
        self._parts: list[bytes] = []
        begin = 0
        for at in walk.scalars_at:
            self._parts += (b"".join(walk.out[begin:at]), walk.out[at])
            begin = at + 1
        self._parts.append(b"".join(walk.out[begin:]))

    def pickle(self, state: Any) -> PickledState:
        """Return a state's pickle.

        Raises:
            Differs: it has another form.
        """
        if type(state) is not self._kind:
            raise Differs
        leaves = _Leaves()
        self._root.read(state, leaves)
        if len(set(leaves.unique)) != len(leaves.unique):
            raise Differs
        tensors, sharded = leaves.tensors, None
        if self._reader is not None:
            sharded, wholes = self._reader(list(itertools.compress(tensors, self._is_dtensor)))
            for index, whole in zip(self._wholes_at, wholes, strict=True):
                tensors[index] = whole
            tensors = list(itertools.compress(tensors, self._is_plain))
        storages, facts = self._tensors.read(tensors)
        self._put_scalars(leaves.scalars)
        return replace(self._pickled, storages=storages, facts=facts, sharded=sharded)

    def _put_scalars(self, scalars: list[Any]) -> None:
        # Equal values of one type have the same bytes, but for 0.0 and -0.0. A NaN equals none.
        changed = [
            number
            for number, (new, old) in enumerate(zip(scalars, self._scalars, strict=True))
            if new is not old and (new != old or not new)
        ]
        if not changed:
            return
        try:
            data = [scalar_bytes(scalars[number]) for number in changed]
        except NotPlain as error:  # an integer that is too long
            raise Differs from error
        for number, one in zip(changed, data, strict=True):
            self._parts[2 * number + 1] = one
        self._scalars = scalars
        self._pickled = replace(self._pickled, data=join_parts(self._parts))


class _Leaves:
    """The numbers, text and tensors of a state in the order of its pickle."""

    def __init__(self) -> None:
        self.scalars: list[Any] = []
        self.tensors: list[torch.Tensor] = []  # and DTensors
        self.unique: list[int] = []  # ids of the containers that may occur once only


class _Level(NamedTuple):
    """Keys and types of the items of a container, or of several dicts in a row.

    Attributes:
        is_mapping: whether there are keys.
        keys: the keys.
        key_kinds: their types.
        kinds: types of the items.
        tensors: whether each item is a tensor, which may be a DTensor; None if all are.
    """

    is_mapping: bool
    keys: list[Any]
    key_kinds: list[type]
    kinds: list[type]
    tensors: list[bool] | None

    @classmethod
    def of(cls, keys: Iterable[Any] | None, items: Iterable[Any]) -> "_Level":
        """Return the form of items; `keys` is None for those of a sequence."""
        names, kinds = [] if keys is None else list(keys), list(map(type, items))
        tensors = [kind not in _SCALARS for kind in kinds]
        return cls(keys is not None, names, list(map(type, names)), kinds, None if all(tensors) else tensors)

    def compare(self, keys: Iterable[Any], items: Iterable[Any]) -> None:
        """Raise Differs unless types, and keys if there are any, are the same in the same order."""
        if list(map(type, items)) != self.kinds:
            raise Differs
        if self.is_mapping:
            found = list(keys)
            if list(map(type, found)) != self.key_kinds or found != self.keys:  # 1, True and 1.0 are equal
                raise Differs

    def take(self, items: Iterable[Any], leaves: _Leaves) -> None:
        """Add the items, none of which is a container."""
        if self.tensors is None:
            leaves.tensors += items
            return
        for item, is_tensor in zip(items, self.tensors, strict=True):
            (leaves.tensors if is_tensor else leaves.scalars).append(item)


class _Container:
    """The form of a dict, list or tuple."""

    def __init__(self, value: Any, level: _Level, known: dict[Any, "_Container"]) -> None:
        self._kind = type(value)
        self._level = level
        self._may_repeat = self._kind is tuple and tuple not in level.kinds  # as PlainWalk allows it
        items = list(value.values() if level.is_mapping else value)
        inner = [None if _is_leaf(type(item)) else _form_of(item, known) for item in items]
        self._inner = inner if any(inner) else None
        attributes = vars(value) if self._kind is OrderedDict else {}
        self._attributes = _form_of(attributes, known) if attributes else None
        self._twins: _Level | None = None
        self._lengths: list[int] = []
        first = inner[0] if inner else None
        if first is not None and first.is_flat_dict and all(one is first for one in inner):
            # An optimizer has a dict for each parameter, a module's `_metadata` one for each module.
            self._twins = _Level.of(itertools.chain.from_iterable(items), _items_of_all(items))
            self._lengths = list(map(len, items))

    @property
    def is_flat_dict(self) -> bool:
        """Whether it is a dict without containers in it."""
        return self._kind is dict and self._inner is None

    def read(self, value: Any, leaves: _Leaves) -> None:
        """Compare a container of the same type, and add its leaves.

        Raises:
            Differs: it has another form.
        """
        if not self._may_repeat:
            leaves.unique.append(id(value))
        items = list(value.values()) if self._level.is_mapping else value
        self._level.compare(value, items)
        if self._inner is None:
            self._level.take(items, leaves)
        elif self._twins is not None:
            if list(map(len, items)) != self._lengths:
                raise Differs
            self._twins.compare(itertools.chain.from_iterable(items), _items_of_all(items))
            self._twins.take(_items_of_all(items), leaves)
            leaves.unique += map(id, items)
        else:
            for item, form in zip(items, self._inner, strict=True):
                if form is not None:
                    form.read(item, leaves)
                else:
                    (leaves.scalars if type(item) in _SCALARS else leaves.tensors).append(item)
        if self._kind is OrderedDict:
            attributes = vars(value)
            if bool(attributes) != (self._attributes is not None):
                raise Differs
            if self._attributes is not None:
                self._attributes.read(attributes, leaves)


def _items_of_all(mappings: Iterable[dict[Any, Any]]) -> Iterable[Any]:
    return itertools.chain.from_iterable(map(dict.values, mappings))


def _is_leaf(kind: type) -> bool:
    return kind is torch.Tensor or kind in _SCALARS or kind is dtensor_type()


def _form_of(value: Any, known: dict[Any, _Container]) -> _Container:
    """Return the form of a container of a plain state. Equal ones that hold no containers share it.

    Raises:
        Differs: it cannot be compared.
    """
    if type(value) not in _CONTAINERS:
        raise Differs
    level = _Level.of(value, value.values()) if isinstance(value, dict) else _Level.of(None, value)
    if not _KEYS.issuperset(level.key_kinds):
        raise Differs
    if not all(map(_is_leaf, set(level.kinds))) or (type(value) is OrderedDict and vars(value)):
        return _Container(value, level, known)
    key = type(value), tuple(level.keys), tuple(level.key_kinds), tuple(level.kinds)
    if key not in known:
        known[key] = _Container(value, level, known)
    return known[key]
