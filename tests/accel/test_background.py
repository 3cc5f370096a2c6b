"""On a GPU a background save holds the state of its moment, though it is copied while the next step computes."""

from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

from distckpt import Checkpoint, DiskSaver
from distckpt.ptformat.reader import verify


def test_each_file_holds_the_state_of_its_iteration(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2000, 2000), nn.BatchNorm1d(2000), nn.Linear(2000, 1)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    expected: dict[int, list[torch.Tensor]] = {}

    def tensors() -> list[torch.Tensor]:
        states = (value for state in optimizer.state.values() for value in state.values())
        return [*model.state_dict().values(), *states]

    def step(_engine: Engine, _batch: Any) -> None:
        optimizer.zero_grad()
        model(torch.randn(64, 2000, device="cuda")).sum().backward()
        optimizer.step()

    trainer = Engine(step)
    saver = DiskSaver(tmp_path, background=True)
    handler = Checkpoint({"model": model, "optimizer": optimizer}, saver, n_saved=None)

    @trainer.on(Events.ITERATION_COMPLETED)
    def note(engine: Engine) -> None:
        expected[engine.state.iteration] = [tensor.clone() for tensor in tensors()]

    trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    trainer.run([0] * 20)
    assert saver._staging_memory()._is_pinned
    for iteration, held in expected.items():
        path = tmp_path / f"checkpoint_{iteration}.pt"
        verify(path)
        state = torch.load(path, weights_only=True)
        states = (value for one in state["optimizer"]["state"].values() for value in one.values())
        found = [*state["model"].values(), *states]
        assert all(torch.equal(one.cuda(), other.cuda()) for one, other in zip(found, held, strict=True)), iteration
