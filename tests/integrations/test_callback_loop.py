"""CallbackLoop under a small loop of its own: which epochs can be saved, and how a run ends."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events

from distckpt.handlers.engine_events import leave_run
from distckpt.handlers.stepped_engine import Pause
from distckpt.integrations.callback_loop import CallbackLoop


class Progress:
    """The state of the small loop."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: Any) -> None:
        """Ignore the state."""


def make(folder: Path, **options: Any) -> CallbackLoop:
    """Return a loop whose checkpoints are in `folder`."""
    defaults: dict[str, Any] = {
        "save_every": 1,
        "n_saved": None,
        "handlers": [],
        "to_save": None,
        "preemption": False,
        "background": False,
        "record_events": False,
    }
    return CallbackLoop(folder, progress=Progress(), **defaults | options)


def start(loop: CallbackLoop, *, max_iters: int = 4, epoch_length: int = 2, **objects: Any) -> None:
    """Start a run."""
    loop.load({"model": torch.nn.Linear(1, 1), **objects})
    loop.begin(None, max_iters=max_iters, epoch_length=epoch_length)


def events_of(loop: CallbackLoop) -> list[str]:
    """Return a list to which the run's events are appended."""
    names: list[str] = []
    for event in (Events.EPOCH_STARTED, Events.EPOCH_COMPLETED, Events.TERMINATE, Events.COMPLETED):
        loop.engine.add_event_handler(event, lambda _, name=event.name: names.append(name))
    return names


def train(loop: CallbackLoop, num_steps: int) -> None:
    """Train steps of an epoch."""
    assert loop.begin_epoch()
    for _ in range(num_steps):
        loop.begin_iteration()
        assert loop.complete_iteration(0.0)


def kill(loop: CallbackLoop) -> None:
    """Forget a run, as the end of its process would."""
    leave_run(loop.engine)


def test_epochs_end_where_the_loop_says(tmp_path: Path) -> None:
    loop = make(tmp_path)
    names = events_of(loop)
    start(loop)
    train(loop, 2)
    assert loop.end_epoch(stops=False)
    train(loop, 2)
    assert not loop.end_epoch(stops=True)
    assert names == ["EPOCH_STARTED", "EPOCH_COMPLETED"] * 2 + ["COMPLETED"]
    assert loop.has_ended


def test_a_loop_that_stops_in_an_epoch_starts_no_further_iteration(tmp_path: Path) -> None:
    loop = make(tmp_path)
    names = events_of(loop)
    start(loop)
    train(loop, 1)
    assert not loop.end_epoch(stops=True)
    assert names == ["EPOCH_STARTED", "TERMINATE", "COMPLETED"]
    assert loop.engine.state.iteration == 1


def test_a_loop_that_stops_after_an_epoch_completes_it(tmp_path: Path) -> None:
    loop = make(tmp_path)
    names = events_of(loop)
    start(loop)
    train(loop, 2)
    assert not loop.end_epoch(stops=True)
    assert names == ["EPOCH_STARTED", "EPOCH_COMPLETED", "TERMINATE", "COMPLETED"]


def test_an_epoch_that_ends_after_a_resume_has_its_metrics(tmp_path: Path) -> None:
    first, second = make(tmp_path), make(tmp_path)
    start(first)
    first.engine.state.metrics.update(loss=0.5, accuracy=torch.tensor(0.75))
    train(first, 2)
    kill(first)  # before the epoch's end
    found: list[dict[str, Any]] = []
    second.engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: found.append(dict(engine.state.metrics)))
    assert second.find() is not None
    start(second)
    assert second.begin_epoch()
    assert found == [{"loss": 0.5, "accuracy": torch.tensor(0.75)}]
    second.end()


def test_an_epoch_that_ends_early_is_refused_while_the_run_goes_on(tmp_path: Path) -> None:
    loop = make(tmp_path)
    start(loop)
    train(loop, 1)
    with pytest.raises(RuntimeError, match="an epoch ended after 1 of 2 steps") as caught:
        loop.end_epoch(stops=False)
    with pytest.raises(RuntimeError, match="an epoch ended"):
        loop.fail(caught.value)
    assert loop.has_ended


def test_a_handler_stops_the_loop_after_its_iteration(tmp_path: Path) -> None:
    loop = make(tmp_path)
    loop.engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), loop.engine.terminate)
    start(loop)
    assert loop.begin_epoch()
    loop.begin_iteration()
    assert not loop.complete_iteration(0.0)
    assert not loop.end_epoch(stops=True)
    assert not loop.begin_epoch()
    assert loop.engine.pause is Pause.RUN_ENDED


def test_names_of_the_loops_own_objects_are_refused(tmp_path: Path) -> None:
    loop = make(tmp_path, to_save={"model": torch.nn.Linear(1, 1)})
    with pytest.raises(ValueError, match="model, which are saved anyway"):
        start(loop)


@pytest.mark.parametrize("save_every", [0, -1, 1.5])
def test_save_every_is_checked(tmp_path: Path, save_every: Any) -> None:
    with pytest.raises(ValueError, match="save_every"):
        make(tmp_path, save_every=save_every)


def test_the_next_pass_after_a_resume_draws_as_the_first(tmp_path: Path) -> None:
    drawn: dict[str, list[float]] = {}
    for name in ("alone", "first", "second"):
        loop = make(tmp_path / name.replace("second", "first"))
        torch.manual_seed(0 if name != "second" else 1)
        if name == "second":
            assert loop.find() is not None
        start(loop, max_iters=6, epoch_length=3)
        seen = drawn[name] = []
        while not loop.has_ended and loop.begin_epoch():
            order = torch.rand(3)  # the sampler's, once an epoch
            for at in range(loop.engine.state.iteration % 3, 3):
                loop.begin_iteration()
                seen.append(float(order[at] + torch.rand(1)))  # and a step's
                loop.complete_iteration(0.0)
                if name == "first" and len(seen) == 2:
                    break
            if name == "first":
                kill(loop)
                break
            loop.end_epoch(stops=loop.engine.state.iteration == 6)
    assert drawn["first"] + drawn["second"] == drawn["alone"]
