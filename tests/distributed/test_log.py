"""What happened on all ranks is logged once in a job: by the coordinator, and by the ranks that caused it."""

import logging
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Engine, Events

from distckpt import Checkpoint, DiskSaver, EarlyStopping, Preemption, TerminateOnNan, TimeLimit, resume
from tests.distributed.programs import fire, gather, idle_engine, logged, model_of
from tests.support import job, run_distributed
from tests.support.selection import only_on

WORLD_SIZE = 3


def heard(run: Callable[[], object], level: int = logging.WARNING) -> list[list[str]]:
    """Collective. Return what each rank logs while it runs something."""
    with logged("distckpt", level) as messages:
        run()
    every: list[list[str]] = gather([one for one in messages if "processing group" not in one])
    return every


@pytest.mark.parametrize(("culprit", "counts"), [(0, [1, 0, 0]), (1, [1, 1, 0]), (2, [1, 0, 1])])
@run_distributed(world_size=WORLD_SIZE)
def test_a_nan_is_logged_by_the_coordinator_and_by_the_rank_that_has_it(culprit: int, counts: list[int]) -> None:
    trainer = Engine(lambda _engine, batch: float("nan") if job.rank() == culprit and batch else 0.0)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    told = heard(lambda: trainer.run([0, 1]))
    assert [len(one) for one in told] == counts
    assert all(f"Stop training (rank {culprit}, iteration 2: output is nan" in one for rank in told for one in rank)


@pytest.mark.parametrize("lag", [0, 1])
@run_distributed(world_size=2)
def test_a_stop_is_logged_once_though_its_reason_lasts(lag: int) -> None:
    for handler in (TerminateOnNan(lag=lag), TimeLimit(3600, lag=lag)):
        trainer = Engine(lambda _engine, _batch: float("nan"))
        trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
        if isinstance(handler, TimeLimit):
            handler.start_time -= 4000.0
        told = heard(partial(trainer.run, [0] * 4))
        assert [len(one) for one in told] == [1, 1]


@run_distributed(world_size=2)
def test_an_early_stop_is_logged_once_though_more_evaluations_follow() -> None:
    trainer, evaluator = idle_engine(), idle_engine()
    stopper = EarlyStopping(1, lambda _: 0.5, trainer)
    evaluator.add_event_handler(Events.COMPLETED, stopper)
    trainer.add_event_handler(Events.ITERATION_COMPLETED | Events.COMPLETED, lambda _: evaluator.run([0]))
    told = heard(lambda: trainer.run([0] * 4))
    assert [len(one) for one in told] == [1, 0]
    assert stopper.counter > 1
    again = heard(lambda: trainer.run([0] * 8, max_epochs=1))
    assert [len(one) for one in again] == [1, 0], "another run is stopped anew"


@run_distributed(world_size=WORLD_SIZE)
def test_an_early_stop_is_logged_by_the_coordinator() -> None:
    trainer = idle_engine()
    told = heard(lambda: fire(EarlyStopping(2, lambda _: 0.5, trainer), times=5, engine=trainer))
    assert told == [
        ["EarlyStopping: Stop training (iteration 3: 2 times no improvement; best score 0.5, last score 0.5)"],
        [],
        [],
    ]


@run_distributed(world_size=WORLD_SIZE)
def test_a_time_limit_is_logged_by_the_coordinator_and_by_the_rank_whose_time_is_over() -> None:
    trainer, limit = idle_engine(), TimeLimit(3600)
    if job.rank() == 2:
        limit.start_time -= 4000.0
    trainer.add_event_handler(Events.ITERATION_COMPLETED, limit)
    told = heard(lambda: trainer.run([0] * 3))
    assert [len(one) for one in told] == [1, 0, 1]
    assert told[0] == told[2]
    assert "Stop training (iteration 1; " in told[0][0]
    assert "passed on rank 2)" in told[0][0]


