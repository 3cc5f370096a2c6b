"""A checkpoint file that stays open: what is verified is what is read, even if another file takes its name.

All bytes go through the page cache, which the ranks of a machine share: a byte that one rank has read to check it is
not read from the disk again. The file is not mapped into memory, because a mapped file that shrinks ends the process.
"""

import contextlib
import ctypes
import itertools
import operator
import pickle
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from distckpt._checksum import crc32, memory_at
from distckpt.errors import CorruptCheckpointError, LoadError, UnsafeCheckpoint, UnsupportedCheckpoint
from distckpt.ptformat.archive import (
    Archive,
    NewerSchema,
    NotAnArchive,
    is_archive,
    read_archive,
    read_manifest,
    read_manifest_head,
)
from distckpt.ptformat.gc_pause import gc_paused
from distckpt.ptformat.layout import RecordLocation, UnsupportedArchive
from distckpt.ptformat.lazy_state import LazyState, NeedsTorchLoad, read_lazy_state
from distckpt.ptformat.loadable import describe_unreadable, refused_names
from distckpt.ptformat.manifest import SCHEMA, Head
from distckpt.ptformat.pickler import pickle_state
from distckpt.ptformat.torch_format import describe_format, load_by_torch
from distckpt.ptformat.verify import Checksum, Fault, check_range, find_faults, has_checksums, split_ranges
from distckpt.storage.base import StoredFile, SupportsReadInto
from distckpt.storage.local import LocalFile
from distckpt.storage.readahead import staggered_ranges

_STRIDE_BYTES = 4 << 20
_SMALL_BYTES = 64 << 10
"""Requests below this are read together with their neighbours: a call costs as much as a copy of this length."""
_TOGETHER_BYTES = 1 << 20
"""Length of such a read: fits into a core's own cache until it is copied."""
_FEW = 32
"""Up to this many small requests are read one by one, without a buffer."""
_TAIL_BYTES = 64 * 1024
"""A fingerprint covers these last bytes, and the central directory, which has the checksums of all records."""
_MOST_FAULTS = 3

Ranges = list[tuple[int, int]]
"""Begin and end of parts of a file."""


class ReadRequest(NamedTuple):
    """`num_bytes` bytes at an offset of the file, to read into memory at an address."""

    address: int
    num_bytes: int
    offset: int


class _UnreadStorages:
    """Storages that were handed out and hold nothing yet. They live as long as the caller refers to them.

    Attributes:
        is_known: True if the file could be read in this way.
        states: read and not handed out yet.
        storages: location and weak reference by torch's identity of the storage (``_cdata``). The identity is not
            reused while the weak reference lives.
    """

    def __init__(self) -> None:
        self.is_known = False
        self.states: list[Any] = []
        self.storages: dict[int, tuple[RecordLocation, StorageWeakRef]] = {}

    @gc_paused()
    def add(self, lazy: LazyState) -> None:
        self.is_known = True
        self.states.append(lazy.state)
        for identity, (record, storage) in lazy.storages.items():
            self.storages[identity] = record, StorageWeakRef(storage)  # type: ignore[no-untyped-call]  # torch ships it without types

    def alive(self) -> list[tuple[RecordLocation, torch.UntypedStorage]]:
        """Return the storages that the caller still refers to, in the order of the file."""
        revive: Any = torch.UntypedStorage._new_with_weak_ptr  # noqa: SLF001 - torch.multiprocessing uses it
        held = [(record, revive(reference.cdata)) for record, reference in self.storages.values()]
        return sorted(((record, one) for record, one in held if one is not None), key=lambda pair: pair[0].offset)


