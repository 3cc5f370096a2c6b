"""resume() by the records in manifests: the owners of files, histories, the newest file, and ties."""

import logging
import os
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events

from distckpt import Checkpoint, DiskSaver, ModelCheckpoint, global_step_from_engine, resume
from distckpt.ptformat.archive import read_head_at
from distckpt.storage.local import LocalStorage
from tests.unit.ptformat.test_records import record_of
from tests.unit.toys import Notebook, idle_engine

LENGTH = 4


def on_disk(folder: Path) -> list[str]:
    """Return the names of the files."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.pt"))


def program(
    epochs: int,
    make: Callable[[dict[str, Any], Engine], Checkpoint],
    *,
    event: Any = Events.EPOCH_COMPLETED,
    model_only: bool = False,
    also: Callable[[dict[str, Any], Engine], None] | None = None,
) -> Checkpoint:
    """Make everything anew, resume, and train: a process of its own, but for the process."""
    trainer = idle_engine()
    objects: dict[str, Any] = {"note": Notebook({"run": 0})}
    if not model_only:
        objects["trainer"] = trainer
    handler = make(objects, trainer)
    trainer.add_event_handler(event, handler)
    if also is not None:
        also(objects, trainer)
    resume(objects, handler, engine=None if model_only else trainer)
    trainer.run(range(LENGTH), max_epochs=epochs)
    return handler


def saver(folder: Path, **kwargs: Any) -> Callable[[dict[str, Any], Engine], Checkpoint]:
    """Return what makes a Checkpoint."""
    return lambda objects, _: Checkpoint(objects, DiskSaver(folder, require_empty=False), **kwargs)


# -- a new run's saves count -----------------------------------------------------------------------


def test_a_new_run_replaces_the_checkpoints_of_the_former_one(tmp_path: Path) -> None:
    program(3, saver(tmp_path), model_only=True)
    handler = program(1, saver(tmp_path), model_only=True)
    assert on_disk(tmp_path) == ["note_4.pt"]
    assert handler.state_dict() == {"_saved": [(4, "note_4.pt")]}


def test_a_new_run_saves_under_the_same_name(tmp_path: Path) -> None:
    program(1, saver(tmp_path), model_only=True)
    before = record_of(tmp_path / "note_4.pt")["run"]
    program(1, saver(tmp_path), model_only=True)
    after = record_of(tmp_path / "note_4.pt")["run"]
    assert after["lineage"] == [before["id"]]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lambda e, _: 100 * e.state.epoch, lambda e, _: e.state.epoch),
        (None, lambda e, _: e.state.epoch),
        (lambda e, _: e.state.iteration / 1e-3, None),
    ],
)
def test_steps_that_are_counted_in_another_way_count_as_later(tmp_path: Path, before: Any, after: Any) -> None:
    program(2, saver(tmp_path, n_saved=2, global_step_transform=before))
    handler = program(6, saver(tmp_path, n_saved=2, global_step_transform=after))
    names = [name for _, name in handler.state_dict()["_saved"]]
    assert on_disk(tmp_path) == sorted(names)
    assert [torch.load(tmp_path / name, weights_only=True)["trainer"]["iteration"] for name in names] == [20, 24]


def test_in_one_process_a_second_run_saves_too_and_a_lower_step_of_the_same_run_does_not(tmp_path: Path) -> None:
    trainer = idle_engine()
    handler = Checkpoint({"trainer": trainer}, DiskSaver(tmp_path))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
    trainer.run(range(LENGTH), max_epochs=3)
    trainer.state.max_epochs = None
    trainer.run(range(LENGTH), max_epochs=1)
    assert on_disk(tmp_path) == ["trainer_4.pt"]
    trainer.state.iteration = 3
    handler(trainer)
    assert on_disk(tmp_path) == ["trainer_4.pt"]


def test_a_resumed_run_that_trains_nothing_saves_nothing_again(tmp_path: Path) -> None:
    events = Events.EPOCH_COMPLETED | Events.STARTED
    program(2, saver(tmp_path), event=events)
    before = record_of(tmp_path / "checkpoint_8.pt")
    trainer = idle_engine()
    objects = {"note": Notebook(), "trainer": trainer}
    handler = saver(tmp_path)(objects, trainer)
    trainer.add_event_handler(Events.STARTED, handler)
    resume(objects, handler, engine=trainer)
    trainer.add_event_handler(Events.STARTED, trainer.terminate)
    trainer.run(range(LENGTH), max_epochs=3)
    assert record_of(tmp_path / "checkpoint_8.pt") == before


@pytest.mark.parametrize("n_saved", [None, 3])
def test_a_state_that_is_saved_again_under_a_lower_step_is_the_newest(tmp_path: Path, n_saved: int | None) -> None:
    program(2, saver(tmp_path, n_saved=n_saved), event=Events.ITERATION_COMPLETED(every=4))
    handler = program(2, saver(tmp_path, n_saved=n_saved, global_step_transform=lambda e, _: e.state.epoch))
    names = [name for _, name in handler.state_dict()["_saved"]]
    assert names == ["checkpoint_4.pt", "checkpoint_8.pt", "checkpoint_2.pt"]
    assert handler.last_checkpoint == tmp_path / "checkpoint_2.pt"


# -- the owners of files -----------------------------------------------------------------------------


def best_of(scores: list[float]) -> Callable[[Engine], float]:
    """Return a function of an engine's epoch."""
    return lambda engine: scores[engine.state.epoch - 1]


