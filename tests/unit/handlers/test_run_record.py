"""The record of a run's events, in one process."""

import copy
import errno
import logging
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint as IgniteCheckpoint
from ignite.handlers import DiskSaver as IgniteDiskSaver
from ignite.handlers import ModelCheckpoint as IgniteModelCheckpoint

from distckpt import (
    Checkpoint,
    DiskSaver,
    EarlyStopping,
    ModelCheckpoint,
    Preemption,
    TerminateOnNan,
    TimeLimit,
    resume,
)
from distckpt.handlers import run_record
from distckpt.handlers.runs import run_of
from distckpt.policy.naming import EVENTS_NAME
from distckpt.storage import event_file
from distckpt.storage.event_file import read_events
from tests.unit.toys import InMemory, idle_engine, linear

LENGTH = 3


def events_in(directory: Path) -> list[Mapping[str, Any]]:
    found = read_events(directory)
    assert found.num_dropped == 0
    return list(found.events)


def kinds_in(directory: Path) -> list[str]:
    return [event["event"] for event in events_in(directory)]


def only(directory: Path, kind: str) -> Mapping[str, Any]:
    (event,) = [event for event in events_in(directory) if event["event"] == kind]
    return event


def make(directory: Path, step: Callable[..., Any] = lambda *_: None, **settings: Any) -> tuple[Engine, Checkpoint]:
    """Return a trainer that saves after each epoch and records."""
    trainer = Engine(step)
    saver = DiskSaver(directory, require_empty=False, **({"record_events": True} | settings))
    handler = Checkpoint({"model": linear(0), "trainer": trainer}, saver, n_saved=1)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
    return trainer, handler


def run_id(trainer: Engine) -> str:
    """Return the id of the trainer's run."""
    found = run_of(trainer).run
    assert found is not None
    return found.id


def run(trainer: Engine, epochs: int = 2) -> None:
    trainer.run(range(LENGTH), max_epochs=epochs)


@pytest.mark.parametrize("background", [False, True])
def test_a_run_records_its_start_its_saves_and_its_end(tmp_path: Path, *, background: bool) -> None:
    begin_s = time.time()
    trainer, handler = make(tmp_path, background=background)
    run(trainer)
    start, first, second, end = events = events_in(tmp_path)
    assert kinds_in(tmp_path) == ["start", "save", "save", "end"]
    assert len({event["session"] for event in events}) == 1
    assert {name: start[name] for name in ("format", "iteration", "max_epochs", "max_iters", "epoch_length")} == {
        "format": 1,
        "iteration": 0,
        "max_epochs": 2,
        "max_iters": None,
        "epoch_length": LENGTH,
    }
    assert (start["world_size"], start["backend"]) == (1, "serial")
    assert (first["file"], first["iteration"], first["epoch"]) == (f"checkpoint_{LENGTH}.pt", LENGTH, 1)
    assert (first["removed"], second["removed"]) == ([], [first["file"]])
    assert second["run"] == run_id(trainer)
    assert (second["handler"], second["score"]) == ("checkpoint by step", None)
    assert second["num_bytes"] == Path(handler.last_checkpoint or "").stat().st_size
    assert (end["iteration"], end["epoch"]) == (2 * LENGTH, 2)
    for save in (first, second):
        assert save["stall_s"] > 0.0
        assert save["durable_s"] > 0.0
        assert save["at_s"] + save["durable_s"] < time.time()
    times = [event["at_s"] for event in events]
    assert times == sorted([begin_s, *times])[1:]


def test_a_resume_tells_the_file_its_run_and_what_was_skipped(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path)
    run(trainer)
    (tmp_path / "checkpoint_99.pt").write_bytes(b"")
    again, handler = make(tmp_path)
    assert resume({"model": linear(1), "trainer": again}, tmp_path, engine=again) is not None
    assert kinds_in(tmp_path) == ["start", "save", "save", "end"], "nothing is recorded before the run starts"
    run(again, epochs=3)
    assert handler.last_checkpoint is not None
    resumed, start, save, _ = events_in(tmp_path)[4:]
    assert (resumed["event"], start["event"]) == ("resume", "start")
    assert (resumed["file"], resumed["iteration"], resumed["epoch"]) == ("checkpoint_6.pt", 6, 2)
    assert (resumed["run"], resumed["lineage"]) == (run_id(trainer), [])
    assert [name for name, _ in resumed["skipped"]] == ["checkpoint_99.pt"]
    assert start["iteration"] == 6
    assert resumed["session"] == start["session"] == save["session"] != events_in(tmp_path)[0]["session"]


def _stop_by_nan(trainer: Engine) -> None:
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())


def _stop_by_time(trainer: Engine) -> None:
    limit = TimeLimit(1)
    limit.limit_sec = -1
    trainer.add_event_handler(Events.ITERATION_COMPLETED, limit)


def _stop_by_score(trainer: Engine) -> None:
    trainer.add_event_handler(Events.ITERATION_COMPLETED, EarlyStopping(1, lambda _: 0.0, trainer))


