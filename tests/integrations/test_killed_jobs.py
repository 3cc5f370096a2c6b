"""SIGKILL at random moments of jobs under each integration, alone and on two ranks: resumed, they end bit-equal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.jobs import Jobs
from tests.integrations.trials import NUM_KILLS, NUM_QUICK, kill_and_resume
from tests.support.selection import is_full, quick

PROGRAMS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "transformers": ("trainer_program", 1.0, {"eval_strategy": "epoch"}),
    "pytorch_lightning": ("lightning_program", 0.7, {}),
    "accelerate": ("accelerate_program", 0.4, {}),
}
"""The program of each package, the seconds of its run, roughly, and what it is given."""


@quick(3)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("package", PROGRAMS)
def test_a_job_killed_at_random_moments_ends_bit_equal(
    jobs_of: Callable[[str], Jobs], tmp_path: Path, pytestconfig: pytest.Config, package: str, world_size: int
) -> None:
    pytest.importorskip(package, reason="not in this environment")
    program, length_s, plan = PROGRAMS[package]
    num_kills = NUM_KILLS if is_full(pytestconfig) else NUM_QUICK
    kill_and_resume(jobs_of(program), tmp_path, world_size, num_kills=num_kills, length_s=length_s, **plan)
