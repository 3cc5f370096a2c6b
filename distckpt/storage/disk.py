"""A local directory in which a file appears whole and durable, or not at all.

Owns the order of the system calls: temporary file in the same directory, write, fsync, rename, fsync of the
directory. Owns which names are followed: none that leaves the directory, no symlink. Must not know what the bytes
mean, nor who the other ranks are. Layer L2.

IMPORTANT: nothing here removes a committed file. The caller does, by :meth:`Directory.remove`, and only after
:meth:`Directory.write` has returned.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from distckpt.errors import save_error
from distckpt.naming import check_name, is_temp
from distckpt.storage.sink import Sink
from distckpt.storage.temp import FILE_MODE, NEW_FILE_FLAGS, close_quietly, open_temp, remove_if_dead

__all__ = ["Directory", "WriteReceipt", "make_directory"]

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


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
    lowest = path
    while not lowest.exists():
        missing.append(lowest)
        lowest = lowest.parent
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
        _sync_entry(directory)
    if not missing:
        # A process that made it may have died before it synced. Not ours to insist on: we may not be let in.
        with contextlib.suppress(OSError):
            _sync_entry(path)


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
                close_quietly(fd)
                fd = below
            if _is_symlink(leaf, fd):
                raise _symlink_in_the_way(name, f"{here}/{leaf}")
            yield fd, leaf
        finally:
            close_quietly(fd)

    def _write_atomic(self, parent: int, name: str, leaf: str, fill: Callable[[Sink], None]) -> int:
        temp = ""
        try:
            fd, temp = open_temp(parent)
        except OSError as error:
            msg = f"cannot save {name}: no temporary file can be made in {self.path} ({_named(error)})"
            raise save_error(msg, error) from error
        try:
            num_bytes = self._fill_and_sync(fd, name, fill)
            try:
                os.rename(temp, leaf, src_dir_fd=parent, dst_dir_fd=parent)
            except OSError as error:
                msg = f"cannot save {name} in {self.path}: its temporary file could not be renamed ({_named(error)})"
                raise save_error(msg, error) from error
        except BaseException:
            # Also for KeyboardInterrupt. What cannot be removed now, the next save clears.
            with contextlib.suppress(OSError):
                os.unlink(temp, dir_fd=parent)
            raise
        finally:
            close_quietly(fd)
        return num_bytes

    def _write_plain(self, parent: int, name: str, leaf: str, fill: Callable[[Sink], None]) -> int:
        try:
            # A new file, not a new content: the old one may have a second name outside, or be a pipe.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(leaf, dir_fd=parent)
            fd = os.open(leaf, NEW_FILE_FLAGS, FILE_MODE, dir_fd=parent)
        except OSError as error:
            msg = f"cannot save {name}: it cannot be opened in {self.path} ({_named(error)})"
            raise save_error(msg, error) from error
        try:
            return self._fill_and_sync(fd, name, fill)
        finally:
            close_quietly(fd)

    def _fill_and_sync(self, fd: int, name: str, fill: Callable[[Sink], None]) -> int:
        sink = Sink(fd)
        doing = "writing"
        try:
            fill(sink)
            sink.flush()
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
                remove_if_dead(parent, name)


def _sync_entry(path: Path) -> None:
    """Make the name of a directory durable in its parent."""
    fd = os.open(path.parent, _DIRECTORY_FLAGS)
    try:
        _sync_directory(fd)
    finally:
        close_quietly(fd)


def _sync_directory(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        # These file systems keep no directory of their own to sync (CIFS, some FUSE); there is nothing to wait for.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


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
