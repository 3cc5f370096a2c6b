"""Records on several ranks: the coordinator's count, and what it finds on its disk holds on all ranks."""

import os
from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Engine, Events

from distckpt import Checkpoint, DiskSaver, resume
from distckpt.handlers.runs import run_of
from distckpt.ptformat.records import read_record
from tests.distributed.programs import all_equal, gather, idle_engine, model_of
from tests.support import job, run_distributed

SCORES = [0.5, 0.90001, 0.90002, 0.7, 0.900015, 0.1]
LENGTH = 3


def run(folder: Path, epochs: int, *, where: str, model_only: bool = False) -> tuple[Any, Any]:
    """Train, with the latest in a directory of all ranks, and the best in one of each rank's own."""
    own = folder / f"rank{job.rank()}"
    own.mkdir(exist_ok=True)
    trainer, evaluator = idle_engine(), idle_engine()
    objects = {"model": model_of(1.0)} | ({} if model_only else {"trainer": trainer})
    latest = Checkpoint(objects, DiskSaver(folder / "latest", require_empty=False))
    best = Checkpoint(
        objects,
        DiskSaver(own, require_empty=False),
        "best",
        lambda _: SCORES[trainer.state.epoch - 1],
        n_saved=2,
        global_step_transform=lambda *_: trainer.state.epoch,
    )
    if where == "evaluator":
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([0]))
        evaluator.add_event_handler(Events.COMPLETED, best)
    else:
        trainer.add_event_handler(Events.EPOCH_COMPLETED, best)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, latest)
    found = resume(objects, latest, engine=None if model_only else trainer)
    trainer.run(range(LENGTH), max_epochs=epochs)
    job.barrier()
    return found, (latest.state_dict()["_saved"], best.state_dict()["_saved"], _run_of(trainer))


def _run_of(trainer: Engine) -> dict[str, Any] | None:
    run = run_of(trainer).run
    return None if run is None else run.as_json()


@pytest.mark.parametrize("where", ["trainer", "evaluator"])
@run_distributed(world_size=2)
def test_what_the_coordinator_finds_on_its_own_disk_holds_on_all_ranks(tmp_path: Path, where: str) -> None:
    ends: Any = ()
    for epochs in (2, 4, 6):
        found, ends = run(tmp_path, epochs, where=where)
        assert all_equal(gather(ends))
        assert all_equal(gather(found and found.name))
    kept = [(0.900015, "best_checkpoint_5_0.9000.pt"), (0.90002, "best_checkpoint_3_0.9000.pt")]
    assert ends[1] == kept
    on_disk = gather(sorted(os.listdir(tmp_path / f"rank{job.rank()}")))
    assert on_disk[0] == sorted(name for _, name in kept)
    assert on_disk[1:] == [[]] * (len(on_disk) - 1)


@run_distributed(world_size=2)
def test_a_run_that_begins_anew_saves_on_all_ranks_alike(tmp_path: Path) -> None:
    ends: Any = ()
    for epochs in (3, 1):
        _, ends = run(tmp_path, epochs, where="trainer", model_only=True)
        assert all_equal(gather(ends))
    assert ends[0] == [(LENGTH, f"model_{LENGTH}.pt")]
    assert os.listdir(tmp_path / "latest") == [f"model_{LENGTH}.pt"]


@run_distributed(world_size=2)
def test_a_record_has_the_data_of_every_rank(tmp_path: Path) -> None:
    trainer = idle_engine()
    saver = Checkpoint({"trainer": trainer}, DiskSaver(tmp_path))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, saver)
    trainer.run([0] * (LENGTH + job.rank()), max_epochs=1, epoch_length=LENGTH)
    record = read_record(tmp_path / f"trainer_{LENGTH}.pt")
    assert record is not None
    assert isinstance(record.data, list)
    assert [one["length"] for one in record.data] == [LENGTH, LENGTH + 1]
