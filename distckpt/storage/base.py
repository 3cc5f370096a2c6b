"""The interface between distckpt and a place that stores checkpoints.

:class:`~distckpt.storage.local.LocalStorage` is the implementation for directories. Another one, such as an object
store, implements :class:`Storage`, :class:`NewFile` and :class:`StoredFile`, and has to pass
``tests/unit/storage/test_contract.py``.

A name is relative to the storage and may contain folders (``fold0/best_3.pt``). Errors name the full path. All calls
are rank-local and issue no collectives.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, NamedTuple, Protocol, Self

BLOCK_BYTES = 4096
"""Writers of one file write ranges that begin at multiples of this. A page, so that no two writers share one."""


class Chunk(NamedTuple):
    """Bytes for a file.

    Attributes:
        offset: of the first byte in the file.
        data: the bytes.
    """

    offset: int
    data: bytes | memoryview


class SupportsReadInto(Protocol):
    """Source of bytes."""

    def read_into(self, memory: memoryview, offset: int) -> int:
        """Read into `memory`, and return the number of bytes; 0 at the end of the file."""


class Readable(SupportsReadInto, Protocol):
    """Bytes of a file. Several threads may read at once. Each method raises OSError where the storage fails."""

    @property
    def num_bytes(self) -> int:
        """The file's length."""

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Return the bytes at an offset; fewer at the end of the file."""


class StoredFile(Readable, Protocol):
    """A committed file, open for reading. Its bytes stay readable if the name is replaced or removed.

    Attributes:
        path: full path, for messages.
    """

    path: Path

    def identity(self) -> tuple[int, int]:
        """Return two numbers that no other file of this machine has, the same for all processes that open this one."""

    def stream(self) -> IO[bytes]:
        """Return a binary file object at the file's beginning. It is closed with this file."""

    def readahead(self, ranges: Sequence[tuple[int, int]]) -> AbstractContextManager[SupportsReadInto]:
        """Return a context that fetches ranges before they are read; they are read through its value.

        Args:
            ranges: begin and end of each, in the order to fetch.
        """

    def close(self) -> None:
        """Close the file."""

    def __enter__(self) -> Self:
        """Return the file."""

    def __exit__(self, *_: object) -> None:
        """Close the file."""


class NewFile(Readable, Protocol):
    """A file that is being written. It has no name before :meth:`commit`. A context manager that calls :meth:`abort`.

    Any thread may call its methods, one thread at a time.

    Attributes:
        token: what another rank passes to :meth:`Storage.join`.
    """

    token: str

    def write(self, chunks: Sequence[Chunk]) -> None:
        """Write all bytes of some chunks. Offsets may come in any order.

        Raises:
            SaveError: the storage failed.
        """

    def allocate(self, num_bytes: int) -> None:
        """Set the file's length before several ranks write.

        Raises:
            SaveError: there is not enough space, or the storage failed.
        """

    def sync(self) -> None:
        """Block until the bytes that this rank has written are durable.

        Raises:
            SaveError: the storage failed.
        """

    def has_hole(self, ranges: Sequence[tuple[int, int]]) -> bool:
        """Return True if the storage reports bytes that were never written; False if it cannot tell.

        Args:
            ranges: begin and end of each, in ascending order.
        """

    def compare(self, chunks: Sequence[Chunk]) -> None:
        """Compare some chunks with the file's bytes.

        Raises:
            SaveError: they differ, or the storage failed.
        """

    def commit(self, num_bytes: int, check: Callable[[Readable], Sequence[str]] | None = None) -> None:
        """Make the file durable, and then visible under its name. A file of that name is replaced.

        Only the rank that has called :meth:`Storage.create` commits.

        Args:
            num_bytes: the length that the file must have.
            check: returns what is wrong with the file's content. Called if the storage may have lost bytes.

        Raises:
            SaveError: the storage failed; the previous file of that name is unchanged.
            CommitNotDurable: the file has its name, but may not survive a power cut.
        """

    def abort(self) -> None:
        """Release the file. The rank that has created it deletes it unless it is committed. May be called again."""

    def __enter__(self) -> Self:
        """Return the file."""

    def __exit__(self, *_: object) -> None:
        """Call :meth:`abort`."""


class Storage(Protocol):
    """A place that stores checkpoints. It can be copied and pickled. One thread at a time.

    IMPORTANT: no method but :meth:`remove` deletes a committed file, and the caller removes what a save replaces only
    after :meth:`NewFile.commit` has returned.
    """

    def create(self, name: str) -> NewFile:
        """Begin a file that will be called `name`.

        Raises:
            ValueError: the name points outside the storage.
            SaveError: the storage failed.
        """

    def join(self, name: str, token: str) -> NewFile:
        """Open a file that another process has begun, to write a range of it.

        Args:
            name: as given to :meth:`create`.
            token: the :attr:`NewFile.token` there.

        Raises:
            ValueError: the name points outside the storage, or `token` is not of the form of a token.
            SaveError: the storage failed; also a FileNotFoundError if there is no such file.
        """

    def open(self, name: str) -> StoredFile:
        """Open a committed file for reading.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the name points outside the storage.
            OSError: the storage failed.
        """

    def list(self, folder: str = "") -> Sequence[str]:
        """Return the names of the committed files in a folder, sorted; sub-folders are not searched.

        Raises:
            FileNotFoundError: there is no such folder.
            OSError: the storage failed.
        """

    def remove(self, name: str) -> None:
        """Delete a committed file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the name points outside the storage.
            OSError: the storage failed.
        """
