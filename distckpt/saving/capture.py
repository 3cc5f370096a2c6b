"""to_save -> state dicts.

Owns the capture: which objects give which state, on which rank. Must not know about files.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distckpt._unwrap import unwrap, unwrap_once
from distckpt._values import has_python_value, is_numpy_scalar
from distckpt.ptformat.sharded import needs_a_look, refusal, shard_of, whole
from distckpt.saving.optimizer_guard import has_step_hook
from distckpt.saving.whole_objects import refuse_sharded_object

__all__ = [
    "capture",
    "check_objects",
    "consolidate",
    "find_optimizer_storages",
    "find_replicas",
    "map_named",
    "map_tree",
    "needs_consolidation",
    "plain_state",
    "refuse_sharded",
    "refuse_unconsolidated",
    "whole_state",
]


_PLAIN = frozenset({torch.Tensor, str, int, float, bool, type(None)})


def map_tree(func: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `func` to the leaves of nested mappings and sequences; returns plain dicts and lists of the same shape.

    A mapping or sequence that has a ``state_dict`` of its own (``nn.ModuleDict``, ``nn.ModuleList``) is a leaf.
    """
    return map_named(lambda _, leaf: func(leaf), tree)


def map_named(func: Callable[[str, Any], Any], tree: Any, name: str = "") -> Any:
    """Apply `func` to the leaves of a tree as :func:`map_tree` does, with the name of each.

    Args:
        func: takes a leaf's name, e.g. ``nets[0]`` or ``pair.model``, and the leaf.
        tree: nested mappings and sequences.
        name: of the tree itself.
    """
    if hasattr(tree, "state_dict") or hasattr(tree, "load_state_dict"):
        return func(name, tree)
    if isinstance(tree, Mapping):
        return {key: map_named(func, item, f"{name}.{key}" if name else str(key)) for key, item in tree.items()}
    if isinstance(tree, Sequence) and not isinstance(tree, str | bytes):
        return [map_named(func, item, f"{name}[{index}]") for index, item in enumerate(tree)]
    return func(name, tree)


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


def capture(
    to_save: Mapping[str, Any], *, rank: int, save_on_rank: int, gathered: Mapping[int, Any] | None = None
) -> dict[str, Any]:
    """Call ``state_dict()`` on every object. All ranks.

    Whatever is collective about it has been done by :func:`consolidate`. Ranks that do not save hold ``{}`` for a
    ZeroRedundancyOptimizer.

    Args:
        to_save: mappings and lists of objects, nested at will.
        rank: this rank.
        save_on_rank: the rank that saves.
        gathered: what :func:`consolidate` returned; None where it was not called.

    Returns:
        The same tree with states in place of objects. Tensors are the live ones, not copies. NumPy scalars that Python
        has an equal of become that, since ``torch.load(weights_only=True)`` refuses them. Fully replicated DTensors
        become the plain tensors that they stand for.

    Raises:
        ShardedStateError: an object or its state is sharded.
    """
    known = {} if gathered is None else gathered

    def state_of(name: str, obj: Any) -> Any:
        if id(obj) in known:
            state = known[id(obj)]
        else:
            obj = unwrap(obj)
            if _is_sharded_optimizer(obj) and rank != save_on_rank:
                return {}
            refuse_sharded_object(name, obj, save_on_rank=save_on_rank)
            state = obj.state_dict()
        return plain_state(state, f"to_save[{name!r}]") if _holds_more_than_plain(state) else state

    captured: dict[str, Any] = map_named(state_of, dict(to_save))
    return captured


def refuse_sharded(to_load: Mapping[str, Any]) -> None:
    """Refuse objects that hold sharded tensors, before anything is loaded. Rank-local; issues no collectives.

    Args:
        to_load: mappings and lists of objects, nested at will.

    Raises:
        ShardedStateError: there is one.
    """
    map_named(lambda name, obj: refuse_sharded_object(name, unwrap(obj)), dict(to_load))


