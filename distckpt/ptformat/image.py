"""The image of a ``.pt`` file in host memory: the offset of every byte, and the headers between the storages.

The order of the file::

    version, byteorder      a few bytes
    data/...                storages that are equal on all ranks
    data/...                other storages of the coordinator
    data.pkl                the tail, written by the coordinator when all checksums are known
    distckpt.json
    central directory

All before the tail is the *image*. It is split into write ranges that are aligned to blocks, one a writer; the last one
is the coordinator's. A record's header contains the checksum of the whole record. Where a record ends in another
writer's range, its header is left out, and the coordinator writes it when all checksums are known.
"""

import bisect
import functools
import itertools
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
from distckpt.storage.base import BLOCK_BYTES

CHUNK_BYTES, MOST_BYTES = 8 << 20, 256 << 20
"""Least and most bytes of one write. Powers of two of blocks."""
_GROUP_BYTES = 1 << 20
"""Small records are checksummed in groups of this length, without waiting in between."""
_HEAD = (("version", b"3\n"), ("byteorder", sys.byteorder.encode()))
PICKLE, MANIFEST = "data.pkl", "distckpt.json"
_Known = Callable[[int, int], Sequence[tuple[int, int]] | None]


class CopyItem(NamedTuple):
    """`num_bytes` bytes to copy from offset `begin` of a storage, which has a number, to offset `at` of the image."""

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
        shared_end: aligned offset; the bytes before it are equal on all ranks.
        end: the image's length.
    """

    head: tuple[RecordLocation, ...]
    records: tuple[RecordLocation, ...]
    storage_numbers: tuple[int, ...]
    shared_end: int
    end: int

    def write_ranges(self, num_writers: int, coordinator_index: int) -> tuple[tuple[int, int], ...]:
        """Split the image into one range a writer, of lengths as equal as possible; the last is the coordinator's.

        Returns:
            Begin and end by writer. All begins are multiples of 4096, and all ends but the image's.
        """
        equal = -(-self.end // num_writers)
        cuts = [
            self._cut_before(min(align_up(equal * number, BLOCK_BYTES), self.shared_end))
            for number in range(num_writers)
        ]
        ranges = [*itertools.pairwise(cuts), (cuts[-1], self.end)]
        others = iter(ranges[:-1])
        return tuple(ranges[-1] if number == coordinator_index else next(others) for number in range(num_writers))

    def _cut_before(self, at: int) -> int:
        """Return the last block boundary up to `at` that does not separate a header from its record's first byte."""
        while number := bisect.bisect_left(self.records, at, key=header_of):
            record = self.records[number - 1]
            if at > record.offset:
                break
            at = record.header // BLOCK_BYTES * BLOCK_BYTES
        return at

    def copy_items(self, begin: int, end: int) -> Iterator[CopyItem]:
        """Yield what to copy for a range, in the image's order."""
        for number, (_, _, offset, num_bytes) in zip(self.storage_numbers, self.records, strict=True):
            last = offset + num_bytes
            if begin <= offset and last <= end:
                if num_bytes:
                    yield CopyItem(number, 0, offset, num_bytes)
            elif max(offset, begin) < min(last, end):
                first = max(offset, begin)
                yield CopyItem(number, first - offset, first, min(last, end) - first)

    def boundary_headers(self, ends: Collection[int], crcs: Sequence[int]) -> list[tuple[int, bytes]]:
        """Return offsets and bytes of the headers that no writer could write: their records extend over a range's end.

        Args:
            ends: of the ranges.
            crcs: CRC-32 of each of `records`.
        """
        numbers = {bisect.bisect_left(self.records, end, key=header_of) - 1 for end in ends}
        return [
            (record.header, local_header(record, crcs[number]))
            for number, record in ((number, self.records[number]) for number in sorted(numbers) if number >= 0)
            if any(record.header < end < record.end for end in ends)
        ]


def plan_image(sizes: Sequence[int], replicated: Collection[int] = ()) -> ImagePlan:
    """Plan the image of storages from their sizes in bytes and the numbers of those that are equal on all ranks.

    The last few plans are cached, since a state mostly keeps its sizes.

    Example:
        >>> plan = plan_image([8, 1 << 20, 0])
        >>> [record.offset for record in plan.records], plan.end
        ([192, 4096, 1052736], 1052736)
    """
    return _plan_image(tuple(sizes), frozenset(replicated))


