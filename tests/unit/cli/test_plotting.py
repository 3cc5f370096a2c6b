"""``distckpt plot`` as a command: what it writes, and what it refuses."""

import os
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from ignite.engine import Engine, Events

from distckpt import Checkpoint, DiskSaver, resume, save
from distckpt.policy.naming import EVENTS_NAME
from distckpt.storage.new_file import LocalNewFile
from tests.unit.cli.conftest import Command, train
from tests.unit.directories import names_in
from tests.unit.toys import linear

LENGTH = 4


def run(directory: Path, *, epochs: int, fails_at: int | None = None) -> None:
    """Train and save each epoch, as a program that is started again does."""

    def step(engine: Engine, _: object) -> None:
        if engine.state.iteration == fails_at:
            raise ValueError("lost")

    trainer = Engine(step)
    objects = {"model": linear(0), "trainer": trainer}
    saver = DiskSaver(directory, require_empty=False, record_events=True)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(objects, saver))
    resume(objects, directory, engine=trainer)
    trainer.run(range(LENGTH), max_epochs=epochs)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a directory of a run that failed in its second epoch and was resumed."""
    folder = tmp_path / "checkpoints"
    with pytest.raises(ValueError, match="lost"):
        run(folder, epochs=3, fails_at=LENGTH + 3)
    run(folder, epochs=3)
    return folder


def test_a_picture_of_a_run_that_failed_and_was_resumed(command: Command, directory: Path, tmp_path: Path) -> None:
    before = names_in(directory)
    code, out, err = command("plot", directory, "-o", tmp_path / "run.svg")
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path / 'run.svg'}: 2 sessions, 3 saves, ")
    texts = [one.text for one in ET.parse(tmp_path / "run.svg").iter()]  # noqa: S314 - made here
    assert "ValueError, 2 lost" in texts
    assert names_in(directory) == before
    assert names_in(tmp_path) == ["checkpoints", "run.svg"]


def test_json_has_the_data_of_the_picture(command: Command, directory: Path, tmp_path: Path) -> None:
    alone = command("plot", directory, "--json")
    found = command("plot", directory, "--json", "-o", tmp_path / "run.svg").json
    assert alone.code == 0
    assert alone.json == found
    assert (tmp_path / "run.svg").exists()
    assert (found["has_record"], found["lost"], found["num_dropped"]) == (True, 2, 0)
    first, second = found["sessions"]
    assert (first["outcome"], first["start_iteration"], first["reached"]) == ("ValueError", 0, LENGTH + 2)
    assert (second["outcome"], second["start_iteration"], second["reached"]) == ("complete", LENGTH, 3 * LENGTH)
    assert [save["is_there"] for save in second["saves"]] == [False, True]
    assert second["resumed"]["file"] == f"checkpoint_{LENGTH}.pt"


def test_a_directory_without_a_record_is_drawn_from_its_files(command: Command, tmp_path: Path) -> None:
    train(tmp_path, num_epochs=2)
    save({"model": linear(0)}, tmp_path / "own.pt", step=7)
    code, out, _ = command("plot", tmp_path, "-o", tmp_path / "run.svg")
    assert code == 0
    assert f"no record of events ({EVENTS_NAME})" in out
    assert command("plot", tmp_path, "--json").json["other_saves"][0]["file"] == "own.pt"


def test_an_existing_picture_is_replaced(command: Command, directory: Path, tmp_path: Path) -> None:
    (tmp_path / "run.svg").write_text("old")
    assert command("plot", directory, "-o", tmp_path / "run.svg").code == 0
    assert (tmp_path / "run.svg").read_text().startswith("<svg ")


def test_a_picture_that_cannot_be_written_leaves_the_old_one(
    command: Command, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.svg").write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(LocalNewFile, "sync", fail)
    code, out, err = command("plot", directory, "-o", tmp_path / "run.svg")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert (tmp_path / "run.svg").read_text() == "old"
    assert names_in(tmp_path) == ["checkpoints", "run.svg"]


@pytest.mark.parametrize(
    ("out", "what"),
    [
        ("checkpoints/checkpoint_12.pt", "ends in .svg"),
        ("missing/run.svg", "no directory"),
        ("folder.svg", "no regular file"),
        ("link.svg", "no regular file"),
        (None, "-o FILE.svg"),
    ],
)
def test_a_wrong_name_of_the_picture_changes_nothing(
    command: Command, directory: Path, tmp_path: Path, out: str | None, what: str
) -> None:
    (tmp_path / "folder.svg").mkdir()
    (tmp_path / "link.svg").symlink_to(directory / EVENTS_NAME)
    before = {path: path.read_bytes() for path in directory.iterdir()}
    code, printed, err = command("plot", directory, *(() if out is None else ("-o", tmp_path / out)))
    assert (code, printed) == (2, "")
    assert what in err
    assert len(err.splitlines()) == 1
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.parametrize("kind", ["empty", "empty record", "torn record"])
def test_a_directory_with_nothing_to_plot(command: Command, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    if kind != "empty":
        (folder / EVENTS_NAME).write_text("" if kind == "empty record" else '{"event": "sta')
    code, out, err = command("plot", folder, "-o", tmp_path / "run.svg", "--json")
    assert (code, out) == (1, "")
    assert "nothing to plot" in err
    assert names_in(tmp_path) == ["folder"]


@pytest.mark.parametrize("kind", ["missing", "a file", "a fifo for a record"])
def test_what_is_no_directory_of_a_run_is_refused(command: Command, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "folder"
    if kind == "a file":
        folder.write_text("")
    elif kind == "a fifo for a record":
        folder.mkdir()
        os.mkfifo(folder / EVENTS_NAME)
    code, out, err = command("plot", folder, "-o", tmp_path / "run.svg")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run.svg").exists()


def test_a_directory_whose_name_has_control_characters(command: Command, directory: Path, tmp_path: Path) -> None:
    strange = directory.rename(tmp_path / "a\x1b[2J\n<b>")
    code, out, _ = command("plot", strange, "-o", tmp_path / "run.svg")
    assert code == 0
    assert "\x1b" not in out
    assert "\\x1b[2J\\n<b>" in (ET.parse(tmp_path / "run.svg").getroot()[0].text or "")  # noqa: S314


def test_the_other_commands_do_not_take_the_record_for_a_file_of_theirs(command: Command, directory: Path) -> None:
    listed = command("ls", directory, "--json")
    assert [one["name"] for one in listed.json["files"]] == ["checkpoint_12.pt"]
    assert command("verify", directory).code == 0
    assert command("prune", directory, "--keep-last", "1", "--yes").code == 0
    assert (directory / EVENTS_NAME).exists()