def consolidate(to_save: Mapping[str, Any], *, save_on_rank: int) -> dict[int, Any]:
    """Collective where an object's state is spread over the ranks. Gather it on the rank that saves.

    Apart from :func:`capture`, whose calls of users' code may fail on one rank while the others would wait here.

    Two kinds of objects are such: a ZeroRedundancyOptimizer, and one whose class has a method
    ``distckpt_consolidate(to)``, as :class:`~distckpt.RngState` has. It is called on every rank, in the same order,
    and may be collective. It returns the state to save, or None where the ``state_dict()`` that follows does. An object
    of anybody's that merely has a ``consolidate_state_dict`` is left alone: nobody knows what that one waits for.

    Returns:
        The states that were returned, by the identities of their objects, for :func:`capture`.
    """
    gathered: dict[int, Any] = {}

    def gather(obj: Any) -> None:
        if _is_sharded_optimizer(obj):
            obj.consolidate_state_dict(to=save_on_rank)
        elif hasattr(type(obj), "distckpt_consolidate"):  # of the class: a mock has every attribute
            state = obj.distckpt_consolidate(save_on_rank)
            if state is not None:
                gathered[id(obj)] = state

    map_tree(gather, dict(to_save))
    return gathered


def needs_consolidation(to_save: Mapping[str, Any]) -> bool:
    """Tell whether some object's state is spread over the ranks, so that :func:`consolidate` has something to do."""
    found: list[bool] = []
    map_tree(
        lambda obj: found.append(_is_sharded_optimizer(obj) or hasattr(type(obj), "distckpt_consolidate")),
        dict(to_save),
    )
    return any(found)


def refuse_unconsolidated(to_save: Mapping[str, Any], *, rank: int) -> None:
    """Refuse objects whose state one rank cannot capture alone. Rank-local; issues no collectives.

    These are what :func:`consolidate` gathers, unless the class says by ``distckpt_saves_alone = True`` that its
    ``state_dict()`` is worth saving without that; and modules in FullyShardedDataParallel.

    Args:
        to_save: mappings and lists of objects, nested at will.
        rank: this rank, for the error.

    Raises:
        ValueError: there is one; the message names it.
    """

    def look(name: str, obj: Any) -> None:
        kind = type(obj)
        is_gathered = hasattr(kind, "distckpt_consolidate") and not getattr(kind, "distckpt_saves_alone", False)
        if is_gathered or _is_sharded_optimizer(obj) or _has_fsdp(unwrap(obj)):
            msg = (
                f"rank {rank}: the state of to_save[{name!r}] ({kind.__name__}) is spread over the ranks, and a save "
                "for an exception is one rank's alone. Save without it on EXCEPTION_RAISED"
            )
            raise ValueError(msg)

    map_named(look, dict(to_save))


def _has_fsdp(obj: Any) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if fsdp is None or not isinstance(obj, nn.Module):
        return False
    return any(isinstance(module, fsdp.FullyShardedDataParallel) for module in obj.modules())


def find_replicas(to_save: Mapping[str, Any], *, world_size: int) -> frozenset[int]:
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


def find_optimizer_storages(to_save: Mapping[str, Any]) -> dict[int, str]:
    """Find the storages that nothing but an optimizer's step changes, and only where a hook can tell of it. Rank-local.

    Returns:
        torch's identities of the storages, with their devices' types.
    """
    found: dict[int, str] = {}

    def look(obj: Any) -> None:
        if not isinstance(obj, torch.optim.Optimizer) or _is_sharded_optimizer(obj) or not has_step_hook(obj):
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


def plain_state(state: Any, where: str = "the state") -> Any:
    """Replace NumPy scalars by Python's, and fully replicated DTensors by plain tensors.

    Args:
        state: of one object.
        where: what it is of, for messages.

    Returns:
        The state. Containers in which nothing is replaced are handed back as they are.

    Raises:
        ShardedStateError: it holds a tensor of which this rank has a part.
    """
    return _Plain(where).of(state, ())


def whole_state(state: Any, where: str) -> Any:
    """Replace fully replicated DTensors by plain tensors, as :func:`plain_state` does; NumPy scalars stay.

    Raises:
        ShardedStateError: the state holds a tensor of which this rank has a part.
    """
    return _Plain(where, are_scalars_replaced=False).of(state, ()) if _holds_more_than_plain(state) else state


