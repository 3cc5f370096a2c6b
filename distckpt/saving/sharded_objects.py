"""Objects of whose state each rank holds a shard, and objects whose tensors are DTensors.

FSDP1's parameters and states are plain tensors that hold a shard: only the module tells. Tensors that are sharded by
their type are found by :mod:`distckpt.ptformat.sharded`.
"""

import copy
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from distckpt.ptformat.sharded import (
    describe_shard,
    is_dtensor,
    is_flat_shard,
    match_dtensor,
    none_sharded,
    sharded_error,
)

_MANAGED = "_is_fsdp_managed_module"
_FULL = "FULL_STATE_DICT"
_PLAIN = frozenset({torch.Tensor, nn.Parameter, type(None)})


def refuse_sharded_object(name: str, obj: Any, *, save_on_rank: int | None = None) -> None:
    """Refuse an object of whose state each rank holds a shard. Rank-local; issues no collectives.

    Args:
        name: the object's name, for messages.
        obj: the object, without wrappers.
        save_on_rank: rank that will save its state; None if a state is to be loaded into it.

    Raises:
        ShardedStateError: the object is sharded.
    """
    where = f"to_{'load' if save_on_rank is None else 'save'}[{name!r}]"
    if isinstance(obj, torch.optim.Optimizer):
        _refuse_optimizer(where, obj, is_loaded=save_on_rank is None)
    elif isinstance(obj, nn.Module) and (save_on_rank is not None or _may_be_sharded(obj)):
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            _refuse_fsdp1(where, obj, save_on_rank)
        if save_on_rank is None and _has_torch_load(obj):
            _refuse_module(where, obj)


def to_dtensors_like(obj: Any, state: Any) -> Any:
    """Return a state in which plain tensors are DTensors where the object's are. Rank-local; changes no object.

    torch's ``load_state_dict`` takes no plain tensor for a DTensor. An object that overrides it gets `state` itself.

    Args:
        obj: the object, without wrappers and not sharded.
        state: the state to load into it.
    """
    if not isinstance(state, Mapping):
        return state
    if isinstance(obj, nn.Module) and _has_torch_load(obj):
        found = {key: live for key, live in _live_tensors(obj) if key in state and is_dtensor(live)}
        return _with_items(state, {key: match_dtensor(live, state[key]) for key, live in found.items()})
    if isinstance(obj, torch.optim.Optimizer):
        kept = state.get("state")
        if isinstance(kept, Mapping):
            return _with_items(state, {"state": _with_items(kept, _dtensor_states(obj, state))})
    return state


