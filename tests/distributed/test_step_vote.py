"""One vote per step: what it costs, when it acts, and that all ranks act alike."""

import itertools
import math
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events

from distckpt import Checkpoint, DesyncError, DiskSaver, TerminateOnNan, TimeLimit, stop_reason
from tests.distributed.programs import gather, idle_engine, kinds, logged, raised
from tests.distributed.voters import (
    LIMIT_S,
    PLACES,
    VOTERS,
    Weights,
    attached,
    counted,
    operations,
    rank_is_last,
    saving_trainer,
    stored,
)
from tests.support import job, run_distributed, run_ranks
from tests.support.selection import only_on, process_ranks_only

WORLDS = pytest.mark.parametrize("world_size", [2, 3])
SOON_S = 2.0
End = tuple[int, str | None]
"""Of a run: the last iteration, and the stop reason."""


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
        trainer, known = _trainer(weights, kind)
        checkpoint = Checkpoint({"weights": weights}, f"{folder}/{number}", n_saved=None)
        with attached(trainer, order, checkpoint, Events.ITERATION_COMPLETED) as handlers:
            known.update(handlers)
            trainer.run([0] * 6)
            results.append((trainer.state.iteration, stop_reason(trainer), handlers["preemption"].preempted))
    return results


def _trainer(weights: Weights, kind: str, at: int = 3) -> tuple[Engine, dict[str, Any]]:
    """Return a trainer to which something happens on the last rank in iteration `at`, and where its handlers go."""
    handlers: dict[str, Any] = {}

    def step(engine: Engine, _batch: object) -> float:
        weights.step = engine.state.iteration
        if weights.step == at and rank_is_last():
            if kind == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            elif kind == "time":
                handlers["time"].start_time -= 3601
            elif kind == "nan":
                return math.nan
        return 0.5

    return Engine(step), handlers


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
    trainer = Engine(lambda engine, _batch: _nan_at(engine, 5))
    evaluator = Engine(lambda engine, _batch: _nan_at(engine, 2) if trainer.state.iteration == 3 else 0.5)
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
        engine = _engine_with_nan_at(breaks_at)
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
    trainer = Engine(lambda engine, _batch: _step_of(engine, weights))
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


def _engine_with_nan_at(iteration: int) -> Engine:
    return Engine(lambda engine, _batch: _nan_at(engine, iteration))


def _nan_at(engine: Engine, iteration: int) -> float:
    return math.nan if engine.state.iteration == iteration and rank_is_last() else 0.5


def _step_of(engine: Engine, weights: Weights) -> float:
    weights.step = engine.state.iteration
    return math.nan if weights.step >= weights.breaks_at and rank_is_last() else 0.5


# -- a handler by itself -------------------------------------------------------------------------------


def use_alone(folder: str, name: str) -> tuple[int, str | None, int]:
    """Attach one handler alone; it has a reason in the third of six iterations."""
    weights = Weights(breaks_at=3 if name == "nan" else math.inf)
    trainer, known = _trainer(weights, {"preemption": "signal"}.get(name, name))
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
        vars(engine.state)["output"] = _nan_at(engine, 3)
        nan(engine)

    engine = Engine(step)
    engine.run([0] * 6)
    assert (engine.state.iteration, stop_reason(engine)) == (3, "nan")


# -- ranks that drifted apart --------------------------------------------------------------------------


def drift(rank: int, missed: int, pace: dict[str, Any]) -> tuple[str, float]:
    """Miss an iteration on one rank; return the error, and the seconds until it was there."""
    engine, nan = idle_engine(), TerminateOnNan(timeout_s=LIMIT_S, **pace)
    is_missing = job.rank() == rank
    event = Events.ITERATION_COMPLETED(event_filter=lambda _, number: not (is_missing and number == missed))
    engine.add_event_handler(event, nan)
    begin_s = time.monotonic()
    error = raised(lambda: engine.run([0] * 12))
    assert isinstance(error, DesyncError), error
    return str(error), time.monotonic() - begin_s


