"""A rank's knowledge of the others: heartbeats, processes, the host of the key-value store, and the failure of the job.

The operating system reports the end of a process on this machine at once and for certain. A missing heartbeat proves
much less, but nothing else is known of a rank on another machine.
"""

import contextlib
import json
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distckpt.errors import DistckptError, RankFailure, RankLost, RemoteTraceback, remote_rank_error

RUNNING, IDLE, LEFT = "running", "idle", "left"
"""A rank's state: an engine runs; its run has ended; the rank has left the job, for the reason that follows."""

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = Path("/proc/self/ns/pid")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFailure:
    """Why a job cannot go on, in a form that ranks exchange.

    Attributes:
        ranks: the ranks that are lost, or the rank that raised.
        text: what happened.
        by: the rank that found out.
        step: its iteration, as far as known.
        failure: the exception, if a rank raised one.
    """

    ranks: tuple[int, ...]
    text: str
    by: int
    step: int
    failure: RankFailure | None = None

    def encode(self) -> str:
        """Return the failure as JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: str) -> "JobFailure":
        """Return the failure that :meth:`encode` wrote."""
        fields = json.loads(text)
        failure = fields.pop("failure")
        if failure is not None:
            failure = RankFailure(**{**failure, "kinds": tuple(failure["kinds"])})
        return JobFailure(**{**fields, "ranks": tuple(fields["ranks"])}, failure=failure)

    def error(self, rank: int) -> DistckptError:
        """Return the error that `rank` raises."""
        if self.failure is not None and rank not in self.ranks:
            error: DistckptError = remote_rank_error(f"iteration {self.step}", [self.failure])
            error.__cause__ = RemoteTraceback(f"--- rank {self.failure.rank} ---\n{self.failure.traceback}")
            return error
        if rank in self.ranks:
            why = "it raised earlier" if self.failure else "the other ranks have given it up"
            return RankLost(f"rank {rank} cannot go on, {why}: {self.text}", self.ranks)
        return RankLost(f"rank {rank}: {self.text}. The job cannot go on.", self.ranks)


def encode_heartbeat(number: int, step: int, state: str, *, knows_failure: bool) -> str:
    """Return a heartbeat: its number, the rank's iteration, whether it knows of the job's failure, and its state."""
    return f"{number} {step} {knows_failure:d} {state}"


@dataclass(slots=True)
class _Peer:
    """What is known of one rank."""

    heartbeat: int = -1  # number of its last one
    step: int = 0  # its iteration then
    state: str = RUNNING
    knows_failure: bool = False
    stale_s: float = 0.0  # seconds without a new heartbeat
    has_ended: bool = False  # its process

    @property
    def has_left(self) -> bool:
        # A failure only if a rank waits for it.
        return self.state.startswith(LEFT) or (self.state == IDLE and self.has_ended)

    @property
    def is_dead(self) -> bool:
        return self.has_ended and self.state == RUNNING

    def update(self, text: str, elapsed_s: float) -> None:
        number, step, knows_failure, state = text.split(" ", 3)
        if int(number) != self.heartbeat or state != self.state:
            self.heartbeat, self.step, self.state, self.stale_s = int(number), int(step), state, 0.0
        elif state == RUNNING:
            self.stale_s += elapsed_s
        self.knows_failure = knows_failure == "1"

    def describe(self, doubt_s: float) -> str:
        """Return what is known, as a predicate. After `doubt_s` seconds without a heartbeat it is not called alive."""
        last = f"its last one was at iteration {self.step}"
        if self.state.startswith(LEFT):
            text = f"has left at iteration {self.step}: {self.state.removeprefix(LEFT).removeprefix(': ')}"
        elif self.has_ended:
            where = f"at iteration {self.step}, " if self.heartbeat >= 0 else ""
            text = f"died: its process has ended, {where}without a farewell"
        elif self.heartbeat < 0:
            text = "has never sent a heartbeat"
        elif self.state == IDLE:
            text = f"is alive but has ended its run, at iteration {self.step}"
        elif self.stale_s > doubt_s:
            text = f"froze or died: no heartbeat for {self.stale_s:.1f} s, {last}"
        else:
            text = f"is alive but late: its heartbeat is fresh, {last}"
        return text


class Peers:
    """What is known of all other ranks."""

    def __init__(self, ranks: Iterable[int]) -> None:
        self._peers = {rank: _Peer() for rank in ranks}
        self._processes: _Processes | None = None
        self.ranks = list(self._peers)

    def __getitem__(self, rank: int) -> _Peer:
        return self._peers[rank]

    def watch_processes(self, locations: Mapping[int, str]) -> None:
        """Watch the processes of the ranks on this machine from now on; see :func:`process_location`."""
        if self._processes is None:
            self._processes = _Processes({rank: location for rank, location in locations.items() if location})

    def check_processes(self) -> None:
        """Find out which processes have ended.

        IMPORTANT: call it before the heartbeats are read. Then the heartbeat of an ended process is its last one.
        """
        for rank in () if self._processes is None else self._processes.ended():
            self._peers[rank].has_ended = True

    def update(self, texts: Iterable[str | None], elapsed_s: float) -> None:
        """Take over the heartbeats, in the order of `ranks`. None stands for a rank that has not sent one yet."""
        for rank, text in zip(self.ranks, texts, strict=True):
            if text is not None:
                self._peers[rank].update(text, elapsed_s)

    def gone(self) -> list[int]:
        """Return the ranks that have left or died."""
        return [rank for rank, peer in self._peers.items() if peer.has_left or peer.is_dead]

    def dead(self) -> list[int]:
        """Return the ranks whose processes ended during a run, without a farewell."""
        return [rank for rank, peer in self._peers.items() if peer.is_dead]

    def frozen(self, limit_s: float, slack_s: float) -> list[int]:
        """Return the ranks without a heartbeat for `limit_s`.

        If there is one, ranks that reach the limit within `slack_s` are included: all ranks of a lost host are named.
        """
        running = {rank: peer.stale_s for rank, peer in self._peers.items() if peer.state == RUNNING}
        stale = [rank for rank, stale_s in running.items() if stale_s >= limit_s - slack_s]
        return stale if any(running[rank] >= limit_s for rank in stale) else []

    def unaware(self) -> set[int]:
        """Return the running ranks that do not know of a failure yet."""
        return {
            rank
            for rank, peer in self._peers.items()
            if peer.state == RUNNING and peer.heartbeat >= 0 and not peer.knows_failure and not peer.has_ended
        }

    def describe(self, ranks: Iterable[int], doubt_s: float) -> str:
        """Return what is known of some ranks, as text."""
        return "; ".join(f"rank {rank} {self._peers[rank].describe(doubt_s)}" for rank in ranks if rank in self._peers)

    def close(self) -> None:
        """Close the file descriptors."""
        if self._processes is not None:
            self._processes.close()


@dataclass(slots=True)
class StoreHost:
    """What is known of the host of the key-value store.

    Attributes:
        rank: this rank.
        silent_s: seconds without an answer of the store.
        is_gone: whether the store has closed the connection.
        hosts: each rank's :meth:`~distckpt.backends.base.KeyValueStore.host`; empty until all are known.
    """

    rank: int
    silent_s: float = 0.0
    is_gone: bool = False
    hosts: list[str] = field(default_factory=list)

    def lost(self, get_host: Callable[[], str]) -> tuple[tuple[int, ...], str]:
        """Return the ranks that are lost with the store, and text that continues "the store is gone".

        Args:
            get_host: returns this rank's entry while `hosts` is empty.
        """
        mine = self.hosts[self.rank] if self.hosts else get_host()
        kinds = ("this process", "this machine") if mine == "elsewhere" else ("this process",)
        ranks = tuple(rank for rank, host in enumerate(self.hosts) if host in kinds and rank != self.rank)
        if mine == "elsewhere":
            where = "which is on another machine: that machine, or the link to it, is lost"
        else:
            where = "which it hosts: it froze or died" if ranks else "which the launcher hosts: it froze or died"
        who = f", and with it rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}" if ranks else ""
        return ranks, f"{who}, {where}"


def process_location() -> str:
    """Return this process's id, and text that is equal for all processes that can find it by that id."""
    try:
        return f"{os.getpid()} {_BOOT.read_text(encoding='ascii').strip()} {_NAMESPACE.readlink()}"
    except OSError:  # not Linux
        return f"{os.getpid()} nowhere"


