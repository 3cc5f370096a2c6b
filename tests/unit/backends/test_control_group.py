"""ControlGroup and store barriers over a store that does not answer for a while, and costs no seconds meanwhile."""

import gc
import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from distckpt import CollectiveError, CollectiveTimeout, DistckptError, RankLost
from distckpt.backends import control_group, gloo
from distckpt.backends.base import KeyValueStore, PeerMonitor
from distckpt.backends.control_backend import ControlGroupBackend
from distckpt.backends.control_group import ControlGroup
from distckpt.backends.gloo import GlooTransport
from distckpt.backends.store_notes import store_barrier
from distckpt.backends.torch_dist import TorchDistBackend


class FakeStore(KeyValueStore):
    """A store in memory that can be silent for a while.

    Attributes:
        num_silent: so many of the next calls are not answered.
        limits_s: how long each caller was ready to wait.
    """

    def __init__(self, num_silent: int = 0) -> None:
        self.notes: dict[str, str] = {}
        self.num_silent = num_silent
        self.limits_s: list[float] = []

    def set(self, key: str, text: str, *, limit_s: float) -> None:
        self._answer(limit_s)
        self.notes[key] = text

    def set_default(self, key: str, text: str, *, limit_s: float) -> str:
        self._answer(limit_s)
        self.notes[key] = self.notes.get(key) or text
        return self.notes[key]

    def get_many(self, keys: Sequence[str], *, limit_s: float) -> list[str | None]:
        self._answer(limit_s)
        return [self.notes.get(key) for key in keys]

    def add(self, key: str, amount: int, *, limit_s: float) -> int:
        self._answer(limit_s)
        self.notes[key] = str(int(self.notes.get(key, "0")) + amount)
        return int(self.notes[key])

    def is_open(self) -> bool:
        return True

    def host(self) -> str:
        return ""

    def _answer(self, limit_s: float) -> None:
        self.limits_s.append(limit_s)
        if self.num_silent:
            self.num_silent -= 1
            raise TimeoutError("no answer")


class FakeMonitor(PeerMonitor):
    """A monitor that knows something after it was asked a few times.

    Args:
        error: what it knows.
        num_asked: how often it is asked in vain.
    """

    def __init__(self, error: DistckptError | None = None, num_asked: int = 0) -> None:
        self._error, self._num_asked = error, num_asked

    def failure(self, wait_s: float = 0.0) -> DistckptError | None:
        del wait_s
        self._num_asked -= 1
        return self._error if self._num_asked < 0 else None

    def describe(self, ranks: Sequence[int]) -> str:
        return "" if ranks else "nobody"


@pytest.fixture
def store() -> FakeStore:
    """Return a store that answers."""
    return FakeStore()


@pytest.fixture
def group(store: FakeStore) -> ControlGroup:
    """Return rank 0 of two, not connected."""
    group = ControlGroup(GlooTransport(dist.HashStore(), 0, 2), lambda _what, _limit_s: store, 0, 2)
    group.find_store("a test", 1.0)
    return group


def operation(*, timeout_s: float = 5.0) -> Any:
    """Return an operation that never ends."""
    work = SimpleNamespace(is_completed=lambda: False)
    return control_group._Operation(work, "counting", timeout_s, 1, was_idle=False)


def lost() -> RankLost:
    """Return what a monitor says."""
    return RankLost("rank 1 is lost", [1])


# -- a store that does not answer --------------------------------------------------------------------


def test_a_store_that_did_not_answer_is_asked_briefly_until_it_does(group: ControlGroup, store: FakeStore) -> None:
    store.num_silent = 2
    for _ in range(2):
        with pytest.raises(TimeoutError):
            group._notes.read_abort()
    group._notes.read_abort()
    group._notes.read_abort()
    assert store.limits_s == [1.0, 0.25, 0.25, 1.0]


def test_aborting_costs_little_where_the_store_is_silent(group: ControlGroup, store: FakeStore) -> None:
    store.num_silent = 100
    with pytest.raises(TimeoutError):
        group._notes.read_abort()
    assert group._notes.decide_outcome(1, "aborted") == "aborted"
    group._abort("counting", [1])
    assert sum(store.limits_s) == 1.5


def test_whether_an_operation_is_done_is_asked_with_patience(group: ControlGroup, store: FakeStore) -> None:
    store.num_silent = 1
    with pytest.raises(TimeoutError):
        group._notes.read_abort()
    store.notes["control/outcome/1"] = "aborted"
    assert group._notes.decide_outcome(1, "done") == "aborted"
    assert store.limits_s == [1.0, 1.0]


