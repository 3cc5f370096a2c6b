"""The same stopping and timing program has the same events, states and values with both libraries."""

import itertools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ignite.engine import Engine, Events
from ignite.handlers import time_limit as ignites_time_limit
from ignite.handlers import timing as ignites_timing

from distckpt.handlers import time_limit as our_time_limit
from distckpt.handlers import timer as our_timer
from tests.parity.libraries import IGNITE, OURS, Library, Training, run_with_both
from tests.support.equality import equal

_score = st.integers(-3, 3) | st.floats(-2, 2, allow_nan=False)


def _idle() -> Engine:
    return Engine(lambda _engine, _batch: None)


@given(
    scores=st.lists(_score, min_size=1, max_size=15),
    patience=st.integers(1, 4),
    threshold=st.sampled_from([0.0, 0.1, 1]) | st.floats(0, 0.9),
    cumulative=st.booleans(),
    threshold_mode=st.sampled_from(["abs", "rel"]),
    mode=st.sampled_from(["min", "max"]),
)
def test_early_stopping_walks_the_same_states(
    scores: list[float],
    patience: int,
    threshold: float,
    cumulative: bool,  # noqa: FBT001
    threshold_mode: str,
    mode: str,
) -> None:
    def states(library: Library) -> list[Any]:
        trainer = _idle()
        values = iter(scores)
        handler = library.EarlyStopping(
            patience, lambda _engine: next(values), trainer, threshold, cumulative, threshold_mode, mode
        )
        results = []
        for _ in scores:
            handler(trainer)
            results.append((dict(handler.state_dict()), trainer.should_terminate))
        return results

    assert states(IGNITE) == states(OURS)


@pytest.mark.parametrize(
    "kind",
    [
        *(int, bool, np.float32, np.float64, np.int64, torch.tensor, np.array),
        *(lambda value: torch.tensor([value]), lambda value: np.array([value])),
    ],
)
def test_early_stopping_takes_the_same_kinds_of_score(kind: Callable[[int], Any]) -> None:
    def stopped_at(library: Library) -> Any:
        trainer, evaluator = _idle(), _idle()
        handler = library.EarlyStopping(2, lambda _: kind([0, 1, 1, 0, 0][trainer.state.epoch - 1]), trainer)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([0]))
        evaluator.add_event_handler(Events.COMPLETED, handler)
        trainer.run([0], max_epochs=5)
        return trainer.state.epoch, handler.counter, handler.best_score

    assert stopped_at(OURS) == stopped_at(IGNITE)


@pytest.mark.parametrize(
    "attach",
    [
        lambda handler, _trainer, evaluator: handler.attach(evaluator),
        lambda handler, trainer, evaluator: handler.attach(evaluator, Events.COMPLETED, trainer, Events.STARTED),
        lambda handler, trainer, evaluator: handler.attach(
            evaluator, event=Events.EPOCH_COMPLETED, reset_engine=trainer, reset_event=Events.EPOCH_STARTED(every=3)
        ),
    ],
)
def test_early_stopping_is_attached_and_reset_alike(attach: Callable[[Any, Engine, Engine], None]) -> None:
    def states(library: Library) -> list[Any]:
        trainer, evaluator = _idle(), _idle()
        handler = library.EarlyStopping(3, lambda _: -trainer.state.epoch, trainer)
        attach(handler, trainer, evaluator)
        results = []

        def validate() -> None:
            evaluator.run([0])
            results.append((dict(handler.state_dict()), trainer.state.epoch))

        trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
        for _ in range(2):
            trainer.run([0, 1], max_epochs=8)
        return results

    assert states(IGNITE) == states(OURS)


@pytest.mark.parametrize(
    "outputs",
    [
        [1.0, 2, float("nan")],
        [0.0, float("inf"), 1.0],
        [torch.ones(2), torch.tensor([1.0, float("nan")]), torch.ones(1)],
        [{"loss": 1.0}, {"loss": [torch.tensor(1.0), {"deep": torch.tensor(float("-inf"))}]}],
        [(1.0, "text"), (1, torch.tensor([2])), (True, torch.tensor([True]))],
        [torch.tensor(1 + 2j), torch.tensor([complex(float("nan"), 0)]), 3.0],
        [complex(1, 1), complex(0, float("inf"))],
        [torch.zeros(0), [], {}, "nan"],
        [np.float64(1), np.float32("nan")],
    ],
)
def test_terminate_on_nan_stops_at_the_same_iteration(outputs: list[Any]) -> None:
    def stopped_at(library: Library) -> int:
        engine = Engine(lambda _engine, batch: outputs[batch])
        engine.add_event_handler(Events.ITERATION_COMPLETED, library.TerminateOnNan(lambda output: output))
        return engine.run(list(range(len(outputs)))).iteration

    assert stopped_at(IGNITE) == stopped_at(OURS)


