"""The examples of the handlers' reference (ignite 0.4.x) run with the imports changed and nothing else.

Where the reference leaves something open (`...`) it is filled in; its `/tmp/models` is a folder of the test.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from distckpt import (
    Checkpoint,
    DiskSaver,
    EarlyStopping,
    ModelCheckpoint,
    TerminateOnNan,
    TimeLimit,
    Timer,
    global_step_from_engine,
)


@pytest.fixture
def models(tmp_path: Path) -> str:
    return str(tmp_path / "models")


def _trainer() -> Engine:
    return Engine(lambda _engine, _batch: None)


@pytest.mark.parametrize(
    ("checkpoint_iters", "files"),
    [(True, ["checkpoint_7000.pt", "checkpoint_8000.pt"]), (False, ["checkpoint_5.pt", "checkpoint_6.pt"])],
)
def test_checkpoints_during_training(models: str, checkpoint_iters: bool, files: list[str]) -> None:  # noqa: FBT001
    trainer = _trainer()
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    data_loader = [0] * 1400

    to_save = {"model": model, "optimizer": optimizer, "lr_scheduler": lr_scheduler, "trainer": trainer}

    if checkpoint_iters:
        # A: the files are named by iteration
        handler = Checkpoint(to_save, DiskSaver(models, create_dir=True), n_saved=2)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=1000), handler)
    else:
        # B: the files are named by epoch
        gst = lambda *_: trainer.state.epoch  # noqa: E731 - as in the reference
        handler = Checkpoint(to_save, DiskSaver(models, create_dir=True), n_saved=2, global_step_transform=gst)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)

    trainer.run(data_loader, max_epochs=6)
    assert sorted(os.listdir(models)) == files


def test_best_model_of_an_evaluator(models: str) -> None:
    trainer, evaluator = _trainer(), _trainer()
    model = nn.Linear(1, 1)

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate() -> None:
        evaluator.run([0])

    @evaluator.on(Events.EPOCH_COMPLETED)
    def measure() -> None:
        evaluator.state.metrics["accuracy"] = 0.68 + trainer.state.epoch / 100

    score_function = Checkpoint.get_default_score_fn("accuracy")

    to_save = {"model": model}
    handler = Checkpoint(
        to_save,
        DiskSaver(models, create_dir=True),
        n_saved=2,
        filename_prefix="best",
        score_function=score_function,
        score_name="val_acc",
        global_step_transform=global_step_from_engine(trainer),
    )

    evaluator.add_event_handler(Events.COMPLETED, handler)

    trainer.run([0, 1], max_epochs=10)
    assert sorted(os.listdir(models)) == ["best_model_10_val_acc=0.7800.pt", "best_model_9_val_acc=0.7700.pt"]


@pytest.mark.parametrize(
    ("arguments", "score_name", "file"),
    [
        (("accuracy",), "val_accuracy", "model_val_accuracy=0.7500.pt"),
        (("loss", -1.0), "val_neg_loss", "model_val_neg_loss=-0.1234.pt"),
    ],
)
def test_default_score_functions(arguments: Any, score_name: str, file: str) -> None:
    evaluator = _trainer()
    files: list[str] = []

    @evaluator.on(Events.EPOCH_COMPLETED)
    def measure() -> None:
        evaluator.state.metrics.update(accuracy=0.75, loss=0.1234)

    def save_handler(_checkpoint: Any, filename: str) -> None:
        files.append(filename)

    best_score = Checkpoint.get_default_score_fn(*arguments)
    best_model_handler = Checkpoint(
        {"model": nn.Linear(1, 1)}, save_handler, score_name=score_name, score_function=best_score
    )
    evaluator.add_event_handler(Events.COMPLETED, best_model_handler)
    evaluator.run([0])
    assert files == [file]


def test_load_objects(models: str) -> None:
    trainer = _trainer()
    handler = ModelCheckpoint(models, "myprefix", n_saved=None, create_dir=True)
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    to_save = {"weights": model, "optimizer": optimizer}
    trainer.add_event_handler(Events.EPOCH_COMPLETED(every=2), handler, to_save)
    trainer.run(torch.randn(10, 1), 5)

    to_load = to_save
    # The reference says .pth here; the handler has written .pt since before that release.
    checkpoint_fp = models + "/myprefix_checkpoint_40.pt"
    checkpoint = torch.load(checkpoint_fp, weights_only=True)
    with torch.no_grad():
        model.weight.zero_()
    Checkpoint.load_objects(to_load=to_load, checkpoint=checkpoint)
    assert torch.equal(model.weight, checkpoint["weights"]["weight"])


def test_reset_between_folds() -> None:
    trainer = _trainer()
    checkpointer = Checkpoint({"model": nn.Linear(1, 1)}, lambda _checkpoint, _filename: None)

    trainer.add_event_handler(Events.COMPLETED, checkpointer)
    trainer.add_event_handler(Events.STARTED, checkpointer.reset)

    # fold 0
    trainer.run([0, 1, 2], max_epochs=2)
    assert checkpointer.last_checkpoint == "model_6.pt"

    # fold 1
    trainer.run([0, 1], max_epochs=2)
    assert checkpointer.last_checkpoint == "model_4.pt"


def test_default_filename_pattern() -> None:
    filename_pattern = Checkpoint.setup_filename_pattern()
    assert filename_pattern == "{filename_prefix}_{name}_{global_step}_{score_name}={score}.{ext}"


def test_filename_pattern_of_the_note(models: str) -> None:
    model = nn.Linear(1, 1)
    handler = Checkpoint(
        {"model": model, "optimizer": torch.optim.SGD(model.parameters())},
        DiskSaver(models),
        filename_pattern="{global_step}-{name}-{score}.pt",
        score_function=lambda _engine: 94,
        global_step_transform=lambda _engine, _event: 30000,
    )
    handler(_trainer())
    assert os.listdir(models) == ["30000-checkpoint-94.pt"]


def test_model_checkpoint(models: str) -> None:
    trainer = _trainer()
    handler = ModelCheckpoint(models, "myprefix", n_saved=2, create_dir=True)
    model = nn.Linear(3, 3)
    trainer.add_event_handler(Events.EPOCH_COMPLETED(every=2), handler, {"mymodel": model})
    trainer.run([0, 1, 2, 3, 4], max_epochs=6)
    assert sorted(os.listdir(models)) == ["myprefix_mymodel_20.pt", "myprefix_mymodel_30.pt"]
    assert handler.last_checkpoint == Path(models) / "myprefix_mymodel_30.pt"


def test_early_stopping() -> None:
    trainer, evaluator = _trainer(), _trainer()
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([0]))

    @evaluator.on(Events.EPOCH_COMPLETED)
    def measure() -> None:
        evaluator.state.metrics["nll"] = max(0.5, 1 - trainer.state.epoch / 10)

    def score_function(engine: Engine) -> float:
        val_loss: float = engine.state.metrics["nll"]
        return -val_loss

    handler = EarlyStopping(patience=10, score_function=score_function, trainer=trainer)
    # Note: the handler is attached to an *Evaluator* (runs one epoch on validation dataset).
    evaluator.add_event_handler(Events.COMPLETED, handler)
    trainer.run([0], max_epochs=100)
    assert trainer.state.epoch == 15


class _Clock:
    """Replaces `time` in the timer, and the work that takes time."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def work(self) -> None:
        self.now += 0.125

    idle = work


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    stand_in = _Clock()
    monkeypatch.setattr("distckpt.handlers.timer.time", stand_in)
    return stand_in


