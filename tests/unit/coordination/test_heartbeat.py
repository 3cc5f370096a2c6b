"""HeartbeatMonitor: finds out which ranks are missing. With a store in memory and a clock that the tests turn."""

import contextlib
import faulthandler
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from distckpt import CollectiveError, CollectiveTimeout, DistckptError, RankLost, RemoteRankError
from distckpt.backends.base import KeyValueStore
from distckpt.backends.serial import SerialBackend
from distckpt.coordination import heartbeat as heartbeat_module
from distckpt.coordination.heartbeat import EXIT_CODE, HeartbeatMonitor
from distckpt.coordination.peers import JobFailure, TrainingThread
from distckpt.errors import RankFailure, RemoteTraceback

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


# -- frozen, late, left ------------------------------------------------------------------------------


def test_ranks_that_beat_are_left_in_peace(job: Job) -> None:
    job.check(times=50)
    assert [monitor.failure() for monitor in job.monitors] == [None] * 3


def test_a_rank_whose_beat_stands_still_for_the_limit_is_lost_for_all(job: Job) -> None:
    job.monitors[2].step = 7
    job.check()
    job.check([0, 1], times=11)
    assert job.monitors[0].failure() is None
    job.check([0, 1], times=2)
    for monitor in job.monitors[:2]:
        error = error_of(monitor)
        assert isinstance(error, RankLost)
        assert error.missing == (2,)
        assert "rank 2" in str(error)
        assert "no heartbeat for 12.0 s" in str(error)
        assert "iteration 7" in str(error)


def test_a_rank_that_was_given_up_is_told_so_when_it_wakes(job: Job) -> None:
    job.check([0, 1], times=13)
    job.check()
    error = error_of(job.monitors[2])
    assert isinstance(error, RankLost)
    assert "given it up" in str(error)
    assert error.missing == (2,)


def test_several_frozen_ranks_are_named_together(job: Job) -> None:
    job.check([0], times=13)
    assert isinstance(error := error_of(job.monitors[0]), RankLost)
    assert error.missing == (1, 2)


def test_ranks_that_are_about_to_reach_the_limit_are_named_with_those_that_have(job: Job) -> None:
    job.check([0, 1])
    job.check([0], times=11)
    assert "heartbeat/failure/0" not in job.notes
    job.check([0])
    assert isinstance(error := error_of(job.monitors[0]), RankLost)
    assert error.missing == (1, 2), "rank 1 has beaten once more than rank 2"


def test_a_rank_that_is_only_late_is_not_named_with_a_frozen_one(job: Job) -> None:
    job.check([0, 1], times=8)
    job.check([0], times=5)
    assert isinstance(error := error_of(job.monitors[0]), RankLost)
    assert error.missing == (2,)


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


def test_a_rank_that_was_frozen_itself_does_not_accuse_the_others(clock: Clock) -> None:
    job = Job(clock, 2)
    monitor, num_checks = job.monitors[0], 0
    vars(monitor)["_wake"] = Pause(clock)
    beat = monitor._check

    def check(passed_s: float) -> None:
        nonlocal num_checks
        num_checks += 1
        if num_checks != 6:  # the other rank's next heartbeat is read one check late
            job.monitors[1]._check(1.0)
        beat(passed_s)
        if num_checks == 5:
            clock.now_s += 100.0 * LIMIT_S
        job.stores[0].is_closed = num_checks == 12

    vars(monitor)["_check"] = check
    monitor._run()
    assert num_checks == 12
    assert monitor.failure() is None


def test_what_is_known_of_ranks_is_told_apart(clock: Clock) -> None:
    job = Job(clock, 5)
    job.monitors[1].step = job.monitors[2].step = job.monitors[3].step = 9
    job.check([0, 1, 2, 3])
    job.monitors[3].close()
    job.check([0, 1], times=5)
    texts = job.monitors[0].describe(range(5)).split("; ")
    assert [phrase.partition(":")[0] for phrase in texts] == [
        "rank 1 is alive but late",
        "rank 2 froze or died",
        "rank 3 has left at iteration 9",
        "rank 4 has never sent a heartbeat",
    ]
    assert "no heartbeat for 4.0 s" in texts[1]
    assert all("iteration 9" in phrase for phrase in texts[:2])
    assert job.monitors[0].describe([]) == ""


