"""Preemption in one process: what it asks for, what a signal leads to, and what it leaves behind."""

import copy
import gc
import logging
import os
import pickle
import signal
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
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
    TimeLimit,
    global_step_from_engine,
    stop_reason,
)
from distckpt.handlers import preemption as module
from tests.unit.toys import InMemory, Notebook, idle_engine

TERM, USR1, USR2, URG = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGURG
LIMIT_S = 60.0


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (TERM, signal.SIGINT, USR1, USR2, URG)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int = TERM) -> None:
    """Send this thread a signal, which is handled at once."""
    signal.raise_signal(number)


def trainer_that(actions: Mapping[int, Callable[[], object]] | None = None) -> Engine:
    """Return an engine that does something in some of its iterations."""

    def step(engine: Engine, _batch: object) -> object:
        action = (actions or {}).get(engine.state.iteration)
        return None if action is None else action()

    return Engine(step)


class Log:
    """A callable to save with, that notes when it was called."""

    def __init__(self, action: Callable[[], object] = lambda: None) -> None:
        self.steps: list[int] = []
        self.events: list[Any] = []
        self._action = action

    def __call__(self, engine: Engine) -> None:
        """Note the iteration and the event."""
        self.steps.append(engine.state.iteration)
        self.events.append(engine.last_event_name)
        self._action()


class OneByOne(InMemory):
    """A save handler that notes the history of each save, whatever it was called on."""

    def saves(self) -> list[str]:
        """Return the names that were saved, in order."""
        return [call.removeprefix("save ") for call in self.calls if call.startswith("save")]


def latest(trainer: Engine, handler: Any, **options: Any) -> Checkpoint:
    """Return a Checkpoint that counts in the trainer's step on its event, and saves that trainer's state."""
    step = global_step_from_engine(trainer)
    return Checkpoint({"trainer": trainer}, handler, "latest", global_step_transform=step, **options)


# -- what it asks for ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"trainer": None}, TypeError, "Argument trainer should be an instance of Engine, but given"),
        ({"checkpoint": 1}, TypeError, "Argument checkpoint should be callable, or a sequence of callables"),
        ({"checkpoint": "folder"}, TypeError, "Argument checkpoint should be callable, or a sequence of callables"),
        ({"checkpoint": [print, None]}, TypeError, "Argument checkpoint should be callable, or a sequence"),
        ({"signals": ()}, ValueError, "Argument signals should name at least one signal"),
        ({"signals": TERM}, TypeError, "Argument signals should be several signals' numbers"),
        ({"signals": None}, TypeError, "Argument signals should be several signals' numbers"),
        ({"signals": "SIGTERM"}, TypeError, "Argument signals should be several signals' numbers"),
        ({"signals": (TERM, "SIGUSR1")}, TypeError, "Argument signals should be several signals' numbers"),
        ({"signals": (True,)}, TypeError, "Argument signals should be several signals' numbers"),
        ({"signals": (TERM, signal.SIGKILL)}, ValueError, "Argument signals should name signals .* given SIGKILL"),
        ({"signals": (signal.SIGSTOP,)}, ValueError, "Argument signals should name signals .* given SIGSTOP"),
        ({"signals": (TERM, 0)}, ValueError, "Argument signals should name signals .* given signal 0"),
        ({"signals": (-1,)}, ValueError, "Argument signals should name signals"),
        ({"signals": (1000,)}, ValueError, "Argument signals should name signals"),
        ({"grace_s": 0}, ValueError, "Argument grace_s should be a positive number"),
        ({"grace_s": -1.0}, ValueError, "Argument grace_s should be a positive number"),
        ({"grace_s": float("nan")}, ValueError, "Argument grace_s should be a positive number"),
        ({"grace_s": float("inf")}, ValueError, "Argument grace_s should be a positive number"),
        ({"grace_s": "30"}, TypeError, "Argument grace_s should be a positive number"),
        ({"grace_s": True}, TypeError, "Argument grace_s should be a positive number"),
        ({"exit_code": -1}, ValueError, "Argument exit_code should be an integer between 0 and 255"),
        ({"exit_code": 256}, ValueError, "Argument exit_code should be an integer between 0 and 255"),
        ({"exit_code": 75.0}, TypeError, "Argument exit_code should be an integer between 0 and 255"),
        ({"exit_code": True}, TypeError, "Argument exit_code should be an integer between 0 and 255"),
        ({"exit_code": None}, TypeError, "Argument exit_code should be an integer between 0 and 255"),
        ({"lag": 2}, ValueError, "Argument lag should be 0 or 1"),
        ({"every": 0}, ValueError, "Argument every should be a positive integer"),
        ({"timeout_s": 0}, ValueError, "Argument timeout_s should be a positive number"),
    ],
)
def test_a_wrong_argument_is_refused_by_name_and_no_signal_is_taken(
    arguments: dict[str, Any], kind: type[Exception], words: str
) -> None:
    trainer = idle_engine()
    with pytest.raises(kind, match=f"^{words}"):
        Preemption(**{"trainer": trainer} | arguments)
    assert signal.getsignal(TERM) == signal.getsignal(USR1) == signal.SIG_DFL
    assert not trainer.has_event_handler(Preemption)
    assert not any(trainer._event_handlers.values())


