"""A program that calls ``run()`` several times, with rising limits, continues in the call in which it was stopped."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch.utils.data import DataLoader

from distckpt import Checkpoint, DiskSaver, RngState, resume

LENGTH = 4
Row = tuple[int, int, float, float]


class Stop(BaseException):
    """What ends a program."""


class Program:
    """A training of four epochs in several calls of ``run()``, with a scheduler's step and random numbers between."""

    def __init__(self, folder: Path, event: Any, limits: list[dict[str, int]]) -> None:
        self.folder, self.event, self.limits = folder, event, limits
        self.rows: list[Row] = []
        self.fired: list[tuple[Events, int]] = []

    def go(self, stop_at: int | None) -> None:
        """Resume, and train until an iteration that is not completed; None for the end."""
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

        def step(engine: Engine, batch: Any) -> None:
            if engine.state.iteration == stop_at:
                raise Stop
            optimizer.step()
            self.rows.append((engine.state.epoch, batch.item(), optimizer.param_groups[0]["lr"], torch.rand(1).item()))

        trainer = Engine(step)
        to_save = {
            "optimizer": optimizer,
            "scheduler": scheduler,
            "trainer": trainer,
            "rng": RngState(trainer),
        }
        latest = Checkpoint(to_save, DiskSaver(self.folder, require_empty=False), n_saved=1)
        trainer.add_event_handler(self.event, latest)
        for event in (Events.EPOCH_STARTED, Events.EPOCH_COMPLETED):
            trainer.add_event_handler(event, lambda _, event: self.fired.append((event, trainer.state.epoch)), event)
        resume(to_save, latest, engine=trainer)
        loader: DataLoader[int] = DataLoader(range(LENGTH), shuffle=True)  # type: ignore[arg-type]  # a sequence
        for one in self.limits:
            trainer.run(loader, **one)
            torch.rand(3)
            scheduler.step()


EPOCHS = [{"max_epochs": number} for number in (1, 2, 3, 4)]
PHASES = [{"max_epochs": number} for number in (2, 4)]
ITERATIONS = [{"max_iters": number} for number in (4, 8, 16)]


@pytest.mark.parametrize("limits", [EPOCHS, PHASES, ITERATIONS], ids=["epochs", "phases", "iterations"])
@pytest.mark.parametrize("event", [Events.EPOCH_COMPLETED, Events.ITERATION_COMPLETED], ids=["epoch", "iteration"])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_resumed_program_trains_what_the_uninterrupted_one_does(
    event: Any, limits: list[dict[str, int]], tmp_path: Path
) -> None:
    whole = Program(tmp_path / "whole", event, limits)
    whole.go(None)
    assert len(whole.rows) == 4 * LENGTH
    for stop_at in range(2, 4 * LENGTH + 1):
        resumed = Program(tmp_path / str(stop_at), event, limits)
        with contextlib.suppress(Stop):
            resumed.go(stop_at)
        num_saved = stop_at - 1 if event is Events.ITERATION_COMPLETED else (stop_at - 1) // LENGTH * LENGTH
        del resumed.rows[num_saved:]
        resumed.go(None)
        assert resumed.rows == whole.rows, f"stopped in iteration {stop_at}"


def test_an_epoch_that_a_resume_completes_is_completed_once(tmp_path: Path) -> None:
    program = Program(tmp_path, Events.ITERATION_COMPLETED, PHASES)
    with contextlib.suppress(Stop):
        program.go(2 * LENGTH + 1)  # the checkpoint of iteration 8 was saved before EPOCH_COMPLETED
    program.fired.clear()
    program.go(None)
    starts_and_ends = [(event, epoch) for epoch in (3, 4) for event in (Events.EPOCH_STARTED, Events.EPOCH_COMPLETED)]
    assert program.fired == [(Events.EPOCH_COMPLETED, 2), *starts_and_ends]


@pytest.mark.parametrize("resets", [True, False])
def test_a_call_that_does_not_raise_the_limit_starts_a_new_run(tmp_path: Path, caplog: Any, *, resets: bool) -> None:
    def go() -> tuple[Engine, list[int]]:
        trained: list[int] = []
        trainer = Engine(lambda engine, _batch: trained.append(engine.state.iteration))
        latest = Checkpoint({"trainer": trainer}, DiskSaver(tmp_path, require_empty=False))
        trainer.add_event_handler(Events.EPOCH_COMPLETED, latest)
        resume({"trainer": trainer}, latest, engine=trainer)
        with caplog.at_level(logging.INFO, "distckpt"):
            trainer.run([0, 1], max_epochs=2)
        return trainer, trained

    go()
    trainer, trained = go()
    assert trained == []
    assert "A run() with higher limits continues there" in caplog.text
    if resets:
        trainer.state.max_epochs = None
    trainer.run([0, 1], max_epochs=4 if resets else 2)
    assert trained == list(range(1, 9 if resets else 5))
