"""The record of a run's events on two ranks: the coordinator alone writes it."""

from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Engine, Events

from distckpt import Checkpoint, DiskSaver, TerminateOnNan, resume
from distckpt.errors import RemoteRankError
from distckpt.policy.naming import EVENTS_NAME
from distckpt.storage.event_file import read_events
from tests.distributed.programs import gather, model_of
from tests.support import job, run_distributed
from tests.support.selection import quick

LENGTH = 3


def train(folder: Path, step: Any, *, epochs: int, save_on_rank: int, **settings: Any) -> None:
    """Train with the latest checkpoint in a directory of all ranks, and the best one in one of each rank's own."""
    trainer = Engine(step)
    objects = {"model": model_of(1.0), "trainer": trainer}
    for name in ("latest", f"rank{job.rank()}"):
        saver = DiskSaver(folder / name, require_empty=False, save_on_rank=save_on_rank, record_events=True, **settings)
        handler = Checkpoint(objects, saver, name[:4])
        trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    resume(objects, folder / "latest", engine=trainer)
    try:
        trainer.run(range(LENGTH), max_epochs=epochs)
    finally:
        job.barrier()


def kinds_in(directory: Path) -> list[str]:
    found = read_events(directory)
    assert found.num_dropped == 0
    return [event["event"] for event in found.events]


@quick(2)
@pytest.mark.parametrize("save_on_rank", [0, 1])
@pytest.mark.parametrize("settings", [{}, {"background": True}, {"share_write": "node"}])
@run_distributed(world_size=2)
def test_the_coordinator_records_each_event_once(tmp_path: Path, save_on_rank: int, settings: dict[str, Any]) -> None:
    train(tmp_path, lambda *_: 0.0, epochs=2, save_on_rank=save_on_rank, **settings)
    train(tmp_path, lambda *_: 0.0, epochs=3, save_on_rank=save_on_rank, **settings)
    train(tmp_path, lambda *_: float("nan"), epochs=4, save_on_rank=save_on_rank, **settings)
    own = [kinds_in(tmp_path / f"rank{rank}") for rank in range(2)]
    assert own[1 - save_on_rank] == [], "the other rank writes nothing, into no directory"
    expected = ["start", "save", "save", "end", "resume", "start", "save", "end", "resume", "start", "stop", "end"]
    assert kinds_in(tmp_path / "latest") == own[save_on_rank] == expected
    found = read_events(tmp_path / "latest").events
    assert [event["world_size"] for event in found if event["event"] == "start"] == [2, 2, 2]
    assert gather((tmp_path / f"rank{job.rank()}" / EVENTS_NAME).exists()) == [
        save_on_rank == 0,
        save_on_rank == 1,
    ]


@run_distributed(world_size=2)
def test_an_error_of_another_rank_is_the_coordinators_too(tmp_path: Path) -> None:
    def step(_: Engine, batch: int) -> float:
        if batch == 1 and job.rank() == 1:
            raise ValueError("a batch of rank 1")
        return 0.0

    with pytest.raises((ValueError, RemoteRankError), match="a batch of rank 1"):
        train(tmp_path, step, epochs=1, save_on_rank=0)
    error = read_events(tmp_path / "latest").events[-1]
    assert error["event"] == "error"
    assert "rank 1" in error["text"]
    assert error["type"] in ("ValueError", "RemoteRankError")