def test_a_rank_that_left_is_a_failure_only_to_those_that_wait_for_it(job: Job) -> None:
    job.monitors[1].close()
    job.check([0, 2], times=50)
    assert "heartbeat/failure/0" not in job.notes
    assert isinstance(error := error_of(job.monitors[0]), RankLost)
    assert error.missing == (1,)
    assert "left" in str(error)
    job.check([2])
    assert "heartbeat/failure/0" in job.notes


def test_only_the_process_that_made_a_monitor_says_that_it_leaves(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: -1)
        job.monitors[1].close()
    job.check([0])
    assert "left" not in job.monitors[0].describe([1])


def test_leaving_twice_or_without_a_store_is_no_error(job: Job) -> None:
    job.stores[0].is_gone = True
    job.monitors[0].close()
    job.stores[1].is_silent = True
    job.monitors[1].close()
    job.monitors[1].close()


def test_a_rank_whose_process_has_ended_in_a_run_is_lost_at_once(job: Job) -> None:
    end_process(job, 1)
    job.check([0, 2])
    for monitor in (job.monitors[0], job.monitors[2]):
        assert isinstance(error := error_of(monitor), RankLost)
        assert error.missing == (1,)
        assert "died" in str(error)


def test_a_rank_whose_process_has_ended_after_its_run_is_missed_by_those_that_wait_alone(job: Job) -> None:
    job.monitors[1].leave_run()
    end_process(job, 1)
    job.check([0, 2], times=30)
    assert "heartbeat/failure/0" not in job.notes
    assert isinstance(error := error_of(job.monitors[0]), RankLost)
    assert error.missing == (1,)


def test_a_rank_that_has_ended_its_run_need_not_beat(job: Job) -> None:
    job.monitors[1].step = 20
    job.monitors[1].leave_run()
    job.check([0, 2], times=30)
    assert job.monitors[0].failure() is None
    assert job.monitors[0].describe([1]) == "rank 1 is alive but has ended its run, at iteration 20"
    job.monitors[1].enter_run(1)
    job.check()
    job.check([0, 2], times=13)
    assert isinstance(error_of(job.monitors[0]), RankLost)


def test_a_rank_that_does_not_wait_hears_of_a_failure_in_its_next_iteration(job: Job) -> None:
    job.monitors[1].report_error(KeyError("bad batch"), "")
    job.check([0])
    with pytest.raises(KeyError, match="bad batch"):
        job.monitors[0].enter_run(31)


# -- a rank that raises ------------------------------------------------------------------------------


def test_an_exception_is_told_to_the_others_as_of_its_type(job: Job) -> None:
    job.monitors[1].step = 5
    job.monitors[1].report_error(KeyError("bad batch"), "Traceback: in the step")
    job.check([0])
    error = error_of(job.monitors[0])
    assert isinstance(error, RemoteRankError)
    assert isinstance(error, KeyError)
    assert [failure.rank for failure in error.failures] == [1]
    assert "rank 1" in str(error)
    assert "iteration 5" in str(error)
    assert isinstance(error.__cause__, RemoteTraceback)
    assert "Traceback: in the step" in str(error.__cause__)
    assert "rank 1" in str(error.__cause__)


def test_an_exception_whose_text_cannot_be_made_is_told_nevertheless(job: Job) -> None:
    class Mute(Exception):  # noqa: N818 - a user's
        def __str__(self) -> str:
            raise RuntimeError("no text")

    job.monitors[1].report_error(Mute(), "")
    job.check([0])
    assert "Mute on rank 1" in str(error_of(job.monitors[0]))


def test_a_rank_that_gave_up_waiting_tells_whom_it_missed(job: Job) -> None:
    job.monitors[0].report_error(CollectiveTimeout("waited", [2]), "")
    job.check([1])
    assert isinstance(error := error_of(job.monitors[1]), RankLost)
    assert error.missing == (2,)


