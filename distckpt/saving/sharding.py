"""Which bytes of a whole tensor a rank holds, for tensors that are sharded along their rows.

The file holds the whole tensor, row by row. A rank's rows are one range of its bytes, or a few ranges for a strided
shard. Of the ranks that hold the same rows, each writes a part. All functions are arithmetic on shapes: ranks that know
the same layout compute the same result. Rank-local; issues no collectives.

Source: ``torch.chunk``, by which ``torch.distributed.tensor.Shard`` splits; ``_StridedShard`` of torch 2.13.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from distckpt.ptformat.layout import align_up
from distckpt.ptformat.shard_geometry import chunk_of, split_dimension
from distckpt.storage.base import BLOCK_BYTES

Ranges = tuple[tuple[int, int], ...]
"""Begin and end of ranges, in the order of the local shard."""


@dataclass(frozen=True, slots=True, eq=False)
class Mesh:
    """The ranks of a device mesh. Made by :func:`make_mesh`: equal meshes are one object.

    Attributes:
        ranks: in row-major order.
        shape: size of each dimension.
        coordinates: of each rank.
    """

    ranks: tuple[int, ...]
    shape: tuple[int, ...]
    coordinates: dict[int, tuple[int, ...]]


@functools.lru_cache(maxsize=256)
def make_mesh(ranks: tuple[int, ...], shape: tuple[int, ...]) -> Mesh:
    """Return the mesh of some ranks, in row-major order."""
    return Mesh(ranks, shape, dict(zip(ranks, itertools.product(*map(range, shape)), strict=True)))


class ShardLayout(NamedTuple):
    """How the ranks of a device mesh hold the rows of a tensor.

    Attributes:
        num_rows: size of the tensor's first dimension.
        row_bytes: bytes of a row.
        mesh: the mesh.
        splits: for each dimension of the mesh, 0 if its ranks hold the same rows, 1 if they split the rows, and n > 1
            if they split each of n parts of the rows (a ``_StridedShard``).
        num_replicas: number of ranks that hold the same rows.

    Example:
        >>> layout = ShardLayout(num_rows=5, row_bytes=8, mesh=make_mesh((0, 1), (2,)), splits=(1,))
        >>> held_bytes(layout, 0), held_bytes(layout, 1)
        (((0, 24),), ((24, 40),))
    """

    num_rows: int
    row_bytes: int
    mesh: Mesh
    splits: tuple[int, ...]
    num_replicas: int = 1

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the whole tensor."""
        return self.num_rows * self.row_bytes


class Piece(NamedTuple):
    """Bytes of a record that one rank writes.

    Attributes:
        begin: offset in the record.
        end: offset in the record.
        local: offset of the first byte in the rank's own shard.
    """

    begin: int
    end: int
    local: int


class Holder(NamedTuple):
    """Bytes of a record, and the rank that writes them. Offsets are in the record."""

    begin: int
    end: int
    rank: int


def held_bytes(layout: ShardLayout, rank: int) -> Ranges:
    """Return the ranges of the whole tensor that a rank holds, in the order of its shard; none outside the mesh."""
    coordinate = layout.mesh.coordinates.get(rank)
    if coordinate is None:
        return ()
    rows = _rows(layout.num_rows, layout.mesh.shape, layout.splits, coordinate)
    return tuple((begin * layout.row_bytes, end * layout.row_bytes) for begin, end in rows)


def written_pieces(layout: ShardLayout, rank: int, turn: int = 0) -> list[Piece]:
    """Return the bytes that a rank writes: its part of those that several ranks hold.

    Args:
        layout: of the tensor.
        rank: the rank.
        turn: number of the tensor, by which tensors that are too short to be split are spread over the ranks.
    """
    pieces, local = [], 0
    held = held_bytes(layout, rank)
    replica = _replica(layout, rank, turn) if held and layout.num_replicas > 1 else 0
    for begin, end in held:
        first, last = _part(begin, end, replica, layout.num_replicas)
        if first < last:
            pieces.append(Piece(first, last, local + first - begin))
        local += end - begin
    return pieces


