"""save and async_save on several ranks: one file, errors on all ranks, and commits while all ranks train."""

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from distckpt import CollectiveError, RemoteRankError, ReplicasDiffer, async_save, save
from distckpt.backends.detect import current
from distckpt.ptformat.reader import verify
from distckpt.saving import pending_save
from distckpt.storage.direct_io import DirectFile
from tests.distributed.programs import gather, raised
from tests.support import fresh_ranks, job, run_distributed
from tests.support.limits import PROGRAM_LIMIT_S
from tests.support.selection import torch_only

pytestmark = torch_only
SHARED = pytest.mark.parametrize("share_write", [None, "node"])


def training() -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 300)).square().sum().backward()
    optimizer.step()


class Constant:
    def __init__(self, value: float) -> None:
        self.value = value

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}


def copy_of(model: DistributedDataParallel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.module.named_parameters()}


def holds(path: Path, expected: dict[str, torch.Tensor]) -> bool:
    verify(path)
    state = torch.load(path, weights_only=True)["model"]
    return all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@contextlib.contextmanager
def failing_writes(rank: int) -> Iterator[None]:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if job.rank() == rank:
            patch.setattr(DirectFile, "write", fail)
        yield


@SHARED
@run_distributed(world_size=2)
def test_ranks_save_one_file(tmp_path: Path, *, share_write: Any) -> None:
    model, optimizer = training()
    objects = {"model": model, "optimizer": optimizer}
    path = save(objects, tmp_path / "a.pt", share_write=share_write, check_replicas=True, save_on_rank=1)
    assert holds(path, copy_of(model)), "it is durable when the call returns, on every rank"
    job.barrier()
    assert os.listdir(tmp_path) == ["a.pt"]


@SHARED
@run_distributed(world_size=2)
def test_file_is_committed_while_the_ranks_train(tmp_path: Path, *, share_write: Any) -> None:
    model, optimizer = training()
    expected = copy_of(model)
    pending = async_save({"model": model, "optimizer": optimizer}, tmp_path / "a.pt", share_write=share_write)
    for _ in range(3):
        step(model, optimizer)
    pending.join()
    assert all(gather(pending.done()))
    assert holds(tmp_path / "a.pt", expected), "before any rank waits"
    assert pending.result(PROGRAM_LIMIT_S) == tmp_path / "a.pt"
    assert pending.result() == tmp_path / "a.pt"
    job.barrier()
    assert os.listdir(tmp_path) == ["a.pt"]


@run_distributed(world_size=2)
def test_wait_commits_where_the_job_has_no_board(tmp_path: Path) -> None:
    model, optimizer = training()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(current()), "key_value_store", lambda *_, **__: None)
        pending = async_save({"model": model, "optimizer": optimizer}, tmp_path / "a.pt", share_write="node")
        pending.join()
        assert gather(pending.done()) == [False, True], "rank 0 has yet to hear of rank 1"
        assert not (tmp_path / "a.pt").exists()
        pending.wait(PROGRAM_LIMIT_S)
    assert pending.done()
    assert holds(tmp_path / "a.pt", copy_of(model))


@pytest.mark.parametrize(("share_write", "failing"), [(None, 0), ("node", 0), ("node", 1)])
@run_distributed(world_size=2)
def test_error_on_one_rank_is_raised_on_all(tmp_path: Path, *, share_write: Any, failing: int) -> None:
    model, optimizer = training()
    objects, before = {"model": model, "optimizer": optimizer}, copy_of(model)
    path = save(objects, tmp_path / "a.pt")
    step(model, optimizer)
    with failing_writes(failing):
        errors = [raised(lambda: save(objects, path, share_write=share_write, step=5))]
        pending = async_save(objects, path, share_write=share_write, step=5)
        errors += [raised(pending.wait), raised(pending.result)]
    for error in errors:
        assert isinstance(error, RemoteRankError)
        assert isinstance(error, OSError)
        assert f"rank {failing}, step 5" in str(error)
        assert "a.pt is intact" in str(error)
    assert pending.done()
    job.barrier()
    assert holds(path, before)
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("failing", [0, 1])
@run_distributed(world_size=2)
def test_a_thread_that_cannot_be_started_on_one_rank_is_an_error_on_all(tmp_path: Path, failing: int) -> None:
    def fail(_work: object) -> None:
        raise RuntimeError("can't start new thread")

    model, optimizer = training()
    objects, before = {"model": model, "optimizer": optimizer}, copy_of(model)
    path = save(objects, tmp_path / "a.pt")
    step(model, optimizer)
    with pytest.MonkeyPatch.context() as patch:
        if job.rank() == failing:
            patch.setattr(pending_save, "run_in_background", fail)
        pending = async_save(objects, path, share_write="node")
        error = raised(pending.wait)
    assert isinstance(error, RemoteRankError)
    assert f"can't start new thread (RuntimeError on rank {failing}, while: " in str(error)
    job.barrier()
    assert holds(path, before)
    assert os.listdir(tmp_path) == ["a.pt"]


