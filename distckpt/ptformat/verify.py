"""Is a ``.pt`` still what was written? Every byte of it, before anything of it is used.

Owns the comparison of a file with its own checksums. Must not know what the records mean.

Of a file as distckpt wrote it nothing is left unchecked: records have their CRC-32, and headers, padding and directory
are built again, by the rules of the file's schema, and compared byte by byte. Of one that another tool wrote, or wrote
anew, the records are checked, where its writer has computed checksums at all
(``torch.serialization.set_crc32_options``): it is damaged only where that is proven.

The schema is read first, from ``distckpt.json``: nothing is taken for granted of a file that is of a newer one.
"""

import bisect
import itertools
import operator
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from distckpt._checksum import combine_crc32, crc32
from distckpt.ptformat.gc_pause import collector_paused
from distckpt.ptformat.image import MANIFEST
from distckpt.ptformat.layout import (
    FOLDER,
    MAGIC,
    Directory,
    Listed,
    Slot,
    UnsupportedArchive,
    alignment_of,
    border_from,
    directory,
    is_listed_as_ours,
    local_header,
    place,
    read_directory,
    read_local_header,
)
from distckpt.ptformat.manifest import SCHEMA, Head, read_head
from distckpt.storage.base import Readable, SupportsReadInto

__all__ = [
    "Archive",
    "Checked",
    "NewerSchema",
    "NotAnArchive",
    "UnsupportedArchive",
    "begins_as_archive",
    "check_range",
    "check_whole",
    "find_faults",
    "read_archive",
    "read_manifest",
    "record_bytes",
    "shares_of",
]

_READ_BYTES = 1 << 20
"""Stays in a core's own cache between reading and checking."""

Checked = tuple[int, int, int]
"""A record's number, the CRC-32 of some of its bytes, and how many they are; number -1 is the bytes around them."""


class NotAnArchive(Exception):  # noqa: N818 - a reason, always caught
    """The file is no zip archive, or its directory is damaged; the text says how."""


class NewerSchema(Exception):  # noqa: N818 - a reason, always caught
    """The file's manifest is of a schema that is newer than this code.

    Args:
        head: what the manifest says.
    """

    def __init__(self, head: Head) -> None:
        super().__init__(head)
        self.head = head


@dataclass(frozen=True, slots=True)
class Archive:
    """What a file's directory says.

    Attributes:
        slots: the records, in the order of the file.
        crcs: their CRC-32.
        directory_at: where the directory begins.
        num_bytes: the file's length.
        is_own: whether its layout is distckpt's, so that every byte is known.
        inflated: of the records that are deflated, by their number, what they inflate to, in bytes.
    """

    slots: tuple[Slot, ...]
    crcs: tuple[int, ...]
    directory_at: int
    num_bytes: int
    is_own: bool
    inflated: dict[int, int]


def begins_as_archive(file: Readable) -> bool:
    """Tell whether a file begins as a zip archive does.

    Raises:
        OSError: it cannot be read.
    """
    return file.read(0, len(MAGIC)) == MAGIC


@collector_paused()
def read_archive(file: Readable) -> Archive:
    """Read a file's directory.

    Args:
        file: open for reading.

    Raises:
        NotAnArchive: it is none, or is damaged.
        NewerSchema: it has a manifest that only a newer distckpt can read.
        UnsupportedArchive: it is sound, and records are encrypted, or compressed in a rare way.
        OSError: it cannot be read.
    """
    num_bytes, read = file.num_bytes, file.read
    try:
        found = read_directory(read, num_bytes)
        records = sorted(found.records, key=_header_of)
        schema = _schema_of(file, records)
        slots = _own_slots(records, schema) if _is_own(read, found, records) else None
        is_own = slots is not None
        if slots is None:
            slots = tuple(read_local_header(read, record) for record in records)
        _see_that_they_fit(slots, found.at)
    except (ValueError, OverflowError) as error:
        raise NotAnArchive(str(error)) from error
    return Archive(
        slots=slots,
        crcs=tuple(record.crc for record in records),
        directory_at=found.at,
        num_bytes=num_bytes,
        is_own=is_own,
        inflated={} if is_own else {at: one.num_bytes for at, one in enumerate(records) if one.is_deflated},
    )


