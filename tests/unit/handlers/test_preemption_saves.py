"""Preemption in one process: what is saved, how much time is left, and how the program ends."""

import copy
import logging
import pickle
import signal
import threading
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from distckpt import (
    Checkpoint,
    ModelCheckpoint,
    Preemption,
    TerminateOnNan,
    global_step_from_engine,
    stop_reason,
)
from distckpt.handlers import preemption as module
from tests.unit.preempted import (
    LIMIT_S,
    TERM,
    Log,
    OneByOne,
    latest,
    send,
    trainer_that,
)
from tests.unit.toys import InMemory, Notebook, idle_engine

pytestmark = pytest.mark.usefixtures("signals_as_before")

# -- what is saved -------------------------------------------------------------------------------------


def test_several_checkpoints_are_called_in_their_order_each_once(tmp_path: Path) -> None:
    trainer, calls = trainer_that({3: send}), Log()
    one = Checkpoint({"trainer": trainer}, tmp_path / "one")
    other = Checkpoint({"trainer": trainer}, tmp_path / "other", score_function=lambda _: 0.5)
    trainer.add_event_handler(Events.COMPLETED(event_filter=lambda *_: False), other)
    Preemption(trainer, (one, calls, other, calls))
    trainer.run([0] * 5)
    assert calls.steps == [3, 3]
    assert calls.events == [Events.ITERATION_COMPLETED] * 2
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["trainer_3.pt"]
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["trainer_0.5000.pt"]


@pytest.mark.parametrize("nothing", [None, [], ()], ids=repr)
def test_nothing_to_call_is_no_mistake(nothing: Any) -> None:
    trainer = trainer_that({2: send})
    Preemption(trainer, nothing, grace_s=30)
    assert trainer.run([0] * 5).iteration == 2


@pytest.mark.parametrize("lag", [None, 1])
@pytest.mark.parametrize("is_made_first", [True, False])
@pytest.mark.parametrize(
    "event",
    [Events.ITERATION_COMPLETED, Events.ITERATION_COMPLETED(every=2), Events.ITERATION_COMPLETED | Events.COMPLETED],
    ids=["each", "every other", "each and the last"],
)
def test_an_iteration_that_a_checkpoint_saves_anyway_is_saved_once(
    event: Any, lag: int | None, caplog: pytest.LogCaptureFixture, *, is_made_first: bool
) -> None:
    trainer, saver = trainer_that({3 if lag else 4: send}), OneByOne()
    checkpoint = latest(trainer, saver, n_saved=None)
    if is_made_first:
        Preemption(trainer, checkpoint, lag=lag)
    trainer.add_event_handler(event, checkpoint)
    if not is_made_first:
        Preemption(trainer, checkpoint, lag=lag)
    trainer.run([0] * 8)
    stopped_at = trainer.state.iteration
    # A save after it in the same event has the vote counted, lag or not.
    assert stopped_at == 4 or (lag and is_made_first and stopped_at == 3)
    assert saver.saves().count(f"latest_trainer_{stopped_at}.pt") == 1
    assert saver.saves()[-1] == f"latest_trainer_{stopped_at}.pt"
    assert "found nothing" not in caplog.text


@pytest.mark.parametrize("is_made_first", [True, False])
def test_an_epoch_whose_end_a_checkpoint_has_saved_is_saved_once(*, is_made_first: bool) -> None:
    trainer, evaluator, saver = trainer_that(), trainer_that({1: send}), OneByOne()
    checkpoint = latest(trainer, saver, n_saved=None)
    if is_made_first:
        Preemption(trainer, checkpoint)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([0]))
    if not is_made_first:
        Preemption(trainer, checkpoint)
    trainer.run([0] * 3, max_epochs=3)
    assert saver.saves() == ["latest_trainer_1.pt"]
    assert checkpoint.state_dict()["_saved"] == [(1, "latest_trainer_1.pt")]


