"""A snapshot of a state: its bytes in host memory as the image of the file, and the writing of that image.

A rank stages and writes the whole image, or one range of it (:class:`WriteRange`) if several ranks write the file. The
coordinator then writes the tail: the pickle, the manifest and the archive's directory, which need all checksums.
"""

import contextlib
import functools
import hashlib
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch

from distckpt._checksum import crc32
from distckpt._threads import helper_threads
from distckpt.ptformat.image import ShardBuffer, build_tail, combine_checksums, plan_image
from distckpt.ptformat.loadable import RefusedObject
from distckpt.ptformat.manifest import Manifest, TensorEntry, to_json
from distckpt.ptformat.pickler import PickledState
from distckpt.ptformat.storage_facts import IDENTITY, StorageFacts
from distckpt.saving.rank_plan import RankPlan, split_received
from distckpt.saving.shard_rows import gather_rows, plan_copies
from distckpt.saving.shards import Shards, checksum_of
from distckpt.saving.staging import Copies, HostMemory, OptimizerStepGuard, Staging
from distckpt.storage.base import BLOCK_BYTES, Chunk, NewFile

_T = TypeVar("_T")
_DIGEST_BYTES = 7
"""The ranks compare digests as numbers that fit into int64."""
_Records = list[tuple[int, int, int, int]]
Checksums = Sequence[Sequence[int]]
"""Checksums of what one rank writes: (record's index, offset in it, CRC-32, number of bytes) for each record's part."""
ExchangeChecksums = Callable[[Checksums, threading.Event], "Sequence[Checksums] | None"]
"""Publishes this rank's checksums, and returns those of the other ranks in the order of their ranges. It returns None
if they do not arrive before the event is set, or if this rank needs none. Called on a helper thread."""


class WriteRange(NamedTuple):
    """Which range of the image a rank stages and writes.

    Attributes:
        rank: this rank.
        writers: the ranks that write the file, in the order of their ranges; the coordinator is the last.
    """

    rank: int
    writers: tuple[int, ...]


WHOLE = WriteRange(0, (0,))


class _Tail(NamedTuple):
    """What follows the image, and the checksums of which it was made: of each range, and of each record."""

    checksums: list[_Records]
    crcs: list[int]
    data: bytes


