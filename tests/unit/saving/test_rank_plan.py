"""Sharded images without processes: the plans of all ranks together write each byte once, and the right one."""

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from distckpt.ptformat.image import ShardBuffer, build_tail, combine_checksums, plan_image
from distckpt.saving.rank_plan import RankPlan, plan_rank, split_received
from distckpt.saving.sharding import ShardLayout, find_holders, held_bytes, make_mesh, written_pieces

BLOCK = 4096
MESHES = [
    ((1,), (1,)),
    ((2,), (1,)),
    ((3,), (1,)),
    ((4,), (1,)),
    ((2, 2), (0, 1)),
    ((2, 2), (1, 0)),
    ((2, 2), (1, 1)),
    ((2, 2), (2, 1)),
    ((2, 3), (3, 1)),
    ((2, 2, 2), (0, 2, 1)),
    ((4,), (0,)),
]


def split_by_torch(
    rows: torch.Tensor, shape: Sequence[int], splits: Sequence[int], coordinate: Sequence[int]
) -> list[int]:
    """Split row numbers as torch splits a tensor."""
    for size, split, at in zip(shape, splits, coordinate, strict=True):
        if split:
            placement = _StridedShard(0, split_factor=split) if split > 1 else Shard(0)
            chunks, _ = placement._split_tensor(rows, size, with_padding=False, contiguous=False)
            rows = chunks[at]
    return rows.tolist()


def layout_of(
    num_rows: int, row_bytes: int, shape: tuple[int, ...], splits: tuple[int, ...], ranks: Sequence[int] | None = None
) -> ShardLayout:
    num_ranks = torch.Size(shape).numel()
    replicas = torch.Size(size for size, split in zip(shape, splits, strict=True) if not split).numel()
    mesh = make_mesh(tuple(range(num_ranks) if ranks is None else ranks), shape)
    return ShardLayout(num_rows, row_bytes, mesh, splits, replicas)


@pytest.mark.parametrize(("shape", "splits"), MESHES)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 7, 8, 12, 13])
def test_held_rows_are_those_that_torch_gives_each_rank(
    shape: tuple[int, ...], splits: tuple[int, ...], num_rows: int
) -> None:
    layout = layout_of(num_rows, 1, shape, splits)
    for rank, coordinate in layout.mesh.coordinates.items():
        held = [row for begin, end in held_bytes(layout, rank) for row in range(begin, end)]
        assert held == split_by_torch(torch.arange(num_rows), shape, splits, coordinate)


@pytest.mark.parametrize(("shape", "splits"), MESHES)
@pytest.mark.parametrize(("num_rows", "row_bytes"), [(1, 1), (7, 3), (13, 1000), (100, 1536), (33, 4096), (5, 100_000)])
@pytest.mark.parametrize("turn", [0, 1, 5])
def test_each_byte_has_one_writer_that_holds_it(
    shape: tuple[int, ...], splits: tuple[int, ...], num_rows: int, row_bytes: int, turn: int
) -> None:
    layout = layout_of(num_rows, row_bytes, shape, splits)
    pieces = [(one, rank) for rank in layout.mesh.ranks for one in written_pieces(layout, rank, turn)]
    at = 0
    for (begin, end, local), rank in sorted(pieces):
        assert begin == at
        at = end
        held = list(itertools.accumulate(last - first for first, last in held_bytes(layout, rank)))
        number = next(index for index, total in enumerate(held) if local < total)
        first = held_bytes(layout, rank)[number][0]
        assert first + local - (held[number - 1] if number else 0) == begin
    assert at == layout.num_bytes
    holders = list(find_holders(layout, 0, layout.num_bytes, turn))
    merged = [(begin, end, rank) for (begin, end, _), rank in sorted(pieces)]
    assert [tuple(one) for one in holders] == merged


def test_replicas_share_the_work_evenly() -> None:
    layout = layout_of(1024, 4096, (4, 2), (0, 1))
    written = [sum(end - begin for begin, end, _ in written_pieces(layout, rank)) for rank in range(8)]
    assert max(written) - min(written) <= BLOCK
    small = [layout_of(2, 100, (4, 2), (0, 1)) for _ in range(8)]
    turns = [sum(bool(written_pieces(one, rank, turn)) for turn, one in enumerate(small)) for rank in range(8)]
    assert turns == [2] * 8


def random_layouts(random_: random.Random, num_ranks: int) -> list[ShardLayout]:
    fitting = [one for one in MESHES if torch.Size(one[0]).numel() <= num_ranks]
    layouts = []
    for _ in range(random_.randrange(1, 9)):
        shape, splits = random_.choice(fitting)
        ranks = random_.sample(range(num_ranks), torch.Size(shape).numel())
        num_rows, row_bytes = random_.choice(
            [(7, 10), (64, 1536), (200, 4096), (5, 50_000), (3, 1), (30_000, 8), (1, 1)]
        )
        layouts.append(layout_of(num_rows, row_bytes, shape, splits, ranks))
    return layouts


