"""Which bytes of an image one rank stages, sends to other ranks, receives and writes.

Each block of the file has one writer, so that O_DIRECT and network file systems stay right:

* Up to the first large sharded tensor each writer has a range (:meth:`ImagePlan.write_ranges`). It receives the bytes
  of small sharded tensors from the ranks that hold them.
* A block of a large sharded tensor belongs to the rank that holds the block's first byte. That rank receives the rest
  of its last block from the next rank.
* The block in which a large sharded tensor ends also has the header of the next record. It belongs to the coordinator,
  which writes it when all checksums are known.

The coordinator writes all else. Every rank computes its own plan from the layouts, which are equal on all ranks. So
what one rank sends is what another one expects, and no rank needs the plans of the others. Rank-local; issues no
collectives.
"""

import bisect
import functools
import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from distckpt.ptformat.image import CopyItem, ImagePlan, Segment
from distckpt.ptformat.layout import RecordLocation, align_up
from distckpt.saving.sharding import Holder, ShardLayout, find_holders, written_pieces
from distckpt.storage.base import BLOCK_BYTES


class Sent(NamedTuple):
    """Bytes of this rank's shard of a storage that another rank writes; `begin` is an offset in the shard."""

    storage: int
    begin: int
    num_bytes: int


class Received(NamedTuple):
    """Bytes from another rank: their offset in the image, and in this rank's memory."""

    offset: int
    at: int
    num_bytes: int


@dataclass(slots=True)
class RankPlan:
    """What one rank does for a file.

    Attributes:
        num_bytes: length of the memory that it needs.
        segments: the parts of the image that it writes, in ascending order.
        late: the parts that it writes after the checksums of all ranks are known.
        copies: from its own storages into its memory. For a sharded tensor, offsets count in the rank's own shard.
        sends: by rank, what it sends, in the order of the file.
        receives: by rank, what it receives, in the order of the file.
    """

    num_bytes: int = 0
    segments: list[Segment] = field(default_factory=list)
    late: list[Segment] = field(default_factory=list)
    copies: list[CopyItem] = field(default_factory=list)
    sends: dict[int, list[Sent]] = field(default_factory=lambda: defaultdict(list))
    receives: dict[int, list[Received]] = field(default_factory=lambda: defaultdict(list))


@functools.lru_cache(maxsize=8)
def plan_rank(plan: ImagePlan, layouts: tuple[ShardLayout, ...], writers: tuple[int, ...], rank: int) -> RankPlan:
    """Return one rank's plan; the last few are cached.

    Args:
        plan: plan of the image.
        layouts: of the sharded tensors, by the numbers of their storages. Their ranks are among the writers.
        writers: the ranks that write, in the order of their ranges; the coordinator is the last.
        rank: one of them.
    """
    return _Planner(plan, layouts, writers, rank).run()


