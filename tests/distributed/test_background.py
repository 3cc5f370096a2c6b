"""A save beside training, on several ranks: all of them take it over, or hear of its error, in the same iteration."""

import contextlib
import errno
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch.distributed.optim import ZeroRedundancyOptimizer

from distckpt import Checkpoint, CheckpointEvents, DiskSaver, Preemption, RemoteRankError, RngState, TerminateOnNan
from distckpt.ptformat.reader import verify
from distckpt.storage.direct_io import DirectFile
from tests.distributed.failures import Stateful
from tests.distributed.programs import all_equal, gather, logged, model_of, raised, training_step
from tests.support import fresh_ranks, job, run_distributed
from tests.support.limits import PROGRAM_LIMIT_S
from tests.support.selection import torch_only

WORLDS = pytest.mark.parametrize("world_size", [2, 3])


@contextlib.contextmanager
def slow_disk(rank: int, until: str, error: OSError | None = None) -> Iterator[None]:
    """Let the saving rank's bytes reach the disk only when a key is in the job's store; with an error, if one is given.

    It is the only one that writes: ranks may be threads of one process.
    """
    if job.rank() != rank:
        yield
        return
    store, write = job.store(), DirectFile.write

    def held(self: DirectFile, data: memoryview, offset: int) -> None:
        if threading.current_thread().name.startswith("distckpt-writer"):
            # Not store.wait: it would keep this rank's other threads from the store.
            deadline = time.monotonic() + PROGRAM_LIMIT_S
            while not store.check([until]) and time.monotonic() < deadline:
                time.sleep(0.01)
            if error is not None:
                raise error
        write(self, data, offset)

    setattr(DirectFile, "write", held)  # noqa: B010 - as a test's patch, mypy would ask for more
    try:
        yield
    finally:
        setattr(DirectFile, "write", write)  # noqa: B010 - as above


def saver(folder: Path, **kwargs: Any) -> DiskSaver:
    return DiskSaver(folder, background=True, **kwargs)


def trainer_that_notes(handler: Checkpoint, seen: list[tuple[int, str | None, bool]]) -> Engine:
    """Return an engine that trains, and notes before each iteration what the handler says."""
    trainer = Engine(training_step)

    @trainer.on(Events.ITERATION_STARTED)
    def note(engine: Engine) -> None:
        last = handler.last_checkpoint
        seen.append((engine.state.iteration, None if last is None else Path(last).name, handler.has_pending_save))

    return trainer


@run_distributed(world_size=2)
def test_ranks_train_on_while_one_writes_and_take_over_in_the_same_iteration(tmp_path: Path) -> None:
    obj, seen, told = Stateful(), list[tuple[int, str | None, bool]](), list[int]()
    handler = Checkpoint({"obj": obj}, saver(tmp_path))
    trainer = trainer_that_notes(handler, seen)
    trainer.register_events(*CheckpointEvents)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), handler)
    trainer.add_event_handler(CheckpointEvents.SAVED_CHECKPOINT, lambda engine: told.append(engine.state.iteration))

    @trainer.on(Events.ITERATION_STARTED(once=6))
    def open_it() -> None:
        job.barrier()
        assert handler.has_pending_save
        assert handler.last_checkpoint is None
        if job.rank() == 0:
            assert not (tmp_path / "obj_2.pt").exists()
            job.store().set("written", "1")

    @trainer.on(Events.ITERATION_STARTED(once=7))
    def let_it_be_written() -> None:
        pending = handler._background_saves._pending
        if pending is not None:
            pending.wait_local()
        job.barrier()

    with slow_disk(0, "written"):
        trainer.run([0] * 9)
    assert all_equal(gather(seen))
    assert all_equal(gather(told))
    assert told[0] in (6, 7)
    assert seen[5] == (6, None, True)
    assert seen[-1] == (9, "obj_2.pt", False)
    verify(tmp_path / "obj_2.pt")


