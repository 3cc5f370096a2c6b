"""A save on EXCEPTION_RAISED: the saving rank saves alone, and every rank ends soon with the user's own error."""

import functools
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Average
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from distckpt import Checkpoint, DiskSaver, ModelCheckpoint, RemoteRankError, RngState, TerminateOnNan
from distckpt.storage.direct_io import DirectFile
from tests.distributed.failures import Stateful
from tests.distributed.idist import fresh_idist
from tests.distributed.programs import gather, raised
from tests.support import fresh_ranks, job, run_distributed, send_to_parent
from tests.support.selection import torch_only

pytestmark = torch_only

SOON_S = 10.0
LIMIT_S = 60.0
"""No test lasts until a rank has waited in vain."""
AT = 3
SAVERS: dict[str, dict[str, Any]] = {
    "foreground": {},
    "background": {"background": True},
    "shared": {"share_write": "node"},
}


class OwnError(ValueError):
    """A program's own error."""


class Weights:
    """An object whose state is the iteration."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the iteration."""
        return {"value": torch.tensor(self.value)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it over."""
        self.value = int(state["value"])


def trainer_of(error: BaseException | None, *, weights: Weights | None = None, votes: bool = True) -> Engine:
    """Return a trainer whose step raises `error` at iteration `AT`."""

    def step(engine: Engine, _batch: object) -> float:
        if error is not None and engine.state.iteration == AT:
            raise error
        if weights is not None:
            weights.value = engine.state.iteration
        return 0.0

    trainer = Engine(step)
    trainer.add_event_handler(Events.STARTED, job.barrier)  # a rank may save alone: all have their savers
    if votes:
        trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S))
    return trainer


def save_and_raise(checkpoint: Callable[[Engine], None]) -> Callable[[Engine, BaseException], None]:
    """Return what a user attaches to EXCEPTION_RAISED."""

    def handle(engine: Engine, error: BaseException) -> None:
        checkpoint(engine)
        raise error

    return handle


def pausing(seconds: float) -> Callable[[], None]:
    """Return a handler that lets the other ranks wait."""
    return lambda: time.sleep(seconds)


def stored(folder: Path) -> dict[str, Any]:
    """Return what the files in a folder hold."""
    return {path.name: torch.load(path, weights_only=True) for path in folder.iterdir()}


def check_raised(error: BaseException | None, own: BaseException, culprit: int, begin_s: float) -> None:
    """Check that a rank has ended soon, with its own error or as the others do."""
    assert time.monotonic() - begin_s < SOON_S
    if job.rank() == culprit:
        assert error is own
    else:
        assert isinstance(error, RemoteRankError)
        assert isinstance(error, ValueError) is isinstance(own, ValueError)
        assert str(error).startswith(f"{own} ({type(own).__name__} on rank {culprit}, ".lstrip())
        assert [failure.rank for failure in error.failures] == [culprit]


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("how", ["a user's function", "attached itself"])
@pytest.mark.parametrize("culprit", [0, 1])
@run_distributed(world_size=2)
def test_one_rank_raises_and_all_end_with_its_error(tmp_path: Path, culprit: int, how: str, saver: str) -> None:
    own, weights = OwnError("boom"), Weights()
    trainer = trainer_of(own if job.rank() == culprit else None, weights=weights)
    checkpoint = Checkpoint({"weights": weights}, DiskSaver(tmp_path, **SAVERS[saver]), timeout_s=LIMIT_S)
    handler = save_and_raise(checkpoint) if how == "a user's function" else checkpoint
    trainer.add_event_handler(Events.EXCEPTION_RAISED, handler)
    begin_s = time.monotonic()
    check_raised(raised(lambda: trainer.run([0] * 9, max_epochs=2)), own, culprit, begin_s)
    job.barrier()
    assert list(stored(tmp_path)) == [f"weights_{AT}.pt"], "the saving rank saves, whoever raised"
    if culprit == 0:
        assert stored(tmp_path)[f"weights_{AT}.pt"]["value"] == AT - 1
    if job.rank() == 0:
        assert checkpoint.last_checkpoint == tmp_path / f"weights_{AT}.pt"


@pytest.mark.parametrize("save_on_rank", [0, 1])
@run_distributed(world_size=2)
def test_all_ranks_raise_at_once(tmp_path: Path, save_on_rank: int) -> None:
    own = OwnError(f"boom of rank {job.rank()}")
    trainer = trainer_of(own, votes=False)
    saver = DiskSaver(tmp_path, save_on_rank=save_on_rank)
    checkpoint = Checkpoint({"model": nn.Linear(1, 1), "trainer": trainer}, saver, timeout_s=LIMIT_S)
    trainer.add_event_handler(Events.EXCEPTION_RAISED, save_and_raise(checkpoint))
    job.barrier()  # the first rank that raises saves at once, and a saver wants an empty directory
    begin_s = time.monotonic()
    assert raised(lambda: trainer.run([0] * 9)) is own
    assert time.monotonic() - begin_s < SOON_S
    job.barrier()
    assert list(stored(tmp_path)) == [f"checkpoint_{AT}.pt"]


@pytest.mark.parametrize("culprit", [0, 1])
@run_distributed(world_size=2)
def test_an_interrupt_of_one_rank_is_one_there(tmp_path: Path, culprit: int) -> None:
    own = KeyboardInterrupt()
    trainer = trainer_of(own if job.rank() == culprit else None)
    checkpoint = Checkpoint({"model": nn.Linear(1, 1)}, tmp_path, timeout_s=LIMIT_S)
    trainer.add_event_handler(Events.EXCEPTION_RAISED, save_and_raise(checkpoint))
    begin_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt if job.rank() == culprit else RemoteRankError) as caught:
        trainer.run([0] * 9)
    check_raised(caught.value, own, culprit, begin_s)
    job.barrier()
    assert list(stored(tmp_path)) == [f"model_{AT}.pt"]


@run_distributed(world_size=2)
def test_a_run_whose_handler_catches_the_error_goes_on_with_one_history(tmp_path: Path) -> None:
    trainer = trainer_of(OwnError("on all ranks alike"), votes=False)
    checkpoint = Checkpoint({"model": nn.Linear(1, 1)}, tmp_path, n_saved=None, timeout_s=LIMIT_S)
    trainer.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, _error: checkpoint(engine))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)
    trainer.run([0] * AT, max_epochs=2)
    assert gather(trainer.state.epoch) == [2, 2], "as with ignite's"
    job.barrier()
    names = [f"model_{AT}.pt", f"model_{2 * AT}.pt"]
    assert sorted(stored(tmp_path)) == names
    assert gather([name for _, name in checkpoint.state_dict()["_saved"]]) == [names] * 2


@pytest.mark.parametrize("votes", [False, True])
@run_distributed(world_size=2)
def test_a_program_whose_ranks_all_catch_their_errors_runs_again(tmp_path: Path, *, votes: bool) -> None:
    checkpoint = Checkpoint({"model": nn.Linear(1, 1)}, tmp_path, n_saved=None, timeout_s=LIMIT_S)
    for attempt in range(3):
        own = OwnError(f"boom {attempt}")
        trainer = trainer_of(own if attempt < 2 else None, votes=votes)
        trainer.add_event_handler(Events.EXCEPTION_RAISED, save_and_raise(checkpoint))
        trainer.add_event_handler(Events.EPOCH_STARTED, pausing(1.5 * (attempt == job.rank())))
        trainer.add_event_handler(Events.EPOCH_STARTED, checkpoint)  # for which one rank is late
        error = raised(functools.partial(trainer.run, [0] * (AT + 1 + attempt)))
        assert error is (own if attempt < 2 else None)
        job.barrier()
    assert f"model_{AT}.pt" in stored(tmp_path)


@run_distributed(world_size=2)
def test_what_is_saved_in_the_background_is_ended_first(tmp_path: Path) -> None:
    weights, own = Weights(), OwnError("boom")
    trainer = trainer_of(own if job.rank() == 0 else None, weights=weights)
    saver = DiskSaver(tmp_path, background=True)
    checkpoint = Checkpoint({"weights": weights}, saver, n_saved=None, timeout_s=LIMIT_S)
    trainer.add_event_handler(Events.ITERATION_STARTED(once=AT), checkpoint)
    trainer.add_event_handler(Events.EXCEPTION_RAISED, lambda _error: checkpoint.wait_until_finished())
    trainer.add_event_handler(Events.EXCEPTION_RAISED, save_and_raise(checkpoint))
    begin_s = time.monotonic()
    check_raised(raised(lambda: trainer.run([0] * 9)), own, 0, begin_s)
    job.barrier()
    assert stored(tmp_path)[f"weights_{AT}.pt"]["value"] == AT - 1


@pytest.mark.parametrize("what", ["ZeroRedundancyOptimizer", "metric"])
@run_distributed(world_size=2)
def test_what_one_rank_cannot_capture_is_refused_in_words_beside_the_users_error(tmp_path: Path, what: str) -> None:
    with fresh_idist():
        model, own = nn.Linear(1, 1), OwnError("boom")
        spread: Any = (
            Average()
            if what == "metric"
            else ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.SGD, lr=0.5)
        )
        trainer = trainer_of(own if job.rank() == 0 else None)
        to_save = {"model": model, "parts": [spread]}
        checkpoint = Checkpoint(to_save, DiskSaver(tmp_path), timeout_s=LIMIT_S)
        trainer.add_event_handler(Events.EXCEPTION_RAISED, save_and_raise(checkpoint))
        begin_s = time.monotonic()
        check_raised(raised(lambda: trainer.run([0] * 9)), own, 0, begin_s)
        assert list(tmp_path.iterdir()) == []
        if job.rank() == 0:
            assert f"rank 0, iteration {AT}: no checkpoint was saved for this error" in own.__notes__[0]
            assert f"the state of to_save['parts[0]'] ({type(spread).__name__}) is sharded over the ranks" in str(
                own.__notes__
            )


@run_distributed(world_size=2)
def test_the_random_states_of_the_rank_that_saves_are_saved(tmp_path: Path) -> None:
    own = OwnError("boom")
    trainer = trainer_of(own if job.rank() == 0 else None)
    checkpoint = Checkpoint({"rng": RngState(), "model": nn.Linear(1, 1)}, tmp_path, timeout_s=LIMIT_S)
    trainer.add_event_handler(Events.EXCEPTION_RAISED, save_and_raise(checkpoint))
    begin_s = time.monotonic()
    check_raised(raised(lambda: trainer.run([0] * 9)), own, 0, begin_s)
    job.barrier()
    assert list(stored(tmp_path)[f"checkpoint_{AT}.pt"]["rng"]["ranks"]) == [0]


@run_distributed(world_size=2)
def test_a_disk_that_fails_does_not_hide_the_users_error(tmp_path: Path) -> None:
    own = OwnError("boom")
    trainer = trainer_of(own if job.rank() == 0 else None)
    checkpoint = Checkpoint({"model": nn.Linear(1, 1)}, tmp_path, timeout_s=LIMIT_S)
    trainer.add_event_handler(Events.EPOCH_STARTED, checkpoint)
    trainer.add_event_handler(Events.EXCEPTION_RAISED, save_and_raise(checkpoint))

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    write = DirectFile.write
    trainer.add_event_handler(Events.ITERATION_STARTED(once=AT), lambda: setattr(DirectFile, "write", full))
    begin_s = time.monotonic()
    try:
        check_raised(raised(lambda: trainer.run([0] * 9)), own, 0, begin_s)
    finally:
        DirectFile.write = write  # type: ignore[method-assign]
    job.barrier()
    assert list(stored(tmp_path)) == ["model_0.pt"]
    if job.rank() == 0:
        assert "No space left" in own.__notes__[0]
        assert f"The last one is {tmp_path / 'model_0.pt'}." in own.__notes__[0]


@run_distributed(world_size=2)
def test_an_error_of_a_save_that_all_ranks_raise_is_handled_on_all(tmp_path: Path) -> None:
    bad, model = Stateful(), nn.Linear(1, 1)
    bad.failure = OwnError("boom") if job.rank() == 1 else None
    trainer = trainer_of(None)
    failing = Checkpoint({"bad": bad}, DiskSaver(tmp_path / "failing"), timeout_s=LIMIT_S)
    rescue = Checkpoint({"model": model}, DiskSaver(tmp_path / "rescue"), timeout_s=LIMIT_S)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=AT), failing)
    trainer.add_event_handler(Events.EXCEPTION_RAISED, save_and_raise(rescue))
    begin_s = time.monotonic()
    error = raised(lambda: trainer.run([0] * 9))
    assert time.monotonic() - begin_s < SOON_S
    assert isinstance(error, RemoteRankError)
    assert [failure.rank for failure in error.failures] == [1]
    job.barrier()
    assert list(stored(tmp_path / "rescue")) == [f"model_{AT}.pt"]


@run_distributed(world_size=2)
def test_an_evaluators_error_saves_the_trainer_that_is_around_it(tmp_path: Path) -> None:
    own = OwnError("boom")
    trainer, evaluator = trainer_of(None), trainer_of(own if job.rank() == 1 else None, votes=False)
    checkpoint = ModelCheckpoint(tmp_path, "best", timeout_s=LIMIT_S)
    evaluator.add_event_handler(
        Events.EXCEPTION_RAISED, save_and_raise(lambda _: checkpoint(trainer, {"model": nn.Linear(1, 1)}))
    )
    trainer.add_event_handler(Events.EXCEPTION_RAISED, save_and_raise(lambda _: checkpoint(trainer, {"m": Stateful()})))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=AT), lambda: evaluator.run([0] * 9))
    begin_s = time.monotonic()
    check_raised(raised(lambda: trainer.run([0] * 9)), own, 1, begin_s)
    job.barrier()
    assert len(stored(tmp_path)) == 1, "on rank 0, which the error comes to in its next vote"


@run_distributed(world_size=2)
def test_a_custom_save_handler_is_called_where_the_error_is_handled() -> None:
    own, names = OwnError("boom"), list[str]()
    trainer = trainer_of(own if job.rank() == 1 else None)

    def save(_checkpoint: object, filename: str, _metadata: object) -> None:
        names.append(filename)

    checkpoint = Checkpoint({"model": nn.Linear(1, 1)}, save, timeout_s=LIMIT_S)
    trainer.add_event_handler(Events.EXCEPTION_RAISED, save_and_raise(checkpoint))
    begin_s = time.monotonic()
    check_raised(raised(lambda: trainer.run([0] * 9)), own, 1, begin_s)
    assert gather(names) == [[f"model_{AT}.pt"]] * 2


# -- without a handler that votes ----------------------------------------------------------------------


@pytest.mark.parametrize("culprit", [0, 1])
@run_distributed(world_size=2)
def test_without_heartbeats_the_others_hear_of_the_error_in_their_next_save(tmp_path: Path, culprit: int) -> None:
    own = OwnError("boom")
    trainer = trainer_of(own if job.rank() == culprit else None, votes=False)
    checkpoint = Checkpoint({"model": nn.Linear(1, 1)}, tmp_path, n_saved=None, timeout_s=LIMIT_S)
    trainer.add_event_handler(Events.EPOCH_STARTED, checkpoint)
    trainer.add_event_handler(Events.EXCEPTION_RAISED, save_and_raise(checkpoint))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)
    begin_s = time.monotonic()
    check_raised(raised(lambda: trainer.run([0] * 9)), own, culprit, begin_s)
    job.barrier()
    assert sorted(stored(tmp_path)) == ["model_0.pt", f"model_{AT if culprit == 0 else 9}.pt"]


def train_beside_a_rank_that_raises(folder: Path, culprit: int, error: BaseException, how: str) -> None:
    """Train a DistributedDataParallel, tell how it ended, and end the process."""
    model: nn.Module = nn.parallel.DistributedDataParallel(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step(engine: Engine, batch: torch.Tensor) -> None:
        if engine.state.iteration == AT and job.rank() == culprit:
            raise error
        optimizer.zero_grad()
        model(batch).sum().backward()
        optimizer.step()

    trainer = Engine(step)
    checkpoint = Checkpoint({"model": model, "optimizer": optimizer}, DiskSaver(folder), timeout_s=LIMIT_S)
    handler = save_and_raise(checkpoint) if how == "a user's function" else checkpoint
    trainer.add_event_handler(Events.EXCEPTION_RAISED, handler)
    begin_s = time.monotonic()
    caught: BaseException | None = None
    try:
        trainer.run(torch.randn(9, 2, 4))
    except BaseException as one:  # noqa: BLE001 - an interrupt, for one
        caught = one
    took_s = time.monotonic() - begin_s
    kinds = [kind.__name__ for kind in type(caught).__mro__]
    send_to_parent((kinds, str(caught), caught is error, took_s, sorted(os.listdir(folder))))
    sys.stdout.flush()
    os._exit(1)


@pytest.mark.parametrize("how", ["a user's function", "attached itself"])
@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("error", [OwnError("boom"), KeyboardInterrupt("by hand")], ids=["an error", "an interrupt"])
def test_without_heartbeats_a_broken_collective_is_explained_by_the_error_behind_it(
    tmp_path: Path, culprit: int, error: BaseException, how: str
) -> None:
    with fresh_ranks(train_beside_a_rank_that_raises, 2, tmp_path, culprit, error, how) as ranks:
        told: list[Any] = [ranks.receive(rank) for rank in range(2)]
        ranks.finish(may_fail=[0, 1])
    for rank, (kinds, text, is_own, took_s, files) in enumerate(told):
        assert took_s < SOON_S
        assert is_own is (rank == culprit)
        assert type(error).__name__ in (kinds[0], text.partition("(")[2].partition(" ")[0])
        assert text.startswith(str(error))
        if rank != culprit:
            assert "RemoteRankError" in kinds
            assert ("ValueError" in kinds) is isinstance(error, ValueError)
        if rank == 0:
            assert files == [f"checkpoint_{AT}.pt"]
