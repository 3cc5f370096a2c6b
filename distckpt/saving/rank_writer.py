"""One rank's work for one file, in steps between which the ranks can agree.

1. :meth:`RankWriter.prepare`: plan the image, create the file (coordinator), and in a background save copy the state
   to host memory. Training may continue afterwards.
2. :meth:`RankWriter.write`: write and sync this rank's range. Callable from any thread.
3. :meth:`RankWriter.finish`: write the tail and commit the file (coordinator). Callable from any thread.

:meth:`RankWriter.abort` ends the work between any two steps. Nothing here issues collectives.
"""

import contextlib
import functools
import os
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from distckpt._threads import PendingWrite
from distckpt.ptformat.loadable import RefusedObject, locate_refused
from distckpt.ptformat.manifest import Manifest
from distckpt.ptformat.reader import find_refused_names
from distckpt.ptformat.torch_format import uses_default_format, write_pt
from distckpt.ptformat.verify import check_whole
from distckpt.saving.captured_state import CapturedState
from distckpt.saving.shards import Shards
from distckpt.saving.snapshot import WHOLE, Checksums, ExchangeChecksums, Snapshot, WriteRange
from distckpt.saving.staging import HostMemory
from distckpt.storage.base import NewFile, Storage
from distckpt.storage.direct_io import BufferedWriter

_T = TypeVar("_T")
_MAX_WRITING = 64
"""More threads than saves can be pending; replicas that are threads of one process share them."""


