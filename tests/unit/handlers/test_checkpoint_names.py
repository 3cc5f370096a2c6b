"""What Checkpoint calls its files: the reference's table of suffixes, scores, patterns."""

import fractions
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from torch import nn

from distckpt import Checkpoint
from tests.unit.toys import InMemory, idle_engine


def _name_of(options: dict[str, Any], *, num_objects: int = 1) -> str:
    saver = InMemory()
    to_save = {"model": nn.Identity(), "other": nn.Identity()} if num_objects == 2 else {"model": nn.Identity()}
    engine = idle_engine()
    engine.state.iteration, engine.state.epoch = 203, 12
    Checkpoint(to_save, saver, **options)(engine)
    (name,) = saver.files
    return name


def _score(_engine: Engine) -> float:
    return 0.99991


def _epoch(engine: Engine, _event: Any) -> int:
    return engine.state.epoch


# The reference's table: score_function, score_name, global_step_transform -> suffix.
TABLE = [
    ({}, "203"),
    ({"score_function": _score}, "0.9999"),
    ({"score_function": _score, "global_step_transform": _epoch}, "12_0.9999"),
    ({"score_function": _score, "score_name": "acc", "global_step_transform": _epoch}, "12_acc=0.9999"),
    ({"global_step_transform": _epoch}, "12"),
    ({"score_function": _score, "score_name": "acc"}, "acc=0.9999"),
]


@pytest.mark.parametrize(("prefix", "leading"), [("", ""), ("best", "best_")])
@pytest.mark.parametrize(("num_objects", "name"), [(1, "model"), (2, "checkpoint")])
@pytest.mark.parametrize(("options", "suffix"), TABLE)
def test_suffixes_are_the_references(
    options: dict[str, Any], suffix: str, num_objects: int, name: str, prefix: str, leading: str
) -> None:
    got = _name_of({**options, "filename_prefix": prefix}, num_objects=num_objects)
    assert got == f"{leading}{name}_{suffix}.pt"


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (77, "77"),
        (-3, "-3"),
        (2**70, "1180591620717411303424"),
        pytest.param(10**400, str(10**400), id="beyond-float"),
        (0.12345, "0.1235"),
        (-0.1234, "-0.1234"),
        (1e10, "10000000000.0000"),
        (float("inf"), "inf"),
        (True, "True"),
        (np.bool_(0), "False"),
        (np.float32(0.5), "0.5000"),
        (np.float64(0.5), "0.5000"),
        (np.int64(5), "5"),
        (np.uint8(5), "5"),
        (fractions.Fraction(1, 2), "0.5000"),
    ],
)
def test_integral_scores_stand_as_they_are_and_others_with_four_decimals(score: Any, text: str) -> None:
    assert _name_of({"score_function": lambda _engine: score}) == f"model_{text}.pt"


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("{name}.{ext}", "model.pt"),
        ("chk-{name}--{global_step}.{ext}", "chk-model--12.pt"),
        ("{filename_prefix}-{name}-{score_name}-{score}", "best-model-acc-0.9999"),
        ("{global_step}-{name}-{score}.pt", "12-model-0.9999.pt"),
        ("fixed.pth", "fixed.pth"),
        ("{global_step:05d}.{ext}", "00012.pt"),
    ],
)
def test_patterns_are_filled_in(pattern: str, name: str) -> None:
    options = {
        "filename_prefix": "best",
        "score_function": _score,
        "score_name": "acc",
        "global_step_transform": _epoch,
        "filename_pattern": pattern,
    }
    assert _name_of(options) == name


def test_fields_without_a_value_are_none() -> None:
    assert _name_of({"filename_pattern": "{score}-{score_name}.{ext}"}) == "None-None.pt"


def test_an_unknown_field_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="random_key"):
        _name_of({"filename_pattern": "SAVE-{random_key}.{ext}"})


def test_metadata_holds_exactly_what_the_contract_says() -> None:
    saver = InMemory()
    options: dict[str, Any] = {"filename_prefix": "best", "score_function": _score, "score_name": "acc"}
    Checkpoint({"model": nn.Identity()}, saver, **options)(idle_engine())
    assert saver.metadata == {"basename": "best_model", "score_name": "acc", "priority": 0.99991}


