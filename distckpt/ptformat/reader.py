"""A checkpoint that is held open: what is verified is what is read, whatever comes in the file's place meanwhile.

Owns the file's descriptor, and the way of its bytes: checked in shares or whole, then into memory that others name.
Must not know what the memory is of.

Everything goes through the page cache, which all ranks of a machine share: what one of them has had read from storage
to check it, the others, and the reading that follows, find there. The file is not mapped: one that shrinks while it is
read would end the process.
"""

import ctypes
import itertools
import operator
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from distckpt._checksum import crc32
from distckpt.errors import CorruptCheckpointError, UnsupportedCheckpoint
from distckpt.ptformat.foreign import format_of
from distckpt.ptformat.gc_pause import collector_paused
from distckpt.ptformat.layout import Slot
from distckpt.ptformat.lazy_state import Hollow, NotPlain, read_hollow
from distckpt.ptformat.manifest import SCHEMA, Head
from distckpt.ptformat.record_heads import head_of
from distckpt.ptformat.torch_reader import load_by_torch
from distckpt.ptformat.verify import (
    Archive,
    Checked,
    NewerSchema,
    NotAnArchive,
    UnsupportedArchive,
    begins_as_archive,
    check_range,
    find_faults,
    read_archive,
    shares_of,
)
from distckpt.storage.base import StoredFile, SupportsReadInto
from distckpt.storage.local import LocalFile
from distckpt.storage.readahead import staggered_ranges

__all__ = ["OpenCheckpoint"]

_STRIDE_BYTES = 4 << 20
_SMALL_BYTES = 64 << 10
"""What is less than that is read together with what stands near it: a call costs as much as a copy of this."""
_TOGETHER_BYTES = 1 << 20
"""Small parts are read so many bytes at once: these stay in a core's own cache until they are copied on."""
_FEW = 32
"""So many small parts, or less, are not worth a memory of their own on the way."""
_TAIL_BYTES = 64 * 1024
"""What a fingerprint is of, and the zip's directory: there are the checksums of all records."""
_MOST_FAULTS = 3
"""What a message names of them."""


Ranges = list[tuple[int, int]]
"""Where each of some pieces of a file begins and ends."""


class Part(NamedTuple):
    """Bytes of a file, and the memory that they are for."""

    address: int
    num_bytes: int
    at: int


class _Unread:
    """The storages of what a file holds that were not read yet. They live as long as somebody refers to them.

    Attributes:
        is_known: whether the file could be read in this way.
        trees: what was read of it and not handed out yet.
        storages: where the bytes of each stand, and a weak reference, by torch's identity of the storage, which is
            none other's as long as the weak reference lives.
    """

    def __init__(self) -> None:
        self.is_known = False
        self.trees: list[Any] = []
        self.storages: dict[int, tuple[Slot, StorageWeakRef]] = {}

    @collector_paused()
    def add(self, hollow: Hollow) -> None:
        """Take over what was read."""
        self.is_known = True
        self.trees.append(hollow.state)
        for identity, storage in hollow.storages.items():
            self.storages[identity] = hollow.slots[identity], StorageWeakRef(storage)  # type: ignore[no-untyped-call]  # torch ships it without types

    def left(self) -> list[tuple[Slot, torch.UntypedStorage]]:
        """Return those that somebody still refers to, in the order of the file."""
        again: Any = torch.UntypedStorage._new_with_weak_ptr  # noqa: SLF001 - what its own sharing between processes uses
        held = [(slot, again(reference.cdata)) for slot, reference in self.storages.values()]
        return sorted(((slot, one) for slot, one in held if one is not None), key=lambda pair: pair[0].offset)


