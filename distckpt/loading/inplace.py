"""Read a file's bytes straight into the memory of live tensors.

An :class:`InplaceTarget` is a live tensor that may take its bytes from the file. It replaces the state's tensor in the
state. So torch's ``load_state_dict`` copies it onto itself, which does nothing, and does all the rest of a load.
Nothing refers to the state's tensor any more, so the reader does not read it.
"""

import copy
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from distckpt.loading.plain_objects import get_tensors, is_plain_tensor
from distckpt.ptformat.reader import OpenCheckpoint

_UNSHARED = {0: object()}  # nothing else refers to the object
_UNSHARED_TENSOR = torch.empty(1)  # nothing else refers to its storage
_BOUNCE_BYTES = 16 << 20  # read at once into a buffer, where a tensor cannot take the bytes directly


class InplaceTarget(NamedTuple):
    """A live tensor that a state's tensor is loaded into.

    Attributes:
        path: the keys that lead to the state's tensor.
        live: the live tensor.
        stride: the state's strides; its shape is the live tensor's.
        dtype: the state's.
        offset: where the bytes begin in the file; None if they may not go straight into the live tensor.
        is_direct: False if the bytes go through a buffer first, because layout, dtype or device differ.
    """

    path: tuple[Any, ...]
    live: torch.Tensor
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int | None
    is_direct: bool = True


def find_module_targets(module: nn.Module, state: Mapping[str, Any], file: OpenCheckpoint) -> list[InplaceTarget]:
    """Return a target for each tensor of a plain module that the state has."""
    return [
        _make_target((key,), live, state[key], file, may_bounce=True)
        for key, live in get_tensors(module).items()
        if isinstance(state.get(key), torch.Tensor)
    ]


def find_optimizer_targets(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], file: OpenCheckpoint
) -> list[InplaceTarget]:
    """Return a target for each tensor of a plain optimizer that may be written to.

    torch's optimizers replace their tensors in a load. So a tensor must not change if something else refers to it, such
    as an earlier ``state_dict()``, or uses its memory.
    """
    targets = []
    convert: Any = torch.optim.Optimizer._process_value_according_to_param_policy  # noqa: SLF001 - no public way
    for own_group, given_group in zip(optimizer.param_groups, state["param_groups"], strict=True):
        for number, parameter in zip(given_group["params"], own_group["params"], strict=True):
            given = state["state"].get(number)
            if not isinstance(given, dict) or not _is_unshared(optimizer.state, parameter):
                continue
            held, group = optimizer.state[parameter], [{**given_group, "params": [number]}]
            for key in given.keys() & held.keys():
                if not _is_unshared(held, key):
                    continue
                live = held[key]
                # Optimizers convert a step counter, which has no dimensions. `convert` returns a copy if they need one.
                if not all(isinstance(one, torch.Tensor) and one.dim() > 0 for one in (live, given[key])):
                    continue
                if _owns_memory(live) and convert(parameter, live, number, group, key) is live:
                    targets.append(_make_target(("state", number, key), live, given[key], file, may_bounce=False))
    return targets


def _is_unshared(mapping: Mapping[Any, Any], key: Any) -> bool:
    return key in mapping and sys.getrefcount(mapping[key]) <= sys.getrefcount(_UNSHARED[0])


def _owns_memory(tensor: torch.Tensor) -> bool:
    """Return True if no other tensor, array or process uses the tensor's memory."""
    if not _takes_bytes(tensor):
        return True  # the file's bytes do not go straight into it
    storage, unshared = tensor.untyped_storage(), _UNSHARED_TENSOR.untyped_storage()
    count: Any = torch._C._storage_Use_Count  # noqa: SLF001 - no public way
    is_torch_memory = storage.resizable() and not storage.is_shared()  # else it is NumPy's or a mapped file's
    return is_torch_memory and count(storage._cdata) <= count(unshared._cdata)  # noqa: SLF001 - torch's identity of a storage


def _make_target(
    path: tuple[Any, ...], live: torch.Tensor, given: torch.Tensor, file: OpenCheckpoint, *, may_bounce: bool
) -> InplaceTarget:
    target = InplaceTarget(path, live, (), given.dtype, None)
    if not (_takes_bytes(live) and _takes_bytes(given) and live.shape == given.shape and given.is_cpu):
        return target
    begin = file.offset_of(given)
    if begin is None or not given.numel() or not (_is_dense(given) and _is_dense(live)):
        return target
    has_same_layout = live.dtype == given.dtype and _strides(live) == _strides(given)
    is_direct = live.is_cpu and has_same_layout
    may_copy = may_bounce or (has_same_layout and live.is_cuda)
    if not is_direct and (not may_copy or (live.dtype != given.dtype and (live.is_complex() or given.is_complex()))):
        return target
    offset = begin + int(given.storage_offset()) * given.dtype.itemsize
    return target._replace(stride=given.stride(), offset=offset, is_direct=is_direct)


