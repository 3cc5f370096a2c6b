"""A module's shape without its data, to try a state on.

Owns the dry run: whether ``load_state_dict`` would accept a state, asked of a copy on the meta device, so that
the live module is not touched and no memory is spent. It runs the module's own code, hooks included, and so
refuses exactly what the real load would refuse. Layer L2.
"""

import copy
import warnings
from typing import Any

import torch
from torch import nn

__all__ = ["NotCopyable", "try_on_skeleton"]


class NotCopyable(Exception):  # noqa: N818 - not an error: the caller takes another way
    """The module cannot be copied (a ScriptModule, for one): no dry run is possible."""


def try_on_skeleton(module: nn.Module, state: Any, options: dict[str, Any]) -> None:
    """Load `state` into a copy of `module` on the meta device.

    Args:
        module: the live one; it is not changed.
        state: a state dict; it is not changed.
        options: keyword arguments of ``nn.Module.load_state_dict``.

    Raises:
        NotCopyable: no dry run is possible.
        Exception: whatever ``load_state_dict`` raises when the state does not fit.
    """
    tensors: dict[int, torch.Tensor] = {}
    try:
        skeleton = _skeleton_of(module, tensors, {})
    except Exception as error:
        raise NotCopyable from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "copying to meta is a no-op", and what the real load will say again
        skeleton.load_state_dict(_on_meta(state), **options)


def _skeleton_of(module: nn.Module, tensors: dict[int, torch.Tensor], done: dict[int, nn.Module]) -> nn.Module:
    if id(module) in done:
        return done[id(module)]
    twin = copy.copy(module)
    done[id(module)] = twin
    parts = vars(twin)
    if type(module).set_extra_state is not nn.Module.set_extra_state:
        # It may change what the attributes refer to; those have to be the twin's own.
        kept = ("_parameters", "_buffers", "_modules")
        parts.update(copy.deepcopy({key: value for key, value in parts.items() if key not in kept}))
    parts["_parameters"] = {key: _meta_parameter(value, tensors) for key, value in module._parameters.items()}  # noqa: SLF001
    parts["_buffers"] = {key: _meta_tensor(value, tensors) for key, value in module._buffers.items()}  # noqa: SLF001
    parts["_modules"] = {
        key: None if child is None else _skeleton_of(child, tensors, done)
        for key, child in module._modules.items()  # noqa: SLF001
    }
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
    if nn.parameter.is_lazy(parameter):
        raise NotCopyable
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