@WORLDS
@pytest.mark.parametrize(
    ("pace", "missed", "came"),
    [({}, 3, 4), ({"lag": 1}, 3, 4), ({"every": 2}, 4, 6), ({"lag": 1, "every": 3}, 6, 9), ({}, 1, 2)],
)
def test_ranks_at_different_iterations_are_told_so_at_once(
    world_size: int, pace: dict[str, Any], missed: int, came: int
) -> None:
    for rank in (0, world_size - 1):
        results = run_ranks(drift, world_size, rank, missed, pace)
        (message,) = {message for message, _ in results}
        for one in range(world_size):
            step = came if one == rank else missed
            vote = "".join(["vote#0", *(f", {name}={value}" for name, value in pace.items())])
            place = f"TerminateOnNan#0, on ITERATION_COMPLETED, voting ({vote}), step {step} (sequence {step})"
            assert f"rank {one} is at: {place}" in message
        assert max(seconds for _, seconds in results) < SOON_S


@pytest.mark.parametrize("paces", [({"lag": 1}, {"lag": 0}), ({"lag": 1}, {}), ({"every": 2}, {}), ({}, {"every": 3})])
def test_ranks_with_different_paces_are_told_so_at_once(paces: tuple[dict[str, Any], dict[str, Any]]) -> None:
    results = run_ranks(_run_at_its_own_pace, 2, paces)
    (message,) = {message for message, _ in results}
    assert "entered one collective at different points" in message
    for pace in paces:
        for name, value in pace.items():
            assert not value or f"{name}={value}" in message
    assert max(seconds for _, seconds in results) < SOON_S


def _run_at_its_own_pace(paces: tuple[dict[str, Any], ...]) -> tuple[str, float]:
    return drift(-1, 0, paces[job.rank()])


@run_distributed(world_size=2)
def test_an_error_of_one_rank_is_not_lost_when_it_drifted_too() -> None:
    mine = ValueError("my own")

    def fail(_output: object) -> None:
        if rank_is_last():
            raise mine

    engine, nan = idle_engine(), TerminateOnNan(fail, timeout_s=LIMIT_S)
    engine.add_event_handler([Events.EPOCH_COMPLETED, Events.EPOCH_STARTED][job.rank()], nan)
    error = raised(lambda: engine.run([0]))
    assert isinstance(error, DesyncError)
    assert error.__cause__ is (mine if rank_is_last() else None)


@run_distributed(world_size=2)
def test_ranks_may_have_evaluated_different_numbers_of_batches(tmp_path: Path) -> None:
    evaluator, weights = idle_engine(), Weights()
    checkpoint = Checkpoint({"weights": weights}, tmp_path, score_function=lambda _: 0.5, timeout_s=LIMIT_S)
    evaluator.add_event_handler(Events.COMPLETED, checkpoint)
    limit = TimeLimit(3600, timeout_s=LIMIT_S)
    evaluator.add_event_handler(Events.COMPLETED, limit)
    limit.start_time -= 3601
    evaluator.run([0] * (3 + job.rank()))
    assert gather((stop_reason(evaluator), checkpoint.last_checkpoint)) == [
        ("time_limit", tmp_path / "weights_0.5000.pt")
    ] * 2  # fmt: skip


# -- lag and every -------------------------------------------------------------------------------------


def stop_late(folder: str, kind: str, pace: dict[str, Any]) -> list[End]:
    """Let something happen on the last rank in each of seven iterations; return where ten iterations end."""
    ends: list[End] = []
    for at in range(1, 8):
        weights = Weights(breaks_at=at if kind == "nan" else math.inf)
        trainer, known = _trainer(weights, kind, at)
        checkpoint = Checkpoint({"weights": weights}, f"{folder}/{at}", n_saved=None)
        with attached(trainer, VOTERS, checkpoint, Events.EPOCH_COMPLETED, **pace) as handlers:
            known.update(handlers)
            trainer.run([0] * 10)
        ends.append((trainer.state.iteration, stop_reason(trainer)))
    return ends


