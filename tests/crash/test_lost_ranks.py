"""A rank that dies, freezes, raises or leaves: all others end with an error that names it, within seconds.

The programs are in `tests.crash.lost_programs`. At the end a table shows how long the last survivor took.
"""

import signal
from collections.abc import Sequence
from typing import Any

import pytest

from tests.crash.lost_jobs import End, Job, Jobs, Table

WORLD = 4
LIMIT_S = 3.0
SOON_S = LIMIT_S + 2.0
"""Limit of the time from the fault to the error."""
GIVE_UP_S = 30.0
"""Limit of the time from the fault to the processes' end. The interpreter's end takes a third of a second of CPU time,
and sixteen processes end at once."""

FAULTS = ("SIGKILL", "SIGSTOP", "exception", "sys.exit", "os._exit")
MANNERS: dict[str, dict[str, Any]] = {
    "vote, all leave": {"step": "vote", "launcher": "nobody"},
    "vote, some linger": {"step": "vote", "launcher": "parent", "linger": True},
    "ddp, all leave": {"step": "ddp", "launcher": "parent"},
    "ddp, some linger": {"step": "ddp", "launcher": "parent", "linger": True},
    "agent": {"step": "vote", "launcher": "agent", "victims": (0, 3)},
}


def survivors(job: Job) -> list[int]:
    """Return the ranks that are not lost."""
    return [rank for rank in range(job.plan.world_size) if rank != job.plan.victim]


def await_the_others(jobs: Sequence[Job], table: Table | None = None) -> list[list[End]]:
    """Wait until the survivors of each job have ended; return their ends."""

    def are_over() -> bool:
        # A list, not a generator: each job is checked each time, or its ranks' ends would be noticed late.
        return all([all(map(job.is_over, survivors(job))) for job in jobs])  # noqa: C419

    jobs[0].wait_for(are_over, "the others' end", GIVE_UP_S)
    found = []
    for job in jobs:
        ends = [end for end in map(job.end, survivors(job)) if end is not None]
        if table is not None:
            table.add(job, ends)
        found.append(ends)
    return found


def named_in_time(job: Job, ends: Sequence[End], *, tolerance: int = 0) -> None:
    """Check that the survivors' errors name the lost rank, and came in time.

    Args:
        job: the job.
        ends: the survivors' ends.
        tolerance: largest difference between an error's iteration and the fault's; 0 where each vote waits.
    """
    lost = job.plan.victim
    for end in ends:
        assert end.after_s < SOON_S, job.describe()
        if end.rank not in job.plan.lingers:
            assert end.gone_s is not None, job.describe()
        if end.was_blocked:
            assert job.plan.step == "ddp", job.describe()
            said = end.text.splitlines()
            # The last iteration that it completed.
            where = (f"iteration {job.plan.at}", f"iteration {job.plan.at - 1}")
            assert any(f"rank {lost}" in line and any(one in line for one in where) for line in said), job.describe()
        else:
            assert end.kinds, job.describe()
            assert end.named == (lost,), job.describe()
            assert f"rank {lost}" in end.text, job.describe()
            assert abs(end.iteration - job.plan.at) <= tolerance, job.describe()


def check_kind(job: Job, end: End) -> None:
    """Check what an error says about the fault."""
    fault, lost = job.plan.fault, job.plan.victim
    if fault == "exception":
        if not end.was_blocked:
            assert {"RemoteRankError", "DistckptError", "KeyError"} <= set(end.kinds), job.describe()
            assert end.cause.startswith("RemoteTraceback"), job.describe()
            assert f"iteration {job.plan.at}" in end.text, job.describe()
        text = end.text + end.cause
        assert f"rank {lost}" in text, job.describe()
        assert "KeyError: 'bad batch'" in text, job.describe()
        assert "in fail" in text, "the remote traceback"
    elif fault == "SIGSTOP":
        assert "froze" in end.text, job.describe()
        assert "no heartbeat" in end.text or "has not answered" in end.text, job.describe()
    elif not end.was_blocked and fault != "sys.exit":
        assert {"CollectiveError", "DistckptError"} <= set(end.kinds), job.describe()


# -- the matrix --------------------------------------------------------------------------------------


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_all_others_end_with_an_error_that_names_the_lost_rank(
    jobs: Jobs, table: Table, fault: str, manner: str
) -> None:
    how = dict(MANNERS[manner])
    victims, linger = how.pop("victims", range(WORLD)), how.pop("linger", False)
    plans = [
        {
            **how,
            "fault": fault,
            "victim": victim,
            "world_size": WORLD,
            "timeout_s": LIMIT_S,
            # The rank that raised lingers too, so that no connection breaks.
            "lingers": [(victim + 1) % WORLD, *([victim] if fault == "exception" else [])] if linger else [],
        }
        for victim in victims
    ]
    started = jobs.start_all(plans)
    try:
        found = await_the_others(started, table)
        for job, ends in zip(started, found, strict=True):
            named_in_time(job, ends)
            for end in ends:
                check_kind(job, end)
            if fault == "exception":
                own = job.end(job.plan.victim)
                assert own is not None
                assert own.is_own, job.describe()
                assert own.kinds[0] == "KeyError"
        if fault == "SIGSTOP":
            wake(started)
    finally:
        jobs.end(started)


