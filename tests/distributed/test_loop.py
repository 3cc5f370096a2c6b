"""A Loop on several ranks: its stops, saves, errors and resumes are those of an Engine."""

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events

from distckpt import (
    Checkpoint,
    DiskSaver,
    EarlyStopping,
    Loop,
    Preemption,
    RankLost,
    RemoteRankError,
    ResumableSampler,
    RngState,
    TerminateOnNan,
    resume,
    stop_reason,
)
from tests.distributed.programs import gather, idle_engine, raised, training_step
from tests.support import fresh_ranks, job, run_distributed
from tests.support.selection import process_ranks_only

LIMIT_S = 20.0


def drive(loop: Loop, step: Callable[[int, Any], Any]) -> None:
    """Run a Loop; each step reduces over all ranks, so that ranks that stop apart would hang."""
    with loop:
        for _ in loop.epochs():
            for batch in loop.batches():
                training_step()
                loop.output = step(loop.state.iteration, batch)


@pytest.mark.parametrize("pace", [{}, {"lag": 1}, {"every": 2}], ids=str)
@run_distributed(world_size=2)
def test_a_nan_on_one_rank_ends_the_for_statements_of_all(pace: dict[str, Any]) -> None:
    loop = Loop(range(4), max_epochs=3)
    loop.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(**pace))
    drive(loop, lambda iteration, _: math.nan if iteration == 5 and job.rank() == 1 else 1.0)
    expected = 6 if pace else 5
    assert gather((loop.state.iteration, stop_reason(loop))) == [(expected, "nan")] * 2


@run_distributed(world_size=2)
def test_an_evaluation_in_between_stops_all_early() -> None:
    loop, evaluator = Loop(range(2), max_epochs=8), idle_engine()
    stopper = EarlyStopping(2, lambda _: 1.0 / loop.state.epoch, loop)
    evaluator.add_event_handler(Events.COMPLETED, stopper)
    with loop:
        for _ in loop.epochs():
            for _ in loop.batches():
                training_step()
            evaluator.run([0])
    assert gather((loop.state.epoch, stop_reason(loop))) == [(3, "early_stop")] * 2


@process_ranks_only
@run_distributed(world_size=2)
def test_a_signal_on_one_rank_saves_and_stops_all(tmp_path: Path) -> None:
    loop = Loop(range(6), max_epochs=2)
    objects = {"loop": loop, "rng": RngState(loop)}
    checkpoint = Checkpoint(objects, DiskSaver(tmp_path, require_empty=False), n_saved=None)
    preemption = Preemption(loop, checkpoint)

    def step(iteration: int, _batch: int) -> None:
        if iteration == 4 and job.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    drive(loop, step)
    preemption.close()
    assert gather((loop.state.iteration, stop_reason(loop))) == [(4, "preempted")] * 2
    again = Loop(range(6), max_epochs=2)
    resume({"loop": again, "rng": RngState(again)}, tmp_path, engine=again)
    seen: list[int] = []
    drive(again, lambda _, batch: seen.append(batch))
    assert gather(seen) == [[4, 5, 0, 1, 2, 3, 4, 5]] * 2


class OwnError(Exception):
    """What one rank raises."""


@pytest.mark.parametrize("where", ["batch", "epoch", "run"])
@run_distributed(world_size=2)
def test_an_error_in_the_program_reaches_the_other_ranks(where: str) -> None:
    loop = Loop(range(3), max_epochs=3)
    loop.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S))

    def fail(at: str) -> None:
        if at == where and job.rank() == 1 and loop.state.iteration in (2, 3):
            raise OwnError(at)

    def train() -> None:
        with loop:
            for _ in loop.epochs():
                for _ in loop.batches():
                    fail("batch")
                fail("epoch")
                if where == "run":
                    break
            fail("run")

    error = raised(train)
    if job.rank() == 1:
        assert isinstance(error, OwnError)
        assert error.args == (where,)
    elif where == "run":  # the run of this rank had ended
        assert error is None
    else:
        assert isinstance(error, RemoteRankError)
        assert "OwnError" in str(error)
    job.store_barrier()


def train_until_one_is_killed() -> str:
    """Train on ranks of which one kills itself; return the kind of error of the others."""
    loop = Loop(range(1000))
    loop.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S))

    def step(iteration: int, _batch: int) -> float:
        if iteration == 3 and job.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return 1.0

    return type(raised(lambda: drive(loop, step))).__name__