def test_an_evaluator_that_is_no_engine_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^Argument evaluator should be an instance of Engine"):
        Preemption(idle_engine()).attach(None)  # type: ignore[arg-type]  # that is what is tested


@pytest.mark.parametrize("number", [TERM, USR1])
def test_sigterm_and_sigusr1_end_the_run_by_default(number: int, caplog: pytest.LogCaptureFixture) -> None:
    trainer, saver = trainer_that({3: lambda: send(number)}), Log()
    preemption = Preemption(trainer, saver)
    assert not preemption.requested
    assert signal.getsignal(USR2) == signal.SIG_DFL
    trainer.run([0] * 5, max_epochs=2)
    assert (trainer.state.iteration, saver.steps) == (3, [3])
    assert (preemption.requested, preemption.preempted, stop_reason(trainer)) == (True, True, "preempted")
    name = signal.Signals(number).name
    assert f"Preemption: received a signal (rank 0: {name}); the run ends at iteration 3" in caplog.messages


@pytest.mark.parametrize("number", [USR2, signal.SIGINT, signal.SIGRTMIN + 1])
def test_other_signals_are_taken_where_they_are_named(number: int, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_that({2: lambda: send(number)})
    before = signal.getsignal(number)
    preemption = Preemption(trainer, None, [number, number])
    assert signal.getsignal(TERM) == signal.SIG_DFL
    trainer.run([0] * 5)
    preemption.close()
    assert trainer.state.iteration == 2, "SIGINT raises no KeyboardInterrupt"
    assert signal.getsignal(number) == before
    assert "received a signal (rank 0: " in caplog.text


def test_a_run_without_a_signal_is_left_alone() -> None:
    trainer, saver = trainer_that(), Log()
    preemption = Preemption(trainer, saver, exit_code=75)
    trainer.run([0] * 5, max_epochs=2)
    assert (trainer.state.iteration, saver.steps) == (10, [])
    assert (preemption.requested, preemption.preempted, stop_reason(trainer)) == (False, False, None)


# -- who was there before, and who comes after ---------------------------------------------------------


def test_the_handler_that_was_there_before_still_runs() -> None:
    seen: list[tuple[int, bool]] = []
    signal.signal(TERM, lambda number, frame: seen.append((number, frame is not None)))
    trainer = trainer_that({2: send, 1: lambda: None})
    Preemption(trainer)
    trainer.run([0] * 5)
    assert seen == [(TERM, True)]
    assert trainer.state.iteration == 2


def test_what_the_handler_before_raises_is_raised() -> None:
    def leave(_number: int, _frame: types.FrameType | None) -> None:
        raise SystemExit(3)

    signal.signal(TERM, leave)
    preemption = Preemption(idle_engine())
    with pytest.raises(SystemExit, match="3"):
        send()
    assert preemption.requested


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_where_a_signal_was_ignored_or_deadly_it_is_only_noted(before: signal.Handlers) -> None:
    signal.signal(TERM, before)
    trainer = trainer_that({2: send})
    preemption = Preemption(trainer)
    trainer.run([0] * 5)
    assert trainer.state.iteration == 2
    preemption.close()
    assert signal.getsignal(TERM) == before


def test_close_puts_back_who_was_there() -> None:
    def before(_number: int, _frame: types.FrameType | None) -> None: ...

    signal.signal(TERM, before)
    preemption = Preemption(idle_engine())
    assert signal.getsignal(TERM) is not before
    preemption.close()
    preemption.close()
    assert (signal.getsignal(TERM), signal.getsignal(USR1)) == (before, signal.SIG_DFL)


def test_close_leaves_alone_who_has_come_since_and_goes_on_to_serve_who_was_there() -> None:
    seen: list[str] = []
    signal.signal(TERM, lambda *_: seen.append("before"))
    preemption = Preemption(idle_engine())
    ours: Any = signal.getsignal(TERM)

    def since(number: int, frame: types.FrameType | None) -> None:
        seen.append("since")
        ours(number, frame)

    signal.signal(TERM, since)
    preemption.close()
    assert signal.getsignal(TERM) is since
    send()
    assert seen == ["since", "before"]
    assert not preemption.requested, "a closed one receives nothing"


@pytest.mark.parametrize("first_closed", [0, 1])
def test_two_of_them_can_be_closed_in_any_order(first_closed: int) -> None:
    seen: list[int] = []

    def before(number: int, _frame: types.FrameType | None) -> None:
        seen.append(number)

    signal.signal(TERM, before)
    both = [Preemption(idle_engine()), Preemption(idle_engine())]
    both[first_closed].close()
    send()
    assert seen == [TERM]
    assert [one.requested for one in both] == [first_closed == 1, first_closed == 0]
    both[1 - first_closed].close()
    assert signal.getsignal(TERM) is before
    assert signal.getsignal(USR1) == signal.SIG_DFL


def test_a_signal_ends_both_runs_of_two_trainers() -> None:
    one, other = trainer_that({2: send}), idle_engine()
    Preemption(one)
    Preemption(other)
    assert one.run([0] * 5).iteration == 2
    assert other.run([0] * 5).iteration == 0


def test_closed_from_a_thread_it_receives_nothing_more_and_steps_aside_at_the_next_signal() -> None:
    preemption = Preemption(idle_engine(), signals=(URG,))  # by default nothing happens on it
    thread = threading.Thread(target=preemption.close)
    thread.start()
    thread.join(LIMIT_S)
    assert signal.getsignal(URG) != signal.SIG_DFL
    send(URG)
    assert not preemption.requested
    assert signal.getsignal(URG) == signal.SIG_DFL


def test_a_forked_child_takes_signals_as_if_it_were_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    preemption = Preemption(idle_engine(), signals=(URG, USR1))
    seen: list[int] = []
    signal.signal(USR2, lambda number, _frame: seen.append(number))
    other = Preemption(idle_engine(), signals=(USR2, URG))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    send(URG)
    send(USR2)
    assert (preemption.requested, other.requested, seen) == (False, False, [USR2])
    assert signal.getsignal(URG) == signal.SIG_DFL


def test_made_in_a_thread_it_hears_nothing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    made: list[Preemption] = []
    trainer = trainer_that()
    thread = threading.Thread(target=lambda: made.append(Preemption(trainer)))
    thread.start()
    thread.join(LIMIT_S)
    assert signal.getsignal(TERM) == signal.SIG_DFL
    assert "Preemption: constructed outside the main thread" in caplog.text
    assert trainer.run([0] * 3).iteration == 3
    made[0].close()


def test_a_handler_left_installed_keeps_no_model_alive() -> None:
    model = nn.Linear(1, 1)
    there = weakref.ref(model)
    trainer = trainer_that({1: model.double})
    Preemption(trainer, Checkpoint({"model": model}, InMemory()))
    trainer.run([0])
    del trainer, model
    gc.collect()
    assert there() is None


# -- when it is answered -------------------------------------------------------------------------------


def test_a_signal_before_the_run_ends_it_at_its_start_and_saves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    trainer, saver, ended = trainer_that(), Log(), Log()
    preemption = Preemption(trainer, saver)
    trainer.add_event_handler(Events.COMPLETED, ended)
    send()
    trainer.run([0] * 5)
    assert (trainer.state.iteration, saver.steps, ended.steps) == (0, [], [0])
    assert (preemption.preempted, stop_reason(trainer)) == (True, "preempted")
    assert "Preemption: iteration 0 is the run's start: nothing is saved" in caplog.messages


@pytest.mark.parametrize("lag", [None, 1])
def test_a_signal_while_the_state_is_loaded_ends_the_run_at_its_start(lag: int | None) -> None:
    trainer, saver = trainer_that(), Log()
    Preemption(trainer, saver, lag=lag)

    @trainer.on(Events.STARTED)
    def load() -> None:
        trainer.load_state_dict({"iteration": 7, "max_epochs": 5, "epoch_length": 5})
        send()

    trainer.run([0] * 5, max_epochs=5)
    assert (trainer.state.iteration, saver.steps) == (7, [])


@pytest.mark.parametrize("lag", [None, 1])
@pytest.mark.parametrize("is_made_first", [True, False])
def test_a_signal_in_an_evaluation_is_answered_when_that_has_ended(lag: int | None, *, is_made_first: bool) -> None:
    trainer, evaluator, saver = trainer_that(), trainer_that({2: send}), Log()
    if is_made_first:
        Preemption(trainer, saver, lag=lag)
    ended = Log()
    evaluator.add_event_handler(Events.COMPLETED, ended)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([0] * 4))
    if not is_made_first:
        Preemption(trainer, saver, lag=lag)
    trainer.run([0] * 3, max_epochs=3)
    assert ended.steps == [4], "the evaluation was whole"
    assert (trainer.state.iteration, saver.steps) == (3, [3])