def wake(stopped: Sequence[Job]) -> None:
    """Continue stopped ranks: each learns that the others have given it up, and ends with an error too."""
    for job in stopped:
        job.send(job.plan.victim, signal.SIGCONT)
    for job in stopped:
        job.wait_for(lambda job=job: job.is_over(job.plan.victim), "the end of the rank that woke", GIVE_UP_S)  # type: ignore[misc]
        end = job.end(job.plan.victim)
        assert end is not None
        assert end.was_blocked or {"DistckptError"} <= set(end.kinds), job.describe()


# -- at other places ---------------------------------------------------------------------------------


def lose(jobs: Jobs, table: Table, plans: Sequence[dict[str, Any]], *, tolerance: int = 0) -> list[list[End]]:
    """Run jobs that lose a rank, and check the survivors' ends."""
    started = jobs.start_all([{"world_size": WORLD, "timeout_s": LIMIT_S, **plan} for plan in plans])
    try:
        found = await_the_others(started, table)
        for job, ends in zip(started, found, strict=True):
            named_in_time(job, ends, tolerance=tolerance)
    finally:
        jobs.end(started)
    return found


@pytest.mark.parametrize("launcher", ["nobody", "agent"])
def test_a_writing_rank_that_is_lost_is_named_by_those_that_wait_for_it(
    jobs: Jobs, table: Table, launcher: str
) -> None:
    lose(
        jobs,
        table,
        [
            {"program": "save", "fault": fault, "victim": 0, "at": 20, "launcher": launcher}
            for fault in ("SIGKILL", "SIGSTOP")
        ],
    )


@pytest.mark.parametrize("step", ["voting evaluator", "silent evaluator"])
def test_a_rank_that_is_lost_during_evaluation_is_named(jobs: Jobs, table: Table, step: str) -> None:
    how = {"program": "evaluate", "step": step, "victim": 1, "at": 20, "launcher": "agent"}
    found = lose(jobs, table, [{**how, "fault": fault} for fault in ("SIGKILL", "SIGSTOP", "exception", "sys.exit")])
    for end in found[2]:
        assert {"RemoteRankError", "KeyError"} <= set(end.kinds)


@pytest.mark.parametrize(("launcher", "victim"), [("agent", 0), ("parent", 3)])
def test_a_rank_that_is_lost_before_its_first_event_is_named(
    jobs: Jobs, table: Table, launcher: str, victim: int
) -> None:
    lose(jobs, table, [{"fault": fault, "at": 1, "victim": victim, "launcher": launcher} for fault in FAULTS])


def test_a_store_that_is_lost_before_the_first_event_ends_the_wait_in_time(jobs: Jobs) -> None:
    # No rank has published yet which one hosts it.
    how = {"at": 1, "victim": 0, "launcher": "parent", "timeout_s": LIMIT_S}
    started = jobs.start_all([{**how, "fault": fault} for fault in FAULTS])
    try:
        for job, ends in zip(started, await_the_others(started), strict=True):
            for end in ends:
                assert end.after_s < SOON_S, job.describe()
                assert "CollectiveError" in end.kinds, job.describe()
                assert "store" in end.text, job.describe()
    finally:
        jobs.end(started)


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("step", ["vote", "ddp"])
def test_a_rank_that_is_lost_right_after_its_first_event_is_named(
    jobs: Jobs, table: Table, step: str, victim: int
) -> None:
    how = {"at": 2, "step": step, "victim": victim, "launcher": "parent"}
    lose(jobs, table, [{**how, "fault": fault} for fault in FAULTS])


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_is_lost_with_an_overlapped_vote_is_named(jobs: Jobs, table: Table, victim: int) -> None:
    how = {"lag": 1, "victim": victim, "launcher": "agent"}
    lose(jobs, table, [{**how, "fault": fault} for fault in FAULTS], tolerance=1)


@pytest.mark.parametrize("step", ["vote", "ddp"])
def test_a_users_exception_stays_what_it_is_whatever_its_words(jobs: Jobs, table: Table, step: str) -> None:
    how = {"fault": "exception like a lost peer's", "launcher": "agent", "step": step, "timeout_s": LIMIT_S}
    started = jobs.start_all([{**how, "victim": victim} for victim in (0, 2)])
    try:
        for job, ends in zip(started, await_the_others(started, table), strict=True):
            named_in_time(job, ends)
            for end in ends:
                assert end.was_blocked or {"RemoteRankError", "RuntimeError"} <= set(end.kinds), job.describe()
            own = job.end(job.plan.victim)
            assert own is not None
            assert own.is_own, job.describe()
    finally:
        jobs.end(started)


