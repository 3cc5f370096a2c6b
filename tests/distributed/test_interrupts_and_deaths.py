"""A rank that is interrupted or dies: the others hear of it within seconds, and the older checkpoint stands."""

import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from ignite.engine import Engine, Events

from distckpt import Checkpoint, CollectiveError, DiskSaver, RemoteRankError
from distckpt.backends.detect import current
from distckpt.storage.direct_io import DirectFile
from tests.distributed.failures import Stateful, failing_object
from tests.distributed.programs import fire, gather, idle_engine, model_of, raised
from tests.support import fresh_ranks, job, run_distributed, send_to_parent
from tests.support.runtime import RUNTIME
from tests.support.selection import only_on, process_ranks_only, torch_only

SOON_S = 10.0


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt("by hand"), SystemExit(3)], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("culprit", [0, 1])
@run_distributed(world_size=2)
def test_an_interrupt_on_one_rank_stays_one_there_and_is_an_error_on_the_others(
    tmp_path: Path, interrupt: BaseException, culprit: int
) -> None:
    obj = Stateful()
    handler = Checkpoint({"obj": obj}, tmp_path)
    fire(handler)
    with failing_object(obj, interrupt if job.rank() == culprit else ValueError("not raised")):
        if job.rank() == culprit:
            with pytest.raises(type(interrupt)) as caught:
                fire(handler, times=2)
            assert caught.value is interrupt
        else:
            obj.failure = None
            with pytest.raises(RemoteRankError, match=f"{type(interrupt).__name__} on rank {culprit}") as error:
                fire(handler, times=2)
            assert isinstance(error.value, Exception), "which the program may catch"
    job.barrier()
    assert gather(handler.last_checkpoint) == [tmp_path / "obj_1.pt"] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["obj_1.pt"]


@process_ranks_only
@run_distributed(world_size=2)
def test_an_interrupt_in_the_middle_of_a_write_leaves_nothing_temporary(tmp_path: Path) -> None:
    handler = Checkpoint({"obj": Stateful()}, tmp_path)
    engine = fire(handler)
    write = DirectFile.write

    def interrupted_write(self: DirectFile, data: memoryview, offset: int) -> None:
        write(self, data, offset)
        os.kill(os.getpid(), signal.SIGINT)

    DirectFile.write = interrupted_write  # type: ignore[method-assign]
    try:
        error = None
        engine.run([0], max_epochs=2)
    except BaseException as caught:  # noqa: BLE001 - an interrupt is what is looked for
        error = caught
    finally:
        DirectFile.write = write  # type: ignore[method-assign]
    assert isinstance(error, KeyboardInterrupt if job.rank() == 0 else RemoteRankError)
    job.barrier()
    assert [path.name for path in tmp_path.iterdir()] == ["obj_1.pt"]


def train_until_somebody_dies(folder: Path) -> tuple[str, list[int], float]:
    """Save after each iteration, for ever; say how it ended on this rank, and how long that took to notice."""
    handler = Checkpoint({"model": model_of(1.0)}, DiskSaver(folder), n_saved=2)
    engine, since = Engine(lambda _engine, _batch: None), time.monotonic()

    @engine.on(Events.ITERATION_COMPLETED)
    def save() -> None:
        nonlocal since
        if engine.state.iteration == 3:
            send_to_parent("saved twice")
            if current().rank == current().world_size - 1:
                threading.Event().wait()  # killed here, between two saves
        since = time.monotonic()
        handler(engine)

    error = raised(lambda: engine.run([0] * 1000))
    assert isinstance(error, CollectiveError)
    again = time.monotonic()
    assert isinstance(raised(lambda: handler(engine)), CollectiveError), "a later save fails as well"
    assert time.monotonic() - again < SOON_S
    return type(error).__name__, list(error.missing), time.monotonic() - since


@process_ranks_only
@pytest.mark.parametrize("world_size", [2, 3])
def test_survivors_of_a_rank_killed_between_saves_are_told_soon(tmp_path: Path, world_size: int) -> None:
    dead = world_size - 1
    with fresh_ranks(train_until_somebody_dies, world_size, tmp_path) as ranks:
        for rank in range(world_size):
            ranks.receive(rank)
        os.kill(ranks.pid(dead), signal.SIGKILL)
        ends = ranks.finish(may_fail=[dead])
    for end in ends[:dead]:
        error, missing, took_s = end.value
        assert error == "CollectiveError"
        assert missing == [dead]
        assert took_s < SOON_S
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_1.pt", "model_2.pt"]


