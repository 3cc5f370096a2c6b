"""Wrapped models: what a job of one size saved, a job of another loads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distckpt import Checkpoint, DiskSaver
from tests.distributed.programs import fire, gather, model_of
from tests.support import job, run_distributed, run_ranks
from tests.support.runtime import RUNTIME
from tests.support.selection import torch_only


def trained(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], object]]:
    """Make one step from the same weights on every rank, by data of each rank's own; also return what makes a step."""
    wrapped, optimizer, step = job.data_parallel(model, lambda parameters: torch.optim.AdamW(parameters, lr=0.1))
    wrapped(torch.full((4, 2), job.rank() + 1.0).to(device_of(wrapped))).sum().backward()
    step()
    optimizer.zero_grad()
    return wrapped, optimizer, step


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def save_wrapped(folder: Path) -> list[list[float]]:
    """Train and save; return the parameters."""
    model, optimizer, _ = trained(model_of(1.0))
    fire(Checkpoint({"model": model, "optimizer": optimizer}, folder))
    return [parameter.detach().flatten().tolist() for parameter in model.parameters()]


def load_wrapped(folder: Path) -> list[list[float]]:
    """Load into a trained model of other weights; return the parameters after that."""
    return load_into(*trained(model_of(5.0))[:2], folder)


def load_into(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> list[list[float]]:
    """Load; return the parameters after that."""
    Checkpoint.load_objects({"model": model, "optimizer": optimizer}, folder / "checkpoint_1.pt")
    return [parameter.detach().flatten().tolist() for parameter in model.parameters()]


def test_a_wrapped_model_is_loaded_by_jobs_of_other_sizes(tmp_path: Path) -> None:
    saved, *others = run_ranks(save_wrapped, 2, tmp_path)
    assert others == [saved], "replicas"
    for world_size in (1, 2 if RUNTIME == "horovod" else 3):
        assert run_ranks(load_wrapped, world_size, tmp_path) == [saved] * world_size
    model = model_of(5.0)  # as it is made anywhere: here is no job, and no device of one
    assert load_into(model, torch.optim.AdamW(model.parameters(), lr=0.1), tmp_path) == saved, "without any job"


def test_keys_in_the_file_are_those_of_the_model_that_the_user_wrote(tmp_path: Path) -> None:
    run_ranks(save_wrapped, 2, tmp_path)
    saved: dict[str, Any] = torch.load(tmp_path / "checkpoint_1.pt", weights_only=True)
    assert list(saved["model"]) == ["weight", "bias"]


@torch_only
@run_distributed(world_size=2)
def test_wrappers_are_seen_through_in_any_order(tmp_path: Path) -> None:
    inner = model_of(3.0)
    compiled = torch.compile(DistributedDataParallel(inner))
    wrapped = DistributedDataParallel(torch.compile(model_of(3.0)))
    fire(Checkpoint({"one": compiled, "other": wrapped, "nested": {"list": [nn.DataParallel(inner)]}}, tmp_path))
    job.barrier()
    saved: dict[str, Any] = torch.load(tmp_path / "checkpoint_1.pt", weights_only=True)
    assert list(saved["one"]) == list(saved["other"]) == list(saved["nested"]["list"][0]) == ["weight", "bias"]
    twins: dict[str, Any] = {"one": torch.compile(model_of(0.0)), "other": DistributedDataParallel(model_of(0.0))}
    Checkpoint.load_objects(twins, tmp_path / "checkpoint_1.pt")
    assert all(parameter.eq(3.0).all() for twin in twins.values() for parameter in twin.parameters())


@torch_only
@run_distributed(world_size=2)
def test_buffers_are_those_of_the_saving_rank(tmp_path: Path) -> None:
    norm = DistributedDataParallel(nn.BatchNorm1d(1))
    norm.module.running_mean.fill_(float(job.rank()))
    fire(Checkpoint({"norm": norm}, DiskSaver(tmp_path, save_on_rank=1)))
    job.barrier()
    saved: dict[str, Any] = torch.load(tmp_path / "norm_1.pt", weights_only=True)
    assert saved["running_mean"].tolist() == [1.0]


@run_distributed(world_size=2)
def test_ranks_go_on_with_live_objects_that_saving_left_alone(tmp_path: Path) -> None:
    model, optimizer, step = trained(model_of(1.0))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    fire(Checkpoint({"model": model, "optimizer": optimizer}, tmp_path, n_saved=2), times=3)
    assert all(map(torch.equal, before, model.parameters()))
    model(torch.ones(1, 2).to(device_of(model))).sum().backward()
    step()
    assert gather([parameter.tolist() for parameter in model.parameters()])[0] == [
        parameter.tolist() for parameter in model.parameters()
    ]


class Collective:
    """An object whose state is gathered over the ranks, as that of sharded models is."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Reduce over the job's ranks."""
        return {"total": job.all_reduce(torch.tensor([1.0 + job.rank()], device=job.device()))}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take nothing over."""


@run_distributed(world_size=3)
def test_a_state_may_be_gathered_over_the_ranks(tmp_path: Path) -> None:
    fire(Checkpoint({"collective": Collective()}, tmp_path))
    job.barrier()
    assert torch.load(tmp_path / "collective_1.pt", weights_only=True)["total"].tolist() == [6.0]
