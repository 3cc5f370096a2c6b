"""to_save -> state dicts.

Owns the capture: which objects give which state, on which rank. Must not know about files. Layer L2.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distckpt.scalars import is_numpy_scalar
from distckpt.state.fence import is_stepped_in_python
from distckpt.state.unwrap import unwrap, unwrap_once

__all__ = ["capture", "check_objects", "consolidate", "is_spread", "map_tree", "plain_scalars", "replicas", "stepped"]


_PLAIN = frozenset({torch.Tensor, nn.Parameter, str, int, float, bool, type(None)})


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
        state = obj.state_dict()
        return plain_scalars(state) if _holds_more_than_plain(state) else state

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


def is_spread(to_save: Mapping[str, Any]) -> bool:
    """Tell whether some object's state is spread over the ranks, so that :func:`consolidate` has something to do."""
    found: list[bool] = []
    map_tree(
        lambda obj: found.append(_is_sharded_optimizer(obj) or hasattr(type(obj), "distckpt_consolidate")),
        dict(to_save),
    )
    return any(found)


def replicas(to_save: Mapping[str, Any], *, world_size: int) -> frozenset[int]:
    """Find the storages that are known to be equal on all ranks, bit for bit. Rank-local; issues no collectives.

    These are the parameters of modules that are wrapped in DistributedDataParallel over all ranks, and what an
    optimizer keeps for these parameters. Buffers are each rank's own; so is what belongs to nobody known. A job that
    averages parameters now and then (post-local SGD) has no replicas in between.

    Args:
        to_save: mappings and lists of objects, nested at will.
        world_size: number of ranks of the job.

    Returns:
        torch's identities of the storages (``UntypedStorage._cdata``). Valid as long as the objects live.
    """
    parameters: set[torch.Tensor] = set()
    optimizers: list[torch.optim.Optimizer] = []

    def look(obj: Any) -> None:
        module = _data_parallel(obj, world_size)
        if module is not None:
            ignored = getattr(module, "parameters_to_ignore", ())
            named = module.module.named_parameters()
            parameters.update(parameter for name, parameter in named if name not in ignored)
        elif isinstance(obj, torch.optim.Optimizer) and not _is_sharded_optimizer(obj):
            optimizers.append(obj)

    map_tree(look, dict(to_save))
    found = {_whole_storage(parameter) for parameter in parameters}
    for optimizer in optimizers:
        states = optimizer.state
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in parameters and parameter in states:
                    kept = states[parameter].values()
                    found.update(_whole_storage(one) for one in kept if isinstance(one, torch.Tensor))
    return frozenset(identity for identity in found if identity is not None)


def stepped(to_save: Mapping[str, Any]) -> dict[int, str]:
    """Find the storages that nothing but an optimizer's step changes, and only where a hook can tell of it. Rank-local.

    Returns:
        torch's identities of the storages, with their devices' types.
    """
    found: dict[int, str] = {}

    def look(obj: Any) -> None:
        if not isinstance(obj, torch.optim.Optimizer) or _is_sharded_optimizer(obj) or not is_stepped_in_python(obj):
            return
        for group in obj.param_groups:
            for parameter in group["params"]:
                kept = (one for one in obj.state.get(parameter, {}).values() if isinstance(one, torch.Tensor))
                for tensor in (parameter, *kept):
                    identity = _whole_storage(tensor)
                    if identity is not None:
                        found[identity] = tensor.device.type

    map_tree(look, dict(to_save))
    return found


def _whole_storage(tensor: torch.Tensor) -> int | None:
    """Return torch's identity of a tensor's storage, if nothing else lies in it; else None."""
    if tensor.layout is not torch.strided:
        return None
    storage = tensor.untyped_storage()
    return storage._cdata if storage.nbytes() == tensor.nbytes else None  # noqa: SLF001 - whatever Python wraps it


def _data_parallel(obj: Any, world_size: int) -> Any:
    """Return the DistributedDataParallel that `obj` is, or wraps, if it keeps replicas on all ranks; else None."""
    while not isinstance(obj, nn.parallel.DistributedDataParallel):
        inner = unwrap_once(obj)
        if inner is obj:
            return None
        obj = inner
    hooks = getattr(obj, "_comm_hooks", ())
    if any("localSGD" in getattr(hook, "__name__", "") for hook, _ in hooks):
        return None
    return obj if torch.distributed.get_world_size(obj.process_group) == world_size else None


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


def _holds_more_than_plain(state: Any) -> bool:
    """Tell whether a state may hold NumPy scalars: a quick look, for all the states that do not."""
    kind = type(state)
    if kind in _PLAIN:
        return False
    if kind is dict or kind is OrderedDict:
        for key, item in state.items():
            if (type(key) not in _PLAIN) or (type(item) not in _PLAIN and _holds_more_than_plain(item)):
                return True
        return False
    if kind is list or kind is tuple:
        return any(type(item) not in _PLAIN and _holds_more_than_plain(item) for item in state)
    return True


def _is_sharded_optimizer(obj: Any) -> bool:
    # Not imported here: there is none before somebody else imported it.
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    return zero is not None and isinstance(obj, zero.ZeroRedundancyOptimizer)
