"""What distckpt logs in one process, and that it is seen where a program configures no logging."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Engine, Events

import distckpt
from distckpt import Checkpoint, DiskSaver
from distckpt._messages import log_level
from tests.support.limits import PROGRAM_LIMIT_S
from tests.unit.toys import InMemory, idle_engine, linear, run_epochs

NAN = float("nan")

PROGRAM = """
import logging, os, signal, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
if sys.argv[1] == "configured":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
import torch
from ignite.engine import Engine, Events
from distckpt import Checkpoint, DiskSaver, EarlyStopping, Preemption, TerminateOnNan, TimeLimit, resume
from distckpt.handlers import time_limit

def engine(output=0.0):
    one = Engine(lambda engine, batch: output)
    one.logger.disabled = True
    return one

def run(one, *handlers):
    for handler in handlers:
        one.add_event_handler(Events.ITERATION_COMPLETED, handler)
    one.run([0] * 4)

run(engine(float("nan")), TerminateOnNan())
trainer = engine()
run(trainer, EarlyStopping(2, lambda engine: 0.5, trainer))
limit = TimeLimit(60)
limit.start_time -= 100.0
run(engine(), limit)

trainer, model = engine(), torch.nn.Linear(2, 2)
objects = {"model": model, "trainer": trainer}
folder = DiskSaver("preempted", require_empty=False)
checkpoint = Checkpoint(objects, folder, n_saved=2)
preemption = Preemption(trainer, checkpoint, exit_code=75)
resume(objects, checkpoint, engine=trainer)
try:
    run(trainer, lambda engine: os.kill(os.getpid(), signal.SIGTERM) if engine.state.iteration == 2 else None)
except SystemExit as error:
    assert error.code == 75
preemption.close()
resume(objects, checkpoint, engine=trainer)
Path("preempted/checkpoint_5.pt").write_bytes(Path("preempted/checkpoint_3.pt").read_bytes()[:-200])
resume({"model": model}, "preempted")

run(engine(), Checkpoint({"model": model}, "nan", score_function=lambda engine: float("nan")))
late = Checkpoint({"model": model}, "late")
late.load_state_dict({"_saved": [(100, "model_100.pt")]})
late(engine())
late.load_state_dict({"_saved": []})
for iteration in (1, 2):
    trainer.state.iteration = iteration
    late(trainer)
