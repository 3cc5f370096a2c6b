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
from distckpt.backends.control_group import ControlGroup, store_barrier
from distckpt.backends.gloo import GlooTransport
from distckpt.backends.torch_dist import TorchDistBackend


class Notes(KeyValueStore):
    """A board in memory that can be silent for a while.

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


class Told(PeerMonitor):
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
def board() -> Notes:
    """Return a board that answers."""
    return Notes()


@pytest.fixture
def group(board: Notes) -> ControlGroup:
    """Return rank 0 of two, not connected."""
    group = ControlGroup(GlooTransport(dist.HashStore(), 0, 2), lambda _what, _limit_s: board, 0, 2)
    group.find_store("a test", 1.0)
    return group


def operation(*, timeout_s: float = 5.0) -> Any:
    """Return an operation that never ends."""
    work = SimpleNamespace(is_completed=lambda: False)
    return control_group._Operation(work, "counting", timeout_s, 1, is_late=False)


def lost() -> RankLost:
    """Return what a monitor says."""
    return RankLost("rank 1 is lost", [1])


# -- a board that does not answer --------------------------------------------------------------------


def test_a_board_that_did_not_answer_is_asked_briefly_until_it_does(group: ControlGroup, board: Notes) -> None:
    board.num_silent = 2
    for _ in range(2):
        with pytest.raises(TimeoutError):
            group._who_gave_up()
    group._who_gave_up()
    group._who_gave_up()
    assert board.limits_s == [1.0, 0.25, 0.25, 1.0]


def test_giving_up_costs_little_where_the_board_is_silent(group: ControlGroup, board: Notes) -> None:
    board.num_silent = 100
    with pytest.raises(TimeoutError):
        group._who_gave_up()
    assert group._verdict(operation(), "given up") == "given up"
    group._give_up("counting", [1])
    assert sum(board.limits_s) == 1.5


def test_whether_an_operation_is_done_is_asked_with_patience(group: ControlGroup, board: Notes) -> None:
    board.num_silent = 1
    with pytest.raises(TimeoutError):
        group._who_gave_up()
    board.notes["host/verdict/1"] = "given up"
    assert group._verdict(operation(), "done") == "given up"
    assert board.limits_s == [1.0, 1.0]


def test_who_is_missing_is_found_out_when_the_board_answers_again(group: ControlGroup, board: Notes) -> None:
    group.monitor = Told()
    board.num_silent = 3
    assert group._who_is_missing(operation(), 0.1) == [1]
    assert board.notes["host/came/1/0"] == "counting"


def test_the_watchers_news_ends_the_wait_for_a_silent_board(group: ControlGroup, board: Notes) -> None:
    error = lost()
    group.monitor = Told(error, num_asked=3)
    board.num_silent = 1000
    with pytest.raises(RankLost) as caught:
        group._who_is_missing(operation(), 60.0)
    assert caught.value is error


@pytest.mark.parametrize("monitor", [None, Told()], ids=["nobody watches", "nothing is known"])
def test_a_board_that_stays_silent_ends_the_wait_in_the_end(
    group: ControlGroup, board: Notes, monitor: Told | None
) -> None:
    group.monitor = monitor
    board.num_silent = 1000
    with pytest.raises(TimeoutError):
        group._who_is_missing(operation(timeout_s=0.1), 60.0)
    assert (board.num_silent == 999) == (monitor is None)


# -- rolls -------------------------------------------------------------------------------------------


def test_a_roll_outlasts_news_that_cannot_be_read(board: Notes) -> None:
    answers = iter([TimeoutError("no answer"), TimeoutError("no answer")])

    def watch() -> str | None:
        for error in answers:
            board.add("roll/num_here", 1, limit_s=1.0)
            raise error
        return None

    assert store_barrier(board, "roll", 0, 2, what="a meeting", timeout_s=5.0, watch=watch) is None


def backend_over(board: Notes, monitor: PeerMonitor | None) -> TorchDistBackend:
    """Return rank 0 of two, without a process group."""
    backend = TorchDistBackend.__new__(TorchDistBackend)
    ControlGroupBackend.__init__(backend, 0, 2)
    host = SimpleNamespace(refuse_if_given_up=lambda _what: None, find_store=lambda _what, _limit_s: None, monitor=None)
    vars(backend).update(_make_store=lambda _what, _limit_s: board, _control_group=host)
    backend.monitor = monitor
    return backend


@pytest.mark.parametrize("num_answers", [0, 1, 3], ids=["at its begin", "when it is counted", "later"])
def test_a_roll_that_loses_the_board_says_what_the_watcher_knows(board: Notes, num_answers: int) -> None:
    error = lost()
    backend = backend_over(board, Told(error, num_asked=0 if num_answers < 3 else 1))
    ask = board._answer

    def answer(limit_s: float) -> None:
        board.num_silent = int(len(board.limits_s) >= num_answers)
        ask(limit_s)

    vars(board)["_answer"] = answer
    with pytest.raises(RankLost) as caught:
        backend.store_barrier("a meeting", depends_on=None, timeout_s=0.2)
    assert caught.value is error


def test_a_roll_that_loses_the_board_says_so_where_nobody_watches(board: Notes) -> None:
    board.num_silent = 1000
    with pytest.raises(CollectiveError, match="lost the job's store during a meeting"):
        backend_over(board, None).store_barrier("a meeting", depends_on=None, timeout_s=0.2)


def test_a_rank_that_does_not_come_to_a_roll_is_named_without_the_watcher(board: Notes) -> None:
    with pytest.raises(CollectiveTimeout) as caught:
        backend_over(board, Told()).store_barrier("a meeting", depends_on=None, timeout_s=0.1)
    assert caught.value.missing == (1,)


# -- its end -----------------------------------------------------------------------------------------


class Connected:
    """Stands in for the group of Gloo's."""


@pytest.mark.parametrize("is_stuck", [True, False])
def test_a_group_is_not_let_go_while_something_is_under_way(
    board: Notes, monkeypatch: pytest.MonkeyPatch, *, is_stuck: bool
) -> None:
    monkeypatch.setattr(gloo, "_LEAVE_S", 0.05)
    transport, connected = GlooTransport(dist.HashStore(), 0, 2), Connected()
    seen = weakref.ref(connected)
    transport._group = connected
    transport._under_way.append(SimpleNamespace(is_completed=lambda: not is_stuck))
    del connected
    ControlGroup(transport, lambda _what, _limit_s: board, 0, 2).close()
    gc.collect()
    assert (seen() is not None) == is_stuck
    assert transport._group is None
