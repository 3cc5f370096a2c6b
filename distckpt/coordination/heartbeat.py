"""Heartbeats: how each rank finds out, outside the collectives, that another has died, frozen, left or raised.

Each rank has a monitor. Its thread writes heartbeats to the job's key-value store and reads those of the other ranks.
It issues no collectives. The first failure that a rank writes to the store holds for the whole job.

The protocol:

1. (all ranks) every `interval_s`, while an engine runs: write a heartbeat with a growing number, the iteration and the
   state. At the end of a run write the state "idle", and no more heartbeats.
2. (all ranks) read all heartbeats. A running rank whose heartbeat has not changed for `limit_s` is frozen. Elapsed time
   counts only between two readings, so that a rank which was frozen itself accuses no other when it wakes. A running
   rank whose process on this machine has ended is dead at once.
3. (a rank that raises) write its exception as the job's failure. (a rank that leaves) write the state "left".
4. (the first rank that knows) write the job's failure. All ranks read it, and raise it where they wait for others, or
   in their next iteration.
5. (a rank whose training thread is blocked in a collective of the job's own) log the failure and end the process:
   nothing can interrupt such a collective.
6. (the rank whose process hosts the store) before it ends, wait a moment until the others know of the failure, or are
   idle, or have left: the store ends with the process.

A job without a store (Horovod under mpirun or elastic, XLA in several processes) has no monitors; its errors and
time-outs are those of the collectives. Ranks that are threads of one process have monitors too: a rank whose thread has
ended has left.
"""

import contextlib
import faulthandler
import logging
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

from distckpt._threads import EXIT_LIMIT_S, join_at_exit, wait_for_pending_writes
from distckpt.backends.base import Backend, KeyValueStore
from distckpt.coordination.peers import (
    IDLE,
    LEFT,
    RUNNING,
    JobFailure,
    Peers,
    StoreHost,
    TrainingThread,
    encode_heartbeat,
    process_location,
)
from distckpt.errors import CollectiveError, DistckptError, RankFailure

END_BLOCKED_VARIABLE = "DISTCKPT_END_BLOCKED"
EXIT_CODE = 70
"""Exit code of a process whose training thread is blocked in a collective of a lost job (sysexits' EX_SOFTWARE)."""

_POLL_S = 0.05  # how soon the thread notices that it has to end
_WRITE_LIMIT_S = 120.0  # how long a process that has to end goes on with a background write
_BLOCKED_S = 0.5  # how long a thread inside a collective of torch's has to stand still
_NUM_OWN_HEARTBEATS = 6  # after how many of this rank's heartbeats a rank without two new ones is taken for lost
_STAY_S = 2.0  # how long the host of the store stays for the others
_COLLECTIVE_FOLDERS = (
    f"torch{os.sep}distributed",
    f"torch{os.sep}autograd",
    f"torch{os.sep}nn{os.sep}parallel",
    f"horovod{os.sep}torch",
    f"{os.sep}torch_xla{os.sep}",
)
_logger = logging.getLogger(__name__)


