"""Show a progress bar on standard error, in a terminal only, once the work has taken a second."""

import sys
import threading
import time
from collections.abc import Callable
from typing import Self, TextIO

from distckpt.cli.output import format_bytes, printable

_DELAY_S = 1.0
_PERIOD_S = 0.1
_BAR_CHARS = 24


class Progress:
    """A context manager that shows a progress bar. Thread-safe.

    Args:
        what: a verb for the work, such as ``verifying``.
        num_bytes: total number of bytes.
        stream: the stream for the bar; None for standard error. Nothing is shown unless it is a terminal.
        clock: a monotonic clock.
    """

    def __init__(
        self,
        what: str,
        num_bytes: int,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what = printable(what)
        self._num_bytes = max(num_bytes, 1)
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._lock = threading.Lock()
        self._done = 0
        self._begin_s = clock()
        self._next_s = self._begin_s + _DELAY_S if self._stream.isatty() else float("inf")
        self._is_shown = False

    def __enter__(self) -> Self:
        """Return this object."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the bar."""
        if self._is_shown:
            self._stream.write("\r\033[K")
            self._stream.flush()

    def advance(self, num_bytes: int) -> None:
        """Report that `num_bytes` more bytes are done."""
        with self._lock:
            self._done += num_bytes
            now_s = self._clock()
            if now_s < self._next_s:
                return
            self._next_s, self._is_shown = now_s + _PERIOD_S, True
            fraction = min(self._done / self._num_bytes, 1.0)
            rate = self._done / max(now_s - self._begin_s, 1e-9)
            filled = "#" * int(fraction * _BAR_CHARS)
            bar = f"{self._what} [{filled:<{_BAR_CHARS}}] {fraction:4.0%} {format_bytes(rate)}/s"
            self._stream.write(f"\r{bar}\033[K")
            self._stream.flush()
