"""200 jobs of two ranks that end well beside a slow store, and 200 on a machine that is busy: every exit code is 0.

A thread that is inside a call of torch's as the interpreter is taken down aborts the process (SIGABRT), however well
its program ended. The moments are repeated by `DISTCKPT_CRASH_SEED`.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tests.crash.lost_jobs import Job, Jobs
from tests.support.limits import PROGRAM_LIMIT_S

pytestmark = pytest.mark.crash

AT_ONCE = 4
"""Number of jobs that run at the same time."""
MOST_CONTROLS = 12


def exit_codes(jobs: Jobs, num_jobs: int, seed: int, **what: object) -> Counter[int]:
    """Run jobs; return the counts of their ranks' exit codes."""
    codes: Counter[int] = Counter()
    for first in range(0, num_jobs, AT_ONCE):
        seeds = range(seed + first, seed + min(first + AT_ONCE, num_jobs))
        plan = {"program": "end slowly", "world_size": 2, "at": 10, "step_s": 0.0, **what}
        started = jobs.start_all([{**plan, "seed": one} for one in seeds])
        for job in started:
            codes.update(_codes_of(job))
        jobs.end(started)
    return codes


def _codes_of(job: Job) -> list[int]:
    job.wait_for(lambda: len(job.events("exited")) == 2, "exiting", 60.0)
    codes = [line["code"] for line in job.events("exited")]
    if job.plan.fault == "none":
        assert codes == [0, 0], job.describe()
    return codes


@contextlib.contextmanager
def busy_machine() -> Iterator[None]:
    """Keep every CPU busy while the body runs."""
    num_cpus = len(os.sched_getaffinity(0))
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_cpus)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait(PROGRAM_LIMIT_S)


def test_ranks_that_end_well_beside_a_slow_store_exit_with_0(
    jobs: Jobs, exits: int, seed: int, report: Callable[[str], None]
) -> None:
    codes = exit_codes(jobs, exits, seed, step="slow store")
    report(f"seed {seed}: {exits} jobs of 2 ranks ended beside a slow store: exit codes {dict(codes)}")
    assert codes == {0: 2 * exits}


def test_ranks_that_end_well_on_a_busy_machine_exit_with_0(
    jobs: Jobs, exits: int, seed: int, report: Callable[[str], None]
) -> None:
    with busy_machine():
        codes = exit_codes(jobs, exits, seed)
    report(f"seed {seed}: {exits} jobs of 2 ranks ended on a busy machine: exit codes {dict(codes)}")
    assert codes == {0: 2 * exits}


def test_control_where_nothing_waits_for_the_threads_a_process_is_aborted(
    jobs: Jobs, report: Callable[[str], None]
) -> None:
    codes: Counter[int] = Counter()
    for first in range(0, MOST_CONTROLS, AT_ONCE):
        codes += exit_codes(jobs, AT_ONCE, first, step="slow store", fault="nothing waits")
        if codes[-signal.SIGABRT]:
            break
    report(f"control: {codes.total() // 2} jobs whose ranks wait for no thread: exit codes {dict(codes)}")
    assert codes[-signal.SIGABRT] > 0
