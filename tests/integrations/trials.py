"""Jobs that are killed at random moments, and started again until they end."""

import os
import random
import secrets
from pathlib import Path
from typing import Any

from tests.integrations.jobs import Jobs

NUM_KILLS, NUM_QUICK = 50, 1
_MAX_STARTS = 40


def kill_and_resume(jobs: Jobs, folder: Path, world_size: int, *, num_kills: int, length_s: float, **plan: Any) -> None:
    """Kill jobs `num_kills` times in all; each ends like the one that was left alone.

    Args:
        jobs: the forking process.
        folder: a new folder.
        world_size: number of ranks.
        num_kills: number of kills.
        length_s: seconds of a whole run.
        plan: for the program.
    """
    seed = os.environ.get("DISTCKPT_CRASH_SEED") or str(secrets.randbelow(2**31))
    draw, killed, number = random.Random(seed), 0, 0
    ends: list[Any]
    expected: list[Any] = jobs.run(folder / "alone", world_size, **plan)
    assert all(end is not None and end["error"] is None for end in expected), expected
    while killed < num_kills:
        number, ends = number + 1, []
        for _ in range(_MAX_STARTS):
            limit_s = draw.uniform(0.0, length_s) if killed < num_kills else None
            ends = jobs.run(folder / str(number), world_size, kill_after_s=limit_s, **plan)
            if None not in ends:
                break
            killed += 1
        differences = [
            f"rank {rank}, {key}: {end[key]}, and not {wanted[key]}"
            for rank, (end, wanted) in enumerate(zip(ends, expected, strict=True))
            for key in wanted
            if end[key] != wanted[key]
        ]
        assert not differences, f"job {number} of DISTCKPT_CRASH_SEED={seed}: {'; '.join(differences)}"
