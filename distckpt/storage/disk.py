"""A local directory in which a file appears whole and durable, or not at all.

Owns the order of the system calls: temporary file in the same directory, write, fsync, rename, fsync of the
directory. Owns which names are followed (none that leaves the directory, no symlink) and the clearing of what
dead processes left behind. Must not know what the bytes mean, nor who the other ranks are. Layer L2.

IMPORTANT: nothing here removes a committed file. The caller does, by :meth:`Directory.remove`, and only after
:meth:`Directory.write` has returned.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from distckpt.errors import save_error
from distckpt.naming import TEMP_PREFIX, TEMP_SUFFIX, check_name, is_temp
from distckpt.storage.sink import Sink

__all__ = ["Directory", "WriteReceipt", "make_directory"]

_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# Before umask: a checkpoint is as readable as any file that its user makes.
_MODE = 0o666
# Locks are not seen across hosts on every network file system. Another host's leftover counts as dead only if
# nothing was written to it for this long.
_FOREIGN_STALE_S = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteReceipt:
    """Proof that a file is durable.

    Attributes:
        path: where it stands.
        num_bytes: its length.
    """

    path: Path
    num_bytes: int


def make_directory(path: Path) -> None:
    """Make a directory and its parents, each of them durable. Does nothing where it exists.

    Raises:
        OSError: it cannot be made.
    """
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
        fd = os.open(directory.parent, _DIRECTORY_FLAGS)
        try:
            _sync_directory(fd)
        finally:
            os.close(fd)


class Directory:
    """A checkpoint directory on a local or network file system.

    Rank-local; issues no collectives. One thread at a time.

    Args:
        path: need not exist yet; it is looked up anew by each call.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, fill: Callable[[Sink], None], *, atomic: bool = True) -> WriteReceipt:
        """Write a file whole and make it durable.

        1. refuse a name that leaves the directory
        2. clear the temporary files of dead processes
        3. write the content into a temporary file in the same directory
        4. fsync it
        5. rename it into place
        6. fsync the directory

        With `atomic` off 3 writes under the final name and 5 is left out: for file systems that cannot rename. A
        failure then leaves a partial file under that name.

        Args:
            name: relative to the directory; a sub-folder in it has to exist.
            fill: writes the content; may raise anything.
            atomic: see above.

        Raises:
            ValueError: the name would leave the directory, or a symlink is in the way.
            SaveError: the operating system refused; what was there before is untouched.
            CommitNotDurable: step 6 failed: the file is there, but may not survive a power cut.
        """
        with self._parent_of(name, "save") as (fd, leaf):
            self._clear_leftovers(fd)
            num_bytes = self._write_atomic(fd, name, leaf, fill) if atomic else self._write_plain(fd, name, leaf, fill)
            try:
                _sync_directory(fd)
            except OSError as error:
                msg = (
                    f"{self.path / name} was written and renamed, but its directory could not be synced "
                    f"({_named(error)}): it may not survive a power cut"
                )
                raise save_error(msg, error, renamed=True) from error
        return WriteReceipt(path=self.path / name, num_bytes=num_bytes)

    def remove(self, name: str) -> None:
        """Remove a file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the name would leave the directory, or a symlink is in the way.
            OSError: the operating system refused.
        """
        with self._parent_of(name, "remove") as (fd, leaf):
            try:
                os.unlink(leaf, dir_fd=fd)
            except OSError as error:
                error.filename = str(self.path / name)
                raise

    @contextlib.contextmanager
    def _parent_of(self, name: str, doing: str) -> Iterator[tuple[int, str]]:
        """Open the folder that holds `name`, following no symlink below the directory itself."""
        *folders, leaf = check_name(name)
        here = str(self.path)
        try:
            fd = os.open(here, _DIRECTORY_FLAGS)
        except OSError as error:
            msg = f"cannot {doing} {name}: directory {here} cannot be opened ({_named(error)})"
            raise save_error(msg, error) from error
        try:
            for folder in folders:
                here = f"{here}/{folder}"
                try:
                    below = os.open(folder, _DIRECTORY_FLAGS | os.O_NOFOLLOW, dir_fd=fd)
                except OSError as error:
                    if error.errno in (errno.ELOOP, errno.ENOTDIR) and _is_symlink(folder, fd):
                        raise _symlink_in_the_way(name, here) from error
                    msg = f"cannot {doing} {name}: folder {here} cannot be opened ({_named(error)})"
                    raise save_error(msg, error) from error
                os.close(fd)
                fd = below
            if _is_symlink(leaf, fd):
                raise _symlink_in_the_way(name, f"{here}/{leaf}")
            yield fd, leaf
        finally:
            os.close(fd)

    def _write_atomic(self, parent: int, name: str, leaf: str, fill: Callable[[Sink], None]) -> int:
        temp = ""
        try:
            fd, temp = _open_temp(parent)
        except OSError as error:
            msg = f"cannot save {name}: no temporary file can be made in {self.path} ({_named(error)})"
            raise save_error(msg, error) from error
        try:
            num_bytes = self._fill_and_sync(fd, name, fill)
            try:
                os.rename(temp, leaf, src_dir_fd=parent, dst_dir_fd=parent)
            except OSError as error:
                msg = f"cannot save {name}: its temporary file could not be renamed to it ({_named(error)})"
                raise save_error(msg, error) from error
        except BaseException:
            # Also for KeyboardInterrupt. What cannot be removed now, the next save clears.
            with contextlib.suppress(OSError):
                os.unlink(temp, dir_fd=parent)
            raise
        finally:
            with contextlib.suppress(OSError):  # the data is synced, or the save has failed already
                os.close(fd)
        return num_bytes

    def _write_plain(self, parent: int, name: str, leaf: str, fill: Callable[[Sink], None]) -> int:
        try:
            fd = os.open(leaf, _FILE_FLAGS | os.O_TRUNC, _MODE, dir_fd=parent)
        except OSError as error:
            msg = f"cannot save {name}: it cannot be opened in {self.path} ({_named(error)})"
            raise save_error(msg, error) from error
        try:
            return self._fill_and_sync(fd, name, fill)
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)

    def _fill_and_sync(self, fd: int, name: str, fill: Callable[[Sink], None]) -> int:
        sink = Sink(fd)
        doing = "writing"
        try:
            fill(sink)
            doing = "syncing"
            os.fsync(fd)
            doing = "checking"
            length = os.fstat(fd).st_size
            if length != sink.num_bytes:
                raise OSError(  # noqa: TRY301 - one error path for all three steps
                    errno.EIO, f"the file system reported {sink.num_bytes} bytes written, but holds {length}"
                )
        except OSError as error:
            msg = f"cannot save {name} in {self.path}: {doing} {sink.num_bytes} bytes failed ({_named(error)})"
            raise save_error(msg, error) from error
        return sink.num_bytes

    def _clear_leftovers(self, parent: int) -> None:
        """Remove temporary files whose process is dead. What cannot be told or removed stays for a later save."""
        try:
            names = [name for name in os.listdir(parent) if is_temp(name)]
        except OSError:
            return
        for name in names:
            with contextlib.suppress(OSError):
                _remove_if_dead(parent, name)


