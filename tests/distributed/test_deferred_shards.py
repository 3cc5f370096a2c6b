"""Shards whose copies are deferred: the file holds the state of the call, since an optimizer's step waits."""

import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from distckpt import Checkpoint, DiskSaver, StageState
from distckpt.ptformat.reader import verify
from distckpt.saving import staging as guards
from distckpt.saving.staging import OptimizerStepGuard, Staging
from tests.distributed.test_sharded_saves import assert_equal, mesh_of, trained, whole
from tests.distributed.test_stage_state import by_name
from tests.support import job, run_distributed

pytestmark = pytest.mark.only_on("gloo", why="FSDP2 shards over Gloo")
NUM_STEPS = 5


class DeferringSaver(DiskSaver):
    """Defers copies from the CPU too."""

    _deferred_devices = ("cuda", "cpu")


def train(folder: Path, objects: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Save in each iteration; return the state of each."""
    expected = {}

    def step(_engine: Engine, _batch: Any) -> None:
        model(torch.ones(8, 257)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    trainer = Engine(step)
    handler = Checkpoint(objects, DeferringSaver(folder, background=True), n_saved=None)

    @trainer.on(Events.ITERATION_COMPLETED)
    def note(engine: Engine) -> None:
        expected[engine.state.iteration] = whole(model.state_dict()), whole(by_name(model, optimizer))

    trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    trainer.run([0] * NUM_STEPS, max_epochs=1)
    handler.wait_until_finished()
    job.barrier()
    return expected


def differing(folder: Path, expected: Any, model: nn.Module) -> list[int]:
    """Return the iterations whose file holds another state."""
    found = []
    for iteration, (parameters, kept) in expected.items():
        path = folder / f"checkpoint_{iteration}.pt"
        verify(path)
        state = torch.load(path, weights_only=True)
        names = [name for name, _ in model.named_parameters()]
        states = state["optimizer"]["state"]
        by = {name: states[name if name in states else number] for number, name in enumerate(names)}
        try:
            assert_equal([dict(state["model"]), by], [dict(parameters), kept])
        except AssertionError:
            found.append(iteration)
    return found


@pytest.mark.parametrize("is_stage", [False, True], ids=["FSDP2", "a stage under FSDP2"])
@run_distributed(world_size=2)
def test_each_file_holds_the_state_of_its_iteration(tmp_path: Path, *, is_stage: bool) -> None:
    model, optimizer = trained(mesh_of(2))
    objects: dict[str, Any] = {"model": model, "optimizer": optimizer}
    if is_stage:
        objects = {"model": StageState(model), "optimizer": StageState(optimizer, model)}
    copy, threads = Staging._copy, list[str]()

    def slowly(self: Staging, which: int) -> None:
        threads.append(threading.current_thread().name)
        time.sleep(0.002)
        copy(self, which)

    with patch.object(Staging, "_copy", slowly):
        expected = train(tmp_path, objects, model, optimizer)
    assert threads.count("distckpt-helper") >= NUM_STEPS, "copies were deferred"
    assert differing(tmp_path, expected, model) == []
    assert guards._GUARDS == []


@run_distributed(world_size=2)
def test_without_the_guard_the_same_loop_saves_other_states(tmp_path: Path) -> None:
    model, optimizer = trained(mesh_of(2))
    copy, step, stepped = Staging._copy, optimizer.step, threading.Event()

    def copy_after_step(self: Staging, which: int) -> None:
        if threading.current_thread().name == "distckpt-helper":
            assert stepped.wait(30)
        copy(self, which)

    def step_and_tell(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        stepped.set()
        return result

    handler = Checkpoint({"model": model, "optimizer": optimizer}, DeferringSaver(tmp_path, background=True))
    before = whole(model.state_dict()), whole(by_name(model, optimizer))
    with (
        patch.object(Staging, "_copy", copy_after_step),
        patch.object(optimizer, "step", step_and_tell),
        patch.object(OptimizerStepGuard, "wait", OptimizerStepGuard.remove),
    ):
        handler(Engine(lambda _engine, _batch: None))
        model(torch.ones(8, 257)).square().sum().backward()
        optimizer.step()
        handler.wait_until_finished()
    job.barrier()
    assert differing(tmp_path, {0: before}, model) == [0]
