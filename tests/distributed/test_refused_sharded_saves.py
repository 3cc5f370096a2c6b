"""Sharded states that cannot be saved: one error on all ranks, before anything is written."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distckpt
from distckpt import StageState
from distckpt.saving.staging import HostMemory
from tests.distributed.programs import Stateful, kinds, raised
from tests.distributed.test_sharded_saves import mesh_of, numbers, save, shard
from tests.support import job, run_distributed

pytestmark = [
    pytest.mark.only_on("gloo", why="device meshes over Gloo"),
    pytest.mark.filterwarnings("ignore"),  # torch warns of its own calls
]
SOON_S = 60
"""A collective that waits for a rank takes as long as the process group's limit: minutes."""


def _different(kind: str) -> Any:
    first, line = job.rank() == 0, mesh_of(2)
    mine = shard(numbers(8, 3), line, [Shard(0)])
    others: dict[str, Any] = {
        "shape": lambda: shard(numbers(8, 3 if first else 4), line, [Shard(0)], src_data_rank=None),
        "dtype": lambda: mine.clone() if first else mine.double(),
        "placement": lambda: shard(numbers(8, 3), line, [Shard(0 if first else 1)], src_data_rank=None),
        "missing": lambda: mine.clone() if first else torch.ones(1),
    }
    return {"a": mine, "b": others[kind]()}


