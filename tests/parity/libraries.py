"""Run a program on ignite's handlers and on distckpt's, and compare the results."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ignite.handlers
import ignite.handlers.checkpoint
import torch
from ignite.engine import Engine
from torch import nn

import distckpt

# Public in ignite, but not re-exported by ignite.handlers.
_OF_CHECKPOINT = ("BaseSaveHandler", "CheckpointEvents")


class Library:
    """The public names that both libraries have, of one of them."""

    def __init__(self, name: str, take: Callable[[str], Any]) -> None:
        self.name = name
        self.BaseSaveHandler = take("BaseSaveHandler")
        self.Checkpoint = take("Checkpoint")
        self.CheckpointEvents = take("CheckpointEvents")
        self.DiskSaver = take("DiskSaver")
        self.EarlyStopping = take("EarlyStopping")
        self.ModelCheckpoint = take("ModelCheckpoint")
        self.TerminateOnNan = take("TerminateOnNan")
        self.TimeLimit = take("TimeLimit")
        self.Timer = take("Timer")
        self.global_step_from_engine = take("global_step_from_engine")


def _of_ignite(name: str) -> Any:
    return getattr(ignite.handlers.checkpoint if name in _OF_CHECKPOINT else ignite.handlers, name)


IGNITE = Library("ignite", _of_ignite)
OURS = Library("distckpt", lambda name: getattr(distckpt, name))


def run_with_both(program: Callable[[Library, Path], Any], folder: Path) -> tuple[Any, Any]:
    """Run `program` on ignite's handlers and on distckpt's, each in its own directory."""
    results = []
    for library in (IGNITE, OURS):
        own = folder / library.name
        own.mkdir()
        torch.manual_seed(0)
        results.append(program(library, own))
    return results[0], results[1]


@dataclass(frozen=True, slots=True)
class Training:
    """A tiny training run, all of whose objects have a state that changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    trainer: Engine

    @classmethod
    def make(cls) -> "Training":
        """Build it from a seed."""
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)

        def update(_engine: Engine, batch: torch.Tensor) -> float:
            optimizer.zero_grad()
            loss = model(batch).square().mean()
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        return cls(model, optimizer, scheduler, Engine(update))

    def objects(self) -> dict[str, Any]:
        """Return all objects, as ``to_save``."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "trainer": self.trainer,
        }

    def run(self, max_epochs: int) -> None:
        """Train for some epochs of two iterations."""
        self.trainer.run([torch.ones(4, 2), torch.arange(8.0).reshape(4, 2)], max_epochs=max_epochs)
