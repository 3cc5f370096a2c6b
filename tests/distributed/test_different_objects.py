"""Ranks that hold different modules or optimizers under one key: the coordinator's alone would be saved."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from ignite.handlers import DiskSaver as IgniteDiskSaver
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

import distckpt
from distckpt import BaseSaveHandler, Checkpoint, DiskSaver, RngState, ShardedStateError
from tests.distributed.programs import Stateful, all_equal, gather, idle_engine, model_of, raised
from tests.support import job, run_distributed
from tests.support.selection import torch_only

pytestmark = torch_only


class Keeping(BaseSaveHandler):
    """A save handler that writes by itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None) -> None:
        del metadata
        if job.rank() == 0:  # it is called on every rank
            torch.save(checkpoint, self.folder / filename)

    def remove(self, filename: str) -> None:
        if job.rank() == 0:
            (self.folder / filename).unlink()


def by_handler(make: Callable[[Path], Any]) -> Callable[[Mapping[str, Any], Path], None]:
    def save(to_save: Mapping[str, Any], folder: Path) -> None:
        handler, trainer = Checkpoint(to_save, make(folder), n_saved=2), idle_engine()
        trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
        trainer.run([0])
        handler.wait_until_finished()

    return save


WAYS: dict[str, Callable[[Mapping[str, Any], Path], Any]] = {
    "DiskSaver": by_handler(DiskSaver),
    "in the background": by_handler(lambda folder: DiskSaver(folder, background=True)),
    "shared": by_handler(lambda folder: DiskSaver(folder, share_write="node")),
    "a save handler": by_handler(Keeping),
    "ignite's DiskSaver": by_handler(lambda folder: IgniteDiskSaver(str(folder), require_empty=False)),
    "save": lambda to_save, folder: distckpt.save(to_save, folder / "a.pt"),
    "async_save": lambda to_save, folder: distckpt.async_save(to_save, folder / "a.pt").result(),
}


def stage(number: int) -> nn.Module:
    """Return a stage of a pipeline."""
    stages = nn.ModuleDict()
    stages[f"layer{number}"] = nn.Linear(3, 3)
    return stages


