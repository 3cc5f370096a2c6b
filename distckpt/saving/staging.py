"""Copy the storages of a state into host memory that is laid out as the file.

:class:`HostMemory` is page-aligned and reused by later saves, so its pages are faulted in once. Copies release the GIL:
several threads may share them (:class:`Staging`). Storages in host memory are checksummed during the copy where that
costs no extra time.

In a background save, parameters and optimizer states on an accelerator may be copied while training continues: only an
optimizer's step changes them, and :class:`OptimizerStepGuard` delays that step. Everything else (buffers change in the
forward pass, averaged weights in user code) is copied before training continues.
"""

import contextlib
import ctypes
import functools
import itertools
import mmap
import threading
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distckpt._checksum import copy_rows
from distckpt._threads import helper_threads, start_thread, wait_all
from distckpt.ptformat.image import CopyItem
from distckpt.ptformat.state_form import StateForms

_CPU = torch.device("cpu")
_BATCH_BYTES, _BATCH_ITEMS = 4 << 20, 4096
"""Most bytes, and most copies, that one thread makes before it reports progress."""


class Copies(tuple[CopyItem, ...]):  # noqa: SLOT001 - its cached properties need a __dict__
    """Copies in ascending order of ``at``, also as a table for :func:`~distckpt._checksum.copy_rows`."""

    @functools.cached_property
    def rows(self) -> "array[int]":
        """The fields of each copy."""
        return array("q", itertools.chain.from_iterable(self))

    @functools.cached_property
    def batches(self) -> list[tuple[int, int]]:
        """The first copy, and the last one plus 1, of each batch that a thread copies in one call."""
        return self.batches_without(())

    def batches_without(self, alone: Collection[int]) -> list[tuple[int, int]]:
        """Return the batches; each copy of a storage in `alone` is a batch of its own."""
        batches: list[tuple[int, int]] = []
        first, num_bytes, was_alone = 0, 0, False
        for index, item in enumerate(self):
            is_alone = item.storage in alone
            num_bytes += item.num_bytes
            if index > first and (num_bytes > _BATCH_BYTES or index - first == _BATCH_ITEMS or is_alone or was_alone):
                batches.append((first, index))
                first, num_bytes = index, item.num_bytes
            was_alone = is_alone
        return [*batches, (first, len(self))] if self else batches


def split_copies(copies: Iterable[CopyItem]) -> Copies:
    """Split copies into items of at most 4 MiB, so that threads can share them."""
    return Copies(
        CopyItem(storage, begin + done, at + done, min(_BATCH_BYTES, num_bytes - done))
        for storage, begin, at, num_bytes in copies
        for done in range(0, num_bytes, _BATCH_BYTES)
    )