class RankWriter:
    """Stages and writes one rank's range of one file.

    Args:
        storage: where the file goes.
        name: the file's name in the storage.
        manifest: the manifest without tensors.
        memory: the staging memory.
        write_range: the range to write; None if this rank writes nothing.
        is_coordinator: whether this rank creates and commits the file.
        in_background: whether :meth:`prepare` copies to host memory, so that :meth:`write` can run beside training.
        pickle_protocol: version of the pickle format.
        deferred_devices: types of the devices whose optimizer storages may be copied after :meth:`prepare` returned.
        num_threads: number of threads that copy.
        check_replicas: whether :meth:`replica_checksums` will be called.
        on_refused: called by the coordinator's :meth:`prepare` with the objects that loading will refuse, if any.
    """

    def __init__(
        self,
        storage: Storage,
        name: str,
        *,
        manifest: Manifest,
        memory: HostMemory,
        write_range: WriteRange | None = WHOLE,
        is_coordinator: bool = True,
        in_background: bool = False,
        pickle_protocol: int = 2,
        deferred_devices: Collection[str] = ("cuda",),
        num_threads: int = 1,
        check_replicas: bool = False,
        on_refused: Callable[[Sequence[RefusedObject]], None] | None = None,
    ) -> None:
        self.name = name
        self.is_coordinator = is_coordinator
        self.in_background = in_background
        self._storage = storage
        self._manifest = manifest
        self._memory = memory
        self._write_range = write_range
        self._pickle_protocol = pickle_protocol
        self._deferred_devices = deferred_devices
        self._num_threads = num_threads
        self._check_replicas = check_replicas
        self._on_refused = on_refused
        self._deferred: Collection[int] = ()
        self._snapshot: Snapshot | None = None
        self._file: NewFile | None = None
        self._has_memory = False
        self._staging_error: BaseException | None = None

    @property
    def is_shared(self) -> bool:
        """Whether other ranks write the same file."""
        return self._write_range is not None and len(self._write_range.writers) > 1

    @property
    def writes(self) -> bool:
        """Whether this rank writes anything."""
        return self._write_range is not None

    def prepare(
        self,
        state: Any,
        *,
        shards: Shards | None = None,
        replicas: Callable[[], Collection[int]] = frozenset,
        optimizer_storages: Callable[[], Mapping[int, str]] = dict,
    ) -> dict[str, Any]:
        """Run step 1. With sharded tensors, :meth:`bind_shards` and the methods after it have to follow.

        Args:
            state: what :class:`CapturedState` takes.
            shards: takes its sharded tensors; None if there are none.
            replicas: returns the identities of the storages that are equal on all ranks.
            optimizer_storages: returns the identities of the storages that only an optimizer's step changes, and the
                types of their devices.

        Returns:
            What other ranks need: ``shards`` and ``replicas``, the digests of the sharded tensors and of the replicas
            beside them, and ``homes``, the rank of each tensor that is on one rank. If several ranks write the file,
            also ``layout``, the image's digest, and on the coordinator ``file_token``, by which they join the file, and
            ``save_id``, which is unique.

        Raises:
            ValueError: the name points outside the storage.
            SaveError: the storage failed.
            MemoryError: there is not enough host memory.
            ShardedStateError: the state is sharded in a way that cannot be saved.
        """
        answer: dict[str, Any] = {"layout": None, "shards": None, "homes": [], "file_token": None, "save_id": None}
        captured = CapturedState(state, shards=shards, memory=self._memory, protocol=self._pickle_protocol)
        has_shards = shards is not None and len(shards) > 0
        if self._write_range is None and not self._check_replicas and not has_shards:
            return answer
        snapshot = self._snapshot = Snapshot(
            captured.pickle(),
            shards=shards,
            replicated=replicas() if self.is_shared or self._check_replicas else (),
            num_threads=self._num_threads,
        )
        if has_shards:
            homes = shards.homes if shards is not None else []
            answer |= {"shards": snapshot.shards_digest(), "replicas": snapshot.replicas_digest(), "homes": homes}
        elif self._write_range is None:
            return answer
        if self.is_coordinator and snapshot.refused and self._on_refused is not None:
            self._on_refused(snapshot.refused)
        if self.in_background and not snapshot.devices.isdisjoint(self._deferred_devices):
            found = optimizer_storages()
            self._deferred = {identity for identity, device in found.items() if device in self._deferred_devices}
        answer["layout"] = snapshot.layout_digest() if self.is_shared and not has_shards else None
        if self.is_coordinator:
            self._file = self._storage.create(self.name)
            if self.is_shared or has_shards:  # else the answers of all ranks are equal
                answer |= {"file_token": self._file.token, "save_id": secrets.token_hex(8)}
        if (self.in_background or self.is_shared) and not has_shards:
            self._stage(snapshot)
        return answer

    def describe_shards(self) -> list[str]:
        """Return phrases that must be equal on all ranks for these to write their shards."""
        return [] if self._snapshot is None else self._snapshot.describe_shards()

    def drop_replicas(self) -> None:
        """Let the coordinator write the replicas beside sharded tensors alone."""
        if self._snapshot is not None:
            self._snapshot = self._snapshot.without_replicas()

    def bind_shards(self, write_range: WriteRange | None) -> None:
        """Find this rank's rows of the sharded tensors, and memory for what it writes.

        Args:
            write_range: this rank's place among all writers; None if it writes nothing.
        """
        self._write_range = write_range
        if write_range is not None and self._snapshot is not None:
            self._bind(self._snapshot)

    def gather_shards(self, num_ranks: int) -> tuple[list[bytearray], list[int]]:
        """Return what each rank writes of this rank's rows, and how many bytes each rank sends to this one.

        Collective where tensors are redistributed.

        Args:
            num_ranks: number of ranks.
        """
        if self._write_range is None or self._snapshot is None:
            return [bytearray() for _ in range(num_ranks)], [0] * num_ranks
        return self._snapshot.collect_rows(num_ranks), self._snapshot.num_incoming(num_ranks)

    def stage_shards(self, received: Sequence[memoryview]) -> None:
        """Take what the ranks have sent; in a background save copy the rest to host memory.

        Never raises: :meth:`write` raises the error, since other ranks learn of it only there.
        """
        try:
            if self._write_range is not None and self._snapshot is not None:
                self._snapshot.place_received(received)
                if self.in_background:
                    self._snapshot.copy_to_host()
        except BaseException as error:  # noqa: BLE001 - an interrupt too: the other ranks go on
            self._staging_error = error

    def describe_layout(self) -> list[str]:
        """Return phrases that must be equal on all writers; none if this rank writes nothing."""
        return [] if self._snapshot is None or self._write_range is None else self._snapshot.describe_layout()

    def replica_checksums(self) -> list[tuple[str, int]]:
        """Return name and checksum of each storage that should be equal on all ranks."""
        return [] if self._snapshot is None else self._snapshot.replica_checksums()

    def write_alone(self) -> None:
        """Let the coordinator write the whole file, and the other ranks nothing. Call it after :meth:`prepare`."""
        self._write_range = WHOLE if self.is_coordinator else None
        if self.is_coordinator and self._snapshot is not None:
            self._stage(self._snapshot)
        else:
            self._release_memory()

    def _stage(self, snapshot: Snapshot) -> None:
        self._bind(snapshot)
        if self.in_background:
            snapshot.copy_to_host()

    def _bind(self, snapshot: Snapshot) -> None:
        if not self._has_memory:
            self._memory.reserve()
            self._has_memory = True
        snapshot.wait_copied()
        snapshot.bind_buffer(self._memory, self._write_range or WHOLE, deferred=self._deferred)

    def write(
        self, file_token: str | None = None, exchange: ExchangeChecksums | None = None
    ) -> list[tuple[int, int, int, int]]:
        """Run step 2.

        Args:
            file_token: what the coordinator's :meth:`prepare` returned.
            exchange: see :meth:`~distckpt.saving.snapshot.Snapshot.write_image`.

        Returns:
            The range's checksums, for the coordinator's :meth:`finish`.
        """
        if self._staging_error is not None:
            raise self._staging_error
        if self._write_range is None or self._snapshot is None:
            return []
        snapshot = self._snapshot
        if self._file is None:
            self._file = self._storage.join(self.name, file_token or "")
        if not self._has_memory:
            self._stage(snapshot)
        try:
            if self.is_shared and self.is_coordinator:
                self._file.allocate(snapshot.num_bytes)  # else the writers extend the file in turns
            with contextlib.nullcontext() if self.in_background else snapshot.copying_to_host():
                checksums = snapshot.write_image(self._file, self._manifest, exchange)
            if self.is_shared:
                self._file.sync()
                snapshot.verify_written(self._file)
        finally:
            self._release_memory()
        if not self.is_coordinator:
            self.abort()
        return checksums

    def finish(self, checksums: Sequence[Checksums]) -> None:
        """Run step 3, with the checksums of all writers in the order of their ranges. Other ranks do nothing.

        Raises:
            SaveError: the storage failed; the previous file of that name is unchanged.
            CommitNotDurable: the file has its name, but may not survive a power cut.
        """
        if self.is_coordinator and self._file is not None and self._snapshot is not None:
            num_bytes = self._snapshot.write_tail(self._file, checksums, self._manifest)
            self._file.commit(num_bytes, check_whole)
            self.abort()

    def abort(self) -> None:
        """Release memory and file; delete the file unless it is committed. Callable more than once."""
        self._release_memory()
        if self._file is not None:
            self._file.abort()
        self._snapshot = None

    def _release_memory(self) -> None:
        if self._has_memory:
            self._has_memory = False
            try:
                if self._snapshot is not None:
                    self._snapshot.wait_copied()
            finally:
                self._memory.release()


