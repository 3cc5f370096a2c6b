"""A cut link between two hosts: every rank ends in time with an error that names the ranks on the other side.

Ranks 0 and 1 run on host A, which hosts the job's store as well, ranks 2 and 3 on host B; `tests.crash.hosts` makes
them. A cut shorter than the limit is survived. At the end a table shows how long the last rank took, on either
side.
"""

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.crash.hosts import CUTS, Cut, Hosts
from tests.crash.lost_jobs import End, Job, Jobs, Table
from tests.support.selection import full_only, quick

WORLD = 4
SIDES = {"host A": (0, 1), "host B": (2, 3)}
LIMIT_S = 3.0
SOON_S = LIMIT_S + 2.0
"""Limit of the time from the cut to the error."""
GONE_S = 30.0
"""Limit of the time from the cut to the process's end. Twenty processes end at once. A process that waited for its
collective with the other side would take half an hour."""
ATTEMPTS = 3
"""A cut has to come in a collective of DDP, and not in a vote, as it may on a busy machine."""
SHORT_S = 1.0
"""A cut that is survived. TCP sends again 0.2, 0.6, 1.4 and 3 s after a loss, so that its effect lasts longer."""


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Return two hosts whose link works."""
    with Hosts() as both:
        yield both


def start(jobs: Jobs, hosts: Hosts, how: str, plans: Sequence[dict[str, Any]]) -> list[Job]:
    """Start jobs over both hosts, and wait until all ranks have done a few iterations."""
    # Long steps, which use little CPU time.
    common = {"world_size": WORLD, "timeout_s": LIMIT_S, "step_s": 0.1, "fault": how, "victim": -1}
    common["hosts"] = hosts.namespaces
    started = jobs.start_all([{**common, "port": hosts.free_port(), **plan} for plan in plans])
    for job in started:
        job.wait_for(lambda job=job: len(job.events("under way")) == WORLD, "being under way")  # type: ignore[misc]
    return started


def cut(hosts: Hosts, how: Cut, started: Sequence[Job]) -> None:
    """Cut the link, and set the jobs' time of the fault."""
    now_s = time.monotonic()
    for job in started:
        job.fault_s = now_s
    hosts.cut(how)


def named(end: End) -> set[int]:
    """Return the ranks that an error names: from its data, or from the output of a process that distckpt ended."""
    if not end.was_blocked:
        return set(end.named)
    said = next(line for line in end.text.splitlines() if line.startswith(f"rank {end.rank}, iteration "))
    _, _, why = said.partition(": RankLost: ")
    lists = re.findall(r"\branks? (\d+(?:, \d+)*)\b", why.partition(": ")[2])
    return {int(number) for numbers in lists for number in numbers.split(", ")} - {end.rank}


def await_ends(started: Sequence[Job]) -> list[list[End]]:
    """Wait until all ranks of all jobs have ended; return their ends."""

    def are_over() -> bool:
        # A list, not a generator: each rank is checked each time, or its end would be noticed late.
        return all([job.is_over(rank) for job in started for rank in range(WORLD)])  # noqa: C419

    started[0].wait_for(are_over, "the ranks' end", GONE_S)
    return [[end for end in map(job.end, range(WORLD)) if end is not None] for job in started]


def check_ends(started: Sequence[Job], table: Table) -> list[list[End]]:
    """Wait for all ranks, and check that each has named the other side in time; return their ends."""
    found = await_ends(started)
    for job, ends in zip(started, found, strict=True):
        for side, lost in SIDES.items():
            others = [end for end in ends if end.rank not in lost]
            table.add(job, others, side)
            for end in others:
                check_end(job, end, lost)
    return found


