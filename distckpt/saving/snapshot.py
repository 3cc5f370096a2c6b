"""One rank's snapshot of a state: from captured objects to bytes in a file.

Owns planning, staging and writing on one rank, of the whole of a file or of one share of it. Must not know manifest
engines, nor how ranks agree.
"""

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch

from distckpt._checksum import crc32
from distckpt._threads import helper_threads
from distckpt.ptformat.image import ImagePlan, Part, crcs_of, plan_image, tail_of
from distckpt.ptformat.loadable import Refused, paths_of_refused
from distckpt.ptformat.manifest import Manifest, TensorEntry, to_json
from distckpt.ptformat.pickler import pickle_state
from distckpt.ptformat.torch_format import is_ordinary, what_loading_refuses, write_pt
from distckpt.ptformat.verify import check_whole
from distckpt.saving.optimizer_guard import OptimizerStepGuard
from distckpt.saving.staging import Copy, HostMemory, Staging, in_strides
from distckpt.storage.base import BLOCK_BYTES, NewFile, Storage
from distckpt.storage.direct_io import BufferedWriter

__all__ = ["WHOLE", "Checked", "ExchangeChecksums", "Snapshot", "WriteRange", "write_file"]

_T = TypeVar("_T")
_Parts = list[list[tuple[int, int, int]]]
Checked = Sequence[Sequence[int]]
"""What was checked of a share; see :class:`~distckpt.ptformat.image.Part`."""
ExchangeChecksums = Callable[[Checked, threading.Event], "Sequence[Checked] | None"]
"""Takes what was checked of a share, and returns that of the others, in the order of the image: None where it does not
hear of them before the event is set, or nobody here needs it. Any thread."""


class WriteRange(NamedTuple):
    """Which share of a file's image a rank stages and writes.

    Attributes:
        number: this writer's number.
        num_writers: how many there are.
        saving: the number of the saving rank's.
    """

    number: int
    num_writers: int
    saving: int


WHOLE = WriteRange(0, 1, 0)


class _Tail(NamedTuple):
    """What comes after an image.

    Attributes:
        shares: what was checked of all shares, of which it was made.
        crcs: the checksums of the image's records.
        data: the bytes.
    """

    shares: _Parts
    crcs: list[int]
    data: bytes


