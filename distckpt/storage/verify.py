"""Is a ``.pt`` still what was written? Every byte of it, before anything of it is used.

Owns the comparison of a file with its own checksums. Must not know what the records mean. Layer L2, below
:mod:`distckpt.storage.ptfile`.

Of a file of distckpt's nothing is left unchecked: records have their CRC-32, and headers, padding and directory are
built again from what the directory says and compared byte by byte. Of one that somebody else wrote the records are
checked, where its writer has computed checksums at all (``torch.serialization.set_crc32_options``).
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from distckpt.checksum import combined, crc32
from distckpt.storage.archive import (
    FOLDER,
    MAGIC,
    Listed,
    Slot,
    border_from,
    directory,
    local_header,
    place,
    read_directory,
    read_local_header,
)
from distckpt.storage.image import MANIFEST

__all__ = [
    "Archive",
    "Checked",
    "NotAnArchive",
    "begins_as_archive",
    "check_range",
    "check_whole",
    "find_faults",
    "read_archive",
    "shares_of",
]

_READ_BYTES = 1 << 20
"""Stays in a core's own cache between reading and checking."""

Checked = tuple[int, int, int]
"""A record's number, the CRC-32 of some of its bytes, and how many they are; number -1 is the bytes around them."""


class NotAnArchive(Exception):  # noqa: N818 - a reason, always caught
    """The file is no zip archive, or its directory is damaged; the text says how."""


@dataclass(frozen=True, slots=True)
class Archive:
    """What a file's directory says.

    Attributes:
        slots: the records, in the order of the file.
        crcs: their CRC-32.
        directory_at: where the directory begins.
        num_bytes: the file's length.
        is_own: whether distckpt wrote it.
    """

    slots: tuple[Slot, ...]
    crcs: tuple[int, ...]
    directory_at: int
    num_bytes: int
    is_own: bool


def begins_as_archive(fd: int) -> bool:
    """Tell whether a file begins as a zip archive does.

    Raises:
        OSError: it cannot be read.
    """
    return os.pread(fd, len(MAGIC), 0) == MAGIC


def read_archive(fd: int) -> Archive:
    """Read a file's directory.

    Args:
        fd: open for reading.

    Raises:
        NotAnArchive: it is none, or is damaged.
        OSError: it cannot be read.
    """
    num_bytes = os.fstat(fd).st_size

    def read(at: int, length: int) -> bytes:
        return os.pread(fd, length, at)

    try:
        records, directory_at = read_directory(read, num_bytes)
        is_own = any(record.name == f"{FOLDER}/{MANIFEST}" for record in records)
        records.sort(key=lambda record: record.header)
        slots = tuple(_own_slot(record) if is_own else read_local_header(read, record) for record in records)
        _see_that_they_fit(slots, directory_at)
    except (ValueError, OverflowError) as error:
        raise NotAnArchive(str(error)) from error
    return Archive(slots, tuple(record.crc for record in records), directory_at, num_bytes, is_own)


def _own_slot(record: Listed) -> Slot:
    """Return where a record of distckpt's stands; that its header is there, is found out when it is read."""
    folder, _, name = record.name.partition("/")
    if folder != FOLDER:
        msg = f"record {record.name} is in another folder than the others"
        raise ValueError(msg)
    return place(name, record.num_bytes, record.header, on_border=name.startswith("data/"))


def _see_that_they_fit(slots: Sequence[Slot], directory_at: int) -> None:
    at = 0
    for slot in slots:
        if slot.header < at:
            msg = f"record {slot.name} begins before the one in front of it ends"
            raise ValueError(msg)
        at = slot.end
    if at > directory_at:
        msg = "its last record reaches into its directory"
        raise ValueError(msg)


