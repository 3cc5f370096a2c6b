"""On a GPU an overlapped vote leaves the NaN flag on the device, and nothing waits for it."""

from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events

from distckpt import Checkpoint, TerminateOnNan, TimeLimit, stop_reason
from tests.support import job, run_ranks

WORLDS = pytest.mark.parametrize("world_size", [1, 2])  # of ranks that share the device: Gloo lets them
BREAKS_AT = 5


def train_in_silence(folder: str, *, lag: int, breaks: bool) -> tuple[int, str | None, list[int]]:
    """Train on the device; in the iterations after the first three any synchronisation is an error."""
    device = torch.device("cuda")
    weights = torch.nn.Linear(64, 64, device=device)
    is_last = job.rank() == job.world_size() - 1
    poison = torch.full((), torch.nan, device=device)

    def step(engine: Engine, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = weights(batch).square().mean()
        if breaks and is_last and engine.state.iteration == BREAKS_AT:
            loss = loss * poison
        loss.backward()
        return {"loss": loss.detach(), "more": batch}

    trainer = Engine(step)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(lag=lag))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TimeLimit(3600))
    trainer.add_event_handler(Events.ITERATION_STARTED(once=3), lambda: torch.cuda.set_sync_debug_mode("error"))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: torch.cuda.set_sync_debug_mode("default"))
    handler = Checkpoint({"weights": weights}, folder, n_saved=None)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
    data = [torch.randn(32, 64, device=device) for _ in range(4)]
    try:
        trainer.run(data * 2, epoch_length=8, max_epochs=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    saved = [int(path.stem.rpartition("_")[2]) for path in sorted(Path(folder).glob("*.pt"))]
    return trainer.state.iteration, stop_reason(trainer), saved


@WORLDS
def test_a_lagged_vote_waits_for_nothing(tmp_path: Path, world_size: int) -> None:
    results = run_ranks(_in_silence, world_size, str(tmp_path), "sound")
    assert results == [(8, None, [8])] * world_size


@WORLDS
def test_a_nan_on_one_rank_stops_all_one_iteration_later(tmp_path: Path, world_size: int) -> None:
    results = run_ranks(_in_silence, world_size, str(tmp_path), "breaks")
    assert results == [(BREAKS_AT + 1, "nan", [])] * world_size


@WORLDS
def test_an_exact_vote_does_wait_so_that_the_silence_proves_something(tmp_path: Path, world_size: int) -> None:
    results = run_ranks(_with_a_sync, world_size, str(tmp_path))
    assert results == ["called a synchronizing CUDA operation"] * world_size


def _in_silence(folder: str, loss: str) -> tuple[int, str | None, list[int]]:
    return train_in_silence(folder, lag=1, breaks=loss == "breaks")


def _with_a_sync(folder: str) -> str:
    try:
        train_in_silence(folder, lag=0, breaks=False)
    except Exception as error:  # noqa: BLE001 - what it says is looked at
        told = "called a synchronizing CUDA operation"
        return told if told in str(error) else str(error)
    return "silence"
