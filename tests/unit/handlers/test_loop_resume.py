"""What a Loop's program does after an epoch's batches happens once, wherever the run is interrupted or stopped."""

import contextlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events

from distckpt import Checkpoint, DiskSaver, Loop, resume
from distckpt.handlers.engine_events import get_running_engines

NUM_EPOCHS, LENGTH, LIMIT = 3, 6, 4
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")


class Stop(BaseException):
    """What ends a program."""


def stop(loop: Loop) -> None:
    """Stop the run. ignite would pass the engine as the argument of ``terminate``."""
    loop.terminate()


class Program:
    """A training with a scheduler that steps after each epoch's batches."""

    def __init__(self, folder: Path, event: Any, *, is_limited: bool) -> None:
        self.folder, self.event, self.is_limited = folder, event, is_limited
        self.trained: list[tuple[int, int, float]] = []
        self.completed: list[int] = []

    def go(self, *, fail_at: int | None = None, stop_at: int | None = None) -> None:
        """Resume, and train until an iteration that fails, or after which the run stops; None for the end."""
        optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        loop = Loop(range(LENGTH), max_epochs=NUM_EPOCHS)
        to_save = {"optimizer": optimizer, "scheduler": scheduler, "loop": loop}
        latest = Checkpoint(to_save, DiskSaver(self.folder, require_empty=False), n_saved=1)
        if stop_at is not None:
            loop.add_event_handler(Events.ITERATION_COMPLETED(once=stop_at), lambda: stop(loop))
        loop.add_event_handler(self.event, latest)
        loop.add_event_handler(Events.EPOCH_COMPLETED, lambda: self.completed.append(loop.state.epoch))
        resume(to_save, latest, engine=loop)
        with loop:
            for epoch in loop.epochs():
                for batch in loop.batches():
                    if loop.state.iteration == fail_at:
                        raise Stop
                    optimizer.step()
                    self.trained.append((epoch, batch, optimizer.param_groups[0]["lr"]))
                    if self.is_limited and loop.state.iteration % LIMIT == 0:
                        break
                scheduler.step()


@pytest.mark.parametrize("is_limited", [True, False])
def test_a_checkpoint_of_the_iteration_that_ends_an_epoch_resumes_after_it(tmp_path: Path, *, is_limited: bool) -> None:
    whole = Program(tmp_path / "whole", Events.ITERATION_COMPLETED, is_limited=is_limited)
    whole.go()
    assert len(whole.trained) == NUM_EPOCHS * (LIMIT if is_limited else LENGTH)
    for fail_at in range(2, len(whole.trained) + 1):
        resumed = Program(tmp_path / str(fail_at), Events.ITERATION_COMPLETED, is_limited=is_limited)
        with contextlib.suppress(Stop):
            resumed.go(fail_at=fail_at)
        resumed.completed = [epoch for epoch in resumed.completed if epoch < resumed.trained[-1][0]]
        resumed.go()
        assert resumed.trained == whole.trained, f"failed in iteration {fail_at}"
        assert resumed.completed == whole.completed


@pytest.mark.parametrize("is_limited", [True, False])
def test_a_checkpoint_of_a_stop_is_without_what_follows_the_batches(tmp_path: Path, *, is_limited: bool) -> None:
    event = Events.EPOCH_COMPLETED | Events.COMPLETED
    whole = Program(tmp_path / "whole", event, is_limited=is_limited)
    whole.go()
    for stop_at in range(1, len(whole.trained) + 1):
        resumed = Program(tmp_path / str(stop_at), event, is_limited=is_limited)
        resumed.go(stop_at=stop_at)
        assert len(resumed.trained) == stop_at
        resumed.go()
        assert resumed.trained == whole.trained, f"stopped after iteration {stop_at}"
        assert resumed.completed == whole.completed


def stopped_loop() -> Loop:
    """Return a Loop that stops after its second iteration."""
    loop = Loop(range(3), max_epochs=2)
    loop.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: stop(loop))
    return loop


def test_what_follows_the_batches_of_a_stopped_run_belongs_to_the_run() -> None:
    loop, names = stopped_loop(), list[str]()
    for event in (Events.EPOCH_COMPLETED, Events.TERMINATE, Events.COMPLETED):
        loop.add_event_handler(event, lambda _, name: names.append(name), event.name)
    with loop:
        for _ in loop.epochs():
            for _ in itertools.islice(loop.batches(), 5):
                pass
            names.append("after the batches")
            assert get_running_engines() == [loop]
            assert loop.should_terminate
    assert names == ["TERMINATE", "COMPLETED", "after the batches"]
    assert get_running_engines() == []


@pytest.mark.parametrize("is_caught", [True, False])
def test_an_exception_after_the_batches_of_a_stopped_run_is_handled(*, is_caught: bool) -> None:
    loop, seen = stopped_loop(), list[BaseException]()
    if is_caught:
        loop.add_event_handler(Events.EXCEPTION_RAISED, seen.append)
    error = Stop()

    def train() -> None:
        with loop:
            for _ in loop.epochs():
                for _ in loop.batches():
                    pass
                raise error

    with contextlib.nullcontext() if is_caught else pytest.raises(Stop):
        train()
    assert seen == ([error] if is_caught else [])
    assert get_running_engines() == []
    assert loop.pause is None