def test_a_broken_collective_without_a_culprit_is_no_failure_of_its_rank(job: Job) -> None:
    job.monitors[0].report_error(CollectiveError("broke off"), "")
    job.check()
    assert job.monitors[1].failure() is None


def test_the_first_failure_stands_for_all(job: Job) -> None:
    job.monitors[1].report_error(ValueError("first"), "")
    job.monitors[2].report_error(ValueError("second"), "")
    job.check()
    assert "first" in str(error_of(job.monitors[0]))
    assert isinstance(error_of(job.monitors[1]), RankLost), "itself: it has raised its own"
    assert "first" in str(error_of(job.monitors[2]))


def test_a_failure_travels_as_text() -> None:
    failure = RankFailure.from_exception(3, OSError(28, "No space left"), "Traceback")
    for failure_of_job in (
        JobFailure(ranks=(1, 3), text="gone", by=0, step=4),
        JobFailure(ranks=(3,), text="\N{BUG} \0", by=3, step=0, failure=failure),
    ):
        assert JobFailure.decode(failure_of_job.encode()) == failure_of_job


def test_a_rank_waits_for_a_failure_as_long_as_it_wants(job: Job) -> None:
    begin_s = job.clock.now_s
    assert job.monitors[0].failure(2.0) is None
    assert 2.0 <= job.clock.now_s - begin_s < 2.5

    def tell() -> None:
        if job.clock.now_s > begin_s + 3.0:
            job.monitors[1].report_error(ValueError("news"), "")
            job.check([0], every_s=0.0)

    job.clock.on_sleep = tell
    assert isinstance(job.monitors[0].failure(20.0), RemoteRankError)
    assert job.clock.now_s - begin_s < 4.0


def test_ranks_that_raised_and_run_again_begin_without_a_failure(job: Job) -> None:
    for monitor in job.monitors:
        monitor.report_error(ValueError("all alike"), "")
        monitor.in_run = False
    job.check(times=2)
    for monitor in job.monitors:
        monitor.enter_run(1)
        job.check()
    job.check(times=20)
    assert [monitor.failure() for monitor in job.monitors] == [None] * 3


def test_a_rank_that_raised_late_does_not_spoil_the_run_of_those_that_began_anew(job: Job) -> None:
    job.monitors[0].report_error(ValueError("all alike"), "")
    job.monitors[0].in_run = False
    job.monitors[0].enter_run(1)  # before the others have looked
    job.monitors[1].report_error(ValueError("all alike"), "")
    job.monitors[1].in_run = False
    job.check()
    job.monitors[1].enter_run(1)
    job.check()
    assert job.monitors[0].failure() is None


def test_running_again_brings_no_lost_rank_back(job: Job) -> None:
    job.check([0, 1], times=13)
    assert isinstance(job.monitors[0].failure(), RankLost)
    job.monitors[0].leave_run()
    with pytest.raises(RankLost):
        job.monitors[0].enter_run(1)


# -- a collective of the job's own that broke --------------------------------------------------------


@pytest.fixture
def looking(job: Job) -> Iterator[Callable[..., None]]:
    """Return a function that says which ranks go on beating while one waits."""

    def go_on(*ranks: int) -> None:
        job.clock.on_sleep = lambda: job.check(ranks, every_s=0.0)

    yield go_on
    job.clock.on_sleep = lambda: None


def test_a_collective_that_broke_while_all_are_alive_is_nobodys_death(job: Job, looking: Callable[..., None]) -> None:
    looking(0, 1, 2)
    assert job.monitors[0].find_lost_ranks() is None
    assert "heartbeat/failure/0" not in job.notes


def test_a_rank_that_does_not_beat_any_more_is_why_a_collective_broke(job: Job, looking: Callable[..., None]) -> None:
    looking(0, 2)
    begin_s = job.clock.now_s
    assert isinstance(error := job.monitors[0].find_lost_ranks(), RankLost)
    assert error.missing == (1,)
    assert job.clock.now_s - begin_s < LIMIT_S, "long before the limit: the broken connection says enough"


