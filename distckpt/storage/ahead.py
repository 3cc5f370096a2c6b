"""Bytes of a file -> the page cache, ahead of who reads them.

Owns the thread that keeps the disk busy, and how its reader goes on behind it. Must not know what the bytes are. Layer
L2, below :mod:`distckpt.storage.opened`.

``sendfile`` to ``/dev/null`` has the kernel read, in order and with its own large read-ahead, and copies nothing. The
thread needs Python's lock once in tens of megabytes, so it goes on while the reader's thread runs Python. Who reads
asks the kernel for what is there (``RWF_NOWAIT``), and sleeps where that is nothing: whoever has brought it, this
process or another.
"""

import contextlib
import os
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

__all__ = ["ReadAhead", "in_turns"]

_STEP_BYTES = 64 << 20
"""What is asked for at once: a reader that gives up waits for no more than that."""
_PAUSE_S = 0.0005
"""A disk of some gigabytes a second brings a megabyte in that time."""


class ReadAhead:
    """Reads ahead on a thread while the body of the context runs.

    What cannot be read is no error here: who reads it after will hear of it.

    Args:
        fd: open for reading.
        ranges: where each begins and ends; in the order in which they are brought.
    """

    def __init__(self, fd: int, ranges: Sequence[tuple[int, int]]) -> None:
        self._fd = fd
        self._ranges = ranges
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None
        self._tells = True

    def __enter__(self) -> Self:
        """Start, where it is worth it."""
        if sum(end - begin for begin, end in self._ranges) > _STEP_BYTES // 8:
            # The reader's own reading ahead would bring the same, in the order of the reader.
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
            self._thread = threading.Thread(target=self._run, name="distckpt-ahead", daemon=True)
            self._thread.start()
        else:
            self._end()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()
        self._end()

    def read(self, memory: memoryview, at: int) -> int:
        """Read bytes when they have been brought, or nothing more comes. One thread.

        Args:
            memory: what they are for; it is filled, but at the file's end.
            at: where they stand.

        Returns:
            How many bytes that was.

        Raises:
            OSError: they cannot be read.
        """
        done = 0
        while done < len(memory) and self._tells and not self._is_over.is_set():
            try:
                num_bytes = os.preadv(self._fd, [memory[done:]], at + done, os.RWF_NOWAIT)
            except BlockingIOError:
                self._is_over.wait(_PAUSE_S)
            except OSError:
                self._tells = False  # not every file system can; and what is wrong is told below
            else:
                done += num_bytes
                if num_bytes == 0:
                    return done
        while done < len(memory):
            num_bytes = os.preadv(self._fd, [memory[done:]], at + done)
            done += num_bytes
            if num_bytes == 0:
                break
        return done

    def _run(self) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            # Opened anew, for what the kernel remembers of the order of reading is the reader's too else.
            fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            stack.callback(os.close, null)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            for begin, end in self._ranges:
                self._read(fd, null, begin, end)
        self._end()

    def _read(self, fd: int, null: int, at: int, end: int) -> None:
        while at < end and not self._is_over.is_set():
            num_bytes = os.sendfile(null, fd, at, min(_STEP_BYTES, end - at))
            if num_bytes == 0:
                return
            at += num_bytes

    def _end(self) -> None:
        """Leave reading ahead to the kernel again."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        self._is_over.set()


def in_turns(num_bytes: int, part: float) -> list[tuple[int, int]]:
    """Cut a file into ranges for readers that bring all of it together.

    Each goes through the same windows, and begins at a place of its own in each: what others have brought meanwhile,
    it finds there. So all have the file in its order; and one alone brings all of it.

    Args:
        num_bytes: the file's length.
        part: of a window, between 0 and 1, where this reader begins.

    Example:
        >>> in_turns(100 << 20, 0.5) == [
        ...     (32 << 20, 64 << 20), (0, 32 << 20), (82 << 20, 100 << 20), (64 << 20, 82 << 20)
        ... ]
        True
    """
    found = []
    for begin in range(0, num_bytes, _STEP_BYTES):
        end = min(begin + _STEP_BYTES, num_bytes)
        cut = begin + int(part * (end - begin))
        found += [one for one in ((cut, end), (begin, cut)) if one[0] < one[1]]
    return found
