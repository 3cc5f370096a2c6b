"""A save between the return of ``start_save`` and the commit: steps 5 to 8 of :mod:`distckpt.saving.protocol`.

Threads of a pending save issue no collectives. The ranks exchange their results in :meth:`PendingSave.advance`, which
is collective. If several ranks write one file, the job's key-value store (:class:`WriteCompletions`) can tell the
coordinator earlier, so that it commits while all ranks train.
"""

import contextlib
import functools
import json
import logging
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from distckpt.backends.base import Backend, KeyValueStore, default_timeout_s
from distckpt.coordination import phases
from distckpt.errors import CollectiveError, SaveError
from distckpt.saving.rank_writer import RankWriter, run_in_background
from distckpt.saving.snapshot import Checksums

_logger = logging.getLogger(__name__)

WRITE_TIMEOUT_S = 1800.0
"""Seconds to wait for a rank that writes: a disk may be slow, and the checkpoint large."""

_POLL_LOST_RANK_S = 0.2

SyncPointFactory = Callable[[str], phases.SyncPoint]
"""Makes the sync point of a phase from the phase's description."""

Problems = dict[str, list[Any]]
"""For each file that was not removed: whether it is gone all the same, and a message."""


class PendingSave:
    """A save that may still be writing; :func:`distckpt.async_save` returns it.

    :meth:`wait` and :meth:`result` are collective: call them on all ranks. A process that ends earlier waits for its
    own part of the save, and warns if the file was not saved.

    Attributes:
        path: path of the file; None in a save by a handler.
        filename: name of the file.
        coordinator: rank that commits the file.
        layout_difference: why several ranks cannot write the file together; None if they can.
        problems: the files that could not be removed, by rank; empty before the end.
        own_problems: the files that this rank could not remove.
        has_committed: whether this rank has committed the file, whatever happened on other ranks.
        committed_at_s: time of the commit on the monotonic clock, in seconds; None before, and on other ranks.
        duration_s: seconds from the start to the end; 0.0 before.

    Example:
        >>> import tempfile, torch
        >>> from distckpt import async_save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pending = async_save({"model": torch.nn.Linear(2, 1)}, f"{folder}/model.pt")
        ...     # ... train on ...
        ...     pending.result(timeout_s=60.0).name, pending.done()
        ('model.pt', True)
    """

    def __init__(
        self,
        backend: Backend,
        sync_point: SyncPointFactory,
        writer: RankWriter,
        *,
        coordinator: int,
        writers: Sequence[int],
        file_token: str | None,
        save_id: str | None,
        layout_difference: str | None,
        remove_replaced: Callable[[], Problems] | None,
        annotate: Callable[[SaveError], SaveError],
        timeout_s: float | None,
        path: Path | None = None,
        reports_errors: bool = False,
    ) -> None:
        self.backend = backend
        self.path = path
        self.filename = writer.name
        self.coordinator = coordinator
        self.layout_difference = layout_difference
        self.problems: list[Mapping[str, Sequence[Any]]] = []
        self.own_problems: Problems = {}
        self.has_committed = False
        self.committed_at_s: float | None = None
        self.duration_s = 0.0
        self._sync_point = sync_point
        self._writer = writer
        self._writers = tuple(writers)
        self._file_token = file_token
        self._remove_replaced = remove_replaced
        self._annotate = annotate
        self._timeout_s = max(default_timeout_s() if timeout_s is None else timeout_s, WRITE_TIMEOUT_S)
        self._begin_s = time.monotonic()
        self._future: Future[dict[str, Any]] | None = None
        self._checksums: list[Checksums] = []
        self._writes_alone = self._is_committing = len(self._writers) == 1
        self._has_ended = False
        self._error: BaseException | None = None
        self._at_exit = Finalize(None, self._report_at_exit, exitpriority=0) if reports_errors else None
        self._completions: WriteCompletions | None = None
        if writer.in_background and not self._is_committing and save_id is not None:
            with contextlib.suppress(CollectiveError):  # then advance() does without
                store = backend.key_value_store(timeout_s=timeout_s)
                if store is not None:
                    self._completions = WriteCompletions(store, sync_point("").handler, save_id)
        self._start(self._write, has_work=writer.writes)

    @property
    def writes(self) -> bool:
        """Whether this rank writes anything of the file."""
        return self.backend.rank in self._writers

    @property
    def is_pending(self) -> bool:
        """Whether this rank is at work. Rank-local; does not block."""
        return self._future is not None and not self._future.done()

    def done(self) -> bool:
        """Return True if this rank has nothing left to do. Rank-local; does not block.

        On the coordinator, True means that the file is committed, or that the save failed; on other ranks, that their
        bytes are written. Ranks may be done at different times, so the result must not decide whether to call
        :meth:`wait`.
        """
        if self._has_ended:
            return True
        is_waiting_for_ranks = self._writer.is_coordinator and not self.has_committed and self._failure() is None
        return not self.is_pending and not is_waiting_for_ranks

    def wait(self, timeout_s: float | None = None) -> None:
        """Collective. Block until the file is committed.

        1. (all ranks) block until this rank's work has ended.
        2. (all ranks) exchange results. An error on one rank ends the save on all.
        3. (coordinator) commit, unless its thread has committed after it learned of the other writers from the store.
        4. (all ranks) exchange the result of the commit.

        A later call returns at once, or raises the same error.

        Args:
            timeout_s: seconds to wait; None for as long as a slow disk may take (half an hour).

        Raises:
            TimeoutError: the save has not ended; on every rank. It continues, and :meth:`wait` may be called again.
            RemoteRankError: the save failed on some rank; on every rank, with the type of the error there.
            SaveError: with one rank, the file could not be written. A file that `path` named before is unchanged.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._has_ended:
            if deadline is not None:
                self._wait_for_ranks(deadline)
            self.advance()
        if self._error is not None:
            raise self._error

    def result(self, timeout_s: float | None = None) -> Path:
        """Collective. Block until the file is committed, and return its path; see :meth:`wait`."""
        self.wait(timeout_s)
        return Path(self.filename) if self.path is None else self.path

    def meet(self, timeout_s: float | None) -> None:
        """Collective. Wait until all ranks call this method, but not until their work has ended.

        Args:
            timeout_s: seconds to wait for them; None for the default.

        Raises:
            CollectiveError: a rank did not call it in time. The save cannot end.
        """
        self._run_phase("coming to wait for", lambda: None, timeout_s)

    def advance(self, *, timeout_s: float | None = None) -> bool:
        """Collective. Wait for the current step on all ranks, and start the next one.

        Args:
            timeout_s: seconds to wait for the other ranks; None for half an hour.

        Returns:
            Whether the save has ended.

        Raises:
            RemoteRankError: the save failed on some rank; on every rank. With one rank: that rank's error.
            CommitNotDurable: the file has its name, but may not survive a power cut.
        """
        step = "saving" if self._writes_alone else "committing" if self._is_committing else "writing"
        answers = self._run_phase(step, self._outcome, timeout_s or self._timeout_s)
        if self._is_committing or answers[self.coordinator]["is_finished"]:
            self.problems = [answer["problems"] for answer in answers]
            self.duration_s = time.monotonic() - self._begin_s
            self._end(None)
            return True
        self._checksums = [answers[rank]["checksums"] for rank in self._writers]
        self._is_committing = True
        self._start(self._commit, has_work=self._writer.is_coordinator)
        return False

    def _run_phase(self, step: str, work: Callable[[], Any], timeout_s: float | None) -> list[Any]:
        """Collective. Run `work` on all ranks; an error ends the save."""
        point = self._sync_point(f"{step} {self.filename}")
        try:
            return phases.run(self.backend, point, work, timeout_s=timeout_s)
        except BaseException as error:
            self.give_up()
            self._end(error)
            raise

    def join(self) -> None:
        """Rank-local. Block until this rank's current step has ended; its error is kept."""
        if self._future is not None:
            wait_for_futures([self._future])

    def wait_local(self) -> None:
        """Rank-local. Block until this rank's current step has ended, without waiting for other writers."""
        if self._completions is not None:
            self._completions.cancel()
        self.join()

    def give_up(self) -> None:
        """Rank-local. Delete what is not committed, once this rank's step has ended. Does not block."""
        if self._completions is not None:
            self._completions.cancel()
        if self._future is not None:
            self._future.add_done_callback(lambda _: self._writer.abort())
        else:
            self._writer.abort()

    def _report_at_exit(self) -> None:
        self.join()
        failure: object = self._failure()
        if failure is None and not self.done():
            failure = "the process ended before wait() was called on all ranks"
        if failure is not None:
            self._writer.abort()
            text = f"rank {self.backend.rank}: {self._where()} was not saved: {failure}"
            warnings.warn(text, RuntimeWarning, stacklevel=1)

    def _where(self) -> str:
        return self.filename if self.path is None else str(self.path)

    def _failure(self) -> BaseException | None:
        is_done = self._future is not None and self._future.done()
        return self._error or (self._future.exception() if self._future is not None and is_done else None)

    def _is_done(self, *, within_s: float) -> bool:
        return self._future is None or not wait_for_futures([self._future], timeout=within_s).not_done

    def _end(self, error: BaseException | None) -> None:
        self._has_ended, self._error = True, error
        if self._at_exit is not None:
            self._at_exit.cancel()

    def _wait_for_ranks(self, deadline: float) -> None:
        """Collective. Wait until every rank's step has ended; raise TimeoutError on all ranks if one has not."""

        def is_done() -> bool:
            return self._is_done(within_s=max(deadline - time.monotonic(), 0.0))

        point = self._sync_point(f"waiting for {self.filename}")
        answers = phases.run(self.backend, point, is_done, timeout_s=self._timeout_s)
        missing = [str(rank) for rank, answer in enumerate(answers) if not answer]
        if missing:
            msg = f"{self._where()} is not saved yet: rank {', '.join(missing)} is still writing. The save continues"
            raise TimeoutError(msg)

    def _start(self, work: Callable[[], dict[str, Any]], *, has_work: bool) -> None:
        """Start a step: on a thread in a background save, otherwise in the next call of :meth:`advance`."""
        self._work, self._future = work, None
        if self._writer.in_background and has_work:
            try:
                self._future = run_in_background(self._run if self._at_exit is not None else work)
            except Exception as error:  # noqa: BLE001 - no thread can be started: the other ranks learn of it in advance()
                self._future = Future()
                self._future.set_exception(error)
                if self._completions is not None:
                    self._completions.publish(self.backend.rank, None)

    def _run(self) -> dict[str, Any]:
        """Run a step, and log its error: the caller may never wait for the save."""
        try:
            answer = self._work()
        except BaseException as error:
            _logger.error("rank %d: %s was not saved: %s", self.backend.rank, self._where(), error)  # noqa: TRY400 - result() raises it
            raise
        if self._at_exit is not None and (self.has_committed or not self._writer.is_coordinator):
            self._at_exit.cancel()
        return answer

    def _outcome(self) -> dict[str, Any]:
        try:
            self._raise_if_rank_lost()
            answer = self._work() if self._future is None else self._future.result()
        except SaveError as error:
            raise self._annotate(error) from error
        return answer

    def _raise_if_rank_lost(self) -> None:
        """Wait for this rank's step; raise the failure if a rank is lost before this step has ended."""
        while self._completions is not None and not self._is_done(within_s=_POLL_LOST_RANK_S):
            failure = None if self.backend.monitor is None else self.backend.monitor.failure()
            if failure is not None:
                self._completions.cancel()
                raise failure

    def _write(self) -> dict[str, Any]:
        """Write this rank's range. The coordinator goes on to the commit if all other ranks complete in time."""
        others = [rank for rank in self._writers if rank != self.coordinator]
        completions, rank, is_other = self._completions, self.backend.rank, self.backend.rank in others
        exchange = None if completions is None else functools.partial(self._exchange_checksums, completions, others)
        checksums: Checksums | None = None
        try:
            checksums = self._writer.write(self._file_token, exchange)
        finally:
            if completions is not None and is_other:
                completions.publish(rank, checksums)  # None after an error
        if completions is not None and self._writer.is_coordinator:
            found = completions.collect(others)
            if found is not None:
                self._checksums = [*found, checksums]
                return self._commit()
        if not self._is_committing:
            return {"checksums": checksums, "is_finished": False, "problems": {}}
        self._checksums = [checksums]
        return self._commit()

    def _exchange_checksums(
        self, completions: "WriteCompletions", others: Sequence[int], checksums: Checksums, is_written: threading.Event
    ) -> list[Checksums] | None:
        if self._writer.is_coordinator:
            return completions.collect_checksums(others, is_written)
        completions.publish_checksums(self.backend.rank, checksums)
        return None

    def _commit(self) -> dict[str, Any]:
        self._writer.finish(self._checksums)
        self.has_committed = self._writer.is_coordinator
        if self.has_committed:
            self.committed_at_s = time.monotonic()
            if self._remove_replaced is not None:
                self.own_problems = self._remove_replaced()
        return {"checksums": [], "is_finished": True, "problems": self.own_problems}


