"""Several ranks write one file together: each a range of what is equal on all, and the file is as one rank's."""

import contextlib
import errno
import os
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as hooks
from torch.nn.parallel import DistributedDataParallel

from distckpt import Checkpoint, DiskSaver, RemoteRankError, ReplicasDiffer, RngState
from distckpt.backends.detect import current
from distckpt.coordination.phases import SyncPoint
from distckpt.ptformat.reader import verify
from distckpt.saving.capture import find_replicas
from distckpt.saving.pending_save import WriteCompletions
from distckpt.saving.snapshot import Snapshot
from distckpt.saving.writer_group import find_writers
from distckpt.storage.direct_io import DirectFile
from distckpt.storage.local import LocalStorage
from tests.distributed.programs import all_equal, gather, raised, training_step, warned
from tests.support import job, run_distributed
from tests.support.equality import equal
from tests.support.selection import torch_only

MODES = pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
pytestmark = torch_only


class Job:
    """A model in DistributedDataParallel with a BatchNorm of each rank's own, its optimizer, and a trainer."""

    def __init__(self, width: int = 200) -> None:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, width))
        self.model = DistributedDataParallel(model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.trainer = Engine(self._step)

    def _step(self, engine: Engine, _batch: Any) -> None:
        torch.manual_seed(100 * engine.state.iteration + job.rank())
        self.optimizer.zero_grad()
        self.model(torch.randn(4, self.model.module[0].in_features)).square().sum().backward()
        self.optimizer.step()

    def to_save(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "trainer": self.trainer}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return copies of what a checkpoint of this rank's would hold."""
        names = {parameter: name for name, parameter in self.model.module.named_parameters()}
        states = {
            f"{names[parameter]}.{key}": value.clone()
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
        }
        return {**{key: value.clone() for key, value in self.model.module.state_dict().items()}, **states}


def held(path: Path, like: Job) -> dict[str, torch.Tensor]:
    """Load a file with plain torch, and return its tensors by the names of :meth:`Job.tensors`."""
    verify(path)
    state = torch.load(path, weights_only=True)
    names = [name for name, _ in like.model.module.named_parameters()]
    states = {
        f"{names[number]}.{key}": value
        for number, one in state["optimizer"]["state"].items()
        for key, value in one.items()
    }
    return {**state["model"], **states}


@contextlib.contextmanager
def noted_writes(error: OSError | None = None) -> Iterator[list[int]]:
    """Note how many bytes of images this rank writes; fail instead where an error is given."""
    lengths: list[int] = []
    write = DirectFile.write

    def noting(self: DirectFile, data: memoryview, offset: int) -> None:
        if error is not None:
            raise error
        lengths.append(len(data))
        write(self, data, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DirectFile, "write", noting)
        yield lengths


def save_together(folder: Path, *, background: bool, width: int = 200, saving: int = 0) -> None:
    one = Job(width)
    saver = DiskSaver(folder, share_write="node", background=background, save_on_rank=saving)
    handler = Checkpoint(one.to_save(), saver, n_saved=None)
    one.trainer.add_event_handler(Events.ITERATION_COMPLETED(every=3), handler)
    expected: dict[int, dict[str, torch.Tensor]] = {}

    @one.trainer.on(Events.ITERATION_COMPLETED)
    def note(engine: Engine) -> None:
        expected[engine.state.iteration] = one.tensors()

    with noted_writes() as lengths:
        one.trainer.run([0] * 10)
    names = gather(Path(str(handler.last_checkpoint)).name)
    assert names == ["checkpoint_9.pt"] * job.world_size()
    for iteration in (3, 6, 9):
        if job.rank() == saving:  # the buffers are the saving rank's
            assert equal(held(folder / f"checkpoint_{iteration}.pt", one), expected[iteration])
    written = gather(sum(lengths) / 3)
    assert max(written) < 1.1 * sum(written) / job.world_size() + (1 << 16)
    job.barrier()
    assert sorted(os.listdir(folder)) == [f"checkpoint_{iteration}.pt" for iteration in (3, 6, 9)]


@MODES
@run_distributed(world_size=2)
def test_two_ranks_write_the_file_that_one_would(tmp_path: Path, *, background: bool) -> None:
    save_together(tmp_path, background=background)


@MODES
@run_distributed(world_size=3)
def test_three_ranks_write_one_file_whichever_commits(tmp_path: Path, *, background: bool) -> None:
    save_together(tmp_path, background=background, saving=1, width=500)


@run_distributed(world_size=2)
def test_state_smaller_than_a_block_is_written_by_one_rank(tmp_path: Path) -> None:
    save_together(tmp_path, background=False, width=2)


@run_distributed(world_size=2)
def test_ranks_write_together_if_only_their_own_states_differ(tmp_path: Path) -> None:
    one = Job()
    rng = RngState(one.trainer)
    with noted_writes() as lengths, warnings.catch_warnings():
        warnings.simplefilter("error")
        handler = Checkpoint({**one.to_save(), "rng": rng}, DiskSaver(tmp_path, share_write="node"))
        one.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), handler)
        one.trainer.run([0] * 2)
    written = gather(sum(lengths))
    assert min(written) > 0.3 * sum(written)
    verify(Path(str(handler.last_checkpoint)))


