"""One vote per step: ranks that drifted apart, and votes that are late or rare."""

import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events

from distckpt import Checkpoint, DesyncError, TerminateOnNan, TimeLimit, stop_reason
from tests.distributed.programs import gather, idle_engine, raised
from tests.distributed.voters import (
    LIMIT_S,
    SOON_S,
    VOTERS,
    WORLDS,
    End,
    Weights,
    attached,
    engine_with_nan_at,
    operations,
    rank_is_last,
    stored,
    voting_trainer,
)
from tests.support import job, run_distributed, run_ranks
from tests.support.selection import only_on, process_ranks_only

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
        trainer, known = voting_trainer(weights, kind, at)
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
        trainer = engine_with_nan_at(2)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, limit)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S, **pace))
        ends.append(trainer.run([0] * 9).iteration)
    assert ends == [2 + 1 if pace == {"lag": 1} else 3 if "lag" not in pace else 4] * 2
