"""Entry points in the manner of ignite's `idist`: joining a job, leaving it, and asking who one is."""

import os
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import distckpt
from tests.contracts.implementations import REGISTERED
from tests.support import run_distributed
from tests.support.selection import torch_only

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def forget_launcher() -> None:
    """Take away what the launcher set, as if the program had been started by hand."""
    for name in LAUNCHER:
        del os.environ[name]


def pg_timeout() -> timedelta:
    group = dist.group.WORLD
    assert group is not None
    limit: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return limit


@torch_only
@run_distributed(world_size=2, backend=None)
def test_a_program_under_torchrun_joins_its_job(launcher_port: int) -> None:
    os.environ["MASTER_PORT"] = str(launcher_port)
    rank = int(os.environ["RANK"])
    assert (distckpt.backend(), distckpt.get_rank(), distckpt.get_world_size()) == (None, 0, 1)
    distckpt.initialize("gloo")
    assert (distckpt.backend(), distckpt.get_rank(), distckpt.get_world_size()) == ("gloo", rank, 2)
    assert (distckpt.get_local_rank(), distckpt.get_node_rank()) == (rank, 0)
    assert distckpt.hostname() == socket.gethostname()
    assert distckpt.device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert distckpt.all_reduce(1) == 2
    distckpt.finalize()
    assert (distckpt.backend(), distckpt.get_rank(), distckpt.get_world_size()) == (None, 0, 1)
    assert not dist.is_initialized()


@torch_only
@run_distributed(world_size=2, backend=None)
def test_a_program_under_torchrun_may_leave_its_job_and_join_again(launcher_port: int) -> None:
    os.environ["MASTER_PORT"] = str(launcher_port)  # one store for all of them, as torchrun has it
    for _ in range(8):
        distckpt.initialize("gloo", timeout=10.0)
        assert distckpt.all_reduce(1) == 2
        distckpt.barrier()
        distckpt.finalize()


@torch_only
@run_distributed(world_size=1, backend=None)
def test_a_program_started_by_hand_is_a_job_of_one() -> None:
    forget_launcher()
    for _ in range(2):
        distckpt.initialize("gloo")
        assert (distckpt.backend(), distckpt.get_rank(), distckpt.get_world_size()) == ("gloo", 0, 1)
        assert distckpt.all_reduce(0.1) == 0.1
        assert distckpt.all_gather("ß") == ["ß"]
        distckpt.finalize()


@torch_only
@run_distributed(world_size=2, backend=None)
def test_ranks_may_meet_at_an_init_method(tmp_path: Path) -> None:
    rank = int(os.environ["RANK"])
    forget_launcher()
    distckpt.initialize("gloo", init_method=f"file://{tmp_path}/meeting", rank=rank, world_size=2)
    assert distckpt.all_gather(distckpt.get_rank()) == [0, 1]


@torch_only
@run_distributed(world_size=2, backend=None)
def test_a_backend_that_the_build_registered_is_joined_by_its_name(launcher_port: int) -> None:
    os.environ["MASTER_PORT"] = str(launcher_port)
    assert REGISTERED in distckpt.available_backends()
    distckpt.initialize(REGISTERED)
    assert distckpt.backend() == REGISTERED
    assert distckpt.all_gather({"rank": distckpt.get_rank()}) == [{"rank": 0}, {"rank": 1}]


@torch_only
@pytest.mark.parametrize("timeout", [12.5, timedelta(seconds=12.5)], ids=["seconds", "timedelta"])
@run_distributed(world_size=1, backend=None)
def test_timeout_is_that_of_the_jobs_group(timeout: timedelta | float) -> None:
    forget_launcher()
    distckpt.initialize("gloo", timeout=timeout)
    assert pg_timeout() == timedelta(seconds=12.5)


@torch_only
@run_distributed(world_size=2, backend=None)
def test_a_task_of_srun_joins_its_job(launcher_port: int) -> None:
    rank = os.environ["RANK"]
    forget_launcher()
    slurm = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": "2", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7"}
    os.environ.update(slurm, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(launcher_port))
    distckpt.initialize("gloo")
    assert (distckpt.get_rank(), distckpt.get_world_size()) == (int(rank), 2)
    assert (distckpt.get_local_rank(), distckpt.get_node_rank()) == (int(rank), 0)


@torch_only
@run_distributed(world_size=2, backend=None)
def test_a_task_of_srun_asks_slurm_for_the_first_node(launcher_port: int, tmp_path: Path) -> None:
    rank = os.environ["RANK"]
    forget_launcher()
    tool = tmp_path / rank / "scontrol"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames n[1-2]" ] && printf "127.0.0.1\\nn2\\n"\n')
    tool.chmod(0o755)
    os.environ["PATH"] = f"{tool.parent}:{os.environ['PATH']}"
    slurm = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    os.environ.update(slurm, MASTER_PORT=str(launcher_port))
    distckpt.initialize("gloo")
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    assert distckpt.all_reduce(1) == 2


@torch_only
@run_distributed(world_size=1, backend=None)
def test_a_task_of_srun_without_slurms_tool_is_told_what_to_set(tmp_path: Path) -> None:
    forget_launcher()
    os.environ.update(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NTASKS="1", PATH=str(tmp_path))
    with pytest.raises(RuntimeError, match="MASTER_ADDR is not set, and scontrol cannot name"):
        distckpt.initialize("gloo")


@torch_only
@run_distributed(world_size=1)
def test_a_second_group_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"^Can not create new distributed process group if default one is already"):
        distckpt.initialize("gloo")


@torch_only
@run_distributed(world_size=1, backend=None)
def test_an_incomplete_environment_is_refused() -> None:
    del os.environ["WORLD_SIZE"]
    with pytest.raises(RuntimeError, match=r"^PyTorch distributed configuration should define env variables"):
        distckpt.initialize("gloo")
    assert not dist.is_initialized()


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^Backend should be one of '\(.*'gloo'.*given 'smoke'"):
        distckpt.initialize("smoke")


def test_rank_and_world_size_go_together() -> None:
    with pytest.raises(ValueError, match=r"^Both rank and world_size should be provided, but given 1 and None"):
        distckpt.initialize("gloo", init_method="tcp://127.0.0.1:0", rank=1)


@torch_only
@run_distributed(world_size=1, backend=None)
def test_several_ranks_need_a_place_to_meet() -> None:
    forget_launcher()
    with pytest.raises(ValueError, match=r"world_size is 2, but .* gives their addresses"):
        distckpt.initialize("gloo", rank=0, world_size=2)


def test_nccl_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"^Nccl backend is required but no cuda capable devices"):
        distckpt.initialize("nccl")


def test_leaving_no_job_does_nothing() -> None:
    distckpt.finalize()
    assert (distckpt.get_rank(), distckpt.get_world_size(), distckpt.get_local_rank()) == (0, 1, 0)


def test_backends_are_those_of_the_build() -> None:
    names = distckpt.available_backends()
    assert "gloo" in names
    assert ("nccl" in names) is dist.is_nccl_available()
    assert "undefined" not in names
    assert len(names) == len(set(names))
