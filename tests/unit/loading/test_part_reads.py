"""Any part of a file's tensor is read as indexing would give it, and only the bytes that are needed."""

import ctypes
import math
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distckpt.loading import part_reads
from distckpt.loading.part_reads import TensorPart, read_parts
from distckpt.ptformat.shard_geometry import Ranges, num_indices


class TensorFile:
    """A file that consists of one tensor's bytes; it notes the reads."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.reads: list[int] = []

    def read(self, requests: Any) -> None:
        for address, num_bytes, offset in requests:
            assert 0 <= offset <= offset + num_bytes <= self.tensor.nbytes
            ctypes.memmove(address, self.tensor.data_ptr() + offset, num_bytes)
            self.reads.append(num_bytes)


def read_part(whole: torch.Tensor, ranges: Sequence[Ranges], memory: torch.Tensor) -> list[int]:
    """Read a part of a dense tensor into memory; return the lengths of the reads."""
    file: Any = TensorFile(whole)
    part = TensorPart(memory, ranges, whole.shape, whole.stride(), whole.dtype, 0, whole.is_contiguous())
    read_parts([part], file)
    reads: list[int] = file.reads
    return reads


def select(whole: torch.Tensor, ranges: Sequence[Ranges]) -> torch.Tensor:
    for dim, its_ranges in enumerate(ranges):
        indices = [index for begin, end in its_ranges for index in range(begin, end)]
        whole = whole.index_select(dim, torch.tensor(indices, dtype=torch.int64))
    return whole


def numbered(shape: Sequence[int], order: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a dense tensor whose dimensions are stored in the given order, the last one contiguous."""
    stored = torch.arange(math.prod(shape)).to(dtype).view([shape[dim] for dim in order])
    return stored.permute([order.index(dim) for dim in range(len(shape))])


@st.composite
def parts(draw: st.DrawFn) -> Any:
    shape = draw(st.lists(st.integers(1, 5), max_size=4))
    orders = st.permutations(range(len(shape)))
    ranges = []
    for size in shape:
        ends = sorted(draw(st.sets(st.integers(0, size), max_size=5)))
        found = list(zip(ends[::2], ends[1::2], strict=False))
        ranges.append(draw(st.sampled_from([[(0, size)], found, found[::-1]])))
    return shape, draw(orders), draw(orders), ranges, draw(st.sampled_from([torch.float32, torch.float64]))


@given(parts(), st.sampled_from([4, 24, 64, 1 << 20]), st.sampled_from([0, 16, 1 << 20]))
def test_part_of_any_tensor_is_what_indexing_gives(drawn: Any, buffer_bytes: int, small_bytes: int) -> None:
    shape, file_order, order, ranges, dtype = drawn
    whole = numbered(shape, file_order)
    wanted = select(whole, ranges)
    memory = torch.full_like(numbered([*map(num_indices, ranges)], order, dtype), -1)
    with (
        mock.patch.object(part_reads, "_BUFFER_BYTES", buffer_bytes),
        mock.patch.object(part_reads, "_SMALL_BYTES", small_bytes),
    ):
        reads = read_part(whole, ranges, memory)
    assert torch.equal(memory, wanted.to(dtype))
    if small_bytes == 0:
        assert sum(reads) == wanted.nbytes  # no gap is read
    if dtype != whole.dtype:
        assert max(reads, default=0) <= buffer_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool])
def test_rows_go_straight_into_memory_in_one_read(dtype: torch.dtype) -> None:
    whole = numbered((8, 6), (0, 1)).to(dtype)
    memory = torch.zeros(3, 6).to(dtype)
    assert read_part(whole, [[(2, 5)], [(0, 6)]], memory) == [memory.nbytes]
    assert torch.equal(memory.view(torch.uint8), whole[2:5].view(torch.uint8))


def test_columns_that_are_long_go_straight_into_memory_and_nothing_else_is_read() -> None:
    whole = numbered((4, 65536), (0, 1))
    memory = torch.zeros(4, 32768)
    assert read_part(whole, [[(0, 4)], [(32768, 65536)]], memory) == [131072] * 4
    assert torch.equal(memory, whole[:, 32768:])


def test_columns_that_are_short_are_read_with_their_neighbours() -> None:
    whole = numbered((4, 64), (0, 1))
    memory = torch.zeros(4, 32)
    assert read_part(whole, [[(0, 4)], [(0, 32)]], memory) == [(3 * 64 + 32) * 4]
    assert torch.equal(memory, whole[:, :32])


def test_strided_rows_are_one_read_for_each_range() -> None:
    whole = numbered((8, 6), (0, 1))
    memory = torch.zeros(4, 6)
    assert read_part(whole, [[(0, 2), (4, 6)], [(0, 6)]], memory) == [48, 48]
    assert torch.equal(memory, whole[[0, 1, 4, 5]])


def test_buffer_stays_small_for_a_large_tensor_of_another_dtype() -> None:
    whole = torch.arange(6 << 20, dtype=torch.float32).view(-1, 1024)
    memory = torch.zeros(whole.shape, dtype=torch.float64)
    assert max(read_part(whole, [[(0, len(whole))], [(0, 1024)]], memory)) == 16 << 20
    assert torch.equal(memory, whole.double())


def test_shard_of_no_elements_reads_nothing() -> None:
    assert read_part(numbered((2, 3), (0, 1)), [[], [(0, 3)]], torch.zeros(0, 3)) == []
