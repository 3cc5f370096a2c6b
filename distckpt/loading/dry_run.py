"""A module's shape without its data, to try a state on.

Owns the dry run: whether a plain module's ``load_state_dict`` would accept a state. Keys and shapes are asked of a twin
on the meta device, unless they are simply equal; and what only a live tensor can refuse of the tensor itself. Nothing
live is touched, and no memory is spent.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from distckpt._messages import ignore_warnings
from distckpt.errors import state_mismatch_error
from distckpt.loading.plain_objects import has_memory, is_plain, is_plain_module, loads_by_name, tensors_of
from distckpt.loading.report import LoadReport

__all__ = ["Unsure", "try_on_skeleton"]

_COPIED = {getattr(torch, f"float{name}", None) for name in ("16", "32", "64", "8_e4m3fn", "8_e5m2", "8_e8m0fnu")} | {
    getattr(torch, name)
    for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "bfloat16", "cfloat", "cdouble")
}
"""Dtypes each of which can be copied to each."""
_MISMATCH = re.compile(r'size mismatch for (.+?): |While \w+ the parameter named "(.+?)",')
"""How torch's messages begin."""


class Unsure(Exception):  # noqa: N818 - not an error: the caller takes another way
    """The module is not plain, or is to be loaded from what is not."""


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
        StateMismatchError: ``load_state_dict`` refuses the state; a RuntimeError with its message.
        Exception: whatever else it raises.
    """
    if not is_plain_module(module):
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
    refused: RuntimeError | None = None
    missing: list[str] = []
    unexpected: list[str] = []
    errors: list[str] = []
    if not (_is_alike(state, tensors, lives, options) and loads_by_name(module)):
        refused, (missing, unexpected, errors) = _tried(module, _on_meta(state, given), options)
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
        raise state_mismatch_error(str(refused), ["RuntimeError"], missing, unexpected, mismatched) from refused
    return LoadReport(missing=tuple(missing), unexpected=tuple(unexpected), mismatched=tuple(mismatched))


def _is_alike(
    state: Any, tensors: Mapping[str, torch.Tensor], lives: Mapping[str, torch.Tensor], options: Mapping[str, Any]
) -> bool:
    """Return True if a state has the keys and shapes of what it is loaded into, and nothing that changes the rules."""
    if not (options.keys() <= {"strict", "assign"} and not options.get("assign")):
        return False
    if type(state) not in (dict, OrderedDict) or not state.keys() == tensors.keys() == lives.keys():
        return False
    metadata = getattr(state, "_metadata", {})
    if type(metadata) not in (dict, OrderedDict) or not all(type(one) is dict for one in metadata.values()):
        return False
    if any("assign_to_params_buffers" in one for one in metadata.values()):  # left by a load with assign=True
        return False
    return all(one.shape == lives[key].shape for key, one in tensors.items())


def _tried(
    module: nn.Module, state: Any, options: Mapping[str, Any]
) -> tuple[RuntimeError | None, tuple[list[str], list[str], list[str]]]:
    """Load a state on the meta device into a twin; return the error, and keys missing and unexpected, and errors."""
    skeleton = _twin_of(module, {})
    lists: list[tuple[list[str], list[str], list[str]]] = []

    def note(*handed: Any) -> None:  # torch hands the lists that it goes on filling
        lists.append(handed[-3:])

    skeleton.register_load_state_dict_pre_hook(note)  # type: ignore[no-untyped-call]  # torch ships it without types
    refused: RuntimeError | None = None
    with ignore_warnings():  # what the real load will say again
        try:
            skeleton.load_state_dict(state, **options)
        except RuntimeError as error:
            refused = error
    return refused, lists[0] if lists else ([], [], [])


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


def _refusal(live: torch.Tensor, given: torch.Tensor) -> str | None:
    """Return why ``live.copy_(given)`` would fail, their shapes being the same; None if it would not."""
    if live.is_inference() and not torch.is_inference_mode_enabled():
        return "which is an inference tensor: load it inside torch.inference_mode(), or make it outside."
    if given.device.type == "meta" and live.device.type != "meta":
        return "of which the checkpoint has no data: it is on the meta device there."
    if not has_memory(live) or not has_memory(given):
        return "whose memory was given back, here or in the checkpoint: its storage is smaller than the tensor."
    if (live.is_cpu or live.is_cuda) and torch._debug_has_internal_overlap(live) == 1:  # noqa: SLF001 - no public way
        return "of which several elements lie in one place of memory, as after expand(): clone() it first."
    if live.dtype not in _COPIED or given.dtype not in _COPIED:
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