def test_who_is_missing_is_found_out_when_the_store_answers_again(group: ControlGroup, store: FakeStore) -> None:
    group.monitor = FakeMonitor()
    store.num_silent = 3
    assert group._find_missing(operation(), 0.1) == [1]
    assert store.notes["control/arrived/1/0"] == "counting"


def test_the_monitors_failure_ends_the_wait_for_a_silent_store(group: ControlGroup, store: FakeStore) -> None:
    error = lost()
    group.monitor = FakeMonitor(error, num_asked=3)
    store.num_silent = 1000
    with pytest.raises(RankLost) as caught:
        group._find_missing(operation(), 60.0)
    assert caught.value is error


@pytest.mark.parametrize("monitor", [None, FakeMonitor()], ids=["no monitor", "nothing is known"])
def test_a_store_that_stays_silent_ends_the_wait_in_the_end(
    group: ControlGroup, store: FakeStore, monitor: FakeMonitor | None
) -> None:
    group.monitor = monitor
    store.num_silent = 1000
    with pytest.raises(TimeoutError):
        group._find_missing(operation(timeout_s=0.1), 60.0)
    assert (store.num_silent == 999) == (monitor is None)


# -- barriers -------------------------------------------------------------------------------------------


def test_a_barrier_outlasts_a_check_that_cannot_be_read(store: FakeStore) -> None:
    answers = iter([TimeoutError("no answer"), TimeoutError("no answer")])

    def check() -> str | None:
        for error in answers:
            store.add("barrier/num_here", 1, limit_s=1.0)
            raise error
        return None

    assert store_barrier(store, "barrier", 0, 2, what="a barrier", timeout_s=5.0, check=check) is None


def backend_over(store: FakeStore, monitor: PeerMonitor | None) -> TorchDistBackend:
    """Return rank 0 of two, without a process group."""
    backend = TorchDistBackend.__new__(TorchDistBackend)
    ControlGroupBackend.__init__(backend, 0, 2, 0, 0)
    host = SimpleNamespace(raise_if_aborted=lambda _what: None, find_store=lambda _what, _limit_s: None, monitor=None)
    vars(backend).update(_make_store=lambda _what, _limit_s: store, _control_group=host)
    backend.monitor = monitor
    return backend


@pytest.mark.parametrize("num_answers", [0, 1, 3], ids=["at its begin", "when it is counted", "later"])
def test_a_barrier_that_loses_the_store_says_what_the_monitor_knows(store: FakeStore, num_answers: int) -> None:
    error = lost()
    backend = backend_over(store, FakeMonitor(error, num_asked=0 if num_answers < 3 else 1))
    ask = store._answer

    def answer(limit_s: float) -> None:
        store.num_silent = int(len(store.limits_s) >= num_answers)
        ask(limit_s)

    vars(store)["_answer"] = answer
    with pytest.raises(RankLost) as caught:
        backend.store_barrier("a barrier", depends_on=None, timeout_s=0.2)
    assert caught.value is error


def test_a_barrier_that_loses_the_store_says_so_without_a_monitor(store: FakeStore) -> None:
    store.num_silent = 1000
    with pytest.raises(CollectiveError, match="lost the job's store during a barrier"):
        backend_over(store, None).store_barrier("a barrier", depends_on=None, timeout_s=0.2)


def test_a_rank_that_does_not_come_to_a_barrier_is_named_without_the_monitor(store: FakeStore) -> None:
    with pytest.raises(CollectiveTimeout) as caught:
        backend_over(store, FakeMonitor()).store_barrier("a barrier", depends_on=None, timeout_s=0.1)
    assert caught.value.missing == (1,)


# -- its end -----------------------------------------------------------------------------------------


class Connected:
    """Stands in for the group of Gloo's."""


@pytest.mark.parametrize("is_stuck", [True, False])
def test_a_group_is_kept_while_something_is_pending(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch, *, is_stuck: bool
) -> None:
    monkeypatch.setattr(gloo, "_CLOSE_LIMIT_S", 0.05)
    transport, connected = GlooTransport(dist.HashStore(), 0, 2), Connected()
    seen = weakref.ref(connected)
    transport._group = connected
    transport._pending.append(SimpleNamespace(is_completed=lambda: not is_stuck))
    del connected
    ControlGroup(transport, lambda _what, _limit_s: store, 0, 2).close()
    gc.collect()
    assert (seen() is not None) == is_stuck
    assert transport._group is None