def read_manifest(file: Readable) -> bytes:
    """Return the manifest, wherever in the archive it stands.

    Args:
        file: open for reading.

    Raises:
        ValueError: there is none, or it or the archive's directory is damaged.
        UnsupportedArchive: it is encrypted, or compressed in a rare way.
        OSError: it cannot be read.
    """
    for record in reversed(read_directory(file.read, file.num_bytes).records):
        if record.name.partition("/")[2] == MANIFEST:
            slot = read_local_header(file.read, record)
            content = record_bytes(file, slot, record.num_bytes if record.is_deflated else None)
            if crc32(content) == record.crc:
                return content
            msg = "its manifest is not as it was written"
            raise ValueError(msg)
    msg = "it has no manifest"
    raise ValueError(msg)


_header_of = operator.attrgetter("header")


def _schema_of(file: Readable, records: Sequence[Listed]) -> int:
    """Return by which schema's rules a file is read; the newest where it does not say, and its check will.

    Raises:
        NewerSchema: by none that is known, and the manifest is as it was written.
    """
    for record in reversed(records):
        if record.name.partition("/")[2] != MANIFEST:
            continue
        try:
            content = record_bytes(
                file, read_local_header(file.read, record), record.num_bytes if record.is_deflated else None
            )
            head = read_head(content)
        except (ValueError, UnsupportedArchive):
            return SCHEMA
        if head.schema > SCHEMA:
            if crc32(content) == record.crc:
                raise NewerSchema(head)
            return SCHEMA
        return head.schema
    return SCHEMA


def record_bytes(file: Readable, slot: Slot, inflated: int | None = None) -> bytes:
    """Read all of a record.

    Args:
        file: open for reading.
        slot: where it stands.
        inflated: what it inflates to, in bytes; None where it is stored as it is.

    Raises:
        ValueError: the file ends before it does, or it does not inflate to that.
        OSError: it cannot be read.
    """
    content = b""
    while len(content) < slot.num_bytes:
        part = file.read(slot.offset + len(content), slot.num_bytes - len(content))
        if not part:
            msg = f"record {slot.name!a} is cut short"
            raise ValueError(msg)
        content += part
    if inflated is None:
        return content
    try:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        data = inflater.decompress(content, inflated + 1)  # no more: what lies about its length is no bomb
    except zlib.error as error:
        msg = f"record {slot.name!a} does not inflate: {error}"
        raise ValueError(msg) from error
    if len(data) != inflated:
        msg = f"record {slot.name!a} does not inflate to {inflated} bytes"
        raise ValueError(msg)
    return data


def _is_own(read: Callable[[int, int], bytes], found: Directory, records: Sequence[Listed]) -> bool:
    """Return True if distckpt laid a file out as it is, but for damage.

    Tools that write the archive anew list its records in their own way. Those that add to it leave another record, or a
    comment, at its end.
    """
    if not records or records[-1].name != f"{FOLDER}/{MANIFEST}" or found.has_comment:
        return False
    return is_listed_as_ours(read, found)


def _own_slots(records: Sequence[Listed], schema: int) -> tuple[Slot, ...]:
    """Return where the records of distckpt's stand; that their headers are there, is found out when they are read."""
    slots = []
    for record in records:
        folder, _, name = record.name.partition("/")
        if folder != FOLDER:
            msg = f"record {record.name!a} is in another folder than the others"
            raise ValueError(msg)
        border = alignment_of(record.num_bytes, schema) if name.startswith("data/") else 1
        slots.append(place(name, record.num_bytes, record.header, border=border))
    return tuple(slots)


def _see_that_they_fit(slots: Sequence[Slot], directory_at: int) -> None:
    at = 0
    for name, header, offset, num_bytes in slots:
        if header < at:
            msg = f"record {name!a} begins before the one in front of it ends"
            raise ValueError(msg)
        at = offset + num_bytes
    if at > directory_at:
        msg = "its last record reaches into its directory"
        raise ValueError(msg)


