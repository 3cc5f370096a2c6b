"""Rollback of a failed load: a copy of an object's ``state_dict()``, which its ``load_state_dict()`` restores.

Making the copy never fails. An object without a copy cannot be restored, so it is loaded when little can fail any more.
"""

import array
import copy
import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distckpt.loading.dtensors import local_tensor
from distckpt.loading.plain_objects import TENSOR_TYPES, has_memory

# An ignite metric's methods. Its state_dict() gathers the ranks' states, which only all ranks together can do.
_RANK_LOCAL = ("_state_dict_per_rank", "_load_state_dict_per_rank")
_COMPARED = (bool, int, float, complex, str, bytes, set)
_CONTAINERS = (dict, list, deque, set, bytearray, array.array)


@dataclass(frozen=True, slots=True)
class Rollback:
    """How an object is restored.

    Attributes:
        restore: restores it.
        state: the copy of its state; None if there is none.
    """

    restore: Callable[[], None]
    state: Any = None


def make_rollback(obj: Any, options: Mapping[str, Any]) -> Rollback | None:
    """Copy an object's state, and return how to restore it; None if no copy can be made.

    Args:
        obj: the object; its class may have a method ``distckpt_rollback()`` that returns such a function.
        options: keyword arguments of its ``load_state_dict``.
    """
    try:
        if hasattr(type(obj), "distckpt_rollback"):  # it loads state that is not its own, as RngState does
            return Rollback(obj.distckpt_rollback())
        states = [(copy_state(own_state(obj)), {key: options[key] for key in options if key != "assign"})]
        if options.get("assign"):  # first assign the former tensors themselves: an optimizer may hold them
            states.insert(0, (obj.state_dict(keep_vars=True), dict(options)))
        return Rollback(functools.partial(_restore, obj, states), states[-1][0])
    except Exception:  # noqa: BLE001 - a user's code; the load itself may succeed
        return None


def own_state(obj: Any) -> Any:
    """Return this rank's state of an object. Issues no collectives for an ignite metric, whose state_dict() gathers."""
    return getattr(obj, _RANK_LOCAL[0])() if _is_gathered(obj) else obj.state_dict()


def load_own_state(obj: Any, state: Any, **options: Any) -> None:
    """Load a state that :func:`own_state` returned. Issues no collectives for an ignite metric."""
    getattr(obj, _RANK_LOCAL[1] if _is_gathered(obj) else "load_state_dict")(state, **options)


def _is_gathered(obj: Any) -> bool:
    """Return True if an object's state is what its class gathers, and nothing that a subclass has added."""
    classes = type(obj).__mro__
    origin = next((one for one in reversed(classes) if _RANK_LOCAL[0] in vars(one)), None)
    return origin is not None and all(
        next(one for one in classes if name in vars(one)) is origin for name in ("state_dict", "load_state_dict")
    )


def _restore(obj: Any, states: Sequence[tuple[Any, Mapping[str, Any]]]) -> None:
    refusal = None
    for state, options in states:
        try:
            load_own_state(obj, state, **options)
        except Exception as error:  # noqa: BLE001 - it may refuse a state that is unchanged
            refusal = error
    if not is_same(own_state(obj), states[-1][0]):
        raise refusal or ValueError("its load_state_dict() does not restore what its state_dict() returned")


def is_same(one: Any, other: Any, done: dict[tuple[int, int], Any] | None = None) -> bool:
    """Return True if two states are equal. Objects of unknown types count as equal.

    Args:
        one: dense tensors, containers and numbers.
        other: the state to compare with.
        done: pairs of containers that are compared already, or now: a container may contain itself.
    """
    done = {} if done is None else done
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and one is not other:
        return one.shape == other.shape and _has_same_values(local_tensor(one), local_tensor(other))
    if isinstance(one, Mapping | list | tuple | deque):
        if (id(one), id(other)) in done:
            return True
        done[id(one), id(other)] = one, other  # keeps both alive, so that no other object gets their identity
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            return one.keys() == other.keys() and all(is_same(one[key], other[key], done) for key in one)
        if isinstance(one, list | tuple | deque):
            pairs = zip(one, other, strict=False)
            return len(one) == len(other) and all(is_same(first, second, done) for first, second in pairs)
    return one is other or type(one) not in _COMPARED or bool(one == other or (one != one and other != other))  # noqa: PLR0124


def _has_same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return True if two tensors are equal, or cannot be compared. Of DTensors, local shards are compared."""
    if one.shape != other.shape or one.layout is not torch.strided or one.is_nested:
        return one.shape == other.shape
    return bool(((one == other) | ((one != one) & (other != other))).all())  # noqa: PLR0124 - NaN


def copy_state(value: Any, done: dict[int, Any] | None = None) -> Any:
    """Copy tensors, arrays and containers; keep other objects as they are.

    Args:
        value: a state.
        done: the values copied so far and their copies, by identity.

    Raises:
        ValueError: a tensor has no memory.
    """
    done = {} if done is None else done
    if id(value) in done:
        return done[id(value)][1]
    twin = value
    if isinstance(value, torch.Tensor):
        twin = _copy_tensor(value)
    elif isinstance(value, tuple):
        copies = [copy_state(item, done) for item in value]
        twin = value._make(copies) if hasattr(value, "_make") else type(value)(copies)
    elif isinstance(value, _CONTAINERS) or hasattr(type(value), "__array_interface__"):
        twin = copy.copy(value)  # keeps attributes, such as a module's ``_metadata``
        done[id(value)] = value, twin  # it may contain itself
        if isinstance(value, dict | list | deque):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                twin[key] = copy_state(item, done)
    done[id(value)] = value, twin  # keeps the value alive, so that no other object gets its identity
    return twin


def _copy_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor's elements: not a whole storage of which it is a part, and no expanded element twice.

    Raises:
        ValueError: there is nothing to copy.
    """
    is_strided = type(tensor) in TENSOR_TYPES and tensor.layout is torch.strided and not tensor.is_nested
    if nn.parameter.is_lazy(tensor) or (is_strided and not has_memory(tensor)):
        raise ValueError("the tensor has no shape yet, or no memory any more")
    if not is_strided or tensor.is_quantized:
        return copy.deepcopy(tensor) if type(tensor) not in TENSOR_TYPES or is_strided else tensor.detach().clone()
    repeated = [size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    part = tensor.detach()[tuple(slice(0, 1) if one else slice(None) for one in repeated)]
    twin = part.clone().expand(tensor.shape)
    return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
