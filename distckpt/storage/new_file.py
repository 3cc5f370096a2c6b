"""A file of a directory that is being written, and becomes a checkpoint all at once.

A save makes these system calls, in this order:

1. create a temporary file in the folder of the final name, and lock it
2. write, fsync
3. rename it to the final name
4. fsync the folder

The lock ends with the process that holds it: a later save deletes temporary files that no process has locked. Process
ids would not do, as they are reused and differ between containers.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import socket
import stat
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from distckpt.errors import SaveError, save_error
from distckpt.policy.naming import TEMP_PREFIX, TEMP_SUFFIX, is_temp
from distckpt.storage.base import Chunk, Readable
from distckpt.storage.direct_io import DirectFile, allocate, close_quietly, find_difference, has_hole

DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
CREATE_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
FILE_MODE = 0o666  # minus umask, as any file of the user
_FOREIGN_STALE_S = 900.0
"""Some network file systems do not show locks to other hosts. A temporary file of another host counts as dead when
nothing was written to it for this long."""


class OpenFile:
    """A descriptor with its path; reading at offsets."""

    def __init__(self, fd: int, path: Path) -> None:
        self.fd = fd
        self.path = path

    @property
    def num_bytes(self) -> int:
        """The file's length."""
        return os.fstat(self.fd).st_size

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Return the bytes at an offset; fewer at the end of the file."""
        return os.pread(self.fd, num_bytes, offset)

    def read_into(self, memory: memoryview, offset: int) -> int:
        """Read into `memory`, and return the number of bytes; 0 at the end of the file."""
        return os.preadv(self.fd, [memory], offset)


class LocalNewFile(OpenFile):
    """A file that is being written; see :class:`~distckpt.storage.base.NewFile`.

    Attributes:
        fd: descriptor, open for reading and writing.
        token: the temporary name, in the folder of the final one.
    """

    def __init__(self, path: Path, fd: int, parent: int, token: str, *, is_owner: bool) -> None:
        super().__init__(fd, path)
        self.token = token
        self._parent = parent
        self._is_owner = is_owner
        self._is_open = True
        self._direct = DirectFile(fd, parent, token)

    def __enter__(self) -> Self:
        """Return the file."""
        return self

    def __exit__(self, *_: object) -> None:
        """Call :meth:`abort`."""
        self.abort()

    def write(self, chunks: Sequence[Chunk]) -> None:
        """Write all bytes of some chunks, with O_DIRECT where it can be."""
        try:
            self._direct.write_chunks(chunks)
        except OSError as error:
            raise self._failure(f"writing {_describe(chunks)}", error) from error

    def allocate(self, num_bytes: int) -> None:
        """Set the file's length and reserve disk blocks."""
        try:
            allocate(self.fd, num_bytes)
        except OSError as error:
            raise self._failure(f"allocating {num_bytes} bytes", error) from error

    def sync(self) -> None:
        """Block until the file's bytes are durable."""
        try:
            os.fsync(self.fd)
        except OSError as error:
            raise self._failure("syncing", error) from error

    def has_hole(self, ranges: Sequence[tuple[int, int]]) -> bool:
        """Return True if the file system reports a hole: it has left out zeros, or lost what was written."""
        return has_hole(self.fd, ranges)

    def compare(self, chunks: Sequence[Chunk]) -> None:
        """Compare some chunks with the file's bytes."""
        try:
            found = find_difference(self.fd, chunks)
            if found is not None:
                chunks = [found]
                raise OSError(errno.EIO, "it does not hold what was written")  # noqa: TRY301 - one error path
        except OSError as error:
            raise self._failure(f"checking {_describe(chunks)}", error) from error

    def commit(self, num_bytes: int, check: Callable[[Readable], Sequence[str]] | None = None) -> None:
        """Sync the file, rename it, sync the directory."""
        self.sync()
        doing = "checking"
        try:
            if self.num_bytes != num_bytes:
                what = f"the file system reported {num_bytes} bytes written, but holds {self.num_bytes}"
                raise OSError(errno.EIO, what)  # noqa: TRY301 - one error path for all steps
            faults = check(self) if check is not None and self.has_hole([(0, num_bytes)]) else ()
            if faults:
                raise OSError(errno.EIO, f"it does not hold what was written: {faults[0]}")  # noqa: TRY301 - as above
            doing = "renaming its temporary file"
            if self.token != self.path.name:
                os.rename(self.token, self.path.name, src_dir_fd=self._parent, dst_dir_fd=self._parent)
        except OSError as error:
            raise self._failure(doing, error) from error
        self.token = self.path.name
        try:
            sync_directory(self._parent)
        except OSError as error:
            msg = (
                f"{self.path} was written and renamed, but its directory could not be synced ({text_of(error)}): it "
                "may not survive a power cut"
            )
            raise save_error(msg, error, renamed=True) from error

    def abort(self) -> None:
        """Close the file; its owner deletes it unless it has its final name."""
        if not self._is_open:
            return
        self._is_open = False
        if self._is_owner and self.token != self.path.name:
            with contextlib.suppress(OSError):  # a later save deletes it
                os.unlink(self.token, dir_fd=self._parent)
        self._direct.close()
        close_quietly(self.fd)
        close_quietly(self._parent)

    def _failure(self, doing: str, error: OSError) -> SaveError:
        return save_error(f"cannot save {self.path}: {doing} failed ({text_of(error)})", error)


