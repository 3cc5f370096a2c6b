"""Find and refuse objects of which each rank keeps a shard in plain tensors.

FSDP1's parameters and states are plain tensors that hold a shard, which only the module shows. Tensors that are sharded
by their type are found by :mod:`distckpt.ptformat.sharded`.
"""

import sys
from typing import Any

import torch
from torch import nn

from distckpt.errors import ShardedStateError
from distckpt.ptformat.sharded import describe_shard, has_peers, is_dtensor, is_flat_shard, none_sharded, sharded_error

MANAGED = "_is_fsdp_managed_module"
_FULL = "FULL_STATE_DICT"
_PACKAGES = {
    "deepspeed.runtime": "Use its own save_checkpoint() and load_checkpoint().",
    "megatron.core": "Use Megatron's own distributed checkpoints.",
    "fairscale.nn.data_parallel": "Save its full state, as an object with state_dict() and load_state_dict().",
}
"""Packages whose modules and optimizers keep shards of their own, and what to do instead."""
_PLAIN = frozenset({torch.Tensor, nn.Parameter, type(None)})


def refuse_sharded_object(where: str, obj: Any, save_on_rank: int) -> None:
    """Refuse to save an object if its state is sharded in another way than by DTensors. Rank-local.

    Args:
        where: names the object, for messages.
        obj: the object, without wrappers.
        save_on_rank: rank that will save its state.

    Raises:
        ShardedStateError: the object is sharded.
    """
    refuse_own_storage(where, obj)
    if isinstance(obj, torch.optim.Optimizer):
        _refuse_optimizer(where, obj)
    elif isinstance(obj, nn.Module) and torch.distributed.is_available() and torch.distributed.is_initialized():
        refuse_fsdp1(where, obj, save_on_rank)


def refuse_own_storage(where: str, obj: Any) -> None:
    """Refuse an object of a library that keeps its shards in files of its own, such as a ``DeepSpeedEngine``.

    Args:
        where: names the object, for messages.
        obj: the object, without wrappers.

    Raises:
        ShardedStateError: it is such an object.
    """
    for kind in type(obj).__mro__:
        for package, advice in _PACKAGES.items():
            if f"{kind.__module__}.".startswith(f"{package}.") and has_peers():
                msg = f"{where} is a {kind.__name__} of {package}, of whose state each rank holds a part. {advice}"
                raise ShardedStateError(msg)


def _refuse_optimizer(where: str, optimizer: torch.optim.Optimizer) -> None:
    # getattr: ignite's own tests use a stand-in for an optimizer.
    for group_index, group in enumerate(getattr(optimizer, "param_groups", ())):
        if none_sharded(group["params"]):
            continue
        for index, parameter in enumerate(group["params"]):
            if is_dtensor(parameter):  # its states are saved as what they stand for
                continue
            if (problem := describe_shard(parameter)) is not None:
                raise sharded_error(f"{where}, an optimizer: its parameter {index} of group {group_index}", problem)


def may_be_sharded_module(module: nn.Module) -> bool:
    """Return False if all tensors of a module are of torch's plain types, and FSDP manages no part of it."""
    todo = [module]
    while todo:  # over the modules' own dicts: ten times faster than modules() and parameters()
        attributes = vars(todo.pop())
        tensors = (*attributes.get("_parameters", {}).values(), *attributes.get("_buffers", {}).values())
        if MANAGED in attributes or not _PLAIN.issuperset(map(type, tensors)):
            return True
        todo.extend(inner for inner in attributes.get("_modules", {}).values() if inner is not None)
    return False


def free_gathered_parameters(module: nn.Module) -> None:
    """Make FSDP2's modules hold their shards, as torch's ``state_dict`` does. Rank-local."""
    for child in filter(is_fsdp2, module.modules()):
        it: Any = child
        it.reshard()


def is_fsdp2(module: nn.Module) -> bool:
    """Return True if ``fully_shard`` manages the module itself."""
    fsdp2 = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return fsdp2 is not None and isinstance(module, fsdp2)


def refuse_fsdp1(where: str, module: nn.Module, save_on_rank: int | None) -> None:
    """Refuse what FSDP1 shards, unless its module gathers the state.

    Args:
        where: names the object, for messages.
        module: an unwrapped module; FSDP1 may manage parts of it.
        save_on_rank: rank that will save its state; None if a state is to be loaded into it.

    Raises:
        ShardedStateError: the object is sharded.
    """
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
            if MANAGED in attributes and any(map(is_flat_shard, one.parameters(recurse=False))):
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