def test_a_checkpoint_of_epochs_names_the_epoch_in_progress() -> None:
    trainer, saver = trainer_that({8: send}), OneByOne()
    checkpoint = latest(trainer, saver)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)
    Preemption(trainer, checkpoint)
    events: list[Any] = []
    trainer.add_event_handler(Checkpoint.SAVED_CHECKPOINT, lambda: events.append(trainer.state.iteration))
    trainer.run([0] * 3, max_epochs=5)
    assert events == [3, 6, 8]
    assert saver.saves() == ["latest_trainer_1.pt", "latest_trainer_2.pt", "latest_trainer_3.pt"]
    ((priority, name),) = checkpoint.state_dict()["_saved"]
    assert name == "latest_trainer_3.pt"
    assert 2 < priority < 3, "the epoch has not ended"
    assert saver.metadata is not None
    assert saver.metadata["priority"] == priority


def test_a_part_of_an_epoch_stays_the_priority() -> None:
    trainer = trainer_that({6: send})
    checkpoint = latest(trainer, OneByOne(), n_saved=2)
    checkpoint.global_step_transform = lambda engine, _: engine.state.iteration / 4
    trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)
    Preemption(trainer, checkpoint)
    trainer.run([0] * 4, max_epochs=5)
    assert checkpoint.state_dict()["_saved"] == [(1.0, "latest_trainer_1.0.pt"), (1.5, "latest_trainer_1.5.pt")]


def test_an_epoch_number_that_is_a_float_is_replaced_at_the_end_of_its_epoch() -> None:
    def start(actions: Mapping[int, Callable[[], object]]) -> tuple[Engine, Checkpoint]:
        trainer = trainer_that(actions)
        checkpoint = latest(trainer, OneByOne())
        checkpoint.global_step_transform = lambda engine, _: float(engine.state.epoch)  # type: ignore[assignment]
        trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)
        return trainer, checkpoint

    trainer, checkpoint = start({6: send})
    Preemption(trainer, checkpoint)
    trainer.run([0] * 4, max_epochs=5)
    ((priority, name),) = checkpoint.state_dict()["_saved"]
    assert 1 < priority < 2
    assert name == "latest_trainer_2.0.pt"
    resumed, again = start({})
    resumed.load_state_dict(trainer.state_dict())
    again.load_state_dict(checkpoint.state_dict())
    resumed.add_event_handler(Events.EPOCH_COMPLETED, resumed.terminate)
    resumed.run([0] * 4)
    assert again.state_dict()["_saved"] == [(2.0, "latest_trainer_2.0.pt")]


@pytest.mark.parametrize("n_saved", [1, 2, None])
@pytest.mark.parametrize("num_signals", [1, 2])
def test_the_end_of_the_epoch_replaces_it_after_a_resume(tmp_path: Path, n_saved: int | None, num_signals: int) -> None:
    def start(actions: Mapping[int, Callable[[], object]]) -> tuple[Engine, Checkpoint, dict[str, Any]]:
        trainer = trainer_that(actions)
        saver = Checkpoint(
            {"trainer": trainer},
            tmp_path,
            "latest",
            n_saved=n_saved,
            include_self=True,
            global_step_transform=global_step_from_engine(trainer),
            filename_pattern="{filename_prefix}_{global_step}.{ext}",
        )
        saver.save_handler.require_empty = False
        trainer.add_event_handler(Events.EPOCH_COMPLETED, saver)
        return trainer, saver, {"trainer": trainer, "checkpointer": saver}

    def iterations() -> dict[str, int]:
        read = {path.name: torch.load(path, weights_only=True)["trainer"] for path in tmp_path.iterdir()}
        return {name: read[name]["iteration"] for name in sorted(read)}

    trainer, saver, _ = start({9: send})
    preemption = Preemption(trainer, saver)
    trainer.run([0] * 4, max_epochs=5)
    preemption.close()
    assert iterations()["latest_3.pt"] == 9
    if num_signals == 2:
        _move(tmp_path, tmp_path / "aside")
        trainer, saver, objects = start({10: send})
        _move(tmp_path / "aside", tmp_path)
        Checkpoint.load_objects(objects, tmp_path / "latest_3.pt")
        preemption = Preemption(trainer, saver)
        trainer.run([0] * 4)
        preemption.close()
        assert iterations()["latest_3.pt"] == 10

    _move(tmp_path, tmp_path / "aside")
    trainer, saver, objects = start({})
    _move(tmp_path / "aside", tmp_path)
    Checkpoint.load_objects(objects, tmp_path / "latest_3.pt")
    stopped = trainer.add_event_handler(Events.EPOCH_COMPLETED, trainer.terminate)
    trainer.run([0] * 4)
    stopped.remove()
    kept = {1: 4, 2: 8, 3: 12}
    num_kept = 3 if n_saved is None else n_saved
    assert iterations() == {f"latest_{epoch}.pt": kept[epoch] for epoch in range(4 - num_kept, 4)}
    assert saver.state_dict()["_saved"][-1] == (3, "latest_3.pt")


