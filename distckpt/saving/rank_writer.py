"""What one rank does of one save, step by step, so that ranks may agree in between.

Owns the life of a rank's part: its file, its place in the staging memory, the thread that writes it. Must not know how
ranks agree.

The steps of a part, of which the ranks hear of each other's in between:

1. :meth:`RankWriter.prepare`: plan the image, make the temporary file (saving rank), and, where the save goes on in the
   background, stage. Afterwards training may go on.
2. :meth:`RankWriter.write`: write the bytes, and sync them. Any thread.
3. :meth:`RankWriter.finish`: what comes after the image, and the commit (saving rank). Any thread.

:meth:`RankWriter.abandon` ends it between any two of them.
"""

import functools
import os
import secrets
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from distckpt._threads import PendingWrite
from distckpt.ptformat.loadable import Refused
from distckpt.ptformat.manifest import Manifest
from distckpt.ptformat.verify import check_whole
from distckpt.saving.snapshot import WHOLE, Checked, ExchangeChecksums, Snapshot, WriteRange
from distckpt.saving.staging import HostMemory
from distckpt.storage.base import NewFile, Storage

__all__ = ["Checked", "RankWriter", "Task"]

_T = TypeVar("_T")
_MOST_WRITERS = 64
"""A handler has one save under way; replicas may be threads of one process."""


class RankWriter:
    """One rank's part of one file. Rank-local; issues no collectives.

    Args:
        storage: where the file goes.
        name: the file's, there.
        manifest: the manifest, but for its tensors.
        memory: where to stage.
        share: what this rank writes; None for nothing.
        is_coordinator: whether this rank commits the file.
        in_background: whether :meth:`prepare` stages, for :meth:`write` to run beside training.
        protocol: pickle's.
        deferred_devices: types of the devices whose tensors may be copied after :meth:`prepare` has returned.
        num_threads: how many threads copy.
        check_replicas: whether :meth:`fingerprints` will be asked for.
        on_refused: called by :meth:`prepare`, where this rank commits the file, with what loading will refuse, if there
            is anything.
    """

    def __init__(
        self,
        storage: Storage,
        name: str,
        *,
        manifest: Manifest,
        memory: HostMemory,
        write_range: WriteRange | None,
        is_coordinator: bool,
        in_background: bool,
        protocol: int = 2,
        deferred_devices: Collection[str] = ("cuda",),
        num_threads: int = 1,
        check_replicas: bool = False,
        on_refused: Callable[[Sequence[Refused]], None] | None = None,
    ) -> None:
        self.name = name
        self.is_coordinator = is_coordinator
        self.in_background = in_background
        self._storage = storage
        self._manifest = manifest
        self._memory = memory
        self._write_range = write_range
        self._protocol = protocol
        self._deferred_devices = deferred_devices
        self._num_threads = num_threads
        self._check_replicas = check_replicas
        self._on_refused = on_refused
        self._late: Collection[int] = ()
        self._snapshot: Snapshot | None = None
        self._new: NewFile | None = None
        self._holds_memory = False

    @property
    def is_shared(self) -> bool:
        """Whether other ranks write into the same file."""
        return self._write_range is not None and self._write_range.num_writers > 1

    @property
    def writes(self) -> bool:
        """Whether this rank writes anything."""
        return self._write_range is not None

    def prepare(
        self,
        state: Any,
        *,
        replicas: Callable[[], Collection[int]],
        optimizer_storages: Callable[[], Mapping[int, str]],
    ) -> dict[str, Any]:
        """Step 1.

        Args:
            state: what ``torch.save`` takes.
            replicas: returns the identities of the storages that are equal on all ranks.
            optimizer_storages: returns those that only an optimizer's step changes, with their devices' types.

        Returns:
            What the other ranks should know: ``form``, which has to be equal on all that write (see
            :meth:`~distckpt.saving.snapshot.Snapshot.form`), and of the saving rank ``temp``, the name to find its
            file by, and ``token``, which no other save has.

        Raises:
            ValueError: the name would leave the directory, or a symlink is in the way.
            SaveError: the operating system refused.
            MemoryError: there is none to stage in.
        """
        answer: dict[str, Any] = {"form": None, "temp": None, "token": None}
        if self._write_range is None and not self._check_replicas:
            return answer
        write_range = self._write_range or WHOLE
        replicated = replicas() if self.is_shared or self._check_replicas else ()
        snapshot = self._snapshot = Snapshot(
            state,
            write_range=write_range,
            replicated=replicated,
            protocol=self._protocol,
            num_threads=self._num_threads,
        )
        if self._write_range is None:
            return answer
        if self.is_coordinator and snapshot.refused and self._on_refused is not None:
            self._on_refused(snapshot.refused)
        if self.in_background and not snapshot.devices.isdisjoint(self._deferred_devices):
            self._late = {identity for identity, kind in optimizer_storages().items() if kind in self._deferred_devices}
        answer["form"] = snapshot.form() if self.is_shared else None
        if self.is_coordinator:
            self._new = self._storage.create(self.name)
            answer |= {"temp": self._new.token, "token": secrets.token_hex(8)}
        self._take(whole=False)
        return answer

    def forms(self) -> list[str]:
        """Return what has to be equal for the file to be written in shares; nothing on a rank that does not write."""
        return [] if self._snapshot is None or self._write_range is None else self._snapshot.forms()

    def fingerprints(self) -> list[tuple[str, int]]:
        """Return the name and the checksum of each storage that is to be equal on all ranks."""
        return [] if self._snapshot is None else self._snapshot.fingerprints()

    def take_all(self) -> None:
        """Let the saving rank write everything after all, and the others nothing. After :meth:`prepare`.

        Raises:
            MemoryError: there is none to stage in.
        """
        self._write_range = WHOLE if self.is_coordinator else None
        if self.is_coordinator:
            self._take(whole=True)
        else:
            self._let_go_of_memory()

    def _take(self, *, whole: bool) -> None:
        snapshot = _made(self._snapshot)
        if not self._holds_memory:
            self._memory.reserve()
            self._holds_memory = True
        snapshot.settle()
        snapshot.take(self._memory, whole=whole, late=self._late)
        if self.in_background:
            snapshot.stage()

    def write(self, temp: str | None, meet: ExchangeChecksums | None = None) -> list[tuple[int, int, int]]:
        """Step 2.

        Args:
            temp: what :meth:`prepare` told on the saving rank.
            meet: tells others what was checked, and hears of them; see
            :meth:`~distckpt.saving.snapshot.Snapshot.write_image`.

        Returns:
            What was checked, for :meth:`finish` on the saving rank.

        Raises:
            SaveError: the operating system refused.
        """
        if self._write_range is None:
            return []
        snapshot = _made(self._snapshot)
        if self._new is None:
            if temp is None:
                msg = "a file to join that nobody has begun"
                raise AssertionError(msg)
            self._new = self._storage.join(self.name, temp)
        try:
            if self.is_shared and self.is_coordinator:
                self._new.allocate(snapshot.num_bytes)
            if self.in_background:
                checked = snapshot.write_image(self._new, self._manifest, meet)
            else:
                with snapshot.staging_beside():
                    checked = snapshot.write_image(self._new, self._manifest, meet)
            if self.is_shared:
                self._new.sync()
                snapshot.check_written(self._new)
        finally:
            self._let_go_of_memory()
        if not self.is_coordinator:
            self.abandon()
        return checked

    def finish(self, checked: Sequence[Checked]) -> None:
        """Step 3; on a rank that does not save nothing.

        Args:
            checked: of all writers, in the order of their shares.

        Raises:
            SaveError: the operating system refused; what was there before is untouched.
            CommitNotDurable: the file is there, but may not survive a power cut.
        """
        if not self.is_coordinator:
            return
        new = _made(self._new)
        new.commit(_made(self._snapshot).write_tail(new, checked, self._manifest), check_whole)
        self.abandon()

    def abandon(self) -> None:
        """Let go of everything; a file that was not committed is removed. Does nothing a second time."""
        self._let_go_of_memory()
        if self._new is not None:
            self._new.abort()
        self._snapshot = None

    def _let_go_of_memory(self) -> None:
        if self._holds_memory:
            self._holds_memory = False
            try:
                if self._snapshot is not None:
                    self._snapshot.settle()
            finally:
                self._memory.release()