class HostMemory:
    """Page-aligned host memory for snapshots, reused by one save after another.

    One save uses it at a time, between :meth:`reserve` and :meth:`release`. A copy of the object has memory of its own.

    Attributes:
        num_bytes: allocated bytes.
        plain_forms: the forms of the states without sharded tensors that were staged here.
        live_forms: of those with sharded tensors, as the objects have returned them.

    Example:
        >>> memory = HostMemory()
        >>> len(memory.view(10)), len(memory.view(10_000)), memory.num_bytes
        (10, 10000, 12288)
    """

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None
        self._in_use = threading.Lock()
        self._is_pinned = False
        self.num_bytes = 0
        self.plain_forms = StateForms()
        self.live_forms = StateForms()

    def reserve(self) -> None:
        """Wait until no save uses the memory, and take it. The wait depends on no other rank."""
        while not self._in_use.acquire(timeout=1.0):  # a timeout lets signal handlers run
            pass

    def release(self) -> None:
        """Return the memory. Callable from any thread. Views of it must not be used afterwards."""
        self._in_use.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return (HostMemory, ())

    def view(self, num_bytes: int, *, pinned: bool = False) -> memoryview:
        """Return the first `num_bytes` bytes, with undefined content; allocate them if needed.

        `pinned` page-locks the memory for a CUDA device, where the driver allows it. Raises MemoryError.
        """
        if self._map is None or num_bytes > self.num_bytes:
            self.free()
            size = max(-(-num_bytes // mmap.PAGESIZE), 1) * mmap.PAGESIZE
            try:
                self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except OSError as error:
                raise MemoryError(f"no host memory for a snapshot of {num_bytes} bytes: {error}") from error
            with contextlib.suppress(OSError):  # fewer pages to fault in, and to pin for direct I/O
                self._map.madvise(mmap.MADV_HUGEPAGE)
            self.num_bytes = size
        if pinned and not self._is_pinned:
            self._is_pinned = _pin(_address_of(memoryview(self._map)), self.num_bytes)
        return memoryview(self._map)[:num_bytes]

    def free(self) -> None:
        """Free the memory. Existing views keep it alive."""
        if self._is_pinned and self._map is not None:
            _unpin(_address_of(memoryview(self._map)))
        self._map, self._is_pinned, self.num_bytes = None, False, 0


class _ThreadMemory(threading.local):
    """Per thread, since XLA replicas may be threads of one process."""

    def __init__(self) -> None:
        self.memory = HostMemory()


_THREAD_MEMORY = _ThreadMemory()


def thread_memory() -> HostMemory:
    """Return the memory that all saves of the calling thread share."""
    return _THREAD_MEMORY.memory


class Staging:
    """Copies storages into host memory on any number of threads.

    Copies from an accelerator see what the constructing thread's current streams have computed, or are computing.

    Args:
        storages: the sources.
        copies: the ranges to copy, in ascending order of ``at``; see :func:`split_copies`.
        memory: the target.
        begin: offset in the image of the target's first byte.
        addresses: of the sources; None if they are not known, or not in host memory.
    """

    def __init__(
        self,
        storages: Sequence[torch.UntypedStorage],
        copies: Sequence[CopyItem],
        memory: memoryview,
        begin: int,
        *,
        addresses: "array[int] | None" = None,
    ) -> None:
        self._storages = storages
        self._memory = memory
        self._begin = begin
        self._copies = copies if isinstance(copies, Copies) else Copies(copies)
        devices = [] if addresses is not None else [storage.device for storage in storages]
        accelerators = set(devices) - {_CPU}
        self._on_device = {number for number, device in enumerate(devices) if device in accelerators}
        if addresses is None:
            pairs = enumerate(storages)
            addresses = array("Q", [0 if number in self._on_device else one.data_ptr() for number, one in pairs])
        self._sources = addresses
        self._fetcher = _DeviceFetcher(accelerators)
        self._batches = self._copies.batches_without(self._on_device) if accelerators else self._copies.batches
        self._crcs = array("q", [-1]) * len(copies)
        self._index_of: dict[int, int] = {}  # of each copy, by its offset in the image
        self._next = itertools.count()
        self._is_done = bytearray(len(self._batches))
        self._num_done = 0  # batches without a gap
        self._changed = threading.Condition()
        self._num_waiting = 0
        self._error: BaseException | None = None
        self._threads: list[threading.Event] = []

    def run(self) -> None:
        """Copy batches until none is left to start. Raises the error of a failed copy, on this or another thread."""
        try:
            for index in self._next:
                if index >= len(self._batches) or self._error is not None:
                    break
                self._copy(index)
                self._is_done[index] = 1
                if self._num_waiting or index == self._num_done:
                    self._update_progress()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
            raise

    def run_on(self, num_threads: int) -> None:
        """Copy everything on `num_threads` threads, including the calling one; return when all is copied."""
        num_threads = min(num_threads, max(len(self._batches), 1))
        with self.running(num_threads - 1):
            self.run()
            self.wait_until(None)

    @contextlib.contextmanager
    def running(self, num_threads: int) -> Iterator[None]:
        """Copy on `num_threads` other threads during the body; stop at its end."""
        with helper_threads(self._run_quietly, num_threads=num_threads):
            try:
                yield
            finally:
                self.stop()

    def start(self, num_threads: int) -> None:
        """Start to copy on `num_threads` other threads; see :meth:`wait_until` and :meth:`join`."""
        try:
            for _ in range(num_threads):
                self._threads.append(start_thread(self._run_quietly))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Start no further copy; a thread that waits for one gets an error."""
        if self._num_done < len(self._batches):
            self._error = self._error or RuntimeError("the copying was stopped")

    def join(self) -> None:
        """Wait for the threads of :meth:`start`, through any interrupt. Callable from any thread."""
        wait_all(self._threads)

    def wait_until(self, offset: int | None) -> None:
        """Block until all bytes before `offset` are copied; None for all bytes. Raises the error of a failed copy."""
        while not self._is_past(offset):
            with self._changed:
                self._num_waiting += 1
                try:
                    self._update_progress()
                    if not self._is_past(offset):
                        self._changed.wait(timeout=1.0)  # a timeout lets signal handlers run
                finally:
                    self._num_waiting -= 1
            if self._error is not None:
                raise self._error

    def checksum_at(self, at: int) -> tuple[int, int] | None:
        """Return CRC-32 and number of bytes of the copy to an offset, once it is copied.

        Returns:
            None if there is no copy to `at`, or it was not checksummed.
        """
        if not self._index_of:
            self._index_of = {item.at: index for index, item in enumerate(self._copies)}
        index = self._index_of.get(at)
        if index is None or self._crcs[index] < 0:
            return None
        return self._crcs[index], self._copies[index].num_bytes

    def _is_past(self, offset: int | None) -> bool:
        num_done = self._num_done  # read once: another thread may increase it
        if num_done == len(self._batches):
            return True
        return offset is not None and self._copies[self._batches[num_done][0]].at >= offset

    def _update_progress(self) -> None:
        with self._changed:
            first = self._is_done.find(0, self._num_done)
            self._num_done = len(self._batches) if first < 0 else first
            self._changed.notify_all()

    def _run_quietly(self) -> None:
        with contextlib.suppress(BaseException):  # kept in _error, raised by wait_until
            self.run()

    def _copy(self, index: int) -> None:
        first, last = self._batches[index]
        storage, begin, at, num_bytes = self._copies[first]
        if storage in self._on_device:
            target = torch.frombuffer(self._memory, dtype=torch.uint8, offset=at - self._begin, count=num_bytes)
            self._fetcher.fetch(self._storages[storage], begin, target)
        else:
            copy_rows(self._memory, self._begin, self._sources, self._copies.rows, first, last, self._crcs)


class _DeviceFetcher:
    """Copies from CUDA devices on streams of its own. Callable from any thread."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._computed = {device: torch.cuda.current_stream(device).record_event() for device in devices}
        self._per_thread = threading.local()

    def fetch(self, storage: torch.UntypedStorage, begin: int, target: torch.Tensor) -> None:
        """Copy bytes of `storage` from offset `begin` into `target`: uint8 (bytes,), on the host."""
        stream = self._stream(storage.device)
        with torch.cuda.stream(stream):
            source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            target.copy_(source[begin : begin + target.numel()], non_blocking=True)
        stream.synchronize()

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        streams: dict[torch.device, torch.cuda.Stream] = self._per_thread.__dict__.setdefault("streams", {})
        if device not in streams:
            streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch ships it without types
            streams[device].wait_event(self._computed[device])
        return streams[device]


def _pin(address: int, num_bytes: int) -> bool:
    with contextlib.suppress(RuntimeError):
        return int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0)) == 0  # type: ignore[no-untyped-call]  # as above
    return False


