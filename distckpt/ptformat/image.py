"""The image of a ``.pt`` file in host memory: the offset of every byte, and the headers between the storages.

The order of the file::

    version, byteorder      a few bytes
    data/...                storages that are equal on all ranks, then small sharded tensors
    data/...                large sharded tensors
    data/...                other storages of the coordinator
    data.pkl                the tail, written by the coordinator when all checksums are known
    distckpt.json
    central directory

All before the tail is the *image*. Up to the first large sharded tensor it is split into write ranges that are aligned
to blocks, one a writer; the last one is the coordinator's. Without large sharded tensors, they cover the whole image.
Of a large sharded tensor each rank writes the blocks of its own bytes (:mod:`distckpt.saving.rank_plan`).

A record's header contains the checksum of the whole record. If a record ends in another writer's range, its header
is left out, and the coordinator writes it when all checksums are known.
"""

import bisect
import functools
import itertools
import mmap
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distckpt._checksum import combine_crc32, crc32
from distckpt.ptformat.layout import (
    LARGE_BYTES,
    RecordLocation,
    align_up,
    alignment_of,
    build_directory,
    header_of,
    local_header,
    locate,
)
from distckpt.storage.base import BLOCK_BYTES, Chunk

CHUNK_BYTES, MOST_BYTES = 8 << 20, 256 << 20
"""Bytes of one part to wait for, and most bytes to write in one call. Powers of two of blocks."""
_GROUP_BYTES = 1 << 20
"""Small records are checksummed in groups of this length, without waiting in between."""
_HEAD = (("version", b"3\n"), ("byteorder", sys.byteorder.encode()))
PICKLE, MANIFEST = "data.pkl", "distckpt.json"
_Known = Callable[[int, int], Sequence[tuple[int, int]] | None]


class Segment(NamedTuple):
    """Bytes of the image from offset `begin` to `end`, which one rank has in its memory from offset `at` on."""

    begin: int
    end: int
    at: int


