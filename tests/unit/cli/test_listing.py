"""``distckpt ls`` tells of each file what it is, whose, and why it is there."""

import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from torch import nn

from distckpt import BestN, Checkpoint, EveryNSteps, save
from distckpt.cli import main, output
from distckpt.cli.output import Output
from distckpt.policy.naming import TEMP_PREFIX, TEMP_SUFFIX
from distckpt.storage.local import LocalStorage
from tests.unit.cli.conftest import Command, flip
from tests.unit.toys import idle_engine

TEXT = """\
DIR: 4 checkpoints, SIZE

best_model by acc, run RUN1, 1 rank (serial)
NAME                        STEP  EPOCH  AGE     SIZE  SCORE  KEPT      SAVED ON         STATE
best_model_2_acc=0.7500.pt    20      2  5 s  N.N KiB   0.75  1st of 2  EPOCH_COMPLETED  complete

best_model by acc, run RUN2, which went on from RUN1, 1 rank (serial)
NAME                        STEP  EPOCH  AGE     SIZE  SCORE  KEPT      SAVED ON         STATE
best_model_4_acc=0.5000.pt    40      4  5 s  N.N KiB    0.5  2nd of 2  EPOCH_COMPLETED  complete

checkpoint by step, run RUN2, which went on from RUN1, 1 rank (serial)
NAME              STEP  EPOCH  AGE     SIZE  SCORE  KEPT      SAVED ON         STATE
checkpoint_30.pt    30      3  5 s  N.N KiB      -  2nd of 2  EPOCH_COMPLETED  complete
checkpoint_40.pt    40      4  5 s  N.N KiB      -  1st of 2  EPOCH_COMPLETED  complete
"""


def normalised(text: str, directory: Path) -> str:
    """Return a listing without what differs from run to run."""
    runs = list(dict.fromkeys(re.findall(r"(?:run|from) ([0-9a-f]{8})", text)))
    for number, run in enumerate(runs, start=1):
        text = text.replace(run, f"RUN{number}")
    text = re.sub(r"(checkpoints.*), [\d.]+ [KM]iB", r"\1, SIZE", text.replace(str(directory), "DIR"))
    return re.sub(r"\d\.\d KiB", "N.N KiB", text)


def test_a_resumed_run_is_listed_by_handler_and_run(command: Command, trained: Path) -> None:
    code, out, err = command("ls", trained)
    assert (code, err) == (0, "")
    assert normalised(out, trained) == TEXT


def test_json_has_the_runs_and_what_handlers_keep(command: Command, trained: Path) -> None:
    found = {one["name"]: one for one in command("ls", trained, "--json").json["files"]}
    last, best = found["checkpoint_40.pt"], found["best_model_2_acc=0.7500.pt"]
    assert last["run"]["went_on_from"] == best["run"]["id"]
    assert best["run"]["went_on_from"] is None
    assert last["kept"] == {"place": 1, "of": 2, "by_score": False}
    assert best["kept"] == {"place": 1, "of": 2, "by_score": True}
    assert (best["score"], best["step"], best["epoch"], best["reason"]) == (0.75, 20, 2, "EPOCH_COMPLETED")
    assert (best["world_size"], best["backend"], best["state"]) == (1, "serial", "complete")


