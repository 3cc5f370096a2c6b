"""A storage in memory that fails at its n-th call."""

import contextlib
import errno
import io
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Self

from distckpt.errors import save_error
from distckpt.policy.naming import check_name
from distckpt.storage.base import Chunk, NewFile, Readable

__all__ = ["MemoryStorage"]


class _Bytes:
    """Content that can be read at an offset."""

    def __init__(self, storage: "MemoryStorage", name: str, content: bytearray) -> None:
        self.path = storage.path / name
        self._storage = storage
        self._name = name
        self._content = content

    @property
    def num_bytes(self) -> int:
        """The file's length."""
        return len(self._content)

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Return the bytes at an offset."""
        self._storage.call(f"read {self._name}")
        return bytes(self._content[offset : offset + num_bytes])

    def read_into(self, memory: memoryview, offset: int) -> int:
        """Read into `memory`."""
        data = self.read(offset, len(memory))
        memory[: len(data)] = data
        return len(data)


class _File(_Bytes):
    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""

    def identity(self) -> tuple[int, int]:
        """Return two numbers that no other file has."""
        return id(self._storage), id(self._content)

    def stream(self) -> IO[bytes]:
        """Return a file object."""
        return io.BytesIO(self._content)

    @contextlib.contextmanager
    def readahead(self, ranges: Sequence[tuple[int, int]]) -> Iterator[Readable]:
        """Fetch nothing."""
        del ranges
        yield self


class _NewFile(_Bytes):
    def __init__(self, storage: "MemoryStorage", name: str, token: str, *, is_owner: bool) -> None:
        super().__init__(storage, name, storage.begun[token])
        self.token = token
        self._is_owner = is_owner

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def write(self, chunks: Sequence[Chunk]) -> None:
        """Write at offsets."""
        for offset, data in chunks:
            self._save_call("write")
            self._content.extend(bytes(max(offset + len(data) - len(self._content), 0)))
            self._content[offset : offset + len(data)] = data

    def allocate(self, num_bytes: int) -> None:
        """Set the file's length."""
        self._save_call("allocate")
        self._content.extend(bytes(max(num_bytes - len(self._content), 0)))

    def sync(self) -> None:
        """Do nothing."""
        self._save_call("sync")

    def has_hole(self, ranges: Sequence[tuple[int, int]]) -> bool:
        """Return True: every check is to be made."""
        return any(begin < end for begin, end in ranges)

    def compare(self, chunks: Sequence[Chunk]) -> None:
        """Compare with the content."""
        for offset, data in chunks:
            self._save_call("compare")
            if bytes(self._content[offset : offset + len(data)]) != bytes(data):
                self._fail("compare", OSError(errno.EIO, "it does not hold what was written"))

    def commit(self, num_bytes: int, check: Callable[[Readable], Sequence[str]] | None = None) -> None:
        """Make the file visible."""
        self._save_call("commit")
        faults = [f"it has {len(self._content)} bytes"] if len(self._content) != num_bytes else []
        try:
            faults += check(self) if check is not None and not faults else []
            if faults:
                raise OSError(errno.EIO, faults[0])  # noqa: TRY301 - one error path
        except OSError as error:
            self._fail("commit", error)
        self._storage.files[self._name] = self._storage.begun.pop(self.token)

    def abort(self) -> None:
        """Delete the file unless it is committed."""
        if self._is_owner:
            self._storage.begun.pop(self.token, None)

    def _save_call(self, what: str) -> None:
        try:
            self._storage.call(f"{what} {self._name}")
        except OSError as error:
            self._fail(what, error)

    def _fail(self, what: str, error: OSError) -> None:
        raise save_error(f"cannot save {self.path}: {what} failed ({error.strerror})", error) from error


class MemoryStorage:
    """Files in memory; see :class:`~distckpt.storage.base.Storage`.

    Args:
        fail_at: number of the call that fails with EIO, from 1; None for none.

    Attributes:
        files: content of the committed files, by name.
        begun: content of the files that were begun, by token.
        calls: the calls so far.
        fail_at: see above.
        path: prefix of all names, for messages.
    """

    def __init__(self, fail_at: int | None = None) -> None:
        self.files: dict[str, bytearray] = {}
        self.begun: dict[str, bytearray] = {}
        self.calls: list[str] = []
        self.fail_at = fail_at
        self.path = Path("/memory")

    def call(self, what: str) -> None:
        """Count a call, and raise the error of the one that is to fail."""
        self.calls.append(what)
        if len(self.calls) == self.fail_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self.path))

    def create(self, name: str) -> NewFile:
        """Begin a file."""
        name = "/".join(check_name(name))
        try:
            self.call(f"create {name}")
        except OSError as error:
            raise save_error(f"cannot save {self.path / name}: create failed", error) from error
        token = secrets.token_hex(8)
        self.begun[token] = bytearray()
        return _NewFile(self, name, token, is_owner=True)

    def join(self, name: str, token: str) -> NewFile:
        """Open a file that was begun."""
        name = "/".join(check_name(name))
        if not token.isalnum():
            raise ValueError(f"{token!r} is no token of a new file")
        try:
            self.call(f"join {name}")
            if token not in self.begun:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        except OSError as error:
            raise save_error(f"cannot save {self.path / name}: there is no file {token}", error) from error
        return _NewFile(self, name, token, is_owner=False)

    def open(self, name: str) -> _File:
        """Open a committed file."""
        name = "/".join(check_name(name))
        self.call(f"open {name}")
        return _File(self, name, self._content_of(name))

    def list(self, folder: str = "") -> Sequence[str]:
        """Return the names of the files in a folder."""
        self.call("list")
        return sorted(name for name in self.files if name.rpartition("/")[0] == folder)

    def remove(self, name: str) -> None:
        """Delete a committed file."""
        name = "/".join(check_name(name))
        self.call(f"remove {name}")
        self._content_of(name)
        del self.files[name]

    def _content_of(self, name: str) -> bytearray:
        if name not in self.files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path / name))
        return self.files[name]