class _Planner:
    def __init__(self, plan: ImagePlan, layouts: tuple[ShardLayout, ...], writers: tuple[int, ...], rank: int) -> None:
        self._plan = plan
        self._layouts = layouts
        self._rank = rank
        self._coordinator = writers[-1]
        ranges = plan.write_ranges(len(writers))
        self._ranges = [(begin, end, owner) for (begin, end), owner in zip(ranges, writers, strict=True)]
        self._begins = [begin for begin, _, _ in self._ranges]
        self._own_range = ranges[writers.index(rank)]
        # Cached: most tensors have the layout of another one.
        pieces = functools.cache(written_pieces)
        self._turns = [number % layout.num_replicas for number, layout in enumerate(layouts)]
        self._pieces = [pieces(layout, rank, turn) for layout, turn in zip(layouts, self._turns, strict=True)]
        self._find_holders = functools.cache(lambda *arguments: tuple(find_holders(*arguments)))
        self._found = RankPlan()

    def run(self) -> RankPlan:
        plan, found = self._plan, self._found
        first, last = plan.large
        small = range(first - (plan.num_shards - (last - first)), first)
        self._add(*self._own_range)
        if found.segments:
            ((begin, end, _),) = found.segments
            found.copies += (one._replace(at=one.at - begin) for one in plan.copy_items(begin, end))
            for index in small:
                record = plan.records[index]
                if record.offset < end and record.end > begin:
                    self._fill(index, max(record.offset, begin), min(record.end, end), record.offset - begin)
        for index in small:
            self._send(index, self._owners_of_small(index))
        for index in range(first, last):
            self._add_large(index)
            self._send(index, self._owners_of_large(index))
        if self._rank == self._coordinator and first < last:
            self._add_rest(last)
            self._add_late(first, last)
        found.copies.sort(key=operator.attrgetter("at"))
        for received in found.receives.values():
            received.sort()
        return found

    def _add(self, begin: int, end: int) -> int:
        """Add a part of the image; return its position in the memory minus its offset in the image."""
        at = align_up(self._found.num_bytes, BLOCK_BYTES)
        if begin < end:
            self._found.segments.append(Segment(begin, end, at))
            self._found.num_bytes = at + end - begin
        return at - begin

    def _add_large(self, index: int) -> None:
        """Add the blocks of a large sharded tensor whose first bytes this rank holds."""
        record = self._plan.records[index]
        full = _full_end(record)
        for begin, end, _ in self._pieces[self._plan.storage_numbers[index]]:
            first = record.offset + align_up(begin, BLOCK_BYTES)
            last = min(record.offset + align_up(end, BLOCK_BYTES), full)
            if first < last:
                self._fill(index, first, last, record.offset + self._add(first, last))

    def _add_rest(self, last: int) -> None:
        """Add what follows the last large sharded tensor, and the block in which that tensor ends."""
        record = self._plan.records[last - 1]
        begin, end = _full_end(record), self._plan.end
        to_memory = self._add(begin, end)
        if begin < record.end:
            self._fill(last - 1, begin, record.end, record.offset + to_memory)
        self._found.copies += (one._replace(at=one.at + to_memory) for one in self._plan.copy_items(record.end, end))

    def _add_late(self, first: int, last: int) -> None:
        """Add the blocks in which a large sharded tensor ends and the next one's header stands."""
        at = align_up(self._found.num_bytes, BLOCK_BYTES)
        for index in range(first, last - 1):
            record = self._plan.records[index]
            begin, end = _full_end(record), self._plan.records[index + 1].offset
            self._found.late.append(Segment(begin, end, at))
            if begin < record.end:
                self._fill(index, begin, record.end, record.offset + at - begin)
            at += end - begin
        self._found.num_bytes = at

    def _fill(self, index: int, begin: int, end: int, to_memory: int) -> None:
        """Add the copies and receives of bytes of a sharded record that this rank writes.

        Args:
            index: of the record.
            begin: offset in the image.
            end: offset in the image.
            to_memory: offset in the memory of the record's first byte, as if all of the record were there.
        """
        number, offset = self._plan.storage_numbers[index], self._plan.records[index].offset
        layout, turn = self._layouts[number], self._turns[number]
        for first, last, rank in self._find_holders(layout, begin - offset, end - offset, turn):
            if rank == self._rank:
                for piece in self._pieces[number]:
                    low, high = max(first, piece.begin), min(last, piece.end)
                    if low < high:
                        item = CopyItem(number, piece.local + low - piece.begin, low + to_memory, high - low)
                        self._found.copies.append(item)
            else:
                self._found.receives[rank].append(Received(first + offset, first + to_memory, last - first))

    def _send(self, index: int, owners: Iterator[tuple[Holder, int]]) -> None:
        number = self._plan.storage_numbers[index]
        for (begin, end, rank), local in owners:
            if rank != self._rank:
                self._found.sends[rank].append(Sent(number, local, end - begin))

    def _owners_of_small(self, index: int) -> Iterator[tuple[Holder, int]]:
        """Yield the writers of this rank's bytes of a small record, and the bytes' offsets in this rank's shard."""
        record, number = self._plan.records[index], self._plan.storage_numbers[index]
        for begin, end, local in self._pieces[number]:
            at = begin
            while at < end:
                found = bisect.bisect_right(self._begins, record.offset + at) - 1
                _, last, rank = self._ranges[found]
                until = min(last - record.offset, end)
                yield Holder(at, until, rank), local + at - begin
                at = until

    def _owners_of_large(self, index: int) -> Iterator[tuple[Holder, int]]:
        record, number = self._plan.records[index], self._plan.storage_numbers[index]
        full = _full_end(record) - record.offset
        for begin, end, local in self._pieces[number]:
            at = begin
            while at < end:
                block = at // BLOCK_BYTES * BLOCK_BYTES
                until, rank = end, self._coordinator
                if at < full and block == at:
                    until, rank = min(end, full), self._rank
                elif at < full:
                    until = min(block + BLOCK_BYTES, end)
                    ((_, _, rank),) = self._find_holders(self._layouts[number], block, block + 1, self._turns[number])
                yield Holder(at, until, rank), local + at - begin
                at = until


def _full_end(record: RecordLocation) -> int:
    """Return the offset of the block in which a record ends."""
    return record.end // BLOCK_BYTES * BLOCK_BYTES


def split_received(data: Sequence[memoryview], plan: RankPlan) -> Iterator[tuple[int, memoryview]]:
    """Yield what other ranks have sent, and its offset in this rank's memory.

    Args:
        data: from each rank.
        plan: this rank's plan.
    """
    for rank, received in enumerate(data):
        at = 0
        for _, target, num_bytes in plan.receives.get(rank, ()):
            yield target, received[at : at + num_bytes]
            at += num_bytes