Path("late/model_2.pt").unlink()
trainer.state.iteration = 3
late(trainer)
print("done")
"""

SEEN = [
    "TerminateOnNan: Output 'nan' contains NaN or Inf. Stop training (rank 0, iteration 1: ",
    "EarlyStopping: Stop training (iteration 3: 2 times no improvement; best score 0.5, last score 0.5)",
    "Reached the time limit: 60 sec. Stop training (iteration 1; ",
    "resume: nothing to resume from in preempted: starting afresh",
    "Preemption: received a signal (rank 0: SIGTERM); the run ends at iteration 3",
    "The run was preempted: the program ends, exit code 75",
    "resume: continuing from preempted/checkpoint_3.pt of iteration 3, epoch 0: loaded model, trainer in ",
    "resume: preempted/checkpoint_5.pt cannot be loaded: ",
    "Checkpoint: iteration 0 is not saved: its step is not above that of model_100.pt, 100, the lowest of those kept. ",
    "Checkpoint: while removing older checkpoints: rank 0: model_2.pt was already gone.",
]
"""What changes the course of a run, one line each."""


def lines_of_the_program(folder: Path, mode: str) -> list[str]:
    """Run the program in a process of its own; return the lines on standard error."""
    done = subprocess.run(
        # With torch 2.14 importing ignite warns of torch.jit, on standard error.
        [sys.executable, "-W", "ignore::FutureWarning", "-c", PROGRAM, mode],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(distckpt.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=PROGRAM_LIMIT_S,
        check=False,
    )
    assert done.stdout == "done\n", done.stderr
    return done.stderr.splitlines()


def test_what_changes_a_run_is_on_standard_error_where_no_logging_is_configured(tmp_path: Path) -> None:
    lines = lines_of_the_program(tmp_path, "bare")
    assert [sum(line.startswith(seen) for line in lines) for seen in SEEN] == [1] * len(SEEN), lines
    assert sum("is not saved: the score is NaN." in line for line in lines) == 4, lines
    assert not [line for line in lines if ": saved " in line], "a save is no news"


def test_with_logging_configured_each_is_said_once(tmp_path: Path) -> None:
    lines = lines_of_the_program(tmp_path, "configured")
    assert [sum(line.startswith(f"WARNING {seen}") for line in lines) for seen in SEEN] == [1] * len(SEEN), lines
    assert [sum(seen in line for line in lines) for seen in SEEN] == [1] * len(SEEN), lines
    saved = [line for line in lines if line.startswith("INFO Checkpoint: saved ")]
    names = [line.split(": ")[1] for line in saved]
    assert names == [
        "saved preempted/checkpoint_3.pt",
        "saved late/model_1.pt",
        "saved late/model_2.pt",
        "saved late/model_3.pt",
    ]


SAVED = re.compile(
    r"Checkpoint: saved (?P<path>\S+): (?:(?P<bytes>\d+) bytes, )?stall (?P<stall>\d+\.\d{3}) s, "
    r"durable after (?P<durable>\d+\.\d{3}) s(?P<replaced>; .*)?"
)


def saves(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Return what the lines about saves say."""
    found = [SAVED.fullmatch(one.getMessage()) for one in caplog.records if one.levelno == logging.INFO]
    return [one.groupdict() for one in found if one is not None]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"background": True},
        {"share_write": "node"},
        {"check_replicas": True},
        {"_use_new_zipfile_serialization": False},
    ],
    ids=str,
)
def test_each_save_is_one_line_whatever_the_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    caplog.set_level(logging.INFO, logger="distckpt")
    handler = Checkpoint({"model": linear(0)}, DiskSaver(tmp_path, **options), n_saved=2)
    run_epochs(handler, 3)
    lines = saves(caplog)
    assert [one["path"] for one in lines] == [str(tmp_path / f"model_{step}.pt") for step in (1, 2, 3)]
    assert int(lines[-1]["bytes"]) == (tmp_path / "model_3.pt").stat().st_size
    assert [one["replaced"] for one in lines] == [None, None, "; evicted model_1.pt (step 1): n_saved=2"]


def test_the_line_names_the_score_by_which_a_checkpoint_lost_its_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="distckpt")
    scores = iter([0.25, 0.5])
    handler = Checkpoint(
        {"model": linear(0)}, tmp_path, score_function=lambda _: next(scores), score_name="accuracy", n_saved=1
    )
    run_epochs(handler, 2)
    assert [one["replaced"] for one in saves(caplog)] == [
        None,
        "; evicted model_accuracy=0.2500.pt (accuracy 0.25): n_saved=1",
    ]


def test_the_line_says_that_a_file_of_the_same_name_was_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="distckpt")
    run_epochs(Checkpoint({"model": linear(0)}, tmp_path, filename_pattern="latest.{ext}"), 2)
    assert [one["replaced"] for one in saves(caplog)] == [None, "; replaced the file of that name (step 1)"]


def test_the_line_names_no_file_that_could_not_be_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="distckpt")
    handler = Checkpoint({"model": linear(0)}, tmp_path)
    engine = run_epochs(handler, 1)
    (tmp_path / "model_1.pt").unlink()
    (tmp_path / "model_1.pt").mkdir()
    engine.state.iteration = 2
    handler(engine)
    (tmp_path / "model_1.pt").rmdir()
    (tmp_path / "model_1.pt").touch()
    engine.state.iteration = 3
    handler(engine)
    assert [one["replaced"] for one in saves(caplog)] == [
        None,
        None,
        "; evicted model_2.pt (step 2): n_saved=1; removed model_1.pt, which an earlier save had to leave",
    ]
    assert caplog.text.count("model_1.pt could not be removed") == 1


