"""Checkpoints in a directory of a local or network file system. No symlink below the directory is followed."""

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self

from distckpt.errors import save_error
from distckpt.policy.naming import check_name, is_reserved, is_temp
from distckpt.storage.direct_io import close_quietly
from distckpt.storage.new_file import (
    CREATE_FLAGS,
    DIRECTORY_FLAGS,
    FILE_MODE,
    LocalNewFile,
    OpenFile,
    create_temp,
    remove_dead_temps,
    sync_directory_at,
    text_of,
)
from distckpt.storage.readahead import Readahead

_JOIN_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class LocalFile(OpenFile):
    """A committed file, open for reading; see :class:`~distckpt.storage.base.StoredFile`.

    Args:
        path: of the file.
        fd: open for reading, now owned by this object; None to open `path`, following symlinks.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, fd: int | None = None) -> None:
        self._stream = path.open("rb") if fd is None else os.fdopen(fd, "rb")
        super().__init__(self._stream.fileno(), path)

    def identity(self) -> tuple[int, int]:
        """Return device and inode."""
        found = os.fstat(self.fd)
        return found.st_dev, found.st_ino

    def stream(self) -> IO[bytes]:
        """Return a binary file object at the file's beginning."""
        self._stream.seek(0)
        return self._stream

    def readahead(self, ranges: Sequence[tuple[int, int]]) -> Readahead:
        """Return a context that brings ranges into the page cache."""
        return Readahead(self.fd, ranges)

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def __enter__(self) -> Self:
        """Return the file."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()


@dataclass(frozen=True, slots=True)
class LocalStorage:
    """A directory that stores checkpoints; see :class:`~distckpt.storage.base.Storage` for methods and errors.

    A name that leads over a symlink raises ValueError too.

    Attributes:
        directory: need not exist yet.
        atomic: write under a temporary name first. False only for file systems that cannot rename: a failed save then
            leaves an incomplete file.
    """

    directory: Path
    atomic: bool = field(default=True, kw_only=True)

    def create(self, name: str) -> LocalNewFile:
        """Begin a file that will be called `name`; delete temporary files that dead processes have left."""
        return self._new_file(name, token=None)

    def join(self, name: str, token: str) -> LocalNewFile:
        """Open a file that another process has begun, to write a range of it."""
        return self._new_file(name, token=token)

    def _new_file(self, name: str, token: str | None) -> LocalNewFile:
        path = self.directory.joinpath(*check_name(name))
        doing = "it"
        try:
            parent = self._open_folder(name)
        except OSError as error:
            msg = f"cannot save {name}: directory {error.filename} cannot be opened ({text_of(error)})"
            raise save_error(msg, error) from error
        try:
            if token is not None:
                if "/" in token or not (is_temp(token) or token == path.name):
                    raise ValueError(f"cannot save {name}: {token!r} is no token of a new file")  # noqa: TRY301 - closes
                doing = f"temporary file {path.parent / token} cannot be opened"
                fd = os.open(token, _JOIN_FLAGS, dir_fd=parent)
                return LocalNewFile(path, fd, parent, token, is_owner=False)
            remove_dead_temps(parent)
            if self.atomic:
                doing = f"no temporary file can be created in {path.parent}"
                fd, token = create_temp(parent)
            else:
                doing = f"{path} cannot be created"
                # The old file may be a pipe, or have a second name elsewhere: unlink it, do not truncate it.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path.name, dir_fd=parent)
                fd, token = os.open(path.name, CREATE_FLAGS, FILE_MODE, dir_fd=parent), path.name
            return LocalNewFile(path, fd, parent, token, is_owner=True)
        except OSError as error:
            close_quietly(parent)
            raise save_error(f"cannot save {name}: {doing} ({text_of(error)})", error) from error
        except BaseException:
            close_quietly(parent)
            raise

    def open(self, name: str) -> LocalFile:
        """Open a committed file for reading."""
        path = self.directory.joinpath(*check_name(name))
        with self._folder(name) as parent:
            return LocalFile(path, os.open(path.name, _READ_FLAGS, dir_fd=parent))

    def list(self, folder: str = "") -> Sequence[str]:
        """Return the names of the committed files in a folder, sorted."""
        parts = check_name(folder) if folder else ()
        with os.scandir(self.directory.joinpath(*parts)) as entries:
            names = [one.name for one in entries if not is_reserved(one.name) and one.is_file(follow_symlinks=False)]
        return sorted("/".join((*parts, name)) for name in names)

    def remove(self, name: str) -> None:
        """Delete a committed file."""
        with self._folder(name) as parent:
            os.unlink(check_name(name)[-1], dir_fd=parent)

    @contextlib.contextmanager
    def _folder(self, name: str) -> Iterator[int]:
        """Open the folder of `name` for the body, whose OSError gets the full path."""
        parent = self._open_folder(name)
        try:
            yield parent
        except OSError as error:
            error.filename = str(self.directory / name)
            raise
        finally:
            close_quietly(parent)

    def _open_folder(self, name: str) -> int:
        """Open the folder of `name` without following symlinks below the directory; the caller closes it."""
        *folders, leaf = check_name(name)
        path = self.directory
        fd = _open_directory(path)
        try:
            for folder in folders:
                path /= folder
                _refuse_symlink(folder, fd, path, name)
                below = _open_directory(path, parent=fd)
                close_quietly(fd)
                fd = below
            _refuse_symlink(leaf, fd, path / leaf, name)
        except BaseException:
            close_quietly(fd)
            raise
        return fd


def make_directory(path: Path) -> None:
    """Create a directory and its parents, each of them durable. Does nothing if it exists.

    Raises:
        OSError: the operating system refused.
    """
    missing = []
    lowest = path
    while not lowest.exists():
        missing.append(lowest)
        lowest = lowest.parent
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
        sync_directory_at(directory.parent)
    if not missing:
        # The process that created it may have died before it synced. The parent may be closed to this one.
        with contextlib.suppress(OSError):
            sync_directory_at(path.parent)


def _open_directory(path: Path, parent: int | None = None) -> int:
    """Open a directory; if `parent`, a descriptor of its parent, is given, the directory must not be a symlink."""
    try:
        if parent is None:
            return os.open(path, DIRECTORY_FLAGS)
        return os.open(path.name, DIRECTORY_FLAGS | os.O_NOFOLLOW, dir_fd=parent)
    except OSError as error:
        error.filename = str(path)
        raise


def _refuse_symlink(entry: str, parent: int, path: Path, name: str) -> None:
    """Raise ValueError if an entry of a folder is a symlink."""
    with contextlib.suppress(OSError):
        if stat.S_ISLNK(os.stat(entry, dir_fd=parent, follow_symlinks=False).st_mode):
            raise ValueError(
                f"{name!r} meets {path}, a symlink, which is neither followed, replaced nor removed. Choose another "
                "name, or remove the symlink"
            )