def _takes_bytes(tensor: torch.Tensor) -> bool:
    return is_plain_tensor(tensor) and (tensor.is_cpu or tensor.is_cuda) and not (tensor.is_conj() or tensor.is_neg())


def _strides(tensor: torch.Tensor) -> list[int]:
    """Return the strides of the dimensions that have more than one element; other strides mean nothing."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]


def _is_dense(tensor: torch.Tensor) -> bool:
    """Return True if the tensor's elements fill a block of memory, without gaps and overlaps."""
    if tensor.is_contiguous():
        return True
    expected = 1
    dimensions = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted((stride, size) for stride, size in dimensions if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def drop_overlapping(targets: Sequence[InplaceTarget]) -> list[InplaceTarget]:
    """Return the targets of one load that share no memory with others, unless these are read from the same bytes."""
    groups: list[list[InplaceTarget]] = []
    reads: list[set[tuple[Any, ...]]] = []
    group_end = ("", 0)
    for device, begin, end, number in sorted((*_span(one), number) for number, one in enumerate(targets)):
        if begin == end:
            continue
        if (device, begin) >= group_end:
            groups.append([])
            reads.append(set())
        groups[-1].append(targets[number])
        reads[-1].add((begin, end, targets[number].offset, targets[number].dtype))
        group_end = max(group_end, (device, end))
    alike = [group for group, its_reads in zip(groups, reads, strict=True) if len(its_reads) == 1]
    return [target for group in alike for target in group if target.offset is not None]


def _span(target: InplaceTarget) -> tuple[str, int, int]:
    """Return the live tensor's device, and the addresses where it begins and ends."""
    live = target.live
    device = "cpu" if live.is_cpu else str(live.device)
    if not (live.is_cpu or live.is_cuda) or live.layout is not torch.strided or not live.numel():
        return device, 0, 0
    if _is_dense(live):
        return device, live.data_ptr(), live.data_ptr() + live.nbytes
    storage = live.untyped_storage()
    return device, storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def replace_tensors(state: Any, tensors: Iterable[tuple[tuple[Any, ...], torch.Tensor]]) -> Any:
    """Return a copy of a state with tensors at the given paths; the containers of the original stay as they are."""
    twin, below = copy.copy(state), dict[Any, list[tuple[tuple[Any, ...], torch.Tensor]]]()
    for (key, *rest), tensor in tensors:
        if rest:
            below.setdefault(key, []).append((tuple(rest), tensor))
        else:
            twin[key] = tensor
    for key, inner in below.items():
        twin[key] = replace_tensors(state[key], inner)
    return twin


@torch.no_grad()
def read_into(targets: Sequence[InplaceTarget], file: OpenCheckpoint) -> None:
    """Read each target's bytes into its memory, once where targets share it.

    Raises:
        OSError: reading failed; some tensors have been written to.
    """
    once = {_span(target)[:2]: target for target in targets}.values()
    direct = [(one.live.data_ptr(), one.live.nbytes, one.offset) for one in once if one.is_direct]
    file.read((address, num_bytes, offset) for address, num_bytes, offset in direct if offset is not None)
    for target in once:
        if not target.is_direct and target.offset is not None:
            _bounce(target, target.offset, file)


def _bounce(target: InplaceTarget, offset: int, file: OpenCheckpoint) -> None:
    """Read a tensor's bytes through a buffer, in steps if both layouts are contiguous."""
    live, dtype = target.live.detach(), target.dtype
    layout = torch.empty_strided(live.size(), target.stride, dtype=dtype, device="meta")
    if not (live.is_contiguous() and layout.is_contiguous()):
        buffer = torch.empty_strided(live.size(), target.stride, dtype=dtype, device="cpu")
        file.read([(buffer.data_ptr(), buffer.nbytes, offset)])
        live.copy_(buffer)
        return
    live = live.view(-1)
    step = max(_BOUNCE_BYTES // dtype.itemsize, 1)
    buffer = torch.empty(min(step, live.numel()), dtype=dtype, device="cpu")
    for begin in range(0, live.numel(), step):
        filled = buffer[: live.numel() - begin]
        file.read([(filled.data_ptr(), filled.nbytes, offset + begin * dtype.itemsize)])
        live[begin : begin + step].copy_(filled)