def test_a_rank_that_has_never_beaten_is_why_a_collective_broke(clock: Clock) -> None:
    job = Job(clock)
    job.check([0, 2], times=2)
    clock.on_sleep = lambda: job.check([0, 2], every_s=0.0)
    assert isinstance(error := job.monitors[0].find_lost_ranks(), RankLost)
    assert error.missing == (1,)


def test_a_rank_that_left_is_why_a_collective_broke(job: Job, looking: Callable[..., None]) -> None:
    job.monitors[1].close()
    looking(0, 2)
    assert isinstance(error := job.monitors[0].find_lost_ranks(), RankLost)
    assert error.missing == (1,)


def test_an_exception_elsewhere_is_why_a_collective_broke(job: Job, looking: Callable[..., None]) -> None:
    looking(0, 1, 2)
    job.monitors[1].report_error(KeyError("bad batch"), "")
    assert isinstance(job.monitors[0].find_lost_ranks(), KeyError)


def test_nobody_is_accused_while_the_store_does_not_answer(clock: Clock) -> None:
    job = Job(clock, hosts=["this process", "this machine", "this machine"])
    job.check(times=2)
    job.stores[1].is_silent = True
    clock.on_sleep = lambda: job.check([1], every_s=2.0)
    assert isinstance(error := job.monitors[1].find_lost_ranks(), RankLost)
    assert error.missing == (0,), "which hosts the store"


# -- the store itself --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hosts", "lost"),
    [
        (["this process", "this machine", "this machine"], (0,)),
        (["this machine", "this machine", "this machine"], ()),
        (["this process", "this machine", "elsewhere", "elsewhere"], (0, 1)),
        (["this machine", "elsewhere"], (0,)),
        (["", ""], ()),
    ],
    ids=["rank 0 hosts it", "the launcher hosts it", "beyond a link", "a launcher beyond a link", "nobody knows"],
)
@pytest.mark.parametrize("how", ["is_silent", "is_gone"])
def test_those_that_are_lost_with_the_store_are_named(
    clock: Clock, hosts: Sequence[str], lost: tuple[int, ...], how: str
) -> None:
    job = Job(clock, len(hosts), hosts)
    job.check(times=2)
    last = len(hosts) - 1
    vars(job.stores[last])[how] = True
    job.check([last], times=12)
    assert isinstance(error := error_of(job.monitors[last]), RankLost)
    assert error.missing == lost
    for rank in lost:
        assert str(rank) in str(error)


def test_who_hosts_the_store_is_known_once_the_ranks_have_met(clock: Clock) -> None:
    hosts = ["this process", "this machine", "elsewhere"]
    job = Job(clock, hosts=hosts)
    for rank in range(3):
        del job.notes[f"heartbeat/host/{rank}"]
    for monitor in job.monitors:
        assert monitor.failure() is None, "not all have come"
        vars(monitor)["_thread"] = SimpleNamespace(start=lambda: None)
        monitor.start(Rank())
    assert [job.notes[f"heartbeat/host/{rank}"].partition("|")[0] for rank in range(3)] == hosts
    assert job.monitors[2].failure() is None
    job.stores[2].is_gone = True
    job.check([2])
    assert isinstance(error := error_of(job.monitors[2]), RankLost)
    assert error.missing == (0, 1)


def test_a_silent_store_holds_up_the_begin_no_longer_than_the_limit(clock: Clock) -> None:
    job = Job(clock)
    job.stores[0].is_silent = True
    vars(job.monitors[0])["_thread"] = SimpleNamespace(start=lambda: None)
    begin_s = clock.now_s
    job.monitors[0].start(Rank())
    assert clock.now_s - begin_s == LIMIT_S
    assert isinstance(error_of(job.monitors[0]), RankLost)


@pytest.fixture
def hosted(clock: Clock) -> Job:
    """Return a job of three ranks, the first of which hosts the store."""
    three = Job(clock, hosts=["this process", "this machine", "this machine"])
    three.check(times=2)
    return three