def test_a_late_rank_is_told_from_a_frozen_one(jobs: Jobs, table: Table) -> None:
    started = jobs.start_all([{"fault": "sleeps", "victim": victim, "launcher": "agent"} for victim in (0, 2)])
    try:
        for job, ends in zip(started, await_the_others(started, table), strict=True):
            named_in_time(job, ends)
            assert any("CollectiveTimeout" in end.kinds for end in ends), job.describe()
            for end in ends:
                assert f"rank {job.plan.victim} is alive but late" in end.text, job.describe()
                assert "froze" not in end.text, job.describe()
            job.say("awake")
            job.wait_for(lambda job=job: job.is_over(job.plan.victim), "the late rank's end")  # type: ignore[misc]
            late = job.end(job.plan.victim)
            assert late is not None
            assert "CollectiveError" in late.kinds, job.describe()
    finally:
        jobs.end(started)


# -- a launcher that is lost -------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["vote", "ddp"])
@pytest.mark.parametrize("launcher", ["torchrun", "parent"])
def test_orphans_end_by_themselves(jobs: Jobs, launcher: str, step: str) -> None:
    world_size = 2 if launcher == "torchrun" else WORLD  # each of its ranks imports torch
    job = jobs.start(launcher=launcher, step=step, world_size=world_size, timeout_s=LIMIT_S, victim=-1)
    try:
        job.form()
        job.say("go")
        job.wait_for(lambda: len(job.events("under way")) == world_size, "being under way")
        job.kill_launcher()
        job.wait_for(lambda: all(map(job.is_over, range(world_size))), "the orphans' end", GIVE_UP_S)
        for rank in range(world_size):
            end = job.end(rank)
            assert end is not None
            assert end.after_s < SOON_S, job.describe()
            assert "launcher" in end.text, job.describe()
    finally:
        jobs.end([job])


# -- no fault ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["same engine", "new engine", "one after the other"])
def test_ranks_that_all_raised_and_caught_it_run_again(jobs: Jobs, step: str) -> None:
    how = {"program": "run again", "step": step, "at": 5, "victim": -1, "world_size": 3, "timeout_s": LIMIT_S}
    started = jobs.start_all([{**how, "launcher": launcher} for launcher in ("nobody", "agent")])
    try:
        for job in started:
            job.wait_for(lambda job=job: all(map(job.is_over, range(3))), "the ranks' end")  # type: ignore[misc]
            for rank in range(3):
                ends = job.events("ended", rank)
                assert [end["text"] for end in ends] == ["attempt 0", "attempt 1", ""], job.describe()
                assert all(end["is_own"] for end in ends[:2]), job.describe()
    finally:
        jobs.end(started)


def test_a_rank_that_ends_its_run_before_the_others_is_named(jobs: Jobs, table: Table) -> None:
    how = {"program": "end early", "at": 20}
    lose(
        jobs,
        table,
        [
            {**how, "victim": 1, "launcher": "nobody"},
            {**how, "victim": 1, "launcher": "nobody", "lingers": [1]},
            {**how, "victim": 0, "launcher": "agent"},
            {**how, "victim": 0, "launcher": "agent", "lingers": [0]},
        ],
        tolerance=1,
    )


@pytest.mark.parametrize("launcher", ["nobody", "parent", "agent"])
def test_a_job_without_a_fault_ends_in_silence(jobs: Jobs, launcher: str) -> None:
    how = {"program": "end well", "at": 15, "victim": -1, "world_size": 3, "timeout_s": LIMIT_S, "launcher": launcher}
    started = jobs.start_all([{**how, "seed": seed} for seed in range(7)])
    try:
        for job in started:
            job.wait_for(lambda job=job: all(map(job.is_over, range(3))), "the ranks' end", 60.0)  # type: ignore[misc]
            for rank in range(3):
                end = job.end(rank)
                assert end is not None
                assert end.kinds == (), job.describe()
                assert job.output(rank) == "", job.describe()
            if launcher != "agent":
                job.wait_for(lambda job=job: len(job.events("exited")) == 3, "reaping")  # type: ignore[misc]
                assert [line["code"] for line in job.events("exited")] == [0] * 3, job.describe()
    finally:
        jobs.end(started)


def test_what_belongs_to_a_job_ends_with_its_process_group(jobs: Jobs) -> None:
    job = jobs.start_all([{"program": "two jobs", "victim": -1, "world_size": 2}])[0]
    try:
        job.wait_for(lambda: all(map(job.is_over, range(2))), "the ranks' end")
        for rank in range(2):
            assert [len(line["names"]) for line in job.events("threads in the job", rank)] == [2, 2], job.describe()
            assert [line["names"] for line in job.events("threads after the job", rank)] == [[], []], job.describe()
    finally:
        jobs.end([job])
