"""EarlyStopping in one process: arguments, improvement, NaN, states of older releases, deprecated names."""

import logging
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EarlyStopping as Ignites

from distckpt import Checkpoint, EarlyStopping
from tests.unit.toys import idle_engine, linear, run_epochs

NAN = float("nan")


def _score(_engine: Engine) -> float:
    return 0.5


def _walk(scores: list[Any], **options: Any) -> tuple[EarlyStopping, int | None]:
    """Feed scores, one an event; return the handler and the number of the event that stopped the trainer."""
    trainer = idle_engine()
    values = iter(scores)
    handler = EarlyStopping(score_function=lambda _engine: next(values), trainer=trainer, **{"patience": 2, **options})
    for number in range(1, len(scores) + 1):
        handler(trainer)
        if trainer.should_terminate:
            return handler, number
    return handler, None


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"score_function": 12}, TypeError, "Argument score_function should be a function."),
    ({"patience": 0}, ValueError, "Argument patience should be positive integer."),
    ({"patience": -1}, ValueError, "Argument patience should be positive integer."),
    ({"trainer": None}, TypeError, "Argument trainer should be an instance of Engine."),
    ({"threshold": -0.1}, ValueError, "Argument threshold should not be a negative number."),
    ({"threshold_mode": "both"}, ValueError, "Argument threshold_mode should be either 'abs' or 'rel'."),
    ({"mode": "best"}, ValueError, "Argument mode should be either 'min' or 'max'."),
]


@pytest.mark.parametrize(("wrong", "kind", "words"), REFUSED)
@pytest.mark.parametrize("library", [EarlyStopping, Ignites])
def test_wrong_arguments_are_refused_in_ignites_words(
    library: Callable[..., Any], wrong: dict[str, Any], kind: type[Exception], words: str
) -> None:
    arguments: dict[str, Any] = {"patience": 2, "score_function": _score, "trainer": idle_engine(), **wrong}
    with pytest.raises(kind, match=f"^{re.escape(words)}") as caught:
        library(**arguments)
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("options", "scores", "stopped_at"),
    [
        ({}, [1, 1, 1], 3),
        ({}, [1, 2, 2, 3, 3, 3], 6),
        ({"patience": 1}, [1, 0], 2),
        ({"mode": "min"}, [3, 2, 2, 1, 1, 1], 6),
        ({"threshold": 1}, [0, 1, 2], 3),  # equal to the threshold is no improvement
        ({"threshold": 0.5}, [0, 1, 2, 3], None),
        ({"threshold": 2, "cumulative": True}, [0, 1, 3, 4, 6], None),
        ({"threshold": 2, "cumulative": False}, [0, 1, 2, 3], 3),
        ({"threshold": 0.5, "threshold_mode": "rel"}, [10, 14, 15], 3),
        ({"threshold": 0.5, "threshold_mode": "rel", "mode": "min", "cumulative": True}, [10, 6, 4.9, 3, 2], None),
        ({}, [0], None),
        ({}, [float("-inf"), float("-inf"), float("-inf")], 3),
    ],
)
def test_patience_ends_where_it_should(options: dict[str, Any], scores: list[float], stopped_at: int | None) -> None:
    assert _walk(scores, **options)[1] == stopped_at


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("cumulative", [True, False])
@pytest.mark.parametrize("threshold_mode", ["abs", "rel"])
@pytest.mark.parametrize(
    ("scores", "stopped_at", "best"),
    [
        ([1.0, NAN, NAN], 3, 1.0),
        ([1.0, NAN, 1.0], 3, 1.0),
        ([NAN, NAN], 2, None),
        ([NAN, 1.0, 1.0, 1.0], 4, 1.0),
    ],
)
def test_nan_is_no_improvement(
    scores: list[float],
    stopped_at: int,
    best: float | None,
    mode: str,
    threshold_mode: str,
    *,
    cumulative: bool,
) -> None:
    handler, stopped = _walk(scores, mode=mode, cumulative=cumulative, threshold_mode=threshold_mode)
    assert (stopped, handler.best_score) == (stopped_at, best)


def test_ignite_takes_each_nan_for_an_improvement() -> None:
    trainer = idle_engine()
    values = iter([1.0, NAN, NAN, NAN, NAN])
    theirs = Ignites(1, lambda _engine: next(values), trainer)
    for _ in range(5):
        theirs(trainer)
    assert not trainer.should_terminate


def test_the_first_score_only_sets_the_best() -> None:
    handler, _ = _walk([-100])
    assert (handler.counter, handler.best_score) == (0, -100)


def test_it_is_called_without_an_engine() -> None:
    trainer = idle_engine()
    handler = EarlyStopping(1, lambda engine: 0.5 if engine is None else 0.7, trainer)
    handler(None)
    handler(None)
    assert trainer.should_terminate


@pytest.mark.parametrize(
    "kind",
    [
        *(int, bool, np.float32, np.int64, torch.tensor, np.array),
        *(
            lambda value: torch.tensor([value]),
            lambda value: np.array([value]),
            lambda value: np.array([[value]], np.float32),
        ),
    ],
)
def test_any_kind_of_number_becomes_pythons_own(kind: Callable[[int], Any]) -> None:
    handler, stopped = _walk([kind(1), kind(1), kind(0)])
    assert stopped == 3
    assert handler.best_score == 1
    assert isinstance(handler.best_score, int | float)


