"""Capture: from live objects to a state of plain values, and what is known about its storages."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distckpt._unwrap import unwrap, unwrap_once
from distckpt.saving.captured_state import attached_state
from distckpt.saving.object_forms import CapturedObjects
from distckpt.saving.plain_state import LiveState, plain_state
from distckpt.saving.sharded_objects import refuse_sharded_object
from distckpt.saving.shards import local_of
from distckpt.saving.stage_state import StageState
from distckpt.saving.staging import has_step_hook


def map_tree(func: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `func` to the leaves of nested mappings and sequences; return dicts and lists of the same shape.

    A container that has a ``state_dict`` of its own (``nn.ModuleDict``, ``nn.ModuleList``) is a leaf.
    """
    return map_named(lambda _, leaf: func(leaf), tree)


def map_named(func: Callable[[str, Any], Any], tree: Any, name: str = "") -> Any:
    """Apply `func` to the name (``nets[0]``, ``pair.model``) and value of each leaf, as :func:`map_tree` does."""
    if hasattr(tree, "state_dict") or hasattr(tree, "load_state_dict"):
        return func(name, tree)
    if isinstance(tree, Mapping):
        return {key: map_named(func, item, f"{name}.{key}" if name else str(key)) for key, item in tree.items()}
    if isinstance(tree, Sequence) and not isinstance(tree, str | bytes):
        return [map_named(func, item, f"{name}[{index}]") for index, item in enumerate(tree)]
    return func(name, tree)


def _leaves(tree: Any) -> list[Any]:
    leaves: list[Any] = []
    map_tree(leaves.append, tree)
    return leaves


def check_objects(tree: Any, method: str) -> None:
    """Raise TypeError if an object of a tree has no method of that name."""
    for obj in _leaves(tree):
        if not hasattr(obj, method):
            raise TypeError(f"Object {type(obj)} should have `{method}` method")


def capture(
    to_save: Mapping[str, Any],
    *,
    rank: int,
    save_on_rank: int,
    gathered: Mapping[int, Any] | None = None,
    has_shards: bool = False,
    objects: CapturedObjects | None = None,
) -> dict[str, Any]:
    """Call ``state_dict()`` on every object. All ranks.

    Args:
        to_save: objects in nested mappings and lists.
        rank: this rank.
        save_on_rank: the coordinator. Other ranks get ``{}`` for a ZeroRedundancyOptimizer.
        gathered: what :func:`consolidate` returned; None if it was not called.
        has_shards: whether sharded tensors can be saved, see Returns; otherwise they are refused.
        objects: takes the modules and optimizers whose state is not gathered; None if they are not compared.

    Returns:
        The same tree with states in place of objects. Its tensors are the live ones. Replicated DTensors are replaced
        by plain tensors, NumPy scalars by Python's: ``torch.load(weights_only=True)`` refuses them. With `has_shards`
        nothing is replaced yet: there is a :class:`LiveState` for each object.

    Raises:
        ShardedStateError: an object or its state is sharded in a way that cannot be saved.
    """
    known = gathered or {}

    def replaced(where: str, state: Any) -> Any:
        return LiveState(where, state) if has_shards else plain_state(state, where)

    def state_of(name: str, obj: Any) -> Any:
        where = f"to_save[{name!r}]"
        if id(obj) in known:
            return replaced(where, known[id(obj)])
        obj = unwrap(obj)
        is_gathered = _is_sharded_optimizer(obj) or _has_consolidate(obj)
        if _is_sharded_optimizer(obj) and rank != save_on_rank:
            return {}
        refuse_sharded_object(where, obj, save_on_rank)
        attached = attached_state(obj) if has_shards else None
        state = obj.state_dict() if attached is None else attached
        if objects is not None and not is_gathered:
            objects.add(name, obj, state)
        return replaced(where, state) if attached is None else LiveState(where, attached, is_attached=True)

    captured: dict[str, Any] = map_named(state_of, dict(to_save))
    return captured


def consolidate(to_save: Mapping[str, Any], *, save_on_rank: int) -> dict[int, Any]:
    """Collective. Gather state that is sharded over the ranks on the coordinator.

    This is not part of :func:`capture`: there, user code may fail on one rank, and the other ranks would wait here. It
    handles ZeroRedundancyOptimizer, and classes with a method ``distckpt_consolidate(to)``, such as
    :class:`~distckpt.RngState`. That method may be collective: it is called on every rank, in the same order. It
    returns the state to save, or None if ``state_dict()`` returns that state afterwards.

    Returns:
        The returned states by the ids of their objects, for :func:`capture`.
    """
    gathered: dict[int, Any] = {}
    for obj in _leaves(dict(to_save)):
        if _is_sharded_optimizer(obj):
            obj.consolidate_state_dict(to=save_on_rank)
        elif _has_consolidate(obj):
            state = obj.distckpt_consolidate(save_on_rank)
            if state is not None:
                gathered[id(obj)] = state
    return gathered


