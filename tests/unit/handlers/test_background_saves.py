"""A save beside training: a snapshot of the moment, taken over when it is durable, waited for where a run ends."""

import contextlib
import copy
import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from distckpt import Checkpoint, CheckpointEvents, DiskSaver, ModelCheckpoint, Preemption, SaveError, TerminateOnNan
from distckpt.ptformat.reader import verify
from distckpt.storage.direct_io import DirectFile
from tests.unit.directories import names_in
from tests.unit.toys import Notebook, idle_engine

LIMIT_S = 30.0


class Gate:
    """Holds every write of an image until it is opened; counts those that came."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.came = threading.Event()
        self.error: OSError | None = None


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Writes wait for this. It is opened at the end, whatever happens."""
    gate, write = Gate(), DirectFile.write

    def held(self: DirectFile, data: memoryview, offset: int) -> None:
        gate.came.set()
        assert gate.is_open.wait(timeout=LIMIT_S)
        if gate.error is not None:
            raise gate.error
        write(self, data, offset)

    monkeypatch.setattr(DirectFile, "write", held)
    yield gate
    gate.is_open.set()


def saver(folder: Path, **kwargs: Any) -> DiskSaver:
    return DiskSaver(folder, background=True, require_empty=False, **kwargs)


def on_iterations(engine: Engine, handler: Any, *args: Any, every: int = 1) -> None:
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=every), handler, *args)


def whole(path: Path) -> Any:
    verify(path)
    return torch.load(path, weights_only=True)


# -- a snapshot --------------------------------------------------------------------------------------


def test_each_file_holds_the_state_of_its_iteration_under_the_tightest_loop(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300), nn.Linear(300, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    expected: dict[int, list[torch.Tensor]] = {}

    def tensors() -> list[torch.Tensor]:
        states = (value for state in optimizer.state.values() for value in state.values())
        return [*model.state_dict().values(), *states]

    def step(_engine: Engine, _batch: Any) -> None:
        optimizer.zero_grad()
        model(torch.randn(8, 300)).sum().backward()
        optimizer.step()

    trainer = Engine(step)
    handler = Checkpoint({"model": model, "optimizer": optimizer}, saver(tmp_path), n_saved=None)

    @trainer.on(Events.ITERATION_COMPLETED)
    def note(engine: Engine) -> None:
        expected[engine.state.iteration] = [tensor.clone() for tensor in tensors()]

    on_iterations(trainer, handler)
    trainer.run([0] * 40)
    assert len(names_in(tmp_path)) == 40
    for iteration, held in expected.items():
        state = whole(tmp_path / f"checkpoint_{iteration}.pt")
        states = (value for one in state["optimizer"]["state"].values() for value in one.values())
        found = [*state["model"].values(), *states]
        assert all(map(torch.equal, found, held)), iteration


def test_training_goes_on_while_it_is_written_and_changes_nothing_of_it(tmp_path: Path, gate: Gate) -> None:
    model = nn.Linear(300, 300)
    before = copy.deepcopy(model.state_dict())
    trainer = Engine(lambda _engine, _batch: model.weight.data.add_(1.0))
    handler = Checkpoint({"model": model}, saver(tmp_path))
    trainer.add_event_handler(Events.STARTED, handler)
    seen: list[tuple[bool, Any]] = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def look(engine: Engine) -> None:
        seen.append((handler.has_pending_save, handler.last_checkpoint))
        if engine.state.iteration == 5:
            gate.is_open.set()

    trainer.run([0] * 5)
    assert seen == [(True, None)] * 5
    state = whole(tmp_path / "model_0.pt")
    assert all(torch.equal(state[key], before[key]) for key in before)
    assert handler.last_checkpoint == tmp_path / "model_0.pt"


# -- when it counts ----------------------------------------------------------------------------------


def test_it_is_taken_over_after_an_iteration_in_which_it_is_durable(tmp_path: Path, gate: Gate) -> None:
    trainer, fired = idle_engine(), list[int]()
    trainer.register_events(*CheckpointEvents)
    handler = Checkpoint({"obj": Notebook({"a": 1})}, saver(tmp_path), n_saved=1)
    on_iterations(trainer, handler, every=4)
    trainer.add_event_handler(CheckpointEvents.SAVED_CHECKPOINT, lambda engine: fired.append(engine.state.iteration))

    @trainer.on(Events.ITERATION_STARTED(once=6))
    def open_it() -> None:
        assert names_in(tmp_path) == [name for name in names_in(tmp_path) if name.endswith(".tmp")]
        gate.is_open.set()
        handler._background_saves._pending.wait_local()  # type: ignore[union-attr]

    trainer.run([0] * 7)
    assert fired == [6]
    assert names_in(tmp_path) == ["obj_4.pt"]


def test_the_one_before_stands_until_the_new_one_is_committed(tmp_path: Path, gate: Gate) -> None:
    trainer = idle_engine()
    handler = Checkpoint({"obj": Notebook({"a": 1})}, saver(tmp_path), n_saved=1)
    on_iterations(trainer, handler)
    gate.is_open.set()
    trainer.run([0])
    gate.is_open.clear()

    @trainer.on(Events.ITERATION_COMPLETED)
    def look() -> None:
        assert "obj_1.pt" in names_in(tmp_path)
        assert handler.last_checkpoint == tmp_path / "obj_1.pt"
        gate.is_open.set()

    trainer.run([0], max_epochs=2)
    assert names_in(tmp_path) == ["obj_2.pt"]


def test_handlers_of_completed_find_it(tmp_path: Path) -> None:
    trainer = idle_engine()
    handler = Checkpoint({"obj": Notebook({"a": 1})}, saver(tmp_path))
    on_iterations(trainer, handler)
    found: list[Any] = []
    trainer.add_event_handler(Events.COMPLETED, lambda _: found.append(whole(handler.last_checkpoint)))  # type: ignore[arg-type]
    trainer.run([0, 1])
    assert found == [{"a": 1}]
    assert handler.last_checkpoint == tmp_path / "obj_2.pt"


def test_one_that_completed_itself_begins_is_waited_for(tmp_path: Path) -> None:
    trainer = idle_engine()
    handler = Checkpoint({"obj": Notebook({"a": 1})}, saver(tmp_path))
    trainer.add_event_handler(Events.COMPLETED, handler)
    trainer.run([0, 1])
    assert not handler.has_pending_save
    assert handler.last_checkpoint == tmp_path / "obj_2.pt"


def test_one_of_an_evaluators_is_taken_over_in_the_trainers_iterations(tmp_path: Path, gate: Gate) -> None:
    trainer, evaluator = idle_engine(), idle_engine()
    score = iter([1.0, 2.0, 3.0])
    handler = Checkpoint({"obj": Notebook({"a": 1})}, saver(tmp_path), score_function=lambda _: next(score))
    evaluator.add_event_handler(Events.COMPLETED, handler)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda _: evaluator.run([0, 1, 2]))
    seen: list[Any] = []

    @trainer.on(Events.ITERATION_STARTED)
    def look(engine: Engine) -> None:
        seen.append((engine.state.iteration, handler.last_checkpoint and Path(handler.last_checkpoint).name))
        if engine.state.iteration == 4:
            gate.is_open.set()
            handler._background_saves._pending.wait_local()  # type: ignore[union-attr]

    trainer.run([0, 1], max_epochs=3)
    assert seen[:5] == [(1, None), (2, None), (3, None), (4, None), (5, "obj_1.0000.pt")]
    assert handler.last_checkpoint == tmp_path / "obj_3.0000.pt"