def _move(source: Path, target: Path) -> None:
    """Move the checkpoints: a directory has to be empty when a saver is made."""
    target.mkdir(exist_ok=True)
    for path in source.glob("*.pt"):
        path.rename(target / path.name)
    if source.name == "aside":
        source.rmdir()


@pytest.mark.parametrize(
    ("event", "name"),
    [
        (Events.EPOCH_COMPLETED(every=2), "latest_trainer_3.pt"),
        (Events.EPOCH_STARTED(once=1), "latest_trainer_3.pt"),
        (Events.COMPLETED, "latest_trainer_3.pt"),
        (Events.ITERATION_COMPLETED(every=100), "latest_trainer_8.pt"),
        (Events.ITERATION_STARTED(every=100), "latest_trainer_8.pt"),
        (Events.EPOCH_COMPLETED(every=2) | Events.ITERATION_COMPLETED(every=100), "latest_trainer_8.pt"),
        (Events.COMPLETED | Events.EPOCH_COMPLETED, "latest_trainer_3.pt"),
        (None, "latest_trainer_8.pt"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_event_that_a_checkpoint_is_attached_to_names_the_file(event: Any, name: str) -> None:
    trainer, saver = trainer_that({8: send}), OneByOne()
    checkpoint = latest(trainer, saver)
    trainer.add_event_handler(Events.STARTED, checkpoint.reset)  # which is no place to save
    if event is not None:
        trainer.add_event_handler(event, checkpoint)
    calls = Log()
    Preemption(trainer, [checkpoint, calls])
    trainer.run([0] * 3, max_epochs=5)
    assert saver.saves()[-1] == name
    assert saver.saves().count(name) == 1
    assert calls.events == [Events.ITERATION_COMPLETED], "the engine's event is what it was"


def test_a_user_who_fires_events_while_saving_leaves_the_next_checkpoints_name_alone() -> None:
    trainer, saver = trainer_that({4: send}), OneByOne()
    trainer.register_events("something")
    Preemption(trainer, [lambda trainer: trainer.fire_event("something"), latest(trainer, saver)])
    trainer.run([0] * 3, max_epochs=5)
    assert saver.saves() == ["latest_trainer_4.pt"]


def test_a_model_checkpoint_is_called_with_what_it_is_attached_with(tmp_path: Path) -> None:
    trainer, model = trainer_that({4: send}), nn.Linear(2, 2)
    checkpoint = ModelCheckpoint(tmp_path, "latest", global_step_transform=global_step_from_engine(trainer))
    trainer.add_event_handler(Events.EPOCH_COMPLETED(every=2), checkpoint, {"model": model})
    Preemption(trainer, checkpoint)
    trainer.run([0] * 3, max_epochs=5)
    assert [path.name for path in tmp_path.iterdir()] == ["latest_model_2.pt"]
    assert torch.equal(torch.load(tmp_path / "latest_model_2.pt", weights_only=True)["weight"], model.weight)


def test_the_best_of_an_evaluation_is_not_asked_to_save_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    trainer, saver, last = trainer_that({5: send}), OneByOne(), Log()
    evaluator = Engine(lambda _engine, _batch: 0.5)
    best = Checkpoint(
        {"trainer": trainer}, saver, "best", score_function=lambda engine: float(engine.state.metrics["accuracy"])
    )
    evaluator.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.state.metrics.update(accuracy=0.5))
    evaluator.add_event_handler(Events.COMPLETED, best)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([0]))
    preemption = Preemption(trainer, [best, last])
    trainer.run([0] * 3, max_epochs=5)
    assert (trainer.state.iteration, preemption.preempted, last.steps) == (5, True, [5])
    assert saver.saves() == ["best_trainer_0.5000.pt"]
    assert (
        "Preemption: a Checkpoint has the score of another engine, and is not asked to save at iteration 5; give one "
        "without a score_function. Its last one is best_trainer_0.5000.pt"
    ) in caplog.messages


def test_a_score_that_is_no_better_saves_nothing_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    trainer, saver = trainer_that({5: send}), OneByOne()
    best = Checkpoint({"trainer": trainer}, saver, "best", score_function=lambda _: 0.5)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, best)
    Preemption(trainer, best)
    trainer.run([0] * 3, max_epochs=5)
    assert saver.saves() == ["best_trainer_0.5000.pt"]
    assert "Preemption: a Checkpoint had nothing to save at iteration 5" in caplog.text


