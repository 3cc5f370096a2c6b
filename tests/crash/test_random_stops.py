"""500 runs that a signal, a time-out or a NaN stops at a random moment on a random rank.

All ranks stop at the same iteration, for the same reason; none hangs; where a save was due it exists and loads, and
none holds NaN. The handlers' order, the vote's lag and interval, and what is saved when are random as well. Everything
but the moments is repeated by `DISTCKPT_CRASH_SEED`, which is printed in the end with what was counted.
"""

import math
import os
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.crash.random_stops import KINDS, LIMIT_S, Cause, End, Kind, Plan, plan_of, run_job
from tests.distributed.programs import HUNG, warm_up
from tests.support.selection import quick

NUM_JOBS = 25
RUNS_PER_JOB = 20
HANG_LIMIT_S = 2.0


class Summary:
    """Counts of the runs and of their ends.

    Args:
        seed: the seed of this round.
    """

    def __init__(self, seed: str) -> None:
        self.seed = seed
        self.runs: Counter[str] = Counter()
        self.stopped: Counter[str] = Counter()
        self.num_files = 0
        self.longest_s = 0.0
        self.controls: list[str] = []

    def add(self, plan: Plan, end: End, num_files: int, longest_s: float) -> None:
        """Add a run."""
        self.runs[" and ".join(sorted({cause.kind for cause in plan.causes})) or "nothing"] += 1
        self.stopped[end.reason or "ran to its end"] += 1
        self.num_files += num_files
        self.longest_s = max(self.longest_s, longest_s)

    def __str__(self) -> str:
        """Return it as text."""
        happened = ", ".join(f"{number} {what}" for what, number in sorted(self.runs.items()))
        ended = ", ".join(f"{number} {what}" for what, number in sorted(self.stopped.items()))
        return "\n".join(
            [
                f"[random stops] seed {self.seed}: {self.runs.total()} runs, of 2 and 3 ranks",
                f"[random stops] what happened: {happened}",
                f"[random stops] how they ended, the same on all ranks: {ended}",
                f"[random stops] {self.num_files} checkpoints loaded; the longest run took {self.longest_s:.2f} s",
                *(f"[random stops] control: {line}" for line in self.controls),
            ]
        )


@pytest.fixture(scope="module")
def summary(report_at_end: Callable[[object], None]) -> Summary:
    """Return the counts, which are printed at the end, past pytest's capture."""
    found = Summary(os.environ.get("DISTCKPT_CRASH_SEED") or str(secrets.randbelow(2**31)))
    report_at_end(found)
    return found


# -- what has to come of a run -------------------------------------------------------------------------


def check(plan: Plan, ends: list[End], folder: Path) -> int:
    """Check a run; return the number of loaded checkpoints."""
    assert len(ends) == plan.world_size
    assert len({(end.iteration, end.reason, end.preempted, end.history, end.best) for end in ends}) == 1, ends
    assert max(end.took_s for end in ends) < LIMIT_S, ends
    end = ends[0]
    kinds = {cause.kind for cause in plan.causes}
    assert end.reason is None or end.reason in kinds, "nothing stops a run but what happened"
    if end.reason is None:
        assert end.iteration == plan.num_iterations
    if "nan" in kinds:
        assert end.reason is not None
        assert end.iteration <= last_iteration_with_nan(plan), "a NaN stops the run when it is voted on"
    if end.reason == "nan":
        assert end.iteration >= plan.breaks_at
    assert end.preempted == (end.reason == "preempted")
    steps = steps_on_disk(folder / "latest", end.history)
    assert steps in steps_due(plan, end)
    best = steps_on_disk(folder / "best", end.best)
    assert len(best) == int(any(step % 2 == 0 for step in range(1, steps_that_held(plan, end) + 1)))
    return len(steps) + len(best)


