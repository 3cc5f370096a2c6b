"""Jobs of several ranks in one process, for the tests of the heartbeat: a clock that is set, and a store."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest

from distckpt import DistckptError
from distckpt.backends.base import KeyValueStore
from distckpt.backends.serial import SerialBackend
from distckpt.coordination import heartbeat as heartbeat_module
from distckpt.coordination.heartbeat import HeartbeatMonitor

LIMIT_S = 12.0  # beats once a second


class Clock:
    """Time, which passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.on_sleep: Callable[[], None] = lambda: None

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        """Pass; others may act meanwhile."""
        self.now_s += seconds
        self.on_sleep()


class FakeStore(KeyValueStore):
    """One rank's store, over notes that all ranks share.

    Args:
        notes: the notes.
        clock: by which a store that does not answer keeps its callers waiting.
        host: what it says of where it is kept.
    """

    def __init__(self, notes: dict[str, str], clock: Clock, host: str = "") -> None:
        self._notes, self._clock, self._host = notes, clock, host
        self.is_silent = self.is_gone = self.is_closed = False

    def set(self, key: str, text: str, *, limit_s: float) -> None:
        self._answer(limit_s)
        self._notes[key] = text

    def set_default(self, key: str, text: str, *, limit_s: float) -> str:
        self._answer(limit_s)
        self._notes[key] = self._notes.get(key) or text
        return self._notes[key]

    def get_many(self, keys: Sequence[str], *, limit_s: float) -> list[str | None]:
        self._answer(limit_s)
        return [self._notes.get(key) for key in keys]

    def add(self, key: str, amount: int, *, limit_s: float) -> int:
        self._answer(limit_s)
        self._notes[key] = str(int(self._notes.get(key, "0")) + amount)
        return int(self._notes[key])

    def is_open(self) -> bool:
        return not self.is_closed

    def host(self) -> str:
        return self._host

    def _answer(self, limit_s: float) -> None:
        if self.is_gone:
            raise ConnectionError("Broken pipe")
        if self.is_silent:
            self._clock.now_s += limit_s
            raise TimeoutError("no answer")


class Job:
    """Monitors of several ranks over the same store, each of which checks when texts."""

    def __init__(
        self, clock: Clock, world_size: int = 3, hosts: Sequence[str] = (), launcher: int | None = None
    ) -> None:
        self.clock = clock
        self.notes: dict[str, str] = {}
        hosts = hosts or [""] * world_size
        self.stores = [FakeStore(self.notes, clock, host) for host in hosts]
        self.monitors = [
            HeartbeatMonitor(store, rank, world_size, limit_s=LIMIT_S, launcher=launcher)
            for rank, store in enumerate(self.stores)
        ]
        for rank, host in enumerate(hosts):
            self.notes[f"heartbeat/host/{rank}"] = host or "nowhere"

    def check(self, ranks: Sequence[int] | None = None, *, times: int = 1, every_s: float = 1.0) -> None:
        """Let some ranks check, several times."""
        for _ in range(times):
            self.clock.now_s += every_s
            for rank in range(len(self.monitors)) if ranks is None else ranks:
                self.monitors[rank]._check(every_s)


class Rank(SerialBackend):
    """A backend that a monitor can begin with."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return the module's clock."""
    hands = Clock()
    monkeypatch.setattr(heartbeat_module, "time", SimpleNamespace(monotonic=hands.monotonic, sleep=hands.sleep))
    return hands


@pytest.fixture
def job(clock: Clock) -> Job:
    """Return a job of three ranks that have seen each other."""
    three = Job(clock)
    three.check(times=2)
    return three


def end_process(job: Job, ended: int) -> None:
    """End a rank's process, as the others see it."""
    for rank, monitor in enumerate(job.monitors):
        if rank != ended:
            vars(monitor._peers)["_processes"] = SimpleNamespace(ended=lambda: {ended}, close=lambda: None)


def error_of(monitor: HeartbeatMonitor) -> DistckptError:
    """Return the error that a waiting rank is texts."""
    error = monitor.failure()
    assert error is not None
    return error


class Pause:
    """Stands in for the event on which the monitor's thread sleeps: the clock goes on, nobody waits."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def wait(self, seconds: float) -> bool:
        """Sleep."""
        self._clock.sleep(seconds)
        return False

    def set(self) -> None:
        """Nobody sleeps."""

    def clear(self) -> None:
        """Nothing is ever set."""
