"""Bytes of a file -> the page cache, ahead of who reads them.

Owns the thread that keeps the disk busy. Must not know what the bytes are. Layer L2, below
:mod:`distckpt.storage.opened`.

``sendfile`` to ``/dev/null`` has the kernel read, in order and with its own large read-ahead, and copies nothing. The
thread needs Python's lock once in many megabytes, so it goes on while the reader's thread runs Python.
"""

import contextlib
import os
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

__all__ = ["ReadAhead"]

_STEP_BYTES = 8 << 20


class ReadAhead:
    """Reads ahead on a thread while the body of the context runs.

    What cannot be read is no error here: who reads it after will hear of it.

    Args:
        fd: open for reading.
        ranges: where each begins and ends; in the order in which they will be read.
    """

    def __init__(self, fd: int, ranges: Sequence[tuple[int, int]]) -> None:
        self._fd = fd
        self._ranges = ranges
        self._change = threading.Condition()
        self._there = 0
        self._wanted = 0
        self._is_over = sum(end - begin for begin, end in ranges) <= _STEP_BYTES
        self._thread = threading.Thread(target=self._run, name="distckpt-ahead", daemon=True)

    def __enter__(self) -> Self:
        """Start, where it is worth it."""
        if not self._is_over:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop."""
        self._is_over = True
        if self._thread.ident is not None:
            self._thread.join()

    def wait_for(self, num_bytes: int) -> None:
        """Return when the next so many bytes, in the order of the ranges, are there, or nothing more comes.

        Who is ahead of the thread would read the same as it does, and slow it down.
        """
        self._wanted += num_bytes
        while self._there < self._wanted and not self._is_over:
            with self._change:
                if self._there < self._wanted and not self._is_over:
                    self._change.wait(timeout=1.0)  # not for ever: a signal handler may want its turn

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            try:
                for begin, end in self._ranges:
                    os.posix_fadvise(self._fd, begin, end - begin, os.POSIX_FADV_SEQUENTIAL)
                    self._read(null, begin, end)
            finally:
                os.close(null)
        with self._change:
            self._is_over = True
            self._change.notify_all()

    def _read(self, null: int, at: int, end: int) -> None:
        while at < end and not self._is_over:
            num_bytes = os.sendfile(null, self._fd, at, min(_STEP_BYTES, end - at))
            if num_bytes == 0:
                return
            at += num_bytes
            with self._change:
                self._there += num_bytes
                self._change.notify_all()
