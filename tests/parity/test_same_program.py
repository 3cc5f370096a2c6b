"""The same saving program, run with ignite's handlers and with ours, leaves the same files and histories."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ignite.engine import Engine, Events
from torch import nn
from torch.utils._pytree import tree_map_only

from tests.parity.libraries import IGNITE, OURS, Library, Training, run_with_both
from tests.support.equality import equal

SCORES = [0.3, 0.1, 0.5, 0.5, 0.4, 0.9]


def _by_epoch(values: list[Any]) -> Callable[[Engine], Any]:
    return lambda engine: values[engine.state.epoch - 1]


def _epoch(engine: Engine, _event: Any) -> int:
    return engine.state.epoch


def _contents(folder: Path) -> dict[str, Any]:
    # ignite's own files may hold NumPy scalars, which weights_only refuses; both were written by this test.
    return {name: torch.load(folder / name, weights_only=False) for name in sorted(os.listdir(folder))}


def _saving_program(options: dict[str, Any], objects: Callable[[Training], dict[str, Any]]) -> Any:
    def program(library: Library, folder: Path) -> dict[str, Any]:
        training = Training.make()
        handler = library.Checkpoint(objects(training), library.DiskSaver(folder), **options)
        results: list[Any] = []
        saved: list[int] = []
        trainer = training.trainer
        trainer.register_events(*library.CheckpointEvents)

        def look() -> None:
            last = handler.last_checkpoint
            results.append((sorted(os.listdir(folder)), last.relative_to(folder), handler.state_dict()))

        trainer.add_event_handler(library.Checkpoint.SAVED_CHECKPOINT, lambda: saved.append(trainer.state.epoch))
        trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, look)
        training.run(max_epochs=len(SCORES))
        return {"results": results, "saved": saved, "contents": _contents(folder)}

    return program


def _one(training: Training) -> dict[str, Any]:
    return {"model": training.model}


def _all(training: Training) -> dict[str, Any]:
    return training.objects()


def _nested(training: Training) -> dict[str, Any]:
    return {"nets": {"a": training.model, "b": [training.model, training.scheduler]}, "optimizer": training.optimizer}


def _one_list(training: Training) -> dict[str, Any]:
    return {"parts": [training.model, training.optimizer]}


SUFFIXES = [
    pytest.param({}, id="iteration"),
    pytest.param({"score_function": _by_epoch(SCORES)}, id="score"),
    pytest.param({"score_function": _by_epoch(SCORES), "global_step_transform": _epoch}, id="step-score"),
    pytest.param(
        {"score_function": _by_epoch(SCORES), "score_name": "acc", "global_step_transform": _epoch},
        id="step-name-score",
    ),
    pytest.param({"global_step_transform": _epoch}, id="step"),
    pytest.param({"score_function": _by_epoch(SCORES), "score_name": "acc"}, id="name-score"),
]


@pytest.mark.parametrize("prefix", ["", "best"])
@pytest.mark.parametrize("objects", [_one, _all])
@pytest.mark.parametrize("options", SUFFIXES)
def test_every_suffix_names_the_same_files(
    tmp_path: Path, options: dict[str, Any], objects: Callable[[Training], dict[str, Any]], prefix: str
) -> None:
    theirs, ours = run_with_both(_saving_program({**options, "filename_prefix": prefix}, objects), tmp_path)
    assert equal(theirs, ours)


@pytest.mark.parametrize("options", [SUFFIXES[0], SUFFIXES[1], SUFFIXES[3]])
@pytest.mark.parametrize("n_saved", [None, 1, 2, 3])
@pytest.mark.parametrize("greater_or_equal", [False, True])
def test_retention_keeps_the_same_files(
    tmp_path: Path,
    options: dict[str, Any],
    n_saved: int | None,
    greater_or_equal: bool,  # noqa: FBT001
) -> None:
    options = {**options, "n_saved": n_saved, "greater_or_equal": greater_or_equal}
    theirs, ours = run_with_both(_saving_program(options, _one), tmp_path)
    assert equal(theirs, ours)


def _part_of_epochs(engine: Engine) -> Callable[[Engine, Any], float]:
    return lambda _engine, _event: engine.state.iteration / 4


STEPS: dict[str, Callable[[Library], Callable[[Engine], Any]]] = {
    "part of epochs": lambda _library: _part_of_epochs,
    "of the engine": lambda library: library.global_step_from_engine,
    "iterations of the engine": lambda library: (
        lambda engine: library.global_step_from_engine(engine, Events.ITERATION_STARTED)
    ),
    "epochs before this one": lambda _library: lambda engine: lambda _engine, _event: engine.state.epoch - 1,
}


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("n_saved", [1, 2, None])
@pytest.mark.parametrize(
    "event", [Events.ITERATION_STARTED, Events.ITERATION_COMPLETED, Events.ITERATION_COMPLETED(every=2)]
)
def test_steps_of_iterations_give_the_same_files_and_priorities(
    tmp_path: Path, event: Any, n_saved: int | None, kind: str
) -> None:
    def program(library: Library, folder: Path) -> list[Any]:
        trainer, saved = Engine(lambda _engine, _batch: None), list[Any]()

        class Noted(library.DiskSaver):  # type: ignore[misc, name-defined]  # of either library
            def __call__(self, checkpoint: Any, filename: str, metadata: Any = None) -> None:
                saved.append((filename, metadata["priority"]))
                super().__call__(checkpoint, filename, metadata)

        handler = library.Checkpoint(
            {"model": nn.Identity()},
            Noted(folder),
            n_saved=n_saved,
            global_step_transform=STEPS[kind](library)(trainer),
        )
        trainer.add_event_handler(event, handler)
        trainer.run(range(4), max_epochs=2)
        return [saved, handler.state_dict(), sorted(os.listdir(folder))]

    theirs, ours = run_with_both(program, tmp_path)
    assert ours == theirs


@pytest.mark.parametrize("objects", [_one, _all, _nested, _one_list])
def test_files_hold_the_same_tree(tmp_path: Path, objects: Callable[[Training], dict[str, Any]]) -> None:
    theirs, ours = run_with_both(_saving_program({"n_saved": 2}, objects), tmp_path)
    assert equal(theirs, ours)


@pytest.mark.parametrize(
    "pattern",
    [
        "{name}.{ext}",
        "chk-{name}--{global_step}.{ext}",
        "chk-{filename_prefix}--{name}--{global_step}.{ext}",
        "{global_step}-{name}-{score}.chk.{ext}",
        "{name}-{score_name}-{score}",
        "SAVE-{name}-{score_name}-{score}.pth",
    ],
)
@pytest.mark.parametrize("n_saved", [1, 2])
def test_patterns_name_the_same_files(tmp_path: Path, pattern: str, n_saved: int) -> None:
    options = {
        "filename_prefix": "best",
        "filename_pattern": pattern,
        "score_name": "acc",
        "score_function": _by_epoch(SCORES),
        "global_step_transform": _epoch,
        "n_saved": n_saved,
    }
    theirs, ours = run_with_both(_saving_program(options, _one), tmp_path)
    assert equal(theirs, ours)


@pytest.mark.parametrize("objects", [_all, _nested])
def test_include_self_with_several_objects_writes_the_same(
    tmp_path: Path, objects: Callable[[Training], dict[str, Any]]
) -> None:
    options = {"include_self": True, "n_saved": 2, "score_function": _by_epoch(SCORES)}
    theirs, ours = run_with_both(_saving_program(options, objects), tmp_path)
    assert equal(theirs, ours)


@pytest.mark.parametrize(
    "scores",
    [
        pytest.param([3, 1, 5, 5, 4, 9], id="int"),
        pytest.param([True, False, True, False, True, True], id="bool"),
        pytest.param([np.float32(score) for score in SCORES], id="float32"),
        pytest.param([np.float64(score) for score in SCORES], id="float64"),
        pytest.param([np.int64(score) for score in (3, 1, 5, 5, 4, 9)], id="int64"),
        pytest.param([2**60 + step for step in (3, 1, 5, 5, 4, 9)], id="large-int"),
        pytest.param([float("-inf"), 0.0, -0.0, 1e30, 1e-300, float("inf")], id="extreme"),
    ],
)
@pytest.mark.parametrize("include_self", [False, True])
def test_score_types_give_the_same_names_and_priorities(
    tmp_path: Path,
    scores: list[Any],
    include_self: bool,  # noqa: FBT001
) -> None:
    options = {"score_function": _by_epoch(scores), "n_saved": 3, "include_self": include_self}
    theirs, ours = run_with_both(_saving_program(options, _all), tmp_path)
    assert equal(tree_map_only(np.generic, np.generic.item, theirs), ours)


@pytest.mark.parametrize("num_arguments", [2, 3])
def test_callables_are_handed_the_same(tmp_path: Path, num_arguments: int) -> None:
    def program(library: Library, _folder: Path) -> Any:
        calls: list[Any] = []

        def two(checkpoint: Any, filename: str) -> None:
            calls.append((dict(checkpoint), filename))

        def three(checkpoint: Any, filename: str, metadata: Any) -> None:
            calls.append((dict(checkpoint), filename, metadata))

        training = Training.make()
        options = {"score_function": _by_epoch(SCORES), "score_name": "acc", "filename_prefix": "p", "n_saved": 2}
        handler = library.Checkpoint(_one(training), two if num_arguments == 2 else three, **options)
        training.trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
        training.run(max_epochs=1)
        return calls, handler.last_checkpoint

    theirs, ours = run_with_both(program, tmp_path)
    assert equal(theirs, ours)
    assert len(ours[0][0]) == num_arguments


@given(
    scores=st.lists(st.integers(0, 5) | st.floats(-1, 1).map(lambda x: round(x, 2)), min_size=1, max_size=12),
    n_saved=st.none() | st.integers(1, 4),
    greater_or_equal=st.booleans(),
    pattern=st.sampled_from([None, "{name}.{ext}", "{name}_{score}.{ext}", "{global_step}.{ext}"]),
)
def test_any_run_of_scores_keeps_the_same(
    scores: list[float],
    n_saved: int | None,
    pattern: str | None,
    *,
    greater_or_equal: bool,
) -> None:
    def history(library: Library) -> Any:
        class InMemory(library.BaseSaveHandler):  # type: ignore[misc, name-defined]  # of either library
            def __init__(self) -> None:
                self.files: dict[str, Any] = {}

            def __call__(self, checkpoint: Any, filename: str, metadata: Any = None) -> None:  # noqa: ARG002
                self.files[filename] = metadata

            def remove(self, filename: str) -> None:
                del self.files[filename]

        saver = InMemory()
        handler = library.Checkpoint(
            {"model": nn.Identity()},
            saver,
            score_function=_by_epoch(scores),
            n_saved=n_saved,
            greater_or_equal=greater_or_equal,
            filename_pattern=pattern,
            global_step_transform=_epoch,
        )
        engine = Engine(lambda _engine, _batch: None)
        results: list[Any] = []
        engine.add_event_handler(Events.EPOCH_COMPLETED, handler)
        engine.add_event_handler(
            Events.EPOCH_COMPLETED,
            lambda: results.append((handler.last_checkpoint, handler.state_dict(), sorted(saver.files.items()))),
        )
        engine.run([0], max_epochs=len(scores))
        return results

    assert history(IGNITE) == history(OURS)