class Snapshot:
    """The image of a state, or a range of it, in host memory.

    Args:
        pickled: the pickled state.
        shards: the state's sharded tensors; None if there are none.
        replicated: identities (``UntypedStorage._cdata``) of the storages that are equal on all ranks.
        num_threads: number of threads that copy.
    """

    def __init__(
        self,
        pickled: PickledState,
        *,
        shards: Shards | None = None,
        replicated: Collection[int] = (),
        num_threads: int = 1,
    ) -> None:
        self._shards = Shards(0, 1) if shards is None else shards
        self._pickled = pickled
        first = len(self._shards)
        self._facts = self._pickled.facts or StorageFacts.of(self._pickled.storages)
        identities = map(IDENTITY, self._pickled.storages if replicated else ())
        replicas = [number for number, identity in enumerate(identities, first) if identity in replicated]
        sizes = [*(shard.num_bytes for shard in self._shards.tensors), *self._facts.sizes]
        self._plan = plan_image(sizes if first else self._facts.sizes, replicas, first)
        self._replicas = frozenset(replicas)
        self._write_range = WHOLE
        self._num_threads = num_threads
        self._rest = b""
        self._tail: _Tail | None = None
        self._buffer: ShardBuffer | None = None
        self._staging: Staging | None = None
        self._deferred: Staging | None = None
        self._rank_plan = RankPlan()
        self._outgoing: dict[int, bytearray] = {}  # by rank, memory for what it writes of this rank's shards
        self._collect: Callable[[], dict[int, tuple[int, int]]] | None = None
        self._view = memoryview(b"")
        self._known: dict[int, tuple[int, int]] = {}  # CRC-32 and length of what was not staged, by offset
        self._guard: OptimizerStepGuard | None = None

    @property
    def refused(self) -> Sequence[RefusedObject]:
        """Some of the objects that loading will refuse; empty if it will refuse none."""
        return self._pickled.refused

    @property
    def num_bytes(self) -> int:
        """Length of the image, i.e. of the file without its tail."""
        return self._plan.end

    @property
    def devices(self) -> frozenset[str]:
        """Types of the devices that hold the state."""
        return self._facts.devices | self._shards.devices

    def layout_digest(self) -> int:
        """Return a digest of the image's layout. Ranks with equal digests can write one file together.

        Ranks with different digests may be able to as well: the digest covers the whole pickle. :meth:`describe_layout`
        decides.
        """
        parts = (sorted(self._replicas), self._plan.shared_end, self._plan.end, crc32(self._pickled.data))
        return crc32(repr(parts).encode())

    def describe_layout(self) -> list[str]:
        """Return phrases that must be equal on two ranks for these to write one file together."""
        return [
            *self._describe_replicas(),
            f"{self._plan.shared_end} bytes of replicas, {self._plan.end} bytes in all",
        ]

    def _describe_replicas(self) -> list[str]:
        if not self._replicas:
            return []
        return [
            f"{one.name}: {one.dtype} {list(one.shape)}, in data/{one.storage} from byte {one.begin_bytes}"
            for one in self._pickled.tensors()
            if one.storage in self._replicas
        ]

    def describe_shards(self) -> list[str]:
        """Return phrases that must be equal on all ranks for these to write their shards into one file."""
        return list(map(str, self._shards))

    def shards_digest(self) -> int:
        """Return a digest of :meth:`describe_shards`."""
        return _digest_of(self.describe_shards())

    def replicas_digest(self) -> int:
        """Return a digest of the replicas. Ranks with equal digests can write them into one file together."""
        return _digest_of(self._describe_replicas())

    def without_replicas(self) -> "Snapshot":
        """Return a snapshot of the same state in which no storage counts as a replica."""
        return Snapshot(self._pickled, shards=self._shards, num_threads=self._num_threads)

    def replica_checksums(self) -> list[tuple[str, int]]:
        """Return the checksum of each storage that should be equal on all ranks, with the name of a tensor in it."""
        names = {tensor.storage: tensor.name for tensor in reversed(list(self._pickled.tensors()))}
        storages, first = self._pickled.storages, len(self._shards)
        replicas = sorted(self._replicas)
        return [(names.get(number, f"data/{number}"), _crc_of(storages[number - first])) for number in replicas]

    def bind_buffer(
        self,
        memory: HostMemory,
        write_range: WriteRange,
        *,
        deferred: Collection[int] = (),
    ) -> None:
        """Prepare to stage into `memory`, which the caller has reserved until the image is written.

        With sharded tensors, :meth:`collect_rows` has to follow.

        Args:
            memory: the staging memory.
            write_range: the range to stage and write.
            deferred: identities of the storages that :meth:`copy_to_host` may copy after it has returned.
        """
        self._write_range = write_range
        shards, rows = self._shards, self._shards.rows()
        found = plan_copies(
            self._plan,
            shards.layouts,
            write_range.writers,
            write_range.rank,
            tuple(rows.offsets),
            shards.redistributed,
        )
        plan, copies = found.plan, found.own
        view = memory.view(plan.num_bytes, pinned="cuda" in self.devices)
        storages: list[torch.UntypedStorage] = [*rows.storages, *self._pickled.storages]
        self._rank_plan, self._view = plan, view
        if len(shards):
            self._outgoing = {other: bytearray(num_bytes) for other, num_bytes in found.num_outgoing.items()}
            self._collect = functools.partial(gather_rows, shards, rows, found, view, self._outgoing)
        self._buffer = ShardBuffer(self._plan, view, plan.segments, plan.late)
        if deferred:
            is_deferred = [storage._cdata in deferred for storage in storages]  # noqa: SLF001 - torch's identity
            self._deferred = Staging(storages, [one for one in copies if is_deferred[one.storage]], view, 0)
            copies = Copies(one for one in copies if not is_deferred[one.storage])
        addresses = None
        if rows.addresses is not None and self._facts.addresses is not None:
            addresses = rows.addresses + self._facts.addresses
        self._staging = Staging(storages, copies, view, 0, addresses=addresses)

    def collect_rows(self, num_ranks: int) -> list[bytearray]:
        """Return what each rank writes of this rank's shards. Collective where tensors are redistributed."""
        if self._collect is not None:
            self._known = self._collect()
            self._collect = None
        outgoing, self._outgoing = self._outgoing, {}
        return [outgoing.get(rank, bytearray()) for rank in range(num_ranks)]

    def num_incoming(self, num_ranks: int) -> list[int]:
        """Return how many bytes each rank sends to this one."""
        received = self._rank_plan.receives
        return [sum(one.num_bytes for one in received.get(rank, ())) for rank in range(num_ranks)]

    def place_received(self, parts: Sequence[memoryview]) -> None:
        """Copy what the ranks have sent into the buffer.

        Args:
            parts: from each rank.
        """
        for at, data in split_received(parts, self._rank_plan):
            self._view[at : at + len(data)] = data
            self._known[at] = crc32(data), len(data)

    def copy_to_host(self) -> None:
        """Copy the bytes; return when training may continue. Optimizers wait for the deferred copies."""
        if self._deferred is not None:
            deferred = self._deferred
            self._guard = OptimizerStepGuard(lambda: deferred.wait_until(None))
            deferred.start(self._num_threads)
        _required(self._staging).run_on(self._num_threads)

    def copying_to_host(self) -> contextlib.AbstractContextManager[None]:
        """Copy the bytes on other threads during the body of a ``with`` statement, which writes them."""
        return _required(self._staging).running(self._num_threads)

    def wait_copied(self) -> None:
        """Block until all copies have ended. The buffer may be reused after this returns. Callable from any thread."""
        try:
            if self._deferred is not None:
                self._deferred.join()
        finally:
            if self._guard is not None:
                self._guard.remove()

    def write_image(
        self, file: NewFile, manifest: Manifest | None = None, exchange: ExchangeChecksums | None = None
    ) -> _Records:
        """Write the range's bytes as soon as each is staged. Callable from any thread.

        Args:
            file: the new file.
            manifest: the manifest without tensors. If given, the tail is made while the image is written.
            exchange: exchanges checksums with the other writers; None if there are none.

        Returns:
            The range's checksums.
        """
        buffer, is_written = _required(self._buffer), threading.Event()
        with contextlib.ExitStack() as stack:
            stack.enter_context(helper_threads(lambda: self._checksum(buffer, manifest, exchange, is_written)))
            stack.callback(is_written.set)
            for chunks in buffer.chunks():
                *others, last = chunks
                blocks = _blocks_of(last)
                file.write([*others, blocks])
                self._rest = bytes(last.data[len(blocks.data) :])  # of the image's last chunk only; for the tail
        self.wait_copied()
        buffer.keep_late()
        self._staging = self._deferred = None
        self._view = memoryview(b"")
        return buffer.checked

    def verify_written(self, file: NewFile) -> None:
        """Compare the range with the file if the storage reports a hole in it. Callable from any thread.

        Call it after :meth:`write_image` and a sync, while the staging memory is still reserved. Raises SaveError.
        """
        buffer = _required(self._buffer)
        written = [(begin, end // BLOCK_BYTES * BLOCK_BYTES) for begin, end, _ in buffer.segments]
        has_hole = file.has_hole(written)
        for chunks in buffer.chunks():
            blocks = map(_blocks_of, chunks)
            # A block that was written in part is no hole.
            file.compare([one for one in blocks if has_hole or len(one.data) <= BLOCK_BYTES])

    def write_tail(self, file: NewFile, checksums: Sequence[Checksums], manifest: Manifest) -> int:
        """Write the tail, and the record headers that no range's writer could complete. Callable from any thread.

        Args:
            file: the new file.
            checksums: of all ranges, in the order of the image.
            manifest: the manifest without tensors.

        Returns:
            The file's length in bytes.
        """
        records = _as_records(checksums)
        if self._tail is None or self._tail.checksums != records:
            self._tail = self._make_tail(records, manifest)
        ends = [end for _, end in self._plan.write_ranges(len(self._write_range.writers))]
        late = _required(self._buffer).complete_late(self._tail.crcs)
        # As bytes they go through the page cache: the commit's sync writes these blocks all at once.
        chunks = [Chunk(offset, bytes(data)) for offset, data in late]
        chunks += self._plan.boundary_headers(ends, self._tail.crcs)
        file.write(chunks)
        file.compare(chunks)  # a lost write may leave no hole here: a header's block was written before
        file.write([Chunk(self._plan.end - len(self._rest), self._rest + self._tail.data)])
        return self._plan.end + len(self._tail.data)

    def _checksum(
        self,
        buffer: ShardBuffer,
        manifest: Manifest | None,
        exchange: ExchangeChecksums | None,
        is_written: threading.Event,
    ) -> None:
        """Checksum what is staged, for the writing thread; then make the tail if all checksums are known in time."""
        if not buffer.check(self._wait_until, self._checksums_of) or manifest is None:
            return
        with contextlib.suppress(Exception):  # write_tail makes the tail again, and raises
            others: Sequence[Checksums] | None = []
            if len(self._write_range.writers) > 1:
                others = None if exchange is None else exchange(buffer.checked, is_written)
            if others is not None:
                self._tail = self._make_tail(_as_records([*others, buffer.checked]), manifest)

    def _wait_until(self, offset: int) -> None:
        _required(self._staging).wait_until(offset)
        if self._deferred is not None:
            self._deferred.wait_until(offset)

    def _checksums_of(self, begin: int, end: int) -> list[tuple[int, int]] | None:
        """Return CRC-32 and length of each piece between two offsets in the memory; None if some are not known."""
        staged = [one for one in (self._staging, self._deferred) if one is not None]
        found: list[tuple[int, int]] = []
        while begin < end:
            piece = self._known.get(begin) or next(filter(None, (one.checksum_at(begin) for one in staged)), None)
            if piece is None:
                return None
            found.append(piece)
            begin += piece[1]
        return found if begin == end else None

    def _make_tail(self, checksums: list[_Records], manifest: Manifest) -> _Tail:
        crcs = combine_checksums(self._plan, checksums)
        by_storage = {
            index: (slot.name, slot.offset, crc)
            for index, slot, crc in zip(self._plan.storage_numbers, self._plan.records, crcs, strict=True)
        }
        entries = []
        for name, dtype, shape, index, begin_bytes, num_bytes in self._pickled.tensors():
            record, offset, crc = by_storage[index]
            entries.append(TensorEntry(name, dtype, shape, record, offset + begin_bytes, num_bytes, crc))
        data = build_tail(self._plan, crcs, self._pickled.data, to_json(replace(manifest, tensors=tuple(entries))))
        return _Tail(checksums, crcs, data)


def _digest_of(phrases: Sequence[str]) -> int:
    return int.from_bytes(hashlib.blake2b("\n".join(phrases).encode(), digest_size=_DIGEST_BYTES).digest(), "little")


def _required(one: _T | None) -> _T:
    if one is None:
        raise AssertionError("the snapshot has no buffer, or was written already")
    return one


def _blocks_of(chunk: Chunk) -> Chunk:
    return chunk._replace(data=chunk.data[: len(chunk.data) // BLOCK_BYTES * BLOCK_BYTES])


def _as_records(checksums: Sequence[Checksums]) -> list[_Records]:
    return [[(one[0], one[1], one[2], one[3]) for one in records] for records in checksums]


def _crc_of(storage: torch.UntypedStorage) -> int:
    return checksum_of(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage))