class CopyItem(NamedTuple):
    """`num_bytes` bytes to copy from offset `begin` of storage number `storage` to offset `at` of the image."""

    storage: int
    begin: int
    at: int
    num_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class ImagePlan:
    """The offset of every byte of an image. Ranks whose storages have equal sizes compute equal plans.

    Attributes:
        head: locations of the constant records.
        records: locations of the storages, in the order of the file.
        storage_numbers: number of the storage in each of `records`.
        shared_end: aligned offset; the bytes before it are equal on all ranks, or sharded.
        end: the image's length.
        num_shards: the storages of lower numbers are sharded tensors.
        large: indices in `records` of the first large sharded tensor, and of the record after the last one.
    """

    head: tuple[RecordLocation, ...]
    records: tuple[RecordLocation, ...]
    storage_numbers: tuple[int, ...]
    shared_end: int
    end: int
    num_shards: int = 0
    large: tuple[int, int] = (0, 0)

    @property
    def ranges_end(self) -> int:
        """Offset up to which the image is split into write ranges."""
        first, last = self.large
        return self.records[first].offset if first < last else self.end

    def write_ranges(self, num_writers: int) -> tuple[tuple[int, int], ...]:
        """Split the image into one range a writer, of lengths as equal as possible; the last is the coordinator's.

        With sharded tensors, ranks whose other storages have different sizes compute the same begins.

        Returns:
            Begin and end by writer. All begins are multiples of 4096, and all ends but the image's.
        """
        equal = -(-(self.shared_end if self.num_shards else self.end) // num_writers)
        cuts = [
            self._cut_before(min(align_up(equal * number, BLOCK_BYTES), self.shared_end))
            for number in range(num_writers)
        ]
        return (*itertools.pairwise(cuts), (cuts[-1], self.ranges_end))

    def _cut_before(self, at: int) -> int:
        """Return the last block boundary up to `at` that does not separate a header from its record's first byte."""
        while number := bisect.bisect_left(self.records, at, key=header_of):
            record = self.records[number - 1]
            if at > record.offset:
                break
            at = record.header // BLOCK_BYTES * BLOCK_BYTES
        return at

    def copy_items(self, begin: int, end: int) -> Iterator[CopyItem]:
        """Yield what to copy for a range of storages that are not sharded, in the image's order."""
        for number, (_, _, offset, num_bytes) in zip(self.storage_numbers, self.records, strict=True):
            last = offset + num_bytes
            if number < self.num_shards:
                continue
            if begin <= offset and last <= end:
                if num_bytes:
                    yield CopyItem(number, 0, offset, num_bytes)
            elif max(offset, begin) < min(last, end):
                first = max(offset, begin)
                yield CopyItem(number, first - offset, first, min(last, end) - first)

    def boundary_headers(self, ends: Collection[int], crcs: Sequence[int]) -> list[Chunk]:
        """Return the headers that no writer could write: their records extend over a range's end.

        Args:
            ends: of the ranges.
            crcs: CRC-32 of each of `records`.
        """
        numbers = {bisect.bisect_left(self.records, end, key=header_of) - 1 for end in ends}
        return [
            Chunk(record.header, local_header(record, crcs[number]))
            for number, record in ((number, self.records[number]) for number in sorted(numbers) if number >= 0)
            if any(record.header < end < record.end for end in ends)
        ]


def plan_image(sizes: Sequence[int], replicated: Collection[int] = (), num_shards: int = 0) -> ImagePlan:
    """Plan the image of storages. The last few plans are cached, since a state mostly keeps its sizes.

    Args:
        sizes: of the storages, in bytes.
        replicated: the numbers of those that are equal on all ranks.
        num_shards: the storages of lower numbers are sharded tensors; their sizes are those of the whole tensors.

    Example:
        >>> plan = plan_image([8, 1 << 20, 0])
        >>> [record.offset for record in plan.records], plan.end
        ([192, 4096, 1052736], 1052736)
    """
    return _plan_image(tuple(sizes), frozenset(replicated), num_shards)


@functools.lru_cache(maxsize=8)
def _plan_image(sizes: tuple[int, ...], replicated: frozenset[int], num_shards: int) -> ImagePlan:
    head, at = _head_locations()
    large = [number for number in range(num_shards) if sizes[number] >= LARGE_BYTES]
    shared = [*sorted(replicated), *(number for number in range(num_shards) if sizes[number] < LARGE_BYTES)]
    own = [number for number in range(num_shards, len(sizes)) if number not in replicated]
    records, shared_end = [], 0
    for number in (*shared, *large, *own):
        record = locate(f"data/{number}", sizes[number], at, alignment=alignment_of(sizes[number]))
        records.append(record)
        at = record.end
        if len(records) == len(shared):
            shared_end = at // BLOCK_BYTES * BLOCK_BYTES
    indices = len(shared), len(shared) + len(large)
    return ImagePlan(head, tuple(records), (*shared, *large, *own), shared_end, at, num_shards, indices)


@functools.cache
def head_bytes() -> bytes:
    """Return the first records of every file, with their headers."""
    records, _ = _head_locations()
    return b"".join(local_header(one, crc32(data)) + data for one, (_, data) in zip(records, _HEAD, strict=True))


def _head_locations() -> tuple[tuple[RecordLocation, ...], int]:
    records, at = [], 0
    for name, data in _HEAD:
        records.append(locate(name, len(data), at))
        at = records[-1].end
    return tuple(records), at


class ShardBuffer:
    """The memory of the parts of an image that one rank writes.

    Two threads work on it: one computes checksums and fills in headers (:meth:`check`), the other writes what is ready
    (:meth:`chunks`).

    Attributes:
        plan: of the image.
        segments: the parts, in ascending order, and where each is in the memory.
        checked: after :meth:`check`, for each record the index, the offset of its first byte here, and the CRC-32 and
            number of its bytes from there on. A record that is here in several parts has several entries.
    """

    def __init__(
        self, plan: ImagePlan, memory: memoryview, segments: Sequence[Segment], late: Sequence[Segment] = ()
    ) -> None:
        self.plan = plan
        self.segments = segments
        self.checked: list[tuple[int, int, int, int]] = []
        self._late = late
        self._memory = self._late_memory = memory
        self._ready = 0
        self._end = max((one.at + one.end - one.begin for one in segments), default=0)
        self._change = threading.Condition()
        self._error: BaseException | None = None

    def check(self, wait_for: Callable[[int], None], known: _Known | None = None) -> bool:
        """Compute the records' checksums, and fill in the headers of those that lie within a part. Any one thread.

        Args:
            wait_for: returns when the memory's bytes up to an offset are there. Its error is raised by :meth:`chunks`.
            known: returns CRC-32 and length of the pieces between two offsets of the memory, if they were computed
                while they were copied.

        Returns:
            True if all checksums were computed.
        """
        try:
            for segment in (*self.segments, *self._late):
                self._put(segment, 0, head_bytes())
                for first, last in self._groups(segment):
                    end = segment.at - segment.begin + min(self.plan.records[last - 1].end, segment.end)
                    wait_for(end)
                    for index in range(first, last):
                        self._check_record(segment, index, self.plan.records[index], known)
                    self._publish(end)
            wait_for(self._end)
            self._publish(self._end)
        except BaseException as error:  # noqa: BLE001 - raised by chunks()
            with self._change:
                self._error = error
                self._change.notify_all()
            return False
        return True

    def chunks(self) -> Iterator[list[Chunk]]:
        """Yield the bytes of all parts, those together that are ready at the same time. Any one thread.

        Raises:
            BaseException: the error of :meth:`check`.
        """
        chunks, num_bytes = list[Chunk](), 0
        for begin, end, first in self.segments:
            at, last = first, first + end - begin
            while at < last:
                least = min(at + CHUNK_BYTES, last)
                if chunks and (self._ready < least or num_bytes == MOST_BYTES):
                    yield chunks
                    chunks, num_bytes = [], 0
                ready = self._wait_for(least)
                most = at + MOST_BYTES - num_bytes
                until = min(last, most, ready if ready >= last else ready // BLOCK_BYTES * BLOCK_BYTES)
                chunks.append(Chunk(end - (last - at), self._memory[at:until]))
                num_bytes += until - at
                at = until
        if chunks:
            yield chunks

    def keep_late(self) -> None:
        """Copy the parts that are written last into memory of their own; the rest of the memory may be reused then."""
        num_bytes = sum(end - begin for begin, end, _ in self._late)
        memory, kept, at = memoryview(mmap.mmap(-1, num_bytes)) if num_bytes else memoryview(b""), list[Segment](), 0
        for begin, end, old in self._late:
            memory[at : at + end - begin] = self._memory[old : old + end - begin]
            kept.append(Segment(begin, end, at))
            at += end - begin
        self._late_memory, self._late = memory, kept

    def complete_late(self, crcs: Sequence[int]) -> Iterator[Chunk]:
        """Fill the missing headers into the parts that are written last; yield these.

        Args:
            crcs: CRC-32 of each of the plan's records.
        """
        for segment in self._late:
            index = bisect.bisect_left(self.plan.records, segment.end, key=header_of) - 1
            record = self.plan.records[index]
            header, at = local_header(record, crcs[index]), segment.at + record.header - segment.begin
            self._late_memory[at : at + len(header)] = header
            yield Chunk(segment.begin, self._late_memory[segment.at : segment.at + segment.end - segment.begin])

    def _publish(self, ready: int) -> None:
        if ready - self._ready >= CHUNK_BYTES or ready == self._end:
            with self._change:
                self._ready = ready
                self._change.notify_all()

    def _wait_for(self, offset: int) -> int:
        """Block until the memory's bytes up to an offset are ready, and return the offset up to which they are."""
        with self._change:
            while self._ready < offset and self._error is None:
                self._change.wait(timeout=1.0)  # with a timeout, so that signal handlers run
            if self._error is not None:
                raise self._error
            return self._ready

    def _groups(self, segment: Segment) -> Iterator[tuple[int, int]]:
        """Yield first and last + 1 of record indices that are checked together."""
        records = self.plan.records
        first = max(bisect.bisect_right(records, segment.begin, key=header_of) - 1, 0)
        last = bisect.bisect_left(records, segment.end, key=header_of)
        while first < last:
            index, until = first + 1, records[first].header + _GROUP_BYTES
            while index < last and records[index].end <= until:
                index += 1
            yield first, index
            first = index

    def _check_record(self, segment: Segment, index: int, record: RecordLocation, known: _Known | None) -> None:
        begin, end, at = segment
        _, header, offset, num_bytes = record
        to_memory = at - begin
        if begin <= header and offset + num_bytes <= end and num_bytes < LARGE_BYTES:
            crc = crc32(self._memory[offset + to_memory : offset + num_bytes + to_memory]) if num_bytes else 0
            self._memory[header + to_memory : offset + to_memory] = local_header(record, crc)
            if num_bytes:
                self.checked.append((index, 0, crc, num_bytes))
            return
        first, last = max(offset, begin), min(record.end, end)
        crc, num_bytes = 0, max(last - first, 0)
        if num_bytes:
            parts = None if known is None else known(first + to_memory, last + to_memory)
            memory = self._memory[first + to_memory : last + to_memory]
            crc = crc32(memory) if parts is None else combine_crc32(parts)
            self.checked.append((index, first - offset, crc, num_bytes))
        if begin <= header and record.end <= end:
            self._put(segment, header, local_header(record, crc))

    def _put(self, segment: Segment, offset: int, data: bytes) -> None:
        """Put bytes of the image into the memory, as far as they are in a segment."""
        first, last = max(offset, segment.begin), min(offset + len(data), segment.end)
        if first < last:
            at = segment.at + first - segment.begin
            self._memory[at : at + last - first] = data[first - offset : last - offset]


def combine_checksums(plan: ImagePlan, checked: Iterable[Sequence[tuple[int, int, int, int]]]) -> list[int]:
    """Return the CRC-32 of each of the plan's records, from the :attr:`ShardBuffer.checked` of all writers.

    Raises:
        ValueError: some bytes are missing, or counted twice.
    """
    parts: list[list[tuple[int, int, int]]] = [[] for _ in plan.records]
    for index, begin, crc, num_bytes in itertools.chain.from_iterable(checked):
        parts[index].append((begin, crc, num_bytes))
    for record, found in zip(plan.records, parts, strict=True):
        found.sort()
        at = 0
        for begin, _, num_bytes in found:
            at = at + num_bytes if begin == at else -1
            if at < 0:
                break
        if at != record.num_bytes:
            raise ValueError(f"the checksums of record {record.name} do not cover its {record.num_bytes} bytes once")
    return [combine_crc32([one[1:] for one in found]) for found in parts]


def build_tail(plan: ImagePlan, crcs: Sequence[int], pickled: bytes, manifest: bytes) -> bytes:
    """Return the bytes after the image: pickle, manifest and central directory."""
    records = [(record, crc32(data)) for record, (_, data) in zip(plan.head, _HEAD, strict=True)]
    records += zip(plan.records, crcs, strict=True)
    at, tail = plan.end, b""
    for name, data in ((PICKLE, pickled), (MANIFEST, manifest)):
        record, crc = locate(name, len(data), at), crc32(data)
        tail += local_header(record, crc) + data
        records.append((record, crc))
        at = record.end
    return tail + build_directory(records, at)
