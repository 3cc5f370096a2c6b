"""The zip archive that a ``.pt`` is: where its records stand, and every byte around them.

Owns headers, borders and the directory at the end. Must not know what the records hold, nor where the file lies.

The layout, all of it determined by names, lengths and checksums:

* records are stored, not deflated, one after the other without gaps; a record that is to stand on a border has the
  bytes before that border as padding in its local header. Storages of 64 KiB and more stand on borders of 4096 bytes,
  smaller ones on borders of 64, as torch's do (:func:`alignment_of`; in schema 1 all stand on borders of 4096);
* sizes and CRC-32 stand in the local headers, no data descriptors; dates are zip's first, 1980-01-01;
* from 4 GiB on, sizes and offsets move to zip64's extra fields, and zip64's end record precedes the usual one.

Since nothing is left open, a reader builds the same bytes again and compares: whatever was changed, is found.
Archives that other tools wrote are read as well, whatever their layout: with comments, deflated records, data
descriptors, bytes after the end.

IMPORTANT: every constant here is part of the format. A change needs a new number in
:data:`distckpt.ptformat.manifest.SCHEMA`, and the old rules stay for older files (``tests/golden``).

Sources: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3.7 to 4.3.16 and 4.5.3.
"""

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from distckpt.ptformat.manifest import SCHEMA
from distckpt.storage.base import BLOCK_BYTES

__all__ = [
    "FOLDER",
    "LARGE_BYTES",
    "MAGIC",
    "Directory",
    "Listed",
    "Slot",
    "UnsupportedArchive",
    "alignment_of",
    "border_from",
    "directory",
    "is_listed_as_ours",
    "local_header",
    "place",
    "read_directory",
    "read_last_entry",
    "read_local_header",
]

LARGE_BYTES = 1 << 16
"""From this length on a storage stands on a border of a block: that costs it 6 percent at most."""
_SMALL_BORDER_BYTES = 64
"""What vector instructions want, and torch's own files have."""
_EVERY_ON_A_BLOCK = 1
"""The schema whose storages all stand on borders of blocks."""
FOLDER = "archive"
"""torch's readers want all records in one folder, of any name."""

_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END = struct.Struct("<IHHHHIIH")
_END_64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR_64 = struct.Struct("<IIQI")
_EXTRA = struct.Struct("<HH")
_LOCAL_MAGIC, _CENTRAL_MAGIC, _END_MAGIC = 0x04034B50, 0x02014B50, 0x06054B50
_END_64_MAGIC, _LOCATOR_64_MAGIC = 0x06064B50, 0x07064B50
_END_SIGN = _END_MAGIC.to_bytes(4, "little")
MAGIC = _LOCAL_MAGIC.to_bytes(4, "little")
"""What an archive begins with."""
_FULL_16, _FULL_32 = 0xFFFF, 0xFFFFFFFF
_ZIP64 = 1
_PADDING = 0x4246  # "FB", under which torch pads too
_DATE = 0x21
_ENCRYPTED, _LATER, _UTF8 = 0x1, 0x8, 0x800
_STORED, _DEFLATED = 0, 8
_VERSION, _VERSION_64 = 20, 45
_SAMPLE = 32


class UnsupportedArchive(Exception):  # noqa: N818 - a reason, always caught
    """The archive is sound, and written in a way that is not read here; the text says which."""


class Slot(NamedTuple):
    """Where one record stands.

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
        """Offset in bytes of what comes after its data."""
        return self.offset + self.num_bytes


def border_from(at: int, border: int = BLOCK_BYTES) -> int:
    """Return the first border at or after an offset."""
    return -(-at // border) * border


def alignment_of(num_bytes: int, schema: int = SCHEMA) -> int:
    """Return the number of bytes on whose borders a storage's data begin.

    Args:
        num_bytes: the storage's length.
        schema: of the file's manifest.

    Example:
        >>> alignment_of(64), alignment_of(1 << 20), alignment_of(64, schema=1)
        (64, 4096, 4096)
    """
    return BLOCK_BYTES if num_bytes >= LARGE_BYTES or schema == _EVERY_ON_A_BLOCK else _SMALL_BORDER_BYTES


def place(name: str, num_bytes: int, at: int, *, border: int = 1) -> Slot:
    """Return the slot of a record that comes at an offset.

    Args:
        name: the record's.
        num_bytes: length of its data.
        at: where its local header begins.
        border: what the offset of its data is a multiple of.

    Example:
        >>> place("data/0", 8, 100, border=64)
        Slot(name='data/0', header=100, offset=192, num_bytes=8)
    """
    bare = at + _LOCAL.size + len(_full_name(name)) + (len(_sizes_64(num_bytes)) if num_bytes >= _FULL_32 else 0)
    if bare % border:
        bare = border_from(bare + _EXTRA.size, border)
    return Slot(name, at, bare, num_bytes)


def local_header(slot: Slot, crc: int) -> bytes:
    """Return all bytes from a slot's header to its data."""
    name, sizes = _full_name(slot.name), _sizes_64(slot.num_bytes)
    num_padding = slot.offset - slot.header - _LOCAL.size - len(name) - len(sizes)
    padding = b""
    if num_padding:
        padding = _EXTRA.pack(_PADDING, num_padding - _EXTRA.size) + bytes(num_padding - _EXTRA.size)
    size = _FULL_32 if sizes else slot.num_bytes
    fields = (_version(sizes), _flags(name), 0, 0, _DATE, crc, size, size, len(name), len(sizes) + len(padding))
    return _LOCAL.pack(_LOCAL_MAGIC, *fields) + name + sizes + padding