@pytest.mark.parametrize("lag", [None, 1])
def test_an_attached_evaluation_is_shortened(lag: int | None, caplog: pytest.LogCaptureFixture) -> None:
    trainer, evaluator, saver, ended = trainer_that(), trainer_that({2: send}), Log(), Log()
    evaluator.add_event_handler(Events.COMPLETED, ended)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([0] * 4))
    preemption = Preemption(trainer, saver, lag=lag)
    preemption.attach(evaluator)
    trainer.run([0] * 3, max_epochs=3)
    assert evaluator.state.iteration == (3 if lag else 2)
    assert ended.steps == []
    assert (trainer.state.iteration, saver.steps, preemption.preempted) == (3, [3], True)
    assert "Preemption: received a signal (rank 0: SIGTERM); the evaluation ends" in caplog.messages


def test_lag_ends_the_run_one_iteration_later() -> None:
    trainer, saver = trainer_that({3: send}), Log()
    Preemption(trainer, saver, lag=1)
    trainer.run([0] * 8)
    assert (trainer.state.iteration, saver.steps) == (4, [4])


def test_lag_at_the_end_of_an_epoch_does_not_save_twice(caplog: pytest.LogCaptureFixture) -> None:
    trainer, saver = trainer_that({5: send}), Log()
    Preemption(trainer, saver, lag=1)
    trainer.run([0] * 3, max_epochs=4)
    assert (trainer.state.iteration, saver.steps) == (6, [6])
    assert caplog.text.count("received a signal") == 1