def shares_of(archive: Archive, num_ranks: int) -> list[tuple[int, int]]:
    """Cut a file into one share a rank, for checking; on borders of 4096 bytes."""
    equal = -(-archive.num_bytes // num_ranks)
    cuts = [min(border_from(equal * number), archive.num_bytes) for number in range(num_ranks)]
    return list(itertools.pairwise([*cuts, archive.num_bytes]))


@collector_paused()
def check_range(
    file: Readable, archive: Archive, begin: int, end: int, source: SupportsReadInto | None = None
) -> list[Checked]:
    """Read a share of a file, once and in order, and check it. Any thread.

    Args:
        file: open for reading.
        archive: what its directory says.
        begin: where the share begins.
        end: where it ends.
        source: what to read the range through; None for `file`.

    Returns:
        For the records that have bytes in it what their CRC-32 is; and one entry of number -1 for each place around
        them that is not as it was written.

    Raises:
        OSError: it cannot be read.
    """
    found: list[Checked] = []
    if not archive.is_own:
        found += _check_deflated(file, archive, begin, end)
    crc, num_bytes = 0, 0
    regions = _regions(archive, begin, end)
    number, at, until, expected = next(regions, (-1, end, end, None))
    for offset, chunk in _chunks(source or file, begin, end):
        done, length = 0, len(chunk)
        while done < length:
            last = until - offset
            last = min(last, length)
            piece = chunk[done:last]
            if number >= 0:
                crc, num_bytes = crc32(piece, crc), num_bytes + last - done
            elif expected is not None and expected[offset + done - at : offset + last - at] != piece:
                found.append((-1, offset + done, last - done))
            done = last
            if offset + done == until:
                if number >= 0:
                    found.append((number, crc, num_bytes))
                crc, num_bytes = 0, 0
                number, at, until, expected = next(regions, (-1, end, end, None))
    return found


def _check_deflated(file: Readable, archive: Archive, begin: int, end: int) -> Iterator[Checked]:
    """Check the deflated records that begin in a range, all of each: a part of one cannot be inflated."""
    for number, inflated in archive.inflated.items():
        slot = archive.slots[number]
        if begin <= slot.offset < end:
            try:
                data = record_bytes(file, slot, inflated)
            except ValueError:
                yield number, 0, -1
            else:
                yield number, crc32(data), len(data)


def _regions(archive: Archive, begin: int, end: int) -> Iterator[tuple[int, int, int, bytes | None]]:
    """Yield what lies in a range: (record's number or -1, begin, end, the bytes that have to be there)."""
    slots = archive.slots
    first = max(bisect.bisect_right(slots, begin, key=_header_of) - 1, 0)
    for number, at, until, expected in _all_regions(archive, first):
        if at >= end:
            return
        if begin <= at < until <= end:
            yield number, at, until, expected
        elif max(at, begin) < min(until, end):
            here, there = max(at, begin), min(until, end)
            yield number, here, there, None if expected is None else expected[here - at : there - at]


def _all_regions(archive: Archive, first: int) -> Iterator[tuple[int, int, int, bytes | None]]:
    """Yield what lies in a file, from before its first record on or one of the later ones."""
    slots, crcs, is_own = archive.slots, archive.crcs, archive.is_own
    at = slots[first - 1].end if first else 0
    for number in range(first, len(slots)):
        slot = slots[number]
        _, header, offset, num_bytes = slot
        if is_own:
            expected = local_header(slot, crcs[number])
            yield -1, at, offset, expected if header == at else bytes(header - at) + expected
        elif at < offset:
            yield -1, at, offset, None
        at = offset + num_bytes
        yield -1 if number in archive.inflated else number, offset, at, None
    ending = None
    if is_own:
        records = list(zip(slots, crcs, strict=True))
        ending = bytes(archive.directory_at - at) + directory(records, archive.directory_at)
    yield -1, at, archive.num_bytes, ending


def _chunks(source: SupportsReadInto, begin: int, end: int) -> Iterator[tuple[int, memoryview]]:
    view = memoryview(bytearray(min(_READ_BYTES, max(end - begin, 1))))
    at = begin
    while at < end:
        memory = view[: min(len(view), end - at)]
        num_bytes = source.read_into(memory, at)
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
        length = archive.inflated.get(number, slot.num_bytes)
        if len(found) == 1 and found[0] == (crc, length):
            continue
        num_bytes = sum(size for _, size in found)
        if num_bytes < 0:
            faults.append(f"record {slot.name} does not inflate to its {length} bytes")
        elif num_bytes != length:
            faults.append(f"record {slot.name} has {num_bytes} of its {length} bytes")
        elif combine_crc32(found) != crc:
            faults.append(f"record {slot.name} has checksum {combine_crc32(found):08x} and should have {crc:08x}")
    return faults


def check_whole(file: Readable) -> list[str]:
    """Say what is wrong with a file that is to be an archive; nothing for one that is whole. Any thread.

    Raises:
        OSError: it cannot be read.
    """
    try:
        archive = read_archive(file)
    except (NotAnArchive, UnsupportedArchive) as error:
        return [str(error)]
    return find_faults(archive, [check_range(file, archive, 0, archive.num_bytes)])


def _has_checksums(archive: Archive, parts: dict[int, list[tuple[int, int]]]) -> bool:
    """Tell whether another's writer has computed checksums: whether that of at least one record is right."""
    return any(found[0][1] >= 0 and combine_crc32(found) == archive.crcs[number] for number, found in parts.items())