def test_the_line_of_a_custom_saver_names_the_file_and_no_size(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="distckpt")
    run_epochs(Checkpoint({"model": linear(0)}, InMemory()), 1)
    (line,) = saves(caplog)
    assert (line["path"], line["bytes"]) == ("model_1.pt", None)


def test_a_save_in_the_background_stalls_for_its_copy_and_is_durable_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="distckpt")
    clock = iter(range(1_000))
    monkeypatch.setattr("distckpt.handlers.save_log.time.monotonic", lambda: next(clock))
    handler = Checkpoint({"model": linear(0)}, DiskSaver(tmp_path, background=True))
    handler(idle_engine())
    handler.wait_until_finished()
    (line,) = saves(caplog)
    assert float(line["stall"]) < float(line["durable"])


def test_a_save_that_failed_is_no_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="distckpt")
    handler = Checkpoint({"model": linear(0)}, tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(OSError, match="gone"):
        handler(idle_engine())
    assert saves(caplog) == []


def test_a_step_voted_nan_and_a_skipped_save_are_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(lambda _engine, batch: batch)
    handler = Checkpoint({"model": linear(0)}, tmp_path)
    engine.add_event_handler(Events.ITERATION_COMPLETED, distckpt.TerminateOnNan())
    engine.add_event_handler(Events.ITERATION_COMPLETED, handler)
    engine.run([0.0, NAN])
    warnings = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert f"Checkpoint: iteration 2 is not saved: it was voted NaN. The last one is {tmp_path / 'model_1.pt'}." in (
        warnings
    )


@pytest.mark.parametrize("steps", [[NAN], [1.0, NAN]])
def test_a_step_that_is_nan_is_not_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: list[Any]) -> None:
    handler = Checkpoint({"model": linear(0)}, tmp_path, global_step_transform=lambda *_: steps.pop(0))
    run_epochs(handler, len(steps))
    assert "is not saved: the step is NaN. " in caplog.text


def test_a_score_that_is_no_better_is_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="distckpt")
    run_epochs(Checkpoint({"model": linear(0)}, tmp_path, score_function=lambda _: 0.5), 3)
    assert [one.getMessage() for one in caplog.records if "is not saved" in one.getMessage()] == []


def test_two_events_of_one_step_are_saved_once_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="distckpt")
    engine, handler = idle_engine(), Checkpoint({"model": linear(0)}, tmp_path)
    engine.add_event_handler(Events.EPOCH_COMPLETED | Events.COMPLETED, handler)
    engine.run([0], max_epochs=2)
    assert [one["path"] for one in saves(caplog)] == [str(tmp_path / f"model_{step}.pt") for step in (1, 2)]
    assert [one.getMessage() for one in caplog.records if "is not saved" in one.getMessage()] == []


def test_other_ranks_than_the_reporting_ones_log_at_debug() -> None:
    assert [log_level(rank, {0, 2}, logging.INFO) for rank in range(3)] == [logging.INFO, logging.DEBUG, logging.INFO]


@pytest.mark.parametrize("events", [2, 3])
def test_a_save_left_out_is_told_of_once_where_several_events_of_an_iteration_ask_for_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, events: int
) -> None:
    trainer = Engine(lambda engine, _batch: NAN if engine.state.iteration == 3 else 0.0)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, distckpt.TerminateOnNan())
    handler = Checkpoint({"model": linear(1)}, tmp_path)
    for event in (Events.ITERATION_COMPLETED, Events.COMPLETED, Events.TERMINATE)[:events]:
        trainer.add_event_handler(event, handler)
    trainer.run([0] * 5)
    texts = [one.getMessage() for one in caplog.records if "is not saved" in one.getMessage()]
    assert texts == [f"Checkpoint: iteration 3 is not saved: it was voted NaN. The last one is {tmp_path}/model_2.pt."]
