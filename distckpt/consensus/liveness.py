"""Who is missing, and why: heartbeats and failure notes beside the collectives.

Owns the watch that each rank keeps over the others, on a thread of its own: it beats on the job's board, reads the
other ranks' beats, and, when a rank raised, died, froze or left, writes down one *fault* that holds for the whole
job. Must not know about engines or process groups. It issues no collectives. Layer L3.

The protocol:

1. (all ranks) every `interval_s` write a beat: a number that grows, the iteration, and what this rank is at.
2. (all ranks) read all beats. A rank whose beat has not changed for `limit_s` is *frozen*; its time is counted in looks
   of this rank's own, so that a rank that was frozen itself does not accuse the others when it wakes.
3. (a rank that raises) claim the fault, with its exception. (a rank that leaves) write so into its last beat.
4. (the first rank that knows) claim the fault. The first note stands; all ranks read it, and raise it where they wait.
5. (a rank whose training thread waits in the job's own collective, which nobody can interrupt) say why, and end the
   process: the job cannot go on.

Where a runtime has no board (Horovod, XLA) there is no watch: its own errors and time limits count.
"""

import atexit
import contextlib
import faulthandler
import json
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distckpt.backends.base import Backend, Board, default_timeout_s
from distckpt.errors import CollectiveError, DistckptError, RankFailure, RankLost, RemoteTraceback, phase_error

__all__ = ["END_BLOCKED_VARIABLE", "EXIT_CODE", "Fault", "Watch", "ensure", "watch_of"]

END_BLOCKED_VARIABLE = "DISTCKPT_END_BLOCKED"
EXIT_CODE = 70
"""With which a process ends whose training thread hangs in a collective of a lost job (sysexits' EX_SOFTWARE)."""

_LOOK_S = 0.05  # how soon the thread notices that it has to end
_BLOCKED_S = 0.5  # how long a thread in a collective of torch's has to stand still
_HANGS_IN = (f"torch{os.sep}distributed", f"torch{os.sep}autograd", f"torch{os.sep}nn{os.sep}parallel")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why a job cannot go on.

    Attributes:
        ranks: who is lost, or who raised.
        text: what happened, without a subject that is known from `ranks`.
        by: the rank that found it out.
        step: the iteration it happened in, as far as known.
        failure: the exception, where a rank raised.
    """

    ranks: tuple[int, ...]
    text: str
    by: int
    step: int
    failure: RankFailure | None = None

    def encode(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: str) -> "Fault":
        """Rebuild it from :meth:`encode`."""
        fields = json.loads(text)
        failure = fields.pop("failure")
        if failure is not None:
            failure = RankFailure(**{**failure, "kinds": tuple(failure["kinds"])})
        return Fault(**{**fields, "ranks": tuple(fields["ranks"])}, failure=failure)

    def error(self, rank: int) -> DistckptError:
        """Return the error that `rank` raises for it."""
        if self.failure is not None and rank not in self.ranks:
            error: DistckptError = phase_error(f"iteration {self.step}", [self.failure])
            error.__cause__ = RemoteTraceback(f"--- rank {self.failure.rank} ---\n{self.failure.traceback}")
            return error
        if rank in self.ranks:
            what = "it raised earlier" if self.failure else "the other ranks have given it up"
            return RankLost(f"rank {rank} cannot go on, {what}: {self.text}", self.ranks)
        return RankLost(f"rank {rank}: {self.text}. The job cannot go on.", self.ranks)


@dataclass(slots=True)
class _Peer:
    """What this rank knows of another one."""

    beat: int = -1
    step: int = 0
    state: str = ""
    stale_s: float = 0.0


@dataclass(slots=True)
class _Store:
    """What is known of the board's own host."""

    silent_s: float = 0.0
    hosts: list[str] = field(default_factory=list)


