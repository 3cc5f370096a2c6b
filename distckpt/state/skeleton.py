"""A module's shape without its data, to try a state on.

Owns the dry run: whether ``load_state_dict`` would accept a state, asked of a twin on the meta device, so that the
live module is not touched and no memory is spent. Modules that load in a way of their own (hooks, overridden methods)
are not tried: what their code does to a twin, and to what it shares with the live one, nobody knows. Layer L2.
"""

import copy
import re
from typing import Any

import torch
from torch import nn

from distckpt.errors import does_not_fit
from distckpt.quiet import quiet
from distckpt.state.report import LoadReport

__all__ = ["NotCopyable", "try_on_skeleton"]

_METHODS = ("load_state_dict", "_load_from_state_dict", "set_extra_state")
_MISMATCH = re.compile(r'size mismatch for (.+?): |While \w+ the parameter named "(.+?)",')
"""How torch's messages begin."""
_HOOKS = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


class NotCopyable(Exception):  # noqa: N818 - not an error: the caller takes another way
    """The module loads in a way of its own, or cannot be copied: no dry run is possible."""


def try_on_skeleton(module: nn.Module, state: Any, options: dict[str, Any]) -> LoadReport:
    """Load `state` into a twin of `module` on the meta device.

    Args:
        module: the live one; it is not changed.
        state: a state dict; it is not changed.
        options: keyword arguments of ``nn.Module.load_state_dict``.

    Returns:
        What is missing and unexpected, if the load is not strict.

    Raises:
        NotCopyable: no dry run is possible.
        DoesNotFit: ``load_state_dict`` refuses the state; a RuntimeError with its message.
        Exception: whatever else it raises.
    """
    if any(_loads_its_own_way(part) for part in module.modules()):
        raise NotCopyable
    try:
        skeleton = _twin_of(module, {}, {})
    except Exception as error:
        raise NotCopyable from error
    lists: list[tuple[list[str], list[str], list[str]]] = []

    def note(*given: Any) -> None:  # torch hands the lists that it goes on filling
        lists.append(given[-3:])

    skeleton.register_load_state_dict_pre_hook(note)  # type: ignore[no-untyped-call]  # torch ships it without types
    refused: RuntimeError | None = None
    with quiet():  # "copying to meta is a no-op", and what the real load will say again
        try:
            skeleton.load_state_dict(_on_meta(state), **options)
        except RuntimeError as error:
            refused = error
    missing, unexpected, errors = lists[0] if lists else ([], [], [])
    mismatched = [found.group(1) or found.group(2) for found in map(_MISMATCH.match, errors) if found]
    if refused is not None:
        raise does_not_fit(str(refused), ["RuntimeError"], missing, unexpected, mismatched) from refused
    return LoadReport(missing=tuple(missing), unexpected=tuple(unexpected), mismatched=tuple(mismatched))


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
