"""Who is missing, and why: heartbeats and failure notes beside the collectives.

Owns the watch that each rank keeps over the others, on a thread of its own: it beats on the job's board, reads the
other ranks' beats, and, when a rank raised, died, froze or left, writes down one *fault* that holds for the whole
job. Must not know about engines or process groups. It issues no collectives.

The protocol:

1. (all ranks) every `interval_s`, as long as an engine runs, write a beat: a number that grows, the iteration, and
   what this rank is at. At the end of a run write that it is idle, and beat no more.
2. (all ranks) read all beats. A rank in a run whose beat has not changed for `limit_s` is *frozen*; its time is counted
   in looks of this rank's own, so that a rank that was frozen itself does not accuse the others when it wakes. A
   process of this machine that has ended in a run is *dead* at once.
3. (a rank that raises) claim the fault, with its exception. (a rank that leaves) write so into its last beat.
4. (the first rank that knows) claim the fault. The first note stands; all ranks read it, and raise it where they wait,
   or in their next iteration.
5. (a rank whose training thread waits in the job's own collective, which nobody can interrupt) say why, and end the
   process: the job cannot go on.
6. (the rank whose process hosts the board) before it ends, wait a moment until the others know of the fault, or are
   idle, or have left: the note ends with the board.

Where a job has no board (Horovod under mpirun or elastic, XLA in several processes) there is no watch: its own errors
and time limits count. Ranks that are threads of one process watch each other too: one whose thread has ended has left.
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
from distckpt.backends.base import Backend, Board
from distckpt.coordination.job_failure import Fault
from distckpt.coordination.peers import IDLE, LEFT, RUNS, BoardHost, Peers, heartbeat
from distckpt.coordination.processes import TrainingThread, place_of_this_process
from distckpt.errors import CollectiveError, DistckptError, RankFailure

__all__ = ["END_BLOCKED_VARIABLE", "EXIT_CODE", "Watch"]

END_BLOCKED_VARIABLE = "DISTCKPT_END_BLOCKED"
EXIT_CODE = 70
"""With which a process ends whose training thread hangs in a collective of a lost job (sysexits' EX_SOFTWARE)."""

_LOOK_S = 0.05  # how soon the thread notices that it has to end
_WRITE_LIMIT_S = 120.0
"""For how long a process that is ended goes on with what it is writing in the background."""
_BLOCKED_S = 0.5  # how long a thread in a collective of torch's has to stand still
_NUM_LOOKS = 6  # after how many of this rank's own beats one that has not beaten twice is suspected
_STAY_S = 2.0  # how long the host of the board stays for the others
_HANGS_IN = (
    f"torch{os.sep}distributed",
    f"torch{os.sep}autograd",
    f"torch{os.sep}nn{os.sep}parallel",
    f"horovod{os.sep}torch",
    f"{os.sep}torch_xla{os.sep}",
)
_logger = logging.getLogger(__name__)


class Watch:
    """One rank's watch over the others, as :func:`distckpt.coordination.liveness.ensure` begins it.

    It ends with the job, or by :meth:`close`.

    Args:
        board: the job's.
        rank: this rank.
        world_size: number of ranks.
        limit_s: after how many seconds without a beat a rank is given up.
        launcher: process id of the launcher, whose end ends this rank; None for nobody's.
        is_passive: have no thread and write nothing until :meth:`start`; only read, when asked for news, whether
            another rank has written down a fault.

    Attributes:
        step: this rank's iteration; the training thread keeps it up to date.
        in_run: whether an engine runs: only then the others count on this rank's beats, and only then a training
            thread that waits is ended with a lost job.
        is_passive: see above.
    """

    def __init__(
        self,
        board: Board,
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
        self._board = board
        self._rank = rank
        self._world_size = world_size
        self._limit_s = limit_s
        self._interval_s = _interval_s(limit_s, world_size)
        self._launcher = launcher
        self._peers = Peers(other for other in range(world_size) if other != rank)
        self._store = BoardHost(rank)
        self._fault: Fault | None = None
        self._is_told = False
        self._beat = 0
        self._era = 0
        self._asked_s = time.monotonic()
        self._stop = threading.Event()
        self._closing = threading.Lock()
        self._wake = threading.Event()
        self._looking = threading.RLock()  # held while the thread looks, so that what it wrote last is not outdated
        self._training = TrainingThread()
        self._break_off: weakref.WeakMethod[Any] | None = None
        self._thread = threading.Thread(target=self._run, name="distckpt-watch", daemon=True)

    def start(self, backend: Backend) -> None:
        """Begin to beat, and to look at the others. The calling thread is the one that trains."""
        self.is_passive, self.in_run = False, True
        self._break_off = weakref.WeakMethod(backend.break_off)
        place = f"{self._board.host() or 'nowhere'}|{place_of_this_process()}"
        try:
            # Now, so that all ranks have done so when they have met for the first time.
            self._board.put(f"watch/host/{self._rank}", place, limit_s=self._limit_s)
        except OSError as error:
            self._lose_store(str(error))
        self._thread.start()

    def close(self, why: str = "its process ended") -> None:
        """End the watch, and tell the others that this rank leaves. Any thread; the second time it only waits.

        A process that hosts the board stays a moment, until the others know what is written there. When this returns
        on another thread, the watch's own has ended, unless the board holds it for longer than a process may wait.
        """
        if os.getpid() != self._pid:  # a forked child inherits what is to be done at exit
            return
        if self._closing.acquire(blocking=False):  # never released: the first one closes
            self._stop.set()
            self._wake.set()
            self._join(self._interval_s)
            self._say_farewell(why)
        self._join(EXIT_LIMIT_S)

    def _join(self, limit_s: float) -> None:
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(limit_s)

    def _say_farewell(self, why: str) -> None:
        is_host = self._board.host() == "this process"
        # An idle rank is not missed, and the rank that hosts the board may have ended by now.
        if self.in_run or is_host or "this process" not in self._store.hosts:
            with contextlib.suppress(OSError, RuntimeError):
                self._write(f"{LEFT}: {why}")
                if is_host:
                    self._outstay()

    def _outstay(self) -> None:
        """Stay until the others know of the fault, or have read all that stands on the board; for a few beats."""
        lost = () if self._fault is None else self._fault.ranks
        until = time.monotonic() + min(self._limit_s, max(_STAY_S, 5.0 * self._interval_s))
        self._read_beats(self._interval_s, 0.0)
        # Two beats: between them it has read everything.
        begun = {rank: self._peers[rank].beat + 2 for rank in self._peers.unaware() if rank not in lost}
        while any(self._peers[rank].beat < begun.get(rank, 0) for rank in self._peers.unaware()):
            if time.monotonic() > until:
                return
            time.sleep(_LOOK_S)
            self._read_beats(self._interval_s, 0.0)

    def tighten(self, limit_s: float) -> None:
        """Take the shorter of two limits."""
        if limit_s < self._limit_s:
            self._limit_s = limit_s
            self._interval_s = _interval_s(limit_s, self._world_size)
            self._wake.set()

    # -- the training thread's side ----------------------------------------------------------------

    def enter(self, step: int) -> None:
        """Tell that an engine runs, and its iteration. The training thread, in each iteration.

        Raises:
            DistckptError: of the job's fault, if there is one.
        """
        self.step = step
        if not self.in_run:
            self.forget_caught()
            self.in_run = True
            self._wake.set()
        if self._fault is not None:
            self._is_told = True
            raise self._fault.error(self._rank)

    def forget_caught(self) -> None:
        """Forget an exception that ended the last run: a rank that runs again has caught it. The training thread."""
        fault = self._fault
        if not self.in_run and fault is not None and fault.failure is not None and self._is_told:
            # Every rank that was told has ended its run. One that runs again looks for faults of its own era from now
            # on: a rank that raises late, in the last one, spoils nothing.
            self._era += 1
            self._fault, self._is_told = None, False

    def leave(self) -> None:
        """Tell that no engine runs any more. The training thread, at the end of a run."""
        if not self.in_run:
            return
        self.in_run = False
        self._asked_s = -math.inf
        with contextlib.suppress(OSError):
            # Now, not with the next beat: the process may end at any moment, and that would look like a death.
            self._write()

    def news(self, wait_s: float = 0.0) -> DistckptError | None:
        """Return the error of the job's fault, if there is one, or comes within `wait_s`.

        Asked by a rank that waits for others: one that has left for good is a fault then.
        """
        self._asked_s = time.monotonic()
        if self.is_passive:
            return self._read_fault()
        if self._fault is None and not self._store.hosts and self._store.silent_s < _STAY_S:
            # While the ranks meet for the first time: afterwards the store may be lost at any moment.
            with contextlib.suppress(OSError):
                self._learn_hosts(max(self._interval_s, 1.0))
        until = self._asked_s + wait_s
        while self._fault is None and self._asked_s < until:
            time.sleep(_LOOK_S)
            self._asked_s = time.monotonic()
        if self._fault is None and wait_s > 0 and self._looking.acquire(timeout=wait_s):
            try:
                self._look(0.0)  # the other thread may not have come to it
            finally:
                self._looking.release()
        if self._fault is None:
            self._claim_lost(self._peers.gone())
        if self._fault is None:
            return None
        self._is_told = True
        return self._fault.error(self._rank)

    def _read_fault(self) -> DistckptError | None:
        """Return the error of the fault that another rank has written down, if there is one."""
        if self._fault is None:
            with contextlib.suppress(OSError):
                found = self._board.look([Fault.key(self._era)], limit_s=1.0)[0]
                if found:
                    self._take(Fault.decode(found))
        if self._fault is None:
            return None
        self._is_told = True
        return self._fault.error(self._rank)

    def tell(self, ranks: Sequence[int]) -> str:
        """Return what is known of `ranks`: whether each one beats, and where it was last. Empty if passive."""
        return "" if self.is_passive else self._peers.tell(ranks, self._doubt_s)

    def report(self, error: BaseException, traceback_text: str) -> None:
        """Tell the job that this rank raises `error` and will not come again. The training thread."""
        self._is_told = True
        if self._fault is not None:
            return
        if isinstance(error, CollectiveError):
            if error.missing:
                text = f"{self.tell(error.missing)}. Found out by rank {self._rank} in iteration {self.step}"
                self._claim(Fault(ranks=error.missing, text=text, by=self._rank, step=self.step))
            return
        failure = RankFailure.from_exception(self._rank, error, traceback_text)
        text = f"{failure.kinds[0]}: {failure.message}"
        self._claim(Fault(ranks=(self._rank,), text=text, by=self._rank, step=self.step, failure=failure))

    def suspect(self) -> DistckptError | None:
        """Find out whether a collective of the job's own broke because a rank is gone. The training thread.

        Waits until every rank has beaten twice, or this one so often that the others had the time to.

        Returns:
            The fault's error; None when all ranks are alive, or this one has raised itself.
        """
        if self._fault is not None and self._is_told and self._rank in self._fault.ranks:
            return None
        self._asked_s = time.monotonic() + self._limit_s
        if not self._store.hosts:
            with contextlib.suppress(OSError):
                self._learn_hosts(max(self._interval_s, 1.0))
        if not self._store.hosts:  # not all ranks have a watch: known is only what another one has written down
            return self.news(_STAY_S)
        until, until_beat = time.monotonic() + self._limit_s, self._beat + _NUM_LOOKS
        before = {rank: self._peers[rank].beat for rank in self._peers.ranks}
        late = list(before)
        while late and self._fault is None and self._beat < until_beat and time.monotonic() < until:
            time.sleep(_LOOK_S)
            # Two beats: one may have been written just before the end, and read just now.
            late = [rank for rank, beat in before.items() if self._peers[rank].beat < beat + 2]
        if self._fault is None:
            lost = self._peers.gone() or late
            if not lost:
                return None
            if self._store.silent_s > 0:  # nothing is known of anybody, until the store answers or is given up
                return self.news(self._limit_s)
            self._claim_lost(lost)
        return self.news()

    # -- the watch's own thread --------------------------------------------------------------------

    @property
    def _doubt_s(self) -> float:
        """After how long without a beat a rank is doubtful: three beats."""
        return max(3.0 * self._interval_s, 0.5)

    def _write(self, state: str = "") -> None:
        """Write a beat. Does nothing where the board does not answer, or is gone: nobody would read it."""
        with self._looking:
            if self._store.silent_s == 0 and not self._store.is_gone:
                self._put_beat(state, min(1.0, self._limit_s))

    def _put_beat(self, state: str, limit_s: float) -> None:
        now = state or (RUNS if self.in_run else IDLE)
        line = heartbeat(self._beat, self.step, now, knows=self._fault is not None)
        self._board.put(f"watch/beat/{self._rank}", line, limit_s=limit_s)

    def _run(self) -> None:
        last_s = time.monotonic()
        while not self._stop.is_set() and self._board.is_open():
            if not self._training.is_alive():
                self.close("its thread ended")
                break
            now_s = time.monotonic()
            with self._looking:
                if (self.in_run or now_s < self._asked_s + 2.0 * self._interval_s) and not self._store.is_gone:
                    # Not the whole gap: after a freeze of our own the others' beats look old, and are not.
                    self._look(min(now_s - last_s, self._limit_s / 3.0))
            last_s = now_s
            if self._fault is not None:
                self._end_if_blocked()
            # A board that does not answer has taken the time already.
            until = time.monotonic() + (_LOOK_S if self._store.silent_s > 0 else self._interval_s)
            while time.monotonic() < until and self._board.is_open() and not self._wake.wait(_LOOK_S):
                pass
            self._wake.clear()
        self._peers.close()

    def _look(self, passed_s: float) -> None:
        """Beat, and read what the others wrote."""
        self._beat += 1
        era = self._era
        limit_s = max(self._interval_s, 0.2)
        begin_s = time.monotonic()
        try:
            self._put_beat("", limit_s)
            # The fault apart: as long as there is none, the beats are read in one exchange.
            fault = self._board.look([Fault.key(era)], limit_s=limit_s)[0]
            self._read_beats(limit_s, passed_s)
            if len(self._store.hosts) < self._world_size:
                self._learn_hosts(limit_s)
        except TimeoutError:
            # From the begin of the first look without an answer to the end of this one.
            self._store.silent_s += passed_s if self._store.silent_s > 0 else time.monotonic() - begin_s
            if self._store.silent_s >= self._limit_s and self._fault is None:
                self._lose_store(f"the job's store has not answered for {self._store.silent_s:.1f} s")
            return
        except OSError as error:
            if self._board.is_open() and not self._stop.is_set():
                self._store.is_gone = True
                self._lose_store(f"the job's store is gone ({error})")
            return
        self._store.silent_s = 0.0
        if fault and self._fault is None and era == self._era:
            self._take(Fault.decode(fault))
        self._judge()

    def _read_beats(self, limit_s: float, passed_s: float) -> None:
        self._peers.look_at_processes()
        keys = [f"watch/beat/{rank}" for rank in self._peers.ranks]
        self._peers.read(self._board.look(keys, limit_s=limit_s), passed_s)

    def _learn_hosts(self, limit_s: float) -> None:
        keys = [f"watch/host/{rank}" for rank in range(self._world_size)]
        notes = [(note or "").partition("|") for note in self._board.look(keys, limit_s=limit_s)]
        if all(host for host, _, _ in notes):
            self._peers.watch_processes({rank: notes[rank][2] for rank in self._peers.ranks})
            self._store.hosts = [host for host, _, _ in notes]

    def _judge(self) -> None:
        if self._fault is not None:
            return
        self._claim_lost(self._peers.dead() or self._peers.frozen(self._limit_s, 2.0 * self._interval_s))
        if self._launcher is not None and os.getppid() != self._launcher and self._fault is None:
            text = f"rank {self._rank}: its launcher (process {self._launcher}) has ended"
            self._claim(Fault(ranks=(self._rank,), text=text, by=self._rank, step=self.step))

    def _lose_store(self, what: str) -> None:
        """Find out who is lost with the store; the others cannot be told, but find out in the same way."""
        ranks, who = self._store.lost(self._board.host)
        self._take(Fault(ranks=ranks, text=f"{what}{who}", by=self._rank, step=self.step))

    def _claim_lost(self, ranks: Sequence[int]) -> None:
        if ranks:
            self._claim(Fault(ranks=tuple(ranks), text=self.tell(ranks), by=self._rank, step=self.step))

    def _claim(self, fault: Fault) -> None:
        """Write the fault down for the whole job, unless there is one; take over what stands. Any thread."""
        limit_s = max(self._interval_s, 0.5)
        stands = fault
        try:
            stands = Fault.decode(self._board.claim(Fault.key(self._era), fault.encode(), limit_s=limit_s))
        except TimeoutError:
            pass  # it is taken over here, and the others find it out in the same way
        except OSError as error:
            if self._store.lost(self._board.host)[0] and fault.failure is None:
                # Which says why others cannot be reached, too: those that know have ended by now.
                self._lose_store(f"the job's store is gone ({error})")
        self._take(stands)

    def _take(self, fault: Fault) -> None:
        if self._fault is not None:
            return
        self._fault = fault
        self._wake.set()  # so that the others soon see that this rank knows
        if self._rank not in fault.ranks:
            _logger.error("rank %d, iteration %d: %s", self._rank, self.step, fault.error(self._rank))
        break_off = self._break_off() if self._break_off is not None else None
        if break_off is not None and self._rank not in fault.ranks and not self._stop.is_set():
            # A daemon, since NCCL may take for ever over it.
            thread = threading.Thread(target=break_off, name="distckpt-break-off", daemon=True)
            thread.start()
            join_at_exit(thread)

    def _end_if_blocked(self) -> None:
        """End the process where the training thread cannot be reached in any other way.

        A wait inside a collective of torch's is C++: no exception of Python's gets there.
        """
        if self._is_told or self._fault is None or not self.in_run or os.environ.get(END_BLOCKED_VARIABLE) == "0":
            return
        still_s = self._training.stands_still_s()
        patience_s = _BLOCKED_S if self._training.is_in(_HANGS_IN) else self._limit_s
        if still_s < patience_s or self._is_told:
            return
        error = self._fault.error(self._rank)
        text = (
            f"rank {self._rank}, iteration {self.step}: {type(error).__name__}: {error}\n"
            f"The training thread has waited for {still_s:.1f} s, in the job's own collective or elsewhere, and cannot "
            f"be interrupted there: the process ends, exit code {EXIT_CODE} ({END_BLOCKED_VARIABLE}=0 would keep it).\n"
        )
        # Not through logging, where the fault is said already: the training thread may hold a handler's lock.
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)
            if error.__cause__ is not None:
                sys.stderr.write(f"{error.__cause__}\n")
            sys.stderr.flush()
            faulthandler.dump_traceback(all_threads=True)
        self.close(f"{type(error).__name__}")
        wait_for_pending_writes(_WRITE_LIMIT_S)  # a checkpoint that this rank writes alone
        os._exit(EXIT_CODE)


def _interval_s(limit_s: float, world_size: int) -> float:
    """Return how often to beat: a dozen times within the limit, at most each second, less often in a large world."""
    return max(min(1.0, limit_s / 12.0), world_size / 500.0)