class Watch:
    """One rank's watch over the others. Made by :func:`ensure`; ended by :meth:`close`, or with the job.

    Args:
        board: the job's.
        rank: this rank.
        world_size: number of ranks.
        limit_s: after how many seconds without a beat a rank is given up.
        launcher: process id of the launcher, whose end ends this rank; None for nobody's.

    Attributes:
        step: this rank's iteration; the training thread keeps it up to date.
        in_run: whether an engine runs: only then a training thread that waits is ended with a lost job.
    """

    def __init__(self, board: Board, rank: int, world_size: int, *, limit_s: float, launcher: int | None) -> None:
        self.step = 0
        self.in_run = True
        self._pid = os.getpid()
        self._board = board
        self._rank = rank
        self._world_size = world_size
        self._limit_s = limit_s
        self._interval_s = _interval_s(limit_s, world_size)
        self._launcher = launcher
        self._peers = {other: _Peer() for other in range(world_size) if other != rank}
        self._store = _Store()
        self._fault: Fault | None = None
        self._is_told = False
        self._beat = 0
        self._era = 0
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._training = _Training()
        self._break_off: weakref.WeakMethod[Any] | None = None
        self._thread = threading.Thread(target=self._run, name="distckpt-watch", daemon=True)

    def start(self, backend: Backend) -> None:
        """Begin. The calling thread is the one that trains."""
        self._break_off = weakref.WeakMethod(backend.break_off)
        try:
            # Now, so that all ranks have done so when they have met for the first time.
            self._board.put(f"watch/host/{self._rank}", self._board.host() or "nowhere", limit_s=self._limit_s)
        except OSError:
            self._store.silent_s += self._limit_s
        self._thread.start()

    def close(self, why: str = "its process ended") -> None:
        """End the watch, and tell the others that this rank leaves. Any thread; does nothing the second time."""
        if self._stop.is_set() or os.getpid() != self._pid:  # a forked child inherits what is to be done at exit
            return
        self._stop.set()
        self._wake.set()
        with contextlib.suppress(OSError, RuntimeError):
            self._board.put(f"watch/beat/{self._rank}", self._line(f"left: {why}"), limit_s=min(1.0, self._limit_s))
            if self._board.is_open() and self._host_of(self._rank) == "this process":
                self._outstay()

    def _outstay(self) -> None:
        """Stay until the others have read what stands on the board, which ends with this process; for a few beats."""
        others = [rank for rank in self._peers if self._fault is None or rank not in self._fault.ranks]
        begun: dict[int, int] = {}
        until = time.monotonic() + self._doubt_s + self._interval_s
        while others and time.monotonic() < until:
            lines = self._board.look([f"watch/beat/{rank}" for rank in others], limit_s=self._interval_s)
            found = {rank: line.split(" ", 2) for rank, line in zip(others, lines, strict=True) if line is not None}
            # Two beats: between them it has read everything. One that has left reads nothing more.
            others = [
                rank
                for rank, (beat, _, state) in found.items()
                if not state and int(beat) < begun.setdefault(rank, int(beat)) + 2
            ]
            if others:
                time.sleep(_LOOK_S)

    def tighten(self, limit_s: float) -> None:
        """Take the shorter of two limits."""
        if limit_s < self._limit_s:
            self._limit_s = limit_s
            self._interval_s = _interval_s(limit_s, self._world_size)
            self._wake.set()

    # -- the training thread's side ----------------------------------------------------------------

    def enter(self, step: int) -> None:
        """Tell that an engine runs, and its iteration. The training thread."""
        self.step = step
        if self.in_run:
            return
        self.in_run = True
        fault = self._fault
        if fault is not None and fault.failure is not None and self._is_told:
            # Every rank that was told has ended its run. One that runs again has caught the exception, and means it.
            # It looks for faults of its own era from now on: a rank that raises late, in the last one, spoils nothing.
            self._era += 1
            self._fault, self._is_told = None, False

    def news(self, wait_s: float = 0.0) -> DistckptError | None:
        """Return the error of the job's fault, if there is one, or comes within `wait_s`.

        Asked by a rank that waits for others: one that has left for good is a fault then.
        """
        if self._fault is None and not self._store.hosts and self._store.silent_s == 0:
            # While the ranks meet for the first time: afterwards the store may be lost at any moment.
            with contextlib.suppress(OSError):
                self._learn_hosts(max(self._interval_s, 0.5))
        until = time.monotonic() + wait_s
        while self._fault is None and time.monotonic() < until:
            time.sleep(_LOOK_S)
        if self._fault is None:
            left = [rank for rank, peer in self._peers.items() if peer.state]
            if not left:
                return None
            self._claim(Fault(ranks=tuple(left), text=self.tell(left), by=self._rank, step=self.step))
        if self._fault is None:
            return None
        self._is_told = True
        return self._fault.error(self._rank)

    def tell(self, ranks: Sequence[int]) -> str:
        """Return what is known of `ranks`: whether each one beats, and where it was last."""
        told = []
        for rank in ranks:
            peer = self._peers.get(rank)
            if peer is None:
                continue
            was = f"its last one was at iteration {peer.step}"
            if peer.beat < 0:
                told.append(f"rank {rank} has never given a sign of life")
            elif peer.state:
                told.append(f"rank {rank} has left at iteration {peer.step}: {peer.state.removeprefix('left: ')}")
            elif peer.stale_s > self._doubt_s:
                told.append(f"rank {rank} froze or died: no heartbeat for {peer.stale_s:.1f} s, {was}")
            else:
                told.append(f"rank {rank} is alive but late: its heartbeat is fresh, {was}")
        return "; ".join(told)

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
        failure = RankFailure.of(self._rank, error, traceback_text)
        text = f"{failure.kinds[0]}: {failure.message}"
        self._claim(Fault(ranks=(self._rank,), text=text, by=self._rank, step=self.step, failure=failure))

    def suspect(self) -> DistckptError | None:
        """Find out whether a collective of the job's own broke because a rank is gone. The training thread.

        Waits until every rank has beaten twice, or for a few intervals.

        Returns:
            The fault's error; None when all ranks are alive.
        """
        until = time.monotonic() + self._doubt_s + 2.0 * self._interval_s
        before = {rank: peer.beat for rank, peer in self._peers.items()}
        gone = list(before)
        while gone and time.monotonic() < until and self._fault is None:
            time.sleep(_LOOK_S)
            # Two beats: one may have been written just before the end, and read just now.
            gone = [
                rank for rank, beat in before.items() if self._peers[rank].beat < beat + 2 or self._peers[rank].state
            ]
        if self._fault is None:
            if not gone:
                return None
            if self._store.silent_s > 0:  # nothing is known of anybody, until the store answers or is given up
                return self.news(self._limit_s)
            self._claim(Fault(ranks=tuple(gone), text=self.tell(gone), by=self._rank, step=self.step))
        return self.news()

    # -- the watch's own thread --------------------------------------------------------------------

    @property
    def _doubt_s(self) -> float:
        """After how long without a beat a rank is doubtful: three beats."""
        return max(3.0 * self._interval_s, 0.5)

    def _line(self, state: str = "") -> str:
        return f"{self._beat} {self.step} {state}"

    def _run(self) -> None:
        last_s = time.monotonic()
        while not self._stop.is_set():
            now_s = time.monotonic()
            if not self._is_over():
                # Not the whole gap: after a freeze of our own the others' beats look old, and are not.
                self._look(min(now_s - last_s, 2.0 * self._interval_s))
            last_s = now_s
            if self._fault is not None:
                self._end_if_blocked()
            until = time.monotonic() + self._interval_s
            while time.monotonic() < until and not self._wake.wait(_LOOK_S):
                if not self._board.is_open():
                    return
            self._wake.clear()
            if not self._board.is_open():
                return

    def _look(self, passed_s: float) -> None:
        """Beat, and read what the others wrote."""
        self._beat += 1
        others, era = list(self._peers), self._era
        keys = [_fault_key(era), *(f"watch/beat/{rank}" for rank in others)]
        limit_s = max(self._interval_s, 0.2)
        begin_s = time.monotonic()
        try:
            self._board.put(f"watch/beat/{self._rank}", self._line(), limit_s=limit_s)
            # The fault apart: as long as there is none, the beats are read in one exchange.
            fault, beats = self._board.look(keys[:1], limit_s=limit_s)[0], self._board.look(keys[1:], limit_s=limit_s)
            if len(self._store.hosts) < self._world_size:
                self._learn_hosts(limit_s)
        except TimeoutError:
            self._store.silent_s += passed_s + time.monotonic() - begin_s
            self._judge_silence()
            return
        except OSError as error:
            if self._board.is_open() and not self._stop.is_set():
                self._lose_store(f"the job's store is gone ({error})")
            return
        self._store.silent_s = 0.0
        if fault and self._fault is None and era == self._era:
            self._take(Fault.decode(fault))
        self._judge(dict(zip(others, beats, strict=True)), passed_s)
        if self._launcher is not None and os.getppid() != self._launcher and self._fault is None:
            text = f"its launcher (process {self._launcher}) has ended"
            self._claim(Fault(ranks=(self._rank,), text=f"rank {self._rank}: {text}", by=self._rank, step=self.step))

    def _host_of(self, rank: int) -> str:
        """Return where the board's host is, seen from a rank; empty if it is not known."""
        if self._store.hosts:
            return self._store.hosts[rank]
        return self._board.host() if rank == self._rank else ""

    def _is_over(self) -> bool:
        """Tell whether the board's host has left, and nothing runs here that it could be missed in."""
        left = [rank for rank, peer in self._peers.items() if peer.state]
        return not self.in_run and any(self._host_of(rank) == "this process" for rank in left)

    def _learn_hosts(self, limit_s: float) -> None:
        hosts = self._board.look([f"watch/host/{rank}" for rank in range(self._world_size)], limit_s=limit_s)
        if all(hosts):
            self._store.hosts = [host or "" for host in hosts]

    def _judge(self, beats: dict[int, str | None], passed_s: float) -> None:
        frozen = []
        for rank, line in beats.items():
            peer = self._peers[rank]
            if line is None:
                continue  # not there yet; whoever waits for it has a limit of its own
            number, step, state = line.split(" ", 2)
            if int(number) != peer.beat or state != peer.state:
                peer.beat, peer.step, peer.state, peer.stale_s = int(number), int(step), state, 0.0
            elif not state:
                peer.stale_s += passed_s
                if peer.stale_s >= self._limit_s - 2.0 * self._interval_s:
                    frozen.append(rank)
        # Those that are about to reach it are named as well: they have probably been lost together, as a host is.
        if any(self._peers[rank].stale_s >= self._limit_s for rank in frozen) and self._fault is None:
            self._claim(Fault(ranks=tuple(frozen), text=self.tell(frozen), by=self._rank, step=self.step))

    def _judge_silence(self) -> None:
        if self._store.silent_s >= self._limit_s and self._fault is None:
            self._lose_store(f"the job's store has not answered for {self._store.silent_s:.1f} s")

    def _lose_store(self, what: str) -> None:
        """Find out who is lost with the store; the others cannot be told, but find out in the same way."""
        hosts = self._store.hosts
        mine = self._host_of(self._rank)
        if mine == "elsewhere":
            lost = tuple(rank for rank, host in enumerate(hosts) if host in ("this process", "this machine"))
            where = "which is on another machine: that machine, or the link to it, is lost"
        else:
            lost = tuple(rank for rank, host in enumerate(hosts) if host == "this process" and rank != self._rank)
            where = "which it hosts: it froze or died" if lost else "which the launcher hosts: it froze or died"
        who = f", and with it rank{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))}" if lost else ""
        self._take(Fault(ranks=lost, text=f"{what}{who}, {where}", by=self._rank, step=self.step))

    def _claim(self, fault: Fault) -> None:
        """Write the fault down for the whole job, unless there is one; take over what stands. Any thread."""
        stands = fault
        with contextlib.suppress(OSError):
            limit_s = max(self._interval_s, 0.5)
            stands = Fault.decode(self._board.claim(_fault_key(self._era), fault.encode(), limit_s=limit_s))
        self._take(stands)

    def _take(self, fault: Fault) -> None:
        if self._fault is not None:
            return
        self._fault = fault
        if self._rank not in fault.ranks:
            _logger.error("rank %d, iteration %d: %s", self._rank, self.step, fault.error(self._rank))
        break_off = self._break_off() if self._break_off is not None else None
        if break_off is not None and self._rank not in fault.ranks:
            threading.Thread(target=break_off, name="distckpt-break-off", daemon=True).start()

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
        _logger.critical("%s", text.rstrip())
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)
            if error.__cause__ is not None:
                sys.stderr.write(f"{error.__cause__}\n")
            sys.stderr.flush()
            faulthandler.dump_traceback(all_threads=True)
        self.close(f"{type(error).__name__}")
        os._exit(EXIT_CODE)


