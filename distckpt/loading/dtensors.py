"""Find live DTensors, and make DTensors like them from a file's values. Rank-local; issues no collectives."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from distckpt.loading.plain_objects import get_tensors, is_plain_tensor
from distckpt.ptformat.shard_geometry import Ranges, local_ranges
from distckpt.ptformat.sharded import (
    describe_disorder,
    describe_shard,
    is_dtensor,
    is_flat_shard,
    mesh_ranks,
    none_sharded,
    sharded_error,
)
from distckpt.saving.sharded_objects import (
    MANAGED,
    free_gathered_parameters,
    is_fsdp2,
    may_be_sharded_module,
    refuse_fsdp1,
    refuse_own_storage,
)

Found = tuple[tuple[Any, ...], torch.Tensor, torch.Tensor]
"""The keys that lead to a plain tensor of a state, the live DTensor that takes its values, and the tensor."""


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a DTensor's local shard, which is its memory; any other tensor itself."""
    local: torch.Tensor = tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]  # noqa: SLF001 - to_local() returns a new tensor
    return local


def get_part(tensor: torch.Tensor) -> tuple[Ranges, ...] | None:
    """Return the ranges of indices of the whole tensor that this rank holds, for each dimension; None if it holds all.

    Raises:
        ValueError: the placements do not say which part this rank holds.
    """
    if not is_dtensor(tensor):
        return None
    it: Any = tensor
    coordinate = it.device_mesh.get_coordinate()
    if coordinate is None:
        return tuple([] for _ in tensor.shape)
    _, mesh_shape = mesh_ranks(it.device_mesh)
    return local_ranges(tensor.shape, mesh_shape, coordinate, it.placements, local_tensor(tensor).shape)