def _unpin(address: int) -> None:
    with contextlib.suppress(RuntimeError):
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]  # as above


def _address_of(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory)) if len(memory) else 0


class OptimizerStepGuard:
    """Delays the next step of every optimizer in the process until a deferred copy is done.

    Args:
        wait: blocks until the copy is done. The guard ignores its errors.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait
        with _GUARD_LOCK:
            if not _IS_HOOKED:  # never removed: torch iterates over its hooks while it calls them
                register_optimizer_step_pre_hook(lambda *_: wait_for_deferred_copies())
                _IS_HOOKED.append(True)
            _GUARDS.append(self)

    def wait(self) -> None:
        """Block until the copy is done, then remove the guard."""
        with contextlib.suppress(Exception):
            self._wait()
        self.remove()

    def remove(self) -> None:
        """Let optimizers step. Callable from any thread, more than once."""
        with _GUARD_LOCK, contextlib.suppress(ValueError):
            _GUARDS.remove(self)


_GUARD_LOCK = threading.Lock()
_GUARDS: list[OptimizerStepGuard] = []
_IS_HOOKED: list[bool] = []


def wait_for_deferred_copies() -> None:
    """Block until no copy is deferred. Call it before changing parameters without an optimizer."""
    if _GUARDS:
        for guard in tuple(_GUARDS):
            guard.wait()


def has_step_hook(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if every step of an optimizer calls Python hooks: a CUDA graph cannot replay it.

    Adam and its like refuse to be captured unless ``capturable`` is set. Others (SGD) may be captured at any time.
    """
    return all(group.get("capturable") is False for group in optimizer.param_groups)
