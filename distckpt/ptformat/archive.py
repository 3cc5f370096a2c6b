"""Read the directory of a ``.pt`` archive: which records a file holds, and where.

Archives by other tools are read too. The schema is read before anything else, from ``distckpt.json``: a file of a newer
schema is refused.
"""

import contextlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distckpt._checksum import crc32
from distckpt.ptformat.gc_pause import gc_paused
from distckpt.ptformat.image import MANIFEST
from distckpt.ptformat.layout import (
    FOLDER,
    MAGIC,
    Directory,
    DirectoryEntry,
    RecordLocation,
    UnsupportedArchive,
    alignment_of,
    has_own_entries,
    header_of,
    locate,
    read_directory,
    read_last_entry,
    read_local_header,
)
from distckpt.ptformat.manifest import SCHEMA, Head, Manifest, from_json, read_head
from distckpt.storage.base import Readable
from distckpt.storage.local import LocalFile

_UNREADABLE = (ValueError, OverflowError, UnsupportedArchive)
_TAIL_BYTES = 4096


class NotAnArchive(Exception):  # noqa: N818 - a reason, always caught
    """The file is no zip archive, or its directory is damaged; the text says how."""


class NewerSchema(Exception):  # noqa: N818 - a reason, always caught
    """The file's manifest has a newer schema than this version of distckpt knows; `head` is its head."""

    def __init__(self, head: Head) -> None:
        super().__init__(head)
        self.head = head


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive's directory.

    Attributes:
        records: in the order of the file.
        crcs: their CRC-32.
        directory_at: offset of the directory.
        num_bytes: the file's length.
        is_own: True for distckpt's layout, where every byte is determined.
        inflated: by record number, the inflated length in bytes of each deflated record.
    """

    records: tuple[RecordLocation, ...]
    crcs: tuple[int, ...]
    directory_at: int
    num_bytes: int
    is_own: bool
    inflated: dict[int, int]


def is_archive(file: Readable) -> bool:
    """Return True if a file begins as a zip archive does."""
    return file.read(0, len(MAGIC)) == MAGIC


@gc_paused()
def read_archive(file: Readable) -> Archive:
    """Read a file's directory.

    Raises:
        NotAnArchive: it is no archive, or its directory is damaged.
        NewerSchema: its manifest needs a newer distckpt.
        UnsupportedArchive: it is sound, but encrypted or compressed by a rare method.
        OSError: it cannot be read.
    """
    try:
        found = read_directory(file.read, file.num_bytes)
        entries = sorted(found.entries, key=header_of)
        schema = _schema_of(file, entries)
        is_own = _has_own_layout(file, found, entries)
        records = _own_records(entries, schema) if is_own else tuple(read_local_header(file.read, e) for e in entries)
        _refuse_overlaps(records, found.at)
    except (ValueError, OverflowError) as error:
        raise NotAnArchive(str(error)) from error
    return Archive(
        records=records,
        crcs=tuple(entry.crc for entry in entries),
        directory_at=found.at,
        num_bytes=file.num_bytes,
        is_own=is_own,
        inflated={} if is_own else {at: entry.num_bytes for at, entry in enumerate(entries) if entry.is_deflated},
    )


def read_record_bytes(file: Readable, record: RecordLocation, inflated: int | None = None) -> bytes:
    """Read a record, and inflate it to `inflated` bytes unless that is None.

    Raises:
        ValueError: the file ends before the record does, or the record does not inflate to that length.
        OSError: it cannot be read.
    """
    content = b""
    while len(content) < record.num_bytes:
        data = file.read(record.offset + len(content), record.num_bytes - len(content))
        if not data:
            raise ValueError(f"record {record.name!a} is cut short")
        content += data
    if inflated is None:
        return content
    try:
        # At most one byte more than promised: a record that lies about its length cannot fill the memory.
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, inflated + 1)
    except zlib.error as error:
        raise ValueError(f"record {record.name!a} does not inflate: {error}") from error
    if len(data) != inflated:
        raise ValueError(f"record {record.name!a} does not inflate to {inflated} bytes")
    return data


def read_manifest_head(file: Readable) -> Head | None:
    """Return the head of an open file's manifest; None if it has none, or a damaged one. Reads a few kilobytes.

    Raises:
        OSError: the file cannot be read.
    """
    content = _manifest_content(file)
    if content is not None:
        with contextlib.suppress(ValueError):
            return read_head(content)
    return None


def read_manifest(file: Readable, *, with_tensors: bool = True) -> Manifest | None:
    """Return an open file's manifest; None if it has none, or a damaged one.

    Args:
        file: open for reading.
        with_tensors: see :func:`~distckpt.ptformat.manifest.from_json`.

    Raises:
        NewerSchema: it has a newer schema.
        OSError: the file cannot be read.
    """
    content = _manifest_content(file)
    if content is None:
        return None
    with contextlib.suppress(ValueError):
        head = read_head(content)
        if head.schema > SCHEMA:
            raise NewerSchema(head)
        return from_json(content, with_tensors=with_tensors)
    return None


def _manifest_content(file: Readable) -> bytes | None:
    """Return the manifest's bytes; None if there is none, or a damaged one.

    The whole manifest is compared with its checksum: a damaged head could name another handler or an older run.
    """
    try:
        if not is_archive(file):
            return None
        with contextlib.suppress(*_UNREADABLE):
            begin = max(0, file.num_bytes - _TAIL_BYTES)
            entry = read_last_entry(file.read(begin, _TAIL_BYTES), f"/{MANIFEST}")
            if entry is not None and not entry.is_deflated:
                return _checked_content(file, entry)
        for entry in reversed(read_directory(file.read, file.num_bytes).entries):  # another tool wrote the archive
            if _is_manifest(entry):
                return _checked_content(file, entry)
    except _UNREADABLE:
        pass
    return None


def read_head_at(path: Path) -> Head | None:
    """Return the head of a file's manifest; None if it has no manifest, or a damaged one."""
    with LocalFile(path) as file:
        return read_manifest_head(file)


