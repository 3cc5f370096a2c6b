"""``distckpt prune`` deletes what no rule keeps, and nothing else."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from distckpt import save
from distckpt.cli import pruning
from distckpt.cli.pruning import judge
from distckpt.cli.survey import FileEntry, State
from distckpt.policy.naming import EVENTS_NAME
from distckpt.policy.policies import BestN, EveryHours, EveryNSteps, LastN, Policy
from distckpt.ptformat.manifest import Manifest
from distckpt.storage.event_file import append_events, read_events
from distckpt.storage.local import LocalStorage
from tests.unit.cli.conftest import Command, flip, train
from tests.unit.directories import names_in

STEPS = range(10, 110, 10)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for step in (10, 20, 30, 40):
        save({"model": nn.Linear(2, 2)}, tmp_path / f"step_{step}.pt", step=step)
    return tmp_path


TEXT = """\
ACTION  NAME        STEP  SCORE     SIZE  WHY
delete  step_10.pt    10      -  1.5 KiB  not kept by LastN(1), EveryNSteps(20)
keep    step_20.pt    20      -  1.5 KiB  step 20
delete  step_30.pt    30      -  1.5 KiB  not kept by LastN(1), EveryNSteps(20)
keep    step_40.pt    40      -  1.5 KiB  newest, step 40
"""


def test_a_dry_run_tells_what_it_would_delete(command: Command, directory: Path) -> None:
    before = names_in(directory)
    code, out, err = command("prune", directory, "--keep-last", "1", "--keep-every", "20")
    assert (code, err) == (0, "")
    *lines, last = out.splitlines(keepends=True)
    assert re.sub(r"\d\.\d KiB", "1.5 KiB", "".join(lines)) == TEXT
    assert last.startswith("a dry run: --yes deletes 2 files, ")
    assert names_in(directory) == before


def test_yes_deletes_what_the_dry_run_told(command: Command, directory: Path) -> None:
    told = command("prune", directory, "--keep-last", "2", "--json").json
    result = command("prune", directory, "--keep-last", "2", "--yes", "--json")
    assert result.code == 0
    assert result.json["files"] == told["files"]
    assert (told["dry_run"], result.json["dry_run"]) == (True, False)
    assert names_in(directory) == ["step_30.pt", "step_40.pt"]


def test_what_was_deleted_is_in_the_record_of_events(command: Command, directory: Path) -> None:
    (directory / "sub").mkdir()
    for step in (10, 20, 30):
        save({"model": nn.Linear(2, 2)}, directory / "sub" / f"step_{step}.pt", step=step)
    arguments = ("prune", directory, "--recursive", "--keep-last", "6")
    command(*arguments, "--yes")
    assert not read_events(directory).exists, "a directory without a record gets none"
    append_events(directory, [{"event": "start", "at_s": 1.0}])
    command(*arguments[:-1], "5")
    command(*arguments[:-1], "4", "--yes")
    append_events(directory / "sub", [{"event": "start", "at_s": 1.0}])
    command(*arguments[:-1], "1", "--keep-every", "1000", "--yes")
    assert [(one["event"], one["removed"], one["policies"]) for one in read_events(directory).events[1:]] == [
        ("prune", ["step_20.pt", "step_30.pt"], ["LastN(4)"]),
        ("prune", ["step_40.pt"], ["LastN(1)", "EveryNSteps(1000)"]),
    ]
    assert [one["removed"] for one in read_events(directory / "sub").events[1:]] == [["step_10.pt", "step_20.pt"]]


def test_a_record_that_cannot_be_written_is_told(command: Command, directory: Path) -> None:
    (directory / EVENTS_NAME).mkdir()
    code, out, _ = command("prune", directory, "--keep-last", "3", "--yes")
    assert code == 0
    assert "cannot be written: EISDIR: Is a directory" in out
    assert "step_10.pt" not in names_in(directory)


def test_rules_apply_to_each_handler(command: Command, tmp_path: Path) -> None:
    train(tmp_path, num_epochs=4)
    result = command("prune", tmp_path, "--keep-last", "1", "--yes")
    assert result.code == 0
    assert names_in(tmp_path) == ["best_model_4_acc=0.5000.pt", "checkpoint_40.pt"]


def test_the_best_of_each_handler(command: Command, tmp_path: Path) -> None:
    train(tmp_path, num_epochs=4)
    files = command("prune", tmp_path, "--keep-best", "1", "--json").json["files"]
    assert {one["name"]: one["reason"] for one in files} == {
        "best_model_2_acc=0.7500.pt": "best",
        "best_model_4_acc=0.5000.pt": "newest: a resume loads it",
        "checkpoint_30.pt": "not kept by BestN(1)",
        "checkpoint_40.pt": "newest: a resume loads it",
    }


def test_files_of_others_and_damaged_ones_are_left(command: Command, directory: Path) -> None:
    torch.save({}, directory / "foreign.pt")
    (directory / "cut.pt").write_bytes((directory / "step_10.pt").read_bytes()[:-9])
    (directory / "latest.pt").symlink_to("step_20.pt")
    (directory / "notes.txt").touch()
    files = command("prune", directory, "--keep-last", "1", "--yes", "--json").json["files"]
    assert {one["name"]: one["reason"] for one in files if one["action"] == "leave"} == {
        "foreign.pt": "not a file of distckpt",
        "cut.pt": "damaged",
        "latest.pt": "a symlink",
    }
    assert {one["name"]: one["reason"] for one in files}["step_20.pt"] == "latest.pt links to it"
    kept = ["cut.pt", "foreign.pt", "latest.pt", "notes.txt", "step_20.pt", "step_40.pt"]
    assert names_in(directory) == kept


def test_nothing_is_deleted_if_the_newest_file_is_damaged(command: Command, directory: Path) -> None:
    model = nn.Linear(64, 64)
    save({"model": model}, directory / "step_50.pt", step=50)
    flip(directory / "step_50.pt", model.weight.detach().numpy().tobytes()[:64])
    before = names_in(directory)
    code, out, err = command("prune", directory, "--keep-last", "1", "--yes")
    assert (code, out) == (1, "")
    assert "step_50.pt is the newest of its handler, and is damaged" in err
    assert names_in(directory) == before


def test_nothing_is_deleted_while_a_save_runs(command: Command, directory: Path) -> None:
    with LocalStorage(directory).create("step_50.pt"):
        before = names_in(directory)
        code, _, err = command("prune", directory, "--keep-last", "1", "--yes")
        assert code == 2
        assert "a save writes into" in err
        assert names_in(directory) == before


def test_a_file_that_was_saved_again_meanwhile_stays(
    command: Command, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_again(*_: object) -> None:
        save({"model": nn.Linear(2, 2)}, directory / "step_10.pt", step=60)
        (directory / "step_20.pt").unlink()

    monkeypatch.setattr(pruning, "_check_safe", save_again)
    files = command("prune", directory, "--keep-last", "1", "--yes", "--json").json["files"]
    reasons = {one["name"]: one["reason"] for one in files}
    assert reasons["step_10.pt"] == "it was saved again meanwhile"
    assert reasons["step_20.pt"] == "it was deleted meanwhile"
    assert names_in(directory) == ["step_10.pt", "step_40.pt"]


def test_a_file_that_cannot_be_deleted_is_told(
    command: Command, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_self: LocalStorage, name: str) -> None:
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr(LocalStorage, "remove", refuse)
    code, out, _ = command("prune", directory, "--keep-last", "3", "--yes")
    assert code == 2
    assert "not deleted: Permission denied" in out
    assert out.endswith("deleted 0 files, 0 B\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to keep: --keep-last N"),
        (["--keep-last", "0"], "0 is less than 1"),
        (["--keep-hours", "0"], "at least a minute, but given 0.0"),
        (["--keep-hours", "nan"], "at least a minute, but given nan"),
    ],
)
def test_wrong_arguments_delete_nothing(
    command: Command, directory: Path, arguments: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code, _, err = command("prune", directory, *arguments, "--yes")
    except SystemExit as ended:
        code, err = int(ended.code or 0), capsys.readouterr().err
    assert code == 2
    assert message in err
    assert len(names_in(directory)) == 4


def entry(step: int, score: float | None) -> FileEntry:
    """Return a file that was saved without a handler."""
    name = f"{step}.pt"
    return FileEntry(
        name=name,
        path=Path("/none") / name,
        state=State.COMPLETE,
        detail=None,
        num_bytes=10,
        modified_s=0.0,
        identity=(0, step, 10, 0),
        link=None,
        manifest=Manifest(versions={}, wall_time_s=60.0 * step, iteration=step, score=score),
        record=None,
    )


@pytest.mark.parametrize(
    ("policies", "kept"),
    [
        ([LastN(3)], [80, 90, 100]),
        ([BestN(2)], [30, 70, 100]),
        ([EveryNSteps(50)], [50, 100]),
        ([EveryNSteps(45)], [50, 90, 100]),
        ([EveryNSteps(1000)], [100]),
        ([EveryHours(1)], [10, 60, 100]),
        ([LastN(2), BestN(1), EveryNSteps(40)], [30, 40, 80, 90, 100]),
        ([LastN(50)], list(STEPS)),
    ],
)
def test_policies(policies: list[Policy], kept: list[int]) -> None:
    scores = {10: float("nan"), 20: None, 30: 0.9, 40: 0.1, 50: 0.1, 60: 0.3, 70: 0.8, 80: 0.1, 90: 0.2, 100: 0.0}
    verdicts = judge([entry(step, scores[step]) for step in reversed(STEPS)], policies)
    assert [verdict.entry.step for verdict in verdicts] == list(STEPS), "the oldest first"
    assert [verdict.entry.step for verdict in verdicts if verdict.action == "keep"] == kept


def test_prune_follows_no_symlink_of_a_folder(
    command: Command, directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("step_10.pt", "step_20.pt"):
        (directory / name).rename(elsewhere / name)
    (directory / "folder").symlink_to(elsewhere)
    assert command("prune", directory, "-r", "--keep-last", "1", "--yes").code == 0
    assert names_in(elsewhere) == ["step_10.pt", "step_20.pt"]