def directory(records: Sequence[tuple[Slot, int]], at: int) -> bytes:
    """Return everything after the last record: the central directory and its end.

    Args:
        records: each slot with its CRC-32, in the order of the file.
        at: offset in bytes of the directory.
    """
    entries = b"".join(_central_entry(slot, crc) for slot, crc in records)
    num, size = len(records), len(entries)
    is_large = num >= _FULL_16 or at >= _FULL_32 or size >= _FULL_32
    end = b""
    if is_large:
        version = (_VERSION_64, _VERSION_64)
        end += _END_64.pack(_END_64_MAGIC, _END_64.size - 12, *version, 0, 0, num, num, size, at)
        end += _LOCATOR_64.pack(_LOCATOR_64_MAGIC, 0, at + size, 1)
    few, small, near = min(num, _FULL_16), min(size, _FULL_32), min(at, _FULL_32)
    if is_large:
        few, small, near = _FULL_16, _FULL_32, _FULL_32
    return entries + end + _END.pack(_END_MAGIC, 0, 0, few, few, small, near, 0)


class Listed(NamedTuple):
    """What a directory says of one record.

    Attributes:
        name: its full name.
        crc: its CRC-32.
        num_bytes: its length.
        packed_bytes: its length in the file, which is another one where it is deflated.
        header: offset in bytes of its local header.
        flags: zip's.
        method: zip's, of compression.
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
        """Whether its data have to be inflated."""
        return self.method == _DEFLATED


class Directory(NamedTuple):
    """An archive's directory.

    Attributes:
        records: in its order.
        at: its offset in bytes.
        has_comment: whether the archive ends with a comment.
    """

    records: list[Listed]
    at: int
    has_comment: bool


def read_directory(read: Callable[[int, int], bytes], num_bytes: int) -> Directory:
    """Read the directory of an archive, and take nothing for granted.

    Args:
        read: takes an offset and a length, returns the bytes there; fewer at the end of the file.
        num_bytes: the archive's length.

    Raises:
        ValueError: there is none at the end of the file, or it contradicts itself.
    """
    num, size, at, end_at, has_comment = _read_end(read, num_bytes)
    if at + size > end_at:
        msg = "its directory does not end where it should"
        raise ValueError(msg)
    data, records, begin = read(at, size), list[Listed](), 0
    while begin < len(data):
        record, begin = _read_entry(data, begin)
        records.append(record)
    if len(records) != num or begin != size:
        msg = f"its directory lists {len(records)} of {num} records"
        raise ValueError(msg)
    return Directory(records, at, has_comment)


def read_last_entry(tail: bytes, suffix: str) -> Listed | None:
    """Return the last entry of a directory, from the end of the archive alone; None if its name ends otherwise.

    Args:
        tail: the archive's last bytes.
        suffix: what the record's name ends with.

    Raises:
        ValueError: there is such a name, and no entry around it.
    """
    name_at = tail.rfind(suffix.encode())
    begin = tail.rfind(_CENTRAL_MAGIC.to_bytes(4, "little"), 0, max(name_at, 0))
    if begin < 0:
        return None
    listed, _ = _read_entry(tail, begin)
    return listed if listed.name.endswith(suffix) else None


def is_listed_as_ours(read: Callable[[int, int], bytes], found: Directory) -> bool:
    """Return True if most of a directory's first entries are, byte by byte, what :func:`directory` makes of them.

    Most: some may be damaged. Tools that write archives anew have other versions, systems and attributes in all.
    """
    records = found.records[:_SAMPLE]
    expected = [
        _central_entry(Slot(one.name.partition("/")[2], one.header, 0, one.num_bytes), one.crc) for one in records
    ]
    data, begin, num_equal = read(found.at, sum(map(len, expected))), 0, 0
    for entry in expected:
        num_equal += data[begin : begin + len(entry)] == entry
        begin += len(entry)
    return 2 * num_equal > len(records)


def read_local_header(read: Callable[[int, int], bytes], listed: Listed) -> Slot:
    """Find where a record's data begin, and see that its header says what the directory does.

    Raises:
        ValueError: it does not.
        UnsupportedArchive: it does, and the record is encrypted, or compressed in a rare way.
    """
    fields = _unpack(_LOCAL, read(listed.header, _LOCAL.size), 0)
    magic, _, flags, method, _, _, crc, packed, size, num_name, num_extra = fields
    name = read(listed.header + _LOCAL.size, num_name)
    is_later = flags & _LATER  # sizes and checksum follow the data
    says_other = not is_later and (
        crc != listed.crc or size not in (listed.num_bytes, _FULL_32) or packed not in (listed.packed_bytes, _FULL_32)
    )
    says_other |= method != listed.method or bool((flags ^ listed.flags) & _ENCRYPTED)
    if magic != _LOCAL_MAGIC or name != listed.name.encode("utf-8", "surrogateescape") or says_other:
        msg = f"record {listed.name!a} is not where its directory says"
        raise ValueError(msg)
    if flags & _ENCRYPTED or method not in (_STORED, _DEFLATED):
        how = "encrypted" if flags & _ENCRYPTED else f"compressed by zip's method {method}"
        msg = f"its record {listed.name!a} is {how}"
        raise UnsupportedArchive(msg)
    begin = listed.header + _LOCAL.size + num_name + num_extra
    return Slot(listed.name, listed.header, begin, listed.packed_bytes)


def _read_end(read: Callable[[int, int], bytes], num_bytes: int) -> tuple[int, int, int, int, bool]:
    """Return the number of records, the directory's length and offset, where its end begins, and if there is a comment.

    The last end record counts that is one; bytes may follow it, as torch and other readers let them.
    """
    begin = max(num_bytes - _END.size - _FULL_16, 0)
    tail = read(begin, num_bytes - begin)
    at_sign, num, size, at, num_comment = _find_end(tail)
    end_at = begin + at_sign
    locator_at = end_at - _LOCATOR_64.size
    locator = read(locator_at, _LOCATOR_64.size) if locator_at >= 0 else b""
    if len(locator) == _LOCATOR_64.size and locator[:4] == _LOCATOR_64_MAGIC.to_bytes(4, "little"):
        _, _, end_at, _ = _LOCATOR_64.unpack(locator)
        magic, *_, num, size, at = _unpack(_END_64, read(end_at, _END_64.size), 0)
        if magic != _END_64_MAGIC:
            msg = "it has no zip64 end where its locator says"
            raise ValueError(msg)
    return num, size, at, end_at, num_comment > 0


def _find_end(tail: bytes) -> tuple[int, int, int, int, int]:
    """Return where in a file's tail its end record is, and what that says; see :func:`_read_end`."""
    at_sign = tail.rfind(_END_SIGN)
    while at_sign >= 0:
        if at_sign + _END.size <= len(tail):
            _, disk, start, here, num, size, at, num_comment = _END.unpack_from(tail, at_sign)
            if not disk and not start and here == num and at_sign + _END.size + num_comment <= len(tail):
                return at_sign, num, size, at, num_comment
        at_sign = tail.rfind(_END_SIGN, 0, at_sign)
    msg = "it does not end as a zip archive does"
    raise ValueError(msg)