def find_holders(layout: ShardLayout, begin: int, end: int, turn: int = 0) -> Iterator[Holder]:
    """Yield which rank writes the bytes between two offsets of a record, in ascending order."""
    num_replicas = layout.num_replicas
    while begin < end:
        first, last, shard = _shard_at(layout, begin)
        for number in range(num_replicas):
            low, high = _part(first, last, number, num_replicas)
            if max(low, begin) < min(high, end):
                yield Holder(max(low, begin), min(high, end), _rank_of(layout, shard, number, turn))
        begin = last


@functools.lru_cache(maxsize=4096)
def _rows(num_rows: int, mesh_shape: tuple[int, ...], splits: tuple[int, ...], coordinate: tuple[int, ...]) -> Ranges:
    """Return the rows of the shard at a coordinate of the mesh. Dimensions of the mesh split from left to right."""
    places = zip(mesh_shape, coordinate, splits, strict=True)
    return tuple(split_dimension(num_rows, [(0, size, number, split) for size, number, split in places if split]))


def _part(begin: int, end: int, number: int, count: int) -> tuple[int, int]:
    """Return the part of a range that one of `count` replicas writes, cut at blocks."""
    if count == 1:
        return begin, end
    cuts = [min(align_up(begin + (end - begin) * index // count, BLOCK_BYTES), end) for index in (number, number + 1)]
    return cuts[0] if number else begin, cuts[1] if number + 1 < count else end


def _replica(layout: ShardLayout, rank: int, turn: int) -> int:
    """Return the number of a rank among the ranks that hold the same rows."""
    number = 0
    for size, split, at in zip(layout.mesh.shape, layout.splits, layout.mesh.coordinates[rank], strict=True):
        if not split:
            number = number * size + at
    return (number + turn) % layout.num_replicas


def _rank_of(layout: ShardLayout, shard: int, replica: int, turn: int) -> int:
    """Return the rank of a shard and a replica; :func:`_replica` is the inverse."""
    replica = (replica - turn) % layout.num_replicas
    coordinate = []
    for size, split in zip(reversed(layout.mesh.shape), reversed(layout.splits), strict=True):
        if split:
            shard, number = divmod(shard, size)
        else:
            replica, number = divmod(replica, size)
        coordinate.append(number)
    index = 0
    for size, number in zip(layout.mesh.shape, reversed(coordinate), strict=True):
        index = index * size + number
    return layout.mesh.ranks[index]


def _shard_at(layout: ShardLayout, offset: int) -> tuple[int, int, int]:
    """Return begin and end of the range of bytes that contains an offset, and the number of its shard."""
    row = offset // layout.row_bytes
    if max(layout.splits, default=0) > 1:
        table = _table(layout.num_rows, layout.mesh.shape, layout.splits)
        begin, end, shard = next(one for one in table if one[0] <= row < one[1])
        return begin * layout.row_bytes, end * layout.row_bytes, shard
    begin, end, shard = 0, layout.num_rows, 0
    for size, split in zip(layout.mesh.shape, layout.splits, strict=True):
        if split:
            number = (row - begin) // max(-(-(end - begin) // size), 1)
            first, last = chunk_of(end - begin, size, number)
            begin, end = begin + first, begin + last
            shard = shard * size + number
    return begin * layout.row_bytes, end * layout.row_bytes, shard


@functools.lru_cache(maxsize=256)
def _table(num_rows: int, mesh_shape: tuple[int, ...], splits: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Return begin, end and shard of all ranges of rows, in ascending order."""
    found = []
    sizes = [size if split else 1 for size, split in zip(mesh_shape, splits, strict=True)]
    for shard, coordinate in enumerate(itertools.product(*map(range, sizes))):
        found += [(begin, end, shard) for begin, end in _rows(num_rows, mesh_shape, splits, coordinate)]
    return sorted(found)