def _dtensor_states(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[Any, Any]:
    """Return the states of the parameters that are DTensors, as DTensors."""
    found: dict[Any, Any] = {}
    for ours, theirs in zip(optimizer.param_groups, state.get("param_groups", ()), strict=False):
        if none_sharded(ours["params"]):
            continue
        for index, live in zip(theirs["params"], ours["params"], strict=False):
            kept = state["state"].get(index)
            if isinstance(kept, Mapping):  # a step is a number, whatever the parameter's shape
                found[index] = _with_items(kept, {key: match_dtensor(live, kept[key]) for key in kept if key != "step"})
    return found


def _with_items(state: Any, items: Mapping[Any, Any]) -> Any:
    """Return a copy with other items and the same attributes, such as a module's ``_metadata``."""
    if all(state[key] is item for key, item in items.items()):
        return state
    twin = copy.copy(state)
    twin.update(items)
    return twin


def _refuse_optimizer(where: str, optimizer: torch.optim.Optimizer, *, is_loaded: bool) -> None:
    # getattr: ignite's own tests use a stand-in for an optimizer.
    for group_index, group in enumerate(getattr(optimizer, "param_groups", ())):
        if none_sharded(group["params"]):
            continue
        for index, parameter in enumerate(group["params"]):
            if (problem := describe_shard(parameter)) is not None:
                raise sharded_error(f"{where}, an optimizer: its parameter {index} of group {group_index}", problem)
    if is_loaded:  # a state to save is checked by plain_state
        for kept in getattr(optimizer, "state", {}).values():
            for key, one in kept.items() if isinstance(kept, dict) else ():
                if isinstance(one, torch.Tensor) and (problem := describe_shard(one)) is not None:
                    raise sharded_error(f"{where}, an optimizer: its {key!r} of a parameter", problem)


def _may_be_sharded(module: nn.Module) -> bool:
    """Return False if all tensors of a module are of torch's plain types, and FSDP manages no part of it."""
    todo = [module]
    while todo:  # over the modules' own dicts: ten times faster than modules() and parameters()
        attributes = vars(todo.pop())
        tensors = (*attributes.get("_parameters", {}).values(), *attributes.get("_buffers", {}).values())
        if _MANAGED in attributes or not _PLAIN.issuperset(map(type, tensors)):
            return True
        todo.extend(inner for inner in attributes.get("_modules", {}).values() if inner is not None)
    return False


def _refuse_module(where: str, module: nn.Module) -> None:
    for key, tensor in _live_tensors(module):
        if not is_flat_shard(tensor) and (problem := describe_shard(tensor)) is not None:  # FSDP1 gathers and scatters
            raise sharded_error(f"{where}, key {key!r},", problem)
    todo = [module]
    while todo:
        one = todo.pop()
        if _is_fsdp2(one):  # its state_dict() has freed the gathered parameters
            continue
        parameters = list(one.parameters(recurse=False))
        if _MANAGED in vars(one) and parameters and none_sharded(parameters):
            problem = "a module inside of one that fully_shard manages, which has gathered its parameters for a while"
            raise sharded_error(where, problem)
        todo.extend(one.children())


def _live_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that a module's state is loaded into."""
    if any(map(_is_fsdp2, module.modules())):  # state_dict() frees gathered parameters
        yield from ((key, one) for key, one in module.state_dict().items() if isinstance(one, torch.Tensor))
        return
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers()


def _is_fsdp2(module: nn.Module) -> bool:
    fsdp2 = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return fsdp2 is not None and isinstance(module, fsdp2)


def _has_torch_load(module: nn.Module) -> bool:
    """Return False for a module that overrides ``load_state_dict``: it may shard a whole state itself."""
    return type(module).load_state_dict is nn.Module.load_state_dict and "load_state_dict" not in vars(module)


def _refuse_fsdp1(where: str, module: nn.Module, save_on_rank: int | None) -> None:
    """Refuse what FSDP1 shards, unless its module gathers the state."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    if fsdp is None or torch.distributed.get_world_size() == 1:
        return
    todo = [module]
    while todo:  # modules() takes twice the time, and training is stalled
        one = todo.pop()
        attributes = vars(one)
        if isinstance(one, fsdp):
            problem = _fsdp1_problem(one, save_on_rank)
            if problem is not None:
                raise sharded_error(where, problem)
            todo.extend(inner for inner in one.modules() if inner is not one and isinstance(inner, fsdp))
        else:
            if _MANAGED in attributes and any(map(is_flat_shard, one.parameters(recurse=False))):
                raise sharded_error(where, "a module inside of a FullyShardedDataParallel: its parameters are a shard")
            todo.extend(inner for inner in attributes.get("_modules", {}).values() if inner is not None)


def _fsdp1_problem(module: Any, save_on_rank: int | None) -> str | None:
    kind = getattr(getattr(module, "_state_dict_type", None), "name", _FULL)
    if kind != _FULL:
        return f"a FullyShardedDataParallel whose state_dict_type is {kind}"
    is_on_first = getattr(getattr(module, "_state_dict_config", None), "rank0_only", False)
    if is_on_first and save_on_rank not in (None, 0):
        return f"a FullyShardedDataParallel with rank0_only=True: rank {save_on_rank}, which saves, gets no state"
    return None
