"""What the crash tests save, and how they tell afterwards whether it is whole.

A state here is one number, the step, many times over: any mixture of two steps, any hole and any truncation
shows. Checking uses torch alone, never distckpt: that is the promise.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.handlers
import torch
from ignite.engine import Engine

import distckpt

__all__ = ["Counted", "name_of", "steps_in", "whole_step", "whole_steps"]

KEY = "counted"


class Counted:
    """An object to save. Every number in its state is `step`.

    Args:
        num_floats: length of the first of its three tensors; the others are short.
    """

    def __init__(self, num_floats: int = 1000) -> None:
        self.step = 0
        self._num_floats = num_floats

    def state_dict(self) -> dict[str, Any]:
        """Return the step and three tensors full of it."""
        lengths = {"values0": self._num_floats, "values1": 1000, "values2": 10}
        values = {key: torch.full((length,), float(self.step)) for key, length in lengths.items()}
        return {"step": self.step, **values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the step."""
        self.step = state["step"]

    def handler(self, save_handler: Any, kind: Any = distckpt.Checkpoint, **kwargs: Any) -> Any:
        """Return a `kind` of Checkpoint that saves this object, keeps one, and names files by its step."""
        return kind({KEY: self}, save_handler, n_saved=1, global_step_transform=lambda *_: self.step, **kwargs)

    def ignite_handler(self, directory: Path) -> Any:
        """Return the same of ignite's."""
        saver = ignite.handlers.DiskSaver(str(directory), require_empty=False)
        return self.handler(saver, kind=ignite.handlers.Checkpoint)


def idle_engine() -> Engine:
    """Return an engine that only serves to be handed to a handler."""
    return Engine(lambda _engine, _batch: None)


def name_of(step: int) -> str:
    """Return the file name of a step."""
    return f"{KEY}_{step}.pt"


def steps_in(directory: Path) -> list[int]:
    """Return the steps whose files are there, whole or not, in order."""
    return sorted(int(path.stem.partition("_")[2]) for path in directory.glob(f"{KEY}_*.pt"))


def whole_step(path: Path) -> int:
    """Load a checkpoint with plain torch and return its step.

    Raises:
        AssertionError: it loads, but is not what was saved.
        Exception: whatever torch raises for a file that is no whole checkpoint.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    step = int(state.pop("step"))
    assert path.name == name_of(step), f"{path} holds step {step}"
    assert len(state) == 3
    for key, values in state.items():
        assert bool((values == float(step)).all()), f"{path}: {key} is not of step {step} throughout"
    return step


def whole_steps(directory: Path) -> tuple[list[int], list[str]]:
    """Look at every checkpoint in a directory.

    Returns:
        The steps that load with the right content, in order, and what is wrong with those that do not.
    """
    whole, problems = [], []
    for step in steps_in(directory):
        try:
            whole.append(whole_step(directory / name_of(step)))
        except Exception as error:  # noqa: BLE001 - any failure to load is what is looked for
            problems.append(f"torn: {name_of(step)} does not load: {type(error).__name__}: {str(error)[:200]}")
    return whole, problems
