"""An nbdkit plugin: a disk that writes down what is done to it.

Runs in nbdkit's own Python, not in the tests'. Each write and each flush goes to a log, as `tests.crash.reordered`
reads it. The disk itself is a file.

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
    """Take an argument."""
    _given[key] = value


class _Disk:
    def __init__(self) -> None:
        self.image = os.open(_given["image"], os.O_RDWR)
        self.log = os.open(_given["log"], os.O_WRONLY | os.O_APPEND)

    def note(self, kind: bytes, offset: int, data: bytes) -> None:
        os.writev(self.log, [_HEADER.pack(kind, offset, len(data)), data])  # appended whole


def open(readonly: bool) -> _Disk:  # noqa: A001, FBT001 - named by nbdkit
    """Return what the other functions are given."""
    del readonly
    return _Disk()


def get_size(disk: _Disk) -> int:
    """Return the number of bytes."""
    return os.fstat(disk.image).st_size


def can_fua(disk: _Disk) -> Any:
    """Say that a write may ask to be flushed: as a flush of its own."""
    del disk
    return nbdkit.FUA_EMULATE


def pread(disk: _Disk, buffer: Any, offset: int, flags: int) -> None:
    """Read."""
    del flags
    os.preadv(disk.image, [buffer], offset)


def pwrite(disk: _Disk, buffer: Any, offset: int, flags: int) -> None:
    """Write."""
    del flags
    data = bytes(buffer)
    os.pwrite(disk.image, data, offset)
    disk.note(_WRITE, offset, data)


def flush(disk: _Disk, flags: int) -> None:
    """Note that all that was written before is durable."""
    del flags
    disk.note(_FLUSH, 0, b"")