def needs_consolidation(to_save: Mapping[str, Any]) -> bool:
    """Return True if :func:`consolidate` has something to do."""
    return any(_is_sharded_optimizer(obj) or _has_consolidate(obj) for obj in _leaves(dict(to_save)))


def refuse_unconsolidated(to_save: Mapping[str, Any], *, rank: int) -> None:
    """Raise ValueError for an object whose state one rank cannot capture alone. Rank-local; issues no collectives.

    These are FullyShardedDataParallel modules and what :func:`consolidate` gathers, unless the class sets
    ``distckpt_saves_alone = True``.
    """

    def check(name: str, obj: Any) -> None:
        kind = type(obj)
        is_gathered = _has_consolidate(obj) and not getattr(kind, "distckpt_saves_alone", False)
        if is_gathered or _is_sharded_optimizer(obj) or _has_fsdp(unwrap(obj)):
            raise ValueError(
                f"rank {rank}: the state of to_save[{name!r}] ({kind.__name__}) is sharded over the ranks, and a save "
                "for an exception runs on one rank alone. Save without it on EXCEPTION_RAISED"
            )

    map_named(check, dict(to_save))


def find_replicas(to_save: Mapping[str, Any], *, world_size: int) -> frozenset[int]:
    """Find the storages that are known to be bit-equal on all ranks. Rank-local; issues no collectives.

    These are the parameters of modules wrapped in DistributedDataParallel over all ranks, and their optimizers' state.
    Buffers may differ. With post-local SGD no storage is a replica: it averages parameters only now and then.

    Returns:
        torch's identities of the storages (``UntypedStorage._cdata``), valid while the objects live.
    """
    objects = _leaves(dict(to_save))
    parameters: set[torch.Tensor] = set()
    for module in filter(None, (_data_parallel(obj, world_size) for obj in objects)):
        ignored = getattr(module, "parameters_to_ignore", ())
        parameters.update(parameter for name, parameter in module.module.named_parameters() if name not in ignored)
    found = {_storage_id(parameter) for parameter in parameters}
    for optimizer in _plain_optimizers(objects):
        for parameter, kept in _tensors_of(optimizer):
            if parameter in parameters:
                found.update(map(_storage_id, kept))
    return frozenset(identity for identity in found if identity is not None)


def find_optimizer_storages(to_save: Mapping[str, Any]) -> dict[int, str]:
    """Find the storages that only an optimizer's step changes, if a hook can delay that step. Rank-local.

    For a DTensor this is the storage of this rank's shard: gathering parameters only reads it.

    Returns:
        torch's identities of the storages, with the types of their devices.
    """
    found: dict[int, str] = {}
    objects = _leaves(dict(to_save))
    objects = [one for obj in objects for one in (obj.wrapped if isinstance(obj, StageState) else [obj])]
    for optimizer in filter(has_step_hook, _plain_optimizers(objects)):
        for parameter, kept in _tensors_of(optimizer):
            for tensor in map(local_of, (parameter, *kept)):
                identity = _storage_id(tensor)
                if identity is not None:
                    found[identity] = tensor.device.type
    return found


def _plain_optimizers(objects: Sequence[Any]) -> list[torch.optim.Optimizer]:
    return [obj for obj in objects if isinstance(obj, torch.optim.Optimizer) and not _is_sharded_optimizer(obj)]


def _tensors_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Yield each parameter of an optimizer, and the tensors that the optimizer keeps for it."""
    states = optimizer.state
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            kept = states[parameter].values() if parameter in states else ()
            yield parameter, [one for one in kept if isinstance(one, torch.Tensor)]


def _storage_id(tensor: torch.Tensor) -> int | None:
    """Return torch's identity of a tensor's storage; None if the tensor does not fill it."""
    if tensor.layout is not torch.strided:
        return None
    storage = tensor.untyped_storage()
    return storage._cdata if storage.nbytes() == tensor.nbytes else None  # noqa: SLF001 - equal for all Python wrappers


def _data_parallel(obj: Any, world_size: int) -> Any:
    """Return the DistributedDataParallel that `obj` is or wraps, if it keeps replicas on all ranks; else None."""
    while not isinstance(obj, nn.parallel.DistributedDataParallel):
        inner = unwrap_once(obj)
        if inner is obj:
            return None
        obj = inner
    hooks = getattr(obj, "_comm_hooks", ())
    if any("localSGD" in getattr(hook, "__name__", "") for hook, _ in hooks):
        return None
    return obj if torch.distributed.get_world_size(obj.process_group) == world_size else None


def _has_consolidate(obj: Any) -> bool:
    return hasattr(type(obj), "distckpt_consolidate")  # of the class: a mock has every attribute


def _is_sharded_optimizer(obj: Any) -> bool:
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")  # not imported: then there is none
    return zero is not None and isinstance(obj, zero.ZeroRedundancyOptimizer)


def _has_fsdp(obj: Any) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if fsdp is None or not isinstance(obj, nn.Module):
        return False
    return any(isinstance(module, fsdp.FullyShardedDataParallel) for module in obj.modules())
