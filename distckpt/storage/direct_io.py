"""Bytes of page-aligned memory -> a file, past the page cache where the file system lets us.

Owns O_DIRECT and what it asks for. Must not know what the bytes mean.

Writing through the page cache would copy every byte once more and push the training data out of memory; O_DIRECT
leaves the copying to the disk. It wants memory, offset and length on borders of 4096 bytes. File systems without it
(tmpfs, some FUSE and network ones) take everything the usual way.
"""

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable
from types import TracebackType
from typing import Self

from distckpt.storage.temp import close_quietly

__all__ = ["BLOCK_BYTES", "DirectFile", "allocate", "write_at"]

BLOCK_BYTES = 4096
"""Alignment that O_DIRECT needs, in bytes. A page, so that two writers of one file share none."""


class DirectFile:
    """A file that is written in large pieces, at offsets; a context. One thread at a time.

    Args:
        fd: open for writing; stays the caller's. What O_DIRECT does not take goes through it.
        parent: a descriptor of the folder that the file is in.
        name: the file's, there.
    """

    def __init__(self, fd: int, parent: int, name: str) -> None:
        self._fd = fd
        self._direct: int | None = None
        with contextlib.suppress(OSError):  # EINVAL mostly; whatever it is, there is the usual way
            flags = os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._direct = os.open(name, flags, dir_fd=parent)

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close what was opened."""
        if self._direct is not None:
            close_quietly(self._direct)

    def write(self, data: memoryview, offset: int) -> None:
        """Write `data` at an offset. O_DIRECT takes what begins on a border of 4096 bytes, in memory that does so too.

        Raises:
            OSError: the operating system refused.
        """
        done = 0
        if self._direct is not None and offset % BLOCK_BYTES == 0:
            try:
                done = self._write_blocks(self._direct, data[: len(data) // BLOCK_BYTES * BLOCK_BYTES], offset)
            except OSError as error:
                if error.errno != errno.EINVAL:  # that is: not on these borders
                    raise
        write_at(self._fd, data[done:], offset + done)

    @staticmethod
    def _write_blocks(fd: int, data: memoryview, offset: int) -> int:
        """Return how many bytes were written: all, or as many whole blocks as could be."""
        done = 0
        while done < len(data):
            done += _written(os.pwrite(fd, data[done:], offset + done))
            if done % BLOCK_BYTES:
                return done // BLOCK_BYTES * BLOCK_BYTES
        return done


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at an offset, the usual way.

    Raises:
        OSError: the operating system refused.
    """
    done = 0
    while done < len(data):
        done += _written(os.pwrite(fd, data[done:], offset + done))


def allocate(fd: int, num_bytes: int) -> None:
    """Give a file a length, and blocks of the disk where the file system can do that without writing them.

    Raises:
        OSError: the operating system refused; ENOSPC where there are not so many blocks.
    """
    if _fallocate is not None:
        ctypes.set_errno(0)
        if _fallocate(fd, 0, 0, num_bytes) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINTR):
            raise OSError(number, os.strerror(number))
    os.ftruncate(fd, num_bytes)  # os.posix_fallocate would write into every block there


def _find_fallocate() -> Callable[[int, int, int, int], int] | None:
    library = ctypes.CDLL(None, use_errno=True)
    function = getattr(library, "fallocate64", None)  # musl has no name of its own for it
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return function


_fallocate = _find_fallocate()


def _written(num_bytes: int) -> int:
    if num_bytes == 0:
        raise OSError(errno.EIO, "the file system took no bytes")
    return num_bytes
