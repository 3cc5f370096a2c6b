"""A training with Accelerate in a distckpt Loop, as docs/integrations.md shows it, and what may happen in it."""

import math
import os
import random
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from ignite.engine import Events
from torch.utils.data import DataLoader, TensorDataset

from distckpt import Checkpoint, DiskSaver, Loop, Preemption, RngState, TerminateOnNan, resume, stop_reason
from tests.integrations.digests import digests_of

ACCUMULATION = 2


class OwnError(Exception):
    """What one rank raises."""


def react(what: str) -> None:
    """Send this rank a signal, or raise."""
    if what == "signal":
        os.kill(os.getpid(), signal.SIGTERM)
    if what == "error":
        raise OwnError("own")


def train(
    folder: Path,
    rank: int,
    tell_ready: Callable[[], object],
    *,
    happens: tuple[int, str, int] | None = None,
    save_every: int = 2,
) -> dict[str, Any]:
    """Train, or go on; return what the run left.

    Args:
        folder: for the checkpoints.
        rank: this rank.
        tell_ready: called when the first step begins.
        happens: rank, what and iteration.
        save_every: iterations between two saves.
    """
    warnings.simplefilter("ignore")
    set_seed(1)
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=ACCUMULATION,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.3), torch.nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)
    data = TensorDataset(torch.arange(72.0).reshape(24, 3) / 72)
    loader = DataLoader(data, 2, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    loop = Loop(loader, max_epochs=3)
    objects = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loop": loop, "rng": RngState(loop)}
    latest = Checkpoint(objects, DiskSaver(folder / "checkpoints", require_empty=False, background=True), n_saved=2)
    loop.add_event_handler(Events.ITERATION_COMPLETED(every=save_every), latest)
    loop.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    loop.add_event_handler(Events.EPOCH_STARTED, tell_ready)
    preemption = Preemption(loop, latest, every=ACCUMULATION)

    error = None
    try:
        resume(objects, latest, engine=loop)
        loader.set_epoch(loop.state.epoch)
        with loop:
            for _ in loop.epochs():
                for (batch,) in loop.batches():
                    what = (
                        happens[1] if happens is not None and list(happens[::2]) == [rank, loop.state.iteration] else ""
                    )
                    with accelerator.accumulate(model):
                        loss = model(batch).square().mean() * (1.0 + random.random())
                        react(what)
                        accelerator.backward(loss * (math.nan if what == "nan" else 1.0))
                        optimizer.step()
                        scheduler.step()
                        optimizer.zero_grad()
                    loop.output = loss.item() * (math.nan if what == "nan" else 1.0)
    except Exception as caught:  # noqa: BLE001 - reported
        error = caught
    preemption.close()
    return {
        **digests_of([accelerator.unwrap_model(model).state_dict(), optimizer.state_dict(), scheduler.state_dict()]),
        "iteration": loop.state.iteration,
        "reason": stop_reason(loop),
        "error": None if error is None else f"{type(error).__name__}: {error}",
        "files": sorted(path.name for path in (folder / "checkpoints").glob("*.pt")),
    }
