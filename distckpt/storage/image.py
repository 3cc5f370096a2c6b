"""The image of a ``.pt`` in host memory: which byte of which storage comes to lie where, and the bytes around them.

Owns offsets, shares of several writers, headers and checksums of one image. Must not know how the bytes come into
memory, nor how they reach the disk. Layer L2, below :mod:`distckpt.storage.ptfile`.

The order of the file::

    version, byteorder      a few bytes
    data/...                storages that are equal on all ranks, each on a border of 4096 bytes
    data/...                storages of the saving rank's own, likewise
    data.pkl                the tail, of the saving rank's, made when all checksums are known
    distckpt.json           ... so is this
    central directory       ... and this

All before the tail is the *image*. It is cut into shares on borders of 4096 bytes, one a rank; the last one is the
saving rank's. The header of a record tells the checksum of the whole record: where the end of one lies in another's
share, its header is left out, and the saving rank puts it there when all checksums are known.
"""

import functools
import itertools
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distckpt.checksum import combined, crc32
from distckpt.storage.archive import BLOCK_BYTES, Slot, border_from, directory, local_header, place

__all__ = ["CHUNK_BYTES", "ImagePlan", "Part", "Piece", "crcs_of", "plan_image", "tail_of"]

CHUNK_BYTES, MOST_BYTES = 8 << 20, 256 << 20
"""What is written at once, at least and at most. Powers of two of blocks."""

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
        for slot in reversed(self.slots):
            if slot.header < at <= slot.offset:
                at = slot.header // BLOCK_BYTES * BLOCK_BYTES
        return at

    def pieces(self, begin: int, end: int) -> Iterator[Piece]:
        """Yield what is to be copied for a share, in the image's order."""
        for number, slot in zip(self.order, self.slots, strict=True):
            first, last = max(slot.offset, begin), min(slot.end, end)
            if first < last:
                yield Piece(number, first - slot.offset, first, last - first)

    def cut_headers(self, cuts: Collection[int], crcs: Sequence[int]) -> list[tuple[int, bytes]]:
        """Return the headers that no share's writer could put: of the records that a cut goes through.

        Args:
            cuts: where shares end.
            crcs: of all records, in the order of the slots.

        Returns:
            Offsets in the file, and what goes there.
        """
        return [
            (slot.header, local_header(slot, crc))
            for slot, crc in zip(self.slots, crcs, strict=True)
            if any(slot.header < cut < slot.end for cut in cuts)
        ]


def plan_image(sizes: Sequence[int], replicated: Collection[int] = ()) -> ImagePlan:
    """Plan the image of storages.

    One of the last few that were planned is handed out again: mostly a state's form stays as it is.

    Args:
        sizes: each storage's, in bytes.
        replicated: the numbers of those that are equal on all ranks.

    Example:
        >>> plan = plan_image([8, 5000, 0])
        >>> [slot.offset for slot in plan.slots], plan.end
        ([4096, 8192, 16384], 16384)
    """
    return _plan_image(tuple(sizes), frozenset(replicated))


@functools.lru_cache(maxsize=8)
def _plan_image(sizes: tuple[int, ...], replicated: frozenset[int]) -> ImagePlan:
    head, at = [], 0
    for name, data in _HEAD:
        slot = place(name, len(data), at, on_border=False)
        head.append(slot)
        at = slot.end
    shared = [number for number in range(len(sizes)) if number in replicated]
    own = [number for number in range(len(sizes)) if number not in replicated]
    slots, shared_end = [], 0
    for number in (*shared, *own):
        slot = place(f"data/{number}", sizes[number], at, on_border=True)
        slots.append(slot)
        at = slot.end
        if len(slots) == len(shared):
            shared_end = at // BLOCK_BYTES * BLOCK_BYTES
    return ImagePlan(tuple(head), tuple(slots), (*shared, *own), shared_end, at)


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
            for number, slot in enumerate(self.plan.slots):
                if self.begin < slot.end and slot.header < self.end:
                    self._check(number, slot, wait_for, known)
                    self._tell(min(slot.end, self.end))
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

    def _put_head(self) -> None:
        for slot, (_, data) in zip(self.plan.head, _HEAD, strict=True):
            self._put(slot.header, local_header(slot, crc32(data)) + data)

    def _check(self, number: int, slot: Slot, wait_for: Callable[[int], None], known: _Known | None) -> None:
        first, last = max(slot.offset, self.begin), min(slot.end, self.end)
        crc, num_bytes = 0, max(last - first, 0)
        if num_bytes:
            wait_for(last)
            parts = None if known is None else known(first, last)
            crc = crc32(self._memory[first - self.begin : last - self.begin]) if parts is None else combined(parts)
            self.checked.append((number, crc, num_bytes))
        if self.begin <= slot.header and slot.end <= self.end:
            self._put(slot.header, local_header(slot, crc))

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
    return [combined(found) for found in parts]


def tail_of(plan: ImagePlan, crcs: Sequence[int], pickled: bytes, manifest: bytes) -> bytes:
    """Return the bytes that come after the image: pickle, manifest, and the archive's directory."""
    records = [(slot, crc32(data)) for slot, (_, data) in zip(plan.head, _HEAD, strict=True)]
    records += zip(plan.slots, crcs, strict=True)
    at, tail = plan.end, b""
    for name, data in ((PICKLE, pickled), (MANIFEST, manifest)):
        slot, crc = place(name, len(data), at, on_border=False), crc32(data)
        tail += local_header(slot, crc) + data
        records.append((slot, crc))
        at = slot.end
    return tail + directory(records, at)
