"""Ranks whose score, output or clock differ stop together: `EarlyStopping`, `TerminateOnNan`, `TimeLimit`.

The fault of ignite's handlers: a rank stops alone. The others hang in their next training step, or pair it with
whatever the one that left reduces next.
"""

import math

import pytest
import torch
from ignite.engine import Engine, Events

from tests.distributed.programs import (
    HUNG,
    IGNITE,
    OURS,
    handlers,
    idle_engine,
    logged,
    on_ranks,
    training_step,
    unless_hung,
    warned,
)
from tests.support import job

WORLDS = pytest.mark.parametrize("world_size", [2, 3])
NUM_EPOCHS = 8


def with_early_stopping(library: str, rule: str | None = None) -> int | str:
    """Train; the score of rank 0 never improves, those of the others do up to the fourth epoch."""
    trainer, evaluator = Engine(training_step), idle_engine()

    def score(_engine: Engine) -> float:
        return 0.5 if job.rank() == 0 else float(min(trainer.state.epoch, 4))

    options = {} if rule is None else {"score_rule": rule}
    stopper = handlers(library).EarlyStopping(2, score, trainer, **options)
    evaluator.add_event_handler(Events.COMPLETED, stopper)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda _engine: evaluator.run([0]))
    with warned() as messages:
        epochs = unless_hung(lambda: trainer.run([0, 0], max_epochs=NUM_EPOCHS).epoch)
    if library == OURS:
        assert [message for message in messages if "the ranks have different scores" in message] == messages
        assert len(messages) == 1, "said once"
    return epochs


@WORLDS
def test_ignites_early_stopping_stops_one_rank_and_hangs_the_rest(world_size: int) -> None:
    assert on_ranks(with_early_stopping, IGNITE, world_size) == [3, *[HUNG] * (world_size - 1)]


@WORLDS
@pytest.mark.parametrize(("rule", "epochs"), [(None, 6), ("mean", 6), ("max", 6), ("min", 3), ("coordinator", 3)])
def test_early_stopping_stops_all_ranks_at_the_same_event(world_size: int, rule: str | None, epochs: int) -> None:
    assert on_ranks(with_early_stopping, OURS, world_size, rule) == [epochs] * world_size


def accuracy_after_training(library: str) -> float | str:
    """Train until stopped, then average an accuracy of 0.5 over the ranks."""
    with_early_stopping(library)
    accuracy = torch.tensor([0.5], device=job.device())
    return unless_hung(lambda: job.all_reduce(accuracy).item() / job.world_size())


def test_ignites_early_stopping_pairs_a_reduction_with_a_training_step_in_silence() -> None:
    assert on_ranks(accuracy_after_training, IGNITE, 2)[0] == 0.75, "half of 0.5 + 1.0: an accuracy and a gradient"


@WORLDS
def test_reductions_after_early_stopping_pair_with_each_other(world_size: int) -> None:
    assert on_ranks(accuracy_after_training, OURS, world_size) == [0.5] * world_size


def with_terminate_on_nan(library: str, value: float) -> tuple[int | str, list[str]]:
    """Train; the third output of the last rank is not finite."""
    last = job.rank() == job.world_size() - 1

    def step(engine: Engine, _batch: object) -> float:
        return value if training_step() and last and engine.state.iteration == 3 else 1.0

    trainer, stopper = Engine(step), handlers(library).TerminateOnNan()
    trainer.add_event_handler(Events.ITERATION_COMPLETED, stopper)
    with logged(stopper.logger.name) as messages:
        iterations = unless_hung(lambda: trainer.run([0] * 6).iteration)
    return iterations, messages


@WORLDS
def test_ignites_terminate_on_nan_stops_one_rank_and_hangs_the_rest(world_size: int) -> None:
    iterations = [iteration for iteration, _ in on_ranks(with_terminate_on_nan, IGNITE, world_size, math.nan)]
    assert iterations == [*[HUNG] * (world_size - 1), 3]


@WORLDS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_on_one_rank_stops_all_at_the_same_iteration_and_the_log_names_it(world_size: int, value: float) -> None:
    for iteration, messages in on_ranks(with_terminate_on_nan, OURS, world_size, value):
        assert iteration == 3
        (message,) = messages
        assert message.startswith("TerminateOnNan: Output")
        assert f"rank {world_size - 1}, iteration 3" in message


def with_time_limit(library: str) -> tuple[int | str, list[str]]:
    """Train; the time of the last rank is over in the third iteration."""
    trainer, limit = Engine(training_step), handlers(library).TimeLimit(3600)

    @trainer.on(Events.ITERATION_STARTED(once=3))
    def let_time_pass() -> None:
        if job.rank() == job.world_size() - 1:
            limit.start_time -= 3601

    trainer.add_event_handler(Events.ITERATION_COMPLETED, limit)
    with logged(limit.logger.name) as messages:
        iterations = unless_hung(lambda: trainer.run([0] * 6).iteration)
    return iterations, messages


@WORLDS
def test_ignites_time_limit_stops_one_rank_and_hangs_the_rest(world_size: int) -> None:
    iterations = [iteration for iteration, _ in on_ranks(with_time_limit, IGNITE, world_size)]
    assert iterations == [*[HUNG] * (world_size - 1), 3]


@WORLDS
def test_the_first_clock_that_runs_out_stops_all_ranks_at_the_same_iteration(world_size: int) -> None:
    for iteration, messages in on_ranks(with_time_limit, OURS, world_size):
        assert iteration == 3
        (message,) = messages
        assert message.startswith("Reached the time limit: 3600 sec. Stop training")
        assert f"rank {world_size - 1}" in message


def with_everything(library: str) -> int:
    """Train with all handlers at once and nothing wrong on any rank."""
    lib, trainer = handlers(library), Engine(training_step)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lib.TerminateOnNan())
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lib.TimeLimit(3600))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lib.EarlyStopping(2, lambda _: trainer.state.epoch, trainer))
    epoch: int = trainer.run([0, 0], max_epochs=3).epoch
    return epoch


@WORLDS
def test_equal_ranks_run_to_the_end(world_size: int) -> None:
    assert on_ranks(with_everything, OURS, world_size) == [3] * world_size
