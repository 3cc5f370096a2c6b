"""One vote per step: what it costs, when it acts, and that all ranks act alike."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Engine, Events

from distckpt import Checkpoint, DiskSaver, TerminateOnNan, TimeLimit, stop_reason
from tests.distributed.programs import idle_engine
from tests.distributed.voters import (
    LIMIT_S,
    VOTERS,
    WORLDS,
    End,
    Weights,
    attached,
    counted,
    engine_with_nan_at,
    nan_at,
    rank_is_last,
    step_of,
    stored,
    voting_trainer,
)
from tests.support import job, run_distributed, run_ranks
from tests.support.selection import process_ranks_only

# -- what it costs -------------------------------------------------------------------------------------


def counts_of_an_epoch(folder: str, variant: str, pace: dict[str, Any]) -> list[list[str]]:
    """Train an epoch of eight iterations; return what was reduced after each step."""
    with counted() as log:

        def step(engine: Engine, _batch: object) -> float:
            log.append(f"step {engine.state.iteration}")
            return 0.5

        trainer = Engine(step)
        if variant == "epoch":
            checkpoint, event = Checkpoint({"weights": Weights()}, folder), Events.EPOCH_COMPLETED
        else:
            never_better = iter(range(0, -100, -1))
            checkpoint = Checkpoint({"weights": Weights()}, folder, score_function=lambda _: next(never_better))
            event = Events.ITERATION_COMPLETED
        with attached(trainer, VOTERS, checkpoint, event, **pace):
            trainer.run([0] * 8)
    rounds: list[list[str]] = []
    for entry in log:
        if entry.startswith("step"):
            rounds.append([])
        elif rounds:
            rounds[-1].append(entry)
    return rounds


@WORLDS
@pytest.mark.parametrize(
    ("variant", "pace", "rounds"),
    [
        ("epoch", {}, [["reduce", "finished"]] * 6),
        ("score", {}, [["reduce", "finished"]] * 6),
        ("epoch", {"lag": 1}, [["finished", "reduce"]] * 6),
        ("score", {"lag": 1}, [["reduce", "finished"]] * 6),
        ("epoch", {"every": 3}, [[], ["reduce", "finished"], [], [], ["reduce", "finished"], []]),
        ("score", {"every": 3}, [["reduce", "finished"]] * 6),
        ("epoch", {"every": 2, "lag": 1}, [["reduce"], [], ["finished", "reduce"], [], ["finished", "reduce"], []]),
    ],
)
def test_all_handlers_of_an_iteration_share_one_reduction(
    tmp_path: Path, world_size: int, variant: str, pace: dict[str, Any], rounds: list[list[str]]
) -> None:
    results = run_ranks(counts_of_an_epoch, world_size, str(tmp_path), variant, pace)
    assert [result[1:7] for result in results] == [rounds] * world_size, "from the second iteration to the last but one"


@pytest.mark.parametrize("backend", [None, "gloo"])
@pytest.mark.parametrize("pace", [{}, {"lag": 1}, {"every": 3}])
def test_a_world_of_one_reduces_nothing(tmp_path: Path, backend: str | None, pace: dict[str, Any]) -> None:
    (rounds,) = run_ranks(counts_of_an_epoch, 1, str(tmp_path), "score", pace, backend=backend)
    assert rounds == [[]] * 8


# -- who is attached, in which order, to what ----------------------------------------------------------


def stop_in_any_order(folder: str, kind: str) -> list[tuple[Any, ...]]:
    """Attach the four in each possible order; something happens on the last rank in the third iteration."""
    results: list[tuple[Any, ...]] = []
    for number, order in enumerate(itertools.permutations(VOTERS)):
        weights = Weights(breaks_at=3 if kind == "nan" else math.inf)
        trainer, known = voting_trainer(weights, kind)
        checkpoint = Checkpoint({"weights": weights}, f"{folder}/{number}", n_saved=None)
        with attached(trainer, order, checkpoint, Events.ITERATION_COMPLETED) as handlers:
            known.update(handlers)
            trainer.run([0] * 6)
            results.append((trainer.state.iteration, stop_reason(trainer), handlers["preemption"].preempted))
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    ("kind", "reason", "steps"),
    [
        ("nan", "nan", [1, 2]),
        ("time", "time_limit", [1, 2, 3]),
        pytest.param("signal", "preempted", [1, 2, 3], marks=process_ranks_only),
    ],
)
def test_the_order_of_attaching_changes_nothing(
    tmp_path: Path, world_size: int, kind: str, reason: str, steps: list[int]
) -> None:
    results = run_ranks(stop_in_any_order, world_size, str(tmp_path), kind)
    assert results == [[(3, reason, kind == "signal")] * 24] * world_size
    assert [stored(tmp_path / str(number)) for number in range(24)] == [steps] * 24


# -- filtered events -----------------------------------------------------------------------------------

FILTERED: dict[str, tuple[Any, list[int]]] = {
    "every": (Events.ITERATION_COMPLETED(every=4), [4, 8]),
    "once": (Events.ITERATION_COMPLETED(once=6), [6]),
    "event_filter": (Events.ITERATION_COMPLETED(event_filter=lambda _, number: number % 5 == 0), [5]),
    "after and before": (Events.ITERATION_COMPLETED(after=4, before=8), [5, 6, 7]),
    "epochs": (Events.EPOCH_COMPLETED(every=2), [6]),
    "combined": (Events.EPOCH_COMPLETED(once=1) | Events.ITERATION_COMPLETED(once=8), [3, 8]),
    "combined, at once": (Events.ITERATION_COMPLETED(every=2) | Events.ITERATION_COMPLETED(every=3), [2, 3, 4, 6, 8]),
}
"""By name: an event, and in which of nine iterations, three an epoch, it takes place."""


def stop_on_a_filtered_event(folder: str, name: str, kind: str) -> End:
    """Attach three handlers to a filtered event; something happens on the last rank in the third iteration."""
    event, _ = FILTERED[name]
    weights = Weights(breaks_at=3 if kind == "nan" else math.inf)
    limit = TimeLimit(3600, timeout_s=LIMIT_S)

    def step(engine: Engine, _batch: object) -> float:
        weights.step = engine.state.iteration
        if weights.step == 3 and kind == "time" and rank_is_last():
            limit.start_time -= 3601
        return math.nan if weights.step >= weights.breaks_at and rank_is_last() else 0.5

    trainer = Engine(step)
    trainer.add_event_handler(event, limit)
    trainer.add_event_handler(event, Checkpoint({"weights": weights}, folder, n_saved=None, timeout_s=LIMIT_S))
    trainer.add_event_handler(event, TerminateOnNan(timeout_s=LIMIT_S))
    trainer.run([0] * 3, max_epochs=3)
    return trainer.state.iteration, stop_reason(trainer)


@WORLDS
@pytest.mark.parametrize(("kind", "reason"), [("nan", "nan"), ("time", "time_limit")])
@pytest.mark.parametrize("name", FILTERED)
def test_filtered_events_vote_alike(tmp_path: Path, world_size: int, name: str, kind: str, reason: str) -> None:
    _, steps = FILTERED[name]
    stops_at = min(step for step in steps if step >= 3)
    results = run_ranks(stop_on_a_filtered_event, world_size, str(tmp_path), name, kind)
    assert results == [(stops_at, reason)] * world_size
    assert stored(tmp_path) == [step for step in steps if step < stops_at or (step == stops_at and kind == "time")]


@run_distributed(world_size=2)
def test_a_handler_on_two_events_of_one_iteration_votes_once() -> None:
    trainer = idle_engine()
    event = Events.ITERATION_COMPLETED(every=2) | Events.ITERATION_COMPLETED(every=3)
    trainer.add_event_handler(event, TerminateOnNan(timeout_s=LIMIT_S))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TimeLimit(3600, timeout_s=LIMIT_S))
    trainer.run([0])  # the first vote connects the ranks
    trainer.state.max_epochs = None
    with counted() as log:
        trainer.run([0] * 12)
    assert log == ["reduce", "finished"] * 12


# -- several engines -----------------------------------------------------------------------------------


@run_distributed(world_size=3)
def test_a_trainer_and_an_evaluator_within_its_events_vote_apart(tmp_path: Path) -> None:
    trainer, weights = idle_engine(), Weights()

    def evaluate(engine: Engine, _batch: object) -> float:
        weights.step = trainer.state.epoch
        return math.nan if (trainer.state.epoch, engine.state.iteration) == (2, 3) and rank_is_last() else 0.5

    evaluator = Engine(evaluate)
    checkpoint = Checkpoint(
        {"weights": weights}, tmp_path, n_saved=None, global_step_transform=lambda *_: trainer.state.epoch
    )
    evaluator.add_event_handler(Events.COMPLETED, checkpoint)
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S))
    ends: list[tuple[int, str | None, str | None]] = []
    limit = TimeLimit(3600, timeout_s=LIMIT_S)

    @trainer.on(Events.ITERATION_COMPLETED(every=2))
    def run_evaluator() -> None:
        evaluator.run([0] * 3)
        ends.append((evaluator.state.iteration, stop_reason(evaluator), stop_reason(trainer)))
        if trainer.state.epoch == 4 and rank_is_last():
            limit.start_time -= 3601

    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, limit)
    trainer.run([0, 0], max_epochs=6)
    assert ends == [(3, None, None), (3, "nan", None), (3, None, None), (3, None, None)]
    assert (trainer.state.iteration, stop_reason(trainer)) == (8, "time_limit")
    job.barrier()
    assert stored(tmp_path) == [1, 3, 4], "what was found in the second evaluation is not held against the third"


@run_distributed(world_size=2)
@pytest.mark.parametrize("lag", [0, 1])
def test_two_engines_with_a_vote_under_way_each_get_their_own_result(lag: int) -> None:
    trainer = Engine(lambda engine, _batch: nan_at(engine, 5))
    evaluator = Engine(lambda engine, _batch: nan_at(engine, 2) if trainer.state.iteration == 3 else 0.5)
    ends: list[End] = []

    @trainer.on(Events.ITERATION_STARTED)
    def evaluate() -> None:
        evaluator.run([0] * 4)
        ends.append((evaluator.state.iteration, stop_reason(evaluator)))

    for engine in (trainer, evaluator):
        engine.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S, lag=lag))
    trainer.run([0] * 9)
    assert (trainer.state.iteration, stop_reason(trainer)) == (5 + lag, "nan")
    assert [number for number, end in enumerate(ends) if end != (4, None)] == [2 + lag - lag]
    assert ends[2] == (2 + lag, "nan")


@run_distributed(world_size=2)
@pytest.mark.parametrize("lag", [0, 1])
def test_one_handler_on_two_engines_stops_each_of_them(lag: int) -> None:
    limit, trainer = TimeLimit(3600, timeout_s=LIMIT_S, lag=lag), idle_engine()

    def evaluate(engine: Engine, _batch: object) -> None:
        if (trainer.state.iteration, engine.state.iteration) == (3, 2) and rank_is_last():
            limit.start_time -= 3601

    evaluator = Engine(evaluate)
    for engine in (trainer, evaluator):
        engine.add_event_handler(Events.ITERATION_COMPLETED, limit)
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: evaluator.run([0] * 6))
    trainer.run([0] * 9)
    assert (evaluator.state.iteration, stop_reason(evaluator)) == (1 + lag if lag else 2, "time_limit")
    assert (trainer.state.iteration, stop_reason(trainer)) == (3 + lag, "time_limit")


@run_distributed(world_size=3)
@pytest.mark.parametrize("lag", [0, 1])
def test_engines_run_one_after_the_other_vote_apart(lag: int) -> None:
    ends: list[End] = []
    for breaks_at in (2, 4, 99, 1):
        engine = engine_with_nan_at(breaks_at)
        engine.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S, lag=lag))
        engine.add_event_handler(Events.EPOCH_COMPLETED, TimeLimit(3600, timeout_s=LIMIT_S))
        engine.run([0] * 6)
        ends.append((engine.state.iteration, stop_reason(engine)))
    assert ends == [(2 + lag, "nan"), (4 + lag, "nan"), (6, None), (1 + lag, "nan")]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_that_begins_anew_forgets_what_the_one_before_found(tmp_path: Path, world_size: int) -> None:
    results = run_ranks(_run_twice, world_size, str(tmp_path))
    assert results == [[(3, "nan"), (6, None)]] * world_size
    assert stored(tmp_path / "0") == [1, 2]
    assert stored(tmp_path / "1") == [1, 2, 3, 4, 5, 6]


def _run_twice(folder: str) -> list[End]:
    ends: list[End] = []
    weights = Weights(breaks_at=3)
    trainer = Engine(lambda engine, _batch: step_of(engine, weights))
    checkpoint = Checkpoint({"weights": weights}, f"{folder}/0", n_saved=None)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, checkpoint)
    nan = trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S, lag=0))
    trainer.run([0] * 6)
    ends.append((trainer.state.iteration, stop_reason(trainer)))
    weights.breaks_at, trainer.state.max_epochs = math.inf, None
    checkpoint.reset()
    checkpoint.save_handler = DiskSaver(f"{folder}/1")
    nan.remove()
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S, lag=1))  # another pace
    trainer.run([0] * 6)
    ends.append((trainer.state.iteration, stop_reason(trainer)))
    return ends