def test_the_stores_host_leaves_when_the_others_have_read_why(hosted: Job) -> None:
    hosted.monitors[0].report_error(KeyError("bad batch"), "")
    hosted.clock.on_sleep = lambda: hosted.check([1, 2], every_s=0.0)
    begin_s = hosted.clock.now_s
    hosted.monitors[0].close()
    assert hosted.clock.now_s - begin_s < 1.0
    hosted.stores[1].is_gone = hosted.stores[2].is_gone = True
    for monitor in hosted.monitors[1:]:
        assert isinstance(error_of(monitor), KeyError)


def test_the_stores_host_does_not_wait_for_ranks_that_have_left_or_are_lost(hosted: Job) -> None:
    hosted.monitors[1].close()
    hosted.check([0], times=13)
    begin_s = hosted.clock.now_s
    assert isinstance(error := error_of(hosted.monitors[0]), RankLost)
    assert error.missing == (2,)
    hosted.monitors[0].close()
    assert hosted.clock.now_s == begin_s


def test_the_stores_host_waits_a_few_beats_for_one_that_does_not_read(hosted: Job) -> None:
    hosted.clock.on_sleep = lambda: hosted.check([1], every_s=0.0)
    begin_s = hosted.clock.now_s
    hosted.monitors[0].close()
    assert 3.0 < hosted.clock.now_s - begin_s < 5.2


def test_only_the_stores_host_waits_when_it_leaves(hosted: Job) -> None:
    begin_s = hosted.clock.now_s
    hosted.monitors[1].close()
    assert hosted.clock.now_s == begin_s


