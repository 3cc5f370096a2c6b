"""Entry points inside and beside ignite's `idist.Parallel`: whoever made the job, both see it."""

import math
import os
from pathlib import Path

import ignite.distributed as idist
import pytest
import torch
import torch.distributed as dist
from ignite.distributed import launcher
from ignite.engine import Engine, Events

import distckpt
from tests.distributed.idist import fresh_idist
from tests.support import run_distributed
from tests.support.selection import torch_only

pytestmark = torch_only


def identity(module: object) -> tuple[object, ...]:
    names = ("get_rank", "get_world_size", "get_local_rank", "get_node_rank", "backend", "device", "hostname")
    return tuple(getattr(module, name)() for name in names)


def train(local_rank: int, folder: Path, *, num_epochs: int) -> None:
    """Train as a program does, with handlers of ours, whoever made the job."""
    assert identity(distckpt) == identity(idist)
    assert local_rank == distckpt.get_local_rank()
    trainer = Engine(lambda _engine, batch: float(idist.all_reduce(torch.tensor([float(batch)]))))
    handler = distckpt.Checkpoint({"model": torch.nn.Linear(1, 1)}, folder, n_saved=None)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, distckpt.TerminateOnNan())
    trainer.run([1, 2], max_epochs=num_epochs)
    assert distckpt.all_gather(str(handler.last_checkpoint)) == [str(folder / f"model_{2 * num_epochs}.pt")] * 2
    assert idist.all_gather(distckpt.get_rank()) == [0, 1]
    idist.barrier()
    distckpt.barrier()


@run_distributed(world_size=2, backend=None)
def test_ours_works_inside_idists_parallel(tmp_path: Path, launcher_port: int) -> None:
    os.environ["MASTER_PORT"] = str(launcher_port)
    with fresh_idist(), launcher.Parallel(backend="gloo") as parallel:
        parallel.run(train, tmp_path, num_epochs=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_2.pt", "model_4.pt"]
    assert (distckpt.get_rank(), distckpt.get_world_size()) == (0, 1)


@run_distributed(world_size=2, backend=None)
def test_idist_works_inside_our_parallel(tmp_path: Path, launcher_port: int) -> None:
    os.environ["MASTER_PORT"] = str(launcher_port)
    with fresh_idist(), distckpt.Parallel(backend="gloo") as parallel:
        parallel.run(train, tmp_path, num_epochs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["model_2.pt"]
    assert not dist.is_initialized()


@run_distributed(world_size=2)
def test_both_parallels_without_a_backend_run_in_the_live_job(tmp_path: Path) -> None:
    with fresh_idist():
        with launcher.Parallel() as theirs, distckpt.Parallel() as ours:
            theirs.run(train, tmp_path / "theirs", num_epochs=1)
            ours.run(train, tmp_path / "ours", num_epochs=1)
        assert dist.is_initialized(), "who did not make the job does not end it"


@run_distributed(world_size=2, backend=None)
def test_idist_may_end_the_job_that_ours_began(launcher_port: int) -> None:
    os.environ["MASTER_PORT"] = str(launcher_port)
    with fresh_idist():
        distckpt.initialize("gloo")
        assert idist.get_world_size() == distckpt.get_world_size() == 2
        idist.finalize()
        assert distckpt.get_world_size() == 1
        distckpt.finalize()


@run_distributed(world_size=2)
def test_collectives_of_both_may_alternate() -> None:
    with fresh_idist():
        for number in range(20):
            assert idist.all_reduce(number) == 2 * number
            assert distckpt.all_reduce(number, "MAX") == number
            assert idist.all_gather(distckpt.get_rank()) == distckpt.all_gather(idist.get_rank()) == [0, 1]


@run_distributed(world_size=2)
def test_values_that_idist_damages_come_back_equal_from_ours() -> None:
    with fresh_idist():
        source = idist.get_rank() == 0
        for value in (0.1, 2**24 + 1):
            assert idist.broadcast(value if source else 0) != value, "float32 on the way"
            assert distckpt.broadcast(value if source else 0) == value
        assert idist.broadcast("naïve") == "naïv\x06", "counts characters, sends bytes"
        assert distckpt.broadcast("naïve") == "naïve"
        with pytest.raises(TypeError, match="Unhandled input type <class 'dict'>"):
            idist.broadcast({"a": 1})  # type: ignore[arg-type]  # wrong on purpose
        assert distckpt.broadcast({"a": 1} if source else {}) == {"a": 1}


@run_distributed(world_size=2)
def test_a_nan_is_found_by_a_flag_where_idists_maximum_hides_it() -> None:
    with fresh_idist():
        score = float("nan") if idist.get_rank() == 1 else 1.0
        assert idist.all_reduce(score, op="MAX") == 1.0, "the NaN of rank 1 is gone"
        assert distckpt.all_reduce(int(math.isnan(score)), "MAX") == 1