@run_distributed(world_size=3)
def test_an_error_on_the_saving_rank_is_everybodys_and_the_one_before_stands(tmp_path: Path) -> None:
    obj = Stateful()
    handler = Checkpoint({"obj": obj}, saver(tmp_path))
    trainer = Engine(training_step)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=3), handler)
    trainer.run([0] * 3)

    @trainer.on(Events.ITERATION_STARTED(once=8))
    def break_it() -> None:
        if job.rank() == 0:
            job.store().set("fail", "1")
        pending = handler._background_saves._pending
        assert pending is not None
        pending.wait_local()
        job.barrier()

    full = OSError(errno.ENOSPC, "No space left on device")
    with slow_disk(0, "fail", full), pytest.raises(RemoteRankError) as caught:
        trainer.run([0] * 3, max_epochs=4)
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == errno.ENOSPC
    assert "obj_3.pt is intact" in str(caught.value)
    assert gather(trainer.state.iteration) == [8, 8, 8]
    assert gather(Path(str(handler.last_checkpoint)).name) == ["obj_3.pt"] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["obj_3.pt"]
    handler(trainer)
    handler.wait_until_finished()
    assert gather(Path(str(handler.last_checkpoint)).name) == ["obj_8.pt"] * 3


@run_distributed(world_size=2)
def test_the_end_of_a_run_waits_on_all_ranks(tmp_path: Path) -> None:
    handler = Checkpoint({"obj": Stateful()}, saver(tmp_path, when_busy="skip"), n_saved=None)
    trainer = Engine(training_step)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    found: list[str] = []
    trainer.add_event_handler(Events.COMPLETED, lambda _: found.append(Path(str(handler.last_checkpoint)).name))
    let_go = threading.Timer(0.3, lambda store: store.set("written", "1"), [job.store()])
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda _: let_go.start())
    with slow_disk(0, "written"):
        trainer.run([0] * 4)
    assert found == ["obj_1.pt"]
    assert all_equal(gather(found))
    job.barrier()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["obj_1.pt"]


@run_distributed(world_size=2)
def test_an_exception_on_all_ranks_waits_and_takes_over(tmp_path: Path) -> None:
    obj = Stateful()
    handler = Checkpoint({"obj": obj}, saver(tmp_path))
    other = Checkpoint({"obj": obj}, DiskSaver(tmp_path / "other"))
    trainer = Engine(training_step)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), handler)

    @trainer.on(Events.ITERATION_STARTED(once=2))
    def break_it() -> None:
        if job.rank() == 1:
            obj.failure = ArithmeticError("no state")

    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), other)
    with slow_disk(0, "written"):
        threading.Timer(0.3, lambda store: store.set("written", "1"), [job.store()]).start()
        with pytest.raises(ArithmeticError):
            trainer.run([0] * 4)
    assert gather(Path(str(handler.last_checkpoint)).name) == ["obj_1.pt"] * 2


@pytest.mark.parametrize("culprit", [0, 1])
@run_distributed(world_size=2)
def test_a_save_under_way_as_one_rank_fails_is_logged_by_the_rank_that_commits_it(tmp_path: Path, culprit: int) -> None:
    def step(engine: Engine, _batch: Any) -> None:
        if engine.state.iteration == 2 and job.rank() == culprit:
            job.store().set("written", "1")
            raise ArithmeticError("alone")

    trainer, handler = Engine(step), Checkpoint({"obj": Stateful()}, saver(tmp_path))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), handler)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    with slow_disk(0, "written"), logged("distckpt", logging.WARNING) as messages:
        assert raised(lambda: trainer.run([0] * 4)) is not None
    told = gather([one for one in messages if one.startswith("Checkpoint")])
    assert told == [["Checkpoint: obj_1.pt was being saved as the run failed, and is on the disk"], []]
    assert [path.name for path in tmp_path.iterdir()] == ["obj_1.pt"]


def fail_alone(folder: Path, which: int) -> str:
    """Fail on one rank while a slow save is under way on rank 0; return what was raised, if somebody lives to tell."""
    handler = Checkpoint({"obj": Stateful()}, saver(folder))
    write = DirectFile.write

    def slowly(self: DirectFile, data: memoryview, offset: int) -> None:
        time.sleep(2.5)
        write(self, data, offset)

    setattr(DirectFile, "write", slowly)  # noqa: B010 - as a test's patch, mypy would ask for more

    def step(engine: Engine, _batch: Any) -> float:
        if engine.state.iteration == 3 and job.rank() == which:
            raise ArithmeticError("alone")
        return training_step()

    trainer = Engine(step)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), handler)
    try:
        trainer.run([0] * 4)
    except Exception as error:  # noqa: BLE001 - whatever it is, the test looks at it
        assert not handler.has_pending_save
        return type(error).__name__
    return ""


