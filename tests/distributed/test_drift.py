"""Ranks that drifted apart are told so at once, instead of pairing collectives that do not belong together."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Events

from distckpt import Checkpoint, DesyncError, EarlyStopping, TerminateOnNan, TimeLimit
from tests.distributed.programs import fire, gather, idle_engine, model_of, raised
from tests.support import job, run_distributed

SOON_S = 10.0


def drifted(call: Callable[[], object], *places: str) -> str:
    """Return the message of the error that `call` raises soon and alike on every rank, naming each one's place."""
    begin = time.monotonic()
    error = raised(call)
    assert time.monotonic() - begin < SOON_S
    assert isinstance(error, DesyncError), error
    message = str(error)
    assert gather(message) == [message] * job.world_size()
    for rank, place in enumerate(places):
        assert f"rank {rank} is at: {place}" in message
    return message


@run_distributed(world_size=2)
def test_one_handler_on_different_events(tmp_path: Path) -> None:
    handler, engine = Checkpoint({"model": model_of(1.0)}, tmp_path), idle_engine()
    event = [Events.EPOCH_COMPLETED, Events.EPOCH_STARTED][job.rank()]
    engine.add_event_handler(event, handler)
    message = drifted(lambda: engine.run([0]), "Checkpoint#0, on EPOCH_COMPLETED", "Checkpoint#0, on EPOCH_STARTED")
    assert "Handlers have to be built and attached on all ranks, in the same order" in message
    assert list(tmp_path.iterdir()) == []


@run_distributed(world_size=2)
def test_one_handler_at_different_iterations() -> None:
    handler, engine = TerminateOnNan(), idle_engine()
    first = 1 + job.rank()
    engine.add_event_handler(Events.ITERATION_COMPLETED(event_filter=lambda _, number: number >= first), handler)
    drifted(lambda: engine.run([0] * 4), "TerminateOnNan#0, on ITERATION_COMPLETED", "TerminateOnNan#0, on ITERATION")


@run_distributed(world_size=3)
def test_one_of_three_ranks_missed_an_iteration() -> None:
    handler, engine = TimeLimit(100), idle_engine()
    missed = 3 if job.rank() == 2 else 0
    engine.add_event_handler(Events.ITERATION_COMPLETED(event_filter=lambda _, number: number != missed), handler)
    message = drifted(lambda: engine.run([0] * 6), "TimeLimit#0", "TimeLimit#0", "TimeLimit#0")
    assert "step 3" in message
    assert "step 4" in message


@run_distributed(world_size=2)
def test_one_rank_missed_a_whole_epoch(tmp_path: Path) -> None:
    handler, engine = Checkpoint({"model": model_of(1.0)}, tmp_path), idle_engine()
    nan = TerminateOnNan()
    missed = 2 if job.rank() == 1 else 0
    engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=lambda _, number: number != missed), handler)
    engine.add_event_handler(Events.EPOCH_COMPLETED, nan)
    drifted(
        lambda: engine.run([0], max_epochs=4),
        "Checkpoint#0, TerminateOnNan#0, on EPOCH_COMPLETED",
        "TerminateOnNan#0, on EPOCH_COMPLETED",
    )
    job.barrier()
    assert [path.name for path in tmp_path.iterdir()] == ["model_1.pt"], "the older checkpoint stands"


@run_distributed(world_size=2)
def test_handlers_that_change_their_order_after_they_have_met(tmp_path: Path) -> None:
    engine = idle_engine()
    handlers: list[Any] = [Checkpoint({"model": model_of(1.0)}, tmp_path), EarlyStopping(9, lambda _: 0.0, engine)]
    for handler in handlers:
        handler(engine)
    for handler in handlers[:: -1 if job.rank() == 1 else 1]:
        engine.add_event_handler(Events.EPOCH_COMPLETED, handler)
    drifted(lambda: engine.run([0]), "Checkpoint#0, on EPOCH_COMPLETED", "EarlyStopping#0, on EPOCH_COMPLETED")


