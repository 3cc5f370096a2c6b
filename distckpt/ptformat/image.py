"""The image of a ``.pt`` in host memory: which byte of which storage comes to lie where, and the bytes around them.

Owns offsets, shares of several writers, headers and checksums of one image. Must not know how the bytes come into
memory, nor how they reach the disk.

The order of the file::

    version, byteorder      a few bytes
    data/...                storages that are equal on all ranks, large ones on borders of 4096 bytes
    data/...                storages of the saving rank's own, likewise
    data.pkl                the tail, of the saving rank's, made when all checksums are known
    distckpt.json           ... so is this
    central directory       ... and this

All before the tail is the *image*. It is cut into shares on borders of 4096 bytes, one a rank; the last one is the
saving rank's. The header of a record tells the checksum of the whole record: where the end of one lies in another's
share, its header is left out, and the saving rank puts it there when all checksums are known.
"""

import bisect
import functools
import itertools
import operator
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distckpt._checksum import combine_crc32, crc32
from distckpt.ptformat.layout import (
    LARGE_BYTES,
    Slot,
    alignment_of,
    border_from,
    directory,
    local_header,
    place,
)
from distckpt.storage.base import BLOCK_BYTES

__all__ = ["CHUNK_BYTES", "ImagePlan", "Part", "Piece", "crcs_of", "plan_image", "tail_of"]

CHUNK_BYTES, MOST_BYTES = 8 << 20, 256 << 20
"""What is written at once, at least and at most. Powers of two of blocks."""

_GROUP_BYTES = 1 << 20
"""Records that are checked in one go, without looking whether more is ready."""

_Known = Callable[[int, int], Sequence[tuple[int, int]] | None]
_HEAD = (("version", b"3\n"), ("byteorder", sys.byteorder.encode()))
PICKLE, MANIFEST = "data.pkl", "distckpt.json"


