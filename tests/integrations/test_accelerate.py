"""A Loop with Accelerate: kills, stops and errors, alone and on two ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integrations.jobs import Jobs
from tests.support.selection import quick

pytest.importorskip("accelerate", reason="not in this environment")


@pytest.fixture
def jobs(jobs_of: Callable[[str], Jobs]) -> Jobs:
    """Return the forking process."""
    return jobs_of("accelerate_program")


@quick(1)
@pytest.mark.parametrize("iteration", [5, 13, 24])
def test_a_job_that_failed_ends_like_one_left_alone(jobs: Jobs, tmp_path: Path, iteration: int) -> None:
    expected = jobs.run(tmp_path / "alone")
    (failed,) = jobs.run(tmp_path / "failed", happens=(0, "error", iteration))
    assert failed is not None
    assert failed["error"] == "OwnError: own"
    assert jobs.run(tmp_path / "failed") == expected
    assert jobs.run(tmp_path / "failed") == expected, "a complete run trains nothing"


def test_a_signal_on_one_rank_saves_and_stops_both_after_an_optimizer_step(jobs: Jobs, tmp_path: Path) -> None:
    alone = jobs.run(tmp_path / "alone", 2, save_every=4)
    ends = jobs.run(tmp_path / "job", 2, happens=(1, "signal", 5), save_every=4)
    for end in ends:
        assert end is not None
        assert (end["iteration"], end["reason"], end["error"]) == (6, "preempted", None)
        assert end["files"] == ["checkpoint_4.pt", "checkpoint_6.pt"]
    resumed = jobs.run(tmp_path / "job", 2, save_every=4)
    for one, other in zip(resumed, alone, strict=True):
        assert one is not None
        assert other is not None
        assert one["state"] == other["state"]


def test_a_nan_on_one_rank_stops_both(jobs: Jobs, tmp_path: Path) -> None:
    ends = jobs.run(tmp_path / "job", 2, happens=(1, "nan", 4))
    assert [end and (end["iteration"], end["reason"], end["files"]) for end in ends] == [
        (4, "nan", ["checkpoint_2.pt"])
    ] * 2


def test_an_error_on_one_rank_reaches_the_other(jobs: Jobs, tmp_path: Path) -> None:
    first, second = jobs.run(tmp_path / "job", 2, happens=(1, "error", 3))
    assert first is not None
    assert second is not None
    assert second["error"] == "OwnError: own"
    assert first["error"].startswith("RemoteRankError")
