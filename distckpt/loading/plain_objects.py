"""Which modules and optimizers are *plain*: only torch's code sees the state that they load.

No method, attribute, hook or tensor of a plain object lets other code read a state. So the outcome of its load is known
beforehand.

Source: ``Module.load_state_dict`` and ``Optimizer.load_state_dict`` of torch 2.9 to 2.13.
"""

from collections import OrderedDict
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

_TORCH_FILES = tuple(f"{torch.__path__[0]}/{name}" for name in ("nn/", "optim/", "_compile.py", "_dynamo/eval_frame"))
_ATTRIBUTE_ACCESS = ("__setattr__", "__delattr__", "__getattribute__", "__getattr__")
_FSDP2_FILES = (
    f"{torch.__path__[0]}/distributed/fsdp/_fully_shard/"  # its hooks free gathered parameters, and pad shards
)
_OWN_RULES = ("_load_from_state_dict", "set_extra_state")
_MODULE_METHODS = ("load_state_dict", "get_extra_state", *_OWN_RULES, *_ATTRIBUTE_ACCESS)
_MODULE_HOOKS = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_OPTIMIZER_METHODS = ("load_state_dict", "__setstate__", "_process_value_according_to_param_policy", *_ATTRIBUTE_ACCESS)
_OPTIMIZER_HOOKS = ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")
_GLOBAL_HOOKS = tuple(f"_global_{kind}_registration_hooks" for kind in ("buffer", "module", "parameter"))
TENSOR_TYPES = (torch.Tensor, nn.Parameter, nn.Buffer)


def is_plain_optimizer(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if only torch's code sees what the optimizer loads."""
    return (
        _has_torch_methods(type(optimizer), _OPTIMIZER_METHODS)
        and _has_torch_methods(torch.optim.Optimizer, _OPTIMIZER_METHODS)  # torch calls one of them by this class
        and not any(vars(optimizer).get(name) for name in (*_OPTIMIZER_METHODS, *_OPTIMIZER_HOOKS))
        and not any(hasattr(type(optimizer), name) for name in ("state", "param_groups"))
    )


def is_plain_module(module: nn.Module) -> bool:
    """Return True if only torch's code sees what the module and its children load."""
    if torch.__future__.get_swap_module_params_on_conversion() or any(map(vars(torch_module).get, _GLOBAL_HOOKS)):
        return False
    children = [child for _, child in _walk_modules(module)]
    kinds: set[type] = set(map(type, children))
    return all(
        _has_torch_methods(kind, _MODULE_METHODS) and not issubclass(kind, torch.jit.ScriptModule) for kind in kinds
    ) and all(
        not any(vars(child).get(name) for name in _MODULE_METHODS)
        and all(_is_fsdp2_hook(hook) for name in _MODULE_HOOKS for hook in (vars(child).get(name) or {}).values())
        and all(type(vars(child).get(name)) in (dict, OrderedDict) for name in ("_parameters", "_buffers", "_modules"))
        for child in children
    )


def _is_fsdp2_hook(hook: Any) -> bool:
    wrapper: Any = torch_module._WrappedHook  # noqa: SLF001 - torch wraps pre-hooks
    function = hook.hook if type(hook) is wrapper else hook
    return isinstance(function, FunctionType) and function.__code__.co_filename.startswith(_FSDP2_FILES)


def loads_by_name(module: nn.Module) -> bool:
    """Return True if a plain module accepts every state that has its keys and shapes.

    False if a torch class has rules of its own, or if a name may be taken for another module's key.
    """
    kinds: set[type] = set()
    for _, child in _walk_modules(module):
        kinds.add(type(child))
        names = (*child._parameters, *child._buffers, *child._modules)  # noqa: SLF001 - as load_state_dict does
        if "_extra_state" in names or any("." in name for name in names):
            return False
    base: Any = nn.Module
    return all(getattr(kind, name) is getattr(base, name) for kind in kinds for name in _OWN_RULES)


def _has_torch_methods(kind: type, names: tuple[str, ...]) -> bool:
    """Return True if the methods of these names are torch's, including those that ``super()`` reaches."""
    methods = ((name, vars(base)[name]) for base in kind.__mro__ for name in names if name in vars(base))
    return all(method is getattr(object, name, None) or _is_torch_code(method) for name, method in methods)


def _is_torch_code(function: Any) -> bool:
    """Return True if the function's code is torch's, and the code of all functions that it wraps.

    Names do not count: ``functools.wraps`` copies them.
    """
    function = function.__func__ if isinstance(function, staticmethod) else function
    if not isinstance(function, FunctionType) or not function.__code__.co_filename.startswith(_TORCH_FILES):
        return False
    contents = [cell.cell_contents for cell in function.__closure__ or ()]
    return all(_is_torch_code(value) for value in contents if callable(value) and not isinstance(value, type))


def is_plain_tensor(tensor: Any) -> bool:
    """Return True for a dense tensor of a torch class, without a ``copy_`` of its own."""
    return (
        type(tensor) in TENSOR_TYPES
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_nested or "copy_" in vars(tensor))
    )


def _walk_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the prefix and the module, for a module and its children in the order of ``load_state_dict``."""
    yield prefix, module
    for name, child in module._modules.items():  # noqa: SLF001 - as load_state_dict does
        if child is not None:
            yield from _walk_modules(child, f"{prefix}{name}.")


def get_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors that a module's state is loaded into, by torch's names."""
    tensors = {}
    for prefix, child in _walk_modules(module):
        transient = child._non_persistent_buffers_set  # noqa: SLF001 - as load_state_dict does; below too
        buffers = {name: buffer for name, buffer in child._buffers.items() if name not in transient}  # noqa: SLF001
        for name, tensor in (*child._parameters.items(), *buffers.items()):  # noqa: SLF001
            if tensor is not None:
                tensors[prefix + name] = tensor
    return tensors


def has_memory(tensor: torch.Tensor) -> bool:
    """Return False for a strided tensor whose storage was freed or shrunk; reading it may crash."""
    num = tensor.numel()
    if not (tensor.is_cpu or tensor.is_cuda) or not num:
        return True
    last = num - 1
    if not tensor.is_contiguous():
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = (int(tensor.storage_offset()) + last + 1) * tensor.element_size()
    return tensor.untyped_storage().nbytes() >= end