class _Training:
    """The thread that trains, seen from beside it. Made on it."""

    def __init__(self) -> None:
        self._ident = threading.get_ident()
        self._stat = Path(f"/proc/self/task/{threading.get_native_id()}/stat")
        self._place: tuple[Any, ...] = ()
        self._since_s = time.monotonic()

    def stands_still_s(self) -> float:
        """Return for how long the thread has used no CPU and has been in one place, in seconds. Call it repeatedly."""
        frame = sys._current_frames().get(self._ident)  # noqa: SLF001 - the documented way to another thread's stack
        place = (self._cpu_ticks(), None if frame is None else (id(frame), frame.f_lasti))
        if place != self._place:
            self._place, self._since_s = place, time.monotonic()
        return time.monotonic() - self._since_s

    def is_in(self, folders: Sequence[str]) -> bool:
        """Tell whether the innermost Python function is defined in one of `folders`."""
        frame = sys._current_frames().get(self._ident)  # noqa: SLF001 - as above
        return frame is not None and any(folder in frame.f_code.co_filename for folder in folders)

    def _cpu_ticks(self) -> int:
        try:
            fields = self._stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:  # not Linux: the place in the program has to do
            return 0
        return int(fields[11]) + int(fields[12])


def ensure(backend: Backend, timeout_s: float | None) -> Watch | None:
    """Return the watch of this job, begun now if it was not before. Rank-local; the training thread.

    Args:
        backend: the job's.
        timeout_s: of the handler that asks: the shortest one is the limit; None for the default.

    Returns:
        None in a world of one, and where the runtime has no board.
    """
    if backend.world_size == 1:
        return None
    limit_s = default_timeout_s() if timeout_s is None else timeout_s
    watch = watch_of(backend)
    if watch is not None:
        watch.tighten(limit_s)
        return watch
    board = backend.board()
    if board is None:
        return None
    watch = Watch(board, backend.rank, backend.world_size, limit_s=limit_s, launcher=_launcher())
    backend.watcher = watch
    atexit.register(_close_if_alive, weakref.ref(watch))
    watch.start(backend)
    return watch


def watch_of(backend: Backend) -> Watch | None:
    """Return the watch of this job if it has begun."""
    return backend.watcher if isinstance(backend.watcher, Watch) else None


def _close_if_alive(watch: "weakref.ref[Watch]") -> None:
    alive = watch()
    if alive is not None:
        alive.close()


def _fault_key(era: int) -> str:
    """Return where the fault of an era is written: of the time between two runs that ended because a rank raised."""
    return f"watch/fault/{era}" if era else "watch/fault"


def _interval_s(limit_s: float, world_size: int) -> float:
    """Return how often to beat: a dozen times within the limit, at most each second, less often in a large world."""
    return max(min(1.0, limit_s / 12.0), world_size / 500.0)


def _launcher() -> int | None:
    """Return the process whose end leaves this rank an orphan: torchrun, or the process that spawned it."""
    import multiprocessing  # noqa: PLC0415 - for this question only

    is_launched = "TORCHELASTIC_RUN_ID" in os.environ or multiprocessing.parent_process() is not None
    return os.getppid() if is_launched else None