def test_timer_total(clock: _Clock) -> None:
    t = Timer(average=False)
    for _ in range(10):
        clock.work()
        clock.idle()
    assert t.value() == 2.5


def test_timer_average(clock: _Clock) -> None:
    t = Timer(average=True)
    for _ in range(10):
        clock.work()
        clock.idle()
        t.step()
    assert t.value() == 0.25


def test_timer_of_work_alone(clock: _Clock) -> None:
    t = Timer(average=True)
    for _ in range(10):
        t.resume()
        clock.work()
        t.pause()
        clock.idle()
        t.step()
    assert t.value() == 0.125


def test_timer_of_a_batch(clock: _Clock) -> None:
    trainer = Engine(lambda _engine, _batch: clock.work())
    trainer.add_event_handler(Events.ITERATION_STARTED, clock.idle)
    timer = Timer(average=True)
    answer = timer.attach(
        trainer,
        start=Events.EPOCH_STARTED,
        resume=Events.ITERATION_STARTED,
        pause=Events.ITERATION_COMPLETED,
        step=Events.ITERATION_COMPLETED,
    )
    trainer.run([0] * 4, max_epochs=2)
    assert answer is timer
    assert (timer.step_count, timer.total) == (4, 0.125 * 5)  # reset leaves it running: the first wait counts too


def test_terminate_on_nan() -> None:
    trainer = Engine(lambda _engine, batch: [1.23, torch.ones(2), torch.tensor(batch)])
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    assert trainer.run([0.0, 1.0, float("nan"), 2.0]).iteration == 3


def test_time_limit() -> None:
    trainer = _trainer()
    handler = TimeLimit()  # 8 hours of training
    trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    assert (trainer.run([0, 1]).iteration, handler.limit_sec) == (2, 8 * 3600)
