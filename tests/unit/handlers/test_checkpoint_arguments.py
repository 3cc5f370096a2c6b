"""What Checkpoint's constructor takes and refuses, with ignite's types and leading words."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ignite.handlers
import numpy as np
import pytest
import torch
from ignite.handlers import checkpoint as ignites
from torch import nn

import distckpt
from distckpt import BaseSaveHandler, Checkpoint, DiskSaver
from tests.unit.toys import InMemory, Notebook, idle_engine, run_epochs

MODEL = nn.Identity()


def _save(_checkpoint: Any, _filename: str) -> None:
    pass


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"to_save": 12}, TypeError, "Argument `to_save` should be a dictionary, but given <class 'int'>"),
    ({"to_save": [MODEL]}, TypeError, "Argument `to_save` should be a dictionary, but given <class 'list'>"),
    ({"to_save": MODEL}, TypeError, "Argument `to_save` should be a dictionary"),
    ({"to_save": {"model": 1}}, TypeError, "Object <class 'int'> should have `state_dict` method"),
    ({"to_save": {"nets": {"a": [MODEL, 0.5]}}}, TypeError, "Object <class 'float'> should have `state_dict` method"),
    (
        {"save_handler": 12},
        TypeError,
        "Argument `save_handler` should be a string or Path object or callable or inherit",
    ),
    ({"save_handler": None}, TypeError, "Argument `save_handler` should be a string or Path object or callable"),
    (
        {"global_step_transform": 123},
        TypeError,
        "global_step_transform should be a function, got <class 'int'> instead.",
    ),
    ({"score_function": 0.5}, TypeError, "score_function should be a function, got <class 'float'> instead."),
    ({"filename_prefix": 1}, TypeError, "Argument filename_prefix should be str, but given <class 'int'>"),
    ({"filename_pattern": 1}, TypeError, "Argument filename_pattern should be str"),
    ({"score_name": 1}, TypeError, "Argument score_name should be str"),
    ({"to_save": {"model": "text"}}, TypeError, "Object <class 'str'> should have `state_dict` method"),
    ({"n_saved": "2"}, TypeError, "Argument n_saved should be int"),
    ({"n_saved": 0}, ValueError, "n_saved must be a positive integer or None, got 0"),
    ({"n_saved": -1}, ValueError, "n_saved must be a positive integer or None, got -1"),
    (
        {"to_save": {"checkpointer": MODEL}, "include_self": True},
        ValueError,
        "Cannot have key 'checkpointer' if `include_self` is True",
    ),
    (
        {"to_save": MappingProxyType({"model": MODEL}), "include_self": True},
        TypeError,
        "If `include_self` is True, then `to_save` must be mutable, but given <class 'mappingproxy'>",
    ),
    ({"score_rule": "median"}, ValueError, "Argument score_rule should be one of"),
    ({"timeout_s": 0}, ValueError, "Argument timeout_s should be a positive number of seconds or None, but given 0"),
    ({"timeout_s": float("nan")}, ValueError, "Argument timeout_s should be a positive number"),
]


@pytest.mark.parametrize(("wrong", "kind", "words"), REFUSED)
def test_a_wrong_argument_is_refused_at_construction(wrong: dict[str, Any], kind: type[Exception], words: str) -> None:
    arguments: dict[str, Any] = {"to_save": {"model": MODEL}, "save_handler": _save, **wrong}
    with pytest.raises(kind, match=f"^{re.escape(words)}") as caught:
        Checkpoint(**arguments)
    assert type(caught.value) is kind


# Those that ignite checks too; the others it takes without a word.
CHECKED_BY_IGNITE = [REFUSED[index] for index in (0, 1, 2, 3, 4, 5, 6, 7, 14, 15, 16, 17)]


@pytest.mark.parametrize(("wrong", "kind", "words"), CHECKED_BY_IGNITE)
def test_the_error_begins_as_ignites(wrong: dict[str, Any], kind: type[Exception], words: str) -> None:
    arguments: dict[str, Any] = {"to_save": {"model": MODEL}, "save_handler": _save, **wrong}
    with pytest.raises(kind) as theirs:
        ignites.Checkpoint(**arguments)
    shared = min(len(words), len(str(theirs.value)))
    assert str(theirs.value)[:shared] == words[:shared]


@pytest.mark.parametrize("name", ["Checkpoint", "DiskSaver", "EarlyStopping", "ModelCheckpoint", "TimeLimit", "Timer"])
def test_arguments_stand_in_ignites_order_with_its_defaults(name: str) -> None:
    def positional(module: Any) -> list[tuple[str, Any]]:
        parameters = inspect.signature(getattr(module, name)).parameters.values()
        return [(one.name, one.default) for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]

    assert positional(distckpt) == positional(ignite.handlers)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_directory_means_a_disk_saver(tmp_path: Path, kind: Callable[[str], Any]) -> None:
    handler = Checkpoint({"model": MODEL}, kind(str(tmp_path / "new")), save_on_rank=0)
    assert isinstance(handler.save_handler, DiskSaver)
    assert handler.save_handler.dirname == tmp_path / "new"
    assert handler.save_handler.save_on_rank == 0
    assert (tmp_path / "new").is_dir()


@pytest.mark.parametrize("save_handler", [str, DiskSaver, lambda _folder: InMemory()])
def test_counts_and_ranks_may_be_numpys(tmp_path: Path, save_handler: Callable[[Path], Any]) -> None:
    numbers: dict[str, Any] = {"n_saved": np.int64(2), "save_on_rank": np.int64(0)}
    handler = Checkpoint({"model": MODEL}, save_handler(tmp_path), score_name="acc", **numbers)
    engine = idle_engine()
    for score in (0.1, 0.2, 0.3):
        engine.state.metrics["acc"] = score
        handler(engine)
    assert handler.state_dict() == {"_saved": [(0.2, "model_acc=0.2000.pt"), (0.3, "model_acc=0.3000.pt")]}


def test_what_was_given_stands_in_attributes() -> None:
    to_save, saver = {"model": MODEL}, InMemory()
    handler = Checkpoint(to_save, saver)
    assert handler.to_save is to_save
    assert handler.save_handler is saver
    assert handler.ext == "pt"
    assert handler.last_checkpoint is None
    assert Checkpoint.Item(1, "a.pt") == (1, "a.pt")
    assert Checkpoint.Item._fields == ("priority", "filename")


def test_a_score_name_alone_reads_the_metric() -> None:
    saver = InMemory()
    handler = Checkpoint({"model": MODEL}, saver, score_name="acc")
    engine = idle_engine()
    engine.state.metrics["acc"] = 0.25
    handler(engine)
    assert handler.last_checkpoint == "model_acc=0.2500.pt"


@pytest.mark.parametrize("sign", [0, 2.0, -0.5])
def test_a_score_sign_is_one_or_minus_one(sign: float) -> None:
    with pytest.raises(ValueError, match=r"^Argument score_sign should be 1 or -1"):
        Checkpoint.get_default_score_fn("loss", sign)


@pytest.mark.parametrize("score", [torch.tensor(0.5), "0.5", None, [0.5], 1j])
def test_a_score_that_is_no_number_is_refused(score: Any) -> None:
    saver = InMemory()
    handler = Checkpoint({"model": MODEL}, saver, score_function=lambda _engine: score)
    with pytest.raises(ValueError, match=r"^Output of score_function should be a number"):
        handler(idle_engine())
    assert not saver.files


def test_archived_is_taken_and_warned_of() -> None:
    with pytest.warns(DeprecationWarning, match="archived is deprecated"):
        Checkpoint({"model": MODEL}, _save, archived=True)


def test_the_save_handler_may_be_reassigned(tmp_path: Path) -> None:
    first, second = InMemory(), InMemory()
    handler = Checkpoint({"model": MODEL}, first, n_saved=None)
    engine = run_epochs(handler, 1)
    handler.save_handler = second
    engine.state.max_epochs = None
    engine.run([0, 0], max_epochs=1)
    assert (list(first.files), list(second.files)) == (["model_1.pt"], ["model_2.pt"])
    handler.save_handler = DiskSaver(tmp_path)
    assert handler.last_checkpoint == tmp_path / "model_2.pt"


def test_handlers_of_ignites_base_class_count_as_save_handlers() -> None:
    class Theirs(ignites.BaseSaveHandler):
        def __init__(self) -> None:
            self.names: list[str] = []

        def __call__(self, _checkpoint: Any, filename: str, _metadata: Any = None) -> None:
            self.names.append(filename)

        def remove(self, filename: str) -> None:
            self.names.remove(filename)

    saver = Theirs()
    assert isinstance(saver, BaseSaveHandler)
    run_epochs(Checkpoint({"model": MODEL}, saver), 3)
    assert saver.names == ["model_3.pt"]


def test_an_abstract_save_handler_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        BaseSaveHandler()  # type: ignore[abstract]  # that is what is tested


def test_constructing_reads_no_state() -> None:
    class Unready(Notebook):
        def state_dict(self) -> Any:
            raise AssertionError

    Checkpoint({"later": Unready()}, _save)