@pytest.mark.parametrize("score", ["0.5", None, 1j, np.array("0.5"), np.array([1j]), np.array(None)])
def test_what_is_no_number_is_refused(score: Any) -> None:
    with pytest.raises(ValueError, match=r"^Output of score_function should be a number"):
        _walk([score])


def test_state_holds_counter_best_and_mode() -> None:
    handler, _ = _walk([np.float32(0.5), np.float32(0.25)], threshold_mode="rel")
    state = handler.state_dict()
    assert type(state) is OrderedDict
    assert state == {"counter": 1, "best_score": 0.5, "threshold_mode": "rel"}
    assert type(state["best_score"]) is float


@pytest.mark.parametrize(
    ("state", "mode"),
    [
        ({"counter": 1, "best_score": 3.0, "threshold_mode": "rel"}, "rel"),
        ({"counter": 1, "best_score": 3.0}, "abs"),  # a release without threshold_mode
        ({"counter": 1, "best_score": np.float64(3.0)}, "abs"),
        ({"counter": 1, "best_score": torch.tensor(3.0)}, "abs"),
        ({"counter": 1, "best_score": np.array([3.0])}, "abs"),
    ],
)
def test_states_of_older_releases_are_loaded(state: dict[str, Any], mode: str) -> None:
    handler = EarlyStopping(2, _score, idle_engine())
    handler.load_state_dict(state)
    assert (handler.counter, handler.best_score, handler.threshold_mode) == (1, 3.0, mode)
    assert type(handler.best_score) is float
    handler(None)
    assert handler.trainer.should_terminate


@pytest.mark.parametrize("state", [{"best_score": 1.0}, {"counter": 1}, {}])
def test_a_state_without_a_key_is_a_value_error(state: dict[str, Any]) -> None:
    handler = EarlyStopping(2, _score, idle_engine())
    with pytest.raises(ValueError, match=r"^Required state attribute"):
        handler.load_state_dict(state)


def test_a_state_that_is_no_mapping_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"^Argument state_dict should be a dictionary"):
        EarlyStopping(2, _score, idle_engine()).load_state_dict([])  # type: ignore[arg-type]  # that is what is tested


def test_state_travels_through_a_file(tmp_path: Any) -> None:
    handler, _ = _walk([np.float32(0.5), np.float32(0.25)])
    saver = Checkpoint({"stopping": handler, "model": linear(0)}, tmp_path)
    run_epochs(saver, 1)
    fresh = EarlyStopping(2, _score, idle_engine())
    assert saver.last_checkpoint is not None
    Checkpoint.load_objects({"stopping": fresh}, saver.last_checkpoint)
    assert fresh.state_dict() == handler.state_dict()


def test_reset_forgets_best_and_count() -> None:
    handler, _ = _walk([1, 0])
    handler.reset()
    assert (handler.counter, handler.best_score) == (0, None)


@pytest.mark.parametrize("separate", [True, False])
def test_attach_registers_the_check_and_the_reset(separate: bool) -> None:  # noqa: FBT001
    trainer, evaluator = idle_engine(), idle_engine()
    handler = EarlyStopping(2, _score, trainer)
    if separate:
        handler.attach(evaluator, Events.COMPLETED, trainer, Events.STARTED)
    else:
        handler.attach(evaluator)
    assert evaluator.has_event_handler(handler, Events.COMPLETED)
    assert (trainer if separate else evaluator).has_event_handler(handler.reset, Events.STARTED)


RENAMED: list[tuple[str, str, Any]] = [
    ("min_delta", "threshold", 0.25),
    ("min_delta_mode", "threshold_mode", "rel"),
    ("cumulative_delta", "cumulative", True),
]


@pytest.mark.parametrize(("old", "new", "value"), RENAMED)
def test_older_arguments_work_and_name_the_new_one(old: str, new: str, value: Any) -> None:
    with pytest.warns(DeprecationWarning, match=f"'{old}' is deprecated.*'{new}'") as told:
        handler = EarlyStopping(2, _score, idle_engine(), **{old: value})
    assert getattr(handler, new) == value
    assert told[0].filename == __file__


@pytest.mark.parametrize(("old", "new", "value"), RENAMED)
def test_older_attributes_work_and_name_the_new_one(old: str, new: str, value: Any) -> None:
    handler = EarlyStopping(2, _score, idle_engine())
    with pytest.warns(DeprecationWarning, match=f"{old} is deprecated.*'{new}'") as told:
        setattr(handler, old, value)
    assert told[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=f"{old} is deprecated.*'{new}'") as told:
        assert getattr(handler, old) == value
    assert told[0].filename == __file__
    assert getattr(handler, new) == value


def test_todays_names_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EarlyStopping(2, _score, idle_engine(), 0.1, True, "rel", "min")  # noqa: FBT003 - ignite's order


def test_the_log_says_how_far_and_that_it_stops(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="distckpt")
    _walk([1, 0, 0])
    assert [record.getMessage() for record in caplog.records] == [
        "EarlyStopping: 1 / 2",
        "EarlyStopping: 2 / 2",
        "EarlyStopping: Stop training (iteration 0: 2 times no improvement; best score 1, last score 0)",
    ]
