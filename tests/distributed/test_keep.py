"""Policies on two ranks: one clock counts, files have one history, and a resumed run decides alike."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ignite.engine import Engine, Events

from distckpt import BestN, Checkpoint, DiskSaver, EveryHours, EveryNSteps, LastN, resume
from distckpt.handlers import save_intent
from tests.distributed.programs import all_equal, gather, idle_engine, model_of, warned
from tests.support import job, run_distributed
from tests.support.selection import process_ranks_only

MINUTES = {0: (0, 25, 50, 70, 95, 130), 1: (59, 61, 62, 63, 64, 65)}
"""The minutes that the clocks of the ranks show after each epoch."""
MIDNIGHT_S = 20_000 * 86_400.0


@process_ranks_only
@pytest.mark.parametrize("save_on_rank", [0, 1])
@run_distributed(world_size=2)
def test_the_coordinators_clock_decides_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_on_rank: int
) -> None:
    kept: dict[int, list[int]] = {0: [1, 4, 6], 1: [1, 2, 6]}
    for end in (2, 4, 6):  # killed and resumed
        trainer = idle_engine()
        objects = {"model": model_of(1.0), "trainer": trainer}
        saver = DiskSaver(tmp_path, require_empty=False, save_on_rank=save_on_rank)
        handler = Checkpoint(
            objects,
            saver,
            global_step_transform=lambda engine, _event: engine.state.epoch,
            keep=[EveryHours(1)],
        )
        seen: list[tuple[Any, str]] = []

        def show_time(engine: Engine) -> None:
            time_s = MIDNIGHT_S + 60.0 * MINUTES[job.rank()][engine.state.epoch - 1] + 0.1 * job.rank()
            monkeypatch.setattr(save_intent, "time", SimpleNamespace(time=lambda: time_s))

        trainer.add_event_handler(Events.EPOCH_STARTED, show_time)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
        trainer.add_event_handler(
            Events.EPOCH_COMPLETED,
            functools.partial(lambda one, seen: seen.append((one.state_dict(), one._history.digest)), handler, seen),
        )
        resume(objects, handler, engine=trainer)
        trainer.run(range(2), max_epochs=end)
        assert all_equal(gather(seen))
    job.barrier()
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [
        f"checkpoint_{epoch}.pt" for epoch in kept[save_on_rank]
    ]


@run_distributed(world_size=2)
def test_ranks_with_other_scores_keep_the_same(tmp_path: Path) -> None:
    trainer, scores = idle_engine(), {0: (5, 1, 3, 2, 0, 1), 1: (0, 1, 9, 2, 1, 1)}  # means 2.5 1 6 2 0.5 1
    handler = Checkpoint(
        {"model": model_of(1.0)},
        DiskSaver(tmp_path, background=True),
        score_function=lambda engine: scores[job.rank()][engine.state.iteration - 1],
        global_step_transform=lambda engine, _event: engine.state.iteration,
        keep=[LastN(2), BestN(2), EveryNSteps(4)],
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    with warned() as messages:
        trainer.run(range(6), max_epochs=1)
    assert "the ranks have different scores" in messages[0]
    assert all_equal(gather((handler.state_dict(), handler._history.digest)))
    job.barrier()
    names = [f"model_{name}.pt" for name in ("1_2.5000", "3_6.0000", "4_2", "5_0.5000", "6_1")]
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == names