def test_a_user_can_wait_for_one_outside_of_a_run(tmp_path: Path) -> None:
    handler = Checkpoint({"obj": Notebook({"a": 1})}, saver(tmp_path))
    handler(idle_engine())
    handler.wait_until_finished()
    assert whole(tmp_path / "obj_0.pt") == {"a": 1}
    assert handler.last_checkpoint == tmp_path / "obj_0.pt"
    handler.wait_until_finished()


def test_a_model_checkpoint_saves_so_too(tmp_path: Path) -> None:
    trainer = idle_engine()
    handler = ModelCheckpoint(tmp_path, "best", n_saved=2, background=True)
    on_iterations(trainer, handler, {"obj": Notebook({"a": 1})})
    trainer.run([0] * 4)
    assert names_in(tmp_path) == ["best_obj_3.pt", "best_obj_4.pt"]


# -- one after the other -----------------------------------------------------------------------------


def test_a_second_one_waits_for_the_first(tmp_path: Path, gate: Gate) -> None:
    trainer = idle_engine()
    handler = Checkpoint({"obj": Notebook({"a": 1})}, saver(tmp_path), n_saved=None)
    on_iterations(trainer, handler)
    threading.Timer(0.2, gate.is_open.set).start()
    trainer.run([0, 1, 2])
    assert names_in(tmp_path) == ["obj_1.pt", "obj_2.pt", "obj_3.pt"]


