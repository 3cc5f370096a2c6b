"""What handlers of EPOCH_COMPLETED see of an epoch whose batches were all trained before a resume."""

import contextlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Average, RunningAverage

from distckpt import Checkpoint, DiskSaver, Loop, resume
from distckpt.handlers.epoch_numbers import NOTHING, encode
from tests.unit.ptformat.test_records import record_of

LENGTH = 4
BATCHES = [1.0, 2.0, 3.0, 6.0]


class KilledError(Exception):
    """What ends a run in its middle."""


class Training:
    """A training whose metrics are the epoch's average and a running one, saved after each epoch's last batch."""

    def __init__(
        self, folder: Path, *, on_loop: bool = False, saves_metric: bool = False, is_killed: bool = False
    ) -> None:
        self.trainer = Loop(BATCHES, max_epochs=3) if on_loop else Engine(lambda _engine, batch: batch)
        self.trainer.logger.disabled = True
        average = Average()
        average.attach(self.trainer, "average")
        RunningAverage(output_transform=lambda output: output).attach(self.trainer, "running")
        self.seen: list[dict[str, Any]] = []
        self.objects: dict[str, Any] = {"trainer": self.trainer} | ({"average": average} if saves_metric else {})
        checkpoint = Checkpoint(self.objects, DiskSaver(folder, require_empty=False))
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED(every=LENGTH), checkpoint)
        self.best = Checkpoint(
            self.objects,
            DiskSaver(folder / "best", require_empty=False),
            score_function=lambda engine: engine.state.metrics["average"],
            score_name="average",
        )
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self._look, is_killed)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self.best)
        resume(self.objects, checkpoint, engine=self.trainer)

    def _look(self, is_killed: bool) -> None:  # noqa: FBT001 - a handler's argument
        if is_killed:
            raise KilledError
        self.seen.append({"output": self.trainer.state.output, **self.trainer.state.metrics})

    def run(self) -> None:
        if not isinstance(self.trainer, Loop):
            self.trainer.run(BATCHES, max_epochs=3)
            return
        with self.trainer as loop:
            for _ in loop.epochs():
                for batch in loop.batches():
                    loop.output = batch
                assert f"{loop.output:.1f}" == "6.0"


def killed(folder: Path, **options: Any) -> None:
    with contextlib.suppress(KilledError):
        Training(folder, is_killed=True, **options).run()


@pytest.mark.parametrize("on_loop", [False, True])
def test_numbers_come_from_the_record_and_an_unsaved_metric_is_nan(tmp_path: Path, *, on_loop: bool) -> None:
    killed(tmp_path, on_loop=on_loop)
    training = Training(tmp_path, on_loop=on_loop)
    with pytest.warns(UserWarning, match=r"all batches of epoch 1 were trained before, .*metrics \(Average\) are not"):
        training.run()
    averages = [seen["average"] for seen in training.seen]
    assert math.isnan(averages[0])
    assert averages[1:] == [3.0, 3.0]
    assert training.seen[0]["output"] == 6.0
    assert training.seen[0]["running"] == pytest.approx(1.158408)
    assert [score for score, _ in training.best.state_dict()["_saved"]] == [3.0], "a NaN is not saved"


@pytest.mark.parametrize("on_loop", [False, True])
def test_a_metric_that_was_saved_has_its_value(tmp_path: Path, *, on_loop: bool) -> None:
    killed(tmp_path, on_loop=on_loop, saves_metric=True)
    training = Training(tmp_path, on_loop=on_loop, saves_metric=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training.run()
    assert [seen["average"] for seen in training.seen] == [3.0, 3.0, 3.0]


OUTPUTS: list[Any] = [
    *(1, 0.5, True, math.inf, [1.0, 2], (1.0, (2,)), {"g": 1.0, "d": {"real": [3]}}),
    *(torch.tensor(0.5), torch.tensor(3, dtype=torch.int16), {"g": torch.tensor(0.5, requires_grad=True)}),
    *(np.float64(0.5), np.float32(0.25), [np.int64(3)], {"loss": np.uint8(1)}),
    *("text", {}, {"a": "b", "none": None}, []),
]


@pytest.mark.parametrize("output", OUTPUTS, ids=repr)
def test_outputs_of_numbers_are_seen_after_a_resume(tmp_path: Path, output: Any) -> None:
    def make() -> tuple[Engine, Checkpoint, list[Any]]:
        trainer, seen = Engine(lambda _engine, _batch: output), list[Any]()
        checkpoint = Checkpoint({"trainer": trainer}, DiskSaver(tmp_path, require_empty=False))
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), checkpoint)
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda: trainer.state.metrics.update(one=output, other=[output])
        )
        trainer.add_event_handler(
            Events.EPOCH_COMPLETED, lambda: seen.append([trainer.state.output, *trainer.state.metrics.values()])
        )
        return trainer, checkpoint, seen

    trainer, _, _ = make()
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), _kill)
    trainer.logger.disabled = True
    with contextlib.suppress(KilledError):
        trainer.run(range(2), max_epochs=2)
    again, checkpoint, seen = make()
    resume({"trainer": again}, checkpoint, engine=again)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.run(range(2), max_epochs=2)
    assert len(seen) == 2
    assert repr(seen[0]).replace(", requires_grad=True", "") == repr(seen[1]).replace(", requires_grad=True", "")
    assert str(type(seen[0][0])) == str(type(output))