@functools.lru_cache(maxsize=8)
def _plan_image(sizes: tuple[int, ...], replicated: frozenset[int]) -> ImagePlan:
    head, at = _head_locations()
    shared = sorted(replicated)
    own = [number for number in range(len(sizes)) if number not in replicated] if shared else range(len(sizes))
    records, shared_end = [], 0
    for number in (*shared, *own):
        record = locate(f"data/{number}", sizes[number], at, alignment=alignment_of(sizes[number]))
        records.append(record)
        at = record.end
        if len(records) == len(shared):
            shared_end = at // BLOCK_BYTES * BLOCK_BYTES
    return ImagePlan(head, tuple(records), (*shared, *own), shared_end, at)


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
    """The memory of one writer's range of an image.

    Two threads work on it: one computes checksums and fills in headers (:meth:`check`), the other writes what is ready
    (:meth:`chunks`).

    Attributes:
        plan: of the image.
        begin: offset of the range in the image.
        end: offset of its end.
        checked: after :meth:`check`, number, CRC-32 and length of each record's bytes in this range.
    """

    def __init__(self, plan: ImagePlan, memory: memoryview, begin: int, end: int) -> None:
        self.plan = plan
        self.begin = begin
        self.end = end
        self.checked: list[tuple[int, int, int]] = []
        self._memory = memory[: end - begin]
        self._ready = begin
        self._change = threading.Condition()
        self._error: BaseException | None = None

    def check(self, wait_for: Callable[[int], None], known: _Known | None = None) -> bool:
        """Compute the records' checksums, and fill in the headers of those that lie within the range. Any one thread.

        Args:
            wait_for: returns when the image's bytes up to an offset are in memory. Its error is raised by
                :meth:`chunks`.
            known: returns CRC-32 and length of the pieces between two offsets of a record, if they were computed while
                they were copied.

        Returns:
            True if all checksums were computed.
        """
        try:
            self._put(0, head_bytes())
            for first, last in self._groups():
                end = min(self.plan.records[last - 1].end, self.end)
                wait_for(end)
                for number in range(first, last):
                    self._check_record(number, self.plan.records[number], known)
                self._publish(end)
            wait_for(self.end)
            self._publish(self.end)
        except BaseException as error:  # noqa: BLE001 - raised by chunks()
            with self._change:
                self._error = error
                self._change.notify_all()
            return False
        return True

    def chunks(self) -> Iterator[tuple[int, memoryview]]:
        """Yield the range's bytes with their offsets in the file, as they become ready. Any one thread.

        Raises:
            BaseException: the error of :meth:`check`.
        """
        at = self.begin
        while at < self.end:
            ready = self._wait_for(min(at + CHUNK_BYTES, self.end))
            until = ready if ready == self.end else ready // BLOCK_BYTES * BLOCK_BYTES
            until = min(until, at + MOST_BYTES)
            yield at, self._memory[at - self.begin : until - self.begin]
            at = until

    def _publish(self, ready: int) -> None:
        if ready - self._ready >= CHUNK_BYTES or ready == self.end:
            with self._change:
                self._ready = ready
                self._change.notify_all()

    def _wait_for(self, offset: int) -> int:
        """Block until the bytes up to an offset are ready, and return up to where they are."""
        with self._change:
            while self._ready < offset and self._error is None:
                self._change.wait(timeout=1.0)  # with a timeout, so that signal handlers run
            if self._error is not None:
                raise self._error
            return self._ready

    def _groups(self) -> Iterator[tuple[int, int]]:
        """Yield first and last + 1 of record numbers that are checked together."""
        records = self.plan.records
        first = max(bisect.bisect_right(records, self.begin, key=header_of) - 1, 0)
        last = bisect.bisect_left(records, self.end, key=header_of)
        while first < last:
            number, until = first + 1, records[first].header + _GROUP_BYTES
            while number < last and records[number].end <= until:
                number += 1
            yield first, number
            first = number

    def _check_record(self, number: int, record: RecordLocation, known: _Known | None) -> None:
        begin, end = self.begin, self.end
        _, header, offset, num_bytes = record
        if begin <= header and offset + num_bytes <= end and num_bytes < LARGE_BYTES:
            crc = crc32(self._memory[offset - begin : offset + num_bytes - begin]) if num_bytes else 0
            self._memory[header - begin : offset - begin] = local_header(record, crc)
            if num_bytes:
                self.checked.append((number, crc, num_bytes))
            return
        first, last = max(offset, begin), min(record.end, end)
        crc, num_bytes = 0, max(last - first, 0)
        if num_bytes:
            parts = None if known is None else known(first, last)
            crc = crc32(self._memory[first - begin : last - begin]) if parts is None else combine_crc32(parts)
            self.checked.append((number, crc, num_bytes))
        if begin <= header and record.end <= end:
            self._put(header, local_header(record, crc))

    def _put(self, at: int, data: bytes) -> None:
        """Put bytes of the image into the memory, as far as they are in the range."""
        first, last = max(at, self.begin), min(at + len(data), self.end)
        if first < last:
            self._memory[first - self.begin : last - self.begin] = data[first - at : last - at]


def combine_checksums(plan: ImagePlan, checked: Iterable[Sequence[tuple[int, int, int]]]) -> list[int]:
    """Return the CRC-32 of each of the plan's records, from :attr:`ShardBuffer.checked` in the order of the ranges.

    Raises:
        ValueError: some bytes are missing, or counted twice.
    """
    parts: list[list[tuple[int, int]]] = [[] for _ in plan.records]
    for number, crc, num_bytes in itertools.chain.from_iterable(checked):
        parts[number].append((crc, num_bytes))
    for record, found in zip(plan.records, parts, strict=True):
        num_bytes = sum(num_bytes for _, num_bytes in found)
        if num_bytes != record.num_bytes:
            raise ValueError(f"{num_bytes} of {record.num_bytes} bytes of record {record.name} have a checksum")
    return [combine_crc32(found) for found in parts]


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