@pytest.mark.parametrize(
    ("options", "priority"),
    [
        ({}, 203),
        ({"global_step_transform": _epoch}, 12),
        ({"score_function": _score}, 0.99991),
        ({"score_function": _score, "global_step_transform": _epoch}, 0.99991),
        ({"global_step_transform": lambda _engine, _event: None}, 203),
        ({"global_step_transform": lambda _engine, _event: np.int64(4)}, 4),
        ({"global_step_transform": lambda _engine, _event: torch.tensor(4)}, 4),
        ({"global_step_transform": lambda _engine, _event: np.array(4)}, 4),
        ({"global_step_transform": lambda _engine, _event: np.longdouble(4.5)}, 4.5),
        ({"global_step_transform": lambda _engine, _event: Decimal("4.5")}, 4.5),
    ],
)
def test_priority_is_score_else_global_step_else_iteration(options: dict[str, Any], priority: float) -> None:
    saver = InMemory()
    engine = idle_engine()
    engine.state.iteration, engine.state.epoch = 203, 12
    handler = Checkpoint({"model": nn.Identity()}, saver, **options)
    handler(engine)
    ((found, _name),) = handler.state_dict()["_saved"]
    assert (found, type(found)) == (priority, type(priority))
    assert saver.metadata is not None
    assert saver.metadata["priority"] == priority


@pytest.mark.parametrize("step", ["abc", 1.5])
def test_with_a_score_any_global_step_goes_into_the_name(step: Any) -> None:
    options = {"score_function": _score, "global_step_transform": lambda _engine, _event: step}
    assert _name_of(options) == f"model_{step}_0.9999.pt"


@pytest.mark.parametrize("step", ["10", "epoch 3", [3]])
def test_without_a_score_a_step_that_is_no_number_is_refused(step: Any) -> None:
    # It would be the priority, and "9" is higher than "10".
    with pytest.raises(ValueError, match=r"global_step_transform should be"):
        _name_of({"global_step_transform": lambda _engine, _event: step})


def test_a_name_that_is_no_text_becomes_one() -> None:
    saver = InMemory()
    to_save: dict[Any, Any] = {1: nn.Identity()}
    Checkpoint(to_save, saver)(idle_engine())
    assert saver.metadata is not None
    assert (list(saver.files), saver.metadata["basename"]) == (["1_0.pt"], "1")


def test_the_transform_is_told_engine_and_event() -> None:
    calls: list[Any] = []

    def transform(engine: Engine, event: Any) -> int:
        calls.append((engine, event))
        return 1

    engine = idle_engine()
    handler = Checkpoint({"model": nn.Identity()}, InMemory(), global_step_transform=transform)
    handler(engine)
    assert calls == [(engine, engine.last_event_name)]


PATTERNS: list[tuple[dict[str, bool], str]] = [
    ({}, "{filename_prefix}_{name}_{global_step}_{score_name}={score}.{ext}"),
    ({"with_prefix": False}, "{name}_{global_step}_{score_name}={score}.{ext}"),
    ({"with_score_name": False}, "{filename_prefix}_{name}_{global_step}_{score}.{ext}"),
    ({"with_score": False, "with_score_name": False}, "{filename_prefix}_{name}_{global_step}.{ext}"),
    ({"with_global_step": False}, "{filename_prefix}_{name}_{score_name}={score}.{ext}"),
    (
        {"with_prefix": False, "with_global_step": False, "with_score_name": False},
        "{name}_{score}.{ext}",
    ),
]


@pytest.mark.parametrize(("parts", "pattern"), PATTERNS)
def test_default_patterns_are_the_references(parts: dict[str, bool], pattern: str) -> None:
    assert Checkpoint.setup_filename_pattern(**parts) == pattern


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: Checkpoint.setup_filename_pattern(with_score=False, with_global_step=False),
            "At least one of with_score and with_global_step should be True.",
        ),
        (
            lambda: Checkpoint.setup_filename_pattern(True, False, True),  # noqa: FBT003 - ignite's order
            "If with_score_name is True, with_score should be also True",
        ),
    ],
)
def test_impossible_patterns_are_refused(call: Callable[[], str], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        call()