def _sync_directory(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        # These file systems keep no directory of their own to sync (CIFS, some FUSE); there is nothing to wait for.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _host_tag() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _open_temp(parent: int) -> tuple[int, str]:
    """Make a temporary file and lock it for as long as this process lives and holds it open."""
    while True:
        temp = f"{TEMP_PREFIX}{_host_tag()}-{os.getpid()}-{secrets.token_hex(8)}{TEMP_SUFFIX}"
        fd = os.open(temp, _FILE_FLAGS | os.O_EXCL, _MODE, dir_fd=parent)
        # A file system without locks: nobody else can take one either, so nobody clears this file.
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        # Between open and lock another process may have taken it for a dead one's and removed it.
        if os.fstat(fd).st_nlink:
            return fd, temp
        os.close(fd)


def _remove_if_dead(parent: int, name: str) -> None:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    try:
        found = os.fstat(fd)
        ours = name.startswith(f"{TEMP_PREFIX}{_host_tag()}-")
        if not stat.S_ISREG(found.st_mode) or not (ours or time.time() - found.st_mtime > _FOREIGN_STALE_S):
            return
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its writer lives
        if os.stat(name, dir_fd=parent, follow_symlinks=False).st_ino == found.st_ino:
            os.unlink(name, dir_fd=parent)
    finally:
        os.close(fd)


def _is_symlink(name: str, parent: int) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _symlink_in_the_way(name: str, where: str) -> ValueError:
    return ValueError(
        f"Argument filename should name a file inside the checkpoint directory, but {name!r} meets {where}, a symlink"
    )


def _named(error: OSError) -> str:
    code = errno.errorcode.get(error.errno, str(error.errno)) if error.errno is not None else "no errno"
    return f"{code}: {error.strerror}"
