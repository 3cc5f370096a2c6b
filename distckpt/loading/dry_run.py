"""Find out whether a plain module or optimizer would accept a state, without touching it.

If keys or shapes differ, a twin of the module on the meta device loads the state, which needs no memory for data. Then
each pair of tensors is checked for reasons why a copy would fail.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distckpt._messages import ignore_warnings
from distckpt.errors import state_mismatch_error
from distckpt.loading.dtensors import local_tensor
from distckpt.loading.plain_objects import get_tensors, has_memory, is_plain_module, is_plain_tensor, loads_by_name
from distckpt.loading.report import LoadReport
from distckpt.saving.sharded_objects import free_gathered_parameters

_NAMES = "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64 cfloat cdouble float8_e4m3fn float8_e5m2"
_COPYABLE = {getattr(torch, name, None) for name in f"{_NAMES} float8_e8m0fnu".split()}  # to each other
_MISMATCH = re.compile(r'size mismatch for (.+?): |While \w+ the parameter named "(.+?)",')  # in torch's messages

# torch's error, and its lists of missing keys, unexpected keys and messages
_Outcome = tuple[RuntimeError | None, list[str], list[str], list[str]]


def try_load(module: nn.Module, state: Any, options: Mapping[str, Any], name: str = "") -> LoadReport | None:
    """Find out whether a plain module would accept a state. Changes no object, and allocates no memory for data.

    Args:
        module: the live module.
        state: a state dict.
        options: keyword arguments of ``nn.Module.load_state_dict``.
        name: the module's name, for the keys of the report.

    Returns:
        The keys that the load would pass over; None if the module or the state is not plain: nothing is known then.

    Raises:
        StateMismatchError: ``load_state_dict`` would refuse the state; a RuntimeError with its message.
        Exception: any other error of ``load_state_dict``.
    """
    if not is_plain_module(module):
        return None
    free_gathered_parameters(module)
    live = get_tensors(module)
    memory = {key: local_tensor(one) for key, one in live.items()}
    given = {key: state[key] for key in live if key in state} if isinstance(state, Mapping) else {}
    tensors = {key: one for key, one in given.items() if torch.overrides.is_tensor_like(one)}  # type: ignore[no-untyped-call]  # torch ships it without types
    if not all(map(is_plain_tensor, (*tensors.values(), *memory.values()))):
        return None
    is_assigned = bool(options.get("assign"))
    if any(_overlaps(one, memory[key]) or (is_assigned and one.is_inference()) for key, one in tensors.items()):
        return None
    outcome: _Outcome = (None, [], [], [])
    if not (_is_alike(state, tensors, live, options) and loads_by_name(module)):
        outcome = _load_twin(module, _on_meta(state, given), options)
    error, missing, unexpected, messages = outcome
    if error is None and not is_assigned:
        reasons = {key: _copy_refusal(memory[key], given[key]) for key in tensors}
        messages = [f'While copying the parameter named "{key}", {why}' for key, why in reasons.items() if why]
        if messages:
            lines = [f"Error(s) in loading state_dict for {type(module).__name__}:", *messages]
            error = RuntimeError("\n\t".join(lines))
    mismatched = [found.group(1) or found.group(2) for found in map(_MISMATCH.match, messages) if found]
    report = LoadReport(missing=tuple(missing), unexpected=tuple(unexpected), mismatched=tuple(mismatched))
    report = report.with_prefix(name)
    if error is not None:
        keys = (report.missing, report.unexpected, report.mismatched)
        raise state_mismatch_error(str(error), ["RuntimeError"], *keys) from error
    return report


def _is_alike(
    state: Any, tensors: Mapping[str, torch.Tensor], live: Mapping[str, torch.Tensor], options: Mapping[str, Any]
) -> bool:
    """Return True if a state has the module's keys and shapes, and nothing that changes torch's rules."""
    if not (options.keys() <= {"strict", "assign"} and not options.get("assign")):
        return False
    if type(state) not in (dict, OrderedDict) or not state.keys() == tensors.keys() == live.keys():
        return False
    metadata = getattr(state, "_metadata", {})
    if type(metadata) not in (dict, OrderedDict) or not all(type(one) is dict for one in metadata.values()):
        return False
    if any("assign_to_params_buffers" in one for one in metadata.values()):  # left by a load with assign=True
        return False
    return all(one.shape == live[key].shape for key, one in tensors.items())


def _load_twin(module: nn.Module, state: Any, options: Mapping[str, Any]) -> _Outcome:
    """Load a state on the meta device into a twin of the module."""
    twin = _make_twin(module, {})
    lists: list[Any] = []  # torch gives them to the hook, and fills them afterwards
    twin.register_load_state_dict_pre_hook(lambda *args: lists.extend(args[-3:]))  # type: ignore[no-untyped-call]  # torch ships it without types
    error: RuntimeError | None = None
    with ignore_warnings():  # the real load repeats them
        try:
            twin.load_state_dict(state, **options)
        except RuntimeError as caught:
            error = caught
    missing, unexpected, messages = lists[:3] or ([], [], [])
    return error, missing, unexpected, messages


def _make_twin(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """Return a twin on the meta device, of the torch class that `module` derives from: no other code runs."""
    if id(module) in done:
        return done[id(module)]
    kind = next(base for base in type(module).__mro__ if base.__module__.startswith("torch.nn.modules."))
    twin: nn.Module = object.__new__(type(type(module).__name__, (kind,), {}))
    done[id(module)] = twin
    attributes = vars(module)
    vars(twin).update(
        attributes,
        _parameters={
            key: one if one is None else nn.Parameter(_empty_like(one), requires_grad=one.requires_grad)
            for key, one in attributes["_parameters"].items()
        },
        _buffers={key: one if one is None else _empty_like(one) for key, one in attributes["_buffers"].items()},
        _modules={key: one if one is None else _make_twin(one, done) for key, one in attributes["_modules"].items()},
        _load_state_dict_pre_hooks=OrderedDict(),
        _non_persistent_buffers_set=set(attributes["_non_persistent_buffers_set"]),
    )
    if "_flat_weights" in attributes:  # an RNN assigns its weights here too
        vars(twin)["_flat_weights"] = list(attributes["_flat_weights"])
    return twin


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _on_meta(state: Any, given: Mapping[str, Any]) -> Any:
    """Copy a state; the tensors that the module takes are on the meta device."""
    if not isinstance(state, Mapping):
        return state
    twin: Any = OrderedDict(state)
    twin.update({key: _empty_like(one) if isinstance(one, torch.Tensor) else one for key, one in given.items()})
    metadata = getattr(state, "_metadata", None)
    if isinstance(metadata, Mapping):  # torch writes into it
        twin._metadata = {key: dict(one) if isinstance(one, dict) else one for key, one in metadata.items()}  # noqa: SLF001
    return twin


def _copy_refusal(live: torch.Tensor, given: torch.Tensor) -> str | None:
    """Return why ``live.copy_(given)`` would fail for tensors of one shape; None if it would not.

    Args:
        live: a live tensor; of a DTensor, the local shard, whose part of `given` would be copied.
        given: the state's tensor.
    """
    if live.is_inference() and not torch.is_inference_mode_enabled():
        return "which is an inference tensor: load it inside torch.inference_mode(), or make it outside."
    if given.device.type == "meta" and live.device.type != "meta":
        return "for which the checkpoint has no data: its tensor is on the meta device."
    if not has_memory(live) or not has_memory(given):
        return "whose memory was given back, here or in the checkpoint: its storage is smaller than the tensor."
    if (live.is_cpu or live.is_cuda) and torch._debug_has_internal_overlap(live) == 1:  # noqa: SLF001 - no public way
        return "some of whose elements share memory, as after expand(): clone() it first."
    if live.dtype not in _COPYABLE or given.dtype not in _COPYABLE:
        try:
            live.detach().clone().copy_(given if given.shape == live.shape else live.to(given.dtype))
        except RuntimeError as error:
            return f"an exception occurred : {error.args}."
    return None


def _overlaps(given: torch.Tensor, live: torch.Tensor) -> bool:
    """Return True if both have one storage, but different parts of it."""
    if live.device.type == "meta" or given.device != live.device:
        return False
    if live.untyped_storage()._cdata != given.untyped_storage()._cdata:  # noqa: SLF001 - torch's identity of a storage
        return False
    return (live.data_ptr(), live.shape, live.stride()) != (given.data_ptr(), given.shape, given.stride())


def refuse_names(name: str, optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Refuse an optimizer's state by parameter names, since torch's ``load_state_dict`` goes by their order.

    Raises:
        StateMismatchError: the state is by names, and the optimizer loads it as torch does; a ValueError too.
    """
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    is_named = isinstance(groups, Sequence) and any(
        isinstance(key, str) for group in groups if isinstance(group, Mapping) for key in group.get("params", ())
    )
    kind: Any = type(optimizer)
    has_own_way = kind.load_state_dict is not torch.optim.Optimizer.load_state_dict
    if is_named and not has_own_way and not optimizer._optimizer_load_state_dict_pre_hooks:  # noqa: SLF001 - no public way
        msg = (
            f"the checkpoint's {name!r} holds the states of parameters by name, as distckpt.StageState saves them, and "
            "an optimizer goes by their order. Load it into distckpt.StageState(optimizer, model)"
        )
        raise state_mismatch_error(msg, ["ValueError"], mismatched=[f"{name}.param_groups".lstrip(".")])


def check_groups(name: str, optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Compare what ``Optimizer.load_state_dict`` compares, before anything is changed.

    Raises:
        StateMismatchError: it would refuse the state; a ValueError too.
    """
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    if not isinstance(groups, Sequence) or not isinstance(state.get("state"), Mapping):
        msg = f"the checkpoint's {name!r} is not an optimizer's state: it lacks 'state' or 'param_groups'"
        raise state_mismatch_error(msg, ["ValueError"], mismatched=[f"{name}.param_groups".lstrip(".")])
    own, given = ([len(group["params"]) for group in one] for one in (optimizer.param_groups, groups))
    if own != given:
        what = "has a different number of parameter groups"
        if len(own) == len(given):
            what = "contains a parameter group that doesn't match the size of optimizer's group"
        msg = f"loaded state dict {what} ({name!r}: the checkpoint's groups hold {given}, the optimizer's {own})"
        raise state_mismatch_error(msg, ["ValueError"], mismatched=[f"{name}.param_groups".lstrip(".")])
