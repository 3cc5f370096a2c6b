"""A file that is being written, and becomes a checkpoint all at once.

Owns the steps from its bytes to its name: fsync, rename, fsync of the directory. Which names are followed lies in
:mod:`distckpt.storage.local`, which makes it.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from distckpt.errors import SaveError, save_error
from distckpt.storage.direct_io import DirectFile, allocate
from distckpt.storage.temp import close_quietly

__all__ = ["NewFile", "WriteReceipt", "named", "sync_directory"]

_READ_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteReceipt:
    """Proof that a file is durable.

    Attributes:
        path: where it stands.
        num_bytes: its length.
    """

    path: Path
    num_bytes: int


class NewFile:
    """A file that is being written; a context that removes it unless it was committed, or is another process's.

    Attributes:
        fd: its descriptor, open for reading and writing.
        temp: the name it has until then, in the folder of its final name.
    """

    def __init__(
        self, directory: Path, name: str, fd: int, parent: int, temp: str, leaf: str, *, is_owner: bool = True
    ) -> None:
        self._directory = directory
        self._name = name
        self.fd = fd
        self._parent = parent
        self.temp = temp
        self._leaf = leaf
        self._is_owner = is_owner
        self._is_open = True

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of it."""
        self.abandon()

    def commit(self, num_bytes: int, check: Callable[[int], Sequence[str]] | None = None) -> WriteReceipt:
        """Make it durable under its name: steps 4 to 6 of :meth:`Directory.create`.

        Args:
            num_bytes: how long it has to be.
            check: says what is wrong with its content, from its descriptor. Called only where the file system tells of
                a hole in it: some leave out zeros that were written, others have lost what was.

        Raises:
            SaveError: the operating system refused; what was there before is untouched.
            CommitNotDurable: step 6 failed: the file is there, but may not survive a power cut.
        """
        doing = "syncing"
        try:
            os.fsync(self.fd)
            doing = "checking"
            length = os.fstat(self.fd).st_size
            if length != num_bytes:
                raise OSError(  # noqa: TRY301 - one error path for both steps
                    errno.EIO, f"the file system reported {num_bytes} bytes written, but holds {length}"
                )
            faults = check(self.fd) if check is not None and self.has_hole(0, num_bytes) else ()
            if faults:
                raise OSError(errno.EIO, f"it does not hold what was written: {faults[0]}")  # noqa: TRY301 - as above
        except OSError as error:
            raise self.refused(doing, num_bytes, error) from error
        path = self._directory / self._name
        try:
            if self.temp != self._leaf:
                os.rename(self.temp, self._leaf, src_dir_fd=self._parent, dst_dir_fd=self._parent)
        except OSError as error:
            msg = (
                f"cannot save {self._name} in {self._directory}: its temporary file could not be renamed "
                f"({named(error)})"
            )
            raise save_error(msg, error) from error
        self.temp = self._leaf
        try:
            sync_directory(self._parent)
        except OSError as error:
            msg = (
                f"{path} was written and renamed, but its directory could not be synced ({named(error)}): it may not "
                "survive a power cut"
            )
            raise save_error(msg, error, renamed=True) from error
        return WriteReceipt(path=path, num_bytes=num_bytes)

    def allocate(self, num_bytes: int) -> None:
        """Let it have a length before anybody writes: several writers need not wait for each other then.

        Raises:
            SaveError: the operating system refused; there is not so much room, for one.
        """
        try:
            allocate(self.fd, num_bytes)
        except OSError as error:
            raise self.refused("making room for", num_bytes, error) from error

    def sync(self, num_bytes: int) -> None:
        """Make what was written into it durable; :meth:`commit` does so too.

        Raises:
            SaveError: the operating system refused.
        """
        try:
            os.fsync(self.fd)
        except OSError as error:
            raise self.refused("syncing", num_bytes, error) from error

    def has_hole(self, begin: int, end: int) -> bool:
        """Tell whether the file system tells of a hole between two offsets. It leaves out zeros, or has lost bytes."""
        try:
            return begin < end and os.lseek(self.fd, begin, os.SEEK_HOLE) < end
        except OSError:  # it cannot tell
            return False

    def holds(self, data: memoryview, at: int) -> bool:
        """Tell whether the file holds these bytes at an offset.

        Raises:
            OSError: it cannot be read.
        """
        done = 0
        while done < len(data):
            found = os.pread(self.fd, min(len(data) - done, _READ_BYTES), at + done)
            if not found or found != data[done : done + len(found)]:
                return False
            done += len(found)
        return True

    def opened_directly(self) -> DirectFile:
        """Open it once more, for large pieces at offsets."""
        return DirectFile(self.fd, self._parent, self.temp)

    def abandon(self) -> None:
        """Close it, and remove it unless it has its final name or another process made it. Nothing a second time."""
        if not self._is_open:
            return
        self._is_open = False
        if self._is_owner and self.temp != self._leaf:
            # Also for KeyboardInterrupt. What cannot be removed now, the next save clears.
            with contextlib.suppress(OSError):
                os.unlink(self.temp, dir_fd=self._parent)
        close_quietly(self.fd)
        close_quietly(self._parent)

    def refused(self, doing: str, num_bytes: int, error: OSError) -> SaveError:
        """Return the error to raise where the operating system refused something."""
        what = f"cannot save {self._name} in {self._directory}: {doing} {num_bytes} bytes failed ({named(error)})"
        return save_error(what, error)


def sync_directory(fd: int) -> None:
    """Make the names in a directory durable, where the file system can.

    Raises:
        OSError: it was refused.
    """
    try:
        os.fsync(fd)
    except OSError as error:
        # These file systems keep no directory of their own to sync (CIFS, some FUSE); there is nothing to wait for.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def named(error: OSError) -> str:
    """Return what the operating system calls an error."""
    code = errno.errorcode.get(error.errno, str(error.errno)) if error.errno is not None else "no errno"
    return f"{code}: {error.strerror}"
