"""``distckpt.handlers.common`` does what ``ignite.contrib.engines.common`` does, with this library's handlers."""

import inspect
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import ignite.contrib.engines.common as ignites
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import LRScheduler

import distckpt
from distckpt.handlers import common
from tests.parity.ignite_sdist import rewrite_imports, run_pytest, unpack
from tests.parity.libraries import IGNITE, Library, Training, run_with_both
from tests.support.equality import equal
from tests.support.selection import full_only

FUNCTIONS = [
    "setup_common_training_handlers",
    "setup_common_distrib_training_handlers",
    "gen_save_best_models_by_val_score",
    "save_best_model_by_val_score",
    "add_early_stopping_by_val_score",
]


def _common(library: Library) -> ModuleType:
    return ignites if library is IGNITE else common


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_functions_take_the_same_arguments(name: str) -> None:
    theirs, ours = (inspect.signature(getattr(module, name)).parameters for module in (ignites, common))
    assert list(ours) == list(theirs)
    assert [one.default for one in ours.values()] == [one.default for one in theirs.values()]
    assert [one.kind for one in ours.values()] == [one.kind for one in theirs.values()]


def test_all_other_public_functions_are_ignites() -> None:
    functions = {
        name
        for name, value in vars(ignites).items()
        if inspect.isfunction(value) and not name.startswith("_") and value.__module__.startswith("ignite.")
    }
    handed_on = functions - set(FUNCTIONS) - {"deprecated", "get_default_score_fn", "global_step_from_engine"}
    assert len(handed_on) >= 10
    assert all(getattr(common, name) is getattr(ignites, name) for name in handed_on)


def test_every_handler_that_it_names_is_this_librarys() -> None:
    for name in ("BaseSaveHandler", "Checkpoint", "DiskSaver", "EarlyStopping", "TerminateOnNan"):
        assert getattr(common, name) is getattr(distckpt, name)


@pytest.mark.parametrize("scheduler", ["torch", "ignite", None])
@pytest.mark.parametrize("how", ["path", "handler", "background"])
def test_a_run_leaves_the_same_files(tmp_path: Path, how: str, scheduler: str | None) -> None:
    def program(library: Library, folder: Path) -> Any:
        training, evaluator = Training.make(), Engine(lambda _engine, _batch: None)
        chosen = {"torch": training.scheduler, "ignite": LRScheduler(training.scheduler), None: None}[scheduler]
        options = {"background": True} if how == "background" and library is not IGNITE else {}
        module = _common(library)
        module.setup_common_training_handlers(
            training.trainer,
            to_save=training.objects(),
            save_every_iters=3,
            output_path=folder / "training" if how == "path" else None,
            save_handler=None if how == "path" else library.DiskSaver(folder / "training", **options),
            lr_scheduler=chosen,
            output_names=["loss"],
            with_pbars=False,
            n_saved=2,
        )

        @training.trainer.on(Events.EPOCH_COMPLETED)
        def evaluate() -> None:
            evaluator.run([0])

        @evaluator.on(Events.EPOCH_COMPLETED)
        def score() -> None:
            evaluator.state.metrics["Acc"] = [0.1, 0.5, 0.3, 0.4, 0.2][training.trainer.state.epoch - 1]

        many = module.gen_save_best_models_by_val_score(
            library.DiskSaver(folder / "many"), evaluator, {"a": training.model, "b": training.model}, "Acc", n_saved=2
        )
        one = module.save_best_model_by_val_score(
            folder / "one", evaluator, training.model, "Acc", 1, training.trainer, tag="test", score_sign=-1.0
        )
        stop = module.add_early_stopping_by_val_score(3, evaluator, training.trainer, "Acc")
        training.run(max_epochs=9)
        assert type(many) is type(one) is library.Checkpoint
        assert type(stop) is library.EarlyStopping
        files = {
            str(path.relative_to(folder)): torch.load(path, weights_only=True) for path in sorted(folder.rglob("*.pt"))
        }
        return files, training.trainer.state.epoch, training.trainer.state.metrics, many.state_dict(), one.state_dict()

    theirs, ours = run_with_both(program, tmp_path)
    assert equal(theirs, ours)
    assert ours[1] == 5, "the last two kinds of handlers had their say"
    assert len(ours[0]) == 5


def test_handlers_are_attached_in_the_same_order() -> None:
    def order(module: ModuleType) -> list[str]:
        training = Training.make()
        module.setup_common_training_handlers(
            training.trainer,
            to_save=training.objects(),
            save_handler=lambda _checkpoint, _filename: None,
            lr_scheduler=training.scheduler,
            output_names=["loss"],
            with_pbars=False,
        )
        attached = training.trainer._event_handlers[Events.ITERATION_COMPLETED]
        return [getattr(handler, "__name__", handler.__class__.__name__) for handler, *_ in attached]

    theirs = order(ignites)
    assert [name for name in order(common) if name in theirs] == theirs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to_save": {}}, "If to_save argument is provided then output_path or save_handler"),
        ({"output_path": "a", "save_handler": print}, "Arguments output_path and save_handler are mutually exclusive"),
    ],
)
def test_wrong_arguments_raise_what_ignite_raises(options: dict[str, Any], message: str) -> None:
    for module in (ignites, common):
        with pytest.raises(ValueError, match=f"^{message}"):
            module.setup_common_training_handlers(Engine(lambda _engine, _batch: None), with_pbars=False, **options)


@full_only
@pytest.mark.slow
def test_ignites_own_tests_of_its_helpers_pass(tmp_path: Path) -> None:
    root = unpack(tmp_path)
    file = "tests/ignite/contrib/engines/test_common.py"
    source = (root / file).read_text()
    moved = source.replace("from ignite.contrib.engines.common import", "from distckpt.handlers.common import")
    assert moved != source
    asked = 'RuntimeError, match=r"This contrib module requires available GPU"'
    assert asked in moved
    # The package that finds GPUs is not installed: ignite raises before it searches.
    (root / file).write_text(rewrite_imports(moved.replace(asked, 'ModuleNotFoundError, match="pynvml"')))
    outcome = run_pytest(root, (file,), ("-n0", "-k", "not (hvd or nccl or xla or multinode or mlflow)"), {})
    assert not outcome.failed, outcome.output
    assert len(outcome.passed) == 8, outcome.output
    assert os.listdir(tmp_path) == [root.name]