def check_end(job: Job, end: End, lost: tuple[int, ...]) -> None:
    """Check that a rank has named the ranks on the other side in time."""
    assert end.after_s < SOON_S, job.describe()
    assert named(end) == set(lost), job.describe()
    if end.was_blocked:
        assert job.plan.step == "ddp", job.describe()
    else:
        assert {"CollectiveError", "DistckptError"} <= set(end.kinds), job.describe()
        assert all(re.search(rf"\b{rank}\b", end.text) for rank in lost), job.describe()


@quick(1)
@pytest.mark.parametrize("how", CUTS)
def test_all_ranks_name_the_ranks_beyond_the_cut_in_time(jobs: Jobs, hosts: Hosts, table: Table, how: Cut) -> None:
    plans: list[dict[str, Any]] = [
        {"step": "vote"},
        {"step": "vote", "lingers": (0, 2)},
        {"step": "ddp"},
        {"step": "vote", "launcher": "agent"},
        {"step": "ddp", "launcher": "agent"},
    ]
    in_ddp: list[tuple[str, bool]] = []
    for _ in range(ATTEMPTS):
        started = start(jobs, hosts, how, plans)
        try:
            cut(hosts, how, started)
            in_ddp = [
                (job.describe(), any(end.was_blocked for end in ends))
                for job, ends in zip(started, check_ends(started, table), strict=True)
                if job.plan.step == "ddp"
            ]
        finally:
            jobs.end(started)
        if all(is_met for _, is_met in in_ddp):
            return
        hosts.mend()
    stories = [story for story, _ in in_ddp]
    pytest.fail(f"{ATTEMPTS} cuts did not meet both jobs in DistributedDataParallel's own collective: {stories}")


@full_only
def test_ranks_of_the_real_torchrun_name_the_ranks_beyond_the_cut_in_time(
    jobs: Jobs, hosts: Hosts, table: Table
) -> None:
    started = start(jobs, hosts, "silent loss", [{"launcher": "torchrun"}])
    try:
        cut(hosts, "silent loss", started)
        check_ends(started, table)
    finally:
        jobs.end(started)


@full_only
def test_a_cut_while_one_rank_writes_or_evaluates_is_noticed_in_time(jobs: Jobs, hosts: Hosts, table: Table) -> None:
    plans: list[dict[str, Any]] = [
        {"program": "save", "victim": 0},
        {"program": "save", "victim": 0, "launcher": "agent"},
        {"program": "evaluate", "victim": 1, "step": "voting evaluator"},
        {"program": "evaluate", "victim": 2, "step": "silent evaluator"},
    ]
    started = start(jobs, hosts, "silent loss", [{**plan, "fault": "sleeps", "at": 20} for plan in plans])
    try:
        for job in started:
            job.wait_for(lambda job=job: job.events("fault"), "one rank's slow work")  # type: ignore[misc]
        cut(hosts, "silent loss", started)
        for job in started:
            job.say("awake")  # the work is done, and its result cannot reach the other side
        check_ends(started, table)
    finally:
        jobs.end(started)


@full_only
def test_a_cut_shorter_than_the_limit_is_survived(jobs: Jobs) -> None:
    plans = [{"step": "vote", "launcher": "agent"}, {"step": "ddp"}]
    started: list[Job] = []
    with contextlib.ExitStack() as stack:
        pairs = {how: stack.enter_context(Hosts()) for how in CUTS}
        try:
            for how, hosts in pairs.items():
                started += start(jobs, hosts, how, plans)
            for how, hosts in pairs.items():
                cut(hosts, how, started)
            time.sleep(SHORT_S)
            for hosts in pairs.values():
                hosts.mend()
            time.sleep(LIMIT_S - SHORT_S / 2)  # a monitor that did not notice the mended link would give ranks up
            for job in started:
                job.say("stop")
            for job, ends in zip(started, await_ends(started), strict=True):
                assert {end.kinds for end in ends} == {()}, job.describe()
                assert len({end.iteration for end in ends}) == 1, job.describe()
                assert not any("ERROR" in job.output(rank) for rank in range(WORLD)), job.describe()
        finally:
            jobs.end(started)
