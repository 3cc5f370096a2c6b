"""Small engines, objects and savers that the unit tests play with."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

from distckpt import BaseSaveHandler, Checkpoint


def idle_engine() -> Engine:
    """Return an engine whose iterations do nothing."""
    return Engine(lambda _engine, _batch: None)


def linear(seed: int, in_features: int = 2) -> nn.Linear:
    """Return a layer whose weights depend on `seed` alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(in_features, 2)


class InMemory(BaseSaveHandler):
    """A save handler that keeps what it is given, and the order of its calls."""

    def __init__(self) -> None:
        self.files: dict[str, Any] = {}
        self.calls: list[str] = []
        self.metadata: Mapping[str, Any] | None = None

    def __call__(self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Keep a copy of `checkpoint`."""
        self.calls.append(f"save {filename}")
        self.files[filename] = copy.deepcopy(checkpoint)
        self.metadata = metadata

    def remove(self, filename: str) -> None:
        """Forget `filename`."""
        self.calls.append(f"remove {filename}")
        del self.files[filename]


class Notebook:
    """An object with a state of its own, which is whatever it was told."""

    def __init__(self, state: Any = None) -> None:
        self.state = {} if state is None else state

    def state_dict(self) -> Any:
        """Return the state itself."""
        return self.state

    def load_state_dict(self, state: Any) -> None:
        """Take it over."""
        self.state = state


class Refuses:
    """An object that takes no state."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing worth keeping."""
        return {}

    def load_state_dict(self, _state: Any) -> None:
        """Refuse."""
        msg = "it refuses"
        raise RuntimeError(msg)


def run_epochs(handler: Checkpoint, num_epochs: int) -> Engine:
    """Call `handler` at the end of each of `num_epochs` epochs of one iteration."""
    engine = idle_engine()
    engine.add_event_handler(Events.EPOCH_COMPLETED, handler)
    engine.run([0], max_epochs=num_epochs)
    return engine


def snapshot(objects: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the states of `objects`."""
    return {name: copy.deepcopy(obj.state_dict()) for name, obj in objects.items()}