def _kill() -> None:
    raise KilledError


def test_what_cannot_be_kept_of_an_output_is_named(tmp_path: Path) -> None:
    def make() -> tuple[Engine, Checkpoint]:
        trainer = Engine(lambda _engine, _batch: {"loss": 0.5, "y": torch.ones(3), "note": {1, 2}})
        checkpoint = Checkpoint({"trainer": trainer}, DiskSaver(tmp_path, require_empty=False))
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), checkpoint)
        trainer.logger.disabled = True
        return trainer, checkpoint

    trainer, _ = make()
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), _kill)
    with contextlib.suppress(KilledError):
        trainer.run(range(2), max_epochs=2)
    again, checkpoint = make()
    outputs: list[Any] = []
    again.add_event_handler(Events.EPOCH_COMPLETED, lambda: outputs.append(again.state.output))
    resume({"trainer": again}, checkpoint, engine=again)
    with pytest.warns(UserWarning, match=r"state\.output\['y'\], state\.output\['note'\]: handlers of EPOCH_COMPLETED"):
        again.run(range(2), max_epochs=2)
    assert outputs[0] == {"loss": 0.5}


@pytest.mark.parametrize("output", [[torch.ones(2)], 300 * "text", {"a": object()}, 257 * [0], None])
def test_only_numbers_are_recorded(tmp_path: Path, output: Any) -> None:
    trainer = Engine(lambda _engine, _batch: output)
    checkpoint = Checkpoint({"trainer": trainer}, DiskSaver(tmp_path, require_empty=False))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, checkpoint)
    trainer.state.metrics = {"loss": 0.5, "confusion": torch.ones(2, 2), "none": None}
    trainer.run([0], max_epochs=1)
    position = record_of(Path(str(checkpoint.last_checkpoint)))["data"]
    assert "output" not in position
    assert position["metrics"] == {"loss": 0.5, "none": None}


def test_keys_that_are_no_text_and_containers_in_themselves_are_named() -> None:
    lacking: list[str] = []
    assert encode({1: 0.5, "a": 0.5}, lacking, "output") == {"dict": {"a": 0.5}}
    assert encode({1: 0.5}, lacking, "output") is NOTHING
    assert lacking == ["output[1]", "output[1]"]
    looped: list[Any] = []
    looped.append(looped)
    assert encode(looped, lacking, "output") is NOTHING
    assert lacking[2:] == ["output" + 8 * "[0]"]


def test_within_an_epoch_nothing_is_recorded(tmp_path: Path) -> None:
    trainer = Engine(lambda _engine, batch: batch)
    checkpoint = Checkpoint({"trainer": trainer}, DiskSaver(tmp_path, require_empty=False))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), checkpoint)
    trainer.run(BATCHES, max_epochs=1)
    assert not {"output", "metrics"} & set(record_of(Path(str(checkpoint.last_checkpoint)))["data"])


@pytest.mark.parametrize("saves_metric", [False, True])
@pytest.mark.parametrize("on_loop", [False, True])
def test_the_first_epoch_of_data_without_a_length_is_completed(
    tmp_path: Path, *, on_loop: bool, saves_metric: bool
) -> None:
    def go(*, is_killed: bool) -> list[Any]:
        class Stream:
            def __iter__(self) -> Iterator[float]:
                return iter(BATCHES)

        trainer = Loop(Stream(), max_epochs=2) if on_loop else Engine(lambda _engine, batch: batch)
        average, seen = Average(), list[Any]()
        average.attach(trainer, "average")
        objects = {"trainer": trainer} | ({"average": average} if saves_metric else {})
        checkpoint = Checkpoint(objects, DiskSaver(tmp_path, require_empty=False))
        trainer.add_event_handler(Events.ITERATION_COMPLETED, checkpoint)

        @trainer.on(Events.EPOCH_COMPLETED)
        def look() -> None:
            if is_killed:
                raise KilledError
            seen.append((trainer.state.output, trainer.state.metrics["average"], trainer.state.iteration))

        resume(objects, checkpoint, engine=trainer)
        if isinstance(trainer, Loop):
            with trainer:
                for _ in trainer.epochs():
                    for batch in trainer.batches():
                        trainer.output = batch
        else:
            trainer.run(Stream(), max_epochs=2)
        return seen

    with contextlib.suppress(KilledError):
        go(is_killed=True)
    if saves_metric:
        assert go(is_killed=False) == [(6.0, 3.0, 4), (6.0, 3.0, 8)]
        return
    with pytest.warns(UserWarning, match=r"epoch 1 were trained before, .*metrics \(Average\) are not"):
        first, second = go(is_killed=False)
    assert (first[0], math.isnan(first[1]), second) == (6.0, True, (6.0, 3.0, 8))
