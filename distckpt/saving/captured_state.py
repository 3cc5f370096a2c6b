"""Pickle what :func:`~distckpt.saving.capture.capture` has returned: anew, or as a state of the same form before it.

A state with sharded tensors is compared as the objects have returned it. If its form is known, nothing is replaced,
pickled or described again. Otherwise the sharded tensors are found and replaced first.
"""

import functools
from collections.abc import Callable
from typing import Any

from distckpt.ptformat.gc_pause import gc_paused
from distckpt.ptformat.pickler import PLAIN_PROTOCOL, PickledState, pickle_state
from distckpt.saving.module_state import detached
from distckpt.saving.plain_state import LiveState, plain_state
from distckpt.saving.shard_forms import KnownShards, ShardForms
from distckpt.saving.shards import Shards
from distckpt.saving.staging import HostMemory


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
            shards.reuse(known.sources, known.tensors, known.rows)

    def pickle(self) -> PickledState:
        """Pickle the state, unless that was done for an earlier one of the same form."""
        if self._known is not None:
            return self._known
        shards, protocol, state = self._shards, self._protocol, self._state
        if shards is not None and len(shards):
            pickled = pickle_state(state, protocol=protocol, num_shards=len(shards), shards=shards.by_id)
            return self._memory.live_forms.keep(
                self._live, pickled, functools.partial(ShardForms, shards=shards), self._key
            )
        if protocol != PLAIN_PROTOCOL:
            return pickle_state(state, protocol=protocol)
        with gc_paused():
            forms = self._memory.plain_forms
            return forms.match(state) or forms.keep(state, pickle_state(state))


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
