"""Read a part of a file's tensor into memory: only the bytes that are needed, and never the whole tensor.

A part is cut into boxes, each a range of every dimension. A box is read in spans, which are contiguous in the file.
Spans go straight into memory that is laid out like them. Others go through a buffer of limited size, from which torch
copies them with other strides, another dtype, or to another device.

For a plain tensor the part is the whole tensor: one box, one span.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Self

import torch

from distckpt.ptformat.reader import OpenCheckpoint, ReadRequest
from distckpt.ptformat.shard_geometry import Ranges

_BUFFER_BYTES = 16 << 20
_SMALL_BYTES = 64 << 10
"""Spans below this are read with their neighbours, if the gap is as small: a call costs as much as such a copy."""


class TensorPart(NamedTuple):
    """A part of a tensor in a file, and the memory to read it into.

    Attributes:
        memory: a dense tensor of the part's shape.
        ranges: of indices of the file's tensor, for each dimension; None if the part is the whole tensor.
        stride: of the file's tensor, which is dense.
        shape: of the file's tensor.
        dtype: of the file's tensor.
        offset: where the tensor's first element is in the file, in bytes.
        is_row_major: whether the file's tensor is contiguous.
    """

    memory: torch.Tensor
    ranges: Sequence[Ranges] | None
    shape: Sequence[int]
    stride: Sequence[int]
    dtype: torch.dtype
    offset: int
    is_row_major: bool

    def is_laid_out_like_file(self) -> bool:
        """Return True if the memory has the file's dtype and order of elements."""
        if self.memory.dtype != self.dtype:
            return False
        if self.is_row_major and self.memory.is_contiguous():
            return True
        return all(_is_row_major(box.memory, box.memory.shape) for box in self.boxes()[:1])

    def single_request(self) -> ReadRequest | None:
        """Return the request that reads the whole part, if it is contiguous in file and memory; a quick check."""
        memory = self.memory
        if not (self.is_row_major and memory.is_cpu and memory.dtype == self.dtype and memory.is_contiguous()):
            return None
        begin = 0
        if self.ranges:
            if memory.shape[1:] != self.shape[1:] or any(len(one) != 1 for one in self.ranges):
                return None
            begin = self.ranges[0][0][0] * self.stride[0]
        return ReadRequest(memory.data_ptr(), memory.nbytes, self.offset + begin * self.dtype.itemsize)

    def boxes(self) -> list["_Box"]:
        """Return the part's boxes. Their dimensions are in the order of the file's strides, without those of size 1."""
        flat = [dim for dim, size in enumerate(self.shape) if size == 1]
        dims = sorted(set(range(len(self.shape))) - set(flat), key=lambda dim: -self.stride[dim])
        if not self.memory.numel():
            return []
        memory = self.memory.detach().permute([*flat, *dims])[(0,) * len(flat)]
        stride = [self.stride[dim] for dim in dims]
        boxes = []
        ranges = [[(0, size)] for size in self.shape] if self.ranges is None else self.ranges
        for one in itertools.product(*(_with_position(ranges[dim]) for dim in dims)):
            box = memory
            for dim, (begin, end, position) in enumerate(one):
                box = box.narrow(dim, position, end - begin)
            first = sum(begin * step for (begin, _, _), step in zip(one, stride, strict=True))
            boxes.append(_Box(box, stride, self.dtype, self.offset + first * self.dtype.itemsize))
        return boxes


def _with_position(ranges: Ranges) -> Iterator[tuple[int, int, int]]:
    position = 0
    for begin, end in ranges:
        yield begin, end, position
        position += end - begin