@run_distributed(world_size=2)
def test_only_the_coordinator_looks_at_its_directory(tmp_path: Path) -> None:
    def refuse(*_args: object, **_kwargs: object) -> bool:
        raise PermissionError("not for this node")

    model, optimizer = training()
    with pytest.MonkeyPatch.context() as patch:
        if job.rank() == 0:
            patch.setattr(Path, "exists", refuse)
        path = save({"model": model, "optimizer": optimizer}, tmp_path / "a.pt", save_on_rank=1)
    assert holds(path, copy_of(model))


@run_distributed(world_size=2)
def test_wait_times_out_on_all_ranks_and_can_be_repeated(tmp_path: Path) -> None:
    model, optimizer = training()
    is_open, write = threading.Event(), DirectFile.write

    def wait_and_write(self: DirectFile, data: memoryview, offset: int) -> None:
        assert is_open.wait(timeout=PROGRAM_LIMIT_S)
        write(self, data, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DirectFile, "write", wait_and_write)
        pending = async_save({"model": model, "optimizer": optimizer}, tmp_path / "a.pt")
        error = raised(lambda: pending.wait(timeout_s=0.1))
        assert isinstance(error, TimeoutError)
        assert "rank 0 is still writing" in str(error)
        assert gather(pending.done()) == [False, True]
        is_open.set()
        pending.wait(PROGRAM_LIMIT_S)
    assert holds(tmp_path / "a.pt", copy_of(model))


@run_distributed(world_size=2)
def test_different_arguments_are_refused_on_all_ranks(tmp_path: Path) -> None:
    objects = {"model": nn.Linear(1, 1)}
    error = raised(lambda: save(objects, tmp_path / f"{job.rank()}.pt"))
    assert isinstance(error, ValueError)
    assert "the name in path is '0.pt' on rank 0, '1.pt' on rank 1" in str(error)
    error = raised(lambda: save(objects if job.rank() else {"model": 1}, tmp_path / "a.pt"))
    assert isinstance(error, TypeError)
    assert isinstance(error, RemoteRankError)
    job.barrier()
    assert os.listdir(tmp_path) == []


def save_on_rank_0_alone(folder: Path, in_background: bool) -> float:  # noqa: FBT001 - ranks get it by position
    """Return after how many seconds rank 0 learns that it is alone."""
    begin_s = time.monotonic()
    if job.rank() == 0:
        with pytest.raises(CollectiveError, match="rank 1"):
            (async_save if in_background else save)({"model": nn.Linear(1, 1)}, folder / "a.pt", timeout_s=2.0)
        (folder / "over").touch()
    while not (folder / "over").exists():
        time.sleep(0.05)
    return time.monotonic() - begin_s


@pytest.mark.parametrize("in_background", [False, True])
def test_a_save_on_one_rank_alone_ends_in_time(tmp_path: Path, *, in_background: bool) -> None:
    with fresh_ranks(save_on_rank_0_alone, 2, tmp_path, in_background) as ranks:
        ends = ranks.finish()
    assert ends[0].value < 20.0
    assert [path.name for path in tmp_path.iterdir()] == ["over"]


@run_distributed(world_size=2)
def test_a_save_waits_for_an_earlier_one_to_its_path_as_long_as_that_takes(tmp_path: Path) -> None:
    write = DirectFile.write

    def slowly(self: DirectFile, data: memoryview, offset: int) -> None:
        time.sleep(4.0)
        write(self, data, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DirectFile, "write", slowly)
        first = async_save({"model": Constant(1.0)}, tmp_path / "a.pt", timeout_s=2.0)
        second = save({"model": Constant(2.0)}, tmp_path / "a.pt", timeout_s=2.0)
    first.wait()
    assert torch.load(second, weights_only=True)["value"] == 2.0


@run_distributed(world_size=2)
def test_replicas_that_differ_are_refused(tmp_path: Path) -> None:
    model, _ = training()
    if job.rank() == 1:
        with torch.no_grad():
            model.module[0].bias += 1
    error = raised(lambda: async_save({"model": model}, tmp_path / "a.pt", check_replicas=True))
    assert isinstance(error, ReplicasDiffer)
    assert "bias" in str(error)
    job.barrier()
    assert os.listdir(tmp_path) == []


@run_distributed(world_size=2)
def test_sharded_optimizer_is_consolidated(tmp_path: Path) -> None:
    model, _ = training()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    step(model, optimizer)
    path = save({"model": model, "optimizer": optimizer}, tmp_path / "a.pt")
    state = torch.load(path, weights_only=True)["optimizer"]["state"]
    assert len(state) == len(list(model.parameters()))