def write_file(
    storage: Storage,
    name: str,
    state: Any,
    *,
    memory: HostMemory,
    manifest: Manifest,
    options: Mapping[str, Any],
    num_threads: int = 1,
    on_refused: Callable[[Sequence[RefusedObject]], None] | None = None,
) -> None:
    """Write a state as a file, and return when it is durable. Rank-local; issues no collectives.

    Args:
        storage: where the file goes.
        name: the file's name in the storage.
        state: what ``torch.save`` takes.
        memory: the staging memory.
        manifest: the manifest without tensors.
        options: keyword arguments of ``torch.save``. torch's own writer is used if they choose another format.
        num_threads: number of threads that copy.
        on_refused: called with the objects that loading will refuse, if any.

    Raises:
        ValueError: the name points outside the storage.
        SaveError: the storage failed; the previous file of that name is unchanged.
        CommitNotDurable: the file has its name, but may not survive a power cut.
    """
    if uses_default_format(options):
        writer = RankWriter(
            storage,
            name,
            manifest=manifest,
            memory=memory,
            pickle_protocol=options.get("pickle_protocol", 2),
            num_threads=num_threads,
            on_refused=on_refused,
        )
        try:
            writer.prepare(state)
            writer.finish([writer.write()])
        finally:
            writer.abort()
        return
    with storage.create(name) as file:
        buffer = BufferedWriter(file.write)
        write_pt(state, buffer, options)
        buffer.flush()
        file.commit(buffer.num_bytes)
    with storage.open(name) as written:
        names = find_refused_names(written)
    if names and on_refused is not None:
        on_refused(locate_refused(state, names))


@functools.cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Return the process's writing threads, kept since starting one delays training.

    An exiting program waits for their work. The key makes a forked process start its own.
    """
    del process
    return ThreadPoolExecutor(_MAX_WRITING, thread_name_prefix="distckpt-writer")


def run_in_background(work: Callable[[], _T]) -> "Future[_T]":
    """Call `work` on another thread. It must not issue collectives. An exiting program waits for it."""
    mark = PendingWrite()

    def run() -> _T:
        try:
            return work()
        finally:
            mark.end()

    try:
        return _threads(os.getpid()).submit(run)
    except BaseException:
        mark.end()
        raise