def test_the_best_next_to_the_latest_keeps_its_history_without_being_saved(tmp_path: Path) -> None:
    made: list[Checkpoint] = []

    def best(where: str, objects: dict[str, Any], trainer: Engine) -> None:
        evaluator = idle_engine()
        folder = tmp_path / "best" if where == "apart" else tmp_path
        score = best_of([0.1, 0.30001, 0.30002, 0.2, 0.300011, 0.1])
        disk, step = DiskSaver(folder, require_empty=False), global_step_from_engine(trainer)
        handler = Checkpoint(objects, disk, "best", lambda _: score(trainer), n_saved=2, global_step_transform=step)
        made.append(handler)
        if where == "evaluator":
            trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([0]))
            evaluator.add_event_handler(Events.COMPLETED, handler)
        else:
            trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)

    for where in ("trainer", "evaluator", "apart"):
        shutil.rmtree(tmp_path)
        for epochs in (3, 4, 6):
            program(epochs, saver(tmp_path), also=partial(best, where))
        kept = [(0.300011, "best_checkpoint_5_0.3000.pt"), (0.30002, "best_checkpoint_3_0.3000.pt")]
        assert made[-1].state_dict() == {"_saved": kept}
        assert {name for _, name in kept} <= {Path(name).name for name in on_disk(tmp_path)}


def test_a_model_checkpoint_finds_its_own_before_it_is_called_and_not_anothers(tmp_path: Path) -> None:
    found = None
    for epochs in (2, 3):
        trainer = idle_engine()
        objects = {"note": Notebook(), "trainer": trainer}
        other = ModelCheckpoint(tmp_path, n_saved=None, require_empty=False)
        latest = ModelCheckpoint(tmp_path, n_saved=1, require_empty=False)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=3), other, {"note": objects["note"]})
        found = resume(objects, latest, engine=trainer)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, latest, objects)
        trainer.run(range(LENGTH), max_epochs=epochs)
    assert found is not None
    assert found.name == "checkpoint_8.pt"
    assert on_disk(tmp_path) == ["checkpoint_12.pt", "note_12.pt", "note_3.pt", "note_6.pt", "note_9.pt"]


def test_handlers_whose_names_are_alike_never_remove_each_others_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def more(objects: dict[str, Any], trainer: Engine) -> None:
        handler = Checkpoint(objects, DiskSaver(tmp_path, require_empty=False), n_saved=None)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=3), handler)

    for epochs in (3, 6):
        program(epochs, saver(tmp_path), also=more)
    shared = {"checkpoint_12.pt"}  # written by both, and last by the one that removes it
    assert {f"checkpoint_{step}.pt" for step in range(3, 25, 3)} - shared <= set(on_disk(tmp_path))
    assert "already gone" not in caplog.text