def die_in_the_write(folder: Path) -> tuple[str, str]:
    """Save once; the saving rank dies in the middle of the second write."""
    handler = Checkpoint({"model": model_of(1.0)}, DiskSaver(folder))
    engine = fire(handler)

    write = DirectFile.write

    def deadly_write(self: DirectFile, data: memoryview, offset: int) -> None:
        write(self, data, offset)
        os.kill(os.getpid(), signal.SIGKILL)

    if current().rank == 0:
        DirectFile.write = deadly_write  # type: ignore[method-assign]
    begin = time.monotonic()
    error = raised(lambda: engine.run([0], max_epochs=2))
    assert time.monotonic() - begin < SOON_S
    last = handler.last_checkpoint
    assert last is not None
    Checkpoint.load_objects({"model": model_of(0.0)}, last)
    return type(error).__name__, str(error)


@process_ranks_only
def test_others_do_not_wait_for_a_saving_rank_that_died_in_the_write(tmp_path: Path) -> None:
    with fresh_ranks(die_in_the_write, 2, tmp_path) as ranks:
        ends = ranks.finish(may_fail=[0])
    assert ends[0].exit_code == -signal.SIGKILL
    name, message = ends[1].value
    assert name == "CollectiveError"
    what = "Checkpoint#0, on EPOCH_COMPLETED, saving model_2.pt"
    if RUNTIME == "horovod":  # rank 0 keeps the notes there: with them goes who came
        assert f"rank 1: lost the job's store during {what}" in message
    else:
        assert f"rank 1: {what}" in message
        assert "rank 0 did not come" in message
    assert (tmp_path / "model_1.pt").exists()
    left = [path.name for path in tmp_path.iterdir() if path.name != "model_1.pt"]
    assert len(left) == 1, "a temporary file, which the next save clears"
    fire(Checkpoint({"model": model_of(1.0)}, DiskSaver(tmp_path, require_empty=False)))
    assert [path.name for path in tmp_path.iterdir()] == ["model_1.pt"]


def freeze_the_last(frozen: Path) -> None:
    """Meet once; the last rank is stopped; the others say what they are told."""
    backend = current()
    backend.barrier()
    send_to_parent("met")
    if backend.rank == backend.world_size - 1:
        threading.Event().wait()
    while not frozen.exists():
        time.sleep(0.01)
    error = raised(lambda: backend.barrier(timeout_s=1.5))
    send_to_parent((type(error).__name__, error.missing if isinstance(error, CollectiveError) else ()))


@only_on("gloo", why="a frozen rank may hold the others in Horovod's own call, and their interpreters with them")
def test_a_frozen_rank_is_named_when_the_limit_is_over(tmp_path: Path) -> None:
    with fresh_ranks(freeze_the_last, 2, tmp_path / "frozen") as ranks:
        assert [ranks.receive(rank) for rank in range(2)] == ["met", "met"]
        os.kill(ranks.pid(1), signal.SIGSTOP)
        (tmp_path / "frozen").touch()
        assert ranks.receive(0) == ("CollectiveTimeout", (1,))


def lose_the_store() -> str:
    """Form a job whose store lives in rank 0, which dies."""
    launcher = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    rank, limit = int(os.environ["RANK"]), timedelta(seconds=30)
    key = f"port of {os.environ['TORCHELASTIC_RESTART_COUNT']}"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit)
        launcher.set(key, str(store.port))
    else:
        port = int(launcher.get(key))
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    backend = current()
    backend.barrier()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(CollectiveError) as caught:
        backend.barrier(timeout_s=60.0)
    assert time.monotonic() - begin < SOON_S
    os._exit(0 if "lost the job's store during barrier" in str(caught.value) else 5)


@torch_only
def test_loss_of_the_jobs_store_is_told_as_such() -> None:
    with fresh_ranks(lose_the_store, 2, backend=None) as ranks:
        ends = ranks.finish(may_fail=[0, 1])
    assert [end.exit_code for end in ends] == [-signal.SIGKILL, 0], ends[1].output


@process_ranks_only
@run_distributed(world_size=2)
def test_a_handler_whose_job_ended_goes_on_in_a_world_of_one(tmp_path: Path) -> None:
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path / str(job.rank()), n_saved=None)
    engine = idle_engine()
    engine.add_event_handler(Events.EPOCH_COMPLETED, handler)
    engine.run([0])
    job.barrier()
    job.leave()
    (tmp_path / "1").mkdir(exist_ok=True)
    engine.run([0], max_epochs=2)
    assert handler.last_checkpoint is not None
    assert handler.last_checkpoint.exists()  # type: ignore[union-attr]  # a path, with a DiskSaver
