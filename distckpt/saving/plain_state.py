"""Replace what plain tools cannot load: DTensors by plain tensors or their stand-ins, NumPy scalars by Python's."""

from collections import OrderedDict
from typing import Any, Final, NamedTuple

import torch

from distckpt._values import has_python_value, is_numpy_scalar
from distckpt.ptformat.sharded import (
    TensorShard,
    as_whole,
    describe_shard,
    key_to_text,
    may_be_sharded,
    sharded_error,
)
from distckpt.saving.shards import Shards, StageTensor

_PLAIN: Final = frozenset({torch.Tensor, str, int, float, bool, type(None)})


class LiveState(NamedTuple):
    """The state of an object as its ``state_dict()`` has returned it, for :func:`plain_state`.

    Attributes:
        where: name of the object, for messages.
        state: the state.
        is_attached: whether the state is that of :func:`~distckpt.saving.captured_state.attached_state`.
    """

    where: str
    state: Any
    is_attached: bool = False


def plain_state(
    state: Any, where: str = "the state", *, convert_numpy: bool = True, shards: Shards | None = None
) -> Any:
    """Replace fully replicated DTensors by plain tensors, and NumPy scalars by Python's.

    Args:
        state: the state of one object.
        where: name of the state, for messages.
        convert_numpy: whether NumPy scalars are replaced.
        shards: takes sharded tensors, which are replaced too; None to refuse them.

    Returns:
        The state. Containers in which nothing is replaced are returned as they are.

    Raises:
        ShardedStateError: the state holds a tensor of which this rank has a shard.
    """
    if not _may_need_replacement(state):
        return state
    return _Replacement(where, convert_numpy=convert_numpy, shards=shards).of(state, ())


def _may_need_replacement(state: Any) -> bool:
    """Return False if a state holds only plain values: a quick check, which most states pass.

    A module's ``_metadata`` is skipped, since it is as long as the module. The pickler converts what it holds.
    """
    todo = [state]
    seen: set[int] = set()  # a container may be referenced many times, or contain itself
    while todo:
        one = todo.pop()
        kind = type(one)
        if kind in _PLAIN or id(one) in seen:
            continue
        seen.add(id(one))
        if kind is dict or kind is OrderedDict:
            if not _PLAIN.issuperset(map(type, one)):
                return True
            if not _PLAIN.issuperset(map(type, one.values())):
                todo += [item for item in one.values() if type(item) not in _PLAIN]
            if kind is OrderedDict:
                todo += [item for name, item in vars(one).items() if name != "_metadata"]
        elif kind is list or kind is tuple:
            todo += [item for item in one if type(item) not in _PLAIN]
        else:
            return True
    return False


class _Replacement:
    """One walk over a state. A tensor that the state holds twice is replaced by one tensor."""

    def __init__(self, where: str, *, convert_numpy: bool, shards: Shards | None) -> None:
        self._where = where
        self._shards = shards
        self._convert_numpy = convert_numpy
        self._tensors: dict[int, torch.Tensor] = {}
        self._done: dict[int, tuple[Any, Any]] = {}  # container and replacement, by the container's id

    def of(self, state: Any, path: tuple[Any, ...]) -> Any:
        kind = type(state)
        if kind in _PLAIN:
            return state
        if may_be_sharded(kind) or kind is StageTensor:
            return self._tensor(state, path)
        if is_numpy_scalar(state):
            return state.item() if self._convert_numpy and has_python_value(state) else state
        if not isinstance(state, dict | list | tuple | set | frozenset):
            return state
        if id(state) not in self._done:
            self._done[id(state)] = state, state  # for a container that contains itself
            self._done[id(state)] = state, self._container(state, path)
        return self._done[id(state)][1]

    def _container(self, state: Any, path: tuple[Any, ...]) -> Any:
        if type(state) in (dict, OrderedDict):
            return self._mapping(state, path)
        if isinstance(state, list | tuple):
            return self._sequence(state, path)
        # A subclass's own methods may raise. Nothing is replaced in it: the pickler does that.
        base = next(kind for kind in (dict, set, frozenset) if isinstance(state, kind))
        for key, item in dict.items(state) if base is dict else enumerate(base.__iter__(state)):
            self.of(item, (*path, key))
        return state

    def _sequence(self, state: Any, path: tuple[Any, ...]) -> Any:
        kind = type(state)
        olds = list((list if isinstance(state, list) else tuple).__iter__(state))  # a subclass's own may raise
        items = [self.of(item, (*path, index)) for index, item in enumerate(olds)]
        if all(new is old for new, old in zip(items, olds, strict=True)):
            return state
        if kind in (list, tuple):
            return kind(items)
        return kind._make(items) if hasattr(kind, "_make") else state  # a named tuple; the pickler converts others

    def _tensor(self, tensor: Any, path: tuple[Any, ...]) -> torch.Tensor | TensorShard:
        at = f", key {'.'.join(map(key_to_text, path))!r}," if path else ""
        if isinstance(tensor, StageTensor):
            if self._shards is None:
                ranks = ", ".join(map(str, tensor.placement.mesh.ranks))
                raise sharded_error(f"{self._where}{at}", f"a tensor that rank {ranks} holds")
            return self._shards.replace_staged(tensor, f"{self._where}{at}".rstrip(","))
        replaced = None if self._shards is None else self._shards.replace(tensor, f"{self._where}{at}".rstrip(","))
        if replaced is not None:
            return replaced
        problem = describe_shard(tensor)
        if problem is not None:
            raise sharded_error(f"{self._where}{at}", problem)
        if id(tensor) not in self._tensors:
            self._tensors[id(tensor)] = as_whole(tensor)
        return self._tensors[id(tensor)]

    def _mapping(self, state: Any, path: tuple[Any, ...]) -> Any:
        replaced = {self.of(key, path): self.of(item, (*path, key)) for key, item in state.items()}
        attributes = vars(state) if type(state) is OrderedDict else {}  # a module's `_metadata`
        others = self.of(attributes, path) if attributes else attributes
        pairs = zip(replaced.items(), state.items(), strict=False)
        is_same = len(replaced) == len(state) and all(new[0] is old[0] and new[1] is old[1] for new, old in pairs)
        if is_same and others is attributes:
            return state
        fresh = type(state)(replaced)
        if attributes:
            vars(fresh).update(others)
        return fresh
