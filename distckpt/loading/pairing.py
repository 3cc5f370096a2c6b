"""Which state is which object's.

Owns the walk through the objects and the checkpoint side by side. Must not know how an object is loaded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distckpt._unwrap import rename_for_module, unwrap
from distckpt.errors import StateMismatchError, state_mismatch_error
from distckpt.loading.report import all_in_one
from distckpt.loading.rollback import own_state

__all__ = ["Misfits", "Pair", "check_complete", "pair_up"]

Misfits = list[tuple[str, StateMismatchError]]
"""What does not fit, each with the name of the object it is of."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One live object, unwrapped, and the state it is to get, under the names that the object has for it."""

    name: str
    obj: Any
    state: Any


def pair_up(to_load: Mapping[str, Any], state: Any) -> tuple[list[Pair], Misfits]:
    """Find the state of every object. Rank-local; issues no collectives, touches no object.

    Args:
        to_load: live objects, in mappings and lists nested at will.
        state: their states, in a tree of the same shape; it may hold more. A single object's bare state dict
            is accepted as it is.

    Returns:
        The pairs, and an error for each object or list that has none.
    """
    found: list[Pair] = []
    misfits: Misfits = []
    if len(to_load) == 1:
        ((key, obj),) = to_load.items()
        if not isinstance(state, Mapping) or key not in state or _is_bare(obj, state, key):
            _walk(key, obj, state, found, misfits)
            return found, misfits
    _walk("", dict(to_load), state, found, misfits)
    return found, misfits


def check_complete(to_load: Mapping[str, Any], state: Any) -> None:
    """Refuse a state that lacks some of the objects. Rank-local; issues no collectives, touches no object.

    Raises:
        StateMismatchError: some object has no state, or a list another length; a ValueError too.
    """
    _, misfits = pair_up(to_load, state)
    if misfits:
        raise all_in_one(misfits)


def _is_bare(obj: Any, state: Mapping[str, Any], key: str) -> bool:
    """Tell a single object's bare state that happens to hold `key` from a mapping with its state at `key`."""
    inner = state[key]
    if isinstance(obj, Mapping):
        is_inner = isinstance(inner, Mapping) and obj.keys() <= inner.keys()
        return obj.keys() <= state.keys() and not is_inner
    if isinstance(obj, torch.optim.Optimizer):
        return "param_groups" in state and not (isinstance(inner, Mapping) and "param_groups" in inner)
    if isinstance(inner, Mapping) or not hasattr(obj, "load_state_dict"):
        return False
    if isinstance(obj, nn.Module):
        return True
    try:
        return isinstance(own_state(obj), Mapping)  # else what stands at the key is such a state
    except Exception:  # noqa: BLE001 - a user's; ignite takes what stands at the key
        return False


def _walk(name: str, obj: Any, state: Any, found: list[Pair], misfits: Misfits) -> None:
    if hasattr(obj, "load_state_dict"):
        inner = unwrap(obj)
        found.append(Pair(name, inner, rename_for_module(inner, state) if isinstance(inner, nn.Module) else state))
        return
    if isinstance(obj, Mapping) and isinstance(state, Mapping):
        for key, item in obj.items():
            inner = f"{name}.{key}".lstrip(".")
            if key in state:
                _walk(inner, item, state[key], found, misfits)
                continue
            msg = f"Key '{key}' from x is not found in y: {state.keys()}"
            misfits.append((inner, state_mismatch_error(msg, ["ValueError"], missing=[inner])))
        return
    if isinstance(obj, Sequence) and isinstance(state, Sequence) and not isinstance(state, str | bytes):
        if len(obj) == len(state):
            for index, (item, part) in enumerate(zip(obj, state, strict=True)):
                _walk(f"{name}[{index}]", item, part, found, misfits)
            return
        msg = f"Size of y: {len(state)} does not match the size of x: '{len(obj)}'"
    else:
        where = repr(name or "its top")
        msg = f"Argument to_load holds {type(obj)} at {where}, but the checkpoint holds {type(state)} there"
    misfits.append((name, state_mismatch_error(msg, ["ValueError"], mismatched=[name])))