def exchange(plans: Sequence[RankPlan], layouts: Sequence[ShardLayout], data: Sequence[bytes]) -> list[bytearray]:
    """Copy and exchange as the ranks would; return their memories."""

    def shard_of(number: int, rank: int) -> bytes:
        if number >= len(layouts):
            return data[number]
        return b"".join(data[number][begin:end] for begin, end in held_bytes(layouts[number], rank))

    memories = [bytearray(b"\xee" * plan.num_bytes) for plan in plans]
    for rank, (plan, memory) in enumerate(zip(plans, memories, strict=True)):
        for number, begin, at, num_bytes in plan.copies:
            memory[at : at + num_bytes] = shard_of(number, rank)[begin : begin + num_bytes]
        sent = [
            memoryview(
                b"".join(
                    shard_of(number, other)[begin : begin + num_bytes]
                    for number, begin, num_bytes in plans[other].sends.get(rank, ())
                )
            )
            for other in range(len(plans))
        ]
        for at, part in split_received(sent, plan):
            memory[at : at + len(part)] = part
        assert [len(one) for one in sent] == [
            sum(one.num_bytes for one in plan.receives.get(other, ())) for other in range(len(plans))
        ]
    return memories


@pytest.mark.parametrize("seed", range(60))
def test_the_ranks_write_the_file_that_one_rank_would(seed: int) -> None:
    random_ = random.Random(seed)
    num_ranks = random_.choice([1, 2, 3, 4, 6, 8])
    layouts = random_layouts(random_, num_ranks)
    own = [random_.choice([0, 8, 4000, 70_000]) for _ in range(random_.randrange(4))]
    data = [random_.randbytes(size) for size in (*(one.num_bytes for one in layouts), *own)]
    replicated = [len(layouts) + number for number in range(len(own)) if random_.random() < 0.3]
    plan = plan_image([len(one) for one in data], replicated, len(layouts))
    coordinator = random_.randrange(num_ranks)
    ranks = (*(rank for rank in range(num_ranks) if rank != coordinator), coordinator)
    plans = [plan_rank(plan, tuple(layouts), ranks, rank) for rank in range(num_ranks)]
    memories = exchange(plans, layouts, data)

    file, blocks, checked = bytearray(plan.end), list[int](), []
    buffers = []
    for one, memory in zip(plans, memories, strict=True):
        buffers.append(ShardBuffer(plan, memoryview(memory), one.segments, one.late))
        assert buffers[-1].check(lambda _: None)
        checked.append(buffers[-1].checked)
        for at, chunk in itertools.chain.from_iterable(buffers[-1].chunks()):
            assert at % BLOCK == 0
            file[at : at + len(chunk)] = chunk
            blocks += range(at // BLOCK, -(-(at + len(chunk)) // BLOCK))
    crcs = combine_checksums(plan, checked)
    for at, chunk in buffers[coordinator].complete_late(crcs):
        file[at : at + len(chunk)] = chunk
        blocks += range(at // BLOCK, -(-(at + len(chunk)) // BLOCK))
    assert sorted(blocks) == list(range(-(-plan.end // BLOCK)))
    ends = [end for _, end in plan.write_ranges(num_ranks)]
    for at, header in plan.boundary_headers(ends, crcs):
        file[at : at + len(header)] = header

    whole_layouts = tuple(layout_of(len(one), 1, (1,), (1,)) for one in data[: len(layouts)])
    alone = plan_rank(plan, whole_layouts, (0,), 0)
    (memory,) = exchange([alone], whole_layouts, data)
    whole = bytearray(plan.end)
    buffer = ShardBuffer(plan, memoryview(memory), alone.segments, alone.late)
    assert buffer.check(lambda _: None)
    written = itertools.chain.from_iterable(buffer.chunks())
    for at, chunk in (*written, *buffer.complete_late(combine_checksums(plan, [buffer.checked]))):
        whole[at : at + len(chunk)] = chunk
    for at, header in plan.boundary_headers([plan.ranges_end], crcs):
        whole[at : at + len(header)] = header
    assert bytes(file) == bytes(whole)
    for number, (_, _, offset, num_bytes) in zip(plan.storage_numbers, plan.records, strict=True):
        assert file[offset : offset + num_bytes] == data[number]
    assert build_tail(plan, crcs, b"pickle", b"{}")


def test_few_bytes_are_exchanged() -> None:
    layouts = tuple(layout_of(1000 + number, 1536, (4,), (1,)) for number in range(50))
    plan = plan_image([one.num_bytes for one in layouts], (), len(layouts))
    plans = [plan_rank(plan, layouts, (1, 2, 3, 0), rank) for rank in range(4)]
    exchanged = sum(sent.num_bytes for plan in plans for sent in itertools.chain.from_iterable(plan.sends.values()))
    assert 0 < exchanged <= 4 * BLOCK * len(layouts)
    assert exchanged < 0.02 * plan.end
