"""A module's shape without its data, to try a state on; and the proof that torch's own code alone would see the state.

Owns which modules and optimizers are *plain*: the methods of their classes as they are now, their own attributes, hooks
and tensors let no code but torch's look at a state that is loaded. For plain modules all that ``load_state_dict`` would
refuse is found out: keys and shapes on a twin on the meta device, and what only a live tensor can refuse by looking at
the tensor. Layer L2.

Source: ``Module.load_state_dict`` and ``Optimizer.load_state_dict`` of torch 2.9 to 2.13.
"""

import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torchs

from distckpt.errors import does_not_fit
from distckpt.quiet import quiet
from distckpt.state.report import LoadReport

__all__ = ["Unsure", "has_memory", "is_plain", "is_plain_optimizer", "tensors_of", "try_on_skeleton"]

_FILES = tuple(os.path.join(torch.__path__[0], name) for name in ("nn/", "optim/", "_compile.py", "_dynamo/eval_frame"))  # noqa: PTH118 - as Python keeps the names of files
_ACCESS = ("__setattr__", "__delattr__", "__getattribute__", "__getattr__")
_MODULE = ("load_state_dict", "_load_from_state_dict", "set_extra_state", "get_extra_state", *_ACCESS)
_MODULE_HOOKS = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_OPTIMIZER = ("load_state_dict", "__setstate__", "_process_value_according_to_param_policy", *_ACCESS)
_OPTIMIZER_HOOKS = ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")
_GLOBAL_HOOKS = tuple(f"_global_{kind}_registration_hooks" for kind in ("buffer", "module", "parameter"))
_KINDS = (torch.Tensor, nn.Parameter, nn.Buffer)
_COPIED = {getattr(torch, f"float{name}", None) for name in ("16", "32", "64", "8_e4m3fn", "8_e5m2", "8_e8m0fnu")} | {
    getattr(torch, name)
    for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "bfloat16", "cfloat", "cdouble")
}
"""Dtypes each of which can be copied to each."""
_MISMATCH = re.compile(r'size mismatch for (.+?): |While \w+ the parameter named "(.+?)",')
"""How torch's messages begin."""


class Unsure(Exception):  # noqa: N818 - not an error: the caller takes another way
    """The module is not plain, or is to be loaded from what is not."""


# -- the proof ---------------------------------------------------------------------------------------


