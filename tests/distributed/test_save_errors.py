"""An error while saving on one rank is one error on every rank, and the older checkpoint is intact.

The fault of ignite's `Checkpoint`: the rank that fails raises alone, after it removed the older checkpoint; the others
believe that it was saved, or hang in their next collective.
"""

import contextlib
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events

from distckpt import Checkpoint, DiskSaver, RemoteRankError, SaveError
from tests.distributed.failures import FAILURES, LARGE, Stateful
from tests.distributed.programs import (
    HUNG,
    IGNITE,
    OURS,
    all_equal,
    fire,
    gather,
    handlers,
    idle_engine,
    kinds,
    on_ranks,
    raised,
    training_step,
    unless_hung,
)
from tests.support import job, run_distributed

WORLDS = pytest.mark.parametrize("world_size", [2, 3])
KINDS = pytest.mark.parametrize("kind", FAILURES)


def saving_twice(library: str, kind: str, folder: Path, culprit: int) -> tuple[tuple[str, ...], str, list[str]]:
    """Save well, then fail on one rank; return what was raised, what is believed, and what exists."""
    make, _, _ = FAILURES[kind]
    obj, lib = Stateful(), handlers(library)
    handler = lib.Checkpoint({"obj": obj}, lib.DiskSaver(folder))
    engine = fire(handler)
    job.barrier()
    with make(folder, obj) if job.rank() == culprit else contextlib.nullcontext():
        error = raised(lambda: engine.run([0], max_epochs=2))
        job.barrier()
    job.barrier()
    return kinds(error), str(handler.last_checkpoint.name), sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["full disk", "state that cannot be pickled"])
def test_ignite_raises_on_one_rank_and_has_removed_the_older_checkpoint(tmp_path: Path, kind: str) -> None:
    (error, _, files), (others_error, believed, _) = on_ranks(saving_twice, IGNITE, 2, kind, tmp_path / "ckpt", 0)
    assert error
    assert not others_error
    assert believed == "obj_2.pt"
    assert files == []


@WORLDS
@KINDS
def test_error_on_the_saving_rank_is_raised_on_all_and_the_older_checkpoint_stands(
    tmp_path: Path, kind: str, world_size: int
) -> None:
    ends = on_ranks(saving_twice, OURS, world_size, kind, tmp_path / "ckpt", 0)
    assert all_equal(ends)
    error, *rest = ends[0]
    assert {"RemoteRankError", FAILURES[kind][1].__name__} <= set(error)
    assert rest == ["obj_1.pt", ["obj_1.pt"]]


@WORLDS
def test_error_on_another_rank_is_raised_on_all_and_nothing_is_saved(tmp_path: Path, world_size: int) -> None:
    ends = on_ranks(saving_twice, OURS, world_size, "state that cannot be told", tmp_path / "ckpt", world_size - 1)
    assert all_equal(ends)
    error, *rest = ends[0]
    assert {"RemoteRankError", "ArithmeticError"} <= set(error)
    assert rest == ["obj_1.pt", ["obj_1.pt"]]


def failing_in_training(library: str, folder: Path, culprit: int) -> str:
    """Train and save after each epoch; the object of one rank breaks in the second."""
    obj, lib, trainer = Stateful(), handlers(library), Engine(training_step)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lib.Checkpoint({"obj": obj}, lib.DiskSaver(folder)))

    @trainer.on(Events.EPOCH_STARTED(once=2))
    def break_it() -> None:
        if job.rank() == culprit:
            obj.failure = ZeroDivisionError("no state")

    def run() -> str:
        try:
            trainer.run([0, 0], max_epochs=4)
        except ArithmeticError as error:
            return "RemoteRankError" if isinstance(error, RemoteRankError) else type(error).__name__
        return "done"

    return unless_hung(run)


@pytest.mark.parametrize("culprit", [0, 1])
def test_ignites_other_ranks_hang_after_an_error_on_one(tmp_path: Path, culprit: int) -> None:
    ends = on_ranks(failing_in_training, IGNITE, 2, tmp_path, culprit)
    assert ends[culprit] == "ZeroDivisionError"
    assert ends[1 - culprit] == HUNG


@pytest.mark.parametrize("culprit", [0, 1])
def test_no_rank_hangs_after_an_error_on_one(tmp_path: Path, culprit: int) -> None:
    assert on_ranks(failing_in_training, OURS, 2, tmp_path, culprit) == ["RemoteRankError"] * 2


