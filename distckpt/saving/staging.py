"""Device -> host: the bytes of a state into memory that is laid out as the file will be.

Owns that memory, and the copying. Must not know about files, nor why a byte goes where it goes.

The memory is page-aligned, touched once, and kept for the next save. Copying lets go of Python's lock, and may use
several threads. Where that costs nothing, the bytes of the host's own memory are checked while they are copied.
"""

import contextlib
import ctypes
import itertools
import mmap
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from distckpt._checksum import copy_with_crc32, kernel_name
from distckpt._threads import helper_threads, start_thread, wait_all
from distckpt.saving.from_device import Fetcher, pin, unpin

__all__ = ["Copy", "HostMemory", "Staging", "in_strides", "thread_memory"]

_CPU = torch.device("cpu")
_STRIDE_BYTES = 4 << 20
"""What one thread copies before it tells how far it is."""


class Copy(NamedTuple):
    """Bytes to be copied.

    Attributes:
        storage: number of the storage they come from.
        begin: where in the storage they begin.
        at: where they go; offsets count from what :class:`Staging` is told.
        num_bytes: how many.
    """

    storage: int
    begin: int
    at: int
    num_bytes: int


class HostMemory:
    """Page-aligned host memory that is kept and used again. One user at a time: :meth:`reserve` it first.

    Attributes:
        num_bytes: how much there is.

    Example:
        >>> memory = HostMemory()
        >>> len(memory.view(10)), memory.view(10_000) is not None, memory.num_bytes
        (10, True, 12288)
    """

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None
        self._in_use = threading.Lock()
        self._is_pinned = False
        self.num_bytes = 0

    def reserve(self) -> None:
        """Wait until nobody uses it, and use it. Whatever it waits for needs no other rank: bytes that are written."""
        while not self._in_use.acquire(timeout=1.0):  # not for ever: a signal handler may want its turn
            pass

    def release(self) -> None:
        """Let the next one use it. Any thread; views of it must not be used any more."""
        self._in_use.release()

    @contextlib.contextmanager
    def reserved(self) -> Iterator[None]:
        """Have it reserved while the body runs."""
        self.reserve()
        try:
            yield
        finally:
            self.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> "HostMemory":
        """Return a new one: what a copy of its owner stages, goes elsewhere."""
        return HostMemory()

    def __reduce__(self) -> tuple[Any, ...]:
        """Start anew in another process."""
        return (HostMemory, ())

    def view(self, num_bytes: int, *, pinned: bool = False) -> memoryview:
        """Return `num_bytes` of it, with what the last user left there.

        Args:
            num_bytes: how much; the memory grows where it has less.
            pinned: whether a device is to write into it; then all of it stays where it is, if the driver lets us.

        Raises:
            MemoryError: there is not that much.
        """
        if self._map is None or num_bytes > self.num_bytes:
            self.free()
            size = max(-(-num_bytes // mmap.PAGESIZE), 1) * mmap.PAGESIZE
            try:
                self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except OSError as error:
                msg = f"no host memory for a snapshot of {num_bytes} bytes: {error}"
                raise MemoryError(msg) from error
            with contextlib.suppress(OSError):  # larger pages: fewer to touch, and to pin for the disk
                self._map.madvise(mmap.MADV_HUGEPAGE)
            self.num_bytes = size
        if pinned and not self._is_pinned:
            self._is_pinned = pin(_address_of(memoryview(self._map)), self.num_bytes)
        return memoryview(self._map)[:num_bytes]

    def free(self) -> None:
        """Give it back. Views of it that somebody still holds keep theirs."""
        if self._is_pinned and self._map is not None:
            unpin(_address_of(memoryview(self._map)))
        self._map, self._is_pinned, self.num_bytes = None, False, 0


class _Kept(threading.local):
    """The memory of each thread that saves: replicas may be threads of one process."""

    def __init__(self) -> None:
        self.memory = HostMemory()


_KEPT = _Kept()


def thread_memory() -> HostMemory:
    """Return the memory that all savers of this thread use, one after the other."""
    return _KEPT.memory


class Staging:
    """A copying under way: any number of threads may take part, and any thread may wait for it.

    On an accelerator, of what this thread's streams have computed by now, or are still computing.

    Args:
        storages: what is copied from.
        copies: what goes where, in ascending order of ``at``; see :func:`in_strides`.
        memory: what is copied into.
        begin: the offset of the memory's first byte.
    """

    def __init__(
        self, storages: Sequence[torch.UntypedStorage], copies: Sequence[Copy], memory: memoryview, begin: int
    ) -> None:
        self._storages = storages
        self._memory = memory
        self._address = _address_of(memory)
        self._begin = begin
        self._todo = copies
        devices = [storage.device for storage in storages]
        elsewhere = set(devices) - {_CPU}
        pairs = zip(storages, devices, strict=True)
        self._sources = [None if device in elsewhere else storage.data_ptr() for storage, device in pairs]
        self._fetcher = Fetcher(elsewhere)
        self._is_checking = kernel_name() is not None
        self._crcs: list[int | None] = [None] * len(copies)
        self._numbers: dict[int, int] = {}  # of the copies, by where they go
        self._next = itertools.count()
        self._is_done = bytearray(len(self._todo))
        self._num_done = 0  # from the first on, without a gap
        self._change = threading.Condition()
        self._num_waiting = 0
        self._error: BaseException | None = None
        self._threads: list[threading.Event] = []

    def run(self) -> None:
        """Take part until there is nothing left to begin.

        Raises:
            Exception: copying failed, here or on another thread.
        """
        try:
            for number in self._next:
                if number >= len(self._todo) or self._error is not None:
                    break
                self._copy(number)
                self._is_done[number] = 1
                if self._num_waiting or number == self._num_done:
                    self._look_how_far()
        except BaseException as error:
            with self._change:
                self._error = error
                self._change.notify_all()
            raise

    def stop(self) -> None:
        """Begin nothing more: whoever waits for the rest gets an error."""
        if self._num_done < len(self._todo):
            self._error = self._error or RuntimeError("the copying was stopped")

    @contextlib.contextmanager
    def beside(self, num_threads: int) -> Iterator[None]:
        """Copy on so many other threads while the body runs; what is not copied at its end stays so."""
        with helper_threads(self._help, num_threads=num_threads):
            try:
                yield
            finally:
                self.stop()

    def begin(self, num_threads: int) -> None:
        """Copy all of it on so many other threads; :meth:`wait_for` tells when it is done, :meth:`settle` waits for it.

        Raises:
            RuntimeError: a thread cannot be started.
        """
        try:
            for _ in range(num_threads):
                self._threads.append(start_thread(self._help))
        except BaseException:
            self.stop()
            raise

    def settle(self) -> None:
        """Wait until none of the threads of :meth:`begin` is left, whatever interrupts that. Any thread."""
        wait_all(self._threads)

    def run_on(self, num_threads: int) -> None:
        """Copy all of it, with so many threads, this one among them; return when it is done.

        Raises:
            Exception: copying failed.
        """
        if num_threads == 1 and None not in self._sources:
            self._run_alone()
            return
        with self.beside(num_threads - 1):
            self.run()
            self.wait_for(None)

    def _run_alone(self) -> None:
        """Copy all of it from the host's memory, with nobody who takes part or looks meanwhile."""
        for number in range(len(self._todo)):
            self._copy(number)
        self._is_done = bytearray(b"\1") * len(self._todo)
        self._look_how_far()

    def checked(self, begin: int, end: int) -> list[tuple[int, int]] | None:
        """Return the checksums of what was copied to a range, in its order. Any thread, once it is copied.

        Args:
            begin: where a copy goes.
            end: where one ends.

        Returns:
            CRC-32 and number of bytes of each of the range's pieces; None where they are not known.
        """
        if not self._numbers:
            self._numbers = {one.at: number for number, one in enumerate(self._todo)}
        parts = []
        while begin < end:
            number = self._numbers.get(begin)
            crc = None if number is None else self._crcs[number]
            if number is None or crc is None:
                return None
            num_bytes = self._todo[number].num_bytes
            parts.append((crc, num_bytes))
            begin += num_bytes
        return parts

    def wait_for(self, offset: int | None) -> None:
        """Return when all bytes up to an offset are copied; None for all there are.

        Raises:
            Exception: copying failed.
        """
        while not self._is_past(offset):
            with self._change:
                self._num_waiting += 1
                try:
                    self._look_how_far()
                    if not self._is_past(offset):
                        self._change.wait(timeout=1.0)  # not for ever: a signal handler may want its turn
                finally:
                    self._num_waiting -= 1
            if self._error is not None:
                raise self._error

    def _is_past(self, offset: int | None) -> bool:
        num_done = self._num_done  # once: another thread may end the last copy meanwhile
        if num_done == len(self._todo):
            return True
        return offset is not None and self._todo[num_done].at >= offset

    def _look_how_far(self) -> None:
        with self._change:
            far = self._is_done.find(0, self._num_done)
            self._num_done = len(self._todo) if far < 0 else far
            self._change.notify_all()

    def _help(self) -> None:
        with contextlib.suppress(BaseException):  # kept, and raised where it is waited for
            self.run()

    def _copy(self, which: int) -> None:
        number, begin, at, num_bytes = piece = self._todo[which]
        source, to = self._sources[number], self._address + at - self._begin
        if source is None:
            self._fetch(piece)
        elif self._is_checking:
            self._crcs[which] = copy_with_crc32(to, source + begin, num_bytes)
        else:
            ctypes.memmove(to, source + begin, num_bytes)

    def _fetch(self, piece: Copy) -> None:
        at = piece.at - self._begin
        target = torch.frombuffer(self._memory, dtype=torch.uint8, offset=at, count=piece.num_bytes)
        self._fetcher.fetch(self._storages[piece.storage], piece.begin, target)


def in_strides(copies: Iterable[Copy]) -> tuple[Copy, ...]:
    """Cut copies into pieces such that several threads may share them, and others take what is copied."""
    found: list[Copy] = []
    for one in copies:
        if one.num_bytes <= _STRIDE_BYTES:
            found.append(one)
            continue
        found += [
            Copy(one.storage, one.begin + done, one.at + done, min(_STRIDE_BYTES, one.num_bytes - done))
            for done in range(0, one.num_bytes, _STRIDE_BYTES)
        ]
    return tuple(found)


def _address_of(memory: memoryview) -> int:
    if not len(memory):
        return 0
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