@pytest.mark.parametrize("lag", [None, 1])
@pytest.mark.parametrize("is_made_first", [True, False])
def test_an_iteration_that_broke_is_not_saved(
    lag: int | None, caplog: pytest.LogCaptureFixture, *, is_made_first: bool
) -> None:
    def breaks() -> float:
        send()
        return float("nan")

    trainer, saver, calls = trainer_that({4: breaks}), OneByOne(), Log()
    checkpoint = latest(trainer, saver)
    makers: list[Callable[[], object]] = [
        lambda: made.append(Preemption(trainer, [checkpoint, calls])),
        lambda: trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(lag=lag)),
    ]
    made: list[Preemption] = []
    for make in makers if is_made_first else reversed(makers):
        make()
    trainer.run([0] * 3, max_epochs=3)
    assert (trainer.state.iteration, saver.saves(), calls.steps) == (4, [], [])
    assert "Preemption: iteration 4 was voted NaN: nothing is saved" in caplog.messages
    assert (stop_reason(trainer), made[0].preempted) == ("nan", False)


def test_a_run_that_broke_is_not_put_back_in_the_queue() -> None:
    def breaks() -> float:
        send()
        return float("nan")

    trainer = trainer_that({2: breaks})
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    preemption = Preemption(trainer, exit_code=75)
    trainer.run([0] * 5)
    assert (stop_reason(trainer), preemption.requested, preemption.preempted) == ("nan", True, False)


def test_an_error_while_saving_is_raised_and_the_exit_code_is_not_used() -> None:
    def fail() -> None:
        raise OSError("disk full")

    trainer = trainer_that({3: send})
    Preemption(trainer, Log(fail), exit_code=75, grace_s=30)
    with pytest.raises(OSError, match="disk full"):
        trainer.run([0] * 5)
    for timer in [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]:
        timer.join(LIMIT_S)
        assert not timer.is_alive(), "nobody is told later that the time is over"


# -- how much time is left -----------------------------------------------------------------------------


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="distckpt")
    return caplog


def test_a_save_in_time_is_told_with_what_was_left(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    now = [100.0]
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))

    def pass_by(seconds: float) -> Callable[[], None]:
        return lambda: now.__setitem__(0, now[0] + seconds)

    trainer = trainer_that({3: send})
    Preemption(trainer, Log(pass_by(5.0)), grace_s=30)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, pass_by(2.0))
    trainer.run([0] * 5)
    told = "Preemption: the save of iteration 3 took 5.0 s and ended 23.0 s before the deadline"
    assert told in log.messages
    assert not [record for record in log.records if "left" in record.getMessage()]


