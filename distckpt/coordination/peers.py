"""What one rank knows of the others: their heartbeats, whether their processes live, and who hosts the board.

Owns what a heartbeat says, and how long one may stay away. Must not know where it is read from.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from distckpt.coordination.processes import Processes

__all__ = ["IDLE", "LEFT", "RUNS", "BoardHost", "Peer", "Peers", "heartbeat"]

RUNS, IDLE, LEFT = "runs", "idle", "left"
"""What a rank is at: an engine runs; its run has ended; it has left the job, for the reason that follows."""


def heartbeat(number: int, step: int, state: str, *, knows: bool) -> str:
    """Return a heartbeat's text: its number, the rank's iteration, whether it knows of a fault, what it is at."""
    return f"{number} {step} {knows:d} {state}"


@dataclass(slots=True)
class Peer:
    """What is known of one rank.

    Attributes:
        beat: number of its last heartbeat; -1 before the first one.
        step: its iteration then.
        state: what it was at.
        knows: whether it knows of the job's fault.
        stale_s: how long no new one has come.
        has_ended: its process is no more.
    """

    beat: int = -1
    step: int = 0
    state: str = RUNS
    knows: bool = False
    stale_s: float = 0.0
    has_ended: bool = False

    @property
    def has_left(self) -> bool:
        """Whether it will not come again, which is no fault as long as nobody waits for it."""
        return self.state.startswith(LEFT) or (self.state == IDLE and self.has_ended)

    @property
    def is_dead(self) -> bool:
        """Whether it ended in the middle of a run, without a word."""
        return self.has_ended and self.state == RUNS

    def read(self, text: str, passed_s: float) -> None:
        """Take over what its last heartbeat says, `passed_s` seconds after it was read the last time."""
        number, step, knows, state = text.split(" ", 3)
        if int(number) != self.beat or state != self.state:
            self.beat, self.step, self.state, self.stale_s = int(number), int(step), state, 0.0
        elif state == RUNS:
            self.stale_s += passed_s
        self.knows = knows == "1"

    def tell(self, doubt_s: float) -> str:
        """Return what is known, as a predicate.

        Args:
            doubt_s: after how long without a heartbeat it is no longer called alive.
        """
        was = f"its last one was at iteration {self.step}"
        if self.state.startswith(LEFT):
            told = f"has left at iteration {self.step}: {self.state.removeprefix(LEFT).removeprefix(': ')}"
        elif self.has_ended:
            where = f"at iteration {self.step}, " if self.beat >= 0 else ""
            told = f"died: its process has ended, {where}without a word"
        elif self.beat < 0:
            told = "has never given a sign of life"
        elif self.state == IDLE:
            told = f"is alive but has ended its run, at iteration {self.step}"
        elif self.stale_s > doubt_s:
            told = f"froze or died: no heartbeat for {self.stale_s:.1f} s, {was}"
        else:
            told = f"is alive but late: its heartbeat is fresh, {was}"
        return told


class Peers:
    """What is known of all other ranks.

    Args:
        ranks: the others.
    """

    def __init__(self, ranks: Iterable[int]) -> None:
        self._peers = {rank: Peer() for rank in ranks}
        self._processes: Processes | None = None
        self.ranks = list(self._peers)

    def __getitem__(self, rank: int) -> Peer:
        return self._peers[rank]

    def watch_processes(self, places: Mapping[int, str]) -> None:
        """Watch the processes of those ranks that are on this machine, from now on."""
        if self._processes is None:
            self._processes = Processes({rank: place for rank, place in places.items() if place})

    def look_at_processes(self) -> None:
        """Find out which processes have ended.

        IMPORTANT: before the heartbeats are read, so that those of a rank that has ended are its last ones.
        """
        for rank in () if self._processes is None else self._processes.ended():
            self._peers[rank].has_ended = True

    def read(self, texts: Iterable[str | None], passed_s: float) -> None:
        """Take over the heartbeats, in the order of `ranks`."""
        for rank, text in zip(self.ranks, texts, strict=True):
            if text is not None:  # not there yet; whoever waits for it has a limit of its own
                self._peers[rank].read(text, passed_s)

    def gone(self) -> list[int]:
        """Return the ranks that will not come again: those that have left, or died."""
        return [rank for rank, peer in self._peers.items() if peer.has_left or peer.is_dead]

    def dead(self) -> list[int]:
        """Return the ranks that died."""
        return [rank for rank, peer in self._peers.items() if peer.is_dead]

    def frozen(self, limit_s: float, slack_s: float) -> list[int]:
        """Return the ranks without a heartbeat for `limit_s`.

        With them those that are about to reach it, within `slack_s`: they have probably been lost together, as a host
        is.
        """
        stale = [rank for rank, peer in self._peers.items() if peer.state == RUNS and peer.stale_s >= limit_s - slack_s]
        return stale if any(self._peers[rank].stale_s >= limit_s for rank in stale) else []

    def unaware(self) -> set[int]:
        """Return the ranks in a run that do not know of a fault yet."""
        return {
            rank
            for rank, peer in self._peers.items()
            if peer.state == RUNS and peer.beat >= 0 and not peer.knows and not peer.has_ended
        }

    def tell(self, ranks: Iterable[int], doubt_s: float) -> str:
        """Return what is known of some ranks, as a phrase."""
        return "; ".join(f"rank {rank} {self._peers[rank].tell(doubt_s)}" for rank in ranks if rank in self._peers)

    def close(self) -> None:
        """Let go of the file descriptors."""
        if self._processes is not None:
            self._processes.close()


@dataclass(slots=True)
class BoardHost:
    """What is known of the board's own host.

    Attributes:
        rank: this rank.
        silent_s: for how long the board has not answered.
        is_gone: it has hung up.
        hosts: what each rank says of where it is kept (:meth:`~distckpt.backends.base.Board.host`); empty until it is
            known of all.
    """

    rank: int
    silent_s: float = 0.0
    is_gone: bool = False
    hosts: list[str] = field(default_factory=list)

    def lost(self, seen_from_here: Callable[[], str]) -> tuple[tuple[int, ...], str]:
        """Return which ranks are lost where the board is, and that as text which goes on "the board is gone".

        Args:
            seen_from_here: tells where it is kept, if that is not known of all ranks.
        """
        mine = self.hosts[self.rank] if self.hosts else seen_from_here()
        kinds = ("this process", "this machine") if mine == "elsewhere" else ("this process",)
        ranks = tuple(rank for rank, host in enumerate(self.hosts) if host in kinds and rank != self.rank)
        if mine == "elsewhere":
            where = "which is on another machine: that machine, or the link to it, is lost"
        else:
            where = "which it hosts: it froze or died" if ranks else "which the launcher hosts: it froze or died"
        who = f", and with it rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}" if ranks else ""
        return ranks, f"{who}, {where}"