@WORLDS
@pytest.mark.parametrize(
    ("pace", "ends"),
    [
        ({"lag": 1}, [2, 3, 4, 5, 6, 7, 8]),
        ({"every": 3}, [3, 3, 3, 6, 6, 6, 9]),
        ({"every": 4, "lag": 1}, [8, 8, 8, 8, 10, 10, 10]),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("kind", "reason"),
    [("nan", "nan"), ("time", "time_limit"), pytest.param("signal", "preempted", marks=process_ranks_only)],
)
def test_a_lag_and_an_interval_delay_the_stop_alike_on_all_ranks(
    tmp_path: Path, world_size: int, kind: str, reason: str, pace: dict[str, Any], ends: list[int]
) -> None:
    results = run_ranks(stop_late, world_size, str(tmp_path), kind, pace)
    assert results == [[(end, reason) for end in ends]] * world_size
    for at, end in enumerate(ends, start=1):
        assert stored(tmp_path / str(at)) == (
            [end] if kind == "signal" else [10] if end == 10 and kind == "time" else []
        )


@only_on("gloo", "horovod", why="reduced beside what the rank computes; XLA's replicas reduce when they wait for it")
@run_distributed(world_size=2)
def test_with_a_lag_a_rank_is_steps_ahead_of_the_one_that_it_waits_for() -> None:
    store, num_steps = job.store(), 5

    def step(engine: Engine, _batch: object) -> float:
        # Rank 1 ends a step only when rank 0 has begun the next one: without a lag neither would go on. In the first
        # step the handlers wait for each other.
        if job.rank() == 0:
            store.set(f"begun/{engine.state.iteration}", "1")
        elif 1 < engine.state.iteration < num_steps:
            store.wait([f"begun/{engine.state.iteration + 1}"], timedelta(seconds=LIMIT_S))
        return 0.5

    trainer = Engine(step)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S, lag=1))
    assert trainer.run([0] * num_steps).iteration == num_steps


@only_on("gloo", "horovod", why="reduced beside what the rank computes; XLA's replicas reduce when they wait for it")
@run_distributed(world_size=2)
def test_with_a_lag_the_reduction_ends_while_the_next_step_computes() -> None:
    ended: list[bool] = []
    with operations() as works:

        def step(_engine: Engine, _batch: object) -> torch.Tensor:
            job.barrier()  # both ranks have begun the step, and so the reduction of the one before
            deadline = time.monotonic() + LIMIT_S
            while works and not works[-1].is_completed() and time.monotonic() < deadline:
                time.sleep(0.001)
            ended.append(bool(works) and works[-1].is_completed())
            return torch.zeros(2)

        trainer = Engine(step)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S, lag=1))
        trainer.run([0] * 5)
    assert ended == [False, True, True, True, True]
    assert len(works) == 5


@run_distributed(world_size=2)
@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"lag": 1}, {"lag": 0}, "TimeLimit#0 has lag=0 and TerminateOnNan#0 has lag=1"),
        ({"every": 2}, {"every": 3}, "TimeLimit#0 has every=3 and TerminateOnNan#0 has every=2"),
    ],
)
def test_handlers_that_want_different_paces_are_named(
    first: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    trainer = idle_engine()
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S, **first))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TimeLimit(3600, timeout_s=LIMIT_S, **second))
    with pytest.raises(ValueError, match=message):
        trainer.run([0] * 3)


@run_distributed(world_size=2)
@pytest.mark.parametrize("pace", [{"lag": 1}, {"every": 3}, {"lag": 1, "every": 2}])
def test_a_pace_given_to_one_handler_or_to_all_is_the_same(pace: dict[str, Any]) -> None:
    ends = []
    for others in ({}, pace):
        limit = TimeLimit(3600, timeout_s=LIMIT_S, **others)
        trainer = _engine_with_nan_at(2)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, limit)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S, **pace))
        ends.append(trainer.run([0] * 9).iteration)
    assert ends == [2 + 1 if pace == {"lag": 1} else 3 if "lag" not in pace else 4] * 2


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
    results = run_ranks(train_until_it_breaks, world_size, str(tmp_path), place, timeout_s=60.0)
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
    trainer = Engine(lambda engine, _batch: _step_of(engine, weights))
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