def test_other_files_are_told_apart(command: Command, tmp_path: Path) -> None:
    save({"model": nn.Linear(2, 2)}, tmp_path / "own.pt", step=7)
    shutil.copy(tmp_path / "own.pt", tmp_path / "renamed")
    torch.save({"a": torch.ones(2)}, tmp_path / "foreign.pt")
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "own.pt").read_bytes()[:-1])
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "notes.txt").write_text("of no interest")
    (tmp_path / "latest.pt").symlink_to("own.pt")
    (tmp_path / "gone.pt").symlink_to("nowhere.pt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "below.pt").write_bytes((tmp_path / "own.pt").read_bytes())
    os.mkfifo(tmp_path / "pipe.pt")
    flip(tmp_path / "renamed", b'"schema"')
    result = command("ls", tmp_path, "--json")
    assert result.code == 1
    assert {one["name"]: one["state"] for one in result.json["files"]} == {
        "own.pt": "complete",
        "foreign.pt": "complete",
        "old.pt": "complete",
        "cut.pt": "damaged",
        "empty.pt": "damaged",
        "text.pt": "damaged",
        "latest.pt": "complete",
        "gone.pt": "unreadable",
    }
    shown = command("ls", tmp_path).out
    assert "latest.pt -> own.pt" in shown
    assert "gone.pt is unreadable: its symlink is broken" in shown
    assert "empty.pt is damaged: it is empty" in shown
    names = [one["name"] for one in command("ls", tmp_path, "-r", "--json").json["files"]]
    assert "folder/below.pt" in names


def test_a_damaged_manifest_is_damage(command: Command, tmp_path: Path) -> None:
    save({"model": nn.Linear(2, 2)}, tmp_path / "a.pt", step=7)
    flip(tmp_path / "a.pt", b'"schema"')
    assert command("ls", tmp_path).out.splitlines()[-1] == "a.pt is damaged: its manifest is damaged"


def test_damaged_data_is_found_only_by_reading_it(command: Command, tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    save({"model": model}, tmp_path / "a.pt", step=7)
    assert command("ls", tmp_path, "--verify", "--json").json["files"][0]["state"] == "whole"
    flip(tmp_path / "a.pt", model.weight.detach().numpy().tobytes()[:64])
    assert command("ls", tmp_path).code == 0
    result = command("ls", tmp_path, "--verify")
    assert result.code == 1
    assert "a.pt is damaged: record data/0 (tensor weight) has checksum" in result.out


def test_temporary_files_are_being_written_or_left_over(command: Command, tmp_path: Path) -> None:
    dead = tmp_path / f"{TEMP_PREFIX}00000000-1-a{TEMP_SUFFIX}"
    dead.write_bytes(b"x")
    os.utime(dead, (1, 1))  # another host's, an hour ago
    with LocalStorage(tmp_path).create("a.pt") as new:
        dead.write_bytes(b"x")
        os.utime(dead, (1, 1))
        result = command("ls", tmp_path, "--json")
        assert {one["name"]: one["state"] for one in result.json["files"]} == {
            new.token: "being written",
            dead.name: "left over",
        }
        assert result.code == 0
    assert dead.exists(), "ls changes nothing"


def test_what_a_handler_keeps_and_what_is_gone(command: Command, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "checkpoint_30.pt").unlink()
    shutil.copy(trained / "checkpoint_40.pt", tmp_path / "run" / "copy.pt")
    result = command("ls", tmp_path / "run", "--json")
    assert result.json["missing"] == ["checkpoint_30.pt"]
    assert {one["name"]: one["kept_as"] for one in result.json["files"]}["copy.pt"] == "not kept"
    assert "checkpoint_30.pt is kept by its handler, and is not there" in command("ls", tmp_path / "run").out


def test_a_history_that_is_too_long_for_a_record_is_found(command: Command, tmp_path: Path) -> None:
    model, engine = nn.Linear(2, 2), idle_engine()
    handler = Checkpoint({"model": model}, tmp_path, n_saved=None)
    engine.add_event_handler(Events.ITERATION_COMPLETED, handler)
    engine.run(range(102), max_epochs=1)
    (tmp_path / "model_50.pt").unlink()
    kept = {one["name"]: one["kept_as"] for one in command("ls", tmp_path, "--json").json["files"]}
    assert (kept["model_102.pt"], kept["model_51.pt"], kept["model_1.pt"]) == (
        "1st of 102",
        "52nd of 102",
        "101st of 102",
    )
    assert "its handler kept then: 102 files" in command("inspect", tmp_path / "model_102.pt").out


def test_a_newer_format_says_what_to_upgrade(command: Command, tmp_path: Path) -> None:
    save({"model": nn.Linear(2, 2)}, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    at = content.index(b'{"schema": 2')
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr(
            "archive/distckpt.json", content[at:].partition(b"\nPK")[0].replace(b'"schema": 2', b'"schema": 9')
        )
    (tmp_path / "a.pt").unlink()
    result = command("ls", tmp_path)
    assert result.code == 1
    assert "b.pt is unreadable: it has schema 9, of distckpt" in result.out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "missing does not exist: give the directory"),
        ("file", "file is no directory: give the directory"),
        ("dcp", "dcp is one checkpoint, of torch.distributed.checkpoint (distckpt inspect"),
    ],
)
def test_what_is_no_directory_is_told_in_a_line(command: Command, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").touch()
    code, out, err = command("ls", tmp_path / name)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_an_empty_directory_holds_no_checkpoints(command: Command, tmp_path: Path) -> None:
    code, out, _ = command("ls", tmp_path)
    assert (code, out) == (1, f"{tmp_path} holds no checkpoints (--recursive: in sub-folders)\n")


def test_names_cannot_change_the_terminal(command: Command, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "a\x1b[2J\n.pt")
    torch.save({}, tmp_path / os.fsdecode(b"caf\xe9.pt"))
    out = command("ls", tmp_path).out
    assert "\x1b" not in out
    assert "a\\x1b[2J\\n.pt" in out
    assert "caf\\udce9.pt" in out


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_listing_fits_the_terminal(
    trained: Path, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "_print_by_rich", lambda *_: False)
    monkeypatch.setattr(Output, "to", lambda stream, *, is_json: Output(stream, is_json=is_json, width=width))
    assert main(["ls", str(trained)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if "complete" in line]
    assert len(rows) == 4
    assert max(map(len, rows)) <= width
    assert ("EPOCH_COMPLETED" in rows[0]) == (width == 120)


def test_policies_say_why_a_file_is_kept(command: Command, tmp_path: Path) -> None:
    trainer, scores = idle_engine(), [0.1, 0.9, 0.9, 0.5, 0.4, 0.3]
    handler = Checkpoint(
        {"model": nn.Linear(2, 2)},
        tmp_path,
        score_function=lambda engine: scores[engine.state.iteration - 1],
        global_step_transform=lambda engine, _event: engine.state.iteration,
        keep=[BestN(2), EveryNSteps(4)],
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    trainer.run(range(6), max_epochs=1)
    found = {one["name"]: one for one in command("ls", tmp_path, "--json").json["files"]}
    assert {name: one["kept_as"] for name, one in found.items()} == {
        "model_2_0.9000.pt": "2nd best",
        "model_3_0.9000.pt": "best",
        "model_4_0.5000.pt": "step 4",
        "model_6_0.3000.pt": "newest",
    }
    assert found["model_4_0.5000.pt"]["kept"] == {
        "place": 3,
        "of": 4,
        "by_score": True,
        "policies": ["EveryNSteps(4)"],
    }
    assert found["model_6_0.3000.pt"]["kept"]["policies"] == ["LastN(1)"]
