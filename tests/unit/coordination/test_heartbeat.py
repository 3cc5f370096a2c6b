"""HeartbeatMonitor: finds out which ranks are missing. With a store in memory and a clock that the tests turn."""

import os
from collections.abc import Callable, Iterator

import pytest

from distckpt import CollectiveError, CollectiveTimeout, RankLost, RemoteRankError
from distckpt.coordination.peers import JobFailure
from distckpt.errors import RankFailure, RemoteTraceback
from tests.unit.coordination.simulated_jobs import LIMIT_S, Clock, Job, Pause, end_process, error_of

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