class Piece(NamedTuple):
    """Bytes to be copied from a storage into the image.

    Attributes:
        storage: number of the storage.
        begin: where in the storage they begin.
        at: where in the image they go.
        num_bytes: how many.
    """

    storage: int
    begin: int
    at: int
    num_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class ImagePlan:
    """Where every byte of an image lies. Computed alike on every rank whose state is of the same form.

    Attributes:
        head: the slots of the constant records.
        slots: the storages' slots, in the order of the file.
        order: the number of the storage in each of them.
        shared_end: up to where in the image the bytes are equal on all ranks; a border.
        end: the image's length, and where the tail begins.
    """

    head: tuple[Slot, ...]
    slots: tuple[Slot, ...]
    order: tuple[int, ...]
    shared_end: int
    end: int

    def shares(self, num_ranks: int, saving_rank: int) -> tuple[tuple[int, int], ...]:
        """Cut the image into one share a rank, as equal as it goes; the saving rank's is the last.

        Returns:
            For each rank where its share begins and ends. Begins, and all ends but the image's, are on borders of
            4096 bytes.
        """
        equal = -(-self.end // num_ranks)
        cuts = [self._cut_near(min(border_from(equal * number), self.shared_end)) for number in range(num_ranks)]
        ranges = [*itertools.pairwise(cuts), (cuts[-1], self.end)]
        others = iter(ranges[:-1])
        return tuple(ranges[-1] if rank == saving_rank else next(others) for rank in range(num_ranks))

    def _cut_near(self, at: int) -> int:
        """Return the last border up to `at` that leaves no header apart from the first byte of its record."""
        while number := bisect.bisect_left(self.slots, at, key=_header_of):
            slot = self.slots[number - 1]
            if at > slot.offset:
                break
            at = slot.header // BLOCK_BYTES * BLOCK_BYTES
        return at

    def pieces(self, begin: int, end: int) -> Iterator[Piece]:
        """Yield what is to be copied for a share, in the image's order."""
        for number, (_, _, offset, num_bytes) in zip(self.order, self.slots, strict=True):
            last = offset + num_bytes
            if begin <= offset and last <= end:
                if num_bytes:
                    yield Piece(number, 0, offset, num_bytes)
            elif max(offset, begin) < min(last, end):
                first = max(offset, begin)
                yield Piece(number, first - offset, first, min(last, end) - first)

    def cut_headers(self, cuts: Collection[int], crcs: Sequence[int]) -> list[tuple[int, bytes]]:
        """Return the headers that no share's writer could put: of the records that a cut goes through.

        Args:
            cuts: where shares end.
            crcs: of all records, in the order of the slots.

        Returns:
            Offsets in the file, and what goes there.
        """
        before = {bisect.bisect_left(self.slots, cut, key=_header_of) - 1 for cut in cuts}
        return [
            (self.slots[number].header, local_header(self.slots[number], crcs[number]))
            for number in sorted(before)
            if number >= 0 and any(self.slots[number].header < cut < self.slots[number].end for cut in cuts)
        ]


_header_of = operator.attrgetter("header")


@functools.cache
def _head_bytes() -> bytes:
    """Return what every file begins with: the records before the storages, headers and all."""
    slots, _ = _head_slots()
    return b"".join(local_header(slot, crc32(data)) + data for slot, (_, data) in zip(slots, _HEAD, strict=True))


def _head_slots() -> tuple[tuple[Slot, ...], int]:
    slots, at = [], 0
    for name, data in _HEAD:
        slots.append(place(name, len(data), at))
        at = slots[-1].end
    return tuple(slots), at


def plan_image(sizes: Sequence[int], replicated: Collection[int] = ()) -> ImagePlan:
    """Plan the image of storages.

    One of the last few that were planned is handed out again: mostly a state's form stays as it is.

    Args:
        sizes: each storage's, in bytes.
        replicated: the numbers of those that are equal on all ranks.

    Example:
        >>> plan = plan_image([8, 1 << 20, 0])
        >>> [slot.offset for slot in plan.slots], plan.end
        ([192, 4096, 1052736], 1052736)
    """
    return _plan_image(tuple(sizes), frozenset(replicated))


@functools.lru_cache(maxsize=8)
def _plan_image(sizes: tuple[int, ...], replicated: frozenset[int]) -> ImagePlan:
    head, at = _head_slots()
    shared = sorted(replicated)
    own = [number for number in range(len(sizes)) if number not in replicated] if shared else range(len(sizes))
    slots, shared_end = [], 0
    for number in (*shared, *own):
        slot = place(f"data/{number}", sizes[number], at, border=alignment_of(sizes[number]))
        slots.append(slot)
        at = slot.end
        if len(slots) == len(shared):
            shared_end = at // BLOCK_BYTES * BLOCK_BYTES
    return ImagePlan(head, tuple(slots), (*shared, *own), shared_end, at)


class Part:
    """One rank's share of an image in its memory, on the way to the disk.

    Two threads work on it: one checks the bytes and puts headers before them (:meth:`check`), the other takes what is
    ready (:meth:`chunks`).

    Args:
        plan: the image's.
        memory: of the share's length, or longer.
        begin: where in the image the share begins.
        end: where it ends.

    Attributes:
        checked: (slot's number, CRC-32, bytes) of each record's bytes in this share, once they were checked.
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
        """Check each record's bytes in this share, and put its header before them if all of them are. Any one thread.

        Args:
            wait_for: returns when the image's bytes up to an offset are in memory. What it raises, whoever takes the
                chunks gets.
            known: returns the CRC-32 and the length of each of the pieces between two offsets of a record, if they were
                checked on their way into memory.

        Returns:
            Whether it came to its end.
        """
        try:
            self._put_head()
            for first, last in self._groups():
                end = min(self.plan.slots[last - 1].end, self.end)
                wait_for(end)
                for number in range(first, last):
                    self._check(number, self.plan.slots[number], known)
                self._tell(end)
            wait_for(self.end)
            self._tell(self.end)
        except BaseException as error:  # noqa: BLE001 - raised where the chunks are taken
            with self._change:
                self._error = error
                self._change.notify_all()
            return False
        return True

    def chunks(self) -> Iterator[tuple[int, memoryview]]:
        """Yield the share's bytes in chunks, each with its offset in the file, headers and all. Any one thread.

        A chunk holds what is ready, within limits: who writes it need not come back too often.

        Raises:
            BaseException: what kept :meth:`check` from its end.
        """
        at = self.begin
        while at < self.end:
            ready = self._wait_for(min(at + CHUNK_BYTES, self.end))
            until = ready if ready == self.end else ready // BLOCK_BYTES * BLOCK_BYTES
            until = min(until, at + MOST_BYTES)
            yield at, self._memory[at - self.begin : until - self.begin]
            at = until

    def _tell(self, ready: int) -> None:
        if ready - self._ready >= CHUNK_BYTES or ready == self.end:
            with self._change:
                self._ready = ready
                self._change.notify_all()

    def _wait_for(self, offset: int) -> int:
        """Wait until the bytes up to an offset are ready, and return up to where they are."""
        with self._change:
            while self._ready < offset and self._error is None:
                self._change.wait(timeout=1.0)  # not for ever: a signal handler may want its turn
            if self._error is not None:
                raise self._error
            return self._ready

    def _groups(self) -> Iterator[tuple[int, int]]:
        """Yield the numbers of the share's records, from the first to before the last: small ones together."""
        slots = self.plan.slots
        first = max(bisect.bisect_right(slots, self.begin, key=_header_of) - 1, 0)
        last = bisect.bisect_left(slots, self.end, key=_header_of)
        while first < last:
            number, until = first + 1, slots[first].header + _GROUP_BYTES
            while number < last and slots[number].end <= until:
                number += 1
            yield first, number
            first = number

    def _put_head(self) -> None:
        self._put(0, _head_bytes())

    def _check(self, number: int, slot: Slot, known: _Known | None) -> None:
        """Check what is in this share of a record's bytes, which are in memory."""
        begin, end = self.begin, self.end
        _, header, offset, num_bytes = slot
        if begin <= header and offset + num_bytes <= end and num_bytes < LARGE_BYTES:
            crc = crc32(self._memory[offset - begin : offset + num_bytes - begin]) if num_bytes else 0
            self._memory[header - begin : offset - begin] = local_header(slot, crc)
            if num_bytes:
                self.checked.append((number, crc, num_bytes))
            return
        first, last = max(offset, begin), min(slot.end, end)
        crc, num_bytes = 0, max(last - first, 0)
        if num_bytes:
            parts = None if known is None else known(first, last)
            crc = crc32(self._memory[first - begin : last - begin]) if parts is None else combine_crc32(parts)
            self.checked.append((number, crc, num_bytes))
        if begin <= header and slot.end <= end:
            self._put(header, local_header(slot, crc))

    def _put(self, at: int, data: bytes) -> None:
        """Put bytes of the image where they go, as far as they are in this share."""
        first, last = max(at, self.begin), min(at + len(data), self.end)
        if first < last:
            self._memory[first - self.begin : last - self.begin] = data[first - at : last - at]


def crcs_of(plan: ImagePlan, checked: Iterable[Sequence[tuple[int, int, int]]]) -> list[int]:
    """Put together the CRC-32 of each record of an image from what all shares' writers have checked.

    Args:
        plan: the image's.
        checked: each share's :attr:`Part.checked`, in the order of the shares in the image.

    Raises:
        ValueError: some bytes were not checked, or twice.
    """
    parts: list[list[tuple[int, int]]] = [[] for _ in plan.slots]
    for share in checked:
        for number, crc, num_bytes in share:
            parts[number].append((crc, num_bytes))
    for slot, found in zip(plan.slots, parts, strict=True):
        if sum(num_bytes for _, num_bytes in found) != slot.num_bytes:
            msg = f"of record {slot.name} {sum(num for _, num in found)} of {slot.num_bytes} bytes were checked"
            raise ValueError(msg)
    return [combine_crc32(found) for found in parts]


def tail_of(plan: ImagePlan, crcs: Sequence[int], pickled: bytes, manifest: bytes) -> bytes:
    """Return the bytes that come after the image: pickle, manifest, and the archive's directory."""
    records = [(slot, crc32(data)) for slot, (_, data) in zip(plan.head, _HEAD, strict=True)]
    records += zip(plan.slots, crcs, strict=True)
    at, tail = plan.end, b""
    for name, data in ((PICKLE, pickled), (MANIFEST, manifest)):
        slot, crc = place(name, len(data), at), crc32(data)
        tail += local_header(slot, crc) + data
        records.append((slot, crc))
        at = slot.end
    return tail + directory(records, at)
