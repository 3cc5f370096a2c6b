"""The object that the crash tests save, and the check that a checkpoint of it is whole.

A state here is one number, the step, many times over: any mixture of two steps, any hole and any truncation
shows. Checking uses torch alone, never distckpt: that is the promise.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ignite.handlers
import torch
from ignite.engine import Engine

import distckpt

__all__ = ["KEY", "Counted", "name_of", "numbers_in", "step_of", "steps_in", "whole_step", "whole_steps"]

KEY = "counted"
_NUM_TENSORS = (3, 7)
"""The key of a `Counted`, and of the model of `tests.crash.trained`, in a checkpoint."""


class Counted:
    """An object to save. Every number in its state is `step`.

    Args:
        num_floats: length of the first of its three tensors; the others are short.
        step: the first step.
    """

    def __init__(self, num_floats: int = 1000, step: int = 0) -> None:
        self.step = step
        self._num_floats = num_floats

    def advance(self) -> None:
        """Train for a step."""
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the step and three tensors full of it."""
        lengths = {"values0": self._num_floats, "values1": 1000, "values2": 10}
        values = {key: torch.full((length,), float(self.step)) for key, length in lengths.items()}
        return {"step": self.step, **values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the step."""
        self.step = state["step"]

    def handler(self, save_handler: Any, kind: Any = distckpt.Checkpoint, **kwargs: Any) -> Any:
        """Return a `kind` of Checkpoint that saves this object, keeps one, and names files by its step."""
        return kind({KEY: self}, save_handler, n_saved=1, global_step_transform=lambda *_: self.step, **kwargs)

    def ignite_handler(self, directory: Path) -> Any:
        """Return the same Checkpoint of ignite's."""
        saver = ignite.handlers.DiskSaver(str(directory), require_empty=False)
        return self.handler(saver, kind=ignite.handlers.Checkpoint)


def idle_engine() -> Engine:
    """Return an engine for calls of a handler; it does not run."""
    return Engine(lambda _engine, _batch: None)


def name_of(step: int) -> str:
    """Return the file name of a step."""
    return f"{KEY}_{step}.pt"


def step_of(path: Path) -> int:
    """Return the step in a file's name."""
    return int(path.stem.partition("_")[2])


def steps_in(directory: Path) -> list[int]:
    """Return the steps of the files in a directory, whole or not, in order."""
    return sorted(map(step_of, directory.glob(f"{KEY}_*.pt")))


def whole_step(path: Path) -> int:
    """Load a checkpoint with plain torch and return its step.

    Raises:
        AssertionError: it loads, but is not what was saved.
        Exception: whatever torch raises for a file that is no whole checkpoint.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    step = int(state.get(KEY, state)["step"])
    assert path.name == name_of(step), f"{path} holds step {step}"
    numbers = list(numbers_in(state))
    assert len(numbers) in _NUM_TENSORS, f"{path} holds {len(numbers)} tensors"
    assert set(numbers) == {float(step)}, f"{path} is not of step {step} throughout, but of {sorted(set(numbers))}"
    return step


def numbers_in(state: Any) -> Iterator[float]:
    """Yield each tensor's number; all elements of a tensor are equal.

    Raises:
        AssertionError: one is empty, or holds several.
    """
    if isinstance(state, torch.Tensor):
        state = state.to_local() if hasattr(state, "to_local") else state  # of a DTensor, this rank's part
        number = state.flatten()[0].item()
        assert bool((state == number).all()), f"a tensor holds {number} and other numbers"
        yield number
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from numbers_in(value)


def whole_steps(directory: Path) -> tuple[list[int], list[str]]:
    """Load every checkpoint in a directory.

    Returns:
        The steps that load with the right content, in order, and what is wrong with those that do not.
    """
    whole, problems = [], []
    for step in steps_in(directory):
        try:
            whole.append(whole_step(directory / name_of(step)))
        except Exception as error:  # noqa: BLE001 - any failure to load is a problem
            problems.append(f"torn: {name_of(step)} does not load: {type(error).__name__}: {str(error)[:200]}")
    return whole, problems