@pytest.mark.parametrize("other", [False, True])
def test_in_a_world_of_one_a_run_stops_on_every_too(*, other: bool) -> None:
    trainer, saver = trainer_that({4: send}), Log()
    Preemption(trainer, saver, every=None if other else 3)
    if other:  # it is one setting for all handlers of an engine
        trainer.add_event_handler(Events.ITERATION_COMPLETED, TimeLimit(3600, every=3))
    trainer.run([0] * 8)
    assert (trainer.state.iteration, saver.steps) == (6, [6])


def test_the_end_of_an_epoch_between_two_accumulated_batches_is_no_place_to_stop() -> None:
    trainer, saver = trainer_that({5: send}), Log()
    Preemption(trainer, saver, every=2)
    trainer.run([0] * 5, max_epochs=2)
    assert (trainer.state.iteration, saver.steps) == (6, [6])


@pytest.mark.parametrize("name", ["preemption", "time limit"])
def test_a_save_as_an_iteration_begins_does_not_stop_a_run_between_accumulated_batches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    trained: list[int] = []
    limit = TimeLimit(3600, lag=1, every=2)
    action = send if name == "preemption" else lambda: monkeypatch.setattr(limit, "start_time", -1e9)
    trainer = trainer_that({3: action})
    if name == "preemption":
        Preemption(trainer, Log(), every=2, lag=1)
    else:
        trainer.add_event_handler(Events.ITERATION_COMPLETED, limit)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: trained.append(trainer.state.iteration))
    early = Checkpoint({"trainer": trainer}, tmp_path, score_function=lambda engine: engine.state.iteration)
    trainer.add_event_handler(Events.ITERATION_STARTED, early)
    trainer.run([0] * 9)
    assert len(trained) % 2 == 0
    assert len(trained) < 9