class WriteCompletions:
    """Entries in the job's key-value store by which the writers of one file report to the coordinator.

    A writer first publishes its checksums, so that the coordinator can make the file's tail during the write. It then
    publishes that its bytes are durable. This only saves time: if the store fails, the ranks exchange the same in a
    collective. All methods may be called from any thread.

    Args:
        store: the job's key-value store.
        handler: name of the saving handler, the same on all ranks.
        save_id: id of the save, unique and the same on all ranks. Entries of other saves are ignored.
    """

    _STORE_TIMEOUT_S = 10.0
    _POLL_S = 0.005
    _POLL_CHECKSUMS_S = 0.02
    _MAX_WAIT_S = 60.0

    def __init__(self, store: KeyValueStore, handler: str, save_id: str) -> None:
        self._store = store
        self._handler = handler
        self._save_id = save_id
        self._is_cancelled = threading.Event()

    def publish(self, rank: int, checksums: Checksums | None) -> None:
        """Publish the checksums of a rank's durable bytes; None if its write failed."""
        self._set(self._key(rank, "receipt"), checksums)

    def publish_checksums(self, rank: int, checksums: Checksums) -> None:
        """Publish the checksums of bytes that a rank has yet to write."""
        self._set(self._key(rank, "checked"), checksums)

    def collect(self, ranks: Sequence[int]) -> list[Checksums] | None:
        """Block until all `ranks` have published; return None if one failed, or did not publish within a minute."""
        deadline = time.monotonic() + self._MAX_WAIT_S
        keys = [self._key(rank, "receipt") for rank in ranks]
        return self._get(keys, lambda: time.monotonic() >= deadline, poll_s=self._POLL_S)

    def collect_checksums(self, ranks: Sequence[int], is_written: threading.Event) -> list[Checksums] | None:
        """Block until all `ranks` have published checksums; return None once the event is set."""
        keys = [self._key(rank, "checked") for rank in ranks]
        return self._get(keys, lambda: is_written.wait(timeout=self._POLL_CHECKSUMS_S), poll_s=0.0)

    def cancel(self) -> None:
        """Let every method return at once."""
        self._is_cancelled.set()

    def _set(self, key: str, checksums: Checksums | None) -> None:
        try:
            self._store.set(key, json.dumps([self._save_id, checksums]), limit_s=self._STORE_TIMEOUT_S)
        except (OSError, TimeoutError):
            self.cancel()

    def _get(self, keys: Sequence[str], has_expired: Callable[[], bool], *, poll_s: float) -> list[Checksums] | None:
        while not has_expired() and not self._is_cancelled.is_set():
            try:
                entries = self._store.get_many(keys, limit_s=self._STORE_TIMEOUT_S)
            except (OSError, TimeoutError):
                self.cancel()
                return None
            read = [json.loads(entry) for entry in entries if entry is not None]
            found: list[Checksums | None] = [checksums for save_id, checksums in read if save_id == self._save_id]
            if None in found:
                return None
            if len(found) == len(keys):
                return [checksums for checksums in found if checksums is not None]
            self._is_cancelled.wait(timeout=poll_s)
        return None

    def _key(self, rank: int, what: str) -> str:
        return f"distckpt/{what}/{self._handler}/{rank}"
