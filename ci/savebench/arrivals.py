"""What comes into a folder and what goes from it, told by the kernel (inotify(7)).

Owns the waiting for it. A thread that waits here holds nothing that the training needs; one that looked every few
milliseconds would take Python's lock as often.
"""

import ctypes
import errno
import os
import struct
from pathlib import Path
from typing import Self

__all__ = ["Arrivals"]

_IN_MOVED_TO, _IN_DELETE, _IN_Q_OVERFLOW, _IN_IGNORED = 0x80, 0x200, 0x4000, 0x8000
_HEAD = struct.Struct("iIII")
_MOST_BYTES = 1 << 16


class Arrivals:
    """A folder's files from now on; a context.

    Args:
        folder: which. It exists.

    Raises:
        OSError: it cannot be watched.
    """

    def __init__(self, folder: Path) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        self._folder = folder
        self._fd = _checked(library.inotify_init1(os.O_CLOEXEC), folder)
        try:
            _checked(library.inotify_add_watch(self._fd, os.fsencode(folder), _IN_MOVED_TO | _IN_DELETE), folder)
            self._names = {path.name for path in folder.iterdir()}  # after the watch: nothing falls between the two
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        os.close(self._fd)

    def wait_for_another(self, suffix: str) -> None:
        """Return when a file with this suffix has been renamed into the folder, and those that were there are gone.

        Raises:
            OSError: there is no telling any more.
        """
        older = {name for name in self._names if name.endswith(suffix)}
        newer: set[str] = set()
        while older or not newer:
            events = os.read(self._fd, _MOST_BYTES)
            at = 0
            while at < len(events):
                _, mask, _, length = _HEAD.unpack_from(events, at)
                at += _HEAD.size
                name = os.fsdecode(events[at : at + length].rstrip(b"\0"))
                at += length
                if mask & (_IN_Q_OVERFLOW | _IN_IGNORED):
                    raise OSError(errno.EIO, "the kernel tells no more of it", str(self._folder))
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
