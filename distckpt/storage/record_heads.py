"""Reading what a checkpoint says of itself without reading its state: a few kilobytes a file.

Rank-local; issues no collectives.
"""

import contextlib
import os
from pathlib import Path

from distckpt.manifest import Head, read_head
from distckpt.storage.archive import UnsupportedArchive, read_last_entry, read_local_header
from distckpt.storage.image import MANIFEST
from distckpt.storage.verify import begins_as_archive, read_manifest

__all__ = ["head_of", "read_head_at"]

_UNREADABLE = (ValueError, OverflowError, UnsupportedArchive)
_TAIL_BYTES = 4096
_HEAD_BYTES = 16384
_MOST_BYTES = 64 << 20
"""A head that is longer is none."""


def read_head_at(path: Path) -> Head | None:
    """Return the head of a file's manifest; None where the file has no manifest that can be read.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return head_of(file.fileno())


def head_of(fd: int) -> Head | None:
    """Return the head of an open file's manifest; None where the file has no manifest that can be read.

    Args:
        fd: open for reading.

    Raises:
        OSError: it cannot be read.
    """
    try:
        if not begins_as_archive(fd):
            return None
        with contextlib.suppress(*_UNREADABLE):
            line = _first_line(fd)
            if line is not None:
                return read_head(line)
        return read_head(read_manifest(fd))  # another tool has written the archive anew
    except _UNREADABLE:
        return None


def _first_line(fd: int) -> bytes | None:
    """Return the first line of the manifest, where it is the last record and stored; else None."""
    num_bytes = os.fstat(fd).st_size
    begin = max(0, num_bytes - _TAIL_BYTES)
    listed = read_last_entry(os.pread(fd, _TAIL_BYTES, begin), f"/{MANIFEST}")
    if listed is None or listed.is_deflated:
        return None
    slot = read_local_header(lambda at, length: os.pread(fd, length, at), listed)
    found, length = b"", min(slot.num_bytes, _HEAD_BYTES)
    while b"\n" not in found and len(found) < slot.num_bytes and len(found) < _MOST_BYTES:
        part = os.pread(fd, min(length, slot.num_bytes - len(found)), slot.offset + len(found))
        if not part:
            return None
        found, length = found + part, length * 2
    return found.partition(b"\n")[0]