class OpenCheckpoint:
    """A checkpoint's file, open for reading; a context.

    Args:
        file: the path of a file that ``torch.save`` or distckpt wrote, or such a file, open for reading.
        num_threads: how many read into memory, at most.

    Attributes:
        path: of the file.
        num_bytes: its length when it was opened.

    Raises:
        OSError: it cannot be opened or read.
        CorruptCheckpointError: it is empty.
        UnsupportedCheckpoint: it is of a newer schema, or an archive that is encrypted or compressed in a rare way.
    """

    def __init__(self, file: Path | StoredFile, *, num_threads: int = 1) -> None:
        self._file: StoredFile = LocalFile(file) if isinstance(file, Path) else file
        self.path = self._file.path
        self._num_threads = num_threads
        self._archive: Archive | None = None
        self._fault: str | None = None
        self._unread = _Unread()
        try:
            self.num_bytes = self._file.num_bytes
            self._open()
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> None:
        if not self._file.read(0, 1):
            msg = f"{self.path} is no checkpoint: it is empty"
            raise CorruptCheckpointError(msg)
        if begins_as_archive(self._file):  # else the older format, or no checkpoint at all: who reads it will say so
            try:
                self._archive = read_archive(self._file)
            except NotAnArchive as error:
                self._fault = str(error)
            except NewerSchema as error:
                raise UnsupportedCheckpoint(_newer(self.path, error.head)) from error
            except UnsupportedArchive as error:
                msg = f"{self.path} cannot be read: {error}. Write it anew, with its records stored or deflated."
                raise UnsupportedCheckpoint(msg) from error

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    # -- checking ----------------------------------------------------------------------------------

    def fingerprint(self) -> list[int]:
        """Return what is equal for equal files: their length, and the CRC-32 of their end."""
        begin = max(0, self.num_bytes - _TAIL_BYTES)
        if self._archive is not None:
            begin = min(begin, self._archive.directory_at)
        return [self.num_bytes, crc32(self._file.read(begin, self.num_bytes - begin))]

    def head(self) -> Head | None:
        """Return the head of the manifest; None where there is none that can be read.

        Raises:
            OSError: it cannot be read.
        """
        return head_of(self._file)

    def has_damaged_head(self) -> bool:
        """Return True if the archive's directory, or its manifest, is not as distckpt wrote it. Reads nothing else.

        Raises:
            OSError: it cannot be read.
        """
        if self._archive is None:
            return self._fault is not None
        return self._archive.is_own and self.head() is None

    def inode(self) -> list[int]:
        """Return what tells a file of this machine from all others."""
        return list(self._file.identity())

    def share(self, number: int, num_shares: int) -> Ranges:
        """Return what one of several ranks is to check, if each checks as much."""
        return [] if self._archive is None else [shares_of(self._archive, num_shares)[number]]

    def readahead(self, ranges: Ranges) -> AbstractContextManager[SupportsReadInto]:
        """Return a context in whose body ranges of the file are read ahead."""
        return self._file.readahead(ranges)

    def readahead_staggered(self, fraction: float) -> AbstractContextManager[SupportsReadInto]:
        """Return a context in whose body all of the file is read ahead, by all processes of a machine that do so.

        Args:
            fraction: between 0 and 1, another one for each of them.
        """
        return self.readahead([] if self._archive is None else staggered_ranges(self.num_bytes, fraction))

    def check(self, ranges: Ranges, source: SupportsReadInto | None = None) -> list[Checked]:
        """Read ranges of the file, and check them. Any thread.

        Raises:
            OSError: it cannot be read.
        """
        if self._archive is None:
            return []
        return [one for begin, end in ranges for one in check_range(self._file, self._archive, begin, end, source)]

    def faults(self, checked: Iterable[Sequence[Checked]]) -> list[str]:
        """Say what is wrong with the file, from what :meth:`check` found in all shares, in their order."""
        if self._archive is None:
            return [] if self._fault is None else [self._fault]
        return find_faults(self._archive, checked)

    def verify(self, source: SupportsReadInto | None = None) -> None:
        """Compare all of the file with its own checksums. Any thread. Files that are no archives pass.

        Args:
            source: what to read it through, as :meth:`readahead` yields it; None to fetch it as it is read.

        Raises:
            OSError: it cannot be read.
            CorruptCheckpointError: it is not as it was written.
        """
        with self.readahead([]) if source is None else nullcontext(source) as chosen:
            self.refuse(self.faults([self.check([(0, self.num_bytes)], chosen)]))

    def refuse(self, faults: Sequence[str]) -> None:
        """Raise an error that tells of faults, if there are any.

        Raises:
            CorruptCheckpointError: there are.
        """
        if faults:
            more = f", and {len(faults) - _MOST_FAULTS} more" if len(faults) > _MOST_FAULTS else ""
            told = "; ".join(faults[:_MOST_FAULTS])
            msg = f"{self.path} is no checkpoint, or is truncated or damaged: {told}{more}"
            raise CorruptCheckpointError(msg)

    # -- reading -----------------------------------------------------------------------------------

    def look(self) -> bool:
        """Read what the file says of its state, but for its tensors; tell whether that was possible. Any thread.

        Raises:
            OSError: it cannot be read.
        """
        if not self._unread.is_known and self._archive is not None:
            try:
                self._unread.add(read_hollow(self._archive, self._file))
            except NotPlain:
                return False
        return self._unread.is_known

    def state(self) -> Any:
        """Return what was saved. Its tensors, on the CPU, hold nothing yet where :meth:`look` could tell of them.

        The caller alone has it afterwards: what nobody refers to any more is not read by :meth:`fill`.

        Raises:
            OSError: it cannot be read.
            UnsafeCheckpoint: it holds objects that only execution could restore.
            UnsupportedCheckpoint: it is sound, and of another format.
            CorruptCheckpointError: it is no checkpoint, is truncated or damaged.
        """
        if self.look() and self._archive is not None:
            if not self._unread.trees:  # it was handed out before
                self._unread.add(read_hollow(self._archive, self._file))
            return self._unread.trees.pop()
        try:
            return load_by_torch(self._file.stream(), self.path)
        except CorruptCheckpointError as error:
            what = None if self._fault is not None else format_of(self._file, self._archive)
            if what is None:
                raise
            msg = f"{self.path} cannot be read: it is {what}."
            raise UnsupportedCheckpoint(msg) from error

    def place_of(self, tensor: torch.Tensor) -> int | None:
        """Return where in the file a tensor's storage begins; None if it holds what it should."""
        slot, _ = self._unread.storages.get(tensor.untyped_storage()._cdata, (None, None))  # noqa: SLF001 - torch's identity of a storage
        return None if slot is None else slot.offset

    @collector_paused()
    def fill(self) -> None:
        """Read what is to stand in the storages of all tensors that were handed out, and are still referred to.

        Raises:
            OSError: it cannot be read.
            CorruptCheckpointError: it has become shorter.
        """
        left = self._unread.left()
        self.read((storage.data_ptr(), slot.num_bytes, slot.offset) for slot, storage in left)
        self._unread.storages.clear()

    def read(self, parts: Iterable[tuple[int, int, int]]) -> None:
        """Read bytes into memory, on several threads.

        Args:
            parts: address of the memory, number of bytes, and where in the file they stand; the memory is that of
                tensors on the CPU.

        Raises:
            OSError: the operating system refused; some of the memory has been written to.
            CorruptCheckpointError: the file has become shorter; the same.
        """
        todo, small = list[Part](), list[tuple[int, int, int]]()
        for part in parts:
            if part[1] < _SMALL_BYTES:
                small.append(part)
            else:
                todo += _in_strides(Part(*part))
        if len(small) > _FEW:
            self._read_small(small)
        else:
            todo += [Part(*part) for part in small]
        num_threads = min(self._num_threads, sum(one.num_bytes for one in todo) // _STRIDE_BYTES)
        counter, stop = itertools.count(), threading.Event()

        def work() -> None:
            for number in counter:
                if number >= len(todo) or stop.is_set():
                    return
                self._read_one(todo[number])

        if num_threads <= 1:
            work()
            return
        with ThreadPoolExecutor(num_threads - 1, thread_name_prefix="distckpt-read") as pool:
            others = [pool.submit(work) for _ in range(num_threads - 1)]
            try:
                work()
            finally:
                stop.set()
        for other in others:
            other.result()

    def _read_small(self, parts: list[tuple[int, int, int]]) -> None:
        """Read small parts: those that stand near each other in one go, and from there to where they belong."""
        parts.sort(key=_place_of)
        buffer = (ctypes.c_char * _TOGETHER_BYTES)()
        source, number = ctypes.addressof(buffer), 0
        while number < len(parts):
            first = number
            begin = until = parts[number][2]
            for _, num_bytes, at in itertools.islice(parts, number, None):
                if at > until + _SMALL_BYTES or at + num_bytes > begin + _TOGETHER_BYTES:
                    break
                until, number = max(until, at + num_bytes), number + 1
            self._read_one(Part(source, until - begin, begin))
            for address, num_bytes, at in parts[first:number]:
                ctypes.memmove(address, source + at - begin, num_bytes)

    def _read_one(self, part: Part) -> None:
        memory, done = memoryview((ctypes.c_char * part.num_bytes).from_address(part.address)).cast("B"), 0
        while done < part.num_bytes:
            num_bytes = self._file.read_into(memory[done:], part.at + done)
            if num_bytes == 0:
                msg = f"{self.path} is truncated: it became shorter while it was read"
                raise CorruptCheckpointError(msg)
            done += num_bytes


_place_of = operator.itemgetter(2)


def _newer(path: Path, head: Head) -> str:
    return (
        f"{path} was written by distckpt {head.writer}: its manifest has schema {head.schema}, and this distckpt "
        f"knows schemas up to {SCHEMA}. Upgrade distckpt (pip install --upgrade distckpt) to that version or a newer "
        "one. Nothing was loaded."
    )


def _in_strides(part: Part) -> Iterator[Part]:
    for done in range(0, part.num_bytes, _STRIDE_BYTES):
        yield Part(part.address + done, min(_STRIDE_BYTES, part.num_bytes - done), part.at + done)