@torch_only
@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_fails_alone_leaves_a_whole_file(tmp_path: Path, which: int) -> None:
    # The rank that is left hangs in its own collective: it is ended by force, and not before it has written.
    with fresh_ranks(fail_alone, 2, tmp_path, which) as ranks:
        ends = ranks.finish(may_fail=[0, 1])
    assert ends[which].value == "ArithmeticError"
    assert ends[1 - which].exit_code == 70
    assert [path.name for path in tmp_path.iterdir()] == ["obj_2.pt"]
    verify(tmp_path / "obj_2.pt")


def leave_alone(folder: Path) -> tuple[str, float]:
    """Leave the run on rank 1 while a save is pending; return what was raised, and after how many seconds."""
    handler = Checkpoint({"obj": Stateful()}, saver(folder), timeout_s=3.0)
    trainer = Engine(lambda _engine, _batch: training_step())
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), handler)
    left_s: list[float] = []

    @trainer.on(Events.ITERATION_COMPLETED(once=4))
    def leave(engine: Engine) -> None:
        if job.rank() == 1:
            engine.terminate()
            left_s.append(time.monotonic())

    try:
        trainer.run([0] * 8)
    except Exception as error:  # noqa: BLE001 - whatever it is, the test looks at it
        return f"{type(error).__name__}: {error}", time.monotonic() - left_s[0]
    return "", 0.0


@torch_only
def test_a_rank_that_leaves_its_run_while_a_save_is_pending_learns_in_time_that_it_is_alone(tmp_path: Path) -> None:
    with fresh_ranks(leave_alone, 2, tmp_path, env={"DISTCKPT_TIMEOUT_S": "3"}) as ranks:
        ends = ranks.finish(may_fail=[0])
    text, after_s = ends[1].value
    assert "rank 0" in text
    assert after_s < 20.0
    verify(tmp_path / "obj_4.pt")


@WORLDS
@pytest.mark.parametrize("lag", [0, 1])
def test_all_ranks_agree_whatever_the_vote_s_pace(tmp_path: Path, world_size: int, lag: int) -> None:
    paced(world_size, tmp_path, lag)


def paced(world_size: int, folder: Path, lag: int) -> None:
    run_distributed(world_size=world_size)(train_at_a_pace)(folder, lag)


def train_at_a_pace(folder: Path, lag: int) -> None:
    seen: list[tuple[int, str | None, bool]] = []
    handler = Checkpoint({"obj": Stateful()}, saver(folder), n_saved=2)
    trainer = trainer_that_notes(handler, seen)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(lag=lag))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=4), handler)
    trainer.run([0] * 30)
    assert all_equal(gather(seen))
    assert gather(Path(str(handler.last_checkpoint)).name) == ["obj_28.pt"] * job.world_size()
    job.barrier()
    assert sorted(path.name for path in folder.iterdir()) == ["obj_24.pt", "obj_28.pt"]


@run_distributed(world_size=2)
def test_a_preempted_job_ends_with_its_last_iteration_durable(tmp_path: Path) -> None:
    handler = Checkpoint({"obj": Stateful()}, saver(tmp_path, when_busy="skip"), n_saved=None)
    trainer = Engine(training_step)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), handler)
    preemption = Preemption(trainer, handler)

    @trainer.on(Events.ITERATION_STARTED(once=4))
    def tell() -> None:
        if job.rank() == 1:
            preemption._receiver.received = ("SIGUSR1", 0.0)

    with contextlib.closing(preemption):
        trainer.run([0] * 9)
    assert trainer.state.iteration == 4
    assert gather(Path(str(handler.last_checkpoint)).name) == ["obj_4.pt"] * 2


@torch_only
@run_distributed(world_size=2)
def test_a_state_that_is_spread_over_the_ranks_is_gathered_first(tmp_path: Path) -> None:
    model = model_of(1.0)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    trainer = Engine(training_step)
    rng = RngState(trainer)
    handler = Checkpoint({"model": model, "optimizer": optimizer, "rng": rng}, saver(tmp_path))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), handler)
    trainer.run([0] * 3)
    state = torch.load(str(handler.last_checkpoint), weights_only=True)
    assert len(state["optimizer"]["state"]) == 2
    assert torch.equal(state["model"]["weight"], model.weight)
