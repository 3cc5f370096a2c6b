"""File descriptors and memory: O_DIRECT, allocation, buffered writing, and many chunks in one call.

Writing through the page cache copies every byte once more and evicts the training data from memory; O_DIRECT does
neither. It needs memory, offset and length aligned to 4096 bytes. File systems without it (tmpfs, some FUSE and network
file systems) are written through the page cache.

After each system call a thread waits for the GIL, which an optimizer's step may hold for 60 ms. A rank of a sharded job
writes hundreds of chunks: in C (``_native/chunks.c``) it waits once for all of them.
"""

import contextlib
import ctypes
import errno
import itertools
import os
from array import array
from collections.abc import Callable, Sequence

from distckpt.storage.base import BLOCK_BYTES, Chunk

try:
    from distckpt._native import chunks as _native
except ImportError:  # built without a compiler, or for another machine
    _native = None  # type: ignore[assignment]  # a module that may be absent has no type of its own

_BUFFER_BYTES = 1 << 20
_COMPARE_BYTES = 8 << 20


class DirectFile:
    """A file that is written with O_DIRECT where the file system supports it. One thread at a time.

    Args:
        fd: open for writing; the caller closes it. Used for what O_DIRECT cannot write.
        parent: descriptor of the file's folder, which the caller keeps open as well.
        name: the file's name in it.
    """

    def __init__(self, fd: int, parent: int, name: str) -> None:
        self._fd = fd
        self._parent = parent
        self._name = name
        self._direct: int | None = None  # -1 if the file cannot be opened with O_DIRECT

    def close(self) -> None:
        """Close the descriptor that was opened for O_DIRECT."""
        if self._direct is not None and self._direct >= 0:
            close_quietly(self._direct)
        self._direct = -1

    def write_chunks(self, chunks: Sequence[Chunk]) -> None:
        """Write all bytes of some chunks."""
        done = 0
        while done < len(chunks):
            if _native is not None and len(chunks) - done > 1:
                done += _native.write(self._fd, self._open(), chunks[done:])
            if done < len(chunks):  # the only one, or one of which not all was written
                offset, data = chunks[done]
                if isinstance(data, bytes):  # aligned by chance only
                    write_at(self._fd, memoryview(data), offset)
                else:
                    self.write(data, offset)
                done += 1

    def write(self, data: memoryview, offset: int) -> None:
        """Write `data` at an offset: whole blocks with O_DIRECT, where memory and offset are aligned."""
        done, direct = 0, self._open() if offset % BLOCK_BYTES == 0 else -1
        if direct >= 0:
            try:
                done = self._write_blocks(direct, data[: len(data) // BLOCK_BYTES * BLOCK_BYTES], offset)
            except OSError as error:
                if error.errno != errno.EINVAL:  # EINVAL: the memory is not aligned
                    raise
        write_at(self._fd, data[done:], offset + done)

    def _open(self) -> int:
        if self._direct is None:
            self._direct = -1
            with contextlib.suppress(OSError):  # mostly EINVAL; after any error the page cache is used
                flags = os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC
                self._direct = os.open(self._name, flags, dir_fd=self._parent)
        return self._direct

    @staticmethod
    def _write_blocks(fd: int, data: memoryview, offset: int) -> int:
        """Return how many bytes were written: all, or whole blocks up to a short write."""
        done = 0
        while done < len(data):
            done += _num_written(os.pwrite(fd, data[done:], offset + done))
            if done % BLOCK_BYTES:
                return done // BLOCK_BYTES * BLOCK_BYTES
        return done


class BufferedWriter:
    """A binary stream for ``torch.save`` over a function that writes chunks.

    Small writes are gathered. The first error is kept and raised by every later write: torch calls ``write`` from C++,
    may replace the error, and goes on to write the file's end.

    Args:
        write_chunks: such as :meth:`~distckpt.storage.base.NewFile.write`.

    Attributes:
        num_bytes: how many bytes were taken.
        error: the first error; None if there was none.
    """

    def __init__(self, write_chunks: Callable[[Sequence[Chunk]], None]) -> None:
        self._write_chunks = write_chunks
        self._pending = bytearray()
        self.num_bytes = 0
        self.error: OSError | None = None

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Take `data`, and return its length in bytes."""
        view = memoryview(data).cast("B")
        if len(self._pending) + len(view) <= _BUFFER_BYTES:
            self._pending += view
            self.num_bytes += len(view)
        else:
            self.flush()
            self._write_through(view, self.num_bytes)
            self.num_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Write what was gathered."""
        pending, self._pending = self._pending, bytearray()
        if pending:
            self._write_through(memoryview(pending), self.num_bytes - len(pending))

    def _write_through(self, view: memoryview, offset: int) -> None:
        if self.error is not None:
            raise self.error
        try:
            self._write_chunks([Chunk(offset, view)])
        except OSError as error:
            self.error = error
            raise


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at an offset, through the page cache."""
    done = 0
    while done < len(data):
        done += _num_written(os.pwrite(fd, data[done:], offset + done))


def find_difference(fd: int, chunks: Sequence[Chunk]) -> Chunk | None:
    """Return the first chunk whose bytes a file does not have; None if it has all. Raises OSError."""
    while _native is not None:
        with contextlib.suppress(InterruptedError):  # a signal's handler has run
            index = _native.find_difference(fd, chunks)
            return chunks[index] if index >= 0 else None
    for chunk in chunks:
        for begin in range(0, len(chunk.data), _COMPARE_BYTES):
            expected = chunk.data[begin : begin + _COMPARE_BYTES]
            if os.pread(fd, len(expected), chunk.offset + begin) != expected:
                return chunk
    return None


def has_hole(fd: int, ranges: Sequence[tuple[int, int]]) -> bool:
    """Return True if the file system reports a hole in one of the ranges; False if it cannot tell.

    Args:
        fd: of the file. Its position changes.
        ranges: begin and end of each, in ascending order.
    """
    if _native is not None:
        return _native.has_hole(fd, array("q", itertools.chain.from_iterable(ranges)))
    try:
        return any(os.lseek(fd, begin, os.SEEK_HOLE) < end for begin, end in ranges if begin < end)
    except OSError as error:
        return error.errno == errno.ENXIO  # past the file's end


def allocate(fd: int, num_bytes: int) -> None:
    """Set a file's length, and reserve disk blocks where the file system can do so without writing them."""
    if _fallocate is not None:
        ctypes.set_errno(0)
        if _fallocate(fd, 0, 0, num_bytes) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINTR):
            raise OSError(number, os.strerror(number))
    os.ftruncate(fd, num_bytes)  # os.posix_fallocate would write every block


def close_quietly(fd: int) -> None:
    """Close a descriptor and ignore errors: the data are synced by now, or their write has failed before."""
    with contextlib.suppress(OSError):
        os.close(fd)


def _find_fallocate() -> Callable[[int, int, int, int], int] | None:
    library = ctypes.CDLL(None, use_errno=True)
    function = getattr(library, "fallocate64", None)  # musl does not have this name
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return function


_fallocate = _find_fallocate()


def _num_written(num_bytes: int) -> int:
    if num_bytes == 0:
        raise OSError(errno.EIO, "the file system took no bytes")
    return num_bytes