def _describe(chunks: Sequence[Chunk]) -> str:
    where = f"at offset {chunks[0].offset}" if len(chunks) == 1 else f"in {len(chunks)} chunks"
    return f"{sum(len(one.data) for one in chunks)} bytes {where}"


def sync_directory_at(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, DIRECTORY_FLAGS)
    try:
        sync_directory(fd)
    finally:
        close_quietly(fd)


def sync_directory(fd: int) -> None:
    """Make the names in a directory durable."""
    try:
        os.fsync(fd)
    except OSError as error:
        # CIFS and some FUSE file systems cannot sync a directory; they make names durable themselves.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def new_temp_name() -> str:
    """Return a name for a temporary file of this process."""
    return f"{TEMP_PREFIX}{_host_tag()}-{os.getpid()}-{secrets.token_hex(8)}{TEMP_SUFFIX}"


def _host_tag() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def create_temp(parent: int) -> tuple[int, str]:
    """Create and lock a temporary file; return its descriptor and its name."""
    while True:
        temp = new_temp_name()
        fd = os.open(temp, CREATE_FLAGS, FILE_MODE, dir_fd=parent)
        try:
            # On a file system without locks no process can take one, so none deletes this file.
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_EX)
            # Another process may have deleted it between open and lock.
            if os.fstat(fd).st_nlink:
                return fd, temp
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temp, dir_fd=parent)
            close_quietly(fd)
            raise
        close_quietly(fd)


def remove_dead_temps(parent: int) -> None:
    """Delete temporary files whose process is dead. Files that cannot be examined or deleted stay for a later save."""
    with contextlib.suppress(OSError):
        for name in filter(is_temp, os.listdir(parent)):
            with contextlib.suppress(OSError):
                _remove_if_dead(parent, name)


def _remove_if_dead(parent: int, name: str) -> None:
    # Open for writing: a network file system grants exclusive locks on nothing else.
    fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or not _is_lock_known(name, found):
            return
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: the process that writes it is alive
        if os.stat(name, dir_fd=parent, follow_symlinks=False).st_ino == found.st_ino:
            os.unlink(name, dir_fd=parent)
    finally:
        close_quietly(fd)


def _is_lock_known(name: str, found: os.stat_result) -> bool:
    is_of_this_host = name.startswith(f"{TEMP_PREFIX}{_host_tag()}-")
    return is_of_this_host or time.time() - found.st_mtime > _FOREIGN_STALE_S


def is_being_written(path: Path) -> bool:
    """Return True unless the process that writes a temporary file is dead, as far as this host can know.

    Raises:
        OSError: the file cannot be opened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not _is_lock_known(path.name, os.fstat(fd)):
            return True
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        close_quietly(fd)
    return False


def text_of(error: OSError) -> str:
    """Return the operating system's name and text of an error."""
    code = errno.errorcode.get(error.errno, str(error.errno)) if error.errno is not None else "no errno"
    return f"{code}: {error.strerror}"