def test_a_second_one_is_skipped_where_that_is_asked_for(tmp_path: Path, gate: Gate) -> None:
    trainer = idle_engine()
    handler = Checkpoint({"obj": Notebook({"a": 1})}, saver(tmp_path, when_busy="skip"), n_saved=None)
    on_iterations(trainer, handler)

    @trainer.on(Events.ITERATION_STARTED(once=4))
    def open_it() -> None:
        gate.is_open.set()
        handler._background_saves._pending.wait_local()  # type: ignore[union-attr]

    trainer.run([0] * 5)
    assert names_in(tmp_path) == ["obj_1.pt", "obj_5.pt"]


@pytest.mark.parametrize("own_memory", [False, True])
def test_two_handlers_share_one_memory_unless_it_is_their_own(tmp_path: Path, gate: Gate, *, own_memory: bool) -> None:
    first = Checkpoint({"obj": Notebook({"a": torch.ones(5000)})}, saver(tmp_path / "a"))
    second = Checkpoint({"obj": Notebook({"a": torch.zeros(5000)})}, saver(tmp_path / "b", own_memory=own_memory))
    engine = idle_engine()
    first(engine)
    assert gate.came.wait(timeout=LIMIT_S)
    if own_memory:
        second(engine)  # it does not wait
        gate.is_open.set()
    else:
        threading.Timer(0.2, gate.is_open.set).start()
        second(engine)
        assert gate.is_open.is_set()
    first.wait_until_finished()
    second.wait_until_finished()
    assert whole(tmp_path / "a" / "obj_0.pt")["a"].sum() == 5000
    assert whole(tmp_path / "b" / "obj_0.pt")["a"].sum() == 0


# -- what goes wrong ---------------------------------------------------------------------------------


def test_an_error_is_raised_after_an_iteration_and_the_one_before_stands(tmp_path: Path, gate: Gate) -> None:
    trainer = idle_engine()
    handler = Checkpoint({"obj": Notebook({"a": torch.ones(5000)})}, saver(tmp_path), n_saved=1)
    on_iterations(trainer, handler, every=2)
    gate.is_open.set()
    trainer.run([0, 1])
    gate.is_open.clear()

    @trainer.on(Events.ITERATION_STARTED(once=5))
    def break_it() -> None:
        gate.error = OSError(errno.ENOSPC, "No space left on device")
        gate.is_open.set()
        handler._background_saves._pending.wait_local()  # type: ignore[union-attr]

    with pytest.raises(SaveError, match=r"rank 0, step 4: cannot save .*obj_4.pt: .*obj_2.pt is intact") as caught:
        trainer.run([0, 1], max_epochs=4)
    assert caught.value.errno == errno.ENOSPC
    assert trainer.state.iteration == 5
    assert names_in(tmp_path) == ["obj_2.pt"]
    assert handler.last_checkpoint == tmp_path / "obj_2.pt"
    gate.error = None
    handler(trainer)
    handler.wait_until_finished()
    assert names_in(tmp_path) == ["obj_5.pt"]


def test_an_error_is_raised_at_the_end_of_the_run_at_the_latest(tmp_path: Path, gate: Gate) -> None:
    trainer = idle_engine()
    handler = Checkpoint({"obj": Notebook({"a": torch.ones(5000)})}, saver(tmp_path))
    on_iterations(trainer, handler)
    gate.error = OSError(errno.EIO, "Input/output error")
    gate.is_open.set()
    with pytest.raises(SaveError, match=r"cannot save .*obj_1\.pt"):
        trainer.run([0])
    assert names_in(tmp_path) == []
    assert not handler.has_pending_save


def test_what_cannot_be_begun_is_an_error_at_once(tmp_path: Path) -> None:
    handler = Checkpoint({"obj": Notebook({"a": 1})}, saver(tmp_path / "folder"))
    (tmp_path / "folder").rmdir()
    with pytest.raises(FileNotFoundError):
        handler(idle_engine())
    assert not handler.has_pending_save
    (tmp_path / "folder").mkdir()
    handler(idle_engine())  # the memory is free again
    handler.wait_until_finished()


@pytest.mark.parametrize("error", [ValueError("a mistake"), KeyboardInterrupt()], ids=["an error", "an interrupt"])
def test_an_exception_that_leaves_the_run_waits_for_it(tmp_path: Path, gate: Gate, error: BaseException) -> None:
    def fail(engine: Engine, _batch: Any) -> None:
        if engine.state.iteration == 3:
            threading.Timer(0.2, gate.is_open.set).start()
            raise error

    trainer = Engine(fail)
    handler = Checkpoint({"obj": Notebook({"a": 1})}, saver(tmp_path))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), handler)
    with pytest.raises(type(error)):
        trainer.run([0] * 5)
    assert names_in(tmp_path) == ["obj_2.pt"]
    assert handler.last_checkpoint == tmp_path / "obj_2.pt"


