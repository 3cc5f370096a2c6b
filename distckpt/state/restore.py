"""State -> live objects: all of them, or none.

Owns the order in which objects are loaded and how a failed load is undone. Must not know where the state came
from. Layer L2.

1. every object is paired with its state; a missing one ends it here.
2. modules try their state on a skeleton, optimizers compare their groups: nothing live is touched.
3. the objects that cannot be asked beforehand are loaded first, after a note of what they held; if one refuses,
   all of them get that back.
4. optimizers and modules are loaded: they are known to fit.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distckpt.state.skeleton import NotCopyable, try_on_skeleton
from distckpt.state.unwrap import unwrap

__all__ = ["restore"]


@dataclass(frozen=True, slots=True)
class _Pair:
    """One live object, unwrapped, and the state it is to get."""

    name: str
    obj: Any
    state: Any


def restore(to_load: Mapping[str, Any], state: Any, module_options: Mapping[str, Any]) -> None:
    """Load `state` into the objects of `to_load`, all or none. Rank-local; issues no collectives.

    Args:
        to_load: live objects, in mappings and lists nested at will.
        state: their states, in a tree of the same shape; it may hold more. A single object's bare state dict
            is accepted as it is.
        module_options: keyword arguments of ``nn.Module.load_state_dict``, e.g. ``strict``.

    Raises:
        ValueError: an object has no state, a list another length, or an optimizer other groups.
        Exception: what an object's own ``load_state_dict`` raises. No live object is left changed.
    """
    options = dict(module_options)
    pairs = _pair_up(to_load, state)
    known = [pair for pair in pairs if _can_be_asked(pair.obj)]
    first = [pair for pair in pairs if not _can_be_asked(pair.obj)]
    undo: list[Callable[[], None]] = []
    for pair in known:
        if isinstance(pair.obj, nn.Module):
            try:
                try_on_skeleton(pair.obj, pair.state, options)
            except NotCopyable:
                undo.append(_undo_module(pair.obj))
        else:
            _check_groups(pair)
    undo.extend(_undo_attributes(pair.obj) for pair in first)
    # Modules last: they were tried on a skeleton, and are the largest.
    order = first + sorted(known, key=lambda pair: isinstance(pair.obj, nn.Module))
    try:
        for pair in order:
            if isinstance(pair.obj, nn.Module):
                pair.obj.load_state_dict(pair.state, **options)
            else:
                pair.obj.load_state_dict(pair.state)
    except BaseException:
        for step in undo:
            step()
        raise


def _pair_up(to_load: Mapping[str, Any], state: Any) -> list[_Pair]:
    if len(to_load) == 1:
        ((key, obj),) = to_load.items()
        if not isinstance(state, Mapping) or key not in state:
            return _pairs(key, obj, state)
    return _pairs("", dict(to_load), state)


def _pairs(name: str, obj: Any, state: Any) -> list[_Pair]:
    if hasattr(obj, "load_state_dict"):
        return [_Pair(name, unwrap(obj), state)]
    if isinstance(obj, Mapping) and isinstance(state, Mapping):
        for key in obj:
            if key not in state:
                msg = f"Key '{key}' from x is not found in y: {state.keys()}"
                raise ValueError(msg)
        return [pair for key, item in obj.items() for pair in _pairs(f"{name}.{key}".lstrip("."), item, state[key])]
    if isinstance(obj, Sequence) and isinstance(state, Sequence) and not isinstance(state, str | bytes):
        if len(obj) != len(state):
            msg = f"Size of y: {len(state)} does not match the size of x: '{len(obj)}'"
            raise ValueError(msg)
        parts = zip(obj, state, strict=True)
        return [pair for index, (item, part) in enumerate(parts) for pair in _pairs(f"{name}[{index}]", item, part)]
    msg = f"Argument to_load holds {type(obj)} at {name or 'its top'!r}, but the checkpoint holds {type(state)} there"
    raise ValueError(msg)


def _can_be_asked(obj: Any) -> bool:
    """Tell whether it can be found out beforehand that a state fits `obj`."""
    if isinstance(obj, torch.optim.Optimizer):
        return type(obj).load_state_dict is torch.optim.Optimizer.load_state_dict
    return isinstance(obj, nn.Module)


def _check_groups(pair: _Pair) -> None:
    """Compare what ``Optimizer.load_state_dict`` compares, before anything is changed."""
    groups = pair.state.get("param_groups") if isinstance(pair.state, Mapping) else None
    if not isinstance(groups, Sequence) or "state" not in pair.state:
        msg = f"the checkpoint's {pair.name!r} is no optimizer's state: it lacks 'state' or 'param_groups'"
        raise ValueError(msg)
    ours = [len(group["params"]) for group in pair.obj.param_groups]
    theirs = [len(group["params"]) for group in groups]
    told = f"({pair.name!r}: the checkpoint's groups hold {theirs} parameters, the optimizer's {ours})"
    if len(ours) != len(theirs):
        msg = f"loaded state dict has a different number of parameter groups {told}"
        raise ValueError(msg)
    if ours != theirs:
        msg = f"loaded state dict contains a parameter group that doesn't match the size of optimizer's group {told}"
        raise ValueError(msg)


def _undo_module(module: nn.Module) -> Callable[[], None]:
    before = {key: value.detach().clone() for key, value in module.state_dict().items() if torch.is_tensor(value)}

    def undo() -> None:
        module.load_state_dict(before, strict=False)

    return undo


def _undo_attributes(obj: Any) -> Callable[[], None]:
    """Note what `obj` holds, two levels deep: its attributes, their containers, and its parts' attributes.

    An ignite Engine keeps its counters in ``engine.state``, a scheduler its own in its attributes.
    """
    notes = [(part, _shallow(vars(part))) for part in (obj, *_parts(obj))] if hasattr(obj, "__dict__") else []
    state = None if notes else copy.deepcopy(obj.state_dict())

    def undo() -> None:
        for part, held in notes:
            vars(part).clear()
            vars(part).update(held)
        if state is not None:
            obj.load_state_dict(state)

    return undo


def _shallow(attributes: dict[str, Any]) -> dict[str, Any]:
    return {
        key: copy.copy(value) if isinstance(value, list | dict | set) else value for key, value in attributes.items()
    }


def _parts(obj: Any) -> list[Any]:
    opaque = (nn.Module, torch.Tensor, torch.optim.Optimizer, type)
    return [
        part
        for part in vars(obj).values()
        if hasattr(part, "__dict__") and not isinstance(part, opaque) and not callable(part)
    ]
