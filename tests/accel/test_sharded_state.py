"""FSDP2 on a GPU: a file holds the whole tensors of its moment, though the next step computes during the copy."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distckpt import Checkpoint, DiskSaver, load
from distckpt.ptformat.reader import verify
from tests.support import job, run_ranks

NUM_STEPS = 8
NUM_COLUMNS = 1500  # rows of 6,000 bytes: the borders of shards lie within blocks


@pytest.mark.parametrize("way", ["foreground", "background"])
@pytest.mark.parametrize(("backend", "world_size"), [("nccl", 1), ("gloo", 2)])  # Gloo lets ranks share the GPU
def test_each_file_holds_the_whole_tensors_of_its_iteration(
    backend: str, world_size: int, way: str, tmp_path: Path
) -> None:
    results = run_ranks(_train, world_size, str(tmp_path), way, backend=backend)
    assert results == [NUM_STEPS] * world_size


def _train(folder: str, way: str) -> int:
    """Train and save on each iteration; return the number of files that are exact."""
    torch.cuda.set_device(job.rank() % torch.cuda.device_count())
    _skip_without_collectives()
    model, optimizer = _make()
    expected: dict[int, dict[str, torch.Tensor]] = {}

    def step(engine: Engine, batch: int) -> None:
        del engine, batch
        optimizer.zero_grad()
        model(torch.randn(64, NUM_COLUMNS, device="cuda")).square().sum().backward()
        optimizer.step()

    trainer = Engine(step)
    saver = DiskSaver(folder, background=way == "background")
    handler = Checkpoint({"model": model, "optimizer": optimizer}, saver, n_saved=None)

    @trainer.on(Events.ITERATION_COMPLETED)
    def note(engine: Engine) -> None:
        expected[engine.state.iteration] = _whole(model, optimizer)

    trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    trainer.run([0] * NUM_STEPS)
    paths = {number: Path(folder) / f"checkpoint_{number}.pt" for number in expected}
    num_exact = sum(_holds(path, expected[number]) for number, path in paths.items())
    other, other_optimizer = _make()
    load({"model": other, "optimizer": other_optimizer}, paths[1])
    for name, tensor in _whole(other, other_optimizer).items():
        assert torch.equal(tensor, expected[1][name]), name
    return num_exact


def _make() -> tuple[nn.Module, torch.optim.Optimizer]:
    mesh = init_device_mesh("cuda", (job.world_size(),))
    model = nn.Sequential(nn.Linear(NUM_COLUMNS, 1001), nn.ReLU(), nn.Linear(1001, 3)).cuda()
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def _whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    states = optimizer.state_dict()["state"].items()
    named = {f"{index}.{name}": value for index, state in states for name, value in state.items()}
    named |= model.state_dict()
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in named.items()}
    return {name: value.cpu().clone() for name, value in whole.items()}


def _holds(path: Path, expected: dict[str, torch.Tensor]) -> bool:
    verify(path)
    state = torch.load(path, weights_only=True, mmap=True)
    found = {
        f"{index}.{name}": value for index, one in state["optimizer"]["state"].items() for name, value in one.items()
    }
    found |= state["model"]
    assert all(type(value) is torch.Tensor for value in found.values())
    return found.keys() == expected.keys() and all(torch.equal(found[name].cpu(), expected[name]) for name in found)


def _skip_without_collectives() -> None:
    """Skip on all ranks if the backend has no collectives of FSDP2 for tensors on a GPU."""
    part, whole = torch.ones(2, device="cuda"), torch.empty(2 * job.world_size(), device="cuda")
    try:
        dist.all_gather_into_tensor(whole, part)
        dist.reduce_scatter_tensor(part, whole)
    except RuntimeError as error:
        pytest.skip(f"{dist.get_backend()} has no collectives of FSDP2 on a GPU: {error}")