def test_an_interrupt_while_somebody_waits_leaves_the_writing_alone(tmp_path: Path, gate: Gate) -> None:
    handler = Checkpoint({"obj": Notebook({"a": torch.ones(5000)})}, saver(tmp_path))
    handler(idle_engine())
    pending = handler._background_saves._pending
    assert pending is not None
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    threading.Timer(0.6, gate.is_open.set).start()
    with pytest.raises(KeyboardInterrupt):
        handler.wait_until_finished()
    assert handler.last_checkpoint == tmp_path / "obj_0.pt", "it was committed, and is taken over"
    assert whole(tmp_path / "obj_0.pt")["a"].sum() == 5000
    handler(idle_engine())
    handler.wait_until_finished()
    assert names_in(tmp_path) == ["obj_0.pt"]


def test_a_file_of_torchs_other_format_is_written_in_the_foreground(tmp_path: Path) -> None:
    handler = Checkpoint({"obj": Notebook({"a": 1})}, saver(tmp_path, _use_new_zipfile_serialization=False))
    handler(idle_engine())
    assert not handler.has_pending_save
    assert torch.load(tmp_path / "obj_0.pt", weights_only=True) == {"a": 1}


# -- beside the other handlers -----------------------------------------------------------------------


def test_a_preempted_run_ends_with_its_last_iteration_durable(tmp_path: Path, gate: Gate) -> None:
    trainer = idle_engine()
    handler = Checkpoint({"obj": Notebook({"a": 1})}, saver(tmp_path, when_busy="skip"), n_saved=None)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), handler)
    with contextlib.closing(Preemption(trainer, handler)):

        @trainer.on(Events.ITERATION_STARTED(once=4))
        def tell() -> None:
            threading.Timer(0.2, gate.is_open.set).start()
            os.kill(os.getpid(), signal.SIGUSR1)

        trainer.run([0] * 9)
    assert trainer.state.iteration == 4
    assert names_in(tmp_path) == ["obj_2.pt", "obj_4.pt"]
    assert not handler.has_pending_save


@pytest.mark.parametrize("lag", [0, 1])
def test_a_run_that_ends_for_nan_has_its_last_good_checkpoint(tmp_path: Path, lag: int) -> None:
    trainer = Engine(lambda _engine, batch: batch)
    handler = Checkpoint({"obj": Notebook({"a": 1})}, saver(tmp_path), n_saved=None)
    on_iterations(trainer, handler)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(lag=lag))
    trainer.run([1.0, 2.0, float("nan"), 4.0])
    assert names_in(tmp_path) == ["obj_1.pt", "obj_2.pt"]


def test_a_history_that_is_reset_meanwhile_stays_so(tmp_path: Path, gate: Gate) -> None:
    handler = Checkpoint({"obj": Notebook({"a": 1})}, saver(tmp_path))
    handler(idle_engine())
    handler.reset()
    gate.is_open.set()
    handler.wait_until_finished()
    assert handler.last_checkpoint is None
    assert names_in(tmp_path) == ["obj_0.pt"]


def test_a_history_that_is_loaded_meanwhile_keeps_its_files(tmp_path: Path, gate: Gate) -> None:
    gate.is_open.set()
    engine = idle_engine()
    handler = Checkpoint({"obj": Notebook({"a": 1})}, saver(tmp_path))
    handler(engine)
    handler.wait_until_finished()
    state = handler.state_dict()
    gate.is_open.clear()
    engine.state.iteration = 1
    handler(engine)
    handler.load_state_dict(state)
    gate.is_open.set()
    handler.wait_until_finished()
    assert handler.last_checkpoint == tmp_path / "obj_0.pt"
    assert names_in(tmp_path) == ["obj_0.pt", "obj_1.pt"]


def test_a_copy_has_nothing_pending(tmp_path: Path, gate: Gate) -> None:
    handler = Checkpoint({"obj": Notebook({"a": 1})}, saver(tmp_path))
    handler(idle_engine())
    twin = copy.deepcopy(handler)
    assert handler.has_pending_save
    assert not twin.has_pending_save
    gate.is_open.set()
    handler.wait_until_finished()


ARGUMENTS: dict[str, Callable[[Path], object]] = {
    "when_busy": lambda folder: DiskSaver(folder, when_busy="later"),  # type: ignore[arg-type]
    "share_write": lambda folder: DiskSaver(folder, share_write="all"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_that_is_none_of_its_choices_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"Argument {name} should be one of"):
        ARGUMENTS[name](tmp_path)