def is_plain_optimizer(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if no code but torch's sees what is loaded into an optimizer."""
    return (
        _is_torchs_class(type(optimizer), _OPTIMIZER)
        and _is_torchs_class(torch.optim.Optimizer, _OPTIMIZER)  # of which one method is called by name
        and not any(vars(optimizer).get(name) for name in (*_OPTIMIZER, *_OPTIMIZER_HOOKS))
        and not any(hasattr(type(optimizer), name) for name in ("state", "param_groups"))
    )


def _is_plain_module(module: nn.Module) -> bool:
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


# -- the dry run -------------------------------------------------------------------------------------


def try_on_skeleton(module: nn.Module, state: Any, options: Mapping[str, Any]) -> LoadReport:
    """Find out whether a plain module would take a state. Touches nothing live, and takes no memory for the data.

    Args:
        module: the live one.
        state: a state dict.
        options: keyword arguments of ``nn.Module.load_state_dict``.

    Returns:
        What is missing and unexpected, if the load is not strict.

    Raises:
        Unsure: code other than torch's may see the state, or what torch makes of it cannot be known beforehand.
        DoesNotFit: ``load_state_dict`` refuses the state; a RuntimeError with its message.
        Exception: whatever else it raises.
    """
    if not _is_plain_module(module):
        raise Unsure
    lives = tensors_of(module)
    given = {key: state[key] for key in lives if key in state} if isinstance(state, Mapping) else {}
    tensors = {key: one for key, one in given.items() if torch.overrides.is_tensor_like(one)}  # type: ignore[no-untyped-call]  # torch ships it without types
    if not all(is_plain(one) and _is_apart(one, lives[key]) for key, one in tensors.items()):
        raise Unsure
    if not all(map(is_plain, lives.values())) or (
        options.get("assign") and any(map(torch.is_inference, tensors.values()))
    ):
        raise Unsure
    skeleton = _twin_of(module, {})
    lists: list[tuple[list[str], list[str], list[str]]] = []

    def note(*handed: Any) -> None:  # torch hands the lists that it goes on filling
        lists.append(handed[-3:])

    skeleton.register_load_state_dict_pre_hook(note)  # type: ignore[no-untyped-call]  # torch ships it without types
    refused: RuntimeError | None = None
    with quiet():  # what the real load will say again
        try:
            skeleton.load_state_dict(_on_meta(state, given), **options)
        except RuntimeError as error:
            refused = error
    missing, unexpected, errors = lists[0] if lists else ([], [], [])
    if refused is None and not options.get("assign"):
        errors = [
            f'While copying the parameter named "{key}", {why}'
            for key in tensors
            if (why := _refusal(lives[key], given[key]))
        ]
        refused = (
            RuntimeError("\n\t".join([f"Error(s) in loading state_dict for {type(module).__name__}:", *errors]))
            if errors
            else None
        )
    mismatched = [found.group(1) or found.group(2) for found in map(_MISMATCH.match, errors) if found]
    if refused is not None:
        raise does_not_fit(str(refused), ["RuntimeError"], missing, unexpected, mismatched) from refused
    return LoadReport(missing=tuple(missing), unexpected=tuple(unexpected), mismatched=tuple(mismatched))


def _twin_of(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """Return a twin on the meta device, of the class of torch's that `module` derives from: no other code is run."""
    if id(module) in done:
        return done[id(module)]
    kind = next(base for base in type(module).__mro__ if base.__module__.startswith("torch.nn.modules."))
    twin: nn.Module = object.__new__(type(type(module).__name__, (kind,), {}))
    done[id(module)] = twin
    twin.__dict__.update(vars(module))
    twin._parameters = {  # noqa: SLF001 - as load_state_dict does; here and below
        key: one if one is None else nn.Parameter(_meta(one), requires_grad=one.requires_grad)
        for key, one in module._parameters.items()  # noqa: SLF001
    }
    twin._buffers = {key: one if one is None else _meta(one) for key, one in module._buffers.items()}  # noqa: SLF001
    twin._modules = {key: one if one is None else _twin_of(one, done) for key, one in module._modules.items()}  # noqa: SLF001
    twin._load_state_dict_pre_hooks = OrderedDict()  # noqa: SLF001
    twin._non_persistent_buffers_set = set(module._non_persistent_buffers_set)  # noqa: SLF001
    if "_flat_weights" in vars(twin):  # an RNN's: what is assigned goes there too
        vars(twin)["_flat_weights"] = list(vars(twin)["_flat_weights"])
    return twin


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _on_meta(state: Any, given: Mapping[str, Any]) -> Any:
    """Copy a state, with those of its tensors on the meta device that are loaded."""
    if not isinstance(state, Mapping):
        return state
    twin: Any = OrderedDict(state)
    twin.update({key: _meta(one) if isinstance(one, torch.Tensor) else one for key, one in given.items()})
    metadata = getattr(state, "_metadata", None)
    if isinstance(metadata, Mapping):  # torch writes into it
        twin._metadata = {key: dict(one) if isinstance(one, dict) else one for key, one in metadata.items()}  # noqa: SLF001
    return twin


# -- what only a live tensor can refuse --------------------------------------------------------------


def _refusal(live: torch.Tensor, given: torch.Tensor) -> str | None:
    """Return why ``live.copy_(given)`` would fail, their shapes being the same; None if it would not."""
    if live.is_inference() and not torch.is_inference_mode_enabled():
        return "which is an inference tensor: load it inside torch.inference_mode(), or make it outside."
    if not has_memory(live) or not has_memory(given):
        return "whose memory was given back, here or in the checkpoint: its storage is smaller than the tensor."
    if live.device.type in ("cpu", "cuda") and torch._debug_has_internal_overlap(live) == 1:  # noqa: SLF001 - no public way
        return "of which several elements lie in one place of memory, as after expand(): clone() it first."
    if not {live.dtype, given.dtype} <= _COPIED:
        try:
            live.detach().clone().copy_(given)
        except RuntimeError as error:
            return f"an exception occurred : {error.args}."
    return None


def _is_apart(given: torch.Tensor, live: torch.Tensor) -> bool:
    """Return False where both lie in one storage, but not in the same place of it."""
    if live.device.type == "meta" or given.device != live.device:
        return True
    same = live.untyped_storage()._cdata == given.untyped_storage()._cdata  # noqa: SLF001 - torch's identity of a storage
    return not same or (live.data_ptr(), live.shape, live.stride()) == (given.data_ptr(), given.shape, given.stride())


def has_memory(tensor: torch.Tensor) -> bool:
    """Return False for a strided tensor whose storage has been given back or made smaller; reading it may crash."""
    if tensor.device.type not in ("cpu", "cuda") or not tensor.numel():
        return True
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = (int(tensor.storage_offset()) + last + 1) * tensor.element_size()
    return tensor.untyped_storage().nbytes() >= end