def test_a_time_limit_stops_on_every_too(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, limit = Engine(lambda _engine, _batch: None), TimeLimit(3600, every=4)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, limit)
    trainer.add_event_handler(Events.ITERATION_STARTED(once=5), lambda: monkeypatch.setattr(limit, "start_time", -1e9))
    trainer.run([0] * 10)
    assert trainer.state.iteration == 8


def test_every_counts_where_there_is_a_vote() -> None:
    trainer, saver = trainer_that({4: send}), Log()
    Preemption(trainer, saver, every=3, lag=1)
    trainer.run([0] * 12)
    assert (trainer.state.iteration, saver.steps) == (9, [9]), "counted after 6, known after 9"


def test_a_second_signal_in_the_middle_of_the_save_changes_nothing(tmp_path: Path) -> None:
    seen: list[int] = []
    signal.signal(USR1, lambda number, _frame: seen.append(number))

    class Interrupted(Notebook):
        def state_dict(self) -> Any:
            send(TERM)
            send(USR1)
            return super().state_dict()

    trainer = trainer_that({3: lambda: send(USR1)})
    checkpoint = Checkpoint({"notes": Interrupted({"a": torch.ones(3)})}, tmp_path)
    preemption = Preemption(trainer, checkpoint)
    trainer.run([0] * 5)
    assert preemption.preempted
    assert len(seen) >= 2
    (path,) = tmp_path.iterdir()
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(3))


def test_a_run_that_begins_later_ends_where_it_starts() -> None:
    trainer, saver = trainer_that({3: send}), Log()
    preemption = Preemption(trainer, saver)
    trainer.run([0] * 5, max_epochs=2)
    preemption.preempted = False
    trainer.run([0] * 5, max_epochs=2)
    assert (trainer.state.iteration, saver.steps) == (3, [3])
    assert (preemption.requested, preemption.preempted, stop_reason(trainer)) == (True, True, "preempted")


def test_a_run_in_which_nothing_happens_was_not_preempted_though_the_one_before_was() -> None:
    trainer = trainer_that({3: send})
    preemption = Preemption(trainer)
    trainer.run([0] * 5, max_epochs=2)
    preemption._receiver.received = None
    trainer.run([0] * 5, max_epochs=2)
    assert (preemption.preempted, stop_reason(trainer)) == (False, None)


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