@functools.cache
def _writers(process: int) -> ThreadPoolExecutor:
    """Return threads that wait for work: to start one keeps training until that has run for a while.

    A program that ends waits for what they are doing. A process that was forked has none of its parent's.
    """
    del process
    return ThreadPoolExecutor(_MOST_WRITERS, thread_name_prefix="distckpt-writer")


class Task:
    """Work on a thread of its own, beside training. It must issue no collectives.

    A program that ends waits for it.

    Args:
        work: what to do.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._value: Any = None
        self._error: BaseException | None = None
        self._after: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        # Not Thread.join: one that a signal interrupts takes the thread for ended (CPython 3.11, threading.py).
        self._ended = threading.Event()
        self._mark: PendingWrite | None = None

    def start(self) -> None:
        """Begin.

        Raises:
            RuntimeError: there can be no thread; it counts as ended.
        """
        self._mark = PendingWrite()
        try:
            _writers(os.getpid()).submit(self._run)
        except BaseException as error:
            self._end(error)
            raise

    def is_done(self, *, within_s: float = 0.0) -> bool:
        """Tell whether it has ended, well or not.

        Args:
            within_s: how long to wait for it, in seconds.
        """
        return self._ended.wait(timeout=within_s) if within_s else self._ended.is_set()

    def wait(self) -> None:
        """Wait until it has ended, well or not."""
        while not self._ended.wait(timeout=1.0):  # not for ever: a signal handler may want its turn
            pass

    def outcome(self) -> Any:
        """Wait, and return what the work returned.

        Raises:
            BaseException: what it raised.
        """
        self.wait()
        if self._error is not None:
            raise self._error
        return self._value

    def then(self, action: Callable[[], None]) -> None:
        """Do something when it has ended: now, or on its thread."""
        with self._lock:
            if not self._ended.is_set():
                self._after.append(action)
                return
        action()

    def _run(self) -> None:
        try:
            self._value = self._work()
        except BaseException as error:  # noqa: BLE001 - raised where the outcome is asked for
            self._end(error)
        else:
            self._end(None)

    def _end(self, error: BaseException | None) -> None:
        self._error = error
        with self._lock:
            self._ended.set()
        try:
            for action in self._after:
                action()
        finally:
            if self._mark is not None:
                self._mark.end()


def _made(one: _T | None) -> _T:
    if one is None:
        msg = "a part of a save that was not prepared"
        raise AssertionError(msg)
    return one
