"""One vote per step: what follows from it, and what is told."""

import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events

from distckpt import Checkpoint, TerminateOnNan, TimeLimit, stop_reason
from tests.distributed.programs import idle_engine, kinds, logged, raised
from tests.distributed.voters import (
    LIMIT_S,
    PLACES,
    WORLDS,
    End,
    Weights,
    attached,
    counted,
    nan_at,
    rank_is_last,
    saving_trainer,
    step_of,
    stored,
    voting_trainer,
)
from tests.support import job, run_distributed, run_ranks
from tests.support.selection import only_on, process_ranks_only

# -- a handler by itself -------------------------------------------------------------------------------


def use_alone(folder: str, name: str) -> tuple[int, str | None, int]:
    """Attach one handler alone; it has a reason in the third of six iterations."""
    weights = Weights(breaks_at=3 if name == "nan" else math.inf)
    trainer, known = voting_trainer(weights, {"preemption": "signal"}.get(name, name))
    checkpoint = Checkpoint({"weights": weights}, folder, n_saved=None)
    with attached(trainer, (name,), checkpoint, Events.ITERATION_COMPLETED) as handlers, counted() as log:
        known.update(handlers)
        trainer.run([0] * 6)
    return trainer.state.iteration, stop_reason(trainer), log.count("reduce") > 0


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "iteration", "reason", "steps"),
    [
        ("nan", 3, "nan", []),
        ("time", 3, "time_limit", []),
        pytest.param("preemption", 3, "preempted", [3], marks=process_ranks_only),
        ("checkpoint", 6, None, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_a_handler_attached_alone_needs_no_other(
    tmp_path: Path, world_size: int, name: str, iteration: int, reason: str | None, steps: list[int]
) -> None:
    assert run_ranks(use_alone, world_size, str(tmp_path), name) == [(iteration, reason, world_size > 1)] * world_size
    assert stored(tmp_path) == steps


def call_directly(folder: str, pace: dict[str, Any], has_run: bool) -> list[tuple[object, ...]]:  # noqa: FBT001
    """Call handlers outside of any event, each on an engine of its own, with a reason on the last rank only."""
    results: list[tuple[object, ...]] = []
    for number in range(3):
        weights = Weights()
        handler: Any = [
            TerminateOnNan(timeout_s=LIMIT_S, **pace),
            TimeLimit(3600, timeout_s=LIMIT_S, **pace),
            Checkpoint({"weights": weights}, f"{folder}/{number}", timeout_s=LIMIT_S),
        ][number]
        engine = idle_engine()
        if has_run:
            engine.run([0])
        vars(engine.state)["output"] = 0.5
        handler(engine)
        before = engine.should_terminate
        if rank_is_last():
            vars(engine.state)["output"] = math.nan
            vars(handler)["start_time"] = time.monotonic() - 3601
        handler(engine)
        results.append((before, engine.should_terminate, stop_reason(engine)))
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("pace", [{}, {"lag": 1}, {"every": 7}])
def test_a_handler_called_directly_acts_at_once(
    tmp_path: Path, world_size: int, pace: dict[str, Any], has_run: bool  # noqa: FBT001
) -> None:  # fmt: skip
    expected = [(False, True, "nan"), (False, True, "time_limit"), (False, False, None)]
    assert run_ranks(call_directly, world_size, str(tmp_path), pace, has_run) == [expected] * world_size
    assert stored(tmp_path / "2") == [0]


@run_distributed(world_size=2)
def test_a_handler_called_directly_stops_the_run_from_the_process_function() -> None:
    nan, engine = TerminateOnNan(timeout_s=LIMIT_S), idle_engine()

    def step(engine: Engine, _batch: object) -> None:
        vars(engine.state)["output"] = nan_at(engine, 3)
        nan(engine)

    engine = Engine(step)
    engine.run([0] * 6)
    assert (engine.state.iteration, stop_reason(engine)) == (3, "nan")


# -- what is voted NaN is not stored -------------------------------------------------------------------

NUM_STEPS = 6


WAYS: list[tuple[str, dict[str, Any]]] = [
    (order, pace) for order in ("before", "after") for pace in ({}, {"lag": 1}, {"every": 2}, {"every": 4, "lag": 1})
]


def train_until_it_breaks(folder: str, place: str) -> list[list[End]]:
    """Train two epochs of three iterations in each of `WAYS`, broken in each of them in turn, and once not at all."""
    results = []
    for way, (order, pace) in enumerate(WAYS):
        ends: list[End] = []
        for at in range(1, NUM_STEPS + 2):
            trainer = saving_trainer(Weights(breaks_at=at), f"{folder}/{way}/{at}", place, order, **pace)
            trainer.run([0] * (NUM_STEPS // 2), max_epochs=2)
            ends.append((trainer.state.iteration, stop_reason(trainer)))
        results.append(ends)
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("place", PLACES)
def test_a_step_that_was_voted_nan_is_never_stored(tmp_path: Path, place: str, world_size: int) -> None:
    results = run_ranks(train_until_it_breaks, world_size, str(tmp_path), place)
    assert results == [results[0]] * world_size
    event, _ = PLACES[place]
    steps = {
        Events.ITERATION_COMPLETED: range(1, NUM_STEPS + 1),
        Events.ITERATION_STARTED: range(NUM_STEPS),
        Events.EPOCH_COMPLETED: range(NUM_STEPS // 2, NUM_STEPS + 1, NUM_STEPS // 2),
        Events.COMPLETED: [NUM_STEPS],
    }[event]
    for way, ends in enumerate(results[0]):
        assert [reason for _, reason in ends] == ["nan"] * NUM_STEPS + [None]
        for at, (end, _) in enumerate(ends, start=1):
            assert end >= min(at, NUM_STEPS)
            where = f"broken at {at}, ended at {end}, {WAYS[way]}"
            assert stored(tmp_path / str(way) / str(at)) == [step for step in steps if step < at], where


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("order", ["before", "after"])
def test_two_evaluations_within_one_event_are_saved_with_their_own_scores(
    tmp_path: Path, world_size: int, order: str
) -> None:
    expected = ["weights_0.1000.pt", "weights_0.2000.pt"]
    assert run_ranks(_evaluate_twice, world_size, str(tmp_path), order) == [expected] * world_size
    assert sorted(os.listdir(tmp_path)) == expected


def _evaluate_twice(folder: str, order: str) -> list[str]:
    trainer, evaluator, weights = idle_engine(), idle_engine(), Weights()

    def evaluate() -> None:
        for score in (0.1, 0.2):
            evaluator.state.metrics = {"accuracy": score}
            evaluator.run([0])

    checkpoint = Checkpoint(
        {"weights": weights}, folder, score_function=lambda engine: engine.state.metrics["accuracy"], n_saved=None
    )
    evaluator.add_event_handler(Events.COMPLETED, checkpoint)
    handlers: list[Any] = [evaluate, TerminateOnNan(timeout_s=LIMIT_S)][:: 1 if order == "before" else -1]
    for handler in handlers:
        trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    trainer.run([0])
    return [name for _, name in checkpoint.state_dict()["_saved"]]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_is_saved_for_an_exception_in_an_event_with_a_vote(tmp_path: Path, world_size: int) -> None:
    assert run_ranks(_fail_after_the_vote_began, world_size, str(tmp_path)) == [3] * world_size
    assert stored(tmp_path) == [3]


def _fail_after_the_vote_began(folder: str) -> int:
    weights = Weights()
    trainer = Engine(lambda engine, _batch: step_of(engine, weights))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S))

    @trainer.on(Events.ITERATION_COMPLETED(once=3))
    def fail() -> None:
        raise ZeroDivisionError("on all ranks alike")

    checkpoint = Checkpoint({"weights": weights}, folder, timeout_s=LIMIT_S)
    trainer.add_event_handler(Events.EXCEPTION_RAISED, lambda _error: checkpoint(trainer))
    return trainer.run([0] * 6).iteration


# -- what is told --------------------------------------------------------------------------------------


def stop_and_tell(pace: dict[str, Any], ranks: tuple[int, ...]) -> tuple[int, list[str]]:
    """Break the output on some ranks, on each at another place of it, in the third iteration."""

    def step(engine: Engine, _batch: object) -> dict[str, Any]:
        broken = engine.state.iteration == 3 and job.rank() in ranks
        logits = torch.zeros(2, 3)
        if broken and job.rank() > 0:
            logits[1, job.rank()] = math.inf
        return {"losses": [0.5, (0.1, math.nan if broken and job.rank() == 0 else 0.2)], "logits": logits}

    nan = TerminateOnNan(timeout_s=LIMIT_S, **pace)
    trainer = Engine(step)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, nan)
    with logged(nan.logger.name) as messages:
        trainer.run([0] * 8)
    return trainer.state.iteration, messages


TOLD = {
    0: "rank 0, iteration 3: output['losses'][1][1] is nan",
    1: "rank 1, iteration 3: output['logits'][1, 1] is inf",
    2: "rank 2, iteration 3: output['logits'][1, 2] is inf",
}


@only_on("gloo", "xla", why="takes three ranks, of which Horovod's job has two here")
@pytest.mark.parametrize("ranks", [(0,), (2,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize(("pace", "end"), [({}, 3), ({"lag": 1}, 4), ({"every": 4}, 4), ({"every": 2, "lag": 1}, 6)])
def test_the_log_of_each_rank_tells_who_found_nan_in_which_iteration_and_where(
    pace: dict[str, Any], end: int, ranks: tuple[int, ...]
) -> None:
    for rank, (iteration, messages) in enumerate(run_ranks(stop_and_tell, 3, pace, ranks)):
        assert iteration == end
        (message,) = messages
        for one, told in TOLD.items():
            assert (told in message) == (one in ranks)
        assert ("of another rank" in message) == (rank not in ranks)


@run_distributed(world_size=3)
def test_the_largest_elapsed_time_of_all_ranks_counts() -> None:
    limit, trainer = TimeLimit(100, timeout_s=LIMIT_S), idle_engine()
    trainer.add_event_handler(Events.ITERATION_COMPLETED, limit)
    late_s = [50, 400, 200][job.rank()]
    trainer.add_event_handler(
        Events.ITERATION_STARTED(once=2), lambda: setattr(limit, "start_time", limit.start_time - late_s)
    )
    with logged(limit.logger.name) as messages:
        assert trainer.run([0] * 4).iteration == 2
    (message,) = messages
    assert "Reached the time limit: 100 sec. Stop training (iteration 2; 400." in message
    assert "s have passed on rank 1)" in message


# -- errors of one rank --------------------------------------------------------------------------------


def fail_on_one_rank(pace: dict[str, Any], kind: str) -> tuple[int, tuple[str, ...], str, int]:
    """Let what is asked fail on the last rank in the third iteration; run again afterwards."""
    fails = True

    def step(engine: Engine, _batch: object) -> object:
        return object() if fails and kind == "output" and engine.state.iteration == 3 and rank_is_last() else 0.5

    trainer = Engine(step)

    def transform(output: object) -> object:
        if fails and kind == "transform" and trainer.state.iteration == 3 and rank_is_last():
            raise ZeroDivisionError("in output_transform")
        return output

    trainer.add_event_handler(Events.ITERATION_COMPLETED, TimeLimit(3600, timeout_s=LIMIT_S))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(transform, timeout_s=LIMIT_S, **pace))
    error = raised(lambda: trainer.run([0] * 8))
    failed_at, fails = trainer.state.iteration, False
    trainer.state.max_epochs = None
    return failed_at, kinds(error), str(error), trainer.run([0] * 5).iteration


@WORLDS
@pytest.mark.parametrize(("kind", "error"), [("transform", "ArithmeticError"), ("output", "TypeError")])
@pytest.mark.parametrize(("pace", "failed_at"), [({}, 3), ({"lag": 1}, 4), ({"every": 4}, 4), ({"every": 5}, 5)])
def test_what_fails_on_one_rank_is_raised_on_all_as_one_error(
    world_size: int, pace: dict[str, Any], failed_at: int, kind: str, error: str
) -> None:
    results = run_ranks(fail_on_one_rank, world_size, pace, kind)
    assert results == [results[0]] * world_size
    at, names, message, again = results[0]
    assert (at, again) == (failed_at, 5)
    assert {"RemoteRankError", error} <= set(names)
    assert f"rank {world_size - 1}" in message