class Snapshot:
    """A state's image in host memory, or a share of it.

    Args:
        state: what ``torch.save`` takes.
        share: which share.
        replicated: of the storages that are equal on all ranks, torch's identities (``_cdata``).
        protocol: pickle's.
        num_threads: how many threads copy.
    """

    def __init__(
        self,
        state: Any,
        *,
        write_range: WriteRange = WHOLE,
        replicated: Collection[int] = (),
        protocol: int = 2,
        num_threads: int = 1,
    ) -> None:
        self._pickled = pickle_state(state, protocol=protocol)
        storages = self._pickled.storages
        shared = [number for number, one in enumerate(storages) if one._cdata in replicated]  # noqa: SLF001 - as above
        self._plan = plan_image([storage.nbytes() for storage in storages], shared)
        self._shared = frozenset(shared)
        self._write_range = write_range
        self._num_threads = num_threads
        self._rest = b""
        self._tail: _Tail | None = None
        self._part: Part | None = None
        self._staging: Staging | None = None
        self._late: Staging | None = None
        self._fence: OptimizerStepGuard | None = None

    @property
    def refused(self) -> Sequence[Refused]:
        """A few of the state's objects that loading will refuse; empty where it will refuse none."""
        return self._pickled.refused

    @property
    def num_bytes(self) -> int:
        """Length of the image: of the file, but for its tail."""
        return self._plan.end

    @property
    def devices(self) -> set[str]:
        """The types of the devices that the state lies on."""
        return {device.type for device in {storage.device for storage in self._pickled.storages}}

    def form(self) -> int:
        """Return a number that is the same on two ranks only if they may write one file in shares.

        It can differ where they might: all that is pickled is counted in.
        """
        told = (sorted(self._shared), self._plan.shared_end, self._plan.end, crc32(self._pickled.data))
        return crc32(repr(told).encode())

    def forms(self) -> list[str]:
        """Return what has to be the same on two ranks for them to write one file in shares, as phrases."""
        told = [
            f"{one.name}: {one.dtype} {list(one.shape)}, in data/{one.storage} from byte {one.begin_bytes}"
            for one in self._pickled.tensors()
            if one.storage in self._shared
        ]
        return [*told, f"{self._plan.shared_end} bytes of replicas, {self._plan.end} bytes in all"]

    def fingerprints(self) -> list[tuple[str, int]]:
        """Return a checksum of each storage that is to be equal on all ranks, with the name of a tensor in it."""
        names = {tensor.storage: tensor.name for tensor in reversed(list(self._pickled.tensors()))}
        storages = self._pickled.storages
        return [(names.get(number, f"data/{number}"), _crc_of(storages[number])) for number in sorted(self._shared)]

    def take(self, memory: HostMemory, *, whole: bool = False, late: Collection[int] = ()) -> None:
        """Make ready to stage into `memory`, which is in use until the image is written.

        Args:
            memory: reserved for this.
            whole: stage all of the image after all.
            late: identities of the storages that :meth:`stage` may copy after it has returned, behind a fence.

        Raises:
            MemoryError: there is not enough.
        """
        if whole:
            self._write_range = WHOLE
        begin, end = _cut(self._plan, self._write_range)
        storages = self._pickled.storages
        view = memory.view(end - begin, pinned="cuda" in self.devices)
        self._part = Part(self._plan, view, begin, end)
        copies = _copies(self._plan, begin, end)
        if late:
            is_late = [storage._cdata in late for storage in storages]  # noqa: SLF001 - torch's identity of a storage
            self._late = Staging(storages, tuple(one for one in copies if is_late[one.storage]), view, begin)
            copies = tuple(one for one in copies if not is_late[one.storage])
        self._staging = Staging(storages, copies, view, begin)

    def stage(self) -> None:
        """Copy the bytes, and return when training may go on: what is copied late has a fence around it."""
        if self._late is not None:
            late = self._late
            self._fence = OptimizerStepGuard(lambda: late.wait_for(None))
            late.begin(self._num_threads)
        _made(self._staging).run_on(self._num_threads)

    def settle(self) -> None:
        """Wait until nothing is copied any more: the memory is another's afterwards. Any thread."""
        try:
            if self._late is not None:
                self._late.settle()
        finally:
            if self._fence is not None:
                self._fence.take_down()

    def _wait_for(self, offset: int) -> None:
        _made(self._staging).wait_for(offset)
        if self._late is not None:
            self._late.wait_for(offset)

    def _known(self, begin: int, end: int) -> list[tuple[int, int]] | None:
        parts = _made(self._staging).checked(begin, end)
        return self._late.checked(begin, end) if parts is None and self._late is not None else parts

    def staging_beside(self) -> contextlib.AbstractContextManager[None]:
        """Copy the bytes on other threads while the body runs."""
        return _made(self._staging).beside(self._num_threads)

    def write_image(
        self, new: NewFile, manifest: Manifest | None = None, meet: ExchangeChecksums | None = None
    ) -> list[tuple[int, int, int]]:
        """Write the share's bytes into a file, each as soon as it is staged. Any thread.

        Args:
            new: the file.
            manifest: the manifest, but for its tensors: where all checksums are known, the tail is made meanwhile.
            meet: tells others of this share's, and returns theirs; where the share is not all of the image.

        Returns:
            What was checked; see :class:`~distckpt.ptformat.image.Part`.

        Raises:
            SaveError: the operating system refused.
        """
        part, is_over = _made(self._part), threading.Event()
        with contextlib.ExitStack() as stack:
            stack.enter_context(helper_threads(lambda: self._check(part, manifest, meet, is_over)))
            stack.callback(is_over.set)
            for at, chunk in part.chunks():
                num_whole = len(chunk) // BLOCK_BYTES * BLOCK_BYTES
                new.write(chunk[:num_whole], at)
                self._rest = bytes(chunk[num_whole:])  # of the image's last chunk alone: it goes with the tail
        self.settle()
        self._staging = self._late = None
        return part.checked

    def check_written(self, new: NewFile) -> None:
        """Compare the share with what the file holds, where the file system tells of a hole in it. Any thread.

        After :meth:`write_image` and a sync, and before the memory is another's.

        Raises:
            SaveError: the file does not hold what was written.
        """
        part = _made(self._part)
        end = part.end // BLOCK_BYTES * BLOCK_BYTES
        if new.has_hole(part.begin, end):
            for at, chunk in part.chunks():
                new.compare(chunk[: max(min(len(chunk), end - at), 0)], at)

    def _check(
        self, part: Part, manifest: Manifest | None, meet: ExchangeChecksums | None, is_over: threading.Event
    ) -> None:
        if not part.check(self._wait_for, self._known) or manifest is None:
            return
        with contextlib.suppress(Exception):  # made again, and raised, where it is written
            others: Sequence[Checked] | None = []
            if self._write_range.num_writers > 1:
                others = None if meet is None else meet(part.checked, is_over)
            if others is not None:
                self._tail = self._tail_of(_as_parts([*others, part.checked]), manifest)

    def _tail_of(self, shares: _Parts, manifest: Manifest) -> _Tail:
        """Return what comes after the image, of what was checked of all shares."""
        crcs = crcs_of(self._plan, shares)
        text = to_json(replace(manifest, tensors=self._entries(crcs)))
        return _Tail(shares, crcs, tail_of(self._plan, crcs, self._pickled.data, text))

    def write_tail(self, new: NewFile, checked: Sequence[Checked], manifest: Manifest) -> int:
        """Write what comes after the image, and what was left out of it. Any thread.

        Args:
            new: the file.
            checked: of all shares, in the order of the image.
            manifest: the manifest, but for its tensors.

        Returns:
            The file's length.

        Raises:
            SaveError: the operating system refused.
        """
        shares = _as_parts(checked)
        if self._tail is None or self._tail.shares != shares:
            self._tail = self._tail_of(shares, manifest)
        crcs, tail = self._tail.crcs, self._tail.data
        at = self._plan.end - len(self._rest)
        cuts = [end for _, end in self._plan.shares(self._write_range.num_writers, self._write_range.saving)]
        for offset, header in self._plan.cut_headers(cuts, crcs):
            new.write(header, offset)
            new.compare(header, offset)  # no hole would tell of a lost write: the block was written before
        new.write(self._rest + tail, at)
        return self._plan.end + len(tail)

    def _entries(self, crcs: Sequence[int]) -> tuple[TensorEntry, ...]:
        by_storage = {
            number: (slot.name, slot.offset, crc)
            for number, slot, crc in zip(self._plan.order, self._plan.slots, crcs, strict=True)
        }
        entries = []
        for name, dtype, shape, number, begin_bytes, num_bytes in self._pickled.tensors():
            record, offset, crc = by_storage[number]
            entries.append(TensorEntry(name, dtype, shape, record, offset + begin_bytes, num_bytes, crc))
        return tuple(entries)