class History(nn.Module):
    """A module with a buffer of another length on each rank."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("losses", torch.zeros(length))


def files_in(folder: Path) -> list[str]:
    job.barrier()
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".pt" or "tmp" in path.name)


@pytest.mark.parametrize("way", WAYS)
@run_distributed(world_size=2)
def test_stages_of_a_pipeline_under_one_key_are_refused_before_anything_is_written(tmp_path: Path, way: str) -> None:
    model = stage(job.rank())
    to_save = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    error = raised(lambda: WAYS[way](to_save, tmp_path))
    assert isinstance(error, ShardedStateError), error
    assert (
        "to_save['model'] is another object on some ranks: rank 0 has layer0.weight (torch.float32 (3, 3)); rank 1 "
        in (str(error))
    )
    assert all_equal(gather(str(error)))
    assert files_in(tmp_path) == []


def _of_rank(kind: str, *, is_odd: bool) -> dict[str, Any]:
    model, other = nn.Linear(3, 3), nn.Linear(3, 4)
    made: dict[str, Callable[[], dict[str, Any]]] = {
        "shape": lambda: {"model": other if is_odd else model},
        "dtype": lambda: {"model": model.to(torch.bfloat16) if is_odd else model},
        "buffer": lambda: {
            "model": History(1) if is_odd else nn.ParameterDict({"weight": nn.Parameter(torch.ones(2))})
        },
        "class": lambda: {"optimizer": (torch.optim.AdamW if is_odd else torch.optim.SGD)(model.parameters())},
        "parameters": lambda: {"optimizer": torch.optim.SGD(list(model.parameters())[: 1 if is_odd else 2])},
        "nested": lambda: {"nets": [model, {"inner": other if is_odd else model}]},
        "key": lambda: {"model": model, "other": other} if is_odd else {"model": model},
        "namesakes": lambda: {"nets": {"a": other if is_odd else model}, "nets.a": model},
        "other namesakes": lambda: {"nets.a": model, "nets": {"a": other if is_odd else model}},
    }
    return made[kind]()


DIFFERENCES = {
    "shape": "to_save['model'] is another object on some ranks: "
    "rank 0 has weight (torch.float32 (3, 3)); rank 1 has weight (torch.float32 (4, 3))",
    "dtype": "rank 0 has weight (torch.float32 (3, 3)); rank 1 has weight (torch.bfloat16 (3, 3))",
    "buffer": "rank 0 has no losses; rank 1 has losses (a buffer)",
    "class": "to_save['optimizer'] is another object on some ranks: "
    "rank 0 has the class (SGD); rank 1 has the class (AdamW)",
    "parameters": "rank 0 has param_groups[0], 1 (torch.float32 (3,)); rank 1 has no param_groups[0], 1",
    "nested": "to_save['nets[1].inner'] is",
    "key": "to_save['other'] is another object on some ranks: rank 0 has no weight; rank 1 has weight (",
    "namesakes": "to_save['nets.a'] is another object on some ranks: rank 0 has weight",
    "other namesakes": "to_save['nets.a (another)'] is another object on some ranks: rank 0 has weight",
}


@pytest.mark.parametrize("kind", DIFFERENCES)
@run_distributed(world_size=2)
def test_the_error_names_key_difference_and_ranks(tmp_path: Path, kind: str) -> None:
    distckpt.save({"model": model_of(1.0)}, tmp_path / "a.pt")
    error = raised(lambda: distckpt.save(_of_rank(kind, is_odd=job.rank() == 1), tmp_path / "a.pt"))
    assert DIFFERENCES[kind] in str(error)
    assert all_equal(gather(str(error)))
    assert torch.load(tmp_path / "a.pt", weights_only=True)["weight"].eq(1).all()


@run_distributed(world_size=4)
def test_all_ranks_that_differ_are_named(tmp_path: Path) -> None:
    error = raised(lambda: distckpt.save(_of_rank("shape", is_odd=job.rank() != 2), tmp_path / "a.pt", save_on_rank=2))
    assert "rank 2 has weight (torch.float32 (3, 3)); rank 0 has weight (torch.float32 (4, 3))" in str(error)
    assert "Ranks 0, 1, 3 differ from rank 2" in str(error)


@run_distributed(world_size=2)
def test_a_module_that_changes_between_two_saves_is_compared_again(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    distckpt.save({"model": model}, tmp_path / "a.pt")
    if job.rank() == 1:
        model.append(nn.Linear(2, 2))
    error = raised(lambda: distckpt.save({"model": model}, tmp_path / "a.pt"))
    assert "rank 0 has no 1.weight; rank 1 has 1.weight (torch.float32 (2, 2))" in str(error)
    if job.rank() == 1:
        del model[1]
    distckpt.save({"model": model}, tmp_path / "a.pt")


@run_distributed(world_size=2)
def test_a_parameter_that_gets_another_shape_between_two_saves_is_compared_again(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    distckpt.save({"model": model}, tmp_path / "a.pt")
    model.weight = nn.Parameter(torch.ones(4, 4 + 2 * job.rank()))
    error = raised(lambda: distckpt.save({"model": model}, tmp_path / "a.pt"))
    assert "rank 0 has weight (torch.float32 (4, 4)); rank 1 has weight (torch.float32 (4, 6))" in str(error)


class Nothing(nn.Linear):
    """A module that only the coordinator has a state of, like FSDP1's with ``rank0_only``."""

    def state_dict(self, **kwargs: Any) -> Any:
        return super().state_dict(**kwargs) if job.rank() == 0 else {}


@pytest.mark.parametrize("way", sorted(WAYS.keys() - {"shared"}))  # it warns that the ranks cannot share the file
@run_distributed(world_size=2)
def test_what_differs_between_ranks_as_it_should_is_saved(tmp_path: Path, way: str) -> None:
    rank = job.rank()
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    if rank == 0:  # the other rank has taken no step
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    to_save = {
        "model": model,
        "optimizer": optimizer,
        "zero": ZeroRedundancyOptimizer(nn.Linear(2, 3).parameters(), torch.optim.SGD, lr=0.1),
        "rng": RngState(),
        "loader": Stateful({f"position of {rank}": rank}),
        "history": History(3 + rank),
        "first": Nothing(2, 2),
    }
    if rank == 0:
        to_save["average"] = nn.Linear(5, 5)
    WAYS[way](to_save, tmp_path)
    job.barrier()
    (path,) = tmp_path.glob("*.pt")
    state = torch.load(path, weights_only=False)
    assert state["history"]["losses"].shape == (3,)
    assert len(state["optimizer"]["state"]) == 2
    assert state["average"]["weight"].shape == (5, 5)
    assert state["first"]["weight"].shape == (2, 2)