def test_a_history_that_names_anothers_file_does_not_remove_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program(1, saver(tmp_path, filename_prefix="other"))
    trainer = idle_engine()
    handler = Checkpoint({"trainer": trainer}, DiskSaver(tmp_path, require_empty=False))
    handler.load_state_dict({"_saved": [(1, "other_checkpoint_4.pt")]})
    trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
    trainer.run(range(LENGTH), max_epochs=1)
    assert on_disk(tmp_path) == ["other_checkpoint_4.pt", "trainer_4.pt"]
    assert "its manifest says that another handler saved it (prefix='other'" in caplog.text


def test_files_without_a_record_that_could_be_anothers_are_not_removed(tmp_path: Path) -> None:
    for step in (1, 2):
        state = {"note": {}, "trainer": {"iteration": step, "epoch_length": LENGTH, "max_epochs": 9}}
        torch.save(state, tmp_path / f"checkpoint_{step}.pt")

    def scored(objects: dict[str, Any], trainer: Engine) -> None:
        handler = Checkpoint(objects, DiskSaver(tmp_path, require_empty=False), score_function=best_of([0.5, 0.4, 0.3]))
        trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)

    program(3, saver(tmp_path), also=scored)
    assert {"checkpoint_1.pt", "checkpoint_2.pt"} <= set(on_disk(tmp_path))


# -- histories ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transform", "score"),
    [
        (lambda e, _: f"ep{e.state.epoch:02d}", lambda e: 1e-5 * e.state.epoch),
        (lambda e, _: e.state.epoch * 1e-6, None),
        (lambda e, _: 2**70 + e.state.epoch, None),
        (lambda e, _: e.state.epoch, lambda e: e.state.epoch > 1),
        (None, lambda e: float("inf") if e.state.epoch > 1 else float("-inf")),
    ],
)
def test_a_priority_that_names_do_not_hold_comes_back_exact(tmp_path: Path, transform: Any, score: Any) -> None:
    make = saver(tmp_path, n_saved=2, global_step_transform=transform, score_function=score)
    before = program(2, make).state_dict()
    trainer = idle_engine()
    objects = {"note": Notebook(), "trainer": trainer}
    handler = make(objects, trainer)
    assert resume(objects, handler, engine=trainer) is not None
    assert handler.state_dict() == before
    assert [type(priority) for priority, _ in handler.state_dict()["_saved"]] == [
        type(one) for one, _ in before["_saved"]
    ]


def test_files_that_a_killed_save_was_to_remove_are_removed_by_the_next(tmp_path: Path) -> None:
    program(1, saver(tmp_path))
    shutil.copy(tmp_path / "checkpoint_4.pt", tmp_path / "kept")
    program(2, saver(tmp_path))
    (tmp_path / "kept").rename(tmp_path / "checkpoint_4.pt")  # as if it had died before the removal
    program(3, saver(tmp_path))
    assert on_disk(tmp_path) == ["checkpoint_12.pt"]


def test_a_removed_file_is_not_in_the_history(tmp_path: Path) -> None:
    program(3, saver(tmp_path, n_saved=3))
    (tmp_path / "checkpoint_8.pt").unlink()
    trainer = idle_engine()
    objects = {"note": Notebook(), "trainer": trainer}
    handler = saver(tmp_path, n_saved=3)(objects, trainer)
    resume(objects, handler, engine=trainer)
    assert handler.state_dict() == {"_saved": [(4, "checkpoint_4.pt"), (12, "checkpoint_12.pt")]}


def test_another_n_saved_keeps_the_history(tmp_path: Path) -> None:
    program(3, saver(tmp_path, n_saved=3))
    program(4, saver(tmp_path, n_saved=2))
    assert on_disk(tmp_path) == ["checkpoint_12.pt", "checkpoint_16.pt"]


# -- the newest file ---------------------------------------------------------------------------------


def test_neither_names_nor_times_of_files_nor_clocks_change_which_is_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, now_s = tmp_path / "a", time.time()
    for run, epochs in enumerate((2, 3, 4)):
        monkeypatch.setattr(time, "time", lambda run=run: now_s - 1e6 * run)
        program(epochs, saver(folder, n_saved=None))
    shutil.copytree(folder, tmp_path / "b")
    for at, path in enumerate(sorted((tmp_path / "b").iterdir())):
        os.utime(path, (at, at))
    (tmp_path / "b" / "checkpoint_16.pt").rename(tmp_path / "b" / "a.pt")
    found = resume({"note": Notebook(), "trainer": idle_engine()}, tmp_path / "b")
    assert found is not None
    assert found.name == "a.pt"