def shares_of(archive: Archive, num_ranks: int) -> list[tuple[int, int]]:
    """Cut a file into one share a rank, for checking; on borders of 4096 bytes."""
    equal = -(-archive.num_bytes // num_ranks)
    cuts = [min(border_from(equal * number), archive.num_bytes) for number in range(num_ranks)]
    return list(itertools.pairwise([*cuts, archive.num_bytes]))


def check_range(
    fd: int, archive: Archive, begin: int, end: int, read: Callable[[memoryview, int], int] | None = None
) -> list[Checked]:
    """Read a share of a file, once and in order, and check it. Any thread.

    Args:
        fd: open for reading.
        archive: what its directory says.
        begin: where the share begins.
        end: where it ends.
        read: called with memory and the place of the bytes that it is for, if somebody reads ahead; returns how many
            it has read.

    Returns:
        For the records that have bytes in it what their CRC-32 is; and one entry of number -1 for each place around
        them that is not as it was written.

    Raises:
        OSError: it cannot be read.
    """
    found: list[Checked] = []
    crc, num_bytes = 0, 0
    regions = _regions(archive, begin, end)
    number, at, until, expected = next(regions, (-1, end, end, None))
    for offset, chunk in _chunks(fd, begin, end, read):
        done = 0
        while done < len(chunk):
            last = min(until - offset, len(chunk))
            piece = chunk[done:last]
            if number >= 0:
                crc, num_bytes = crc32(piece, crc), num_bytes + len(piece)
            elif expected is not None and expected[offset + done - at : offset + last - at] != piece:
                found.append((-1, offset + done, len(piece)))
            done = last
            if offset + done == until:
                if number >= 0:
                    found.append((number, crc, num_bytes))
                crc, num_bytes = 0, 0
                number, at, until, expected = next(regions, (-1, end, end, None))
    return found


def _regions(archive: Archive, begin: int, end: int) -> Iterator[tuple[int, int, int, bytes | None]]:
    """Yield what lies in a range: (record's number or -1, begin, end, the bytes that have to be there)."""
    for number, at, until, expected in _all_regions(archive):
        first, last = max(at, begin), min(until, end)
        if first < last:
            yield number, first, last, None if expected is None else expected[first - at : last - at]


def _all_regions(archive: Archive) -> Iterator[tuple[int, int, int, bytes | None]]:
    at = 0
    for number, (slot, crc) in enumerate(zip(archive.slots, archive.crcs, strict=True)):
        if archive.is_own:
            gap = bytes(slot.header - at)
            yield -1, at, slot.offset, gap + local_header(slot, crc)
        elif at < slot.offset:
            yield -1, at, slot.offset, None
        yield number, slot.offset, slot.end, None
        at = slot.end
    ending = None
    if archive.is_own:
        records = list(zip(archive.slots, archive.crcs, strict=True))
        ending = bytes(archive.directory_at - at) + directory(records, archive.directory_at)
        length = archive.num_bytes - at
        ending = ending[:length] + bytes(max(length - len(ending), 0))
    yield -1, at, archive.num_bytes, ending


def _chunks(
    fd: int, begin: int, end: int, read: Callable[[memoryview, int], int] | None
) -> Iterator[tuple[int, memoryview]]:
    view = memoryview(bytearray(min(_READ_BYTES, max(end - begin, 1))))
    if read is None:
        # Reading ahead is left to the kernel: asked for by POSIX_FADV_WILLNEED it fills the page cache with single
        # pages, from which everything that follows is copied at half the speed.
        os.posix_fadvise(fd, begin, end - begin, os.POSIX_FADV_SEQUENTIAL)
    at = begin
    while at < end:
        memory = view[: min(len(view), end - at)]
        num_bytes = os.preadv(fd, [memory], at) if read is None else read(memory, at)
        if num_bytes == 0:
            return  # it was cut short while it was read; what was not checked is missing from the count
        yield at, view[:num_bytes]
        at += num_bytes


def find_faults(archive: Archive, checked: Iterable[Sequence[Checked]]) -> list[str]:
    """Say what is wrong with a file, from what was found in all its shares, in their order. Pure.

    Returns:
        A phrase for each damaged place; none for a file that is whole.
    """
    parts: dict[int, list[tuple[int, int]]] = {}
    faults = []
    for number, crc, num_bytes in (one for share in checked for one in share):
        if number < 0:
            faults.append(f"the bytes around its records are not as they were written, near byte {crc}")
        else:
            parts.setdefault(number, []).append((crc, num_bytes))
    if not archive.is_own and not _has_checksums(archive, parts):
        return []
    for number, (slot, crc) in enumerate(zip(archive.slots, archive.crcs, strict=True)):
        found = parts.get(number, [])
        num_bytes = sum(size for _, size in found)
        if num_bytes != slot.num_bytes:
            faults.append(f"record {slot.name} has {num_bytes} of its {slot.num_bytes} bytes")
        elif combined(found) != crc:
            faults.append(f"record {slot.name} has checksum {combined(found):08x} and should have {crc:08x}")
    return faults


def check_whole(fd: int) -> list[str]:
    """Say what is wrong with a file that is to be an archive; nothing for one that is whole. Any thread.

    Raises:
        OSError: it cannot be read.
    """
    try:
        archive = read_archive(fd)
    except NotAnArchive as error:
        return [str(error)]
    return find_faults(archive, [check_range(fd, archive, 0, archive.num_bytes)])


def _has_checksums(archive: Archive, parts: dict[int, list[tuple[int, int]]]) -> bool:
    """Tell whether another's writer has computed checksums: whether that of at least one record is right."""
    return any(combined(found) == archive.crcs[number] for number, found in parts.items())
