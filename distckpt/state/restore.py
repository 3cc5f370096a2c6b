"""State -> live objects: all of them, or none.

Owns the order in which objects are loaded and how a failed load is undone. Must not know where the state came
from. Layer L2.

1. every object is paired with its state; a missing one ends it here.
2. modules try their state on a skeleton, optimizers compare their groups: nothing live is touched.
3. the objects that cannot be asked beforehand are loaded first, after a note of what they held; if one refuses,
   all of them get that back.
4. optimizers, then modules that load in a way of their own, are loaded; their notes are used like those of 3.
5. plain modules are loaded last: they are known to fit, and no copy of them is made.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distckpt.state.skeleton import NotCopyable, try_on_skeleton
from distckpt.state.undo import undo_module, undo_object, undo_optimizer
from distckpt.state.unwrap import unwrap

__all__ = ["check_complete", "restore"]


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
    turns: list[tuple[int, _Pair]] = []
    undo: list[Callable[[], None]] = []
    for pair in pairs:
        turn, step = _examine(pair, options)
        turns.append((turn, pair))
        undo.extend([] if step is None else [step])
    try:
        for _, pair in sorted(turns, key=lambda item: item[0]):
            if isinstance(pair.obj, nn.Module):
                pair.obj.load_state_dict(pair.state, **options)
            else:
                pair.obj.load_state_dict(pair.state)
    except BaseException:
        with contextlib.ExitStack() as stack:  # every step is taken, also when one of them fails
            for step in undo:
                stack.callback(step)
        raise


def check_complete(to_load: Mapping[str, Any], state: Any) -> None:
    """Refuse a state that lacks some of the objects. Rank-local; issues no collectives, touches no object.

    Raises:
        ValueError: an object has no state, or a list another length.
    """
    _pair_up(to_load, state)


def _examine(pair: _Pair, options: dict[str, Any]) -> tuple[int, Callable[[], None] | None]:
    """Find out whether a state fits, as far as that can be known.

    Returns:
        When the object is to be loaded (the surest last), and how to undo that; None where it cannot fail.

    Raises:
        ValueError, RuntimeError: it does not fit.
    """
    obj = pair.obj
    if isinstance(obj, nn.Module):
        try:
            try_on_skeleton(obj, pair.state, options)
        except NotCopyable:
            return 2, undo_module(obj)
        return 3, None
    if isinstance(obj, torch.optim.Optimizer) and _loads_as_torch_does(obj):
        _check_groups(pair)
        return 1, undo_optimizer(obj)
    if hasattr(type(obj), "distckpt_undo"):  # what it loads lies outside of it, as with RngState
        return 0, obj.distckpt_undo()
    return 0, undo_object(obj)


def _pair_up(to_load: Mapping[str, Any], state: Any) -> list[_Pair]:
    if len(to_load) == 1:
        ((key, obj),) = to_load.items()
        if not isinstance(state, Mapping) or key not in state or _is_bare(obj, state, key):
            return _pairs(key, obj, state)
    return _pairs("", dict(to_load), state)


def _is_bare(obj: Any, state: Mapping[str, Any], key: str) -> bool:
    """Tell a single object's bare state that happens to hold `key` from a mapping with its state at `key`."""
    if isinstance(obj, torch.optim.Optimizer):
        inner = state[key]
        return "param_groups" in state and not (isinstance(inner, Mapping) and "param_groups" in inner)
    return hasattr(obj, "load_state_dict") and not isinstance(state[key], Mapping)


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


def _loads_as_torch_does(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).load_state_dict is torch.optim.Optimizer.load_state_dict


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
