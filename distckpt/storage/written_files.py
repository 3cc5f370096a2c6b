"""Keep the files that a save has written while a program's own code deletes older ones.

That code may take several names for one file, and so delete a new file. Each new file gets a second name first (a hard
link); a file that is missing afterwards gets its own name back.
"""

import contextlib
import fcntl
import os
import shutil
import stat
from pathlib import Path

from distckpt.policy.naming import is_reserved
from distckpt.storage.direct_io import close_quietly
from distckpt.storage.new_file import new_temp_name, sync_directory_at

_KINDS = (stat.S_IFREG, stat.S_IFLNK, stat.S_IFDIR)
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def identity_of(path: Path) -> tuple[int, int] | None:
    """Return device and inode of a file, which all its names share; None if there is no file."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


class WrittenFiles:
    """The files that one save writes. Created before the save. Rank-local; issues no collectives.

    Args:
        directory: where the save handler writes.
        filename: the checkpoint's name, relative to it. Its folder is searched too.
        is_only_one: True if the save writes no other file.
    """

    def __init__(self, directory: Path, filename: str, *, is_only_one: bool) -> None:
        self._path = directory / filename
        self._folders = () if is_only_one else dict.fromkeys((directory, self._path.parent))
        self._before = self._list()
        self._links: list[tuple[Path, Path, int | None]] = []

    def keep(self) -> bool:
        """Give each file that was written since a second name.

        Returns:
            True if all files that the save can have written are kept: there is at least one, each has a second name,
            and no sub-folder has changed.
        """
        changed = [path for path, mark in self._list().items() if self._before.get(path) != mark]
        paths = [path for path in changed if path not in self._folders] if self._folders else [self._path]
        try:
            for path in paths:
                self._links.append(_link(path))
        except OSError:  # a sub-folder, a file that is gone, a full disk
            return False
        return bool(paths)

    @property
    def identities(self) -> frozenset[tuple[int, int]]:
        """Device and inode of each file that is kept."""
        found = (identity_of(path) for path, _, _ in self._links)
        return frozenset(one for one in found if one is not None)

    def put_back(self) -> None:
        """Rename each file that is missing to its own name, and delete the second names. May be called again."""
        links, self._links = self._links, []
        for path, temp, fd in links:
            with contextlib.suppress(OSError):  # the file stays under its second name
                if not os.path.lexists(path):
                    temp.rename(path)
                    sync_directory_at(path.parent)
                temp.unlink(missing_ok=True)
            if fd is not None:
                close_quietly(fd)

    def _list(self) -> dict[Path, tuple[int, ...]]:
        found: dict[Path, tuple[int, ...]] = {}
        for folder in self._folders:
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):  # deleted meanwhile
                        mark = entry.stat(follow_symlinks=False)
                        if stat.S_IFMT(mark.st_mode) in _KINDS and not is_reserved(entry.name):
                            found[Path(entry.path)] = (mark.st_ino, mark.st_mtime_ns, mark.st_size)
        return found


def _link(path: Path) -> tuple[Path, Path, int | None]:
    """Give a file a second name, locked as a temporary file is: otherwise another save would delete it."""
    temp = path.parent / new_temp_name()
    try:
        os.link(path, temp, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(path, temp, follow_symlinks=False)
    fd = None
    with contextlib.suppress(OSError):  # a symlink cannot be locked, and no save deletes it
        fd = os.open(temp, _READ_FLAGS)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return path, temp, fd