class Odd:
    """An object whose state is of another size on each rank."""

    def state_dict(self) -> dict[str, Any]:
        return {"own": torch.arange(10_000 * (1 + job.rank()))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing."""


@MODES
@run_distributed(world_size=2)
def test_coordinator_writes_all_and_warns_if_layouts_differ(tmp_path: Path, *, background: bool) -> None:
    one = Job()
    handler = Checkpoint(
        {**one.to_save(), "odd": Odd()}, DiskSaver(tmp_path, share_write="node", background=background)
    )
    one.trainer.run([0])
    expected = one.tensors()
    with noted_writes() as lengths, warned() as messages:
        handler(one.trainer)
        handler.wait_until_finished()
        handler(one.trainer)
        handler.wait_until_finished()
    assert all("cannot write checkpoint_1.pt together" in message for message in messages)
    assert len(messages) == 1
    assert "bytes in all" in messages[0]
    written = gather(sum(lengths))
    assert written[0] > 0
    assert written[1] == 0
    if job.rank() == 0:
        assert equal(held(tmp_path / "checkpoint_1.pt", one), expected)


@MODES
@run_distributed(world_size=2)
def test_an_error_of_another_ranks_share_is_everybodys_and_the_one_before_stands(
    tmp_path: Path, *, background: bool
) -> None:
    one = Job()
    handler = Checkpoint(one.to_save(), DiskSaver(tmp_path, share_write="node", background=background))
    one.trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), handler)
    one.trainer.run([0] * 2)
    error = OSError(errno.EDQUOT, "Disk quota exceeded") if job.rank() == 1 else None
    with noted_writes(error), pytest.raises(OSError, match=r"rank 1, step 4: .*checkpoint_2.pt is intact") as caught:
        one.trainer.run([0] * 2, max_epochs=2)
    assert isinstance(caught.value, RemoteRankError)
    assert caught.value.errno == errno.EDQUOT
    job.barrier()
    assert os.listdir(tmp_path) == ["checkpoint_2.pt"]
    assert gather(Path(str(handler.last_checkpoint)).name) == ["checkpoint_2.pt"] * 2
    handler(one.trainer)
    handler.wait_until_finished()
    assert gather(Path(str(handler.last_checkpoint)).name) == ["checkpoint_4.pt"] * 2
    verify(tmp_path / "checkpoint_4.pt")


@run_distributed(world_size=2)
def test_a_file_is_committed_before_the_next_vote(tmp_path: Path) -> None:
    one = Job()
    handler = Checkpoint(one.to_save(), DiskSaver(tmp_path, share_write="node", background=True))
    handler(one.trainer)
    deadline = time.monotonic() + 20.0
    while not (tmp_path / "checkpoint_0.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert handler.has_pending_save, "nobody has voted"
    verify(tmp_path / "checkpoint_0.pt")
    handler.wait_until_finished()
    assert gather(Path(str(handler.last_checkpoint)).name) == ["checkpoint_0.pt"] * 2


@contextlib.contextmanager
def slow_writes_and_noted_tails() -> Iterator[tuple[list[float], list[float]]]:
    """Let each large write take its time; note when they end, and when what comes after them was made."""
    ends, tails = list[float](), list[float]()
    write, build_tail = DirectFile.write, Snapshot._make_tail

    def slowly(self: DirectFile, data: memoryview, offset: int) -> None:
        write(self, data, offset)
        time.sleep(1.0)
        ends.append(time.monotonic())

    def noting(self: Snapshot, *arguments: Any) -> Any:
        made = build_tail(self, *arguments)
        tails.append(time.monotonic())
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DirectFile, "write", slowly)
        patch.setattr(Snapshot, "_make_tail", noting)
        yield ends, tails


@pytest.mark.parametrize("word", ["comes", "is lost", "is another's"])
@run_distributed(world_size=3)
def test_tail_is_made_while_the_image_is_written(tmp_path: Path, word: str) -> None:
    one = Job()
    handler = Checkpoint(one.to_save(), DiskSaver(tmp_path, share_write="node", background=True))
    leave = WriteCompletions.publish_checksums

    def leave_another(self: WriteCompletions, rank: int, checked: Any) -> None:
        if word == "is another's":
            leave(self, rank, [(index, begin, crc ^ 1, num_bytes) for index, begin, crc, num_bytes in checked])

    with pytest.MonkeyPatch.context() as patch, slow_writes_and_noted_tails() as (ends, tails):
        if word != "comes":
            patch.setattr(WriteCompletions, "publish_checksums", leave_another)
        handler(one.trainer)
        handler.wait_until_finished()
    verify(tmp_path / "checkpoint_0.pt")
    if job.rank() == 0:
        assert len(tails) == (2 if word == "is another's" else 1)
        assert (tails[0] < ends[0]) == (word != "is lost")
    else:
        assert not tails


@pytest.mark.parametrize("fails", [False, True], ids=["well", "with an error"])
@run_distributed(world_size=2)
def test_votes_tell_of_writers_without_a_key_value_store(tmp_path: Path, *, fails: bool) -> None:
    one = Job()
    handler = Checkpoint(one.to_save(), DiskSaver(tmp_path, share_write="node", background=True))
    backend = current()
    vars(backend)["key_value_store"] = lambda **_: None
    try:
        error = OSError(errno.EDQUOT, "Disk quota exceeded") if fails and job.rank() == 1 else None
        with noted_writes(error):
            handler(one.trainer)
            raised_here = raised(handler.wait_until_finished)
    finally:
        del vars(backend)["key_value_store"]
    job.barrier()
    assert isinstance(raised_here, RemoteRankError) == fails
    assert sorted(os.listdir(tmp_path)) == ([] if fails else ["checkpoint_0.pt"])


@run_distributed(world_size=2)
def test_ranks_with_directories_of_their_own_do_not_share(tmp_path: Path) -> None:
    one = Job()
    folder = tmp_path / str(job.rank())
    folder.mkdir()
    handler = Checkpoint(one.to_save(), DiskSaver(folder, share_write="world"))
    with noted_writes() as lengths:
        handler(one.trainer)
    assert gather(len(lengths) > 0) == [True, False]
    job.barrier()
    assert os.listdir(tmp_path / "0") == ["checkpoint_0.pt"]
    assert os.listdir(tmp_path / "1") == []


@run_distributed(world_size=3)
def test_probe_finds_the_ranks_that_see_a_directory(tmp_path: Path) -> None:
    folder = tmp_path if job.rank() != 1 else tmp_path / "elsewhere"
    folder.mkdir(exist_ok=True)
    alias = tmp_path / f"alias{job.rank()}"
    alias.symlink_to(folder)

    def place(doing: str) -> SyncPoint:
        return SyncPoint(handler="test", phase=doing, step=0)

    found = find_writers(current(), place, LocalStorage(alias), coordinator=2, same_node=True, timeout_s=None)
    assert gather(list(found)) == [[0, 2]] * 3
    job.barrier()
    assert sorted(os.listdir(tmp_path)) == ["alias0", "alias1", "alias2", "elsewhere"]


@run_distributed(world_size=2)
def test_another_share_write_finds_the_writers_anew(tmp_path: Path) -> None:
    one, saver = Job(), DiskSaver(tmp_path, share_write="node")
    handler = Checkpoint(one.to_save(), saver)
    for share_write, writes in (("node", [True, False]), ("world", [True, True])):
        saver.share_write = share_write  # type: ignore[assignment]  # one of its values
        one.trainer.state.iteration += 1
        with noted_writes() as lengths, pytest.MonkeyPatch.context() as patch:
            patch.setattr(current(), "node", job.rank())
            handler(one.trainer)
        assert gather(len(lengths) > 0) == writes


@MODES
@run_distributed(world_size=2)
def test_parameter_that_differs_between_ranks_is_named(tmp_path: Path, *, background: bool) -> None:
    one = Job()
    saver = DiskSaver(tmp_path, share_write="node", check_replicas=True, background=background)
    handler = Checkpoint(one.to_save(), saver)
    one.trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    one.trainer.run([0])
    if job.rank() == 1:
        with torch.no_grad():
            one.model.module[2].weight[3, 4] += 1e-6
    error = raised(lambda: one.trainer.run([0], max_epochs=2))
    assert isinstance(error, ReplicasDiffer)
    assert "between rank 1 and rank 0: the first tensor that differs is model.2.weight" in str(error)
    job.barrier()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_1.pt"]
    job.barrier()
    saver.check_replicas = False
    handler(one.trainer)
    handler.wait_until_finished()
    assert gather(Path(str(handler.last_checkpoint)).name) == ["checkpoint_2.pt"] * 2


@run_distributed(world_size=2)
def test_replicas_are_storages_known_to_be_equal() -> None:
    one = Job(4)
    one.trainer.run([0])
    parameters = dict(one.model.module.named_parameters())
    states = [value for state in one.optimizer.state.values() for value in state.values()]
    expected = {tensor.untyped_storage()._cdata for tensor in (*parameters.values(), *states)}
    assert find_replicas(one.to_save(), world_size=2) == expected
    assert find_replicas({"deep": [one.model, {"o": one.optimizer}]}, world_size=2) == expected
    assert find_replicas({"model": one.model.module, "optimizer": one.optimizer}, world_size=2) == frozenset()
    assert find_replicas({"optimizer": one.optimizer}, world_size=2) == frozenset()
    assert find_replicas({"model": one.model}, world_size=3) == frozenset(), "of a smaller group than the job"
    assert find_replicas({"model": torch.compile(one.model)}, world_size=2) == {
        parameter.untyped_storage()._cdata for parameter in parameters.values()
    }


@run_distributed(world_size=2)
def test_parameter_in_a_larger_storage_is_no_replica() -> None:
    module = nn.Linear(4, 4)
    memory = torch.zeros(100)
    module.weight.data = memory[:16].view(4, 4)
    wrapped = DistributedDataParallel(module)
    found = find_replicas({"model": wrapped}, world_size=2)
    assert found == {module.bias.untyped_storage()._cdata}


@run_distributed(world_size=2)
def test_post_local_sgd_has_no_replicas() -> None:
    wrapped = DistributedDataParallel(nn.Linear(2, 2))
    make: Any = hooks.PostLocalSGDState
    state = make(process_group=None, subgroup=None, start_localSGD_iter=1)
    wrapped.register_comm_hook(state, hooks.post_localSGD_hook)
    assert find_replicas({"model": wrapped}, world_size=2) == frozenset()


@run_distributed(world_size=2)
def test_names_that_leave_the_directory_are_refused_on_all_ranks(tmp_path: Path) -> None:
    one = Job(4)
    handler = Checkpoint(
        one.to_save(), DiskSaver(tmp_path, share_write="node"), filename_pattern="../{name}_{global_step}.{ext}"
    )
    error = raised(lambda: handler(one.trainer))
    assert all_equal(gather(str(error)))
    assert isinstance(error, ValueError)
    assert os.listdir(tmp_path) == []
    assert threading.active_count() < 50
    assert training_step() == job.world_size()
