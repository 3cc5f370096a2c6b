"""Bytes of a file -> the page cache, ahead of who reads them.

Owns the thread that keeps the disk busy, and how its reader goes on behind it. Must not know what the bytes are.

``sendfile`` to ``/dev/null`` has the kernel read, in order and with its own large read-ahead, and copies nothing. The
thread needs Python's lock once in tens of megabytes, so it goes on while the reader's thread runs Python. Who reads
asks the kernel for what is there (``RWF_NOWAIT``), and sleeps where that is nothing, whoever brings it: this process,
another, or the kernel, which may begin to read what it is asked for (Linux 6.18 does).
"""

import contextlib
import itertools
import os
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from distckpt._threads import start_thread, wait_all

__all__ = ["Readahead", "staggered_ranges"]

_STEP_BYTES = 64 << 20
"""What is asked for at once: a reader that gives up waits for no more than that. A window has as many."""
_LEAST_BYTES = 8 << 20
"""For what is smaller a thread is not worth it."""
_LEAD_BYTES = 1 << 30
"""How far ahead it goes: what a small memory would have to forget again is of no use."""
_PAUSE_S = 0.0005
"""A disk of some gigabytes a second brings a megabyte in that time."""
_LONG_PAUSE_S = 0.01
_NO_WAIT = getattr(os, "RWF_NOWAIT", 0)
"""0 where Python was built for a C library that does not know it."""


class Readahead:
    """Reads ahead on a thread while the body of the context runs.

    What cannot be read is no error here: who reads it after will hear of it.

    Args:
        fd: open for reading.
        ranges: where each begins and ends; in the order in which they are brought.
    """

    def __init__(self, fd: int, ranges: Sequence[tuple[int, int]]) -> None:
        self._fd = fd
        self._pieces = [
            (at, min(at + _STEP_BYTES, end)) for begin, end in ranges for at in range(begin, end, _STEP_BYTES)
        ]
        self._is_over = threading.Event()
        self._ended: list[threading.Event] = []
        self._asks = False
        self._front = self._read_until = min((begin for begin, _ in self._pieces), default=0)

    def __enter__(self) -> Self:
        """Start, where it is worth it."""
        is_worth_it = sum(end - begin for begin, end in self._pieces) > _LEAST_BYTES
        self._ask(asks=is_worth_it and _NO_WAIT != 0)
        if is_worth_it:
            self._ended.append(start_thread(self._run))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop."""
        self._is_over.set()
        wait_all(self._ended)
        self._ask(asks=False)

    def read_into(self, memory: memoryview, at: int) -> int:
        """Read bytes when they have been brought, or nothing more comes. One thread.

        Args:
            memory: what they are for; it is filled, but at the file's end.
            at: where they stand.

        Returns:
            How many bytes that was.

        Raises:
            OSError: they cannot be read.
        """
        done, self._read_until = 0, at
        while done < len(memory) and self._asks:
            if self._is_over.is_set():
                self._ask(asks=False)
                break
            try:
                num_bytes = os.preadv(self._fd, [memory[done:]], at + done, _NO_WAIT)
            except BlockingIOError:
                if at + done < self._front:
                    break  # it was there, and had to give way to something else
                self._is_over.wait(_PAUSE_S)
            except (OSError, NotImplementedError):  # not every file system can, nor every C library
                self._ask(asks=False)
            else:
                done += num_bytes
                if num_bytes == 0:
                    break  # the end; or not, says preadv2(2) of Linux 5.9 and 5.10
        while done < len(memory):
            num_bytes = os.preadv(self._fd, [memory[done:]], at + done)
            done += num_bytes
            if num_bytes == 0:
                break
        return done

    def _ask(self, *, asks: bool) -> None:
        """Ask for what is there from now on, or no more; then the kernel reads ahead of the reader.

        Where the reader asks, that would bring the same as the thread, in the reader's order.
        """
        self._asks = asks
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM if asks else os.POSIX_FADV_SEQUENTIAL)

    def _run(self) -> None:
        try:
            with contextlib.suppress(OSError):
                self._bring_all()
        finally:
            self._is_over.set()

    def _bring_all(self) -> None:
        with contextlib.ExitStack() as stack:
            # Opened anew, for what the kernel remembers of the order of reading is the reader's too else.
            fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            stack.callback(os.close, null)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            firsts = list(itertools.accumulate((begin for begin, _ in reversed(self._pieces)), min))
            for (begin, end), first in zip(self._pieces, reversed(firsts), strict=True):
                self._front = first  # all before that has been brought
                while self._front - self._read_until > _LEAD_BYTES and not self._is_over.is_set():
                    self._is_over.wait(_LONG_PAUSE_S)
                at = begin
                while at < end and not self._is_over.is_set():
                    num_bytes = os.sendfile(null, fd, at, end - at)
                    at = at + num_bytes if num_bytes else end


def staggered_ranges(num_bytes: int, part: float) -> list[tuple[int, int]]:
    """Cut a file into ranges for readers that bring all of it together.

    Each goes through the same windows, and begins at a place of its own in each: what others have brought meanwhile,
    it finds there. So all have the file in its order; and one alone brings all of it.

    Args:
        num_bytes: the file's length.
        part: of a window, between 0 and 1, where this reader begins.

    Example:
        >>> staggered_ranges(100 << 20, 0.5) == [
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
