"""A module's state without ``detach()`` of its DTensors, which takes longer than all else that a save reads of them."""

from collections import OrderedDict
from typing import Any

from torch import nn

from distckpt.ptformat.sharded import is_dtensor

_OWN = ("state_dict", "_save_to_state_dict", "get_extra_state")
"""Methods by which a module can change what its ``state_dict()`` returns."""
_FSDP2 = "torch.distributed.fsdp._fully_shard."
"""Where FSDP2 defines its hook that runs before ``state_dict()``. It shards the parameters, and looks at no tensor."""


def attached_state(module: Any) -> Any:
    """Return what ``state_dict()`` would return, but with the module's own DTensors. Rank-local.

    Returns:
        The state; None if it has to be asked of ``state_dict()``: for an object without DTensors, and for a module with
        hooks or methods of its own, to which the tensors might make a difference.
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