class _Processes:
    """Watches the processes of the ranks on this machine, given each rank's :func:`process_location`."""

    def __init__(self, locations: Mapping[int, str]) -> None:
        self._ended: set[int] = set()
        self._fds: dict[int, int] = {}
        _, _, here = process_location().partition(" ")
        for rank, location in locations.items():
            pid, _, where = location.partition(" ")
            if where != here or where == "nowhere":
                continue
            try:
                self._fds[rank] = os.pidfd_open(int(pid))
            except ProcessLookupError:
                self._ended.add(rank)
            except (OSError, AttributeError):  # no such call here: only heartbeats are left
                return

    def ended(self) -> set[int]:
        poll = select.poll()
        for fd in self._fds.values():
            poll.register(fd, select.POLLIN)
        readable = {fd for fd, _ in poll.poll(0)}
        self._ended |= {rank for rank, fd in self._fds.items() if fd in readable}
        return self._ended

    def close(self) -> None:
        while self._fds:
            with contextlib.suppress(OSError):
                os.close(self._fds.popitem()[1])


class TrainingThread:
    """The training thread, observed from another thread. Constructed on the training thread."""

    def __init__(self) -> None:
        self._thread = threading.current_thread()
        self._ident = threading.get_ident()
        self._stat = Path(f"/proc/self/task/{threading.get_native_id()}/stat")
        self._position: tuple[Any, ...] = ()
        self._since_s = time.monotonic()

    def is_alive(self) -> bool:
        """Return True until the thread has ended."""
        return self._thread.is_alive()

    def blocked_s(self) -> float:
        """Return for how many seconds the thread has used no CPU and has not moved. Call it repeatedly."""
        frame = sys._current_frames().get(self._ident)  # noqa: SLF001 - the documented way to another thread's stack
        position = (self._cpu_ticks(), None if frame is None else (id(frame), frame.f_lasti))
        if position != self._position:
            self._position, self._since_s = position, time.monotonic()
        return time.monotonic() - self._since_s

    def is_in(self, folders: Sequence[str]) -> bool:
        """Return True if the innermost Python function is defined in one of `folders`."""
        frame = sys._current_frames().get(self._ident)  # noqa: SLF001 - as above
        return frame is not None and any(folder in frame.f_code.co_filename for folder in folders)

    def _cpu_ticks(self) -> int:
        try:
            fields = self._stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:  # not Linux: only the position in the program is left
            return 0
        return int(fields[11]) + int(fields[12])