def _read_entry(data: bytes, begin: int) -> tuple[Listed, int]:
    fields = _unpack(_CENTRAL, data, begin)
    magic, _, _, flags, method, _, _, crc, packed, size, num_name, num_extra, num_comment, _, _, _, header = fields
    name_at = begin + _CENTRAL.size
    extra_at, end = name_at + num_name, name_at + num_name + num_extra + num_comment
    if magic != _CENTRAL_MAGIC or end > len(data):
        msg = "an entry of its directory is no such entry"
        raise ValueError(msg)
    name = data[name_at:extra_at].decode("utf-8", "surrogateescape")
    if _FULL_32 in (size, packed, header):
        large = iter(_extra_64(data[extra_at : extra_at + num_extra]))
        size = next(large, size) if size == _FULL_32 else size
        packed = next(large, packed) if packed == _FULL_32 else packed
        header = next(large, header) if header == _FULL_32 else header
    if method == _STORED and packed != size and not flags & _ENCRYPTED:
        msg = f"record {name!a} is stored as it is, and its directory tells of two lengths"
        raise ValueError(msg)
    return Listed(name, crc, size, packed, header, flags, method), end


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
        msg = "it is cut short"
        raise ValueError(msg)
    return layout.unpack_from(data, at)


def _central_entry(slot: Slot, crc: int) -> bytes:
    name = _full_name(slot.name)
    large = [slot.num_bytes, slot.num_bytes] if slot.num_bytes >= _FULL_32 else []
    large += [slot.header] if slot.header >= _FULL_32 else []
    extra = _EXTRA.pack(_ZIP64, 8 * len(large)) + struct.pack(f"<{len(large)}Q", *large) if large else b""
    size, header = min(slot.num_bytes, _FULL_32), min(slot.header, _FULL_32)
    version = _version(extra)
    fields = (version, version, _flags(name), 0, 0, _DATE, crc, size, size, len(name), len(extra), 0, 0, 0, 0, header)
    return _CENTRAL.pack(_CENTRAL_MAGIC, *fields) + name + extra


def _full_name(name: str) -> bytes:
    return f"{FOLDER}/{name}".encode()


def _sizes_64(num_bytes: int) -> bytes:
    """Return the extra field with the sizes, where they do not fit into the header."""
    return _EXTRA.pack(_ZIP64, 16) + struct.pack("<QQ", num_bytes, num_bytes) if num_bytes >= _FULL_32 else b""


def _version(zip64: bytes) -> int:
    return _VERSION_64 if zip64 else _VERSION


def _flags(name: bytes) -> int:
    return 0 if name.isascii() else _UTF8