@only_on("gloo", "horovod", why="a replica of XLA's is a thread, and gets no signals")
@run_distributed(world_size=WORLD_SIZE)
def test_a_preemption_and_the_resume_after_it_are_logged_once(tmp_path: Path) -> None:
    def program(*, is_told: bool) -> None:
        trainer = idle_engine()
        objects = {"model": model_of(1.0), "trainer": trainer}
        latest = Checkpoint(objects, DiskSaver(tmp_path, require_empty=False))
        preemption = Preemption(trainer, latest)
        if is_told and job.rank() == 1:
            trainer.add_event_handler(Events.ITERATION_STARTED(once=2), lambda _: os.kill(os.getpid(), signal.SIGUSR1))
        resume(objects, latest, engine=trainer)
        trainer.run([0] * 4, max_epochs=1)
        preemption.close()

    told = heard(lambda: program(is_told=True))
    assert told == [
        [
            f"resume: nothing to resume from in {tmp_path}: starting afresh",
            "Preemption: received a signal (rank 1: SIGUSR1); the run ends at iteration 2",
        ],
        ["Preemption: received a signal (rank 1: SIGUSR1); the run ends at iteration 2"],
        [],
    ]
    coordinator, *others = heard(lambda: program(is_told=False))
    assert others == [[], []]
    assert [one.split(": loaded")[0] for one in coordinator] == [
        f"resume: continuing from {tmp_path / 'checkpoint_2.pt'} of iteration 2, epoch 0",
        "resume: skipped 2 batches of epoch 1 that were trained before",
    ]


@run_distributed(world_size=2)
def test_a_candidate_that_is_passed_over_is_logged_once(tmp_path: Path) -> None:
    if job.rank() == 0:
        (tmp_path / "a.pt").write_bytes(b"no checkpoint")
        DiskSaver(tmp_path, require_empty=False)({"model": model_of(1.0).state_dict()}, "b.pt")
    job.barrier()
    coordinator, other = heard(lambda: resume({"model": model_of(0.0)}, tmp_path))
    assert other == []
    assert [one.split(":")[1].split()[0] for one in coordinator] == [str(tmp_path / "a.pt"), "continuing"]


@pytest.mark.parametrize("options", [{}, {"background": True}, {"share_write": "node"}], ids=str)
@run_distributed(world_size=2)
def test_a_save_is_one_line_of_the_saving_rank(tmp_path: Path, options: dict[str, Any]) -> None:
    handler = Checkpoint({"model": model_of(1.0)}, DiskSaver(tmp_path, save_on_rank=1, **options))
    other, saving = heard(lambda: fire(handler, times=2), logging.INFO)
    assert other == []
    assert [one.split(": ")[1] for one in saving] == [f"saved {tmp_path / f'model_{step}.pt'}" for step in (1, 2)]
    assert f" {(tmp_path / 'model_2.pt').stat().st_size} bytes, stall " in saving[1]
    assert saving[1].endswith("; evicted model_1.pt (step 1): n_saved=1")


@run_distributed(world_size=2)
def test_a_step_voted_nan_is_not_saved_and_the_saving_rank_logs_it(tmp_path: Path) -> None:
    trainer = Engine(lambda _engine, batch: float("nan") if job.rank() == 0 and batch else 0.0)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, Checkpoint({"model": model_of(1.0)}, DiskSaver(tmp_path, save_on_rank=1))
    )
    told = heard(lambda: trainer.run([0, 1]))
    unsaved = f"Checkpoint: iteration 2 is not saved: it was voted NaN. The last one is {tmp_path / 'model_1.pt'}."
    assert [[one for one in rank if one.startswith("Checkpoint")] for rank in told] == [[], [unsaved]]


@run_distributed(world_size=2)
def test_a_score_that_is_nan_is_logged_on_events_of_each_iteration_too(tmp_path: Path) -> None:
    trainer = idle_engine()
    scores = iter([0.5, float("nan"), 0.4, float("nan")])
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path, score_function=lambda _: next(scores))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    told = heard(lambda: trainer.run([0] * 4))
    unsaved = f"is not saved: the score is NaN. The last one is {tmp_path / 'model_0.5000.pt'}."
    assert told == [[f"Checkpoint: iteration {step} {unsaved}" for step in (2, 4)], []]


@pytest.mark.parametrize("each", ["iteration", "epoch"])
@run_distributed(world_size=2)
def test_a_step_that_is_older_than_what_is_kept_is_logged(tmp_path: Path, each: str) -> None:
    trainer, steps = idle_engine(), iter([7, 3])
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path, global_step_transform=lambda *_: next(steps))
    event = Events.ITERATION_COMPLETED(every=2) if each == "iteration" else Events.EPOCH_COMPLETED
    trainer.add_event_handler(event, handler)
    told = heard(lambda: trainer.run([0] * 2, max_epochs=2))
    refused = "its step is not above that of model_7.pt, 7, the lowest of those kept"
    last = f"The last one is {tmp_path / 'model_7.pt'}."
    assert told == [[f"Checkpoint: iteration 4 is not saved: {refused}. {last}"], []]
