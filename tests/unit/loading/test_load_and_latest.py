"""distckpt.load and distckpt.latest in one process: what they load, which file they take, and their errors."""

import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distckpt
from distckpt import Checkpoint, CorruptCheckpointError, LoadError, LoadReport, StateMismatchError, UnsafeCheckpoint
from distckpt.loading.restore import prepare
from distckpt.ptformat.reader import OpenCheckpoint
from tests.support.equality import equal
from tests.support.limits import PROGRAM_LIMIT_S
from tests.unit.toys import Notebook, linear, run_epochs, snapshot


def cut(path: Path) -> Path:
    """Take the second half off a file."""
    os.truncate(path, path.stat().st_size // 2)
    return path


def saved(folder: Path, num_epochs: int = 1, n_saved: int = 9) -> dict[str, Any]:
    """Save checkpoint_1.pt and so on of some objects, and return these."""
    objects = {"model": linear(1), "book": Notebook({"page": 3})}
    run_epochs(Checkpoint(objects, folder, n_saved=n_saved), num_epochs)
    return objects


# -- load --------------------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what becomes a list of the steps of a load: trying the state on the objects, and verifying."""
    done: list[str] = []

    def noting(step: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*given: Any) -> Any:
            done.append(step)
            return work(*given)

        return noted

    monkeypatch.setattr("distckpt.loading.api.prepare", noting("try", prepare))
    monkeypatch.setattr(OpenCheckpoint, "check", noting("verify", OpenCheckpoint.check))
    return done


def test_a_state_is_tried_once_while_the_file_is_fetched(tmp_path: Path, steps: list[str]) -> None:
    objects, model = saved(tmp_path), linear(2)
    assert distckpt.load({"model": model}, tmp_path / "checkpoint_1.pt") == LoadReport()
    assert equal(model.state_dict(), objects["model"].state_dict())
    assert steps == ["try", "verify"]


def test_a_state_that_does_not_fit_is_refused_when_the_file_is_known_to_be_sound(
    tmp_path: Path, steps: list[str]
) -> None:
    saved(tmp_path)
    with pytest.raises(StateMismatchError, match="size mismatch for weight"):
        distckpt.load({"model": nn.Linear(7, 7)}, tmp_path / "checkpoint_1.pt")
    assert steps == ["try", "verify", "try"]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_checkpoint_makes_the_round_trip(tmp_path: Path, kind: type, *, verify: bool) -> None:
    objects = saved(tmp_path)
    fresh = {"model": linear(2), "book": Notebook()}
    assert distckpt.load(fresh, kind(tmp_path / "checkpoint_1.pt"), verify=verify) == LoadReport()
    assert equal(snapshot(fresh), snapshot(objects))


def test_a_load_that_is_not_strict_reports_the_keys_that_it_passed_over(tmp_path: Path) -> None:
    torch.save({"m": {"weight": torch.ones(2, 2), "more": torch.ones(1)}}, tmp_path / "a.pt")
    model = linear(0)
    report = distckpt.load({"m": model}, tmp_path / "a.pt", strict=False)
    assert report == LoadReport(missing=("m.bias",), unexpected=("m.more",))
    assert torch.equal(model.weight, torch.ones(2, 2))


def test_a_state_that_does_not_fit_changes_no_object(tmp_path: Path) -> None:
    saved(tmp_path)
    objects = {"book": Notebook({"page": 1}), "model": linear(0, in_features=3)}
    before = snapshot(objects)
    with pytest.raises(StateMismatchError, match="size mismatch for weight") as caught:
        distckpt.load(objects, tmp_path / "checkpoint_1.pt")
    assert isinstance(caught.value, RuntimeError)
    assert caught.value.mismatched == ("model.weight",)
    assert equal(snapshot(objects), before)


def test_the_error_of_a_bad_file_has_its_own_type(tmp_path: Path) -> None:
    objects = saved(tmp_path)
    before = snapshot(objects)
    torch.save({"model": Counter, "book": print}, tmp_path / "unsafe.pt")
    for name, kind in (("absent.pt", FileNotFoundError), ("unsafe.pt", UnsafeCheckpoint)):
        with pytest.raises(kind, match=name):
            distckpt.load(objects, tmp_path / name)
    with pytest.raises(CorruptCheckpointError, match=r"checkpoint_1\.pt is no checkpoint, or is truncated"):
        distckpt.load(objects, cut(tmp_path / "checkpoint_1.pt"))
    assert equal(snapshot(objects), before)


@pytest.mark.parametrize(
    ("objects", "path", "options"),
    [
        ([nn.Linear(1, 1)], "a.pt", {}),
        ({"a": 1}, "a.pt", {}),
        ({"a": nn.Linear(1, 1)}, 3, {}),
        ({"a": nn.Linear(1, 1)}, "a.pt", {"timeout_s": "soon"}),
    ],
)
def test_an_argument_of_another_type_is_refused(objects: Any, path: Any, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        distckpt.load(objects, path, **options)


def test_a_timeout_that_is_not_positive_is_refused(tmp_path: Path) -> None:
    for call in (lambda: distckpt.load({}, "a.pt", timeout_s=0), lambda: distckpt.latest(tmp_path, timeout_s=-1.0)):
        with pytest.raises(ValueError, match="timeout_s should be a positive number of seconds"):
            call()


def test_neither_needs_ignite(tmp_path: Path) -> None:
    saved(tmp_path)
    program = (
        "import sys, torch, distckpt; path = distckpt.latest(sys.argv[1]); model = torch.nn.Linear(2, 2); "
        "distckpt.load({'model': model}, path); print(path.name, 'ignite' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=Path(distckpt.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=PROGRAM_LIMIT_S,
        check=True,
    )
    assert done.stdout.split() == ["checkpoint_1.pt", "False"]


# -- latest ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ext", [".pt", "", "*", 3])
def test_an_extension_that_no_file_can_have_is_refused(tmp_path: Path, ext: Any) -> None:
    with pytest.raises(ValueError, match="Argument ext should be an extension without the dot"):
        distckpt.latest(tmp_path, ext=ext)


def test_no_path_is_refused_by_name() -> None:
    nothing: Any = None
    with pytest.raises(
        TypeError, match="Argument path should be a string or Path object, but given <class 'NoneType'>"
    ):
        distckpt.load({}, nothing)


def test_without_files_there_is_no_latest(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert distckpt.latest(tmp_path) is None
    assert distckpt.latest(tmp_path / "absent") is None


def test_the_latest_is_the_last_one_saved_whatever_its_name_and_time(tmp_path: Path) -> None:
    saved(tmp_path, num_epochs=3)
    (tmp_path / "checkpoint_3.pt").rename(tmp_path / "a.pt")
    os.utime(tmp_path / "a.pt", (1.0, 1.0))
    assert distckpt.latest(tmp_path) == tmp_path / "a.pt"
    assert distckpt.latest(str(tmp_path)) == tmp_path / "a.pt"


def test_without_records_the_highest_iteration_is_the_latest(tmp_path: Path) -> None:
    for name, iteration in (("a", 4), ("b", 12), ("c", 8)):
        torch.save({"trainer": {"epoch_length": 4, "iteration": iteration}}, tmp_path / f"{name}.pt")
    assert distckpt.latest(tmp_path) == tmp_path / "b.pt"


def test_the_step_of_a_save_without_an_engine_counts_as_its_iteration(tmp_path: Path) -> None:
    for name, step in (("a", 4), ("b", 12), ("c", 8)):
        distckpt.save({"model": linear(1)}, tmp_path / f"{name}.pt", step=step)
    assert distckpt.latest(tmp_path) == tmp_path / "b.pt"


def test_saves_without_a_step_are_ordered_by_the_time_in_their_manifests(tmp_path: Path) -> None:
    for name in ("b", "c", "a"):
        distckpt.save({"model": linear(1)}, tmp_path / f"{name}.pt")
    for time_s, name in enumerate(("a", "b", "c")):  # as a copy would leave them
        os.utime(tmp_path / f"{name}.pt", (time_s, time_s))
    assert distckpt.latest(tmp_path) == tmp_path / "a.pt"


def test_a_damaged_file_is_passed_over_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, num_epochs=2)
    newest = cut(tmp_path / "checkpoint_2.pt")
    with caplog.at_level(logging.WARNING, logger="distckpt"):
        assert distckpt.latest(tmp_path) == tmp_path / "checkpoint_1.pt"
    (message,) = caplog.messages
    assert message.startswith(f"latest: {newest} cannot be loaded: ")
    assert message.endswith("It is passed over.")


def test_files_none_of_which_is_whole_are_an_error(tmp_path: Path) -> None:
    saved(tmp_path, num_epochs=2)
    for number in (1, 2):
        cut(tmp_path / f"checkpoint_{number}.pt")
    with pytest.raises(
        LoadError, match=r"None of the 2 checkpoints in .*\n- .*checkpoint_2\.pt.*\n- .*checkpoint_1\.pt"
    ):
        distckpt.latest(tmp_path)


def test_another_extension_is_looked_for_on_request(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "checkpoint_1.pt").rename(tmp_path / "a.ckpt")
    assert distckpt.latest(tmp_path) is None
    assert distckpt.latest(tmp_path, ext="ckpt") == tmp_path / "a.ckpt"


def test_a_directory_of_another_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pt").touch()
    with pytest.raises(NotADirectoryError):
        distckpt.latest(tmp_path / "a.pt")
    with pytest.raises(TypeError):
        distckpt.latest(3)  # type: ignore[arg-type]  # the point of the test
