"""Live objects whose state would be a part of a whole, though its tensors may look plain; and those of DTensors.

Knows FSDP1's modules and what an optimizer keeps for sharded parameters. What is sharded by its own type, in a state,
is found by :mod:`distckpt.ptformat.sharded`.
"""

import copy
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from distckpt.ptformat.sharded import are_plain, as_live, is_dtensor, is_flat_shard, refusal, shard_of

__all__ = ["refuse_sharded_object", "to_dtensors_like"]

_MANAGED = "_is_fsdp_managed_module"
_FULL = "FULL_STATE_DICT"
_PLAIN = frozenset({torch.Tensor, nn.Parameter, type(None)})


def refuse_sharded_object(name: str, obj: Any, *, save_on_rank: int | None = None) -> None:
    """Refuse an object of whose state each rank holds a part. Rank-local; issues no collectives.

    Args:
        name: the object's, for messages.
        obj: without wrappers.
        save_on_rank: the rank that is to save its state; None where a state is to be loaded into it.

    Raises:
        ShardedStateError: it is such an object.
    """
    where = f"to_{'load' if save_on_rank is None else 'save'}[{name!r}]"
    if isinstance(obj, torch.optim.Optimizer):
        _refuse_optimizer(where, obj, is_loaded=save_on_rank is None)
    elif isinstance(obj, nn.Module) and (save_on_rank is not None or _may_be_spread(obj)):
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            _refuse_fsdp1(where, obj, save_on_rank)
        if save_on_rank is None and _loads_as_torch_does(obj):
            _refuse_module(where, obj)


def to_dtensors_like(obj: Any, state: Any) -> Any:
    """Return a state whose plain tensors are DTensors where those of the object are. Rank-local; touches no object.

    torch's own ``load_state_dict`` takes no plain tensor for a DTensor. An object with a ``load_state_dict`` of its own
    gets the state as it is.

    Args:
        obj: without wrappers; nothing in it is sharded.
        state: what is to be loaded into it.
    """
    if not isinstance(state, Mapping):
        return state
    if isinstance(obj, nn.Module) and _loads_as_torch_does(obj):
        spread = {key: live for key, live in _live_tensors(obj) if key in state and is_dtensor(live)}
        return _with(state, {key: as_live(live, state[key]) for key, live in spread.items()})
    if isinstance(obj, torch.optim.Optimizer):
        kept = state.get("state")
        return _with(state, {"state": _with(kept, _kept_of(obj, state))}) if isinstance(kept, Mapping) else state
    return state


