"""The zip archive that a ``.pt`` file is: where its records are, and every byte between them.

The layout follows from names, lengths and checksums alone:

* Records are stored, not deflated, one after the other without gaps. A record that is aligned has its padding in its
  local header. Storages of 64 KiB and more are aligned to 4096 bytes, smaller ones to 64 as in torch's own files
  (:func:`alignment_of`; in schema 1 all are aligned to 4096).
* Sizes and CRC-32 are in the local headers; there are no data descriptors. All dates are zip's first, 1980-01-01.
* From 4 GiB on, sizes and offsets move to zip64's extra fields, and zip64's end record precedes the usual one.

So a reader can build the same bytes again and compare them. Archives by other tools are read too, whatever their
layout: with comments, deflated records, data descriptors, bytes after the end.

IMPORTANT: every constant is part of the format. A change needs a new number in
:data:`distckpt.ptformat.manifest.SCHEMA`, and older files keep the older rules (``tests/golden``).

Source: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3.7 to 4.3.16 and 4.5.3.
"""

import operator
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from distckpt.ptformat.manifest import SCHEMA

LARGE_BYTES = 1 << 16
"""Storages of this length and more are aligned to blocks, which costs them 6 percent at most."""
_LARGE_ALIGNMENT = 4096
_SMALL_ALIGNMENT = 64
"""For vector instructions; as in torch's own files."""
_SCHEMA_OF_BLOCKS = 1
"""The schema in which all storages are aligned to blocks."""
FOLDER = "archive"
"""torch's readers want all records in one folder of any name."""

_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END = struct.Struct("<IHHHHIIH")
_END_64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR_64 = struct.Struct("<IIQI")
_EXTRA = struct.Struct("<HH")
_LOCAL_MAGIC, _CENTRAL_MAGIC, _END_MAGIC = 0x04034B50, 0x02014B50, 0x06054B50
_END_64_MAGIC, _LOCATOR_64_MAGIC = 0x06064B50, 0x07064B50
_END_SIGNATURE = _END_MAGIC.to_bytes(4, "little")
MAGIC = _LOCAL_MAGIC.to_bytes(4, "little")
"""The first bytes of an archive."""
_FULL_16, _FULL_32 = 0xFFFF, 0xFFFFFFFF
_ZIP64 = 1
_PADDING = 0x4246  # "FB", as torch pads
_DATE = 0x21
_ENCRYPTED, _LATER, _UTF8 = 0x1, 0x8, 0x800
_STORED, _DEFLATED = 0, 8
_VERSION, _VERSION_64 = 20, 45
_SAMPLE = 32


class UnsupportedArchive(Exception):  # noqa: N818 - a reason, always caught
    """The archive is sound, but of a kind that distckpt does not read; the text says which."""


class RecordLocation(NamedTuple):
    """Where a record is in the file.

    Attributes:
        name: within the archive's folder.
        header: offset in bytes of its local header.
        offset: offset in bytes of its data.
        num_bytes: length of its data.
    """

    name: str
    header: int
    offset: int
    num_bytes: int

    @property
    def end(self) -> int:
        """Offset in bytes of the first byte after its data."""
        return self.offset + self.num_bytes


header_of = operator.attrgetter("header")
"""Key to sort or search locations and entries by."""


