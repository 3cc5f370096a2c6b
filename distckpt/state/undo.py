"""What an object held before it was loaded, to be put back.

Owns the notes that are taken of objects which cannot be asked beforehand whether a state fits. Must not know what is
loaded, or in which order. Layer L2, below :mod:`distckpt.state.restore`.
"""

import copy
import functools
from collections import deque
from collections.abc import Callable
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

__all__ = ["undo_module", "undo_object", "undo_optimizer"]

Undo = Callable[[], None]

_CONTAINERS = (list, dict, set, deque)
_OPAQUE = (nn.Module, torch.Tensor, torch.optim.Optimizer, type, FunctionType, MethodType, ModuleType)
_NO_SLOTS = ("__dict__", "__weakref__")
_LEVELS = 6
"""How far down is looked: an object, its list of children, a child, its dict, and a little more."""
_TOO_MANY = 10_000
"""A container of more items is somebody's data, not state to be loaded."""


def undo_module(module: nn.Module) -> Undo:
    """Note a module's tensors and attributes; costs a copy of its tensors."""
    notes: list[Undo] = []
    seen: set[int] = set()
    for part in module.modules():
        seen.add(id(part))
        notes.append(functools.partial(_put_back_attributes, part, _attributes(part)))
        for value in vars(part).values():
            _note(value, notes, seen, _LEVELS - 2)
        if isinstance(part, torch.jit.ScriptModule):  # keeps its tensors elsewhere
            for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
                notes.append(functools.partial(setattr, part, name, tensor))
                _note(tensor, notes, seen, _LEVELS - 2)
    return _all_of(notes)


def undo_optimizer(optimizer: torch.optim.Optimizer) -> Undo:
    """Note an optimizer's state and groups. ``Optimizer.load_state_dict`` makes new ones: keeping the old is enough."""
    return functools.partial(_put_back_attributes, optimizer, _attributes(optimizer))


def undo_object(obj: Any) -> Undo:
    """Note what any other object holds: its attributes and containers, and those of its parts, a few levels down."""
    notes: list[Undo] = []
    _note(obj, notes, set(), _LEVELS)
    return _all_of(notes)


def _all_of(notes: list[Undo]) -> Undo:
    def undo() -> None:
        for note in notes:
            note()

    return undo


def _note(value: Any, notes: list[Undo], seen: set[int], levels: int) -> None:
    """Note `value` and what it refers to. What is put back keeps its identity: whoever else refers to it sees it."""
    if id(value) in seen or levels < 0:
        return
    seen.add(id(value))
    own = levels >= _LEVELS - 1  # the object, or an attribute of it
    if isinstance(value, torch.Tensor):
        if nn.parameter.is_lazy(value):
            notes.append(functools.partial(_put_back_lazy, value, type(value)))
        else:
            notes.append(functools.partial(_put_back_tensor, value, value.detach().clone()))
    elif isinstance(value, nn.Module):
        notes.extend([undo_module(value)] if own else [])  # further down it is somebody else's
    elif isinstance(value, _CONTAINERS) and len(value) <= _TOO_MANY:
        notes.append(functools.partial(_refill, value, copy.copy(value)))
    elif _is_looked_into(value, levels):
        notes.append(functools.partial(_put_back_attributes, value, _attributes(value)))
    for item in _inside(value, levels):
        _note(item, notes, seen, levels - 1)


def _is_looked_into(value: Any, levels: int) -> bool:
    if levels == _LEVELS:
        return True
    if not hasattr(value, "__dict__") or isinstance(value, _OPAQUE):
        return False
    # A scheduler's function objects hold state; an engine's handlers are not the engine's own.
    return not callable(value) or levels >= _LEVELS - 2


def _inside(value: Any, levels: int) -> list[Any]:
    if isinstance(value, dict) and len(value) <= _TOO_MANY:
        return list(value.values())
    if isinstance(value, (*_CONTAINERS, tuple)) and len(value) <= _TOO_MANY:
        return list(value)
    return list(_attributes(value).values()) if _is_looked_into(value, levels) else []


def _attributes(obj: Any) -> dict[str, Any]:
    """Return an object's attributes, those in slots too."""
    named = [getattr(kind, "__slots__", ()) for kind in type(obj).__mro__]
    slots = [name for names in named for name in ((names,) if isinstance(names, str) else names)]
    held = {name: getattr(obj, name) for name in slots if name not in _NO_SLOTS and hasattr(obj, name)}
    return {**held, **getattr(obj, "__dict__", {})}


def _put_back_attributes(obj: Any, held: dict[str, Any]) -> None:
    for name in [name for name in getattr(obj, "__dict__", {}) if name not in held]:
        del vars(obj)[name]
    in_dict = getattr(obj, "__dict__", {})
    for name, value in held.items():
        if hasattr(type(obj), name) and name not in in_dict:  # a slot
            object.__setattr__(obj, name, value)
        elif in_dict.get(name, _NO_SLOTS) is not value:
            in_dict[name] = value


def _put_back_tensor(tensor: torch.Tensor, before: torch.Tensor) -> None:
    if tensor.shape == before.shape and tensor.device == before.device:
        tensor.data.copy_(before)
    else:
        tensor.data = before


def _put_back_lazy(tensor: torch.Tensor, kind: type) -> None:
    if type(tensor) is not kind:  # it was given a shape
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        tensor.__class__ = kind


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, list | deque):
        container.extend(content)
    else:
        container.update(content)