def _is_manifest(entry: DirectoryEntry) -> bool:
    return entry.name.partition("/")[2] == MANIFEST


def _content_of(file: Readable, entry: DirectoryEntry) -> bytes:
    record = read_local_header(file.read, entry)
    return read_record_bytes(file, record, entry.num_bytes if entry.is_deflated else None)


def _checked_content(file: Readable, entry: DirectoryEntry) -> bytes:
    content = _content_of(file, entry)
    if crc32(content) != entry.crc:
        raise ValueError("its manifest does not have its checksum")
    return content


def _schema_of(file: Readable, entries: Sequence[DirectoryEntry]) -> int:
    """Return the schema that a file was written by; the newest if its manifest is missing or damaged.

    Raises:
        NewerSchema: the schema is unknown, and the manifest is undamaged.
    """
    for entry in filter(_is_manifest, reversed(entries)):
        try:
            content = _content_of(file, entry)
            head = read_head(content)
        except (ValueError, UnsupportedArchive):
            return SCHEMA
        if head.schema <= SCHEMA:
            return head.schema
        if crc32(content) == entry.crc:
            raise NewerSchema(head)
        return SCHEMA
    return SCHEMA


def _has_own_layout(file: Readable, found: Directory, entries: Sequence[DirectoryEntry]) -> bool:
    """Return True if distckpt laid the file out, damaged or not.

    Tools that rewrite an archive write different entries. Tools that add to it leave a record or a comment at its end.
    """
    if not entries or entries[-1].name != f"{FOLDER}/{MANIFEST}" or found.has_comment:
        return False
    return has_own_entries(file.read, found)


def _own_records(entries: Sequence[DirectoryEntry], schema: int) -> tuple[RecordLocation, ...]:
    """Return the locations that distckpt's layout gives to records. Their headers are checked when they are read."""
    records = []
    for entry in entries:
        folder, _, name = entry.name.partition("/")
        if folder != FOLDER:
            raise ValueError(f"record {entry.name!a} is in another folder than the others")
        alignment = alignment_of(entry.num_bytes, schema) if name.startswith("data/") else 1
        records.append(locate(name, entry.num_bytes, entry.header, alignment=alignment))
    return tuple(records)


def _refuse_overlaps(records: Sequence[RecordLocation], directory_at: int) -> None:
    at = 0
    for name, header, offset, num_bytes in records:
        if header < at:
            raise ValueError(f"record {name!a} overlaps the record before it")
        at = offset + num_bytes
    if at > directory_at:
        raise ValueError("its last record overlaps its directory")
