"""Pickle what :func:`~distckpt.saving.capture.capture` has returned, or reuse the pickle of a state of the same form.

A state with sharded tensors is compared as the objects have returned it. If its form is known, nothing is replaced,
pickled or described again. Otherwise the sharded tensors are found and replaced first.

:func:`attached_state` takes a module's state without calling ``detach()`` on its DTensors: that takes longer than all
else that a save reads of them.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn

from distckpt.ptformat.gc_pause import gc_paused
from distckpt.ptformat.pickler import PLAIN_PROTOCOL, PickledState, pickle_state
from distckpt.ptformat.sharded import is_dtensor
from distckpt.ptformat.state_form import Reader
from distckpt.saving.plain_state import LiveState, plain_state
from distckpt.saving.shard_forms import KnownShards, ShardForms
from distckpt.saving.shards import Shards
from distckpt.saving.staging import HostMemory

_OWN = ("state_dict", "_save_to_state_dict", "get_extra_state")
"""Methods by which a module can change what its ``state_dict()`` returns."""
_FSDP2 = "torch.distributed.fsdp._fully_shard."
"""Where FSDP2 defines its hook that runs before ``state_dict()``. It shards the parameters, and looks at no tensor."""


class CapturedState:
    """A state to pickle. Its sharded tensors are found by the constructor. Rank-local; issues no collectives.

    Args:
        tree: what ``torch.save`` takes, with a :class:`LiveState` for each object that may have sharded tensors.
        shards: takes the sharded tensors; None if there is no :class:`LiveState`.
        memory: knows the forms of earlier states.
        protocol: version of the pickle format.

    Raises:
        ShardedStateError: the state is sharded in a way that cannot be saved.
    """

    def __init__(self, tree: Any, *, shards: Shards | None, memory: HostMemory, protocol: int) -> None:
        self._shards = shards
        self._memory = memory
        self._protocol = protocol
        self._live = self._state = tree
        self._key: Any = None
        self._known: PickledState | None = None
        if shards is None:
            return
        names: list[tuple[str, bool]] = []
        self._live = _without_names(tree, names)
        # One rank of several may save alone, for an exception. The ranks compare the names.
        self._key = shards.rank, shards.world_size, names
        if protocol == PLAIN_PROTOCOL:
            with gc_paused():
                self._known = memory.live_forms.match(self._live, self._key)
        if self._known is None:
            self._state = _replace_shards(tree, shards)
        else:
            known: KnownShards = self._known.sharded
            shards.reuse(*known)

    def pickle(self) -> PickledState:
        """Pickle the state, unless that was done for an earlier one of the same form."""
        if self._known is not None:
            return self._known
        shards, protocol, state = self._shards, self._protocol, self._state
        if shards is not None and len(shards):
            pickled = pickle_state(state, protocol=protocol, num_shards=len(shards), shards=shards.by_id)
            make_reader = functools.partial(_make_reader, shards)
            return self._memory.live_forms.keep(self._live, pickled, make_reader, self._key)
        if protocol != PLAIN_PROTOCOL:
            return pickle_state(state, protocol=protocol)
        with gc_paused():
            forms = self._memory.plain_forms
            return forms.match(state) or forms.keep(state, pickle_state(state))


def _make_reader(shards: Shards, tensors: list[Any], numbers: list[int]) -> Reader:
    return ShardForms(tensors, numbers, shards).read


def _without_names(tree: Any, names: list[tuple[str, bool]]) -> Any:
    def take(one: LiveState) -> Any:
        names.append((one.where, one.is_attached))
        return one.state

    return _map_live(take, tree)


def _replace_shards(tree: Any, shards: Shards) -> Any:
    def replaced(one: LiveState) -> Any:
        state = detached(one.state) if one.is_attached else one.state
        return plain_state(state, one.where, shards=shards)

    return _map_live(replaced, tree)


def _map_live(func: Callable[[LiveState], Any], tree: Any) -> Any:
    """Return a tree with the results of `func` in place of each :class:`LiveState`."""
    if type(tree) is LiveState:
        return func(tree)
    if type(tree) is dict:
        return {key: _map_live(func, item) for key, item in tree.items()}
    return [_map_live(func, item) for item in tree] if type(tree) is list else tree


def attached_state(module: Any) -> Any:
    """Return what ``state_dict()`` would return, but with the module's own DTensors. Rank-local.

    Returns:
        The state; None if ``state_dict()`` has to be called: for an object without DTensors, and for a module whose own
        hooks or methods might treat such tensors differently.
    """
    first = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    if first is None or not is_dtensor(first):
        return None
    todo: list[Any] = [module]
    while todo:
        one = todo.pop()
        kind, attributes = type(one), vars(one)
        if any(getattr(kind, name) is not getattr(nn.Module, name) or name in attributes for name in _OWN):
            return None
        hooks = attributes["_state_dict_pre_hooks"].values()
        if attributes["_state_dict_hooks"] or not all(_module_of(hook).startswith(_FSDP2) for hook in hooks):
            return None
        todo += [inner for inner in attributes["_modules"].values() if inner is not None]
    state = module.state_dict(keep_vars=True)
    seen: set[int] = set()
    for name, tensor in state.items():
        if not is_dtensor(tensor) or id(tensor) in seen:  # of a tied parameter state_dict() has several tensors
            state[name] = tensor.detach()
        seen.add(id(tensor))
    return state


def _module_of(hook: Any) -> str:
    return str(getattr(hook, "__module__", None))


def detached(state: Any) -> Any:
    """Return what ``state_dict()`` would have returned in place of :func:`attached_state`."""
    found = OrderedDict((name, tensor.detach()) for name, tensor in state.items())
    vars(found).update(vars(state))
    return found