@pytest.mark.parametrize(
    ("reason", "attach", "iteration"),
    [("nan", _stop_by_nan, 1), ("time_limit", _stop_by_time, 1), ("early_stop", _stop_by_score, 2)],
)
def test_a_stop_is_recorded_with_its_reason(
    tmp_path: Path, reason: str, attach: Callable[[Engine], None], iteration: int
) -> None:
    trainer, _ = make(tmp_path, lambda *_: float("nan"))
    attach(trainer)
    run(trainer)
    stop = only(tmp_path, "stop")
    assert (stop["reason"], stop["iteration"]) == (reason, iteration)
    assert kinds_in(tmp_path)[-1] == "end"


@pytest.mark.parametrize("exit_code", [0, 75])
def test_a_signal_and_the_stop_that_follows_are_recorded_in_their_order(tmp_path: Path, exit_code: int) -> None:
    trainer, handler = make(tmp_path, lambda _, batch: os.kill(os.getpid(), signal.SIGUSR1) if batch == 1 else None)
    preemption = Preemption(trainer, handler, exit_code=exit_code)
    try:
        if exit_code:
            with pytest.raises(SystemExit):
                run(trainer)
        else:
            run(trainer)
    finally:
        preemption.close()
    assert kinds_in(tmp_path) == ["start", "signal", "stop", "save", "end"]
    assert only(tmp_path, "signal")["signals"] == [{"rank": 0, "signal": "SIGUSR1"}]
    assert only(tmp_path, "stop")["reason"] == "preempted"
    assert only(tmp_path, "save")["iteration"] == 2


def test_an_error_is_recorded_with_its_type_and_the_first_of_its_text(tmp_path: Path) -> None:
    def step(_: Engine, batch: int) -> None:
        if batch == 2:
            raise ValueError("a\nb" + 1000 * "c")

    trainer, _ = make(tmp_path, step)
    with pytest.raises(ValueError, match="a"):
        run(trainer)
    assert kinds_in(tmp_path) == ["start", "error"]
    error = only(tmp_path, "error")
    assert (error["type"], error["iteration"], error["text"][:4], len(error["text"])) == ("ValueError", 2, "a bc", 400)


def test_a_stop_in_an_earlier_run_does_not_hide_an_exit_of_the_program(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, lambda engine, _: sys.exit(1) if engine.state.max_epochs == 1 else float("nan"))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    run(trainer)
    trainer.state.iteration = trainer.state.epoch = 0
    with pytest.raises(SystemExit):
        run(trainer, epochs=1)
    assert only(tmp_path, "error")["type"] == "SystemExit"


def test_events_go_to_the_directories_of_all_the_engines_checkpoints_once(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path / "a")
    for name in ("b", "b", "c"):
        saver = DiskSaver(tmp_path / name, require_empty=False, record_events=name == "b")
        trainer.add_event_handler(Events.COMPLETED, Checkpoint({"model": linear(0)}, saver, name + str(id(saver))))
    run(trainer, epochs=1)
    assert kinds_in(tmp_path / "a") == ["start", "save", "end"]
    assert kinds_in(tmp_path / "b") == ["start", "save", "save", "end"]
    assert not (tmp_path / "c" / EVENTS_NAME).exists()


def test_a_checkpoint_on_an_evaluator_records_the_trainers_run(tmp_path: Path) -> None:
    trainer, evaluator = idle_engine(), idle_engine()
    saver = DiskSaver(tmp_path, record_events=True)
    best = Checkpoint({"model": linear(0)}, saver, "best", lambda _: trainer.state.epoch / 2, "accuracy")
    evaluator.add_event_handler(Events.COMPLETED, best)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([0]))
    run(trainer)
    assert kinds_in(tmp_path) == ["start", "save", "save", "end"]
    save = events_in(tmp_path)[2]
    assert (save["handler"], save["score"], save["iteration"], save["epoch"]) == (
        "best_model by accuracy",
        1.0,
        2 * LENGTH,
        2,
    )
    assert only(tmp_path, "start")["iteration"] is None, "when it started is not known there"


def test_a_save_outside_of_a_run_belongs_to_no_session(tmp_path: Path) -> None:
    trainer, handler = make(tmp_path)
    handler(trainer)
    (save,) = events_in(tmp_path)
    assert (save["event"], save["session"]) == ("save", None)
    assert not [thread for thread in threading.enumerate() if thread.name == "distckpt-record"]


@pytest.mark.parametrize("how", ["argument", "environment", "model checkpoint", "in memory", "ignite's saver"])
def test_nothing_is_recorded_if_it_is_switched_off_or_the_saver_is_no_directory_of_distckpt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv("DISTCKPT_RECORD_EVENTS", "0" if how == "environment" else "1")
    trainer, objects = idle_engine(), {"model": linear(0)}
    if how == "model checkpoint":
        made = ModelCheckpoint(tmp_path, record_events=False)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, made, objects)
    else:
        savers: dict[str, Callable[[], Any]] = {
            "argument": lambda: DiskSaver(tmp_path, record_events=False),
            "environment": lambda: tmp_path,
            "in memory": InMemory,
            "ignite's saver": lambda: IgniteDiskSaver(tmp_path),
        }
        saver = savers[how]()
        trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(objects, saver))
    run(trainer)
    assert not (tmp_path / EVENTS_NAME).exists()


