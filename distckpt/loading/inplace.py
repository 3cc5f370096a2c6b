"""Read a file's bytes straight into the memory of live tensors.

An :class:`InplaceTarget` is a live tensor that may take its bytes from the file. It replaces the state's tensor in the
state. So torch's ``load_state_dict`` copies the target onto itself, which changes nothing, and does the rest of a load.
Nothing refers to the state's tensor any more, so the reader does not read it.

A live DTensor takes the part of the file's tensor that its local shard stands for. If it cannot, the bytes are read
into a new DTensor like it, before any object is changed.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from distckpt.loading.dtensors import empty_like, find_dtensors, get_part, local_tensor
from distckpt.loading.part_reads import TensorPart, is_dense, read_parts
from distckpt.loading.plain_objects import get_tensors, is_plain_tensor
from distckpt.ptformat.reader import OpenCheckpoint

_UNSHARED = {0: object()}  # nothing else refers to the object
_UNSHARED_TENSOR = torch.empty(1)  # nothing else refers to its storage


class InplaceTarget(NamedTuple):
    """A live tensor that a state's tensor is loaded into.

    Attributes:
        path: the keys that lead to the state's tensor.
        live: the live tensor.
        part: what its memory takes of the file; None if the bytes may not go straight into it.
    """

    path: tuple[Any, ...]
    live: torch.Tensor
    part: TensorPart | None


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
    tensor = local_tensor(tensor)
    if not _takes_bytes(tensor):
        return True  # the file's bytes do not go straight into it
    storage, unshared = tensor.untyped_storage(), _UNSHARED_TENSOR.untyped_storage()
    count: Any = torch._C._storage_Use_Count  # noqa: SLF001 - no public way
    is_torch_memory = storage.resizable() and not storage.is_shared()  # else it is NumPy's or a mapped file's
    return is_torch_memory and count(storage._cdata) <= count(unshared._cdata)  # noqa: SLF001 - torch's identity of a storage


def find_new_targets(obj: Any, state: Any, file: OpenCheckpoint) -> list[InplaceTarget]:
    """Return a new DTensor as a target for each tensor of the file that replaces a live DTensor, or becomes one."""
    targets = []
    for path, live, given in find_dtensors(obj, state):
        if file.offset_of(given) is not None:
            target = _make_target(path, empty_like(live, given.dtype), given, file, may_bounce=True)
            targets += [target] if target.part is not None else []
    return targets


def _make_target(
    path: tuple[Any, ...], live: torch.Tensor, given: torch.Tensor, file: OpenCheckpoint, *, may_bounce: bool
) -> InplaceTarget:
    target, memory = InplaceTarget(path, live, None), local_tensor(live)
    if not (_takes_bytes(memory) and _takes_bytes(given) and live.shape == given.shape and given.is_cpu):
        return target
    begin = file.offset_of(given)
    if begin is None or not given.numel() or not (is_dense(given) and is_dense(memory)):
        return target
    offset = begin + int(given.storage_offset()) * given.dtype.itemsize
    ranges, is_row_major = get_part(live), given.is_contiguous()
    part = TensorPart(memory, ranges, given.shape, given.stride(), given.dtype, offset, is_row_major)
    if not (memory.is_cpu and part.is_laid_out_like_file()):
        may_copy = may_bounce or (memory.is_cuda and part.is_laid_out_like_file())
        is_same_kind = memory.dtype == given.dtype or not (memory.is_complex() or given.is_complex())
        if not (may_copy and is_same_kind):
            return target
    return InplaceTarget(path, live, part)


def _takes_bytes(tensor: torch.Tensor) -> bool:
    return is_plain_tensor(tensor) and (tensor.is_cpu or tensor.is_cuda) and not (tensor.is_conj() or tensor.is_neg())


def drop_overlapping(targets: Sequence[InplaceTarget]) -> list[InplaceTarget]:
    """Return the targets of one load, without those that share memory with targets read from other bytes."""
    groups: list[list[InplaceTarget]] = []
    reads: list[set[Any]] = []
    alone: list[InplaceTarget] = []  # shards of no elements
    group_end = ("", 0)
    for device, begin, end, number in sorted((*_span(one), number) for number, one in enumerate(targets)):
        if begin == end:
            alone.append(targets[number])
            continue
        if (device, begin) >= group_end:
            groups.append([])
            reads.append(set())
        groups[-1].append(targets[number])
        reads[-1].add((begin, end, _source(targets[number].part)))
        group_end = max(group_end, (device, end))
    alike = [group for group, its_reads in zip(groups, reads, strict=True) if len(its_reads) == 1]
    return [target for group in (alone, *alike) for target in group if target.part is not None]


def _source(part: TensorPart | None) -> Any:
    """Return what a part is read from, to compare."""
    return part and (part.offset, part.dtype, part.ranges and tuple(map(tuple, part.ranges)))


def _span(target: InplaceTarget) -> tuple[str, int, int]:
    """Return the device of a target's memory, and the addresses where it begins and ends."""
    memory = local_tensor(target.live)
    device = "cpu" if memory.is_cpu else str(memory.device)
    if not (memory.is_cpu or memory.is_cuda) or memory.layout is not torch.strided or not memory.numel():
        return device, 0, 0
    if is_dense(memory):
        return device, memory.data_ptr(), memory.data_ptr() + memory.nbytes
    storage = memory.untyped_storage()
    return device, storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def read_into(targets: Sequence[InplaceTarget], file: OpenCheckpoint) -> None:
    """Read each target's bytes into its memory; targets that share memory are read once.

    Raises:
        OSError: reading failed; some tensors have been written to.
    """
    once = {_span(target)[:2]: target for target in targets}.values()
    pairs = ((target.part, local_tensor(target.live)) for target in once)
    # FSDP2 may have replaced a local shard since it became a target.
    parts = ((part, memory) for part, memory in pairs if part is not None)
    read_parts([one if one.memory is memory else one._replace(memory=memory) for one, memory in parts], file)