def test_of_two_runs_the_later_one_is_resumed_and_the_files_of_the_other_stay(tmp_path: Path) -> None:
    for epochs in (3, 2):
        trainer = idle_engine()
        objects = {"note": Notebook(), "trainer": trainer}
        handler = saver(tmp_path, n_saved=None)(objects, trainer)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
        trainer.run(range(LENGTH), max_epochs=epochs)
    (tmp_path / "checkpoint_4.pt").unlink()
    handler = program(3, saver(tmp_path, n_saved=1))
    assert on_disk(tmp_path) == ["checkpoint_12.pt"]
    assert record_of(tmp_path / "checkpoint_12.pt")["evicted"] == ["checkpoint_8.pt"]


def test_a_file_that_another_run_has_overwritten_is_not_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def start() -> tuple[Engine, Checkpoint]:
        trainer = idle_engine()
        handler = saver(tmp_path)({"note": Notebook(), "trainer": trainer}, trainer)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
        return trainer, handler

    first, handler = start()
    second, _ = start()
    first.run(range(LENGTH), max_epochs=1)
    second.run(range(LENGTH), max_epochs=1)  # as a job that is started while the former one still runs
    first.run(range(LENGTH), max_epochs=2)
    assert on_disk(tmp_path) == ["checkpoint_4.pt", "checkpoint_8.pt"]
    assert handler.state_dict() == {"_saved": [(8, "checkpoint_8.pt")]}
    assert "another run has saved it since" in caplog.text


# -- what a killed save has still to remove --------------------------------------------------------------


def leave_as_killed(folder: Path) -> None:
    """Leave the files of a process that was killed after the commit of its last checkpoint, before a removal."""
    program(2, saver(folder))
    replaced = (folder / "checkpoint_8.pt").read_bytes()
    program(3, saver(folder))
    (folder / "checkpoint_8.pt").write_bytes(replaced)


def test_what_a_killed_save_replaced_is_removed_though_nothing_is_left_to_save(tmp_path: Path) -> None:
    leave_as_killed(tmp_path)
    program(3, saver(tmp_path))
    assert on_disk(tmp_path) == ["checkpoint_12.pt"]


def test_what_a_resume_cannot_remove_is_left_to_the_next_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_as_killed(tmp_path)

    def refuse(*_args: object) -> None:
        raise PermissionError("denied")

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "remove", refuse)
        program(3, saver(tmp_path))
    assert on_disk(tmp_path) == ["checkpoint_12.pt", "checkpoint_8.pt"]
    assert "checkpoint_8.pt could not be removed: PermissionError: denied. The next save tries again." in caplog.text
    program(4, saver(tmp_path))
    assert on_disk(tmp_path) == ["checkpoint_16.pt"]


def test_a_save_handler_of_the_program_removes_in_the_next_save(tmp_path: Path) -> None:
    class Own(DiskSaver):
        def remove(self, filename: str) -> None:
            super().remove(filename)

    def own(objects: dict[str, Any], _: Engine) -> Checkpoint:
        return Checkpoint(objects, Own(tmp_path, require_empty=False))

    leave_as_killed(tmp_path)
    program(3, own)
    assert on_disk(tmp_path) == ["checkpoint_12.pt", "checkpoint_8.pt"]
    program(4, own)
    assert on_disk(tmp_path) == ["checkpoint_16.pt"]


def test_a_later_runs_file_of_the_same_name_stays(tmp_path: Path) -> None:
    program(3, saver(tmp_path))
    trainer = idle_engine()
    handler = saver(tmp_path)({"note": Notebook(), "trainer": trainer}, trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=2), handler)
    trainer.run(range(LENGTH), max_epochs=2)  # another run, which is not resumed
    damaged = bytearray((tmp_path / "checkpoint_8.pt").read_bytes())
    damaged[200] ^= 1
    (tmp_path / "checkpoint_8.pt").write_bytes(damaged)
    program(3, saver(tmp_path))
    assert on_disk(tmp_path) == ["checkpoint_12.pt", "checkpoint_8.pt"]