def align_up(offset: int, alignment: int) -> int:
    """Return the first multiple of `alignment` that is not below `offset`."""
    return -(-offset // alignment) * alignment


def alignment_of(num_bytes: int, schema: int = SCHEMA) -> int:
    """Return the alignment in bytes of a storage of some length in a file of some schema.

    Example:
        >>> alignment_of(64), alignment_of(1 << 20), alignment_of(64, schema=1)
        (64, 4096, 4096)
    """
    return _LARGE_ALIGNMENT if num_bytes >= LARGE_BYTES or schema == _SCHEMA_OF_BLOCKS else _SMALL_ALIGNMENT


def locate(name: str, num_bytes: int, header: int, *, alignment: int = 1) -> RecordLocation:
    """Return the location of a record whose local header is at offset `header`.

    Example:
        >>> locate("data/0", 8, 100, alignment=64)
        RecordLocation(name='data/0', header=100, offset=192, num_bytes=8)
    """
    offset = header + _LOCAL.size + len(_full_name(name)) + (len(_sizes_64(num_bytes)) if num_bytes >= _FULL_32 else 0)
    if offset % alignment:
        offset = align_up(offset + _EXTRA.size, alignment)
    return RecordLocation(name, header, offset, num_bytes)


def local_header(record: RecordLocation, crc: int) -> bytes:
    """Return the bytes of a record's local header: all before its data."""
    name, sizes = _full_name(record.name), _sizes_64(record.num_bytes)
    num_padding = record.offset - record.header - _LOCAL.size - len(name) - len(sizes)
    padding = b""
    if num_padding:
        padding = _EXTRA.pack(_PADDING, num_padding - _EXTRA.size) + bytes(num_padding - _EXTRA.size)
    size = _FULL_32 if sizes else record.num_bytes
    fields = (_version(sizes), _flags(name), 0, 0, _DATE, crc, size, size, len(name), len(sizes) + len(padding))
    return _LOCAL.pack(_LOCAL_MAGIC, *fields) + name + sizes + padding


def build_directory(records: Sequence[tuple[RecordLocation, int]], at: int) -> bytes:
    """Return the central directory and its end, to be written at offset `at`, from locations and their CRC-32."""
    entries = b"".join(_central_entry(record, crc) for record, crc in records)
    num, size = len(records), len(entries)
    if num < _FULL_16 and at < _FULL_32 and size < _FULL_32:
        return entries + _END.pack(_END_MAGIC, 0, 0, num, num, size, at, 0)
    version = (_VERSION_64, _VERSION_64)
    end = _END_64.pack(_END_64_MAGIC, _END_64.size - 12, *version, 0, 0, num, num, size, at)
    end += _LOCATOR_64.pack(_LOCATOR_64_MAGIC, 0, at + size, 1)
    return entries + end + _END.pack(_END_MAGIC, 0, 0, _FULL_16, _FULL_16, _FULL_32, _FULL_32, 0)


class DirectoryEntry(NamedTuple):
    """What a directory says of a record.

    Attributes:
        name: with its folder.
        crc: CRC-32 of its data.
        num_bytes: length of its data.
        packed_bytes: length in the file, which differs for a deflated record.
        header: offset in bytes of its local header.
        flags: zip's flags.
        method: zip's compression method.
    """

    name: str
    crc: int
    num_bytes: int
    packed_bytes: int
    header: int
    flags: int
    method: int

    @property
    def is_deflated(self) -> bool:
        """True if its data have to be inflated."""
        return self.method == _DEFLATED


class Directory(NamedTuple):
    """An archive's directory.

    Attributes:
        entries: in its order.
        at: its offset in bytes.
        has_comment: True if the archive ends with a comment.
    """

    entries: list[DirectoryEntry]
    at: int
    has_comment: bool


def read_directory(read: Callable[[int, int], bytes], num_bytes: int) -> Directory:
    """Read an archive's directory. The file may be damaged or malicious.

    Args:
        read: takes offset and length, and returns the bytes there; fewer at the end of the file.
        num_bytes: the archive's length.

    Raises:
        ValueError: the file does not end with a directory, or the directory contradicts itself.
    """
    num, size, at, end_at, has_comment = _read_end(read, num_bytes)
    if at + size > end_at:
        raise ValueError("its directory overlaps the end record")
    data, entries, begin = read(at, size), list[DirectoryEntry](), 0
    while begin < len(data):
        entry, begin = _read_entry(data, begin)
        entries.append(entry)
    if len(entries) != num or begin != size:
        raise ValueError(f"its directory lists {len(entries)} of {num} records")
    return Directory(entries, at, has_comment)


def check_end(read: Callable[[int, int], bytes], num_bytes: int) -> None:
    """Check that an archive of distckpt's layout ends with its directory and end records. Reads no more than those end.

    Raises:
        ValueError: it does not.
    """
    _, size, at, end_at, _ = _read_end(read, num_bytes)
    if at + size != end_at or read(num_bytes - _END.size, len(_END_SIGNATURE)) != _END_SIGNATURE:
        raise ValueError("its end is damaged, or bytes follow it")


def read_last_entry(tail: bytes, suffix: str) -> DirectoryEntry | None:
    """Return the last entry of a directory, from the archive's last bytes; None if its name does not end with `suffix`.

    Raises:
        ValueError: there is such a name, but no entry around it.
    """
    name_at = tail.rfind(suffix.encode())
    begin = tail.rfind(_CENTRAL_MAGIC.to_bytes(4, "little"), 0, max(name_at, 0))
    if begin < 0:
        return None
    entry, _ = _read_entry(tail, begin)
    return entry if entry.name.endswith(suffix) else None


def has_own_entries(read: Callable[[int, int], bytes], found: Directory) -> bool:
    """Return True if most of a directory's first entries are byte for byte those of :func:`build_directory`.

    Most, because some may be damaged. Tools that rewrite an archive use another version, system or attributes in all.
    """
    entries = found.entries[:_SAMPLE]
    expected = [
        _central_entry(RecordLocation(one.name.partition("/")[2], one.header, 0, one.num_bytes), one.crc)
        for one in entries
    ]
    data, begin, num_equal = read(found.at, sum(map(len, expected))), 0, 0
    for entry in expected:
        num_equal += data[begin : begin + len(entry)] == entry
        begin += len(entry)
    return 2 * num_equal > len(entries)


def read_local_header(read: Callable[[int, int], bytes], entry: DirectoryEntry) -> RecordLocation:
    """Return where a record's data are, after comparing its local header with the directory.

    Raises:
        ValueError: they differ.
        UnsupportedArchive: the record is encrypted or compressed by a rare method.
    """
    fields = _unpack(_LOCAL, read(entry.header, _LOCAL.size), 0)
    magic, _, flags, method, _, _, crc, packed, size, num_name, num_extra = fields
    name = read(entry.header + _LOCAL.size, num_name)
    is_later = flags & _LATER  # sizes and checksum follow the data
    differs = not is_later and (
        crc != entry.crc or size not in (entry.num_bytes, _FULL_32) or packed not in (entry.packed_bytes, _FULL_32)
    )
    differs |= method != entry.method or bool((flags ^ entry.flags) & _ENCRYPTED)
    if magic != _LOCAL_MAGIC or name != entry.name.encode("utf-8", "surrogateescape") or differs:
        raise ValueError(f"record {entry.name!a} is not where its directory says")
    if flags & _ENCRYPTED or method not in (_STORED, _DEFLATED):
        how = "encrypted" if flags & _ENCRYPTED else f"compressed by zip's method {method}"
        raise UnsupportedArchive(f"its record {entry.name!a} is {how}")
    begin = entry.header + _LOCAL.size + num_name + num_extra
    return RecordLocation(entry.name, entry.header, begin, entry.packed_bytes)


def _read_end(read: Callable[[int, int], bytes], num_bytes: int) -> tuple[int, int, int, int, bool]:
    """Return the number of records, the directory's length and offset, where its end begins, and if it has a comment.

    The last valid end record counts. Bytes may follow it, as torch and other readers allow.
    """
    begin = max(num_bytes - _END.size - _FULL_16, 0)
    tail = read(begin, num_bytes - begin)
    at_signature, num, size, at, num_comment = _find_end(tail)
    end_at = begin + at_signature
    locator_at = end_at - _LOCATOR_64.size
    locator = read(locator_at, _LOCATOR_64.size) if locator_at >= 0 else b""
    if len(locator) == _LOCATOR_64.size and locator[:4] == _LOCATOR_64_MAGIC.to_bytes(4, "little"):
        _, _, end_at, _ = _LOCATOR_64.unpack(locator)
        magic, *_, num, size, at = _unpack(_END_64, read(end_at, _END_64.size), 0)
        if magic != _END_64_MAGIC:
            raise ValueError("it has no zip64 end record where its locator says")
    return num, size, at, end_at, num_comment > 0


def _find_end(tail: bytes) -> tuple[int, int, int, int, int]:
    at_signature = tail.rfind(_END_SIGNATURE)
    while at_signature >= 0:
        if at_signature + _END.size <= len(tail):
            _, disk, start, here, num, size, at, num_comment = _END.unpack_from(tail, at_signature)
            if not disk and not start and here == num and at_signature + _END.size + num_comment <= len(tail):
                return at_signature, num, size, at, num_comment
        at_signature = tail.rfind(_END_SIGNATURE, 0, at_signature)
    raise ValueError("it does not end as a zip archive does")


def _read_entry(data: bytes, begin: int) -> tuple[DirectoryEntry, int]:
    fields = _unpack(_CENTRAL, data, begin)
    magic, _, _, flags, method, _, _, crc, packed, size, num_name, num_extra, num_comment, _, _, _, header = fields
    name_at = begin + _CENTRAL.size
    extra_at, end = name_at + num_name, name_at + num_name + num_extra + num_comment
    if magic != _CENTRAL_MAGIC or end > len(data):
        raise ValueError("its directory has an invalid entry")
    name = data[name_at:extra_at].decode("utf-8", "surrogateescape")
    if _FULL_32 in (size, packed, header):
        large = iter(_extra_64(data[extra_at : extra_at + num_extra]))
        size = next(large, size) if size == _FULL_32 else size
        packed = next(large, packed) if packed == _FULL_32 else packed
        header = next(large, header) if header == _FULL_32 else header
    if method == _STORED and packed != size and not flags & _ENCRYPTED:
        raise ValueError(f"record {name!a} is stored, but its directory gives it two lengths")
    return DirectoryEntry(name, crc, size, packed, header, flags, method), end


def _extra_64(extra: bytes) -> tuple[int, ...]:
    at = 0
    while at + _EXTRA.size <= len(extra):
        kind, length = _EXTRA.unpack_from(extra, at)
        at += _EXTRA.size
        if kind == _ZIP64:
            return struct.unpack(f"<{length // 8}Q", extra[at : at + length // 8 * 8])
        at += length
    return ()


def _unpack(layout: struct.Struct, data: bytes, at: int) -> tuple[int, ...]:
    if len(data) < at + layout.size:
        raise ValueError("it is cut short")
    return layout.unpack_from(data, at)


def _central_entry(record: RecordLocation, crc: int) -> bytes:
    name = _full_name(record.name)
    large = [record.num_bytes, record.num_bytes] if record.num_bytes >= _FULL_32 else []
    large += [record.header] if record.header >= _FULL_32 else []
    extra = _EXTRA.pack(_ZIP64, 8 * len(large)) + struct.pack(f"<{len(large)}Q", *large) if large else b""
    size, header = min(record.num_bytes, _FULL_32), min(record.header, _FULL_32)
    version = _version(extra)
    fields = (version, version, _flags(name), 0, 0, _DATE, crc, size, size, len(name), len(extra), 0, 0, 0, 0, header)
    return _CENTRAL.pack(_CENTRAL_MAGIC, *fields) + name + extra


def _full_name(name: str) -> bytes:
    return f"{FOLDER}/{name}".encode()


def _sizes_64(num_bytes: int) -> bytes:
    """Return the extra field of sizes that do not fit into the header."""
    return _EXTRA.pack(_ZIP64, 16) + struct.pack("<QQ", num_bytes, num_bytes) if num_bytes >= _FULL_32 else b""


def _version(zip64: bytes) -> int:
    return _VERSION_64 if zip64 else _VERSION


def _flags(name: bytes) -> int:
    return 0 if name.isascii() else _UTF8
