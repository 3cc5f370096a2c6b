"""Contract of `Backend`: who am I among the ranks, without any collective."""

import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import distckpt
from distckpt.backends import detect
from distckpt.backends.base import Backend
from distckpt.backends.detect import current
from distckpt.backends.torch_dist import TorchDistBackend
from tests.contracts.implementations import SEVERAL_RANKS, clause, job_store
from tests.support import job, run_distributed
from tests.support.selection import torch_only

LAUNCHER_VARIABLES = (
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_NTASKS_PER_NODE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALRANKID",
    "MPI_LOCALNRANKS",
)


def another(backend: Backend) -> Backend:
    """Return what a rank makes that asks for the first time who it is."""
    if isinstance(backend, TorchDistBackend):
        assert dist.group.WORLD is not None
        return TorchDistBackend(dist.group.WORLD)
    of_class: Any = type(backend)
    made: Backend = of_class(*([10**6] if job.name() == "xla" else []))  # of another job in the process's life
    return made


@clause()
def test_every_rank_has_a_number_of_its_own(backend: Backend) -> None:
    assert backend.gather_objects(backend.rank) == list(range(backend.world_size))


@clause()
def test_identity_is_that_of_the_runtime(backend: Backend) -> None:
    assert (backend.rank, backend.world_size) == (job.rank(), job.world_size())
    assert backend.name == job.name()
    assert backend.local_rank == job.rank(), "one node"
    assert backend.node == 0


@clause()
def test_device_is_the_current_one(backend: Backend) -> None:
    assert backend.device() == job.device()


@clause()
def test_backend_is_the_same_object_while_the_job_lives(backend: Backend) -> None:
    assert current() is backend


@clause()
def test_a_rank_that_the_job_does_not_have_is_refused(backend: Backend) -> None:
    for rank in (-1, backend.world_size):
        with pytest.raises(ValueError, match="src should be a rank of this job") as caught:
            backend.check_rank(rank, "src")
        assert str(rank) in str(caught.value)
    for rank in range(backend.world_size):
        backend.check_rank(rank, "src")


@clause(SEVERAL_RANKS)
def test_identity_needs_no_other_rank(backend: Backend) -> None:
    if backend.rank == 0:  # the others stay away: a collective would wait for them
        mine = another(backend)
        assert (mine.rank, mine.world_size, mine.local_rank, mine.node) == (0, backend.world_size, 0, 0)
        assert mine.device() == backend.device()


@pytest.mark.parametrize(
    ("environment", "local_rank", "node"),
    [
        pytest.param({}, 2, 0, id="nothing: as if there were one node"),
        pytest.param({"LOCAL_RANK": "5", "GROUP_RANK": "7"}, 5, 7, id="torchrun"),
        pytest.param({"SLURM_LOCALID": "1", "SLURM_NODEID": "3"}, 1, 3, id="slurm"),
        pytest.param({"OMPI_COMM_WORLD_LOCAL_RANK": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, 4, 0, id="openmpi"),
        pytest.param({"MPI_LOCALRANKID": "6"}, 6, 0, id="mpich"),
        pytest.param({"LOCAL_WORLD_SIZE": "2"}, 0, 1, id="ranks per node alone"),
        pytest.param({"SLURM_NTASKS_PER_NODE": "2"}, 0, 1, id="slurm's tasks per node alone"),
        pytest.param({"LOCAL_RANK": "5", "SLURM_LOCALID": "1"}, 5, 0, id="torchrun inside slurm"),
        pytest.param({"LOCAL_RANK": "", "GROUP_RANK": "none"}, 2, 0, id="no numbers"),
    ],
)
@torch_only
@run_distributed(world_size=3)
def test_place_is_what_the_launcher_says(environment: dict[str, str], local_rank: int, node: int) -> None:
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(environment)
    backend = current()
    if backend.rank == 2:
        assert (backend.local_rank, backend.node) == (local_rank, node)
        assert (distckpt.get_local_rank(), distckpt.get_node_rank()) == (local_rank, node)


@torch_only
@run_distributed(world_size=2, backend=None)
def test_job_is_detected_anew_after_each_process_group() -> None:
    rank, store = int(os.environ["RANK"]), job_store()
    assert current().world_size == 1
    for round_number in range(3):
        mine = rank if round_number % 2 else 1 - rank
        corner = dist.PrefixStore(f"round{round_number}", store)
        dist.init_process_group("gloo", store=corner, rank=mine, world_size=2)
        backend = current()
        assert (backend.rank, backend.world_size) == (mine, 2)
        assert backend.gather_objects(rank) == ([0, 1] if mine == rank else [1, 0])
        assert backend.next_object_id("Checkpoint") == "Checkpoint#0", "counted anew"
        dist.destroy_process_group()
        assert (current().rank, current().world_size, current().name) == (0, 1, "serial")


@torch_only
@run_distributed(world_size=3, backend=None)
def test_a_job_may_shrink_and_grow() -> None:
    rank, store = int(os.environ["RANK"]), job_store()
    for round_number, world_size in enumerate((3, 2, 3)):
        if rank < world_size:
            corner = dist.PrefixStore(f"round{round_number}", store)
            dist.init_process_group("gloo", store=corner, rank=rank, world_size=world_size)
            assert current().all_reduce_ints([1], timeout_s=5.0) == [world_size]
            dist.destroy_process_group()


@torch_only
@run_distributed(world_size=2, backend=None)
def test_a_group_made_anew_works_when_one_rank_alone_had_used_the_first() -> None:
    rank, store = int(os.environ["RANK"]), job_store()
    for round_number in range(2):
        corner = dist.PrefixStore(f"round{round_number}", store)
        dist.init_process_group("gloo", store=corner, rank=rank, world_size=2)
        if round_number or rank == 0:
            assert current().world_size == 2
        if round_number:
            assert current().all_reduce_ints([1], timeout_s=5.0) == [2]
        dist.barrier()
        dist.destroy_process_group()


@torch_only
@run_distributed(world_size=2)
def test_backend_of_a_destroyed_group_is_forgotten() -> None:
    assert current().world_size == 2
    gc.collect()
    num_known = len(detect._BY_GROUP)  # torch may keep groups of earlier tests, by the meshes of its DTensors
    current().barrier()
    dist.destroy_process_group()
    gc.collect()
    assert len(detect._BY_GROUP) == num_known - 1


@torch_only
@run_distributed(world_size=2)
def test_what_is_importable_does_not_matter(tmp_path: Path) -> None:
    """Another runtime that is installed, and even imported, takes no part in a job that is not its own."""
    for name in ("torch_xla", "horovod"):
        (tmp_path / str(dist.get_rank()) / name).mkdir(parents=True)
        code = "def __getattr__(name):\n    raise AssertionError(f'asked for {__name__}.{name}')\n"
        (tmp_path / str(dist.get_rank()) / name / "__init__.py").write_text(code, encoding="utf-8")
    sys.path.insert(0, str(tmp_path / str(dist.get_rank())))
    try:
        import horovod  # noqa: F401, PLC0415 - the stand-in
        import torch_xla  # noqa: F401, PLC0415

        assert isinstance(current(), TorchDistBackend)
        assert distckpt.all_gather(distckpt.get_rank()) == [0, 1]
        saver = distckpt.DiskSaver(tmp_path / "checkpoints")
        saver({"a": torch.ones(2)}, "a.pt")
    finally:
        sys.path.pop(0)
        for name in ("torch_xla", "horovod"):
            sys.modules.pop(name, None)
    current().barrier()
    assert torch.load(tmp_path / "checkpoints" / "a.pt", weights_only=True)["a"].tolist() == [1.0, 1.0]
