"""A training with Lightning's Trainer, and what may happen in it."""

import math
import os
import random
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

from distckpt import stop_reason
from distckpt.integrations.lightning import DistckptCallback
from tests.integrations.best import OwnError, keep_best
from tests.integrations.digests import digests_of


class Model(LightningModule):  # type: ignore[misc]  # checked without Lightning
    """A model with dropout, a scheduler and a validation, to which something happens in a step."""

    def __init__(self, happens: tuple[str, int] | None, scheduler: str, *, is_manual: bool) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.3))
        self.head = torch.nn.Linear(4, 1)
        self.happens, self.scheduler = happens, scheduler
        self.automatic_optimization = not is_manual
        self.seen: list[float] = []

    def training_step(self, batch: Any, _batch_idx: int) -> Any:
        """Return the loss, with noise from all generators."""
        noise = random.random() + float(np.random.rand())  # noqa: NPY002 - the global generators are tested
        loss = self.head(self.layers(batch[0])).square().mean() * (1.0 + noise)
        self.seen.append(float(batch[0].sum()))
        what, step = self.happens or ("", -1)
        if self.global_step + 1 == step:
            if what == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            if what == "error":
                raise OwnError("own")
            loss = loss * (math.nan if what == "nan" else 1.0)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch: Any, _batch_idx: int) -> None:
        """Log a loss."""
        self.log("val_loss", self.head(self.layers(batch[0])).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Return Adam and a scheduler."""
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        if self.scheduler == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}
        step = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": step, "interval": self.scheduler}}


class Counter(Callback):  # type: ignore[misc]  # checked without Lightning
    """A callback with a state."""

    def __init__(self) -> None:
        self.num = 0

    def on_train_epoch_end(self, *_: Any) -> None:
        """Count."""
        self.num += 1

    def state_dict(self) -> dict[str, int]:
        """Return the count."""
        return {"num": self.num}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Set the count."""
        self.num = state["num"]


def train(
    folder: Path,
    rank: int,
    tell_ready: Callable[[], object],
    *,
    happens: tuple[int, str, int] | None = None,
    save_every: int | None = 2,
    scheduler: str = "step",
    is_manual: bool = False,
    num_workers: int = 0,
    loader_seed: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train, or go on; return what the run left.

    Args:
        folder: for the checkpoints.
        rank: this rank.
        tell_ready: called when the first step begins.
        happens: rank, what and step; of "end" the epoch.
        save_every: as DistckptCallback's.
        scheduler: "step", "epoch" or "plateau".
        is_manual: whether the module steps its optimizer itself.
        num_workers: the loader's.
        loader_seed: of the loader's own generator; None if it has none.
        settings: for the Trainer.
    """
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    is_due = happens is not None and happens[0] == rank
    module = Model(happens[1:] if happens is not None and is_due else None, scheduler, is_manual=is_manual)
    data = TensorDataset(torch.arange(72.0).reshape(24, 3) / 72)
    generator = None if loader_seed is None else torch.Generator().manual_seed(loader_seed)
    callback, counter = DistckptCallback(folder / "checkpoints", save_every), Counter()
    callback.loop.add_event_handler(Events.EPOCH_STARTED, tell_ready)
    keep_best(callback.loop, {"model": module}, folder, "val_loss", happens if is_due else None)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "devices": world_size,
            "strategy": "ddp" if world_size > 1 else "auto",
            "callbacks": [callback, counter],
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": False,
            "default_root_dir": folder,
            "max_epochs": 3,
            **settings,
        }
    )
    error = None
    try:
        trainer.fit(
            module,
            DataLoader(data, 2, shuffle=True, num_workers=num_workers, generator=generator),
            DataLoader(data, 8),
        )
    except Exception as caught:  # noqa: BLE001 - reported
        error = caught
    optimizers = [one.state_dict() for one in trainer.optimizers]
    schedulers = [one.scheduler.state_dict() for one in trainer.lr_scheduler_configs]
    return {
        **digests_of([module.state_dict(), optimizers, schedulers, [] if generator is None else generator.get_state()]),
        "steps": trainer.global_step,
        "trainer_epoch": trainer.current_epoch,
        "counter": counter.num,
        "iteration": callback.loop.state.iteration,
        "epoch": callback.loop.state.epoch,
        "reason": stop_reason(callback.loop),
        "error": None if error is None else f"{type(error).__name__}: {error}",
        "best": sorted(path.name for path in (folder / "best").glob("*.pt")),
        "files": sorted(path.name for path in (folder / "checkpoints").glob("*.pt")),
        "is_signal_default": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    }