@pytest.mark.parametrize(("limit", "step"), [(5, 1.0), (5, 0.7), (1, 3.0), (100, 1.0)])
def test_time_limit_stops_at_the_same_iteration(monkeypatch: pytest.MonkeyPatch, limit: int, step: float) -> None:
    def stopped_at(library: Library) -> int:
        now = itertools.count(1000.0, step).__next__
        for module in (ignites_time_limit, our_time_limit):
            monkeypatch.setattr(module, "time", types.SimpleNamespace(time=now, monotonic=now))
        engine = _idle()
        engine.add_event_handler(Events.ITERATION_COMPLETED, library.TimeLimit(limit))
        return engine.run(range(20)).iteration

    assert stopped_at(IGNITE) == stopped_at(OURS)


@given(
    average=st.booleans(),
    actions=st.lists(
        st.tuples(st.sampled_from(["reset", "pause", "resume", "step", "value"]), st.integers(0, 1000)), max_size=20
    ),
)
def test_timer_measures_the_same(average: bool, actions: list[tuple[str, int]]) -> None:  # noqa: FBT001
    def values(library: Library) -> list[Any]:
        now = [0.0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ignites_timing, "perf_counter", lambda: now[0])
            patch.setattr(our_timer, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
            timer = library.Timer(average=average)
            results = []
            for action, elapsed in actions:
                now[0] += elapsed / 64
                answer = getattr(timer, action)()
                results.append((answer is timer) if action == "reset" else answer)
                results.append((timer.total, timer.step_count, timer.running, timer.value()))
        return results

    assert values(IGNITE) == values(OURS)


@pytest.mark.parametrize("fallback", ["epoch", "iteration"])
@pytest.mark.parametrize("custom", [None, Events.ITERATION_COMPLETED, Events.EPOCH_STARTED, Events.EXCEPTION_RAISED])
@pytest.mark.parametrize("event", [*Events, Events.EPOCH_COMPLETED(every=2), Events.ITERATION_COMPLETED(once=3)])
def test_global_step_is_the_same_for_every_event(event: Any, custom: Any, fallback: str) -> None:
    trainer = _idle()
    trainer.run([0, 1, 2], max_epochs=4)
    steps = [
        library.global_step_from_engine(trainer, custom, fallback_attr=fallback)(_idle(), event)
        for library in (IGNITE, OURS)
    ]
    assert steps[0] == steps[1]


def test_model_checkpoint_saves_and_recovers_alike(tmp_path: Path) -> None:
    def program(library: Library, folder: Path) -> Any:
        training = Training.make()
        handler = library.ModelCheckpoint(
            folder,
            "best",
            score_name="loss",
            score_function=lambda engine: -engine.state.output,
            n_saved=2,
            global_step_transform=library.global_step_from_engine(training.trainer),
        )
        training.trainer.add_event_handler(Events.EPOCH_COMPLETED, handler, training.objects())
        training.run(max_epochs=5)
        fresh = Training.make()
        library.Checkpoint.load_objects(fresh.objects(), handler.last_checkpoint)
        states = {name: obj.state_dict() for name, obj in fresh.objects().items()}
        names = sorted(path.name for path in folder.iterdir())
        return names, handler.last_checkpoint.name, handler.state_dict(), states

    theirs, ours = run_with_both(program, tmp_path)
    assert equal(theirs, ours)


@pytest.mark.parametrize(("saver", "loader"), [(IGNITE, OURS), (OURS, IGNITE)], ids=["theirs-ours", "ours-theirs"])
@pytest.mark.parametrize("names", [["model"], ["optimizer"], ["model", "optimizer", "scheduler", "trainer"]])
def test_each_loads_what_the_other_wrote(tmp_path: Path, saver: Library, loader: Library, names: list[str]) -> None:
    training, fresh = Training.make(), Training.make()
    handler = saver.Checkpoint({name: training.objects()[name] for name in names}, tmp_path)
    training.trainer.add_event_handler(Events.COMPLETED, handler)
    training.run(max_epochs=2)
    loader.Checkpoint.load_objects({name: fresh.objects()[name] for name in names}, str(handler.last_checkpoint))
    for name in names:
        assert equal(fresh.objects()[name].state_dict(), training.objects()[name].state_dict())
