"""resume() in one process: the choice of a checkpoint, the loaded objects, and the rest of an interrupted epoch."""

import copy
import logging
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events

from distckpt import Checkpoint, DiskSaver, LoadError, ModelCheckpoint, global_step_from_engine, resume
from distckpt.handlers.resume import Resumed
from tests.unit.toys import InMemory, Notebook, Refuses, idle_engine, linear

LOGGER = "distckpt.handlers.resume"
PATH = Path("folder") / "checkpoint_6.pt"


def engine_state(iteration: int, *, epoch_length: int = 4, max_epochs: int = 100) -> dict[str, Any]:
    """Return the state of an engine as ignite writes it."""
    return {"epoch_length": epoch_length, "iteration": iteration, "max_epochs": max_epochs}


def put(path: Path, iteration: int, **more: Any) -> Path:
    """Write a checkpoint of an engine and a note."""
    path.parent.mkdir(exist_ok=True)
    torch.save({"trainer": engine_state(iteration), "note": {"from": path.name}, **more}, path)
    return path


def objects() -> dict[str, Any]:
    """Return what such a checkpoint is loaded into."""
    return {"trainer": idle_engine(), "note": Notebook()}


def cut(path: Path) -> Path:
    """Take the second half off a file."""
    os.truncate(path, path.stat().st_size // 2)
    return path


def skipped(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the log lines about skipped checkpoints."""
    return [one for one in caplog.messages if one.endswith("It is passed over.")]


# -- the choice of a checkpoint ----------------------------------------------------------------------


@pytest.mark.parametrize("make", [str, Path, lambda folder: DiskSaver(folder, require_empty=False)])
def test_the_newest_checkpoint_of_a_directory_is_loaded(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    for step in (4, 12, 8):
        put(tmp_path / f"a_{step}.pt", step)
    live = objects()
    assert resume(live, make(tmp_path)) == tmp_path / "a_12.pt"
    assert live["note"].state == {"from": "a_12.pt"}
    assert live["trainer"].state.iteration == 12


@pytest.mark.parametrize("missing", [True, False])
def test_an_empty_directory_is_logged_and_the_run_starts_afresh(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, *, missing: bool
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    folder = tmp_path / "sub" if missing else tmp_path
    live = objects()
    assert resume(live, folder, engine=live["trainer"]) is None
    assert [(one.name, one.levelname, one.getMessage()) for one in caplog.records] == [
        (LOGGER, "WARNING", f"resume: nothing to resume from in {folder}: starting afresh")
    ]
    assert live["trainer"].state.iteration == 0
    assert live["note"].state == {}


def test_the_iteration_inside_counts_and_not_the_time_of_the_file(tmp_path: Path) -> None:
    newest = put(tmp_path / "a.pt", 20)
    copied_later = put(tmp_path / "b.pt", 10)
    os.utime(newest, (1, 1))
    os.utime(copied_later, (2, 2))
    assert resume(objects(), tmp_path) == newest


def test_of_equal_iterations_the_later_file_counts_and_then_the_name(tmp_path: Path) -> None:
    for name, at_s in (("a.pt", 3), ("b.pt", 2), ("c.pt", 3)):
        put(tmp_path / name, 10)
        os.utime(tmp_path / name, (at_s, at_s))
    assert resume(objects(), tmp_path) == tmp_path / "c.pt"
    os.utime(tmp_path / "a.pt", (4, 4))
    assert resume(objects(), tmp_path) == tmp_path / "a.pt"


def test_a_file_of_unknown_iteration_is_the_oldest(tmp_path: Path) -> None:
    known = put(tmp_path / "a.pt", 1)
    torch.save({"note": {}}, tmp_path / "b.pt")
    assert resume({"note": Notebook()}, tmp_path) == known


def test_the_engine_that_is_resumed_counts_when_there_are_several(tmp_path: Path) -> None:
    put(tmp_path / "a.pt", 10, evaluator=engine_state(50))
    put(tmp_path / "b.pt", 20, evaluator=engine_state(40))
    live = objects()
    assert resume(live, tmp_path, engine=live["trainer"]) == tmp_path / "b.pt"


def test_a_damaged_newest_checkpoint_is_skipped_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = put(tmp_path / "a_4.pt", 4)
    bad = cut(put(tmp_path / "a_8.pt", 8))
    live = objects()
    assert resume(live, tmp_path) == good
    (message,) = skipped(caplog)
    assert re.search(r"a_8.pt cannot be loaded: .*truncated", message)
    assert str(bad) in message
    assert live["trainer"].state.iteration == 4


def test_a_newer_checkpoint_that_lacks_an_object_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = put(tmp_path / "a_4.pt", 4)
    torch.save({"trainer": engine_state(8)}, tmp_path / "a_8.pt")
    assert resume(objects(), tmp_path) == good
    (message,) = skipped(caplog)
    assert re.search(r"a_8.pt cannot be loaded: it lacks .*'note'", message)


def test_a_checkpoint_that_would_execute_code_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = put(tmp_path / "a_4.pt", 4)
    torch.save({"trainer": engine_state(8), "note": linear(1)}, tmp_path / "a_8.pt")
    assert resume(objects(), tmp_path) == good
    (message,) = skipped(caplog)
    assert "a_8.pt holds objects that can only be loaded by executing code" in message


def test_without_a_whole_checkpoint_the_run_does_not_restart_silently(tmp_path: Path) -> None:
    cut(put(tmp_path / "a_4.pt", 4))
    torch.save({"trainer": engine_state(8)}, tmp_path / "a_8.pt")
    live = objects()
    with pytest.raises(LoadError) as caught:
        resume(live, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"None of the 2 checkpoints in {tmp_path} can be loaded.")
    assert "a_4.pt" in message
    assert "truncated" in message
    assert "'note'" in message
    assert live["trainer"].state.iteration == 0


def test_a_file_in_the_older_format_is_found_too(tmp_path: Path) -> None:
    put(tmp_path / "a.pt", 4)
    state = {"trainer": engine_state(8), "note": {"from": "old"}}
    torch.save(state, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    assert resume(objects(), tmp_path) == tmp_path / "b.pt"


def test_other_files_and_folders_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "a.txt").write_text("no")
    (tmp_path / ".distckpt-x.tmp").write_text("no")
    assert resume(objects(), tmp_path) is None


@pytest.mark.parametrize("given", [None, 3, InMemory(), linear(1)], ids=lambda given: type(given).__name__)
def test_a_source_that_is_none_is_a_type_error(given: Any) -> None:
    with pytest.raises(TypeError, match="Argument dirname_or_handler should be a directory, a DiskSaver or a Checkp"):
        resume(objects(), given)


def test_wrong_arguments_raise(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"whose save_handler is no DiskSaver but .*InMemory"):
        resume(objects(), Checkpoint(objects(), InMemory()))
    with pytest.raises(TypeError, match="Argument to_load should be a dictionary"):
        resume([linear(1)], tmp_path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="should have `load_state_dict` method"):
        resume({"a": 3}, tmp_path)
    with pytest.raises(TypeError, match="Argument engine should be an instance of Engine or None"):
        resume(objects(), tmp_path, engine=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Argument timeout_s should be a positive number"):
        resume(objects(), tmp_path, timeout_s=-1.0)
    with pytest.raises(ValueError, match="save_on_rank should be one rank of this job"):
        resume(objects(), DiskSaver(tmp_path, save_on_rank=1, create_dir=False))
    put(tmp_path / "file", 3)
    with pytest.raises(NotADirectoryError):
        resume(objects(), tmp_path / "file")


# -- a handler's own files -------------------------------------------------------------------------


def saver(folder: Path, to_save: dict[str, Any], **kwargs: Any) -> Checkpoint:
    """Return a Checkpoint for a directory that may hold files."""
    return Checkpoint(to_save, DiskSaver(folder, require_empty=False), **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "own", "others"),
    [
        ({}, "checkpoint_7.pt", ["best_checkpoint_9.pt", "checkpoint_x.pt", "checkpoint_7_loss=1.pt", "model_9.pt"]),
        ({"filename_prefix": "best"}, "best_checkpoint_7.pt", ["checkpoint_9.pt", "worst_checkpoint_9.pt"]),
        ({"filename_prefix": "a.b+"}, "a.b+_checkpoint_7.pt", ["axb+_checkpoint_9.pt"]),
        ({"score_function": lambda _: 1.0}, "checkpoint_-0.1235.pt", ["checkpoint_9_1.0.pt", "checkpoint_.pt"]),
        (
            {"score_function": lambda _: 1.0, "score_name": "acc", "global_step_transform": lambda *_: 3},
            "checkpoint_3_acc=0.5000.pt",
            ["checkpoint_9_loss=0.5000.pt", "checkpoint_9.pt"],
        ),
        (
            {"filename_pattern": "{global_step:06d}/{name}-{global_step}.{ext}"},
            "7/checkpoint-7.pt",
            ["7/checkpoint-8.pt", "checkpoint_9.pt"],
        ),
    ],
    ids=range(6),
)
def test_only_files_that_a_handler_could_have_named_are_its_own(
    tmp_path: Path, kwargs: dict[str, Any], own: str, others: list[str]
) -> None:
    (tmp_path / "7").mkdir()
    put(tmp_path / own, 1)
    for name in others:
        put(tmp_path / name, 9)
    live = objects()
    assert resume(live, saver(tmp_path, live, **kwargs)) == tmp_path / own


def test_a_handler_whose_files_are_not_there_starts_afresh_and_counts_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    put(tmp_path / "best_checkpoint_9.pt", 9)
    live = objects()
    assert resume(live, saver(tmp_path, live)) is None
    assert "starting afresh; 1 files there are not this handler's" in caplog.text


def test_files_of_a_model_checkpoint_are_found_before_it_was_called(tmp_path: Path) -> None:
    put(tmp_path / "last_whatever_7.pt", 7)
    put(tmp_path / "best_whatever_9.pt", 9)
    handler = ModelCheckpoint(tmp_path, "last", require_empty=False)
    assert resume(objects(), handler) == tmp_path / "last_whatever_7.pt"
    assert handler.last_checkpoint == tmp_path / "last_whatever_7.pt"


def train(live: dict[str, Any], handler: Checkpoint, num_epochs: int) -> None:
    """Save at the end of each epoch of four iterations."""
    trainer = live["trainer"]
    if not trainer.has_event_handler(handler):
        trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
    trainer.run(range(4), max_epochs=num_epochs)


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("by_epoch", [True, False])
def test_retention_continues(tmp_path: Path, *, include_self: bool, by_epoch: bool) -> None:
    def make() -> tuple[dict[str, Any], Checkpoint]:
        live = objects()
        step = global_step_from_engine(live["trainer"]) if by_epoch else None
        return live, saver(tmp_path, live, n_saved=2, include_self=include_self, global_step_transform=step)

    live, handler = make()
    train(live, handler, 3)
    before = sorted(os.listdir(tmp_path))
    live, handler = make()
    found = resume(live, handler, engine=live["trainer"])
    assert found is not None
    assert found.name == ("checkpoint_3.pt" if by_epoch else "checkpoint_12.pt")
    assert sorted(name for _, name in handler.state_dict()["_saved"]) == before
    assert handler.last_checkpoint == found
    train(live, handler, 5)
    assert sorted(os.listdir(tmp_path)) == (
        ["checkpoint_4.pt", "checkpoint_5.pt"] if by_epoch else ["checkpoint_16.pt", "checkpoint_20.pt"]
    )


def test_history_of_a_handler_that_is_loaded_with_the_others_is_its_own(tmp_path: Path) -> None:
    live = objects()
    handler = saver(tmp_path, live, n_saved=2)
    put(tmp_path / "checkpoint_8.pt", 8, checkpointer={"_saved": [(3, "x.pt")]}, mine={"_saved": [(5, "y.pt")]})
    assert resume({**live, "mine": handler}, handler) is not None
    assert handler.state_dict() == {"_saved": [(5, "y.pt")]}


def test_history_of_the_best_is_read_from_their_names(tmp_path: Path) -> None:
    for score, step in (("0.5000", 4), ("0.9000", 8), ("0.7000", 12)):
        put(tmp_path / f"checkpoint_{score}.pt", step)
    live = objects()
    scores = iter([0.6, 0.8])
    handler = saver(tmp_path, live, n_saved=2, score_function=lambda _: next(scores))
    assert resume(live, handler, engine=live["trainer"]) == tmp_path / "checkpoint_0.7000.pt"
    assert handler.state_dict() == {"_saved": [(0.7, "checkpoint_0.7000.pt"), (0.9, "checkpoint_0.9000.pt")]}
    train(live, handler, 5)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_0.5000.pt", "checkpoint_0.8000.pt", "checkpoint_0.9000.pt"]


def test_an_epoch_that_was_saved_in_its_middle_is_replaced_by_its_end(tmp_path: Path) -> None:
    put(tmp_path / "checkpoint_3.pt", 10)
    live = objects()
    handler = saver(tmp_path, live, global_step_transform=global_step_from_engine(live["trainer"]))
    resume(live, handler, engine=live["trainer"])
    assert handler.state_dict() == {"_saved": [(2.5, "checkpoint_3.pt")]}
    train(live, handler, 3)
    assert torch.load(tmp_path / "checkpoint_3.pt", weights_only=True)["trainer"]["iteration"] == 12


@pytest.mark.parametrize(("name", "other"), [("2.5", "2.25"), ("10", "9")])
def test_a_step_that_is_no_epoch_number_stays_the_priority(tmp_path: Path, name: str, other: str) -> None:
    put(tmp_path / f"checkpoint_{other}.pt", 9)
    put(tmp_path / f"checkpoint_{name}.pt", 10)
    live = objects()
    handler = saver(tmp_path, live, n_saved=2, global_step_transform=lambda e, _: e.state.iteration / 4)
    resume(live, handler, engine=live["trainer"])
    assert handler.state_dict() == {
        "_saved": [(float(other), f"checkpoint_{other}.pt"), (float(name), f"checkpoint_{name}.pt")]
    }


def test_a_damaged_file_is_not_taken_into_the_history(tmp_path: Path) -> None:
    put(tmp_path / "checkpoint_4.pt", 4)
    put(tmp_path / "checkpoint_8.pt", 8)
    cut(put(tmp_path / "checkpoint_12.pt", 12))
    live = objects()
    handler = saver(tmp_path, live, n_saved=3)
    resume(live, handler)
    assert handler.state_dict() == {"_saved": [(4, "checkpoint_4.pt"), (8, "checkpoint_8.pt")]}


def test_an_unknown_history_is_logged_and_its_files_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    put(tmp_path / "latest.pt", 4)
    live = objects()
    handler = saver(tmp_path, live, filename_pattern="latest.{ext}")
    assert resume(live, handler) == tmp_path / "latest.pt"
    assert handler.state_dict() == {"_saved": []}
    assert "the handler's history is unknown" in caplog.text


# -- the loaded objects ------------------------------------------------------------------------------


def test_an_engine_outside_of_to_load_gets_the_only_engine_state(tmp_path: Path) -> None:
    put(tmp_path / "a.pt", 6)
    trainer = idle_engine()
    resume({"note": Notebook()}, tmp_path, engine=trainer)
    assert (trainer.state.iteration, trainer.state.epoch, trainer.state.max_epochs) == (6, 1, 100)


def test_a_checkpoint_without_an_engine_is_loaded_with_a_warning(tmp_path: Path) -> None:
    torch.save({"note": {"a": 1}}, tmp_path / "a.pt")
    note, trainer = Notebook(), idle_engine()
    with pytest.warns(UserWarning, match="a.pt holds no state of an engine: the engine starts at iteration 0"):
        resume({"note": note}, tmp_path, engine=trainer)
    assert note.state == {"a": 1}
    assert trainer.state.iteration == 0


def test_of_several_engines_none_is_guessed(tmp_path: Path) -> None:
    put(tmp_path / "a.pt", 6, other=engine_state(3))
    note, trainer = Notebook(), idle_engine()
    with pytest.raises(ValueError, match=r"several states of engines \(trainer, other\): put the engine into to_load"):
        resume({"note": note}, tmp_path, engine=trainer)
    assert note.state == {}
    resume({"note": note, "other": idle_engine()}, tmp_path, engine=trainer)
    assert trainer.state.iteration == 6, "the other one is spoken for"


def test_when_one_object_refuses_none_is_changed(tmp_path: Path) -> None:
    put(tmp_path / "checkpoint_6.pt", 6, other={})
    live: dict[str, Any] = {"note": Notebook({"mine": 1}), "other": Refuses()}
    trainer = idle_engine()
    handler = saver(tmp_path, objects())
    with pytest.raises(RuntimeError, match="it refuses"):
        resume(live, handler, engine=trainer)
    assert live["note"].state_dict() == {"mine": 1}
    assert trainer.state.iteration == 0
    assert handler.state_dict() == {"_saved": []}
    assert not trainer.has_event_handler(Events.GET_BATCH_STARTED)


def test_a_single_objects_bare_state_is_found(tmp_path: Path) -> None:
    live = {"model": linear(1)}
    handler = saver(tmp_path, live)
    handler(idle_engine())
    twin = {"model": linear(2)}
    assert resume(twin, saver(tmp_path, twin)) == tmp_path / "model_0.pt"
    assert torch.equal(twin["model"].weight, live["model"].weight)


def test_options_for_modules_are_passed_on(tmp_path: Path) -> None:
    state = linear(1).state_dict()
    state.pop("bias")
    torch.save({"model": state, "note": {}}, tmp_path / "a.pt")
    model = linear(2)
    with pytest.raises(RuntimeError, match="Missing key"):
        resume({"model": model, "note": Notebook()}, tmp_path)
    resume({"model": model, "note": Notebook()}, tmp_path, strict=False)
    assert torch.equal(model.weight, state["weight"])


def test_a_resume_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    put(tmp_path / "a.pt", 6)
    resume(
        {
            "note": Notebook(),
        },
        tmp_path,
        engine=idle_engine(),
    )
    (record,) = [one for one in caplog.records if one.name == LOGGER]
    message = record.getMessage()
    assert message.startswith(
        f"resume: continuing from {tmp_path / 'a.pt'} of iteration 6, epoch 1: loaded note, the engine"
    )
    assert record.levelname == "WARNING"


def test_a_complete_run_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"trainer": engine_state(8, max_epochs=2)}, tmp_path / "a.pt")
    resume({}, tmp_path, engine=idle_engine())
    assert "nothing is left to train in that run" in caplog.text


# -- Resumed -----------------------------------------------------------------------------------------


def test_resumed_is_used_as_a_path() -> None:
    found = Resumed(PATH, iteration=6)
    assert isinstance(found, Path)
    assert (found, PATH) == (PATH, found)
    assert hash(found) == hash(PATH)
    assert {found, PATH} == {PATH}
    assert (found.name, str(found), f"{found}") == (PATH.name, str(PATH), str(PATH))
    assert found.parent / "x" == Path("folder/x")
    paths: list[Path] = [found, Path("a")]
    assert sorted(paths) == [Path("a"), PATH]


def test_a_path_made_from_resumed_is_plain() -> None:
    found = Resumed(PATH, iteration=6)
    made = (found.path, found.parent, found / "x", found.with_suffix(".txt"), found.with_name("a"))
    assert {type(one) for one in made} == {type(Path())}
    for one in (found.absolute(), found.resolve()):
        assert one.name == PATH.name
        assert getattr(one, "iteration", None) is None


def test_a_copy_of_resumed_has_the_same_facts() -> None:
    found = Resumed(PATH, iteration=6, epoch=2, skipped=(("b.pt", "it is truncated"),))
    for one in (copy.copy(found), copy.deepcopy(found), pickle.loads(pickle.dumps(found))):  # noqa: S301 - the test's own
        assert (one, one.iteration, one.epoch, one.skipped) == (PATH, 6, 2, found.skipped)


def test_resumed_has_the_resume_point_and_the_skipped_checkpoints(tmp_path: Path) -> None:
    trainer, objects = Engine(lambda _engine, _batch: None), {"note": Notebook("a")}
    saver = Checkpoint({**objects, "trainer": trainer}, DiskSaver(tmp_path), n_saved=None)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=3), saver)
    trainer.run(range(4), max_epochs=2)
    newest = tmp_path / "checkpoint_6.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    again = Engine(lambda _engine, _batch: None)
    found = resume({**objects, "trainer": again}, tmp_path)
    assert found is not None
    assert (found, found.iteration, found.epoch, found.has_ended) == (tmp_path / "checkpoint_3.pt", 3, 0, False)
    ((name, reason),) = found.skipped
    assert (name, "truncated" in reason, found.world_size) == (newest.name, True, 1)
    assert found.run_id
    assert torch.load(found, weights_only=True)["trainer"]["iteration"] == 3


def test_of_a_checkpoint_without_an_engine_resumed_has_no_facts(tmp_path: Path) -> None:
    torch.save({"note": Notebook("a").state_dict()}, tmp_path / "a.pt")
    found = resume({"note": Notebook("b")}, tmp_path)
    assert found is not None
    assert (found.iteration, found.epoch, found.has_ended, found.run_id, found.world_size) == (
        None,
        None,
        False,
        None,
        None,
    )
