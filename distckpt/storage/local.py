"""A local directory in which a file appears whole and durable, or not at all.

Owns the order of the system calls: temporary file in the same directory, write, fsync, rename, fsync of the
directory. Owns which names are followed: none that leaves the directory, no symlink. Must not know what the bytes
mean, nor who the other ranks are.

IMPORTANT: nothing here removes a committed file. The caller does, by :meth:`Directory.remove`, and only after
:meth:`Directory.write` has returned.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

from distckpt.errors import save_error
from distckpt.policy.naming import check_name, is_temp
from distckpt.storage.buffered_writer import Sink
from distckpt.storage.new_file import NewFile, WriteReceipt, named, sync_directory
from distckpt.storage.temp import (
    FILE_MODE,
    JOINED_FILE_FLAGS,
    NEW_FILE_FLAGS,
    close_quietly,
    open_temp,
    remove_if_dead,
)

__all__ = ["Directory", "NewFile", "WriteReceipt", "make_directory"]

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


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
        """Write a file whole and make it durable: :meth:`create`, fill it, :meth:`NewFile.commit`.

        Args:
            name: see :meth:`create`.
            fill: writes the content; may raise anything.
            atomic: see :meth:`create`.

        Raises:
            ValueError: the name would leave the directory, or a symlink is in the way.
            SaveError: the operating system refused; what was there before is untouched.
            CommitNotDurable: the file is there, but may not survive a power cut.
        """
        with self.create(name, atomic=atomic) as new:
            sink = Sink(new.fd)
            try:
                fill(sink)
                sink.flush()
            except OSError as error:
                raise new.refused("writing", sink.num_bytes, error) from error
            return new.commit(sink.num_bytes)

    def create(self, name: str, *, atomic: bool = True) -> "NewFile":
        """Begin a file.

        1. refuse a name that leaves the directory
        2. clear the temporary files of dead processes
        3. make a temporary file in the same directory; the caller writes the content into it
        4. :meth:`NewFile.commit`: fsync it
        5. rename it into place
        6. fsync the directory

        With `atomic` off 3 makes a file under the final name and 5 is left out: for file systems that cannot rename. A
        failure then leaves a partial file under that name.

        Args:
            name: relative to the directory; a sub-folder in it has to exist.
            atomic: see above.

        Raises:
            ValueError: the name would leave the directory, or a symlink is in the way.
            SaveError: the operating system refused.
        """
        parent, leaf = self._parent_of(name, "save")
        try:
            self._clear_leftovers(parent)
            make = _make_temp if atomic else _make_plain
            try:
                fd, at = make(parent, leaf)
            except OSError as error:
                what = "no temporary file can be made" if atomic else "it cannot be opened"
                msg = f"cannot save {name}: {what} in {self.path} ({named(error)})"
                raise save_error(msg, error) from error
        except BaseException:
            close_quietly(parent)
            raise
        return NewFile(self.path, name, fd, parent, at, leaf)

    def join(self, name: str, temp: str) -> "NewFile":
        """Open the file that another process has begun under `name`, to write a part of it.

        Args:
            name: see :meth:`create`.
            temp: :attr:`NewFile.temp` of the one that was made there.

        Raises:
            ValueError: the name would leave the directory, or a symlink is in the way.
            SaveError: the operating system refused; FileNotFoundError too where there is no such file.
        """
        parent, leaf = self._parent_of(name, "save")
        try:
            if "/" in temp or not (is_temp(temp) or temp == leaf):
                msg = f"cannot save {name}: {temp!r} is the name of no file that was begun for it"
                raise ValueError(msg)  # noqa: TRY301 - one place that closes
            fd = os.open(temp, JOINED_FILE_FLAGS, dir_fd=parent)
        except OSError as error:
            close_quietly(parent)
            msg = f"cannot save {name}: the file {self.path / temp} that was begun for it cannot be opened"
            raise save_error(f"{msg} ({named(error)})", error) from error
        except BaseException:
            close_quietly(parent)
            raise
        return NewFile(self.path, name, fd, parent, temp, leaf, is_owner=False)

    def remove(self, name: str) -> None:
        """Remove a file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the name would leave the directory, or a symlink is in the way.
            OSError: the operating system refused.
        """
        fd, leaf = self._parent_of(name, "remove")
        try:
            os.unlink(leaf, dir_fd=fd)
        except OSError as error:
            error.filename = str(self.path / name)
            raise
        finally:
            close_quietly(fd)

    def _parent_of(self, name: str, doing: str) -> tuple[int, str]:
        """Open the folder that holds `name`, following no symlink below the directory itself; the caller closes it."""
        *folders, leaf = check_name(name)
        here = str(self.path)
        try:
            fd = os.open(here, _DIRECTORY_FLAGS)
        except OSError as error:
            msg = f"cannot {doing} {name}: directory {here} cannot be opened ({named(error)})"
            raise save_error(msg, error) from error
        try:
            for folder in folders:
                here = f"{here}/{folder}"
                try:
                    below = os.open(folder, _DIRECTORY_FLAGS | os.O_NOFOLLOW, dir_fd=fd)
                except OSError as error:
                    if error.errno in (errno.ELOOP, errno.ENOTDIR) and _is_symlink(folder, fd):
                        raise _symlink_in_the_way(name, here) from error
                    msg = f"cannot {doing} {name}: folder {here} cannot be opened ({named(error)})"
                    raise save_error(msg, error) from error
                close_quietly(fd)
                fd = below
            if _is_symlink(leaf, fd):
                raise _symlink_in_the_way(name, f"{here}/{leaf}")  # noqa: TRY301 - one place that closes
        except BaseException:
            close_quietly(fd)
            raise
        return fd, leaf

    def _clear_leftovers(self, parent: int) -> None:
        """Remove temporary files whose process is dead. What cannot be told or removed stays for a later save."""
        try:
            names = [name for name in os.listdir(parent) if is_temp(name)]
        except OSError:
            return
        for name in names:
            with contextlib.suppress(OSError):
                remove_if_dead(parent, name)


def _make_temp(parent: int, leaf: str) -> tuple[int, str]:
    del leaf
    return open_temp(parent)


def _make_plain(parent: int, leaf: str) -> tuple[int, str]:
    # A new file, not a new content: the old one may have a second name outside, or be a pipe.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(leaf, dir_fd=parent)
    return os.open(leaf, NEW_FILE_FLAGS, FILE_MODE, dir_fd=parent), leaf


def _sync_entry(path: Path) -> None:
    """Make the name of a directory durable in its parent."""
    fd = os.open(path.parent, _DIRECTORY_FLAGS)
    try:
        sync_directory(fd)
    finally:
        close_quietly(fd)


def _is_symlink(name: str, parent: int) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _symlink_in_the_way(name: str, where: str) -> ValueError:
    return ValueError(
        f"Argument filename should name a file inside the checkpoint directory, but {name!r} meets {where}, a symlink"
    )
