"""What the tests of the vote share: a count of what is reduced, and a training whose weights break."""

import contextlib
import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events

from distckpt import Checkpoint, Preemption, TerminateOnNan, TimeLimit
from distckpt.backends.control_backend import ControlGroupBackend
from distckpt.backends.detect import current
from tests.support import job

WORLDS = pytest.mark.parametrize("world_size", [2, 3])
SOON_S = 10.0
End = tuple[int, str | None]
"""Of a run: the last iteration, and the stop reason."""
LIMIT_S = 30.0
"""How long a rank waits for another one in these tests: none should have to."""


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """Collect the host collectives of this rank in their order: `reduce` and `finished`, `gather`, `broadcast`."""
    log: list[str] = []

    def started(call: Callable[..., Any]) -> Callable[..., Any]:
        def start(*args: Any, **kwargs: Any) -> Callable[[], Any]:
            log.append("reduce")
            finish = call(*args, **kwargs)

            def finish_and_tell() -> Any:
                result = finish()
                log.append("finished")
                return result

            return finish_and_tell

        return start

    def told(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def tell(*args: Any, **kwargs: Any) -> Any:
            log.append(name)
            return call(*args, **kwargs)

        return tell

    # On this rank's own objects: ranks may be threads of one process.
    backend = current()
    with pytest.MonkeyPatch.context() as patch:
        if isinstance(backend, ControlGroupBackend):
            patch.setattr(backend._control_group, "start_max", started(backend._control_group.start_max))
            for name in ("reduce", "gather", "broadcast"):
                patch.setattr(backend._control_group, name, told(name, getattr(backend._control_group, name)))
        else:
            patch.setattr(backend, "reduce_host", told("reduce", backend.reduce_host))
            patch.setattr(backend, "gather_host", told("gather", backend.gather_host))
        yield log


@contextlib.contextmanager
def operations() -> Iterator[list[Any]]:
    """Collect what stands for each vote of this rank that was begun: it tells whether it `is_completed`."""
    works: list[Any] = []
    backend = current()
    assert isinstance(backend, ControlGroupBackend)
    host, start = backend._control_group, backend._control_group.start_max

    def start_and_keep(*args: Any, **kwargs: Any) -> Any:
        finish = start(*args, **kwargs)
        assert host._open is not None
        works.append(host._open.work)
        return finish

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "start_max", start_and_keep)
        yield works


class Weights:
    """What is trained: it knows the iteration that it is of, and breaks in one that is told."""

    def __init__(self, breaks_at: float = math.inf) -> None:
        self.breaks_at = breaks_at
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the iteration, and a tensor that holds NaN once it broke."""
        value = math.nan if self.step >= self.breaks_at else 1.0
        return {"step": self.step, "weights": torch.full((4,), value)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state over."""
        self.step = state["step"]


def rank_is_last() -> bool:
    """Tell whether this is the job's last rank; the only one is."""
    return job.rank() == job.world_size() - 1


def stored(folder: Path) -> list[int]:
    """Open every checkpoint in `folder`, refuse one with NaN, and return their iterations in order."""
    steps = []
    for path in folder.glob("*.pt"):
        state = torch.load(path, weights_only=True)
        assert torch.isfinite(state["weights"]).all(), f"{path.name} holds NaN"
        steps.append(state["step"])
    return sorted(steps)


VOTERS = ("nan", "time", "preemption", "checkpoint")
"""The four that vote, by the names that :func:`attach` knows."""


@contextlib.contextmanager
def attached(
    trainer: Engine, order: tuple[str, ...], checkpoint: Checkpoint, event: Any, **pace: Any
) -> Iterator[dict[str, Any]]:
    """Attach the four handlers that vote in this order, and give the signals back in the end.

    Args:
        trainer: to what.
        order: of `VOTERS`.
        checkpoint: goes on `event`; the others go on each iteration.
        event: see there.
        **pace: of the vote; TerminateOnNan is told.
    """
    handlers: dict[str, Any] = {"checkpoint": checkpoint}
    for name in order:
        if name == "nan":
            handlers[name] = TerminateOnNan(timeout_s=LIMIT_S, **pace)
            trainer.add_event_handler(Events.ITERATION_COMPLETED, handlers[name])
        elif name == "time":
            handlers[name] = TimeLimit(3600, timeout_s=LIMIT_S)
            trainer.add_event_handler(Events.ITERATION_COMPLETED, handlers[name])
        elif name == "preemption":
            handlers[name] = Preemption(trainer, checkpoint, timeout_s=LIMIT_S)
        else:
            trainer.add_event_handler(event, checkpoint)
    try:
        yield handlers
    finally:
        if "preemption" in handlers:
            handlers["preemption"].close()