@run_distributed(world_size=2)
def test_handlers_attached_in_different_orders(tmp_path: Path) -> None:
    engine = idle_engine()
    handlers: list[Any] = [Checkpoint({"model": model_of(1.0)}, tmp_path), EarlyStopping(9, lambda _: 0.0, engine)]
    for handler in handlers[:: -1 if job.rank() == 1 else 1]:
        engine.add_event_handler(Events.EPOCH_COMPLETED, handler)
    begin = time.monotonic()
    error = raised(lambda: engine.run([0]))
    assert time.monotonic() - begin < SOON_S, "neither can ever come to the other: there is nothing to wait for"
    assert isinstance(error, DesyncError), error
    assert "Checkpoint#0" in str(error)
    assert "EarlyStopping#0" in str(error)


@run_distributed(world_size=2)
def test_two_checkpoints_attached_in_different_orders_are_not_taken_for_each_other(tmp_path: Path) -> None:
    best = Checkpoint({"model": model_of(1.0)}, tmp_path / "best", "best", score_function=lambda _: 0.5)
    latest = Checkpoint({"model": model_of(1.0)}, tmp_path / "latest", "latest")
    engine = idle_engine()
    for handler in [best, latest][:: -1 if job.rank() == 1 else 1]:
        engine.add_event_handler(Events.EPOCH_COMPLETED, handler)
    error = raised(lambda: engine.run([0]))
    if error is None:  # or they may find their likes in spite of it
        assert gather(best.last_checkpoint) == [tmp_path / "best" / "best_model_0.5000.pt"] * 2
        assert gather(latest.last_checkpoint) == [tmp_path / "latest" / "latest_model_1.pt"] * 2
    else:
        assert isinstance(error, DesyncError)


@run_distributed(world_size=2)
def test_a_prefix_that_each_rank_made_by_its_own_clock_is_no_drift(tmp_path: Path) -> None:
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path, f"run_of_19h45m{job.rank():02}")
    fire(handler)
    assert gather(handler.last_checkpoint) == [tmp_path / "run_of_19h45m00_model_1.pt"] * 2


@run_distributed(world_size=2)
def test_ranks_may_end_an_evaluation_after_different_numbers_of_batches(tmp_path: Path) -> None:
    evaluator = idle_engine()
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path, score_function=lambda _: 0.5)
    evaluator.add_event_handler(Events.COMPLETED, handler)
    evaluator.run([0] * (3 + job.rank()))
    assert gather(handler.last_checkpoint) == [tmp_path / "model_0.5000.pt"] * 2


@run_distributed(world_size=2)
def test_an_error_of_one_rank_is_not_lost_when_it_drifted_too(tmp_path: Path) -> None:
    handler, engine = Checkpoint({"model": model_of(1.0)}, tmp_path), idle_engine()
    mine = ValueError("my own")

    def score(_: object) -> float:
        if job.rank() == 1:
            raise mine
        return 0.5

    handler.score_function = score
    engine.add_event_handler([Events.EPOCH_COMPLETED, Events.EPOCH_STARTED][job.rank()], handler)
    error = raised(lambda: engine.run([0]))
    assert isinstance(error, DesyncError)
    assert error.__cause__ is (mine if job.rank() == 1 else None)


@run_distributed(world_size=2)
def test_ranks_may_go_on_after_they_were_told(tmp_path: Path) -> None:
    handler, engine = Checkpoint({"model": model_of(1.0)}, tmp_path), idle_engine()
    engine.add_event_handler([Events.EPOCH_COMPLETED, Events.EPOCH_STARTED][job.rank()], handler)
    with pytest.raises(DesyncError):
        engine.run([0])
    fire(handler)
    assert gather(handler.last_checkpoint) == [tmp_path / "model_1.pt"] * 2