class OpenCheckpoint:
    """A checkpoint file, open for reading; a context manager. All methods raise OSError if the file cannot be read.

    Args:
        file: path of a file that ``torch.save`` or distckpt wrote, or such a file, which this object then closes.
        num_threads: most threads that read into memory.

    Attributes:
        path: of the file, for messages.
        num_bytes: its length when it was opened.

    Raises:
        OSError: the file cannot be opened or read.
        CorruptCheckpointError: it is empty.
        UnsupportedCheckpoint: it has a newer schema, or is encrypted or compressed by a rare method.
    """

    def __init__(self, file: Path | StoredFile, *, num_threads: int = 1) -> None:
        self._file: StoredFile = LocalFile(file) if isinstance(file, Path) else file
        self.path = self._file.path
        self._num_threads = num_threads
        self._archive: Archive | None = None
        self._fault: str | None = None
        self._unread = _UnreadStorages()
        try:
            self.num_bytes = self._file.num_bytes
            self._read_archive()
        except BaseException:
            self._file.close()
            raise

    def _read_archive(self) -> None:
        if not self._file.read(0, 1):
            raise CorruptCheckpointError(f"{self.path} is no checkpoint: it is empty")
        if not is_archive(self._file):  # torch's older format, or no checkpoint: state() finds out
            return
        try:
            self._archive = read_archive(self._file)
        except NotAnArchive as error:
            self._fault = str(error)
        except NewerSchema as error:
            raise UnsupportedCheckpoint(
                f"{self.path} was written by distckpt {error.head.writer}: its manifest has schema "
                f"{error.head.schema}, and this distckpt knows schemas up to {SCHEMA}. Upgrade distckpt (pip install "
                "--upgrade distckpt) to that version or a newer one. Nothing was loaded."
            ) from error
        except UnsupportedArchive as error:
            msg = f"{self.path} cannot be read: {error}. Write it anew, with its records stored or deflated."
            raise UnsupportedCheckpoint(msg) from error

    def __enter__(self) -> Self:
        """Return the checkpoint."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    # -- checking ----------------------------------------------------------------------------------

    def fingerprint(self) -> list[int]:
        """Return the file's length and the CRC-32 of its end, which are equal for equal files."""
        begin = max(0, self.num_bytes - _TAIL_BYTES)
        if self._archive is not None:
            begin = min(begin, self._archive.directory_at)
        return [self.num_bytes, crc32(self._file.read(begin, self.num_bytes - begin))]

    def identity(self) -> list[int]:
        """Return numbers that no other file of this machine has."""
        return list(self._file.identity())

    def head(self) -> Head | None:
        """Return the head of the manifest; None if the file has no manifest, or a damaged one."""
        return read_manifest_head(self._file)

    def bare_key(self) -> str | None:
        """Return the key of the single object whose bare state the file holds; None for more objects, or if unknown."""
        head = self.head()
        return None if head is None else head.key

    def has_damaged_head(self) -> bool:
        """Return True if the directory or the manifest of a file by distckpt is damaged. Reads nothing else."""
        if self._archive is None:
            return self._fault is not None
        return self._archive.is_own and self.head() is None

    def range_for(self, number: int, num_ranks: int) -> Ranges:
        """Return the range that one of several ranks checks, if they share the file evenly."""
        return [] if self._archive is None else [split_ranges(self._archive, num_ranks)[number]]

    def readahead(self, ranges: Ranges) -> AbstractContextManager[SupportsReadInto]:
        """Return a context that fetches ranges of the file; its value is passed to :meth:`check`."""
        return self._file.readahead(ranges)

    def readahead_staggered(self, fraction: float) -> AbstractContextManager[SupportsReadInto]:
        """Return a context in which all processes of a machine fetch the file together, each from its own fraction."""
        return self.readahead([] if self._archive is None else staggered_ranges(self.num_bytes, fraction))

    def check(self, ranges: Ranges, source: SupportsReadInto | None = None) -> list[Checksum]:
        """Read ranges of the file and compute their checksums. Any thread."""
        if self._archive is None:
            return []
        return [one for begin, end in ranges for one in check_range(self._file, self._archive, begin, end, source)]

    def faults(self, checksums: Sequence[Sequence[Checksum]]) -> list[Fault]:
        """Return the damaged places, from what :meth:`check` found in all ranges, in order."""
        if self._archive is None:
            return [] if self._fault is None else [Fault(self._fault)]
        found = find_faults(self._archive, checksums)
        tensors = self._tensors_by_record() if found else {}
        return [fault._replace(tensors=tuple(tensors.get(fault.record, ()))) for fault in found]

    def has_checksums(self, checksums: Sequence[Sequence[Checksum]]) -> bool:
        """Return True if the file has checksums to compare with; arguments as for :meth:`faults`."""
        return self._archive is not None and has_checksums(self._archive, checksums)

    def _tensors_by_record(self) -> dict[str | None, list[str]]:
        """Return the names of the tensors in each record, from the manifest, else from the pickle."""
        found: dict[str | None, list[str]] = {}
        with contextlib.suppress(NewerSchema, NeedsTorchLoad, RuntimeError):  # RuntimeError: a state of no known form
            manifest = read_manifest(self._file)
            if manifest is not None:
                for entry in manifest.tensors:
                    found.setdefault(entry.record, []).append(entry.name)
            elif self._archive is not None:
                lazy = read_lazy_state(self._archive, self._file)
                pickled = pickle_state(lazy.state)
                records = [lazy.storages[one._cdata][0].name for one in pickled.storages]  # noqa: SLF001 - as in lazy_state
                for tensor in pickled.tensors():
                    found.setdefault(records[tensor.storage], []).append(tensor.name)
        return found

    def verify(self, source: SupportsReadInto | None = None) -> None:
        """Compare the file with its own checksums. Any thread. Files that are no archives pass.

        Args:
            source: value of a readahead context; None to read without one.

        Raises:
            CorruptCheckpointError: the file is damaged.
        """
        with self.readahead([]) if source is None else nullcontext(source) as chosen:
            self.raise_for_faults(self.faults([self.check([(0, self.num_bytes)], chosen)]))

    def raise_for_faults(self, faults: Sequence[Fault]) -> None:
        """Raise a CorruptCheckpointError that names the first faults, if there are any."""
        if faults:
            more = f", and {len(faults) - _MOST_FAULTS} more" if len(faults) > _MOST_FAULTS else ""
            first = "; ".join(map(str, faults[:_MOST_FAULTS]))
            raise CorruptCheckpointError(f"{self.path} is no checkpoint, or is truncated or damaged: {first}{more}")

    # -- reading -----------------------------------------------------------------------------------

    def read_structure(self) -> bool:
        """Read the state without its tensors' bytes; return True if that was possible. Any thread."""
        if not self._unread.is_known and self._archive is not None:
            try:
                self._unread.add(read_lazy_state(self._archive, self._file))
            except NeedsTorchLoad:
                return False
        return self._unread.is_known

    def state(self) -> Any:
        """Return the saved state, on the CPU.

        If :meth:`read_structure` returns True, the tensors are empty until :meth:`fill`. The caller holds the only
        references: :meth:`fill` reads no tensor that the caller has dropped.

        Raises:
            OSError: the file cannot be read.
            UnsafeCheckpoint: it holds objects that loading would have to execute.
            UnsupportedCheckpoint: it is sound, and of another format.
            CorruptCheckpointError: it is no checkpoint, is truncated or damaged.
        """
        if self.read_structure() and self._archive is not None:
            if not self._unread.states:  # it was handed out before
                self._unread.add(read_lazy_state(self._archive, self._file))
            return self._unread.states.pop()
        try:
            return load_by_torch(self._file.stream(), self.path)
        except CorruptCheckpointError as error:
            found = None if self._fault is not None else describe_format(self._file, self._archive)
            if found is None:
                raise
            raise UnsupportedCheckpoint(f"{self.path} cannot be read: it is {found}.") from error

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Return the offset in the file of a tensor's storage; None if the tensor has its bytes already."""
        record, _ = self._unread.storages.get(tensor.untyped_storage()._cdata, (None, None))  # noqa: SLF001 - torch's identity of a storage
        return None if record is None else record.offset

    @gc_paused()
    def fill(self) -> None:
        """Read the bytes of all tensors that were handed out and are still referred to."""
        self.read((one.data_ptr(), record.num_bytes, record.offset) for record, one in self._unread.alive())
        self._unread.storages.clear()

    def read(self, requests: Iterable[tuple[int, int, int]]) -> None:
        """Read bytes into memory, on several threads.

        Args:
            requests: address in memory, length in bytes, and offset in the file.

        Raises:
            CorruptCheckpointError: the file has become shorter. As after an OSError, some of the memory was written.
        """
        todo, small = list[ReadRequest](), list[tuple[int, int, int]]()
        for request in requests:
            if request[1] < _SMALL_BYTES:
                small.append(request)
            else:
                todo += _in_strides(*request)
        if len(small) > _FEW:
            self._read_small(small)
        else:
            todo += itertools.starmap(ReadRequest, small)
        num_threads = min(self._num_threads, sum(one.num_bytes for one in todo) // _STRIDE_BYTES)
        counter, stop = itertools.count(), threading.Event()

        def work() -> None:
            for number in counter:
                if number >= len(todo) or stop.is_set():
                    return
                self._read_one(*todo[number])

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

    def _read_small(self, requests: list[tuple[int, int, int]]) -> None:
        """Read small requests: neighbours in one read, copied from a buffer."""
        requests.sort(key=operator.itemgetter(2))
        buffer = (ctypes.c_char * _TOGETHER_BYTES)()
        source, number = ctypes.addressof(buffer), 0
        while number < len(requests):
            first = number
            begin = until = requests[number][2]
            for _, num_bytes, offset in itertools.islice(requests, number, None):
                if offset > until + _SMALL_BYTES or offset + num_bytes > begin + _TOGETHER_BYTES:
                    break
                until, number = max(until, offset + num_bytes), number + 1
            self._read_one(source, until - begin, begin)
            for address, num_bytes, offset in requests[first:number]:
                ctypes.memmove(address, source + offset - begin, num_bytes)

    def _read_one(self, address: int, num_bytes: int, offset: int) -> None:
        memory, done = memory_at(address, num_bytes), 0
        while done < num_bytes:
            num_read = self._file.read_into(memory[done:], offset + done)
            if num_read == 0:
                raise CorruptCheckpointError(f"{self.path} is truncated: it became shorter while it was read")
            done += num_read


def _in_strides(address: int, num_bytes: int, offset: int) -> Iterator[ReadRequest]:
    for done in range(0, num_bytes, _STRIDE_BYTES):
        yield ReadRequest(address + done, min(_STRIDE_BYTES, num_bytes - done), offset + done)


def read_pt(file: Path | StoredFile, *, verified: bool = True) -> Any:
    """Read a checkpoint onto the CPU. Never executes code.

    Args:
        file: path of a file that ``torch.save`` or distckpt wrote, or such a file, which is then closed.
        verified: compare the file with its checksums first.

    Raises:
        OSError: the file cannot be opened or read.
        UnsafeCheckpoint: it holds objects that loading would have to execute.
        CorruptCheckpointError: it is no checkpoint, is truncated or damaged.
    """
    with OpenCheckpoint(file) as opened:
        if verified:
            opened.verify()
        state = opened.state()
        opened.fill()
        return state


def verify(path: Path) -> None:
    """Compare a file with its own checksums. Files that are no archives pass.

    Raises:
        OSError: the file cannot be read.
        CorruptCheckpointError: it is damaged.
    """
    with OpenCheckpoint(path) as file:
        file.verify()


def find_refused_names(file: StoredFile) -> list[str]:
    """Return the names in a complete checkpoint's pickle that keep it from being loaded without executing code."""
    try:
        return refused_names(torch.serialization.get_unsafe_globals_in_checkpoint(file.stream()))
    except pickle.UnpicklingError as error:  # a newer pickle protocol
        return [describe_unreadable(error)]
    except Exception:  # noqa: BLE001 - it knows the zip format alone
        try:
            read_pt(file, verified=False)
        except UnsafeCheckpoint as error:
            return re.findall(r"GLOBAL (\S+)", str(error)) or [str(error)]
        except (OSError, LoadError):  # another fault; loading will report it
            return []
        return []


def is_loadable(path: Path) -> bool:
    """Return True if a file is a checkpoint that loads without executing code. Reads no tensors where it can."""
    try:
        with OpenCheckpoint(path) as file:
            if not file.read_structure():
                read_pt(path, verified=False)
    except (OSError, LoadError):
        return False
    return True
