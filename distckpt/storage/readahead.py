"""Bring parts of a file into the page cache before they are read.

A thread lets the kernel read, by ``sendfile`` to ``/dev/null``: in order, with the kernel's large read-ahead, without a
copy. The thread needs Python's lock once in tens of megabytes, so it goes on while another thread runs Python. The
reader asks the kernel for bytes in the page cache only (``RWF_NOWAIT``), and sleeps if there are none. This process,
another one, or the kernel itself may bring them: Linux 6.18 may start to read what it is asked for.

The thread does not advise ``POSIX_FADV_SEQUENTIAL``, because that doubles the kernel's read-ahead window. With a window
of 8 MiB, in a virtual machine, it made two processes that read 512 MiB each take 0.98 to 1.15 s instead of 0.55 to
0.76, and three times as long beside other work. With a window of 128 KiB it made no difference.
"""

import contextlib
import itertools
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from distckpt._threads import start_thread, wait_all

_STEP_BYTES = 64 << 20
"""Length of one ``sendfile``, which a reader that stops has to wait for, and of a window of `staggered_ranges`."""
_LEAST_BYTES = 8 << 20
"""No thread is started for less."""
_LEAD_BYTES = 1 << 30
"""How far the thread gets ahead of the reader: a small memory would drop more again."""
_SAMPLE_BYTES = 4 << 20
"""Distance between the bytes that :func:`is_cached` samples."""
_PAUSE_S = 0.0005
"""A disk of two gigabytes a second brings a megabyte in this time."""
_LONG_PAUSE_S = 0.01
_NO_WAIT = getattr(os, "RWF_NOWAIT", 0)
"""0 if Python was built for a C library without it."""


class Readahead:
    """A context that brings ranges of a file into the page cache while its body runs.

    Errors of the thread are ignored: the reader gets the same ones.

    Args:
        fd: open for reading.
        ranges: begin and end of each, in the order to read ahead.
    """

    def __init__(self, fd: int, ranges: Sequence[tuple[int, int]]) -> None:
        self._fd = fd
        self._steps = [
            (at, min(at + _STEP_BYTES, end)) for begin, end in ranges for at in range(begin, end, _STEP_BYTES)
        ]
        self._has_ended = threading.Event()
        self._threads: list[threading.Event] = []
        self._is_waiting = False
        self._front = self._read_until = min((begin for begin, _ in self._steps), default=0)

    def __enter__(self) -> Self:
        """Start the thread, unless the ranges are short."""
        is_worth_it = sum(end - begin for begin, end in self._steps) > _LEAST_BYTES
        self._set_waiting(is_waiting=is_worth_it and _NO_WAIT != 0)
        if is_worth_it:
            self._threads.append(start_thread(self._run))
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the thread."""
        self._has_ended.set()
        wait_all(self._threads)
        self._set_waiting(is_waiting=False)

    def read_into(self, memory: memoryview, offset: int) -> int:
        """Fill `memory` once its bytes are in the page cache or the thread has ended, and return their number."""
        done, self._read_until = 0, offset
        while done < len(memory) and self._is_waiting:
            if self._has_ended.is_set():
                self._set_waiting(is_waiting=False)
                break
            try:
                num_bytes = os.preadv(self._fd, [memory[done:]], offset + done, _NO_WAIT)
            except BlockingIOError:
                if offset + done < self._front:
                    break  # the page cache has dropped it again
                self._has_ended.wait(_PAUSE_S)
            except (OSError, NotImplementedError):  # the file system or the C library does not support it
                self._set_waiting(is_waiting=False)
            else:
                done += num_bytes
                if num_bytes == 0:
                    break  # the end; or not, with Linux 5.9 and 5.10, see preadv2(2)
        while done < len(memory):
            num_bytes = os.preadv(self._fd, [memory[done:]], offset + done)
            done += num_bytes
            if num_bytes == 0:
                break
        return done

    def _set_waiting(self, *, is_waiting: bool) -> None:
        """Wait for the thread from now on, or let the kernel read ahead of the reader.

        While the reader waits, the kernel's read-ahead would only repeat the thread's work, in the reader's order.
        """
        self._is_waiting = is_waiting
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM if is_waiting else os.POSIX_FADV_NORMAL)

    def _run(self) -> None:
        try:
            with contextlib.suppress(OSError):
                self._bring_all()
        finally:
            self._has_ended.set()

    def _bring_all(self) -> None:
        with contextlib.ExitStack() as stack:
            # A descriptor of its own: the kernel keeps the state of sequential reading for each.
            fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            stack.callback(os.close, null)
            firsts = list(itertools.accumulate((begin for begin, _ in reversed(self._steps)), min))
            for (begin, end), first in zip(self._steps, reversed(firsts), strict=True):
                self._front = first  # all bytes before it were brought
                while self._front - self._read_until > _LEAD_BYTES and not self._has_ended.is_set():
                    self._has_ended.wait(_LONG_PAUSE_S)
                at = begin
                while at < end and not self._has_ended.is_set():
                    num_bytes = os.sendfile(null, fd, at, end - at)
                    at = at + num_bytes if num_bytes else end


def is_cached(path: Path) -> bool:
    """Return True if samples of a file are all in the page cache: reading ahead would take longer than reading.

    Raises:
        OSError: the file cannot be opened.
    """
    if not _NO_WAIT:
        return False
    with path.open("rb") as file:
        size, sample = os.fstat(file.fileno()).st_size, bytearray(1)
        try:
            return all(os.preadv(file.fileno(), [sample], at, _NO_WAIT) for at in range(0, size, _SAMPLE_BYTES))
        except (OSError, NotImplementedError):  # BlockingIOError: it is not there
            return False


def staggered_ranges(num_bytes: int, fraction: float) -> list[tuple[int, int]]:
    """Return ranges for one of several processes that bring the same file into the page cache together.

    All go through the same windows in order, and each begins at its own place in every window: what others have brought
    meanwhile costs it nothing. A single process brings the whole file.

    Args:
        num_bytes: the file's length.
        fraction: from 0 to 1: where in a window this process begins.

    Example:
        >>> staggered_ranges(100 << 20, 0.5) == [
        ...     (32 << 20, 64 << 20), (0, 32 << 20), (82 << 20, 100 << 20), (64 << 20, 82 << 20)
        ... ]
        True
    """
    found = []
    for begin in range(0, num_bytes, _STEP_BYTES):
        end = min(begin + _STEP_BYTES, num_bytes)
        cut = begin + int(fraction * (end - begin))
        found += [one for one in ((cut, end), (begin, cut)) if one[0] < one[1]]
    return found
