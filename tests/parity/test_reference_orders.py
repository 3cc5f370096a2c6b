"""Arguments given by position in the reference's (0.4.x) order reach the same arguments, with a DeprecationWarning.

Where 0.5.5's order has the same meaning for what was given, nothing is warned of.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Engine
from torch import nn

from distckpt import Checkpoint, DiskSaver, EarlyStopping, ModelCheckpoint


def _score(_engine: Engine) -> float:
    return 0.5


def _step(_engine: Engine, _event: Any) -> int:
    return 7


def _saver(_checkpoint: Any, _filename: str) -> None:
    pass


@contextlib.contextmanager
def _warns(*, expected: bool) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert {warning.category for warning in caught} == ({DeprecationWarning} if expected else set())
    # The warning has to point at the caller, where the change is due.
    assert all(warning.filename == __file__ for warning in caught)


MODEL = nn.Identity()
OF_CHECKPOINT: list[tuple[str, Any]] = [
    ("to_save", {"model": MODEL}),
    ("save_handler", _saver),
    ("filename_prefix", "p"),
    ("score_function", _score),
    ("score_name", "acc"),
    ("n_saved", 3),
    ("global_step_transform", _step),
    ("archived", False),
    ("filename_pattern", "{name}.{ext}"),
    ("include_self", True),
    ("greater_or_equal", True),
]


@pytest.mark.parametrize("num_given", range(2, len(OF_CHECKPOINT) + 1))
def test_checkpoint_takes_the_references_order(num_given: int) -> None:
    given = OF_CHECKPOINT[:num_given]
    with _warns(expected=num_given >= 8):
        handler = Checkpoint(*[value for _, value in given])
    for name, value in given:
        assert name == "archived" or getattr(handler, name) == value


OF_MODEL_CHECKPOINT: list[tuple[str, Any]] = [
    ("filename_prefix", "p"),
    ("save_interval", None),
    ("score_function", _score),
    ("score_name", "acc"),
    ("n_saved", 3),
    ("atomic", False),
    ("require_empty", False),
    ("create_dir", False),
    ("save_as_state_dict", True),
    ("global_step_transform", _step),
    ("archived", False),
    ("include_self", True),
]


def _check_model_checkpoint(handler: ModelCheckpoint, given: list[tuple[str, Any]]) -> None:
    assert isinstance(handler.save_handler, DiskSaver)
    seen = {"atomic": handler.save_handler._atomic}
    for name, value in given:
        if name not in ("save_interval", "archived", "save_as_state_dict", "require_empty", "create_dir"):
            assert seen.get(name, getattr(handler, name, None)) == value, name


@pytest.mark.parametrize("num_given", range(1, len(OF_MODEL_CHECKPOINT) + 1))
def test_model_checkpoint_takes_the_references_order(tmp_path: Path, num_given: int) -> None:
    given = OF_MODEL_CHECKPOINT[:num_given]
    with _warns(expected=num_given >= 3):
        handler = ModelCheckpoint(str(tmp_path), *[value for _, value in given])
    _check_model_checkpoint(handler, given)


@pytest.mark.parametrize("n_saved", [1, 2, None])
@pytest.mark.parametrize("num_given", range(5, len(OF_MODEL_CHECKPOINT) + 1))
def test_model_checkpoint_without_score_takes_the_references_order(
    tmp_path: Path, num_given: int, n_saved: int | None
) -> None:
    changed = {"score_function": None, "score_name": None, "n_saved": n_saved, "atomic": True}
    given = [(name, changed.get(name, value)) for name, value in OF_MODEL_CHECKPOINT[:num_given]]
    with _warns(expected=True):
        handler = ModelCheckpoint(str(tmp_path), *[value for _, value in given])
    _check_model_checkpoint(handler, given)


def test_an_interval_of_one_by_position_is_accepted(tmp_path: Path) -> None:
    with _warns(expected=True):
        handler = ModelCheckpoint(str(tmp_path), "p", 1)  # type: ignore[arg-type]  # the older order
    assert handler.score_function is None


WARNED: list[tuple[Any, list[Any], str]] = [
    (Checkpoint, [{"m": MODEL}, _saver, "", None, None, 1, None, False], "filename_pattern"),
    (ModelCheckpoint, ["p", 1], "score_function"),
]


@pytest.mark.parametrize(("kind", "given", "name"), WARNED)
def test_the_warning_names_todays_order(tmp_path: Path, kind: Any, given: list[Any], name: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kind(*([str(tmp_path)] if kind is ModelCheckpoint else []), *given)
    assert name in str(caught[0].message)


OF_EARLY_STOPPING: list[tuple[str, Any]] = [("min_delta", 0.25), ("cumulative_delta", True)]


@pytest.mark.parametrize("num_given", [0, 1, 2])
def test_early_stopping_takes_the_references_order(num_given: int) -> None:
    given = OF_EARLY_STOPPING[:num_given]
    trainer = Engine(lambda _engine, _batch: None)
    with _warns(expected=False):  # 0.5.5 has them at the same places, under new names
        handler = EarlyStopping(3, _score, trainer, *[value for _, value in given])
    assert (handler.patience, handler.score_function, handler.trainer) == (3, _score, trainer)
    assert (handler.threshold, handler.cumulative) == ((0.25, True), (0.25, False), (0.0, False))[2 - num_given]


@pytest.mark.parametrize("position", range(len(OF_MODEL_CHECKPOINT)))
def test_model_checkpoint_takes_the_references_names(tmp_path: Path, position: int) -> None:
    name, value = OF_MODEL_CHECKPOINT[position]
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        prefix: dict[str, Any] = {} if name == "filename_prefix" else {"filename_prefix": "p"}
        handler = ModelCheckpoint(str(tmp_path), **prefix, **{name: value})
    _check_model_checkpoint(handler, [(name, value)])