def test_a_save_that_took_longer_than_what_is_left_is_warned_of(log: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    trainer = trainer_that({3: send})
    slow, quick = (Checkpoint({"trainer": trainer}, tmp_path / name) for name in ("slow", "quick"))
    slow._history.last_save_s, quick._history.last_save_s = 40.0, 4.0
    Preemption(trainer, [slow, quick], grace_s=30)
    trainer.run([0] * 5)
    assert "30.0 s are left, and the last save took 44.0 s: that of iteration 3 may not end in time" in log.text
    assert "the save of iteration 3 took 0." in log.text


def test_a_save_that_has_not_ended_in_time_is_told_when_the_time_is_over(log: pytest.LogCaptureFixture) -> None:
    is_late, has_ended = threading.Event(), threading.Event()

    def hold_up(record: logging.LogRecord) -> bool:
        if record.levelno == logging.ERROR:
            is_late.set()
            has_ended.wait(0.2)  # if the save's end were told meanwhile
        elif "took" in record.getMessage():
            has_ended.set()
        return True

    trainer = trainer_that({3: send})
    preemption = Preemption(trainer, Log(lambda: is_late.wait(LIMIT_S)), grace_s=0.01)
    preemption.logger.addFilter(hold_up)
    trainer.run([0] * 5)
    preemption.logger.removeFilter(hold_up)
    late, ended = log.messages[-2:]
    assert late.startswith("Preemption: no time is left, and the save of iteration 3 has not ended")
    assert ended.startswith("Preemption: the save of iteration 3 took ")
    assert ended.endswith(" after the deadline")


@pytest.mark.parametrize("checkpoint", [None, Log()])
def test_without_a_deadline_or_without_a_save_nothing_is_said_of_time(
    log: pytest.LogCaptureFixture, checkpoint: Any
) -> None:
    trainer = trainer_that({3: send})
    Preemption(trainer, checkpoint, grace_s=30 if checkpoint is None else None)
    trainer.run([0] * 5)
    assert [record.getMessage() for record in log.records if record.name.startswith("distckpt")] == [
        "Preemption: received a signal (rank 0: SIGTERM); the run ends at iteration 3"
    ]


# -- how the program ends ------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 3])
def test_an_exit_code_ends_the_program_after_the_completed_handlers(at: int) -> None:
    trainer, saver, ended = trainer_that({at: send}), Log(), Log()
    preemption = Preemption(trainer, saver, exit_code=75)
    trainer.add_event_handler(Events.COMPLETED, ended)
    if at == 0:
        send()
    with pytest.raises(SystemExit) as left:
        trainer.run([0] * 5)
    assert left.value.code == 75
    assert (saver.steps, ended.steps) == ([at] if at else [], [at])
    assert preemption.preempted


def test_a_copy_of_the_trainer_hears_the_signal_too() -> None:
    trainer = trainer_that({3: send})
    preemption = Preemption(trainer, Log())
    twin = copy.deepcopy(trainer)
    trainer.run([0] * 5)
    (copied,) = {handler for handler, *_ in twin._event_handlers[Events.STARTED]}
    assert isinstance(copied, Preemption)
    assert copied is not preemption
    assert (copied.requested, copied.preempted) == (True, False)


def test_what_is_unpickled_receives_nothing_until_it_is_made_anew() -> None:
    preemption = Preemption(idle_engine())
    send()
    unpickled = pickle.loads(pickle.dumps(preemption._receiver))  # noqa: S301 - our own
    assert unpickled.received is None
    unpickled.remove()
    assert signal.getsignal(TERM) == preemption._receiver._receive


def test_a_checkpoint_that_has_saved_can_be_pickled_and_its_copy_has_saved_nothing_here() -> None:
    trainer = trainer_that({3: send})
    checkpoint = Checkpoint({"notes": Notebook()}, InMemory())
    Preemption(trainer, checkpoint)
    trainer.run([0] * 5)
    assert checkpoint.has_saved_at(trainer)
    for twin in (copy.deepcopy(checkpoint), pickle.loads(pickle.dumps(checkpoint))):  # noqa: S301 - our own
        assert not twin.has_saved_at(trainer)
        assert twin.state_dict() == checkpoint.state_dict()


def test_a_run_that_begins_anew_saves_where_the_one_before_was_ended(tmp_path: Path) -> None:
    actions = {3: send}
    trainer = trainer_that(actions)
    handler = Checkpoint({"trainer": trainer}, tmp_path, n_saved=None)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=3), handler)
    first = Preemption(trainer, handler)
    trainer.run([0] * 6)
    first.close()
    actions.clear()
    assert stop_reason(trainer) == "preempted"
    for path in tmp_path.iterdir():
        path.unlink()
    handler.reset()
    trainer.remove_event_handler(first, Events.STARTED)
    trainer.remove_event_handler(first, Events.ITERATION_COMPLETED)
    trainer.remove_event_handler(first, Events.EPOCH_COMPLETED)
    trainer.state.max_epochs = None
    trainer.state.iteration = trainer.state.epoch = 0
    trainer.run([0] * 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trainer_3.pt", "trainer_6.pt"]