@pytest.mark.parametrize("kind", ["shape", "dtype", "placement", "missing"])
@run_distributed(world_size=2)
def test_ranks_with_different_shards_raise_one_error_that_names_tensor_and_rank(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file.pt"
    good = {"one": Stateful({"a": shard(numbers(8, 3), mesh_of(2), [Shard(0)])})}
    distckpt.save(good, path)
    for how in ("foreground", "background"):
        error = raised(partial(save, {"one": Stateful(_different(kind))}, path, how))
        assert "ShardedStateError" in kinds(error)
        assert "to_save['one'], key 'b'" in str(error), error
        assert "rank 1" in str(error)
        assert "rank 0" in str(error)
    job.barrier()
    assert torch.equal(torch.load(path, weights_only=True)["a"], numbers(8, 3))
    assert [one.name for one in tmp_path.iterdir()] == ["file.pt"]


@run_distributed(world_size=2)
def test_a_partial_tensor_is_refused_by_name(tmp_path: Path) -> None:
    partial = DTensor.from_local(torch.ones(2), mesh_of(2), [Partial()])
    error = raised(lambda: distckpt.save({"one": Stateful({"sum": partial})}, tmp_path / "file.pt"))
    assert "ShardedStateError" in kinds(error)
    assert "to_save['one'], key 'sum'" in str(error)
    assert "summands" in str(error)


@run_distributed(world_size=2)
def test_a_rank_that_does_not_see_the_directory_is_named(tmp_path: Path) -> None:
    folder = tmp_path / str(job.rank())
    folder.mkdir()
    state = {"a": shard(numbers(8, 3), mesh_of(2), [Shard(0)])}
    error = raised(lambda: distckpt.save({"one": Stateful(state)}, folder / "file.pt"))
    assert "SaveError" in kinds(error)
    assert "rank 1 holds shards, but does not see the directory of rank 0" in str(error)
    assert list(folder.iterdir()) == []


@run_distributed(world_size=4)
def test_a_mesh_of_ranks_in_another_order_is_refused_where_it_shards(tmp_path: Path) -> None:
    """Torch's process groups sort their ranks: distribute_tensor and redistribute would mean other shards."""
    values = numbers(8, 3)
    path = tmp_path / "plain.pt"
    if job.rank() == 0:
        torch.save({"weight": values}, path)
    job.barrier()
    for ranks, placements, is_refused in (
        ([[2, 3], [0, 1]], [Replicate(), Shard(0)], False),
        ([[2, 3], [0, 1]], [Shard(0), Replicate()], True),
        ([[1, 0], [3, 2]], [Replicate(), Shard(1)], True),
        ([[3, 2], [1, 0]], [Replicate(), Replicate()], False),
    ):
        mesh = DeviceMesh("cpu", ranks)
        module = nn.Module()
        weight: Any = nn.Parameter(distribute_tensor(values, mesh, placements))
        module.weight = weight
        whole_values = weight.full_tensor().detach()
        for obj in (module, StageState(module)):
            if is_refused:
                for error in (
                    raised(lambda obj=obj: distckpt.save({"model": obj}, tmp_path / "a.pt")),  # type: ignore[misc]  # a default of a lambda
                    raised(lambda obj=obj: distckpt.load({"model": obj}, path)),  # type: ignore[misc]  # as above
                ):
                    assert "ShardedStateError" in kinds(error)
                    assert "which are not in ascending order" in str(error)
            else:
                distckpt.save({"model": obj}, tmp_path / "a.pt")
                job.barrier()
                assert torch.equal(torch.load(tmp_path / "a.pt", weights_only=True)["weight"], whole_values)
                distckpt.load({"model": obj}, path)
                assert torch.equal(weight.full_tensor(), values)
            job.barrier()


def misfit(kind: str) -> DTensor:
    """Return a DTensor of which rank 0 holds less, and rank 1 more, than the placements give."""
    first, line, values = job.rank() == 0, mesh_of(2), numbers(4, 5)
    form: Any = {"run_check": False, "shape": values.shape, "stride": values.stride()}
    if kind == "columns":
        return DTensor.from_local((values[:, :2] if first else values[:, 2:]).clone(), line, [Shard(1)], **form)
    return DTensor.from_local((values[:1] if first else values[1:]).clone(), line, [Shard(0)], **form)


@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("staged", [False, True])
@run_distributed(world_size=2)
def test_a_shard_that_is_not_what_its_placements_give_is_refused(tmp_path: Path, kind: str, *, staged: bool) -> None:
    path = tmp_path / "file.pt"
    model = nn.Module()
    weight: Any = nn.Parameter(misfit(kind))
    model.weight = weight
    error = raised(lambda: distckpt.save({"one": StageState(model) if staged else model}, path))
    assert "ShardedStateError" in kinds(error)
    assert "weight" in str(error)
    assert "holds a shard of shape (" in str(error)
    assert "where its placements give (" in str(error)
    job.barrier()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("staged", [False, True])
@run_distributed(world_size=2)
def test_a_shard_whose_storage_was_freed_is_refused(tmp_path: Path, *, staged: bool) -> None:
    path, model = tmp_path / "file.pt", nn.Module()
    weight: Any = nn.Parameter(shard(numbers(400, 300), mesh_of(2), [Shard(0)]))
    model.weight = weight
    objects = {"one": StageState(model) if staged else model}
    distckpt.save(objects, path)
    weight.to_local().untyped_storage().resize_(0)
    error = raised(lambda: distckpt.save(objects, path))
    assert "ShardedStateError" in kinds(error)
    assert "storage was freed" in str(error)
    job.barrier()
    assert torch.equal(torch.load(path, weights_only=True)["weight"], numbers(400, 300))


@run_distributed(world_size=2)
def test_a_rank_that_fails_before_tensors_are_redistributed_leaves_no_rank_in_that_collective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, columns = tmp_path / "file.pt", numbers(6, 400)
    state = {"one": Stateful({"columns": shard(columns, mesh_of(2), [Shard(1)])})}
    distckpt.save(state, path)

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError("no memory on this rank")

    with monkeypatch.context() as patched:
        if job.rank() == 1:
            patched.setattr(HostMemory, "view", fail)
        begin = time.monotonic()
        error = raised(lambda: distckpt.save(state, path))
    assert "MemoryError" in kinds(error), error
    assert "no memory on this rank" in str(error)
    assert time.monotonic() - begin < SOON_S
    distckpt.save(state, path)
    job.barrier()
    assert torch.equal(torch.load(path, weights_only=True)["columns"], columns)