def empty_like(live: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a DTensor with the mesh and placements of another, in new memory that is not initialized."""
    it: Any = live
    device = it.device_mesh.device_type if local_tensor(live).is_meta else local_tensor(live).device
    return torch.empty_like(live.detach(), dtype=dtype, device=device)


@torch.no_grad()
def slice_like(live: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Return a DTensor like another, with the values of this rank's part of a plain tensor."""
    it: Any = live
    if not is_plain_tensor(local_tensor(live)):  # a wrapper subclass of a replicated DTensor
        local = given.detach().to(local_tensor(live).device)
        whole: torch.Tensor = type(it).from_local(local, it.device_mesh, it.placements, run_check=False)
        return whole
    made = empty_like(live, given.dtype)
    if local_tensor(made).numel():
        part = given.detach()
        for dim, ranges in enumerate(get_part(live) or ()):
            part = torch.cat([part.narrow(dim, begin, end - begin) for begin, end in ranges], dim)
        local_tensor(made).copy_(part)
    return made


def find_dtensors(obj: Any, state: Any) -> Iterator[Found]:
    """Find the plain tensors of a state that torch's ``load_state_dict`` takes only as DTensors.

    Args:
        obj: a module or optimizer, without wrappers; nothing is found for other objects.
        state: the state to load into it.
    """
    if isinstance(obj, nn.Module) and isinstance(state, Mapping) and has_torch_load(obj):
        for key, live in get_tensors(obj).items():
            if _is_dtensor_of(live, state.get(key)):
                yield (key,), live, state[key]
    elif isinstance(obj, torch.optim.Optimizer) and isinstance(state, Mapping):
        yield from _find_in_optimizer(obj, state)


def _find_in_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> Iterator[Found]:
    states = state.get("state")
    for ours, theirs in zip(optimizer.param_groups, state.get("param_groups", ()), strict=False):
        if none_sharded(ours["params"]) or not isinstance(states, Mapping):
            continue
        for number, parameter in zip(theirs["params"], ours["params"], strict=False):
            given: Any = states.get(number)
            held = optimizer.state.get(parameter, {})
            for key in given if isinstance(given, Mapping) else ():
                # A step is a number, whatever the parameter's shape.
                is_held = key == "step" or _is_dtensor_of(held.get(key), given[key])
                live = held.get(key) if is_held else parameter
                if _is_dtensor_of(live, given[key]):
                    yield ("state", number, key), live, given[key]


def make_like_own(own: Any, state: Any) -> Any:
    """Return a state with DTensors in place of plain tensors, where an object's own state has DTensors of that shape.

    Args:
        own: the object's state, a tree of mappings and lists.
        state: the state to load into it. Returned as it is if the object has no DTensors.
    """
    return _make_like_own(own, state, {}) if _holds_dtensor(own) else state


def _make_like_own(own: Any, state: Any, done: dict[tuple[int, int], Any]) -> Any:
    if _is_dtensor_of(own, state):
        return slice_like(own, state)
    pairs: list[tuple[Any, Any]] = []
    if isinstance(own, dict) and isinstance(state, dict):
        pairs = [(key, own[key]) for key in own.keys() & state.keys()]
    elif isinstance(own, list) and isinstance(state, list):
        pairs = list(enumerate(own[: len(state)]))
    if pairs and (id(own), id(state)) not in done:
        twin = done[id(own), id(state)] = copy.copy(state)  # a container may contain itself
        for key, item in pairs:
            twin[key] = _make_like_own(item, state[key], done)
    return done.get((id(own), id(state)), state)


def _holds_dtensor(state: Any) -> bool:
    todo, seen = [state], set[int]()
    while todo:
        one = todo.pop()
        if isinstance(one, torch.Tensor) and is_dtensor(one):
            return True
        if isinstance(one, dict | list) and id(one) not in seen:
            seen.add(id(one))
            todo += one.values() if isinstance(one, dict) else one
    return False


def _is_dtensor_of(live: Any, given: Any) -> bool:
    """Return True for a DTensor and a plain tensor of its shape."""
    if not isinstance(live, torch.Tensor) or not is_dtensor(live) or not isinstance(given, torch.Tensor):
        return False
    return not is_dtensor(given) and live.shape == given.shape


# -- what is refused ---------------------------------------------------------------------------------


def refuse_unloadable(name: str, obj: Any) -> None:
    """Refuse an object if this rank cannot load its part of a whole state into it.

    Args:
        name: the object's name, for messages.
        obj: the object, without wrappers.

    Raises:
        ShardedStateError: a tensor of the object is sharded in another way than a DTensor is, or is a partial sum.
    """
    where = f"to_load[{name!r}]"
    refuse_own_storage(where, obj)
    if isinstance(obj, torch.optim.Optimizer):
        _refuse_optimizer(where, obj)
    elif isinstance(obj, nn.Module) and may_be_sharded_module(obj):
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            refuse_fsdp1(where, obj, None)
        if has_torch_load(obj):
            _refuse_module(where, obj)


def has_torch_load(module: nn.Module) -> bool:
    """Return False for a module that overrides ``load_state_dict``: it may shard a whole state itself."""
    return type(module).load_state_dict is nn.Module.load_state_dict and "load_state_dict" not in vars(module)


def _refuse_optimizer(where: str, optimizer: torch.optim.Optimizer) -> None:
    # getattr: ignite's own tests use a stand-in for an optimizer.
    for group_index, group in enumerate(getattr(optimizer, "param_groups", ())):
        if none_sharded(group["params"]):
            continue
        for index, parameter in enumerate(group["params"]):
            if (problem := _describe_problem(parameter)) is not None:
                raise sharded_error(f"{where}, an optimizer: its parameter {index} of group {group_index}", problem)
    for kept in getattr(optimizer, "state", {}).values():
        for key, one in kept.items() if isinstance(kept, dict) else ():
            if isinstance(one, torch.Tensor) and (problem := _describe_problem(one)) is not None:
                raise sharded_error(f"{where}, an optimizer: its {key!r} of a parameter", problem)


def _refuse_module(where: str, module: nn.Module) -> None:
    free_gathered_parameters(module)
    for key, tensor in (*module.named_parameters(remove_duplicate=False), *module.named_buffers()):
        if not is_flat_shard(tensor) and (problem := _describe_problem(tensor)) is not None:  # FSDP1 gathers, scatters
            raise sharded_error(f"{where}, key {key!r},", problem)
    todo = [module]
    while todo:
        one = todo.pop()
        if is_fsdp2(one):  # it has freed the gathered parameters
            continue
        parameters = list(one.parameters(recurse=False))
        if MANAGED in vars(one) and parameters and none_sharded(parameters):
            problem = "a module inside of one that fully_shard manages, which has gathered its parameters for a while"
            raise sharded_error(where, problem)
        todo.extend(one.children())


def _describe_problem(tensor: torch.Tensor) -> str | None:
    """Return a phrase that says why values cannot be loaded into a live tensor; None if they can."""
    if not is_dtensor(tensor) or not is_plain_tensor(local_tensor(tensor)):
        return describe_shard(tensor)
    try:
        get_part(tensor)
    except ValueError as error:
        return f"a DTensor whose {error}"
    return describe_disorder(tensor)
