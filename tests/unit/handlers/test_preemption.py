"""Preemption in one process: what it asks for, and when a signal is answered."""

import gc
import os
import signal
import threading
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from distckpt import (
    Checkpoint,
    Preemption,
    TimeLimit,
    stop_reason,
)
from tests.unit.preempted import (
    LIMIT_S,
    TERM,
    URG,
    USR1,
    USR2,
    Log,
    send,
    trainer_that,
)
from tests.unit.toys import InMemory, Notebook, idle_engine

pytestmark = pytest.mark.usefixtures("signals_as_before")

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