@process_ranks_only
def test_a_rank_that_is_killed_is_named_to_the_others() -> None:
    with fresh_ranks(train_until_one_is_killed, 2) as ranks:
        ends = ranks.finish(may_fail=[1])
    assert ends[0].value == RankLost.__name__


class Weights(torch.nn.Module):
    """A model whose numbers depend on the order of all samples of all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.value: torch.Tensor
        self.register_buffer("value", torch.zeros((), dtype=torch.float64))

    def train_on(self, samples: torch.Tensor) -> None:
        total = (samples.double() * torch.rand(())).sum()
        self.value = self.value * 1.01 + job.all_reduce(total)


def trained(folder: Path | None, *, on_loop: bool, die_at: int = 0) -> float:
    """Train for three epochs, or until an error at an iteration; resume what is in the folder."""
    torch.manual_seed(5)
    data = torch.arange(24)
    loader = torch.utils.data.DataLoader(data, batch_size=2, sampler=ResumableSampler(data, shuffle=True))  # type: ignore[arg-type, var-annotated]
    model = Weights()

    def step(engine: Engine, batch: torch.Tensor) -> None:
        if engine.state.iteration == die_at:
            raise OwnError
        model.train_on(batch)

    trainer = Loop(loader, max_epochs=3) if on_loop else Engine(step)
    objects = {"model": model, "trainer": trainer, "rng": RngState(trainer)}
    if folder is not None:
        checkpoint = Checkpoint(objects, DiskSaver(folder, require_empty=False, background=True))
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=4), checkpoint)
        resume(objects, checkpoint)
    try:
        if isinstance(trainer, Loop):
            drive(trainer, lambda _, batch: step(trainer, batch))
        else:
            trainer.run(loader, max_epochs=3)
    except OwnError:
        return math.nan
    return float(model.value)


@process_ranks_only  # replicas of XLA's are threads, which draw from one generator
@run_distributed(world_size=2)
def test_a_loop_that_failed_on_all_ranks_continues_bit_for_bit(tmp_path: Path) -> None:
    alone = trained(None, on_loop=False)
    assert trained(None, on_loop=True) == alone
    for die_at in (3, 9, 15):
        folder = tmp_path / str(die_at)
        assert math.isnan(trained(folder, on_loop=True, die_at=die_at))
        job.barrier()
        assert trained(folder, on_loop=True) == alone


@pytest.mark.parametrize("pace", [{}, {"lag": 1}, {"every": 2}], ids=str)
@run_distributed(world_size=2)
def test_an_evaluation_in_the_loop_saves_no_state_that_one_rank_found_nan(pace: dict[str, Any], tmp_path: Path) -> None:
    model, evaluator, loop = torch.nn.Linear(1, 1), idle_engine(), Loop(range(4), max_epochs=3)
    best = Checkpoint(
        {"model": model},
        DiskSaver(tmp_path, require_empty=False),
        n_saved=None,
        score_function=lambda _: loop.state.iteration,
    )
    evaluator.add_event_handler(Events.COMPLETED, best)
    loop.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(**pace))
    with loop:
        for _ in loop.epochs():
            for _ in loop.batches():
                training_step()
                loop.output = math.nan if loop.state.iteration == 6 and job.rank() == 1 else 1.0
            evaluator.run([0])
    assert gather(stop_reason(loop)) == ["nan"] * 2
    assert len(list(tmp_path.glob("*.pt"))) == 1, "the one of the first epoch"


@pytest.mark.parametrize("is_caught", [True, False])
@run_distributed(world_size=2)
def test_an_error_in_an_evaluation_reaches_the_other_ranks_unless_it_is_caught(*, is_caught: bool) -> None:
    loop = Loop(range(3), max_epochs=2)
    loop.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S))

    def fail(_engine: Engine, batch: int) -> None:
        if batch == 1 and (is_caught or job.rank() == 1):
            raise OwnError

    evaluator = Engine(fail)
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S))

    def train() -> None:
        with loop:
            for _ in loop.epochs():
                for _ in loop.batches():
                    training_step()
                try:
                    evaluator.run([0, 1])
                except OwnError:
                    if not is_caught:
                        raise

    error = raised(train)
    if is_caught:
        assert error is None
        assert loop.state.iteration == 6
    else:
        assert isinstance(error, OwnError if job.rank() == 1 else RemoteRankError)
