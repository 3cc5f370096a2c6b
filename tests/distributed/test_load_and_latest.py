"""distckpt.load and distckpt.latest on several ranks: all load the same file, or raise the same error."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import distckpt
from tests.distributed.programs import all_equal, kinds, logged, model_of, raised
from tests.distributed.test_resume import cut, own_folders, put
from tests.support import job, run_ranks
from tests.support.selection import process_ranks_only

WORLDS = pytest.mark.parametrize("world_size", [1, 2])


def loaded(path: Path, *, per_rank: bool = False, odd_rank: int | None = None) -> dict[str, Any]:
    """Load a file, and return this rank's outcome; the model of `odd_rank` has another shape."""
    if per_rank:
        os.chdir(path / f"rank{job.rank()}")
        path = Path("checkpoints/checkpoint_8.pt")
    model = torch.nn.Linear(7, 7) if job.rank() == odd_rank else model_of(0.0)
    before = [one.clone() for one in model.parameters()]
    error = raised(lambda: distckpt.load({"model": model}, path, timeout_s=20.0))
    return {
        "is_loaded": all(bool((one == 8.0).all()) for one in model.parameters()),
        "is_unchanged": all(map(torch.equal, before, model.parameters())),
        "error": None if error is None else str(error),
        "kinds": kinds(error),
    }


def loaded_per_rank(path: Path) -> dict[str, Any]:
    return loaded(path, per_rank=True)


def loaded_into_another_shape_on_rank_1(path: Path) -> dict[str, Any]:
    return loaded(path, odd_rank=1)


def newest(directory: Path) -> dict[str, Any]:
    """Ask for the latest file, and return this rank's outcome."""
    found: list[Path | None] = []
    with logged("distckpt") as messages:
        error = raised(lambda: found.append(distckpt.latest(directory, timeout_s=20.0)))
    return {
        "path": found[0] if found else "none was returned",
        "warnings": [one for one in messages if one.endswith("It is passed over.")],
        "error": None if error is None else str(error),
        "kinds": kinds(error),
    }


def with_timeout(directory: Path, timeout_s: Any) -> list[str]:
    """Load, look and resume with a wrong time limit; return the errors."""
    model = model_of(0.0)
    calls = (
        lambda: distckpt.load({"model": model}, directory / "checkpoint_8.pt", timeout_s=timeout_s),
        lambda: distckpt.latest(directory, timeout_s=timeout_s),
        lambda: distckpt.resume({"model": model}, directory, timeout_s=timeout_s),
        lambda: distckpt.save({"model": model}, directory / "a.pt", timeout_s=timeout_s),
    )
    errors = []
    for call in calls:
        if job.rank() == 1:
            time.sleep(0.2)  # the other rank waits
        errors.append(repr(raised(call)))
    return errors


@pytest.mark.parametrize("timeout_s", ["30", 0])
def test_a_wrong_time_limit_is_one_error_on_all_ranks(tmp_path: Path, timeout_s: Any) -> None:
    for errors in run_ranks(with_timeout, 2, tmp_path, timeout_s):
        assert len(errors) == 4
        assert all("Argument timeout_s should be" in error for error in errors), errors


def newest_per_rank(directory: Path) -> dict[str, Any]:
    os.chdir(directory / f"rank{job.rank()}")
    return newest(Path("checkpoints"))


def copied_to_ranks(folder: Path, steps: list[int]) -> list[Path]:
    """Give each of two ranks a directory with the same files."""
    folders = own_folders(folder, 2)
    for step in steps:
        path = put(folder, step)
        for one in folders:
            shutil.copyfile(path, one / path.name)
    return folders


@WORLDS
def test_all_ranks_load_a_file(tmp_path: Path, world_size: int) -> None:
    ends = run_ranks(loaded, world_size, put(tmp_path, 8))
    assert all_equal(ends)
    assert (ends[0]["is_loaded"], ends[0]["error"]) == (True, None)


@WORLDS
def test_a_damaged_file_is_the_same_error_on_all_ranks(tmp_path: Path, world_size: int) -> None:
    path = put(tmp_path, 8)
    cut(path)
    ends = run_ranks(loaded, world_size, path)
    assert all_equal(ends)
    assert ends[0]["is_unchanged"]
    assert "CorruptCheckpointError" in ends[0]["kinds"]
    assert f"{path} is no checkpoint, or is truncated or damaged" in ends[0]["error"]