def test_the_environment_switches_the_record_on_for_savers_that_do_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTCKPT_RECORD_EVENTS", "1")
    trainer = idle_engine()
    trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint({"model": linear(0)}, tmp_path))
    run(trainer)
    assert kinds_in(tmp_path) == ["start", "save", "save", "end"]


@pytest.mark.parametrize("setting", [None, "0", ""])
@pytest.mark.parametrize("ignites", [False, True])
def test_a_directory_holds_the_files_that_ignites_handlers_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str | None, *, ignites: bool
) -> None:
    monkeypatch.delenv("DISTCKPT_RECORD_EVENTS", raising=False)
    if setting is not None:
        monkeypatch.setenv("DISTCKPT_RECORD_EVENTS", setting)
    trainer = idle_engine()
    objects, directories = {"model": linear(0)}, [tmp_path / name for name in ("path", "saver", "model")]
    handlers: list[Any]
    if ignites:
        handlers = [
            IgniteCheckpoint(objects, str(directories[0])),
            IgniteCheckpoint(objects, IgniteDiskSaver(directories[1])),
        ]
        handlers.append(IgniteModelCheckpoint(directories[2]))
    else:
        handlers = [Checkpoint(objects, directories[0]), Checkpoint(objects, DiskSaver(directories[1]))]
        handlers.append(ModelCheckpoint(directories[2]))
    for handler in handlers[:2]:
        trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, handlers[2], objects)
    run(trainer)
    assert [os.listdir(directory) for directory in directories] == 3 * [[f"model_{2 * LENGTH}.pt"]]


def test_a_record_that_cannot_be_written_is_logged_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(event_file, "append_events", fail)
        patch.setattr(run_record, "append_events", fail)
        trainer, handler = make(tmp_path)
        run(trainer)
    assert Path(handler.last_checkpoint or "").exists()
    (message,) = [one.getMessage() for one in caplog.records if "record of events" in one.getMessage()]
    assert "ENOSPC" in message
    assert str(tmp_path / EVENTS_NAME) in message
    run(trainer, epochs=3)
    assert kinds_in(tmp_path) == ["start", "save", "end"], "it is tried again"


def test_a_record_alone_is_an_empty_directory_to_a_saver_and_to_a_resume(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, lambda *_: sys.exit(1))
    with pytest.raises(SystemExit):
        run(trainer)
    assert os.listdir(tmp_path) == [EVENTS_NAME]
    assert DiskSaver(tmp_path, require_empty=True).record_events is False
    assert resume({"trainer": trainer}, tmp_path, engine=trainer) is None


def test_progress_is_recorded_while_no_event_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_record, "_PERIOD_S", 0.001)
    limit_s = time.monotonic() + 30.0

    def step(_: Engine, batch: int) -> None:
        while batch == 2 and "progress" not in kinds_in(tmp_path) and time.monotonic() < limit_s:
            threading.Event().wait(0.01)

    trainer, _ = make(tmp_path, step)
    run(trainer, epochs=1)
    progress = [event for event in events_in(tmp_path) if event["event"] == "progress"]
    assert progress[0]["iteration"] in (1, 2)
    assert progress[0]["epoch"] == 1
    assert [event["iteration"] for event in progress] == sorted({event["iteration"] for event in progress})
    assert not [thread for thread in threading.enumerate() if thread.name == "distckpt-record"], "it ends with the run"


def test_a_long_run_records_its_progress_ever_more_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    trainer, _ = make(tmp_path)
    thread = run_record._ProgressThread(run_of(trainer).record, trainer)

    def wait(period_s: float) -> bool:
        waits.append(period_s)
        return len(waits) == 3

    clock = iter([20.0, 2000.0, 360_000.0])
    monkeypatch.setattr(thread, "_begin_s", 0.0)
    monkeypatch.setattr(thread._has_ended, "wait", wait)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    thread.run()
    assert waits == [1.0, 20.0, 3600.0]


def test_a_copy_of_an_engine_has_a_record_of_its_own(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path)
    record = run_of(trainer).record
    record.begin(trainer)
    for copied in (copy.deepcopy(record), pickle.loads(pickle.dumps(record))):  # noqa: S301 - made here
        copied.add(trainer, "stop", reason="nan")
    record.end(trainer, None)
    assert kinds_in(tmp_path) == ["start", "end"]


def test_an_iteration_without_an_event_touches_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(run_record, "append_events", lambda *given: calls.append(given))
    trainer, _ = make(tmp_path)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    trainer.run(range(500), max_epochs=1)
    assert len(calls) == 3, "start, save, end"
