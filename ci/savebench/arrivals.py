"""Wait for files to arrive in a folder, with inotify(7).

A waiting thread does not hold the GIL, which a polling one would take every few milliseconds.
"""

import ctypes
import errno
import os
import struct
from pathlib import Path
from typing import Self

_IN_MOVED_TO, _IN_DELETE, _IN_Q_OVERFLOW, _IN_IGNORED = 0x80, 0x200, 0x4000, 0x8000
_HEAD = struct.Struct("iIII")
_MAX_BYTES = 1 << 16


class Arrivals:
    """Notes the changes of a folder from its construction on; a context manager.

    Args:
        folder: the folder. It must exist.

    Raises:
        OSError: the folder cannot be watched.
    """

    def __init__(self, folder: Path) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        self._folder = folder
        self._fd = _checked(library.inotify_init1(os.O_CLOEXEC), folder)
        try:
            _checked(library.inotify_add_watch(self._fd, os.fsencode(folder), _IN_MOVED_TO | _IN_DELETE), folder)
            self._names = {path.name for path in folder.iterdir()}  # after the watch starts, so that none is missed
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        """Return the object."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the watch."""
        os.close(self._fd)

    def wait_for_another(self, suffix: str) -> None:
        """Block until a file with `suffix` was renamed into the folder, and the older ones are gone.

        Raises:
            OSError: the kernel dropped events.
        """
        older = {name for name in self._names if name.endswith(suffix)}
        newer: set[str] = set()
        while older or not newer:
            events = os.read(self._fd, _MAX_BYTES)
            at = 0
            while at < len(events):
                _, mask, _, length = _HEAD.unpack_from(events, at)
                at += _HEAD.size
                name = os.fsdecode(events[at : at + length].rstrip(b"\0"))
                at += length
                if mask & (_IN_Q_OVERFLOW | _IN_IGNORED):
                    raise OSError(errno.EIO, "inotify dropped events", str(self._folder))
                if mask & _IN_DELETE:
                    older.discard(name)
                elif name.endswith(suffix):
                    newer.add(name)
                    older.discard(name)


def _checked(answer: int, folder: Path) -> int:
    if answer < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(folder))
    return answer