@pytest.mark.filterwarnings("ignore:.*timedelta")
def test_the_last_file_that_loads_stays(tmp_path: Path) -> None:
    def with_another(_: dict[str, Any], trainer: Engine) -> None:
        book = Notebook()
        trainer.add_event_handler(
            Events.EPOCH_STARTED, lambda: book.state.update(best=0 if trainer.state.epoch == 1 else timedelta(1))
        )
        another = Checkpoint({"book": book}, DiskSaver(tmp_path / "another", require_empty=False))
        trainer.add_event_handler(Events.EPOCH_COMPLETED, another)

    for _ in range(2):
        program(2, saver(tmp_path), also=with_another)
        assert on_disk(tmp_path / "another") == ["book_4.pt", "book_8.pt"]


# -- ties ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [lambda e, _: e.state.iteration // 100, lambda e, _: e.state.epoch])
def test_the_end_of_a_run_is_saved_though_its_step_was_saved_before(tmp_path: Path, transform: Any) -> None:
    trainer = idle_engine()
    handler = Checkpoint({"trainer": trainer}, DiskSaver(tmp_path), global_step_transform=transform)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=3) | Events.COMPLETED, handler)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=11), lambda _: trainer.terminate())
    trainer.run(range(LENGTH), max_epochs=5)
    assert handler.last_checkpoint is not None
    assert torch.load(handler.last_checkpoint, weights_only=True)["iteration"] == 11


def test_the_end_of_an_epoch_replaces_what_was_saved_under_its_number(tmp_path: Path) -> None:
    trainer = idle_engine()
    step = global_step_from_engine(trainer, Events.EPOCH_COMPLETED)
    handler = Checkpoint({"trainer": trainer}, DiskSaver(tmp_path), global_step_transform=step)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=3) | Events.EPOCH_COMPLETED, handler)
    trainer.run(range(LENGTH), max_epochs=2)
    assert handler.state_dict() == {"_saved": [(2, "trainer_2.pt")]}
    assert torch.load(tmp_path / "trainer_2.pt", weights_only=True)["iteration"] == 8


def test_without_records_the_number_of_foreign_files_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    program(1, saver(tmp_path, filename_prefix="other"))
    program(1, saver(tmp_path))
    assert "starting afresh; 1 files there are not this handler's" in caplog.text


# -- a damaged newest file is never skipped silently -------------------------------------------------


def test_damage_anywhere_in_a_small_file_is_logged_before_an_older_one_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program(2, saver(tmp_path, n_saved=2))
    path = tmp_path / f"checkpoint_{2 * LENGTH}.pt"
    content = path.read_bytes()
    begin = content.index(b"distckpt.json")
    for at in (*range(0, begin, 97), *range(begin - 40, len(content), 41)):
        damaged = bytearray(content)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        caplog.clear()
        trainer = idle_engine()
        objects = {"note": Notebook({"run": 0}), "trainer": trainer}
        found = resume(objects, saver(tmp_path, n_saved=2)(objects, trainer), engine=trainer)
        assert found is not None
        assert found.name == f"checkpoint_{LENGTH}.pt", at
        assert [name for name, _ in found.skipped] == [path.name], at
        assert "It is passed over." in caplog.text


@pytest.mark.parametrize("field", ["prefix", "started_s", "number", "is_scored"])
def test_a_damaged_record_neither_hides_a_file_nor_changes_its_place(tmp_path: Path, field: str) -> None:
    program(3, saver(tmp_path, n_saved=None))
    path = tmp_path / f"checkpoint_{3 * LENGTH}.pt"
    content = bytearray(path.read_bytes())
    at = content.index(f'"{field}": '.encode(), content.index(b'"record": {')) + len(field) + 4
    content[at] = ord("0") if chr(content[at]).isdigit() else ord("1")
    path.write_bytes(content)
    assert read_head_at(path) is None
    found = resume({"note": Notebook({"run": 0})}, tmp_path)
    assert found is not None
    assert found.name == f"checkpoint_{2 * LENGTH}.pt"
    assert [name for name, _ in found.skipped] == [path.name]
