"""DistckptCallback under Hugging Face's Trainer: kills, stops and errors, alone and on two ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.jobs import Jobs
from tests.support.selection import quick

pytest.importorskip("transformers", reason="not in this environment")


@pytest.fixture
def jobs(jobs_of: Callable[[str], Jobs]) -> Jobs:
    """Return the forking process."""
    return jobs_of("trainer_program")


@quick(1)
@pytest.mark.parametrize("step", [3, 7, 8])
@pytest.mark.parametrize(
    "plan",
    [
        {"eval_strategy": "epoch", "lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "eval_loss"},
        {"is_seedable": False, "eval_strategy": "steps", "eval_steps": 2},
        {"accumulation": 1, "max_steps": 17, "save_every": 1},
        {"save_every": None},
        {"dataloader_num_workers": 1, "is_seedable": False},
    ],
    ids=str,
)
def test_a_job_that_failed_ends_like_one_left_alone(
    jobs: Jobs, tmp_path: Path, step: int, plan: dict[str, Any]
) -> None:
    expected = jobs.run(tmp_path / "alone", **plan)
    (failed,) = jobs.run(tmp_path / "failed", happens=(0, "error", step), **plan)
    assert failed is not None
    assert failed["error"] == "OwnError: own"
    assert jobs.run(tmp_path / "failed", **plan) == expected
    assert jobs.run(tmp_path / "failed", **plan) == expected, "a complete run trains nothing"


@quick(1)
@pytest.mark.parametrize("epoch", [1, 3])
def test_what_was_left_to_do_at_an_epochs_end_is_done_after_a_resume(jobs: Jobs, tmp_path: Path, epoch: int) -> None:
    plan: dict[str, Any] = {"eval_strategy": "epoch", "save_every": 1}
    expected = jobs.run(tmp_path / "alone", **plan)
    (failed,) = jobs.run(tmp_path / "failed", happens=(0, "end", epoch), **plan)
    assert failed is not None
    assert failed["error"] == "OwnError: own"
    assert jobs.run(tmp_path / "failed", **plan) == expected


def test_a_signal_on_one_rank_saves_and_stops_both(jobs: Jobs, tmp_path: Path) -> None:
    alone = jobs.run(tmp_path / "alone", 2)
    ends = jobs.run(tmp_path / "job", 2, happens=(1, "signal", 3))
    for end in ends:
        assert end is not None
        assert (end["steps"], end["iteration"], end["reason"], end["error"]) == (3, 3, "preempted", None)
        assert end["files"] == ["checkpoint_2.pt", "checkpoint_3.pt"]
        assert end["is_signal_default"], "signals act as before"
    assert jobs.run(tmp_path / "job", 2) == alone


def test_a_nan_on_one_rank_stops_both_and_is_not_saved(jobs: Jobs, tmp_path: Path) -> None:
    ends = jobs.run(tmp_path / "job", 2, happens=(1, "nan", 4), accumulation=1)
    for end in ends:
        assert end is not None
        assert (end["steps"], end["reason"], end["error"]) == (4, "nan", None)
        assert end["files"] == ["checkpoint_2.pt"]


def test_an_error_on_one_rank_reaches_the_other(jobs: Jobs, tmp_path: Path) -> None:
    first, second = jobs.run(tmp_path / "job", 2, happens=(1, "error", 3))
    assert first is not None
    assert second is not None
    assert second["error"] == "OwnError: own"
    assert first["error"].startswith("RemoteRankError")
    assert "OwnError" in first["error"]