class _Plain:
    """One walk over a state. A tensor that stands in it twice is replaced by one tensor."""

    def __init__(self, where: str, *, are_scalars_replaced: bool = True) -> None:
        self._where = where
        self._are_scalars_replaced = are_scalars_replaced
        self._wholes: dict[int, torch.Tensor] = {}
        self._done: dict[int, tuple[Any, Any]] = {}  # what a container is replaced by; it too, to keep its identity

    def of(self, state: Any, path: tuple[Any, ...]) -> Any:
        kind = type(state)
        if kind in _PLAIN:
            return state
        if needs_a_look(kind):
            return self._tensor(state, path)
        if is_numpy_scalar(state):
            return state.item() if self._are_scalars_replaced and has_python_value(state) else state
        if not isinstance(state, dict | list | tuple | set | frozenset):
            return state
        if id(state) not in self._done:
            self._done[id(state)] = state, state  # for one that contains itself
            self._done[id(state)] = state, self._container(state, path)
        return self._done[id(state)][1]

    def _container(self, state: Any, path: tuple[Any, ...]) -> Any:
        if type(state) in (dict, OrderedDict):
            return self._mapping(state, path)
        if isinstance(state, list | tuple):
            return self._sequence(state, path)
        base = next(kind for kind in (dict, set, frozenset) if isinstance(state, kind))  # a subclass's own may raise
        for key, item in dict.items(state) if base is dict else enumerate(base.__iter__(state)):
            self.of(item, (*path, key))  # looked into; the pickler replaces what is there
        return state

    def _sequence(self, state: Any, path: tuple[Any, ...]) -> Any:
        kind = type(state)
        olds = list((list if isinstance(state, list) else tuple).__iter__(state))  # a subclass's own may raise
        items = [self.of(item, (*path, number)) for number, item in enumerate(olds)]
        if all(new is old for new, old in zip(items, olds, strict=True)):
            return state
        if kind in (list, tuple):
            return kind(items)
        return kind._make(items) if hasattr(kind, "_make") else state  # a named tuple; else the pickler replaces it

    def _tensor(self, tensor: torch.Tensor, path: tuple[Any, ...]) -> torch.Tensor:
        problem = shard_of(tensor)
        if problem is not None:
            at = f", key {'.'.join(map(str, path))!r}," if path else ""
            raise refusal(f"{self._where}{at}", problem)
        if id(tensor) not in self._wholes:
            self._wholes[id(tensor)] = whole(tensor)
        return self._wholes[id(tensor)]

    def _mapping(self, state: Any, path: tuple[Any, ...]) -> Any:
        replaced = {self.of(key, path): self.of(item, (*path, key)) for key, item in state.items()}
        attributes = vars(state) if type(state) is OrderedDict else {}  # a module's `_metadata`
        others = self.of(attributes, path) if attributes else attributes
        pairs = zip(replaced.items(), state.items(), strict=False)
        is_same = len(replaced) == len(state) and all(new[0] is old[0] and new[1] is old[1] for new, old in pairs)
        if is_same and others is attributes:
            return state
        fresh = type(state)(replaced)
        if attributes:
            vars(fresh).update(others)
        return fresh


def _holds_more_than_plain(state: Any) -> bool:
    """Return True if a state may hold what is to be replaced or refused: a quick look, for all the states that do not.

    A module's ``_metadata`` is as long as the module; what stands in it is left to the pickler.
    """
    todo = [state]
    seen: set[int] = set()  # a container may stand in many places, or contain itself
    while todo:
        one = todo.pop()
        kind = type(one)
        if kind in _PLAIN or id(one) in seen:
            continue
        seen.add(id(one))
        if kind is dict or kind is OrderedDict:
            if not _PLAIN.issuperset(map(type, one)):
                return True
            todo += [item for item in one.values() if type(item) not in _PLAIN]
            if kind is OrderedDict:
                todo += [item for name, item in vars(one).items() if name != "_metadata"]
        elif kind is list or kind is tuple:
            todo += [item for item in one if type(item) not in _PLAIN]
        else:
            return True
    return False


def _is_sharded_optimizer(obj: Any) -> bool:
    # Not imported here: there is none before somebody else imported it.
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    return zero is not None and isinstance(obj, zero.ZeroRedundancyOptimizer)
