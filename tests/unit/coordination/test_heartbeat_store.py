"""The heartbeat where the store or the launcher is lost, or the training thread cannot be reached."""

import contextlib
import faulthandler
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from distckpt import CollectiveTimeout, RankLost
from distckpt.coordination import heartbeat as heartbeat_module
from distckpt.coordination.heartbeat import EXIT_CODE, HeartbeatMonitor
from distckpt.coordination.peers import TrainingThread
from tests.unit.coordination.simulated_jobs import LIMIT_S, Clock, Job, Pause, Rank, error_of

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