@KINDS
@run_distributed(world_size=2)
def test_error_has_the_causes_type_and_says_rank_step_place_and_cause(tmp_path: Path, kind: str) -> None:
    make, expected, told = FAILURES[kind]
    folder, obj = tmp_path / "ckpt", Stateful()
    handler = Checkpoint({"obj": obj}, DiskSaver(folder))
    engine = fire(handler)
    with make(folder, obj) if job.rank() == 0 else contextlib.nullcontext():
        error = raised(lambda: engine.run([0], max_epochs=2))
        job.barrier()
    assert isinstance(error, RemoteRankError)
    assert isinstance(error, expected)
    message = str(error)
    assert told in message
    assert "on rank 0, while: Checkpoint#0, on EPOCH_COMPLETED" in message
    assert "obj_2.pt, step 2, of 2 ranks)" in message
    if isinstance(error, OSError):
        assert isinstance(error, SaveError)
        assert message.startswith("rank 0, step 2: ")
        assert str(folder) in message
        assert ("obj_1.pt is intact." in message) is (kind == "full disk"), "one that is gone vouches for nothing"
        assert error.errno is not None
    assert gather((kinds(error), message)) == [(kinds(error), message)] * 2
    assert gather(error.tracebacks()) == [error.tracebacks()] * 2
    assert "--- rank 0 ---\nTraceback (most recent call last):" in error.tracebacks()
    assert (error.__cause__ is None) is (job.rank() == 1), "its own exception, on the rank that failed"


@KINDS
@run_distributed(world_size=2)
def test_what_stood_before_loads_and_the_next_save_works(tmp_path: Path, kind: str) -> None:
    make, expected, _ = FAILURES[kind]
    folder, obj = tmp_path / "ckpt", Stateful(1.0)
    handler = Checkpoint({"obj": obj}, DiskSaver(folder))
    engine = fire(handler)
    with make(folder, obj) if job.rank() == 0 else contextlib.nullcontext():
        with pytest.raises(expected):
            engine.run([0], max_epochs=2)
        job.barrier()
    job.barrier()
    twin, path = Stateful(0.0), handler.last_checkpoint
    assert path == folder / "obj_1.pt"
    Checkpoint.load_objects({"obj": twin}, path)
    assert torch.equal(twin.state["value"], torch.ones(LARGE))
    job.barrier()
    fire(handler, times=3)
    job.barrier()
    assert gather(handler.last_checkpoint) == [folder / "obj_3.pt"] * 2
    assert [entry.name for entry in folder.iterdir()] == ["obj_3.pt"], "and nothing temporary stays"


@run_distributed(world_size=2)
def test_errors_of_several_ranks_are_told_together(tmp_path: Path) -> None:
    obj = Stateful()
    obj.failure = [ValueError("mine"), KeyError("another")][job.rank()]
    error = raised(lambda: fire(Checkpoint({"obj": obj}, tmp_path)))
    assert isinstance(error, RemoteRankError)
    assert isinstance(error, ValueError), "the lowest rank's leads"
    assert [failure.rank for failure in error.failures] == [0, 1]
    assert "rank 1: KeyError: 'another'" in str(error)
    assert gather(str(error)) == [str(error)] * 2
    assert isinstance(error.__cause__, [ValueError, KeyError][job.rank()])


@run_distributed(world_size=2)
def test_same_error_on_every_rank_is_told_once(tmp_path: Path) -> None:
    obj = Stateful()
    obj.failure = ValueError("no state anywhere")
    error = raised(lambda: fire(Checkpoint({"obj": obj}, tmp_path)))
    assert isinstance(error, RemoteRankError)
    assert str(error).count("no state anywhere") == 1
    assert "ValueError on rank 0, 1" in str(error)


@run_distributed(world_size=2)
def test_option_that_torch_save_does_not_have_is_a_type_error_on_every_rank(tmp_path: Path) -> None:
    handler = Checkpoint({"obj": Stateful()}, DiskSaver(tmp_path, compresslevel=9))
    with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'compresslevel'") as caught:
        fire(handler)
    assert gather(str(caught.value)) == [str(caught.value)] * 2
    assert list(tmp_path.iterdir()) == []


@run_distributed(world_size=2)
def test_a_failed_save_counts_for_nothing(tmp_path: Path) -> None:
    obj, fired = Stateful(), []
    handler = Checkpoint({"obj": obj}, tmp_path)
    engine = idle_engine()
    engine.add_event_handler(Events.EPOCH_COMPLETED, handler)
    engine.add_event_handler(Checkpoint.SAVED_CHECKPOINT, lambda: fired.append(1))
    obj.failure = ValueError("no state") if job.rank() == 1 else None
    with pytest.raises(ValueError, match="no state"):
        engine.run([0], max_epochs=1)
    assert gather((handler.last_checkpoint, handler.state_dict()["_saved"], fired)) == [(None, [], [])] * 2
