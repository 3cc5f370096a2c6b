"""Compare a ``.pt`` file with its own checksums.

In a file of distckpt's layout every byte is checked: records have a CRC-32, and headers, padding and directory are
built again from the schema's rules and compared. In other archives the records are checked, if their writer has
computed checksums at all (``torch.serialization.set_crc32_options``): damage is reported only where it is certain.
"""

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from distckpt._checksum import combine_crc32, crc32
from distckpt.ptformat.archive import Archive, NotAnArchive, read_archive, read_record_bytes
from distckpt.ptformat.gc_pause import gc_paused
from distckpt.ptformat.layout import UnsupportedArchive, align_up, build_directory, header_of, local_header
from distckpt.storage.base import BLOCK_BYTES, Readable, SupportsReadInto

_READ_BYTES = 1 << 20
"""Fits into a core's own cache between reading and checking."""

Checksum = tuple[int, int, int]
"""Record number, CRC-32 of some of its bytes, and their number. For damage between records: -1, its offset, and its
length."""


class Fault(NamedTuple):
    """A damaged place. As text it is a phrase.

    Attributes:
        what: what is wrong.
        record: the damaged record's name; None for a place between records.
        tensors: the tensors in that record, as far as known.
    """

    what: str
    record: str | None = None
    tensors: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the phrase."""
        if self.record is None:
            return self.what
        more = f" and {len(self.tensors) - 1} more" if len(self.tensors) > 1 else ""
        return f"record {self.record}{f' (tensor {self.tensors[0]}{more})' if self.tensors else ''} {self.what}"


def split_ranges(archive: Archive, num_ranks: int) -> list[tuple[int, int]]:
    """Split a file into one range a rank, of equal length and aligned to blocks."""
    equal = -(-archive.num_bytes // num_ranks)
    cuts = [min(align_up(equal * rank, BLOCK_BYTES), archive.num_bytes) for rank in range(num_ranks)]
    return list(itertools.pairwise([*cuts, archive.num_bytes]))


@gc_paused()
def check_range(
    file: Readable, archive: Archive, begin: int, end: int, source: SupportsReadInto | None = None
) -> list[Checksum]:
    """Read a range of a file, once and in order, and compute its checksums. Any thread.

    Args:
        file: open for reading.
        archive: its directory.
        begin: of the range.
        end: of the range.
        source: what to read the range through; None for `file`.

    Returns:
        A checksum for each record with bytes in the range, and an entry with number -1 for each place between records
        that is damaged.

    Raises:
        OSError: the file cannot be read.
    """
    found: list[Checksum] = [] if archive.is_own else list(_check_deflated(file, archive, begin, end))
    crc, num_bytes = 0, 0
    regions = _regions(archive, begin, end)
    number, at, until, expected = next(regions, (-1, end, end, None))
    for offset, chunk in _chunks(source or file, begin, end):
        done, length = 0, len(chunk)
        while done < length:
            last = min(until - offset, length)
            data = chunk[done:last]
            if number >= 0:
                crc, num_bytes = crc32(data, crc), num_bytes + last - done
            elif expected is not None and expected[offset + done - at : offset + last - at] != data:
                found.append((-1, offset + done, last - done))
            done = last
            if offset + done == until:
                if number >= 0:
                    found.append((number, crc, num_bytes))
                crc, num_bytes = 0, 0
                number, at, until, expected = next(regions, (-1, end, end, None))
    return found


def _check_deflated(file: Readable, archive: Archive, begin: int, end: int) -> Iterator[Checksum]:
    """Check the deflated records that begin in a range. Each is read whole: a part of it cannot be inflated."""
    for number, inflated in archive.inflated.items():
        record = archive.records[number]
        if begin <= record.offset < end:
            try:
                data = read_record_bytes(file, record, inflated)
            except ValueError:
                yield number, 0, -1
            else:
                yield number, crc32(data), len(data)


def _regions(archive: Archive, begin: int, end: int) -> Iterator[tuple[int, int, int, bytes | None]]:
    """Yield what a range consists of: record number or -1, begin, end, and the expected bytes if they are known."""
    first = max(bisect.bisect_right(archive.records, begin, key=header_of) - 1, 0)
    for number, at, until, expected in _regions_from(archive, first):
        if at >= end:
            return
        if begin <= at < until <= end:
            yield number, at, until, expected
        elif max(at, begin) < min(until, end):
            here, there = max(at, begin), min(until, end)
            yield number, here, there, None if expected is None else expected[here - at : there - at]


def _regions_from(archive: Archive, first: int) -> Iterator[tuple[int, int, int, bytes | None]]:
    """Yield what a file consists of, from the end of the record before `first` on."""
    records, crcs, is_own = archive.records, archive.crcs, archive.is_own
    at = records[first - 1].end if first else 0
    for number in range(first, len(records)):
        record = records[number]
        _, header, offset, num_bytes = record
        if is_own:
            expected = local_header(record, crcs[number])
            yield -1, at, offset, expected if header == at else bytes(header - at) + expected
        elif at < offset:
            yield -1, at, offset, None
        at = offset + num_bytes
        yield -1 if number in archive.inflated else number, offset, at, None
    ending = None
    if is_own:
        directory = build_directory(list(zip(records, crcs, strict=True)), archive.directory_at)
        ending = bytes(archive.directory_at - at) + directory
    yield -1, at, archive.num_bytes, ending


def _chunks(source: SupportsReadInto, begin: int, end: int) -> Iterator[tuple[int, memoryview]]:
    view = memoryview(bytearray(min(_READ_BYTES, max(end - begin, 1))))
    at = begin
    while at < end:
        num_bytes = source.read_into(view[: min(len(view), end - at)], at)
        if num_bytes == 0:
            return  # truncated while it was read; its records lack bytes in find_faults
        yield at, view[:num_bytes]
        at += num_bytes


def has_checksums(archive: Archive, checksums: Iterable[Sequence[Checksum]]) -> bool:
    """Return True if a file has checksums to compare with. Pure; arguments as for :func:`find_faults`."""
    if archive.is_own:
        return True
    parts = _parts_of(one for one in itertools.chain.from_iterable(checksums) if one[0] >= 0)
    return any(found[0][1] >= 0 and combine_crc32(found) == archive.crcs[number] for number, found in parts.items())


def find_faults(archive: Archive, checksums: Sequence[Sequence[Checksum]]) -> list[Fault]:
    """Return the damaged places of a file. Pure.

    Args:
        archive: the file's directory.
        checksums: from :func:`check_range`, for ranges that cover the file, in order.
    """
    found_all = list(itertools.chain.from_iterable(checksums))
    faults = [
        Fault(f"its headers, padding or directory are damaged at byte {at}")
        for number, at, _ in found_all
        if number < 0
    ]
    if not has_checksums(archive, checksums):
        return []
    parts = _parts_of(one for one in found_all if one[0] >= 0)
    for number, (record, crc) in enumerate(zip(archive.records, archive.crcs, strict=True)):
        found = parts.get(number, [])
        length = archive.inflated.get(number, record.num_bytes)
        if len(found) == 1 and found[0] == (crc, length):
            continue
        num_bytes = sum(size for _, size in found)
        if num_bytes < 0:
            faults.append(Fault(f"does not inflate to its {length} bytes", record.name))
        elif num_bytes != length:
            faults.append(Fault(f"has {num_bytes} of its {length} bytes", record.name))
        elif combine_crc32(found) != crc:
            what = f"has checksum {combine_crc32(found):08x} and should have {crc:08x}"
            faults.append(Fault(what, record.name))
    return faults


def check_whole(file: Readable) -> list[str]:
    """Return a phrase for each damaged place of a file that should be an archive. Any thread.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        archive = read_archive(file)
    except (NotAnArchive, UnsupportedArchive) as error:
        return [str(error)]
    return [str(fault) for fault in find_faults(archive, [check_range(file, archive, 0, archive.num_bytes)])]


def _parts_of(checksums: Iterable[Checksum]) -> dict[int, list[tuple[int, int]]]:
    parts: dict[int, list[tuple[int, int]]] = {}
    for number, crc, num_bytes in checksums:
        parts.setdefault(number, []).append((crc, num_bytes))
    return parts