class _Box(NamedTuple):
    """A range of each dimension. The file's strides do not increase.

    Attributes:
        memory: takes the elements.
        stride: of the file's tensor.
        dtype: of the file's tensor.
        offset: where the first element is in the file, in bytes.
    """

    memory: torch.Tensor
    stride: Sequence[int]
    dtype: torch.dtype
    offset: int

    def spans(self) -> tuple[int, int]:
        """Return the number of outer dimensions, over which spans lie apart, and the elements of a span, with gaps."""
        level, span, itemsize = self.memory.dim(), 1, self.dtype.itemsize
        for dim in reversed(range(self.memory.dim())):
            if self.memory.shape[dim] > 1:
                gap = (self.stride[dim] - span) * itemsize
                if gap and max(gap, span * itemsize) >= _SMALL_BYTES:
                    break
                span += (self.memory.shape[dim] - 1) * self.stride[dim]
            level = dim
        return level, span

    def direct_requests(self) -> Iterator[ReadRequest] | None:
        """Return the requests that read straight into the memory; None if the bytes need a buffer."""
        memory = self.memory
        level, span = self.spans()
        inner = memory.shape[level:]
        has_gaps = span != math.prod(inner)
        if not memory.is_cpu or memory.dtype != self.dtype or has_gaps or not _is_row_major(memory, inner):
            return None
        outer = memory.shape[:level]
        at = zip(_offsets(outer, memory.stride()), _offsets(outer, self.stride), strict=True)
        size, address = self.dtype.itemsize, memory.data_ptr()
        return (ReadRequest(address + to * size, span * size, self.offset + begin * size) for to, begin in at)

    def pieces(self) -> Iterator[Self]:
        """Yield boxes, parts of this one, that fit into the buffer with their gaps."""
        level, span = self.spans()
        limit = max(_BUFFER_BYTES // self.dtype.itemsize, 1)
        shape = self.memory.shape
        if math.prod(shape[:level]) * span <= limit:
            yield self
            return
        dim = next(dim for dim, size in enumerate(shape) if size > 1)
        # Of the dimensions inside of `level`, one step takes at most its stride.
        one_step = math.prod(shape[dim + 1 : level]) * span if dim < level else self.stride[dim]
        step = max(limit // one_step, 1)
        for begin in range(0, shape[dim], step):
            part = self.memory.narrow(dim, begin, min(step, shape[dim] - begin))
            offset = self.offset + begin * self.stride[dim] * self.dtype.itemsize
            yield from self._replace(memory=part, offset=offset).pieces()

    def copy_through(self, buffer: torch.Tensor, file: OpenCheckpoint) -> None:
        """Read this box, which :meth:`pieces` has returned, into `buffer`, and copy it into the memory."""
        level, span = self.spans()
        outer, size = self.memory.shape[:level], self.dtype.itemsize
        address = buffer.data_ptr()
        file.read(
            (address + number * span * size, span * size, self.offset + begin * size)
            for number, begin in enumerate(_offsets(outer, self.stride))
        )
        packed = [math.prod(outer[dim + 1 :]) * span for dim in range(level)]
        self.memory.copy_(buffer.as_strided(self.memory.shape, [*packed, *self.stride[level:]]))


def _offsets(shape: Sequence[int], stride: Sequence[int]) -> Iterator[int]:
    """Yield the offset of each index, the last dimension fastest."""
    for index in itertools.product(*map(range, shape)):
        yield sum(map(int.__mul__, index, stride))


def _is_row_major(tensor: torch.Tensor, inner: Sequence[int]) -> bool:
    """Return True if the innermost dimensions of a tensor, of shape `inner`, are contiguous."""
    expected = 1
    for size, stride in zip(reversed(inner), reversed(tensor.stride()), strict=False):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def is_dense(tensor: torch.Tensor) -> bool:
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


@torch.no_grad()
def read_parts(parts: Iterable[TensorPart], file: OpenCheckpoint) -> None:
    """Read parts of a file's tensors into their memory.

    Raises:
        OSError: reading failed; some of the memory has been written to.
        CorruptCheckpointError: the file has become shorter; likewise.
    """
    direct: list[Iterable[ReadRequest]] = []
    others: list[_Box] = []
    boxes: list[_Box] = []
    for part in parts:
        request = part.single_request()
        if request is None:
            boxes += part.boxes()
        else:
            direct.append([request])
    for box in boxes:
        requests = box.direct_requests()
        if requests is None:
            others.append(box)
        else:
            direct.append(requests)
    file.read(itertools.chain.from_iterable(direct))
    buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
    for piece in itertools.chain.from_iterable(box.pieces() for box in others):
        level, span = piece.spans()
        num_bytes = math.prod(piece.memory.shape[:level]) * span * piece.dtype.itemsize
        if buffer.numel() < num_bytes:
            buffer = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
        piece.copy_through(buffer[:num_bytes].view(piece.dtype), file)