def test_a_store_whose_host_has_left_is_not_missed_where_nothing_runs(
    hosted: Job, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = hosted.monitors[1]
    vars(monitor)["_wake"] = Pause(hosted.clock)
    hosted.monitors[2].close()
    hosted.monitors[0].close()
    hosted.check([1])
    monitor.in_run = False
    hosted.stores[1].is_gone = True
    hosted.clock.on_sleep = lambda: vars(hosted.stores[1]).update(is_closed=hosted.clock.now_s > 2000.0)
    monitor._run()
    assert caplog.records == []
    hosted.stores[1].is_closed = False
    monitor.enter_run(1)
    assert isinstance(error := error_of(monitor), RankLost)
    assert 0 in error.missing


def test_a_store_that_answers_again_in_time_is_no_fault(job: Job) -> None:
    for _ in range(5):
        job.stores[0].is_silent = True
        job.check([0], times=4)
        job.stores[0].is_silent = False
        job.check(times=2)
    assert job.monitors[0].failure() is None


def test_a_failure_is_raised_where_it_could_not_be_written_down(job: Job) -> None:
    job.stores[0].is_gone = True
    job.monitors[0].report_error(CollectiveTimeout("waited", [2]), "")
    assert isinstance(error := error_of(job.monitors[0]), RankLost)
    assert error.missing == (2,)


def test_a_store_of_a_job_that_is_over_is_not_missed(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    job.stores[0].is_closed = job.stores[0].is_gone = True
    job.check([0], times=5)
    assert job.monitors[0].failure() is None
    assert caplog.records == []


def test_a_monitor_that_left_misses_no_store(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    job.monitors[0].close()
    job.stores[0].is_gone = True
    job.check([0], times=5)
    assert job.monitors[0].failure() is None
    assert caplog.records == []


# -- a launcher that is lost, a limit, a log ---------------------------------------------------------


def test_the_end_of_the_launcher_is_the_end_of_the_job(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(clock, launcher=os.getppid())
    job.check(times=20)
    assert job.monitors[0].failure() is None
    monkeypatch.setattr(os, "getppid", lambda: 1)
    job.check()
    for monitor in job.monitors:
        assert "launcher" in str(error_of(monitor))


def test_the_shortest_limit_counts(job: Job) -> None:
    job.monitors[0].shorten_limit(2.0 * LIMIT_S)
    job.monitors[1].shorten_limit(3.0)
    job.check([0, 1], times=5, every_s=0.5)
    assert "heartbeat/failure/0" not in job.notes
    job.check([1], times=2, every_s=0.5)
    assert isinstance(error := error_of(job.monitors[1]), RankLost)
    assert 2 in error.missing


@pytest.mark.parametrize(
    ("limit_s", "world_size", "interval_s"), [(3.0, 4, 0.25), (300.0, 4, 1.0), (300.0, 1000, 2.0), (0.12, 2, 0.01)]
)
def test_heartbeats_come_a_dozen_times_in_a_limit(limit_s: float, world_size: int, interval_s: float) -> None:
    assert heartbeat_module._interval_s(limit_s, world_size) == pytest.approx(interval_s)


def test_a_failure_is_logged_once(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        job.check([0, 1], times=30)
        job.monitors[0].failure()
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 2, "once on each rank"
    assert all("rank 2" in text for text in texts)


# -- a training thread that cannot be reached --------------------------------------------------------


class Left(BaseException):
    """Instead of the process's end."""


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the exit codes with which the process would have ended."""
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise Left

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(faulthandler, "dump_traceback", lambda **_options: None)
    return codes


def hang(monitor: HeartbeatMonitor, *, still_s: float, in_torch: bool) -> None:
    """Let the training thread stand still, as the monitor sees it, and check whether the process has to end."""
    vars(monitor)["_training"] = SimpleNamespace(blocked_s=lambda: still_s, is_in=lambda _folders: in_torch)
    with contextlib.suppress(Left):
        monitor._end_if_blocked()


def lose(job: Job) -> HeartbeatMonitor:
    """Lose rank 2; return the monitor of rank 0, which knows."""
    job.check([0, 1], times=13)
    return job.monitors[0]


def test_a_process_whose_thread_hangs_in_a_lost_collective_says_why_and_ends(
    job: Job, ends: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = lose(job)
    monitor.step = 41
    hang(monitor, still_s=0.4, in_torch=True)
    assert ends == []
    hang(monitor, still_s=0.6, in_torch=True)
    assert ends == [EXIT_CODE]
    said = capsys.readouterr().err
    assert "rank 0, iteration 41: RankLost" in said
    assert "rank 2" in said
    assert f"exit code {EXIT_CODE}" in said
    job.check([1])
    assert "left" in job.monitors[1].describe([0]), "the others need not wait for it"


def test_a_thread_that_waits_elsewhere_gets_the_whole_limit(job: Job, ends: list[int]) -> None:
    monitor = lose(job)
    hang(monitor, still_s=LIMIT_S - 0.1, in_torch=False)
    assert ends == []
    hang(monitor, still_s=LIMIT_S + 0.1, in_torch=False)
    assert ends == [EXIT_CODE]


def test_the_remote_traceback_is_said_as_well(job: Job, ends: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    job.monitors[1].report_error(KeyError("bad batch"), "Traceback: in the step")
    job.check([0])
    hang(job.monitors[0], still_s=9.0, in_torch=True)
    assert ends == [EXIT_CODE]
    assert "Traceback: in the step" in capsys.readouterr().err


@pytest.mark.parametrize("why", ["no failure", "raised", "no run", "variable"])
def test_a_process_is_not_ended_without_need(
    job: Job, ends: list[int], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monitor = job.monitors[0] if why == "no failure" else lose(job)
    if why == "raised":
        assert monitor.failure() is not None
    elif why == "no run":
        monitor.in_run = False
    elif why == "variable":
        monkeypatch.setenv("DISTCKPT_END_BLOCKED", "0")
    hang(monitor, still_s=1000.0, in_torch=True)
    assert ends == []


def test_a_thread_that_computes_does_not_stand_still() -> None:
    training = TrainingThread()
    assert training.blocked_s() < 1.0
    training._since_s -= 100.0
    sum(range(3_000_000))  # some ticks of the CPU
    assert training.blocked_s() < 1.0


def test_where_a_thread_stands_is_told_by_its_innermost_function() -> None:
    training = TrainingThread()
    with ThreadPoolExecutor(1) as beside:  # this thread waits in concurrent.futures, and there in threading
        assert beside.submit(training.is_in, ["threading.py"]).result(10.0)
        assert not beside.submit(training.is_in, [__file__, "futures"]).result(10.0)