PLACES: dict[str, tuple[Any, str]] = {
    "iteration": (Events.ITERATION_COMPLETED, "trainer"),
    "next iteration": (Events.ITERATION_STARTED, "trainer"),
    "epoch": (Events.EPOCH_COMPLETED, "trainer"),
    "completed": (Events.COMPLETED, "trainer"),
    "called in iteration": (Events.ITERATION_COMPLETED, "call"),
    "after an event in iteration": (Events.ITERATION_COMPLETED, "custom event"),
    "evaluator in iteration": (Events.ITERATION_COMPLETED, "evaluator"),
    "called in evaluator in iteration": (Events.ITERATION_COMPLETED, "call in evaluator"),
    "evaluator in epoch": (Events.EPOCH_COMPLETED, "evaluator"),
    "evaluator in completed": (Events.COMPLETED, "evaluator"),
}
"""By name: an event of the trainer's, and how a Checkpoint is reached from there."""


def saving_trainer(weights: Weights, folder: str, place: str, order: str, **pace: Any) -> Engine:
    """Return a trainer with a TerminateOnNan on each iteration, and a Checkpoint in one of `PLACES`.

    Args:
        weights: break on the last rank alone where its output is looked at, on all ranks in what is saved.
        folder: where it saves.
        place: one of `PLACES`.
        order: "before" or "after": whether the Checkpoint's place is attached before the TerminateOnNan.
        **pace: of the vote.
    """

    def step(engine: Engine, _batch: object) -> float:
        weights.step = engine.state.iteration
        return math.nan if weights.step == weights.breaks_at and rank_is_last() else 0.5

    trainer = Engine(step)
    checkpoint = Checkpoint(
        {"weights": weights},
        folder,
        n_saved=None,
        global_step_transform=lambda *_: trainer.state.iteration,
        timeout_s=LIMIT_S,
    )
    evaluator = Engine(lambda _engine, _batch: None)
    event, way = PLACES[place]
    if order == "after":
        trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S, **pace))
    if way == "call":
        trainer.add_event_handler(event, lambda: checkpoint(trainer))
    elif "evaluator" in way:
        trainer.add_event_handler(event, lambda: evaluator.run([0, 0]))
        if way == "evaluator":
            evaluator.add_event_handler(Events.COMPLETED, checkpoint)
        else:
            evaluator.add_event_handler(Events.COMPLETED, lambda: checkpoint(evaluator))
    else:
        if way == "custom event":
            trainer.register_events("custom")
            trainer.add_event_handler(event, lambda: trainer.fire_event("custom"))
        trainer.add_event_handler(event, checkpoint)
    if order == "before":
        trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S, **pace))
    return trainer


def voting_trainer(weights: Weights, kind: str, at: int = 3) -> tuple[Engine, dict[str, Any]]:
    """Return a trainer to which something happens on the last rank in iteration `at`, and where its handlers go."""
    handlers: dict[str, Any] = {}

    def step(engine: Engine, _batch: object) -> float:
        weights.step = engine.state.iteration
        if weights.step == at and rank_is_last():
            if kind == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            elif kind == "time":
                handlers["time"].start_time -= 3601
            elif kind == "nan":
                return math.nan
        return 0.5

    return Engine(step), handlers


def engine_with_nan_at(iteration: int) -> Engine:
    return Engine(lambda engine, _batch: nan_at(engine, iteration))


def nan_at(engine: Engine, iteration: int) -> float:
    return math.nan if engine.state.iteration == iteration and rank_is_last() else 0.5


def step_of(engine: Engine, weights: Weights) -> float:
    weights.step = engine.state.iteration
    return math.nan if weights.step >= weights.breaks_at and rank_is_last() else 0.5
