"""The part of a whole tensor that a shard stands for: as torch and FSDP2 themselves cut it."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from distckpt.ptformat.shard_geometry import Ranges, local_ranges, num_indices, shard_shape

Cut = list[list[int]]  # indices of the whole tensor along each dimension, in the order of the local shard


def cut_by_torch(shape: Sequence[int], mesh: Sequence[int], at: Sequence[int], placements: Sequence[Any]) -> Cut:
    """Cut each dimension's indices by the placements' own methods, from left to right, as distribute_tensor does."""
    found = []
    for dim, size in enumerate(shape):
        indices = torch.arange(size)
        for num, part, placement in zip(mesh, at, placements, strict=True):
            if not placement.is_replicate() and placement.dim == dim:
                split: Any = type(placement)(0, split_factor=placement.split_factor) if strided(placement) else Shard(0)
                indices = split._split_tensor(indices, num, with_padding=False, contiguous=False)[0][part]
        found.append(indices.tolist())
    return found


def strided(placement: Any) -> bool:
    return type(placement) is _StridedShard


def cut_by_fsdp(size: int, dp: int, tp: int, dp_part: int, tp_part: int) -> list[int]:
    """Cut a dimension as FSDP2 does: tensor parallelism first."""

    def part(indices: torch.Tensor, num: int, number: int) -> torch.Tensor:
        chunks = torch.chunk(indices, num)
        return chunks[number] if number < len(chunks) else indices[:0]

    return list(part(part(torch.arange(size), tp, tp_part), dp, dp_part).tolist())


def indices(found: tuple[Ranges, ...]) -> Cut:
    return [[index for begin, end in ranges for index in range(begin, end)] for ranges in found]


def coordinates(mesh: Sequence[int]) -> Any:
    return itertools.product(*map(range, mesh))


SIZES = st.integers(0, 13)


@given(st.data())
def test_ranges_are_those_that_torch_cuts(data: st.DataObject) -> None:
    shape = data.draw(st.lists(SIZES, min_size=1, max_size=3))
    mesh = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    dims = st.integers(0, len(shape) - 1)
    in_three = st.builds(_StridedShard, dims, split_factor=st.just(3))
    placement = st.one_of(st.just(Replicate()), dims.map(Shard), in_three)
    placements = data.draw(st.lists(placement, min_size=len(mesh), max_size=len(mesh)))
    # FSDP2's own placements have a second meaning; they are tested below.
    assume(
        not any(map(strided, placements)) or all(3 not in cuts_to_the_right(mesh, placements, dim) for dim in (0, 1, 2))
    )
    for at in coordinates(mesh):
        wanted = cut_by_torch(shape, mesh, at, placements)
        assert indices(local_ranges(shape, mesh, at, placements, [*map(len, wanted)])) == wanted


def cuts_to_the_right(mesh: Sequence[int], placements: Sequence[Any], dim: int) -> set[int]:
    """Return the numbers of parts into which placements to the right of a strided one cut the dimension."""
    rights = [
        [num for num, other in zip(mesh[number + 1 :], placements[number + 1 :], strict=True) if cuts(other, dim)]
        for number, one in enumerate(placements)
        if strided(one)
    ]
    return set(map(math.prod, rights))


def cuts(placement: Any, dim: int) -> bool:
    return not placement.is_replicate() and placement.dim == dim


@pytest.mark.parametrize("tp", [2, 3, 4])
@pytest.mark.parametrize("dp", [1, 2, 3, 4])
def test_fsdp_over_tensor_parallel_is_cut_as_fsdp_does_it_even_where_rows_do_not_divide(dp: int, tp: int) -> None:
    num_refused = num_other = 0
    for size, at in itertools.product(range(40), coordinates((dp, tp))):
        dim = size % 2
        placements = (_StridedShard(dim, split_factor=tp), Shard(dim))
        shape, local_shape = [2, 2], [2, 2]
        wanted = cut_by_fsdp(size, dp, tp, *at)
        shape[dim], local_shape[dim] = size, len(wanted)
        by_torch = cut_by_torch(shape, (dp, tp), at, placements)[dim]
        num_other += by_torch != wanted
        if by_torch != wanted and len(by_torch) == len(wanted):
            num_refused += 1
            with pytest.raises(ValueError, match="give several shards of shape"):
                local_ranges(shape, (dp, tp), at, placements, local_shape)
            continue
        assert indices(local_ranges(shape, (dp, tp), at, placements, local_shape))[dim] == wanted
    assert bool(num_other) == (dp > 2)  # torch's order is another one there
    assert num_refused <= 2


def test_fsdp_over_tensor_parallel_that_was_cut_from_left_to_right_is_found_by_its_shape() -> None:
    placements = (_StridedShard(0, split_factor=2), Shard(0))
    assert local_ranges((9,), (4, 2), (3, 0), placements, (1,)) == ([(8, 9)],)
    assert local_ranges((9,), (4, 2), (3, 0), placements, (0,)) == ([],)
    assert local_ranges((9,), (4, 2), (3, 1), placements, (1,)) == ([(8, 9)],)


@pytest.mark.parametrize(
    ("placements", "mesh", "at", "wanted"),
    [
        ((Shard(0),), (2,), (0,), ([(0, 3)], [(0, 6)])),
        ((Shard(0),), (2,), (1,), ([(3, 5)], [(0, 6)])),
        ((Shard(0),), (8,), (7,), ([], [(0, 6)])),
        ((Shard(1),), (4,), (2,), ([(0, 5)], [(4, 6)])),
        ((Shard(1),), (4,), (3,), ([(0, 5)], [])),
        ((Replicate(), Shard(0)), (2, 3), (1, 1), ([(2, 4)], [(0, 6)])),
        ((Shard(0), Shard(0)), (2, 2), (0, 1), ([(2, 3)], [(0, 6)])),
        ((Shard(0), Shard(1)), (2, 2), (1, 1), ([(3, 5)], [(3, 6)])),
        ((Shard(-1), Replicate()), (2, 2), (1, 1), ([(0, 5)], [(3, 6)])),
        ((_StridedShard(1, split_factor=3),), (2,), (0,), ([(0, 5)], [(0, 1), (2, 3), (4, 5)])),
        ((Partial(),), (1,), (0,), ([(0, 5)], [(0, 6)])),
    ],
)
def test_ranges_of_known_placements(
    placements: Sequence[Any], mesh: Sequence[int], at: Sequence[int], wanted: tuple[Ranges, ...]
) -> None:
    assert local_ranges((5, 6), mesh, at, placements, [*map(num_indices, wanted)]) == wanted


def test_scalar_is_whole_on_every_rank() -> None:
    assert local_ranges((), (2,), (1,), (Replicate(),), ()) == ()


def test_every_element_is_on_one_rank_of_a_mesh_that_only_shards() -> None:
    mesh, placements = (3, 2), (Shard(0), Shard(1))
    held = torch.zeros(7, 3, dtype=torch.int64)
    for at in coordinates(mesh):
        rows, columns = cut_by_torch(held.shape, mesh, at, placements)
        found = indices(local_ranges(held.shape, mesh, at, placements, (len(rows), len(columns))))
        held[torch.tensor(found[0], dtype=torch.int64)[:, None], torch.tensor(found[1], dtype=torch.int64)] += 1
    assert held.eq(1).all()


class _Ragged:
    dim = 0

    def is_replicate(self) -> bool:
        return False


@pytest.mark.parametrize("placement", [Partial(), _Ragged()])
def test_placement_that_gives_no_part_is_refused(placement: Any) -> None:
    with pytest.raises(ValueError, match="does not say which part of the tensor a rank holds"):
        local_ranges((4,), (2,), (0,), (placement,), (4,))


def test_local_shard_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(S\(0\)\) over a mesh of 2 ranks give no shard of shape \(3,\) at \(1,\)"):
        local_ranges((5,), (2,), (1,), (Shard(0),), (3,))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    ("size", "mesh", "is_known"),
    [(5, (2, 2), True), (50_257, (2, 2), True), (50_304, (4, 2), True), (50_257, (4, 2), False)],
)
def test_a_dimension_that_fsdp_may_have_cut_in_another_order_has_no_known_shard(
    size: int, mesh: tuple[int, int], dim: int, *, is_known: bool
) -> None:
    shape = [3, 3]
    shape[dim] = size
    strided = (_StridedShard(dim, split_factor=mesh[1]), Shard(dim))
    found = [shard_shape(shape, mesh, at, strided) for at in coordinates(mesh)]
    assert (None not in found) == is_known
    plain = [shard_shape(shape, mesh, at, (Shard(dim), Shard(dim))) for at in coordinates(mesh)]
    assert sum(one[dim] for one in plain if one is not None) == size


@pytest.mark.parametrize("placements", [(Shard(0), Shard(1)), (Replicate(), Shard(-1)), (Shard(1), Replicate())])
def test_the_shape_of_a_shard_is_that_of_its_ranges(placements: tuple[Any, ...]) -> None:
    for at in coordinates((2, 3)):
        shape = shard_shape((7, 5), (2, 3), at, placements)
        assert shape is not None
        assert shape == tuple(map(num_indices, local_ranges((7, 5), (2, 3), at, placements, shape)))
