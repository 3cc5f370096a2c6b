"""Parts of the tests of preemption: signals, trainers, and callables that note when they are called."""

import signal
from collections.abc import Callable, Mapping
from typing import Any

from ignite.engine import Engine

from distckpt import (
    Checkpoint,
    global_step_from_engine,
)
from tests.unit.toys import InMemory

TERM, USR1, USR2, URG = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGURG
LIMIT_S = 60.0


def send(number: int = TERM) -> None:
    """Send this thread a signal, which is handled at once."""
    signal.raise_signal(number)


def trainer_that(actions: Mapping[int, Callable[[], object]] | None = None) -> Engine:
    """Return an engine that does something in some of its iterations."""

    def step(engine: Engine, _batch: object) -> object:
        action = (actions or {}).get(engine.state.iteration)
        return None if action is None else action()

    return Engine(step)


class Log:
    """A callable to save with, that notes when it was called."""

    def __init__(self, action: Callable[[], object] = lambda: None) -> None:
        self.steps: list[int] = []
        self.events: list[Any] = []
        self._action = action

    def __call__(self, engine: Engine) -> None:
        """Note the iteration and the event."""
        self.steps.append(engine.state.iteration)
        self.events.append(engine.last_event_name)
        self._action()


class OneByOne(InMemory):
    """A save handler that notes the history of each save, whatever it was called on."""

    def saves(self) -> list[str]:
        """Return the names that were saved, in order."""
        return [call.removeprefix("save ") for call in self.calls if call.startswith("save")]


def latest(trainer: Engine, handler: Any, **options: Any) -> Checkpoint:
    """Return a Checkpoint that counts in the trainer's step on its event, and saves that trainer's state."""
    step = global_step_from_engine(trainer)
    return Checkpoint({"trainer": trainer}, handler, "latest", global_step_transform=step, **options)