def write_file(
    storage: Storage,
    name: str,
    state: Any,
    *,
    memory: HostMemory,
    manifest: Manifest,
    options: Mapping[str, Any],
    num_threads: int = 1,
    on_refused: Callable[[Sequence[Refused]], None] | None = None,
) -> None:
    """Write a state as a file, whole and durable, and return when it is. Rank-local; issues no collectives.

    Args:
        storage: where.
        name: the file's, there.
        state: what ``torch.save`` takes.
        memory: where to stage it; waited for where a save in the background uses it.
        manifest: the manifest, but for its tensors.
        options: keyword arguments of ``torch.save``.
        num_threads: how many threads copy.
        on_refused: called with what loading will refuse, if there is anything: before the file is there, but where
            torch's own writer writes it.

    Raises:
        ValueError: the name would leave the directory, or a symlink is in the way.
        SaveError: the operating system refused; what was there before is untouched.
        CommitNotDurable: the file is there, but may not survive a power cut.
    """
    if not is_ordinary(options):  # another pickler's, or the older format: torch's own writer knows them
        with storage.create(name) as new:
            writer = BufferedWriter(new.write)
            write_pt(state, writer, options)
            writer.flush()
            new.commit(writer.num_bytes)
        with storage.open(name) as file:
            names = what_loading_refuses(file)
        if names and on_refused is not None:
            on_refused(paths_of_refused(state, names))
        return
    snapshot = Snapshot(state, protocol=options.get("pickle_protocol", 2), num_threads=num_threads)
    if snapshot.refused and on_refused is not None:
        on_refused(snapshot.refused)
    with storage.create(name) as new:
        with memory.reserved():
            snapshot.take(memory)
            with snapshot.staging_beside():
                checked = snapshot.write_image(new, manifest)
        new.commit(snapshot.write_tail(new, [checked], manifest), check_whole)


def _made(one: _T | None) -> _T:
    if one is None:
        msg = "a snapshot that was not made ready, or was written already"
        raise AssertionError(msg)
    return one


def _as_parts(checked: Sequence[Checked]) -> _Parts:
    return [[(one[0], one[1], one[2]) for one in share] for share in checked]


@functools.lru_cache(maxsize=8)
def _cut(plan: ImagePlan, write_range: WriteRange) -> tuple[int, int]:
    return plan.shares(write_range.num_writers, write_range.saving)[write_range.number]


@functools.lru_cache(maxsize=8)
def _copies(plan: ImagePlan, begin: int, end: int) -> tuple[Copy, ...]:
    return in_strides(Copy(*piece) for piece in plan.pieces(begin, end))


def _crc_of(storage: torch.UntypedStorage) -> int:
    tensor = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).cpu()
    num_bytes = tensor.numel()
    if not num_bytes:
        return 0
    return crc32(memoryview((ctypes.c_char * num_bytes).from_address(tensor.data_ptr())).cast("B"))
