"""The record in a manifest: whose a file is, of which run, and what its handler kept."""

import json
import math
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events

from distckpt import Checkpoint, DiskSaver
from distckpt.ptformat.archive import read_head_at
from distckpt.ptformat.manifest import Manifest, from_json, read_head, to_json
from distckpt.ptformat.records import parse_record
from tests.unit.toys import idle_engine, linear


def record_of(path: Path) -> dict[str, Any]:
    """Return what a file's record says."""
    head = read_head_at(path)
    assert head is not None
    assert head.record is not None
    return dict(head.record)


def saved(folder: Path, *, epochs: int = 3, **kwargs: Any) -> tuple[Engine, Checkpoint]:
    """Run some epochs of four iterations, and save after each."""
    trainer = idle_engine()
    handler = Checkpoint({"model": linear(1), "trainer": trainer}, DiskSaver(folder, require_empty=False), **kwargs)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
    trainer.run(range(4), max_epochs=epochs)
    return trainer, handler


@pytest.mark.parametrize("priority", [True, 2**70 + 1, 1e-05, -math.inf, math.inf, 0.1 + 0.2])
def test_numbers_of_a_record_come_back_as_they_were(priority: float) -> None:
    written = Manifest(versions={}, wall_time_s=0.0, record={"kept": [[priority, "caf\udce9.pt"]]})
    for found in (from_json(to_json(written)).record, read_head(to_json(written)).record):
        assert found is not None
        ((value, name),) = found["kept"]
        assert name == "caf\udce9.pt"
        assert value == (str(priority) if math.isinf(priority) else priority)
        assert type(value) is str if math.isinf(priority) else type(value) is type(priority)


def test_a_file_says_of_which_run_it_is_and_what_its_handler_kept(tmp_path: Path) -> None:
    trainer, handler = saved(tmp_path, n_saved=2)
    assert handler.last_checkpoint is not None
    found = record_of(tmp_path / "checkpoint_12.pt")
    assert found["kept"] == [[8, "checkpoint_8.pt"], [12, "checkpoint_12.pt"]]
    assert found["evicted"] == ["checkpoint_4.pt"]
    assert found["number"] == 2
    assert found["run"]["lineage"] == []
    assert found["run"] == record_of(tmp_path / "checkpoint_8.pt")["run"]
    state = trainer.state
    assert found["engine"] == {
        "key": ["trainer"],
        "iteration": 12,
        "epoch": 3,
        "max_epochs": 3,
        "max_iters": None,
        "epoch_length": state.epoch_length,
    }


def test_a_new_run_of_the_same_engine_is_another_run(tmp_path: Path) -> None:
    trainer, handler = saved(tmp_path, epochs=1, n_saved=None)
    handler.reset()
    before = record_of(tmp_path / "checkpoint_4.pt")["run"]
    trainer.run(range(4), max_epochs=1)
    after = record_of(tmp_path / "checkpoint_4.pt")["run"]
    assert after["id"] != before["id"]
    assert after["lineage"] == []


def test_handlers_of_one_engine_count_their_saves_together(tmp_path: Path) -> None:
    trainer = idle_engine()
    saver = DiskSaver(tmp_path)
    for prefix in ("a", "b"):
        trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint({"model": linear(1)}, saver, prefix, n_saved=None))
    trainer.run(range(4), max_epochs=2)
    numbers = {path.name: record_of(path)["number"] for path in tmp_path.iterdir()}
    assert numbers == {"a_model_4.pt": 0, "b_model_4.pt": 1, "a_model_8.pt": 2, "b_model_8.pt": 3}


def test_handlers_that_name_their_files_alike_are_told_apart(tmp_path: Path) -> None:
    trainer = idle_engine()
    saver = DiskSaver(tmp_path)
    handlers = [Checkpoint({"model": linear(1)}, saver) for _ in range(2)]
    for handler in reversed(handlers):
        trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
    orders = [handler._find_own_files().identity["order"] for handler in handlers]
    assert orders == [0, 1]


def test_a_record_is_read_without_reading_the_state_and_from_an_archive_written_anew(tmp_path: Path) -> None:
    saved(tmp_path, n_saved=None)
    path, again = tmp_path / "checkpoint_12.pt", tmp_path / "again.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(again, "w", zipfile.ZIP_DEFLATED) as target:
        for name in reversed(source.namelist()):
            content = source.read(name)
            if name.endswith("distckpt.json"):
                content = json.dumps(json.loads(content), indent=1).encode()
            target.writestr(name, content)
    assert record_of(again) == record_of(path)


def test_a_long_history_is_not_recorded_but_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distckpt.handlers.build_manifest._MAX_KEPT", 2)
    for name in ("old_1.pt", "checkpoint_1.pt"):  # of no handler, and of one without records
        torch.save({}, tmp_path / name)
    saved(tmp_path, n_saved=3, epochs=5)
    record = parse_record(record_of(tmp_path / "checkpoint_20.pt"))
    assert record is not None
    assert (record.kept, record.num_kept) == (((20, "checkpoint_20.pt"),), 3)
    handler = Checkpoint({"model": linear(1), "trainer": idle_engine()}, DiskSaver(tmp_path, require_empty=False))
    own = handler._find_own_files()
    found = own.recorded_history("checkpoint_20.pt", own.survey())
    assert found is not None
    assert found.entries == ((12, "checkpoint_12.pt"), (16, "checkpoint_16.pt"), (20, "checkpoint_20.pt"))
    # A file that is newer than the resumed one is not part of its history, and a file too many is left alone.
    found = own.recorded_history("checkpoint_16.pt", own.survey())
    assert found is not None
    assert found.entries == ((12, "checkpoint_12.pt"), (16, "checkpoint_16.pt"))


def test_a_file_without_a_record_has_none(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "plain.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    saved(tmp_path, epochs=1)
    shutil.copy(tmp_path / "checkpoint_4.pt", tmp_path / "cut.pt")
    with (tmp_path / "cut.pt").open("r+b") as file:
        file.truncate((tmp_path / "cut.pt").stat().st_size - 100)
    DiskSaver(tmp_path, require_empty=False)({}, "by_hand.pt")
    heads = {name: read_head_at(tmp_path / f"{name}.pt") for name in ("plain", "empty", "cut", "by_hand")}
    assert {name: head and head.record for name, head in heads.items()} == dict.fromkeys(heads)


def test_a_record_that_cannot_be_understood_counts_as_none() -> None:
    run = {"id": "a", "started_s": 1.0, "lineage": []}
    good: dict[str, Any] = {
        "handler": {},
        "run": run,
        "number": 0,
        "kept": [[1, "a.pt"]],
        "evicted": [],
        "engine": {},
        "data": {},
    }
    assert parse_record(good) is not None
    assert parse_record(good | {"kept": [["inf", "a.pt"]]}) is not None
    bad: list[dict[str, Any]] = [
        {},
        {"run": run},
        good | {"handler": [1]},
        good | {"kept": [["x", "a.pt"]]},
        good | {"kept": [[None, "a.pt"]]},
        good | {"number": "x"},
        good | {"engine": None},
        *(good | {"run": run | {"started_s": one}} for one in (math.nan, math.inf, 1e300, "x", None, -1.0)),
    ]
    assert [parse_record(one) for one in bad] == [None] * len(bad)