def _kept_of(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[Any, Any]:
    """Return what a state keeps for those of an optimizer's parameters that are DTensors, in their form."""
    found: dict[Any, Any] = {}
    for ours, theirs in zip(optimizer.param_groups, state.get("param_groups", ()), strict=False):
        if are_plain(ours["params"]):
            continue
        for number, live in zip(theirs["params"], ours["params"], strict=False):
            kept = state["state"].get(number)
            if isinstance(kept, Mapping):  # a step is a number, whatever the parameter's shape
                found[number] = _with(kept, {key: as_live(live, kept[key]) for key in kept if key != "step"})
    return found


def _with(state: Any, items: Mapping[Any, Any]) -> Any:
    """Return a copy with other items; its attributes, as a module's ``_metadata``, stay."""
    if all(state[key] is item for key, item in items.items()):
        return state
    twin = copy.copy(state)
    twin.update(items)
    return twin


def _refuse_optimizer(where: str, optimizer: torch.optim.Optimizer, *, is_loaded: bool) -> None:
    # A stand-in for an optimizer, which ignite's own tests use, has neither.
    for index, group in enumerate(getattr(optimizer, "param_groups", ())):
        if are_plain(group["params"]):
            continue
        for number, parameter in enumerate(group["params"]):
            if (problem := shard_of(parameter)) is not None:
                raise refusal(f"{where}, an optimizer: its parameter {number} of group {index}", problem)
    if is_loaded:  # else it is found in the state
        for kept in getattr(optimizer, "state", {}).values():
            for key, one in kept.items() if isinstance(kept, dict) else ():
                if isinstance(one, torch.Tensor) and (problem := shard_of(one)) is not None:
                    raise refusal(f"{where}, an optimizer: its {key!r} of a parameter", problem)


def _may_be_spread(module: nn.Module) -> bool:
    """Return False if all of a module's tensors are of torch's plain types, and FSDP manages nothing in it."""
    todo = [module]
    while todo:  # by the modules' own dicts, in a tenth of the time that their methods take
        attributes = vars(todo.pop())
        tensors = (*attributes.get("_parameters", {}).values(), *attributes.get("_buffers", {}).values())
        if _MANAGED in attributes or not _PLAIN.issuperset(map(type, tensors)):
            return True
        todo.extend(inner for inner in attributes.get("_modules", {}).values() if inner is not None)
    return False


def _refuse_module(where: str, module: nn.Module) -> None:
    for key, tensor in _live_tensors(module):
        if not is_flat_shard(tensor) and (problem := shard_of(tensor)) is not None:  # FSDP1's gather and scatter
            raise refusal(f"{where}, key {key!r},", problem)
    todo = [module]
    while todo:
        one = todo.pop()
        if _is_fsdp2(one):  # it has let go of what it had gathered
            continue
        parameters = list(one.parameters(recurse=False))
        if _MANAGED in vars(one) and parameters and are_plain(parameters):
            problem = "a module inside of one that fully_shard manages, which has gathered its parameters for a while"
            raise refusal(where, problem)
        todo.extend(one.children())


def _live_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a module's state is loaded into. FSDP2's modules let go of what they have gathered."""
    if any(map(_is_fsdp2, module.modules())):
        state = module.state_dict()
        yield from ((key, one) for key, one in state.items() if isinstance(one, torch.Tensor))
        return
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers()


def _is_fsdp2(module: nn.Module) -> bool:
    fsdp2 = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return fsdp2 is not None and isinstance(module, fsdp2)


def _loads_as_torch_does(module: nn.Module) -> bool:
    """Return False for a module with a ``load_state_dict`` of its own, which may take a whole state apart."""
    return type(module).load_state_dict is nn.Module.load_state_dict and "load_state_dict" not in vars(module)


def _refuse_fsdp1(where: str, module: nn.Module, save_on_rank: int | None) -> None:
    """Refuse what FSDP1 shards, but for a module of its own that gathers its state.

    Its parameters are plain ones that view a shard, and their states plain tensors: no type tells of it.
    """
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    if fsdp is None or torch.distributed.get_world_size() == 1:
        return
    todo = [module]
    while todo:  # modules() takes twice the time, and training stands still
        one = todo.pop()
        attributes = vars(one)
        if isinstance(one, fsdp):
            problem = _problem_of(one, save_on_rank)
            if problem is not None:
                raise refusal(where, problem)
            todo.extend(_others_inside(one, fsdp))
        else:
            if _MANAGED in attributes and any(map(is_flat_shard, one.parameters(recurse=False))):
                raise refusal(where, "a module inside of a FullyShardedDataParallel: its parameters are a shard")
            todo.extend(inner for inner in attributes.get("_modules", {}).values() if inner is not None)


def _others_inside(module: nn.Module, fsdp: type[nn.Module]) -> list[nn.Module]:
    """Return the FSDP1 modules inside of one: each has settings of its own."""
    return [one for one in module.modules() if one is not module and isinstance(one, fsdp)]


def _problem_of(module: Any, save_on_rank: int | None) -> str | None:
    kind = getattr(getattr(module, "_state_dict_type", None), "name", _FULL)
    if kind != _FULL:
        return f"a FullyShardedDataParallel whose state_dict_type is {kind}"
    is_on_first = getattr(getattr(module, "_state_dict_config", None), "rank0_only", False)
    if is_on_first and save_on_rank not in (None, 0):
        return f"a FullyShardedDataParallel with rank0_only=True: rank {save_on_rank}, which saves, gets no state"
    return None
