"""Where the bytes of a file go on their way to the operating system.

Owns gathering, short writes and the first error. Must not know what the bytes mean, nor the file's name.
"""

import errno
import os

__all__ = ["Sink"]

_BUFFER_BYTES = 1 << 20


class Sink:
    """A file descriptor to write to: gathers small writes, passes large ones on, counts the bytes.

    Not a file object of Python's: torch's writer calls ``write`` from C++ and may turn an ``OSError`` into one of
    its own, so the first error is kept here; and nothing may be flushed behind our back after a failure.

    Args:
        fd: open for writing; stays the caller's.

    Attributes:
        num_bytes: how many bytes were taken.
        error: the first error of the operating system, if any.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pending = bytearray()
        self.num_bytes = 0
        self.error: OSError | None = None

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Take `data`; returns its length in bytes."""
        view = memoryview(data).cast("B")
        self.num_bytes += len(view)
        if len(self._pending) + len(view) <= _BUFFER_BYTES:
            self._pending += view
        else:
            self.flush()
            self._write_through(view)
        return len(view)

    def flush(self) -> None:
        """Hand what is gathered to the operating system."""
        pending, self._pending = self._pending, bytearray()
        self._write_through(memoryview(pending))

    def _write_through(self, view: memoryview) -> None:
        if self.error is not None:
            raise self.error
        try:
            while len(view):
                written = os.write(self._fd, view)
                if written == 0:
                    raise OSError(errno.EIO, "the file system took no bytes")  # noqa: TRY301 - kept like the system's own
                view = view[written:]
        except OSError as error:
            self.error = error
            raise