class HeartbeatMonitor:
    """One rank's monitor of the others. It ends with the job, or by :meth:`close`.

    Args:
        store: the job's key-value store.
        rank: this rank.
        world_size: number of ranks.
        limit_s: seconds without a heartbeat after which a rank is lost.
        launcher: process id of the launcher, whose end ends this rank; None if there is none.
        is_passive: have no thread and write nothing until :meth:`start`; also an attribute.

    Attributes:
        step: this rank's iteration, set by the training thread.
        in_run: whether an engine runs: only then do others expect heartbeats, and a blocked training thread is ended.
    """

    def __init__(
        self,
        store: KeyValueStore,
        rank: int,
        world_size: int,
        *,
        limit_s: float,
        launcher: int | None,
        is_passive: bool = False,
    ) -> None:
        self.step = 0
        self.in_run = not is_passive
        self.is_passive = is_passive
        self._pid = os.getpid()
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._limit_s = limit_s
        self._interval_s = _interval_s(limit_s, world_size)
        self._launcher = launcher
        self._peers = Peers(other for other in range(world_size) if other != rank)
        self._store_host = StoreHost(rank)
        self._failure: JobFailure | None = None
        self._is_raised = False  # whether the training thread has got the failure
        self._num_heartbeats = 0
        self._generation = 0
        self._asked_s = time.monotonic()
        self._stop = threading.Event()
        self._closing = threading.Lock()
        self._wake = threading.Event()
        self._checking = threading.RLock()  # held during a check, so that its heartbeat does not replace a newer one
        self._training = TrainingThread()
        self._abort: weakref.WeakMethod[Any] | None = None
        self._thread = threading.Thread(target=self._run, name="distckpt-heartbeat", daemon=True)

    def start(self, backend: Backend) -> None:
        """Start the heartbeats. The calling thread is the training thread."""
        self.is_passive, self.in_run = False, True
        self._abort = weakref.WeakMethod(backend.abort)
        location = f"{self._store.host() or 'nowhere'}|{process_location()}"
        try:
            # Before the thread starts: after the first collective every rank can read the entry of every other.
            self._store.set(f"heartbeat/host/{self._rank}", location, limit_s=self._limit_s)
        except OSError as error:
            self._lose_store(str(error))
        self._thread.start()

    def close(self, why: str = "its process ended") -> None:
        """End the monitor and its thread, and tell the others that this rank leaves. Any thread; a second call waits.

        A process that hosts the store stays a moment, until the others have read the store.
        """
        if os.getpid() != self._pid:  # a forked child inherits the exit functions
            return
        if self._closing.acquire(blocking=False):  # never released: only the first call closes
            self._stop.set()
            self._wake.set()
            self._join(self._interval_s)
            is_host = self._store.host() == "this process"
            # No other rank expects an idle one, and the rank that hosts the store may have ended by now.
            if self.in_run or is_host or "this process" not in self._store_host.hosts:
                with contextlib.suppress(OSError, RuntimeError):
                    self._write(f"{LEFT}: {why}")
                    if is_host:
                        self._wait_until_read()
        self._join(EXIT_LIMIT_S)

    def _join(self, limit_s: float) -> None:
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(limit_s)

    def _wait_until_read(self) -> None:
        """Wait a few heartbeats until the others know of the failure, or have read the whole store."""
        lost = () if self._failure is None else self._failure.ranks
        deadline = time.monotonic() + min(self._limit_s, max(_STAY_S, 5.0 * self._interval_s))
        self._read_heartbeats(self._interval_s, 0.0)
        # Between two heartbeats a rank reads the whole store.
        awaited = {rank: self._peers[rank].heartbeat + 2 for rank in self._peers.unaware() if rank not in lost}
        while any(self._peers[rank].heartbeat < awaited.get(rank, 0) for rank in self._peers.unaware()):
            if time.monotonic() > deadline:
                return
            time.sleep(_POLL_S)
            self._read_heartbeats(self._interval_s, 0.0)

    def shorten_limit(self, limit_s: float) -> None:
        """Set the limit, if it is shorter than the present one."""
        if limit_s < self._limit_s:
            self._limit_s = limit_s
            self._interval_s = _interval_s(limit_s, self._world_size)
            self._wake.set()

    # -- the training thread -----------------------------------------------------------------------

    def enter_run(self, step: int) -> None:
        """Note that an engine runs, and its iteration; raise the error of the job's failure, if there is one."""
        self.step = step
        if not self.in_run:
            self.clear_caught_failure()
            self.in_run = True
            self._wake.set()
        if self._failure is not None:
            self._is_raised = True
            raise self._failure.error(self._rank)

    def clear_caught_failure(self) -> None:
        """Forget an exception that ended the last run: a rank that runs again has caught it."""
        failure = self._failure
        if not self.in_run and failure is not None and failure.failure is not None and self._is_raised:
            # Every rank that raised it has ended its run. From now on this rank reads failures of the next generation
            # only: a rank that raises late, in the last one, disturbs nothing.
            self._generation += 1
            self._failure, self._is_raised = None, False

    def leave_run(self) -> None:
        """Note that no engine runs any more."""
        if not self.in_run:
            return
        self.in_run = False
        self._asked_s = -math.inf
        with contextlib.suppress(OSError):
            # At once: the process may end before the next heartbeat, and would seem to have died.
            self._write()

    def failure(self, wait_s: float = 0.0) -> DistckptError | None:
        """Return the error of the job's failure, if there is one or one comes within `wait_s`.

        A rank that waits for others calls this: here a rank that has left counts as a failure.
        """
        self._asked_s = time.monotonic()
        if self.is_passive:
            if self._failure is None:
                with contextlib.suppress(OSError):
                    self._read_failure(1.0)
            return self._raised_error()
        if self._failure is None and not self._store_host.hosts and self._store_host.silent_s < _STAY_S:
            # At the first collective: after it the store may be lost at any moment.
            with contextlib.suppress(OSError):
                self._read_hosts(max(self._interval_s, 1.0))
        deadline = self._asked_s + wait_s
        while self._failure is None and self._asked_s < deadline:
            time.sleep(_POLL_S)
            self._asked_s = time.monotonic()
        if self._failure is None and wait_s > 0 and self._checking.acquire(timeout=wait_s):
            try:
                self._check(0.0)  # the monitor's thread may not have had the time
            finally:
                self._checking.release()
        if self._failure is None:
            self._declare_lost(self._peers.gone())
        return self._raised_error()

    def _raised_error(self) -> DistckptError | None:
        if self._failure is None:
            return None
        self._is_raised = True
        return self._failure.error(self._rank)

    def describe(self, ranks: Sequence[int]) -> str:
        """Return what is known of `ranks`, as text; empty if passive."""
        doubt_s = max(3.0 * self._interval_s, 0.5)
        return "" if self.is_passive else self._peers.describe(ranks, doubt_s)

    def report_error(self, error: BaseException, traceback_text: str) -> None:
        """Tell the job that this rank raises `error`."""
        self._is_raised = True
        if self._failure is not None:
            return
        if not isinstance(error, CollectiveError):
            failure = RankFailure.from_exception(self._rank, error, traceback_text)
            self._declare([self._rank], f"{failure.kinds[0]}: {failure.message}", failure)
        elif error.missing:
            found = f"Found out by rank {self._rank} in iteration {self.step}"
            self._declare(error.missing, f"{self.describe(error.missing)}. {found}")

    def find_lost_ranks(self) -> DistckptError | None:
        """Find out whether a collective of the job's own failed because a rank is lost.

        Waits until every rank has sent two heartbeats, or had the time to.

        Returns:
            The failure's error; None if all ranks are alive, or this rank has raised itself.
        """
        if self._failure is not None and self._is_raised and self._rank in self._failure.ranks:
            return None
        self._asked_s = time.monotonic() + self._limit_s
        if not self._store_host.hosts:
            with contextlib.suppress(OSError):
                self._read_hosts(max(self._interval_s, 1.0))
        if not self._store_host.hosts:  # not all ranks have a monitor: only a failure in the store can be found
            return self.failure(_STAY_S)
        deadline, last_own = time.monotonic() + self._limit_s, self._num_heartbeats + _NUM_OWN_HEARTBEATS
        before = {rank: self._peers[rank].heartbeat for rank in self._peers.ranks}
        stale = list(before)
        while stale and self._failure is None and self._num_heartbeats < last_own and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            # Two: the first may have been written just before the rank died.
            stale = [rank for rank, number in before.items() if self._peers[rank].heartbeat < number + 2]
        if self._failure is None:
            lost = self._peers.gone() or stale
            if not lost:
                return None
            if self._store_host.silent_s > 0:  # nothing is known until the store answers or is lost
                return self.failure(self._limit_s)
            self._declare_lost(lost)
        return self.failure()

    # -- the monitor's thread ----------------------------------------------------------------------

    def _write(self, state: str = "") -> None:
        """Write a heartbeat, unless the store is silent or gone."""
        with self._checking:
            if self._store_host.silent_s == 0 and not self._store_host.is_gone:
                self._write_heartbeat(min(1.0, self._limit_s), state)

    def _write_heartbeat(self, limit_s: float, state: str = "") -> None:
        state = state or (RUNNING if self.in_run else IDLE)
        text = encode_heartbeat(self._num_heartbeats, self.step, state, knows_failure=self._failure is not None)
        self._store.set(f"heartbeat/{self._rank}", text, limit_s=limit_s)

    def _run(self) -> None:
        last_s = time.monotonic()
        while not self._stop.is_set() and self._store.is_open():
            if not self._training.is_alive():
                self.close("its thread ended")
                break
            now_s = time.monotonic()
            with self._checking:
                if (self.in_run or now_s < self._asked_s + 2.0 * self._interval_s) and not self._store_host.is_gone:
                    # Not the whole gap: after this rank was frozen the others' heartbeats seem old, and are not.
                    self._check(min(now_s - last_s, self._limit_s / 3.0))
            last_s = now_s
            if self._failure is not None:
                self._end_if_blocked()
            # A silent store has used up the interval already.
            deadline = time.monotonic() + (_POLL_S if self._store_host.silent_s > 0 else self._interval_s)
            while time.monotonic() < deadline and self._store.is_open() and not self._wake.wait(_POLL_S):
                pass
            self._wake.clear()
        self._peers.close()

    def _check(self, elapsed_s: float) -> None:
        """Write a heartbeat, read those of the others, and judge them."""
        self._num_heartbeats += 1
        limit_s = max(self._interval_s, 0.2)
        begin_s = time.monotonic()
        host = self._store_host
        try:
            self._write_heartbeat(limit_s)
            # Apart from the heartbeats: with a missing key, get_many() takes one exchange a key.
            self._read_failure(limit_s)
            self._read_heartbeats(limit_s, elapsed_s)
            if len(host.hosts) < self._world_size:
                self._read_hosts(limit_s)
        except TimeoutError:
            # From the start of the first check without an answer to the end of this one.
            host.silent_s += elapsed_s if host.silent_s > 0 else time.monotonic() - begin_s
            if host.silent_s >= self._limit_s and self._failure is None:
                self._lose_store(f"the job's store has not answered for {host.silent_s:.1f} s")
            return
        except OSError as error:
            if self._store.is_open() and not self._stop.is_set():
                host.is_gone = True
                self._lose_store(f"the job's store is gone ({error})")
            return
        host.silent_s = 0.0
        if self._failure is None:
            self._declare_lost(self._peers.dead() or self._peers.frozen(self._limit_s, 2.0 * self._interval_s))
        if self._failure is None and self._launcher is not None and os.getppid() != self._launcher:
            self._declare([self._rank], f"rank {self._rank}: its launcher (process {self._launcher}) has ended")

    def _read_failure(self, limit_s: float) -> None:
        generation = self._generation
        found = self._store.get_many([_failure_key(generation)], limit_s=limit_s)[0]
        if found and self._failure is None and generation == self._generation:
            self._accept(JobFailure.decode(found))

    def _read_heartbeats(self, limit_s: float, elapsed_s: float) -> None:
        self._peers.check_processes()
        keys = [f"heartbeat/{rank}" for rank in self._peers.ranks]
        self._peers.update(self._store.get_many(keys, limit_s=limit_s), elapsed_s)

    def _read_hosts(self, limit_s: float) -> None:
        keys = [f"heartbeat/host/{rank}" for rank in range(self._world_size)]
        entries = [(text or "").partition("|") for text in self._store.get_many(keys, limit_s=limit_s)]
        if all(host for host, _, _ in entries):
            self._peers.watch_processes({rank: entries[rank][2] for rank in self._peers.ranks})
            self._store_host.hosts = [host for host, _, _ in entries]

    # -- the job's failure; any thread -------------------------------------------------------------

    def _lose_store(self, what: str) -> None:
        """Accept a failure of the store. The other ranks find it out in the same way."""
        ranks, who = self._store_host.lost(self._store.host)
        self._accept(JobFailure(ranks=ranks, text=f"{what}{who}", by=self._rank, step=self.step))

    def _declare_lost(self, ranks: Sequence[int]) -> None:
        if ranks:
            self._declare(ranks, self.describe(ranks))

    def _declare(self, ranks: Sequence[int], text: str, error: RankFailure | None = None) -> None:
        """Write a failure to the store unless there is one, and accept the one that is there."""
        failure = JobFailure(ranks=tuple(ranks), text=text, by=self._rank, step=self.step, failure=error)
        limit_s = max(self._interval_s, 0.5)
        try:
            key = _failure_key(self._generation)
            failure = JobFailure.decode(self._store.set_default(key, failure.encode(), limit_s=limit_s))
        except TimeoutError:
            pass  # accepted on this rank; the others find out in the same way
        except OSError as lost:
            if self._store_host.lost(self._store.host)[0] and failure.failure is None:
                # The store's end explains the missing ranks too: those that know of it have ended by now.
                self._lose_store(f"the job's store is gone ({lost})")
        self._accept(failure)

    def _accept(self, failure: JobFailure) -> None:
        if self._failure is not None:
            return
        self._failure = failure
        self._wake.set()  # so that the others soon see that this rank knows
        if self._rank in failure.ranks:
            return
        _logger.error("rank %d, iteration %d: %s", self._rank, self.step, failure.error(self._rank))
        abort = self._abort() if self._abort is not None else None
        if abort is not None and not self._stop.is_set():
            # On a daemon thread: NCCL may take for ever.
            thread = threading.Thread(target=abort, name="distckpt-abort", daemon=True)
            thread.start()
            join_at_exit(thread)

    def _end_if_blocked(self) -> None:
        """End the process if its training thread waits in C++, which no Python exception can interrupt."""
        if self._is_raised or self._failure is None or not self.in_run or os.environ.get(END_BLOCKED_VARIABLE) == "0":
            return
        blocked_s = self._training.blocked_s()
        patience_s = _BLOCKED_S if self._training.is_in(_COLLECTIVE_FOLDERS) else self._limit_s
        if blocked_s < patience_s or self._is_raised:
            return
        error = self._failure.error(self._rank)
        text = (
            f"rank {self._rank}, iteration {self.step}: {type(error).__name__}: {error}\n"
            f"The training thread has waited for {blocked_s:.1f} s, in the job's own collective or elsewhere, and "
            f"cannot be interrupted: the process ends, exit code {EXIT_CODE} ({END_BLOCKED_VARIABLE}=0 keeps it).\n"
        )
        # Not by logging: the training thread may hold a handler's lock.
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)
            if error.__cause__ is not None:
                sys.stderr.write(f"{error.__cause__}\n")
            sys.stderr.flush()
            faulthandler.dump_traceback(all_threads=True)
        self.close(f"{type(error).__name__}")
        wait_for_pending_writes(_WRITE_LIMIT_S)  # a checkpoint that this rank writes alone
        os._exit(EXIT_CODE)


def _failure_key(generation: int) -> str:
    """Return the key of the job's failure. A generation ends when a rank that caught an exception runs again."""
    return f"heartbeat/failure/{generation}"


def _interval_s(limit_s: float, world_size: int) -> float:
    """Return the seconds between heartbeats: a twelfth of the limit, at most 1, but more in a large job."""
    return max(min(1.0, limit_s / 12.0), world_size / 500.0)
