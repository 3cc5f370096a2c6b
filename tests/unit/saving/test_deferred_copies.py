"""Deferred copies hold the state of the call: an optimizer's step waits, and other state is not deferred."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from distckpt import Checkpoint, DiskSaver
from distckpt.ptformat.reader import verify
from distckpt.saving import staging as guards
from distckpt.saving.capture import find_optimizer_storages
from distckpt.saving.staging import OptimizerStepGuard, Staging, has_step_hook
from tests.unit.directories import names_in


class DeferringSaver(DiskSaver):
    """Defers copies from the CPU too."""

    _deferred_devices = ("cuda", "cpu")


@pytest.fixture
def slow_copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make copies slow; list the threads that copied."""
    copy, names = Staging._copy, list[str]()

    def slowly(self: Staging, which: int) -> None:
        names.append(threading.current_thread().name)
        time.sleep(0.002)
        copy(self, which)

    monkeypatch.setattr(Staging, "_copy", slowly)
    return names


def test_each_file_holds_the_state_of_its_iteration_despite_deferred_copies(
    tmp_path: Path, slow_copies: list[str]
) -> None:
    model = nn.Sequential(nn.Linear(60, 60), nn.BatchNorm1d(60), nn.Linear(60, 1))
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    expected: dict[int, list[torch.Tensor]] = {}

    def tensors() -> list[torch.Tensor]:
        states = (value for state in optimizer.state.values() for value in state.values())
        return [*model.state_dict().values(), *average.state_dict().values(), *states]

    def step(_engine: Engine, _batch: Any) -> None:
        optimizer.zero_grad()
        model(torch.randn(8, 60)).sum().backward()
        optimizer.step()

    trainer = Engine(step)
    saver = DeferringSaver(tmp_path, background=True)
    handler = Checkpoint({"model": model, "average": average, "optimizer": optimizer}, saver, n_saved=None)

    @trainer.on(Events.ITERATION_COMPLETED)
    def note(engine: Engine) -> None:
        expected[engine.state.iteration] = [tensor.clone() for tensor in tensors()]

    trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda _: average.update_parameters(model))
    trainer.run([0] * 25)
    assert slow_copies.count("distckpt-helper") >= 25
    for iteration, held in expected.items():
        path = tmp_path / f"checkpoint_{iteration}.pt"
        verify(path)
        state = torch.load(path, weights_only=True)
        states = (value for one in state["optimizer"]["state"].values() for value in one.values())
        assert all(map(torch.equal, [*state["model"].values(), *state["average"].values(), *states], held)), iteration
    assert guards._GUARDS == []


def test_same_loop_without_the_guard_tears_its_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OptimizerStepGuard, "wait", OptimizerStepGuard.remove)
    copy, stepped = Staging._copy, threading.Event()

    def copy_after_step(self: Staging, which: int) -> None:
        assert stepped.wait(30)
        copy(self, which)

    monkeypatch.setattr(Staging, "_copy", copy_after_step)
    model = nn.Linear(60, 60)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(_engine: Engine, _batch: Any) -> None:
        model(torch.randn(8, 60)).sum().backward()
        optimizer.step()
        stepped.set()

    trainer = Engine(step)
    saver = DeferringSaver(tmp_path, background=True)
    handler = Checkpoint({"model": model, "optimizer": optimizer}, saver, n_saved=None)
    expected: dict[int, torch.Tensor] = {}

    @trainer.on(Events.ITERATION_COMPLETED)
    def note(engine: Engine) -> None:
        handler.wait_until_finished()
        expected[engine.state.iteration] = model.bias.detach().clone()
        if engine.state.iteration < 5:
            stepped.clear()

    trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    trainer.run([0] * 5)
    states = {number: torch.load(tmp_path / f"checkpoint_{number}.pt")["model"]["bias"] for number in expected}
    assert [torch.equal(states[number], held) for number, held in expected.items()] == [*[False] * 4, True]


def test_no_copy_is_deferred_without_overlap_copy(tmp_path: Path) -> None:
    model = nn.Linear(60, 60)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Engine(lambda _engine, _batch: None)
    saver = DeferringSaver(tmp_path, background=True, overlap_copy=False)
    handler, before = Checkpoint({"model": model, "optimizer": optimizer}, saver), model.weight.detach().clone()
    handler(trainer)
    assert guards._GUARDS == []
    with torch.no_grad():
        model.weight.zero_()
    handler.wait_until_finished()
    assert torch.equal(torch.load(tmp_path / "checkpoint_0.pt", weights_only=True)["model"]["weight"], before)


def test_load_waits_for_deferred_copies(tmp_path: Path, slow_copies: list[str]) -> None:
    model = nn.Linear(1200, 1200)  # of several pieces
    optimizer = torch.optim.AdamW(model.parameters())
    handler = Checkpoint({"model": model, "optimizer": optimizer}, DeferringSaver(tmp_path, background=True))
    before = model.weight.detach().clone()
    handler(Engine(lambda _engine, _batch: None))
    Checkpoint.load_objects({"model": model}, {"weight": torch.zeros(1200, 1200), "bias": torch.zeros(1200)})
    handler.wait_until_finished()
    assert "distckpt-helper" in slow_copies
    assert torch.equal(torch.load(tmp_path / "checkpoint_0.pt", weights_only=True)["model"]["weight"], before)
    assert guards._GUARDS == []


def test_copy_that_cannot_start_delays_no_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Staging, _num_threads: int) -> None:
        self.stop()
        raise RuntimeError("can't start new thread")

    model = nn.Linear(60, 60)
    objects = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    handler = Checkpoint(objects, DeferringSaver(tmp_path, background=True))
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "start", fail)
        with pytest.raises(RuntimeError, match="can't start"):
            handler(Engine(lambda _engine, _batch: None))
    assert guards._GUARDS == []
    handler(Engine(lambda _engine, _batch: None))
    handler.wait_until_finished()
    assert names_in(tmp_path) == ["checkpoint_0.pt"]


def test_only_storages_of_optimizers_are_deferred() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model[0].parameters())
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    expected = {tensor.untyped_storage()._cdata for tensor in (*model[0].parameters(), *states)}
    assert find_optimizer_storages({"model": model, "deep": [{"optimizer": optimizer}]}) == dict.fromkeys(
        expected, "cpu"
    )
    assert find_optimizer_storages({"model": model}) == {}


def test_optimizers_that_a_graph_may_replay_are_not_deferred() -> None:
    parameters = [nn.Parameter(torch.ones(1))]
    assert has_step_hook(torch.optim.Adam(parameters))
    assert not has_step_hook(torch.optim.SGD(parameters, lr=0.1)), "a graph may hold it, and nobody asks"
    assert not has_step_hook(torch.optim.Adam(parameters, capturable=True))


def test_failed_copy_delays_no_optimizer() -> None:
    def fail() -> None:
        raise OSError

    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.ones(1)
    OptimizerStepGuard(fail)
    optimizer.step()
    assert parameter.item() == 0.0
    assert guards._GUARDS == []
