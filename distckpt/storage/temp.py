"""Temporary files that can be told from a dead process's leftovers.

Owns how a temporary file is named, opened and locked, and when one counts as left over. A lock dies with its process,
so nothing depends on process ids, which are used anew and mean nothing in another container.
"""

import contextlib
import fcntl
import os
import secrets
import socket
import stat
import time
import zlib

from distckpt.policy.naming import TEMP_PREFIX, TEMP_SUFFIX

__all__ = [
    "FILE_MODE",
    "JOINED_FILE_FLAGS",
    "NEW_FILE_FLAGS",
    "close_quietly",
    "new_temp_name",
    "open_temp",
    "remove_if_dead",
]

NEW_FILE_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
JOINED_FILE_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
"""Of a file that another process has made."""
FILE_MODE = 0o666
"""Before umask: a checkpoint is as readable as any file that its user makes."""

# Locks are not seen across hosts on every network file system. Another host's leftover counts as dead only if
# nothing was written to it for this long.
_FOREIGN_STALE_S = 900.0


def close_quietly(fd: int) -> None:
    """Close a descriptor, whatever it reports."""
    # What was written is synced by now, or has failed already: a close that fails tells nothing new.
    with contextlib.suppress(OSError):
        os.close(fd)


def _host_tag() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def new_temp_name() -> str:
    """Return a name for a temporary file of this process."""
    return f"{TEMP_PREFIX}{_host_tag()}-{os.getpid()}-{secrets.token_hex(8)}{TEMP_SUFFIX}"


def open_temp(parent: int) -> tuple[int, str]:
    """Make a temporary file in the directory `parent`, locked for as long as this process lives and holds it open.

    Returns:
        Its descriptor, and its name.

    Raises:
        OSError: it cannot be made; nothing is left behind.
    """
    while True:
        temp = new_temp_name()
        fd = os.open(temp, NEW_FILE_FLAGS, FILE_MODE, dir_fd=parent)
        try:
            # A file system without locks: nobody else can take one either, so nobody clears this file.
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_EX)
            # Between open and lock another process may have taken it for a dead one's and removed it.
            if os.fstat(fd).st_nlink:
                return fd, temp
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temp, dir_fd=parent)
            close_quietly(fd)
            raise
        close_quietly(fd)


def remove_if_dead(parent: int, name: str) -> None:
    """Remove the temporary file `name` in the directory `parent` (a descriptor) unless its writer may be alive.

    Raises:
        OSError: it cannot be told, or not be removed; ``BlockingIOError`` when the writer lives.
    """
    fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    # Open for writing: a network file system grants its locks on nothing else.
    try:
        found = os.fstat(fd)
        ours = name.startswith(f"{TEMP_PREFIX}{_host_tag()}-")
        if not stat.S_ISREG(found.st_mode) or not (ours or time.time() - found.st_mtime > _FOREIGN_STALE_S):
            return
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its writer lives
        if os.stat(name, dir_fd=parent, follow_symlinks=False).st_ino == found.st_ino:
            os.unlink(name, dir_fd=parent)
    finally:
        close_quietly(fd)
