"""to_save -> state dicts.

Owns the capture: which objects give which state, on which rank. Must not know about files. Layer L2.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distckpt.scalars import is_numpy_scalar
from distckpt.state.unwrap import unwrap

__all__ = ["capture", "check_objects", "consolidate", "map_tree", "plain_scalars"]


def map_tree(func: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `func` to the leaves of nested mappings and sequences; returns plain dicts and lists of the same shape.

    A mapping or sequence that has a ``state_dict`` of its own (``nn.ModuleDict``, ``nn.ModuleList``) is a leaf.
    """
    if hasattr(tree, "state_dict") or hasattr(tree, "load_state_dict"):
        return func(tree)
    if isinstance(tree, Mapping):
        return {key: map_tree(func, item) for key, item in tree.items()}
    if isinstance(tree, Sequence) and not isinstance(tree, str | bytes):
        return [map_tree(func, item) for item in tree]
    return func(tree)


def check_objects(tree: Any, method: str) -> None:
    """Refuse objects that cannot be saved or loaded.

    Raises:
        TypeError: some object lacks `method`.
    """

    def check(obj: Any) -> None:
        if not hasattr(obj, method):
            msg = f"Object {type(obj)} should have `{method}` method"
            raise TypeError(msg)

    map_tree(check, tree)


def capture(to_save: Mapping[str, Any], *, rank: int, save_on_rank: int) -> dict[str, Any]:
    """Call ``state_dict()`` on every object. All ranks.

    Whatever is collective about it has been done by :func:`consolidate`. Ranks that do not save hold ``{}`` for a
    ZeroRedundancyOptimizer.

    Args:
        to_save: mappings and lists of objects, nested at will.
        rank: this rank.
        save_on_rank: the rank that saves.

    Returns:
        The same tree with states in place of objects. Tensors are the live ones, not copies; NumPy scalars have
        become Python's, since ``torch.load(weights_only=True)`` refuses them.
    """

    def state_of(obj: Any) -> Any:
        obj = unwrap(obj)
        if _is_sharded_optimizer(obj) and rank != save_on_rank:
            return {}
        return plain_scalars(obj.state_dict())

    captured: dict[str, Any] = map_tree(state_of, dict(to_save))
    return captured


def consolidate(to_save: Mapping[str, Any], *, save_on_rank: int) -> None:
    """Collective where an object's state is spread over the ranks. Gather it on the rank that saves.

    Apart from :func:`capture`, whose calls of users' code may fail on one rank while the others would wait here.

    Two kinds of objects are such: a ZeroRedundancyOptimizer, and one whose class has a method
    ``distckpt_consolidate(to)``, as :class:`~distckpt.RngState` has. It is called on every rank, in the same order,
    and may be collective; the ``state_dict()`` that follows returns what was gathered on rank `to`. An object of
    anybody's that merely has a ``consolidate_state_dict`` is left alone: nobody knows what that one waits for.
    """

    def gather(obj: Any) -> None:
        if _is_sharded_optimizer(obj):
            obj.consolidate_state_dict(to=save_on_rank)
        elif hasattr(type(obj), "distckpt_consolidate"):  # of the class: a mock has every attribute
            obj.distckpt_consolidate(save_on_rank)

    map_tree(gather, dict(to_save))


def plain_scalars(state: Any) -> Any:
    """Replace NumPy scalars by Python's. Containers that hold none are handed back as they are."""
    if is_numpy_scalar(state):
        return state.item()
    kind = type(state)
    if kind in (dict, OrderedDict):
        replaced = {plain_scalars(key): plain_scalars(item) for key, item in state.items()}
        pairs = zip(replaced.items(), state.items(), strict=False)
        if len(replaced) == len(state) and all(new[0] is old[0] and new[1] is old[1] for new, old in pairs):
            return state
        fresh = kind(replaced)
        if kind is OrderedDict:
            vars(fresh).update(vars(state))  # a module's `_metadata`
        return fresh
    if kind in (list, tuple):
        items = [plain_scalars(item) for item in state]
        return state if all(new is old for new, old in zip(items, state, strict=True)) else kind(items)
    return state


def _is_sharded_optimizer(obj: Any) -> bool:
    # Not imported here: there is none before somebody else imported it.
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    return zero is not None and isinstance(obj, zero.ZeroRedundancyOptimizer)
