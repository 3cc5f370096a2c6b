"""Reading what a checkpoint says of itself without reading its state: a few kilobytes a file.

Rank-local; issues no collectives.
"""

import contextlib
from pathlib import Path

from distckpt._checksum import crc32
from distckpt.ptformat.image import MANIFEST
from distckpt.ptformat.layout import UnsupportedArchive, read_last_entry, read_local_header
from distckpt.ptformat.manifest import Head, read_head
from distckpt.ptformat.verify import begins_as_archive, read_manifest, record_bytes
from distckpt.storage.base import Readable
from distckpt.storage.local import LocalFile

__all__ = ["head_of", "read_head_at"]

_UNREADABLE = (ValueError, OverflowError, UnsupportedArchive)
_TAIL_BYTES = 4096


def read_head_at(path: Path) -> Head | None:
    """Return the head of a file's manifest; None where the file has no manifest that can be read.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be read.
    """
    with LocalFile(path) as file:
        return head_of(file)


def head_of(file: Readable) -> Head | None:
    """Return the head of an open file's manifest; None where there is none, or one that is not as it was written.

    A damaged head could name another handler, or an older run, and so keep the file from being looked at. So all of the
    manifest is read, and compared with its checksum.

    Args:
        file: open for reading.

    Raises:
        OSError: it cannot be read.
    """
    try:
        if not begins_as_archive(file):
            return None
        with contextlib.suppress(*_UNREADABLE):
            found = _last_record(file)
            if found is not None:
                return read_head(found)
        return read_head(read_manifest(file))  # another tool has written the archive anew
    except _UNREADABLE:
        return None


def _last_record(file: Readable) -> bytes | None:
    """Return the manifest, where it is the last record, stored, and as its checksum says; else None."""
    begin = max(0, file.num_bytes - _TAIL_BYTES)
    listed = read_last_entry(file.read(begin, _TAIL_BYTES), f"/{MANIFEST}")
    if listed is None or listed.is_deflated:
        return None
    slot = read_local_header(file.read, listed)
    content = record_bytes(file, slot)
    return content if crc32(content) == listed.crc else None