def last_iteration_with_nan(plan: Plan) -> int:
    """Return the last iteration at which a NaN may stop the run: that of the next vote, or of the one after."""
    every: int = plan.pace.get("every", 1)
    lag: int = plan.pace.get("lag", 0)
    vote = -(-int(plan.breaks_at) // every) * every
    return min(vote + lag * every, plan.num_iterations)


def steps_that_held(plan: Plan, end: End) -> int:
    """Return the last iteration of the run whose weights were whole."""
    return end.iteration if math.isinf(plan.breaks_at) else min(end.iteration, int(plan.breaks_at) - 1)


def steps_due(plan: Plan, end: End) -> list[list[int]]:
    """Return the possible sets of iterations on the disk after a run with this end."""
    period = plan.save_every or plan.epoch_length
    steps = list(range(period, steps_that_held(plan, end) + 1, period))
    ways = [steps]
    if end.preempted:
        ways = [sorted({*steps, end.iteration} - {0})]  # at the start of a run there is nothing new to save
    elif not plan.save_every and end.reason is not None and end.iteration in steps:
        ways.append(steps[:-1])  # stopped in the last iteration of an epoch, before or at the epoch's end
    return [way[-(plan.n_saved or len(way)) :] if way else [] for way in ways]


def steps_on_disk(folder: Path, history: tuple[str, ...]) -> list[int]:
    """Load every file; return their iterations. Fail for a file with NaN, or one in no rank's history."""
    names = os.listdir(folder) if folder.exists() else []
    assert sorted(names) == sorted(history)
    steps = []
    for name in names:
        state = torch.load(folder / name, weights_only=True)
        assert torch.isfinite(state["weights"]).all(), name
        steps.append(state["step"])
    return sorted(steps)


# -- the runs ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Checkpoint. the ranks have different scores:UserWarning")
@quick(3)
@pytest.mark.parametrize("job", range(NUM_JOBS))
def test_whatever_stops_a_run_at_whatever_moment_stops_all_ranks_alike(
    tmp_path: Path, summary: Summary, job: int
) -> None:
    world_size = 2 + job % 2
    plans = [plan_of(f"{summary.seed}/{job}/{number}", world_size) for number in range(RUNS_PER_JOB)]
    runs = run_job(tmp_path, plans)
    assert len(runs) == RUNS_PER_JOB
    for number, (plan, ends) in enumerate(zip(plans, runs, strict=True)):
        try:
            num_files = check(plan, ends, tmp_path / str(number))
        except AssertionError as error:
            error.add_note(f"{plan}\n{ends}\nrepeat it with DISTCKPT_CRASH_SEED={summary.seed}, job {job}")
            raise
        summary.add(plan, ends[0], num_files, max(end.took_s for end in ends))


def early_on(cause: Cause) -> Cause:
    """Move a cause into the first part of the run: a stop in the last iteration makes no difference."""
    return replace(cause, share=0.3 * cause.share)


@pytest.mark.parametrize("is_coupled", [False, True], ids=["free steps", "steps that reduce"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_runs_find_ranks_that_differ_or_hang_where_each_rank_decides_alone(
    tmp_path: Path, summary: Summary, kind: Kind, is_coupled: bool  # noqa: FBT001
) -> None:  # fmt: skip
    warm_up(2)
    plans = [plan_of(f"{summary.seed}/{kind}/{number}", 2, (kind,), is_coupled=is_coupled) for number in range(8)]
    plans = [replace(plan, causes=tuple(map(early_on, plan.causes))) for plan in plans]
    runs = run_job(tmp_path, plans, library="ignite", hang_limit_s=HANG_LIMIT_S)
    hung = sum(any(end.reason == HUNG for end in ends) for ends in runs)
    differ = sum(len({end.iteration for end in ends}) > 1 for ends in runs)
    summary.controls.append(
        f"{kind}, {'steps that reduce' if is_coupled else 'free steps'}: {differ} of {len(runs)} differ, {hung} hung"
    )
    assert hung + differ > 0