@WORLDS
def test_a_missing_file_is_the_same_error_on_all_ranks(tmp_path: Path, world_size: int) -> None:
    ends = run_ranks(loaded, world_size, tmp_path / "absent.pt")
    assert all_equal(ends)
    assert "FileNotFoundError" in ends[0]["kinds"]


@process_ranks_only
def test_a_file_that_is_damaged_on_one_rank_is_loaded_on_none(tmp_path: Path) -> None:
    folders = copied_to_ranks(tmp_path, [8])
    cut(folders[1] / "checkpoint_8.pt")
    ends = run_ranks(loaded_per_rank, 2, tmp_path)
    assert all_equal(ends)
    assert ends[0]["is_unchanged"]
    assert {"RemoteRankError", "CorruptCheckpointError"} <= set(ends[0]["kinds"])
    assert "on rank 1, while: load, checking checkpoint_8.pt, step 0, of 2 ranks" in ends[0]["error"]


@process_ranks_only
def test_a_rank_that_does_not_have_the_file_is_named_on_all(tmp_path: Path) -> None:
    folders = copied_to_ranks(tmp_path, [8])
    (folders[1] / "checkpoint_8.pt").unlink()
    ends = run_ranks(loaded_per_rank, 2, tmp_path)
    assert all_equal(ends)
    assert ends[0]["is_unchanged"]
    assert "but not for rank 1" in ends[0]["error"]


def test_a_state_that_does_not_fit_on_one_rank_changes_no_object_of_any(tmp_path: Path) -> None:
    ends = run_ranks(loaded_into_another_shape_on_rank_1, 2, put(tmp_path, 8))
    assert all_equal(ends)
    assert ends[0]["is_unchanged"]
    assert {"RemoteRankError", "StateMismatchError", "RuntimeError"} <= set(ends[0]["kinds"])
    assert "size mismatch for weight" in ends[0]["error"]


def test_damage_is_reported_before_a_mismatch(tmp_path: Path) -> None:
    """A state that does not fit may be a damaged one."""
    path = put(tmp_path, 8)
    content = path.read_bytes()
    at = content.index(torch.full((2,), 8.0).numpy().tobytes())
    path.write_bytes(content[:at] + b"?" + content[at + 1 :])
    ends = run_ranks(loaded_into_another_shape_on_rank_1, 2, path)
    assert all_equal(ends)
    assert ends[0]["is_unchanged"]
    assert "CorruptCheckpointError" in ends[0]["kinds"]
    assert "StateMismatchError" not in ends[0]["kinds"]


@WORLDS
def test_the_latest_is_the_same_on_all_ranks(tmp_path: Path, world_size: int) -> None:
    for step in (4, 12, 8):
        put(tmp_path, step)
    ends = run_ranks(newest, world_size, tmp_path)
    assert all_equal(ends)
    assert (ends[0]["path"], ends[0]["warnings"]) == (tmp_path / "checkpoint_12.pt", [])


@WORLDS
def test_without_files_no_rank_has_a_latest(tmp_path: Path, world_size: int) -> None:
    assert [end["path"] for end in run_ranks(newest, world_size, tmp_path / "absent")] == [None] * world_size


@WORLDS
def test_files_none_of_which_is_whole_are_an_error_on_all_ranks(tmp_path: Path, world_size: int) -> None:
    for step in (4, 8):
        cut(put(tmp_path, step))
    ends = run_ranks(newest, world_size, tmp_path)
    assert all_equal([end["error"] for end in ends])
    assert all("LoadError" in end["kinds"] for end in ends)
    assert "None of the 2 checkpoints" in ends[0]["error"]


@process_ranks_only
def test_the_latest_is_whole_on_all_ranks(tmp_path: Path) -> None:
    folders = copied_to_ranks(tmp_path, [4, 8])
    cut(folders[1] / "checkpoint_8.pt")
    ends = run_ranks(newest_per_rank, 2, tmp_path)
    assert [end["path"] for end in ends] == [Path("checkpoints/checkpoint_4.pt")] * 2
    assert "checkpoint_8.pt cannot be loaded: on rank 1: " in ends[0]["warnings"][0]
