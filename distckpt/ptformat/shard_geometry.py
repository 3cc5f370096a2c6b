"""Compute which part of a whole tensor a rank's local shard stands for. Plain arithmetic: no ranks, no tensors.

A part is given for each dimension, as ranges of indices in the order of the local shard. The shard's elements are those
whose index is in a range of every dimension.

torch applies placements from left to right. FSDP2 shards what tensor parallelism has sharded already, so it applies
them from right to left, and calls the result ``_StridedShard``. Both orders give the same part where a dimension
divides evenly. Elsewhere they may differ, and the shape of the local shard says which one was used.

Source: ``torch.distributed.tensor.placement_types`` and ``FSDPParam._init_sharded_param`` of torch 2.9 to 2.13.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

Ranges = list[tuple[int, int]]
"""Begin and end of runs of indices. Empty for a dimension of which a shard has nothing."""
DimShard = tuple[int, int, int, int]
"""How a mesh dimension shards a tensor dimension: that dimension, number of parts, this rank's part, split factor."""

_SHARDS = frozenset({"Shard", "_StridedShard"})


def local_ranges(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Any],
    local_shape: Sequence[int],
) -> tuple[Ranges, ...]:
    """Return the ranges of indices that a local shard stands for, for each dimension of the whole tensor.

    Args:
        shape: of the whole tensor.
        mesh_shape: of the device mesh.
        coordinate: of the rank in the mesh.
        placements: of the tensor, one for each dimension of the mesh.
        local_shape: of the local shard.

    Raises:
        ValueError: the placements are partial or of an unknown kind, or do not give a shard of that shape.

    Example:
        >>> from torch.distributed.tensor import Shard
        >>> local_ranges((5, 3), (2,), (1,), (Shard(0),), (2, 3))
        ([(3, 5)], [(0, 3)])
    """
    fitting = _fitting_ranges(tuple(shape), _find_shards(mesh_shape, coordinate, placements), tuple(local_shape))
    unclear = next((found for found in fitting if len(found) != 1), None)
    if unclear is not None:
        names = ", ".join(map(str, placements))
        what = "several shards" if unclear else "no shard"
        raise ValueError(
            f"placements ({names}) over a mesh of {'x'.join(map(str, mesh_shape))} ranks give {what} of shape "
            f"{tuple(local_shape)} at {tuple(coordinate)} of a tensor of shape {tuple(shape)}"
        )
    return tuple(list(ranges) for (ranges,) in fitting)


def shard_shape(
    shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Any]
) -> tuple[int, ...] | None:
    """Return the shape of the local shard at a coordinate; None if the placements do not say which part it is.

    Args:
        shape: of the whole tensor.
        mesh_shape: of the device mesh.
        coordinate: of the rank in the mesh.
        placements: of the tensor, one for each dimension of the mesh.

    Raises:
        ValueError: the placements are partial or of an unknown kind.

    Example:
        >>> from torch.distributed.tensor import Shard
        >>> shard_shape((5, 3), (2,), (1,), (Shard(0),))
        (2, 3)
    """
    return _shard_shape(tuple(shape), _find_shards(mesh_shape, coordinate, placements))


@functools.lru_cache(maxsize=1024)
def _shard_shape(shape: tuple[int, ...], shards: tuple[DimShard, ...]) -> tuple[int, ...] | None:
    candidates = [_candidates(shape, dim, shards) for dim in range(len(shape))]
    if any(len(found) > 1 for found in candidates):
        return None
    return tuple(num_indices(ranges) for (ranges,) in candidates)


@functools.lru_cache(maxsize=1024)
def _fitting_ranges(
    shape: tuple[int, ...], shards: tuple[DimShard, ...], local_shape: tuple[int, ...]
) -> tuple[tuple[Ranges, ...], ...]:
    """Return the ranges of each dimension that have the local shard's size; one in each, unless something is wrong."""
    return tuple(
        tuple(one for one in _candidates(shape, dim, shards) if num_indices(one) == local_size)
        for dim, local_size in zip(range(len(shape)), local_shape, strict=True)
    )


def _candidates(shape: Sequence[int], dim: int, shards: Sequence[DimShard]) -> list[Ranges]:
    """Return the part of a dimension as torch computes it, and as FSDP2 does if that is another."""
    on_dim = [shard for shard in shards if shard[0] in (dim, dim - len(shape))]
    found = [split_dimension(shape[dim], on_dim)]
    if (reverse := fsdp_order(on_dim)) and (other := split_dimension(shape[dim], reverse)) != found[0]:
        found.append(other)
    return found


def num_indices(ranges: Ranges) -> int:
    """Return the number of indices in ranges."""
    return sum(end - begin for begin, end in ranges)


def _find_shards(
    mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Any]
) -> tuple[DimShard, ...]:
    shards: list[DimShard] = []
    for num_parts, part, placement in zip(mesh_shape, coordinate, placements, strict=True):
        # Over a mesh dimension of one rank, every placement is the whole tensor.
        if num_parts == 1 or placement.is_replicate():
            continue
        if type(placement).__name__ not in _SHARDS:
            raise ValueError(f"placement {placement} does not say which part of the tensor a rank holds")
        shards.append((placement.dim, num_parts, part, int(getattr(placement, "split_factor", 1))))
    return tuple(shards)


def fsdp_order(shards: list[DimShard]) -> list[DimShard]:
    """Return the shards of a dimension in FSDP2's order; an empty list if FSDP2 has not made them."""
    if not shards:
        return []
    (dim, num_parts, part, split_factor), *others = shards
    is_fsdp = split_factor > 1 and split_factor == math.prod(one[1] for one in others)
    return [*others, (dim, num_parts, part, 1)] if is_fsdp and all(one[3] == 1 for one in others) else []


def split_dimension(size: int, shards: list[DimShard]) -> Ranges:
    """Return a rank's part of a dimension that several mesh dimensions shard, one after another."""
    held: Ranges = [(0, size)] if size else []
    for _, num_parts, part, split_factor in shards:
        local_size = num_indices(held)
        parts: Ranges = []
        for outer in range(split_factor):
            begin, end = chunk_of(local_size, split_factor, outer)
            inner_begin, inner_end = chunk_of(end - begin, num_parts, part)
            parts += _select(held, begin + inner_begin, begin + inner_end)
        held = _merge(parts)
    return held


def chunk_of(size: int, num_parts: int, part: int) -> tuple[int, int]:
    """Return begin and end of a part as ``torch.chunk`` cuts it: the last parts are shorter, or empty."""
    length = -(-size // num_parts)
    return min(part * length, size), min((part + 1) * length, size)


def _select(ranges: Ranges, begin: int, end: int) -> Ranges:
    """Return the indices at the positions from `begin` to `end` of ranges."""
    found: Ranges = []
    at = 0
    for first, last in ranges:
        low, high = max(begin - at, 0), min(end - at, last - first)
        if low < high:
            found.append((first + low, first + high))
        at += last - first
    return found


def _merge(ranges: Ranges) -> Ranges:
    merged: Ranges = []
    for begin, end in ranges:
        if merged and merged[-1][1] == begin:
            merged[-1] = merged[-1][0], end
        else:
            merged.append((begin, end))
    return merged
