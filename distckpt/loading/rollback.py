"""What an object's own ``state_dict()`` said before it was loaded, to be put back by its own ``load_state_dict``.

Owns the copy of a state, and the way back. Taking a copy never fails: what has none cannot be put back, and is loaded
when little is left that can fail. Must not know what is loaded, or in which order.
"""

import array
import copy
import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distckpt.loading.plain_objects import has_memory

__all__ = ["Undo", "copied", "is_same", "load_own_state", "own_state", "undo_of"]

Undo = Callable[[], None]

_RANK_LOCAL = ("_state_dict_per_rank", "_load_state_dict_per_rank")
"""An ignite metric's own: its ``state_dict()`` gathers them, which only all ranks together can do."""
_KINDS = (torch.Tensor, nn.Parameter, nn.Buffer)
_COMPARED = (bool, int, float, complex, str, bytes, set)
_CONTAINERS = (dict, list, deque, set, bytearray, array.array)


def undo_of(obj: Any, options: Mapping[str, Any]) -> Undo | None:
    """Copy what an object's ``state_dict()`` says; costs a copy of its tensors.

    Args:
        obj: the object; one whose class has ``distckpt_undo()`` has a way of its own.
        options: keyword arguments for its ``load_state_dict``.

    Returns:
        What puts it back, and raises if it cannot; None if there is no copy.
    """
    try:
        if hasattr(type(obj), "distckpt_undo"):  # what it loads lies outside of it, as with RngState
            undo: Undo = obj.distckpt_undo()
            return undo
        states = [(_copy(own_state(obj), {}), {key: options[key] for key in options if key != "assign"})]
        if options.get("assign"):  # before what they held, the tensors themselves: an optimizer may have them
            states.insert(0, (obj.state_dict(keep_vars=True), dict(options)))
        return functools.partial(_put_back, obj, states)
    except Exception:  # noqa: BLE001 - it is a user's; the load itself may well succeed
        return None


def own_state(obj: Any) -> Any:
    """Return an object's state as this rank has it. Rank-local where that can be known."""
    return getattr(obj, _RANK_LOCAL[0])() if _is_gathered(obj) else obj.state_dict()


def load_own_state(obj: Any, state: Any) -> None:
    """Load what :func:`own_state` returned. Rank-local where that can be known."""
    getattr(obj, _RANK_LOCAL[1] if _is_gathered(obj) else "load_state_dict")(state)


def copied(value: Any) -> Any:
    """Copy tensors, arrays and containers; keep all other objects as they are.

    Raises:
        ValueError: a tensor has no memory.
    """
    return _copy(value, {})


def is_same(one: Any, other: Any) -> bool:
    """Compare dense tensors, containers and numbers; of other objects nothing is known, and they are taken as equal."""
    return _is_same(one, other, {})


def _is_gathered(obj: Any) -> bool:
    return all(hasattr(type(obj), name) for name in _RANK_LOCAL)


def _put_back(obj: Any, states: Sequence[tuple[Any, Mapping[str, Any]]]) -> None:
    load, refused = getattr(obj, _RANK_LOCAL[1] if _is_gathered(obj) else "load_state_dict"), None
    for state, options in states:
        try:
            load(state, **options)
        except Exception as error:  # noqa: BLE001 - it may have refused what it had not changed
            refused = error
    if not _is_same(own_state(obj), states[-1][0], {}):
        msg = "its load_state_dict() does not restore what its state_dict() said"
        raise refused or ValueError(msg)


def _is_same(one: Any, other: Any, done: dict[tuple[int, int], Any]) -> bool:
    """Compare dense tensors, containers and numbers; of other objects nothing is known.

    Args:
        one: an object.
        other: another one.
        done: pairs of containers that are compared already, or now: they may stand in many places, or in themselves.
    """
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and one is not other:
        if one.shape != other.shape or one.layout is not torch.strided or one.is_nested:
            return one.shape == other.shape
        return bool(((one == other) | ((one != one) & (other != other))).all())  # noqa: PLR0124 - NaN
    if isinstance(one, Mapping | list | tuple | deque):
        if (id(one), id(other)) in done:
            return True
        done[id(one), id(other)] = one, other  # so that no other gets their identities
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            return one.keys() == other.keys() and all(_is_same(one[key], other[key], done) for key in one)
        if isinstance(one, list | tuple | deque):
            pairs = zip(one, other, strict=False)
            return len(one) == len(other) and all(_is_same(its, others, done) for its, others in pairs)
    return one is other or type(one) not in _COMPARED or bool(one == other or (one != one and other != other))  # noqa: PLR0124


def _copy(value: Any, done: dict[int, Any]) -> Any:
    """Copy tensors, arrays and containers; keep all other objects as they are."""
    if id(value) not in done:
        done[id(value)] = value, _new(value, done)  # the value too, so that no other gets its identity
    return done[id(value)][1]


def _new(value: Any, done: dict[int, Any]) -> Any:
    if isinstance(value, torch.Tensor):
        return _copy_of_tensor(value)
    if isinstance(value, tuple):
        items = [_copy(item, done) for item in value]
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    if not isinstance(value, _CONTAINERS) and not hasattr(type(value), "__array_interface__"):
        return value
    twin: Any = copy.copy(value)  # with its attributes, such as a module's ``_metadata``
    done[id(value)] = value, twin  # it may hold itself
    its: Any = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list | deque) else ())
    for key, item in its:
        twin[key] = _copy(item, done)
    return twin


def _copy_of_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor, but not all of a storage that it is a small part of, nor one element many times.

    Raises:
        ValueError: there is nothing to copy.
    """
    is_strided = type(tensor) in _KINDS and tensor.layout is torch.strided and not tensor.is_nested
    if nn.parameter.is_lazy(tensor) or (is_strided and not has_memory(tensor)):
        msg = "it has no shape yet, or no memory any more"
        raise ValueError(msg)
    if not is_strided or tensor.is_quantized:
        return copy.deepcopy(tensor) if type(tensor) not in _KINDS or is_strided else tensor.detach().clone()
    repeated = [size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    part = tensor.detach()[tuple(slice(0, 1) if one else slice(None) for one in repeated)]
    twin = part.clone().expand(tensor.shape)
    return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
