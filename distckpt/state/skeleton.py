"""A module's shape without its data, to try a state on.

Owns the dry run: whether ``load_state_dict`` would accept a state, asked of a twin on the meta device, so that the
live module is not touched and no memory is spent. Modules that load in a way of their own (hooks, overridden methods)
are not tried: what their code does to a twin, and to what it shares with the live one, nobody knows. Layer L2.
"""

import copy
from typing import Any

import torch
from torch import nn

from distckpt.quiet import quiet

__all__ = ["NotCopyable", "try_on_skeleton"]

_METHODS = ("load_state_dict", "_load_from_state_dict", "set_extra_state")
_HOOKS = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


class NotCopyable(Exception):  # noqa: N818 - not an error: the caller takes another way
    """The module loads in a way of its own, or cannot be copied: no dry run is possible."""


def try_on_skeleton(module: nn.Module, state: Any, options: dict[str, Any]) -> None:
    """Load `state` into a twin of `module` on the meta device.

    Args:
        module: the live one; it is not changed.
        state: a state dict; it is not changed.
        options: keyword arguments of ``nn.Module.load_state_dict``.

    Raises:
        NotCopyable: no dry run is possible.
        Exception: whatever ``load_state_dict`` raises when the state does not fit.
    """
    if any(_loads_its_own_way(part) for part in module.modules()):
        raise NotCopyable
    try:
        skeleton = _twin_of(module, {}, {})
    except Exception as error:
        raise NotCopyable from error
    with quiet():  # "copying to meta is a no-op", and what the real load will say again
        skeleton.load_state_dict(_on_meta(state), **options)


def _loads_its_own_way(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule) or any(vars(module).get(name) for name in _HOOKS):
        return True
    # torch.nn's own overrides (BatchNorm's counter) work on the meta device and touch nothing else.
    owners = (_owner(type(module), name) for name in _METHODS)
    return any(owner.__module__.split(".")[:2] != ["torch", "nn"] for owner in owners)


def _owner(kind: type, name: str) -> type:
    return next(base for base in kind.__mro__ if name in vars(base))


def _twin_of(module: nn.Module, tensors: dict[int, torch.Tensor], done: dict[int, nn.Module]) -> nn.Module:
    if id(module) in done:
        return done[id(module)]
    twin: nn.Module = object.__new__(type(module))  # no __setstate__: DDP's would build a second reducer
    done[id(module)] = twin
    held = {
        key: copy.copy(value) if isinstance(value, list | dict | set) else value for key, value in vars(module).items()
    }
    held["_parameters"] = {key: _meta_parameter(value, tensors) for key, value in module._parameters.items()}  # noqa: SLF001
    held["_buffers"] = {key: _meta_tensor(value, tensors) for key, value in module._buffers.items()}  # noqa: SLF001
    held["_modules"] = {
        key: None if child is None else _twin_of(child, tensors, done)
        for key, child in module._modules.items()  # noqa: SLF001
    }
    vars(twin).update(held)
    return twin


def _meta_tensor(tensor: torch.Tensor | None, tensors: dict[int, torch.Tensor]) -> torch.Tensor | None:
    if tensor is None:
        return None
    if id(tensor) not in tensors:
        tensors[id(tensor)] = tensor.detach().to("meta")
    return tensors[id(tensor)]


def _meta_parameter(parameter: nn.Parameter | None, tensors: dict[int, torch.Tensor]) -> nn.Parameter | None:
    if parameter is None:
        return None
    if id(parameter) not in tensors:
        tensors[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    return tensors[id(parameter)]  # type: ignore[return-value]  # put there as a Parameter


def _on_meta(state: Any) -> Any:
    """Copy a state dict with its tensors on the meta device; ``_metadata`` comes along."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("meta")
    if isinstance(state, dict):
        twin = copy.copy(state)
        for key, value in state.items():
            twin[key] = _on_meta(value)
        return twin
    return state
