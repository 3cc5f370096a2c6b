"""The proof that torch's own code alone would see what an object is loaded.

Owns which modules and optimizers are *plain*: the methods of their classes as they are now, their own attributes, hooks
and tensors let no other code look at a state.

Source: ``Module.load_state_dict`` and ``Optimizer.load_state_dict`` of torch 2.9 to 2.13.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torchs

__all__ = ["has_memory", "is_plain", "is_plain_module", "is_plain_optimizer", "loads_by_name", "tensors_of"]

_FILES = tuple(os.path.join(torch.__path__[0], name) for name in ("nn/", "optim/", "_compile.py", "_dynamo/eval_frame"))  # noqa: PTH118 - as Python keeps the names of files
_ACCESS = ("__setattr__", "__delattr__", "__getattribute__", "__getattr__")
_MODULE = ("load_state_dict", "_load_from_state_dict", "set_extra_state", "get_extra_state", *_ACCESS)
_BY_NAME = ("_load_from_state_dict", "set_extra_state")
_EXTRA_STATE = "_extra_state"
"""The name that torch keeps for what ``get_extra_state`` returns."""
_MODULE_HOOKS = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_OPTIMIZER = ("load_state_dict", "__setstate__", "_process_value_according_to_param_policy", *_ACCESS)
_OPTIMIZER_HOOKS = ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")
_GLOBAL_HOOKS = tuple(f"_global_{kind}_registration_hooks" for kind in ("buffer", "module", "parameter"))
_KINDS = (torch.Tensor, nn.Parameter, nn.Buffer)


def is_plain_optimizer(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if no code but torch's sees what is loaded into an optimizer."""
    return (
        _is_torchs_class(type(optimizer), _OPTIMIZER)
        and _is_torchs_class(torch.optim.Optimizer, _OPTIMIZER)  # of which one method is called by name
        and not any(vars(optimizer).get(name) for name in (*_OPTIMIZER, *_OPTIMIZER_HOOKS))
        and not any(hasattr(type(optimizer), name) for name in ("state", "param_groups"))
    )


def is_plain_module(module: nn.Module) -> bool:
    """Return True if no code but torch's sees what is loaded into a module or those below it."""
    if torch.__future__.get_swap_module_params_on_conversion() or any(map(vars(torchs).get, _GLOBAL_HOOKS)):
        return False
    kinds: set[type] = {type(part) for _, part in _parts(module)}
    return all(
        _is_torchs_class(kind, _MODULE) and not issubclass(kind, torch.jit.ScriptModule) for kind in kinds
    ) and all(
        not any(vars(part).get(name) for name in (*_MODULE, *_MODULE_HOOKS))
        and all(type(vars(part).get(name)) in (dict, OrderedDict) for name in ("_parameters", "_buffers", "_modules"))
        for _, part in _parts(module)
    )


def loads_by_name(module: nn.Module) -> bool:
    """Return True if a plain module takes every state that has its own keys and shapes.

    False where a class of torch's has rules of its own, and where names would make torch take a key for another's.
    """
    kinds: set[type] = set()
    for _, part in _parts(module):
        kinds.add(type(part))
        names = (*part._parameters, *part._buffers, *part._modules)  # noqa: SLF001 - as load_state_dict does
        if _EXTRA_STATE in names or any("." in name for name in names):
            return False
    common: Any = nn.Module
    return all(getattr(kind, name) is getattr(common, name) for kind in kinds for name in _BY_NAME)


def _is_torchs_class(kind: type, names: tuple[str, ...]) -> bool:
    """Return True if methods of these names are torch's, those that ``super()`` reaches too."""
    found = ((name, vars(base)[name]) for base in kind.__mro__ for name in names if name in vars(base))
    return all(one is getattr(object, name, None) or _is_torchs(one) for name, one in found)


def _is_torchs(function: Any) -> bool:
    """Return True if a function's code is torch's, and that of all that it wraps.

    Names do not count: ``functools.wraps`` gives a wrapper those of what it wraps.
    """
    function = function.__func__ if isinstance(function, staticmethod) else function
    if not isinstance(function, FunctionType) or not function.__code__.co_filename.startswith(_FILES):
        return False
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    return all(_is_torchs(one) for one in held if callable(one) and not isinstance(one, type))


def is_plain(tensor: Any) -> bool:
    """Return True for a dense tensor of torch's own class on a CPU or GPU, or of torch's on another device."""
    return (
        type(tensor) in _KINDS
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_nested or "copy_" in vars(tensor))
    )


def _parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield a module and those below it as ``load_state_dict`` goes through them, each with its prefix."""
    yield prefix, module
    for name, child in module._modules.items():  # noqa: SLF001 - as load_state_dict does; here and below
        if child is not None:
            yield from _parts(child, f"{prefix}{name}.")


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return what a module's state is loaded into, by torch's rules of names."""
    found = {}
    for prefix, part in _parts(module):
        kept = {key: item for key, item in part._buffers.items() if key not in part._non_persistent_buffers_set}  # noqa: SLF001
        for name, live in (*part._parameters.items(), *kept.items()):  # noqa: SLF001
            if live is not None:
                found[prefix + name] = live
    return found


def has_memory(tensor: torch.Tensor) -> bool:
    """Return False for a strided tensor whose storage has been given back or made smaller; reading it may crash."""
    num = tensor.numel()
    if not (tensor.is_cpu or tensor.is_cuda) or not num:
        return True
    last = num - 1
    if not tensor.is_contiguous():
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = (int(tensor.storage_offset()) + last + 1) * tensor.element_size()
    return tensor.untyped_storage().nbytes() >= end
