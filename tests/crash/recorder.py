"""An nbdkit plugin: a disk that records each write and each flush.

Runs in nbdkit's own Python. `tests.crash.reordered` reads the log. The disk itself is a file.

    nbdkit python recorder.py image=... log=...
"""

import os
import struct
from typing import Any

import nbdkit  # type: ignore[import-not-found]  # given by nbdkit

API_VERSION = 2
_HEADER = struct.Struct("<cqq")
_WRITE, _FLUSH = b"W", b"F"
_given: dict[str, str] = {}


def config(key: str, value: str) -> None:
    """Keep an argument of the command line."""
    _given[key] = value


class _Disk:
    def __init__(self) -> None:
        self.image = os.open(_given["image"], os.O_RDWR)
        self.log = os.open(_given["log"], os.O_WRONLY | os.O_APPEND)

    def note(self, kind: bytes, offset: int, data: bytes) -> None:
        os.writev(self.log, [_HEADER.pack(kind, offset, len(data)), data])  # appended whole


def open(readonly: bool) -> _Disk:  # noqa: A001, FBT001 - named by nbdkit
    """Return the handle that nbdkit passes to the other functions."""
    del readonly
    return _Disk()


def get_size(disk: _Disk) -> int:
    """Return the number of bytes."""
    return os.fstat(disk.image).st_size


def can_fua(disk: _Disk) -> Any:
    """Return that nbdkit shall replace a write with a flush by the two."""
    del disk
    return nbdkit.FUA_EMULATE


def pread(disk: _Disk, buffer: Any, offset: int, flags: int) -> None:
    """Read bytes."""
    del flags
    os.preadv(disk.image, [buffer], offset)


def pwrite(disk: _Disk, buffer: Any, offset: int, flags: int) -> None:
    """Write bytes, and record them."""
    del flags
    data = bytes(buffer)
    os.pwrite(disk.image, data, offset)
    disk.note(_WRITE, offset, data)


def flush(disk: _Disk, flags: int) -> None:
    """Record that all earlier writes are durable."""
    del flags
    disk.note(_FLUSH, 0, b"")
