"""Restored objects are as restored when the first batch is trained, whatever handlers do before it."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Average
from torch import nn

from distckpt import Checkpoint, DiskSaver, EarlyStopping, RngState, resume

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
LARGE = 200  # 160,000 bytes of weights: too large for a copy


class Counter:
    """An object of the program's."""

    def __init__(self) -> None:
        self.counts: dict[str, Any] = {"steps": 0, "notes": []}

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = dict(state["counts"])


class Program:
    """A program that is stopped in its third epoch, and resumed."""

    def __init__(self, folder: Path, width: int = 2) -> None:
        self.model = nn.Linear(width, width)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1.0)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)
        self.average = Average()
        self.counter = Counter()
        self.firsts: list[Any] = []
        self.trainer = Engine(self.step)
        self.trainer.state_dict_user_keys.append("alpha")
        self.trainer.state.alpha = 0.0  # type: ignore[attr-defined]  # as ignite's documentation does it
        self.average.attach(self.trainer, "average")
        evaluator = Engine(lambda _engine, _batch: None)
        self.stopping = EarlyStopping(99, lambda _engine: -float(self.trainer.state.epoch), self.trainer)
        self.evaluator = evaluator
        self.objects = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "average": self.average,
            "counter": self.counter,
            "stopping": self.stopping,
            "trainer": self.trainer,
        }
        self.saver = Checkpoint(self.objects, DiskSaver(folder, require_empty=False), n_saved=2)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: self.stopping(evaluator))

    def step(self, engine: Engine, batch: float) -> float:
        if not self.firsts:
            self.firsts = self.facts()
        self.optimizer.zero_grad()
        self.model(torch.ones(self.model.in_features)).sum().backward()
        self.optimizer.step()
        self.counter.counts["steps"] += 1
        engine.state.alpha += 1.0  # type: ignore[attr-defined]  # as above
        return float(batch)

    def facts(self) -> list[Any]:
        """Return the objects' values."""
        moments = [one["exp_avg"].sum().item() for one in self.optimizer.state.values()]
        return [
            self.model.weight.sum().item(),
            moments,
            self.optimizer.param_groups[0]["lr"],
            self.scheduler.last_epoch,
            self.average.num_examples,
            dict(self.counter.counts),
            (self.stopping.counter, self.stopping.best_score),
            self.trainer.state.alpha,  # type: ignore[attr-defined]  # as above
            [item.filename for item in self.saver._saved],
        ]

    def run(self, stop_at: int = 0) -> None:
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED(every=5), self.saver)
        if stop_at:
            self.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop_at), self.trainer.terminate)
        self.trainer.run(range(10), max_epochs=3)


def change_all(program: Program) -> None:
    """Change all restored objects, as handlers of STARTED in real programs do."""
    for module in program.model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.zero_()  # past the count of versions
            nn.init.ones_(module.bias)
    program.optimizer.state.clear()
    program.optimizer.param_groups[0]["lr"] = 77.0
    program.scheduler.step()
    program.average.reset()
    program.counter.counts = {"steps": -1, "notes": ["a new run"]}
    program.stopping.reset()
    program.saver.reset()
    program.trainer.state.alpha = -1.0  # type: ignore[attr-defined]  # as ignite's documentation does it


@pytest.mark.parametrize("width", [2, LARGE])
@pytest.mark.parametrize(
    "event",
    [
        Events.STARTED,
        Events.EPOCH_STARTED,
        Events.EPOCH_STARTED(every=1),
        Events.EPOCH_STARTED(once=3),
        Events.STARTED | Events.EPOCH_STARTED,
    ],
    ids=["started", "epoch", "every", "once", "both"],
)
@pytest.mark.parametrize("is_attached_after", [False, True])
def test_changes_by_handlers_before_the_first_batch_are_reverted(
    tmp_path: Path, event: Any, width: int, *, is_attached_after: bool
) -> None:
    before = Program(tmp_path, width)
    before.run(stop_at=25)
    after = Program(tmp_path, width)
    if not is_attached_after:
        after.trainer.add_event_handler(event, change_all, after)
    resume(after.objects, after.saver)
    restored = after.facts()
    if is_attached_after:
        after.trainer.add_event_handler(event, change_all, after)
    parameters = list(after.model.parameters())
    after.run()
    assert after.firsts == restored
    assert after.firsts[4:6] == [5, {"steps": 25, "notes": []}]
    assert all(one is other for one, other in zip(parameters, after.model.parameters(), strict=True))


@pytest.mark.parametrize("stop_at", [20, 25])
def test_between_two_epochs_handlers_keep_their_effects(tmp_path: Path, stop_at: int) -> None:
    def make() -> Program:
        program = Program(tmp_path)

        @program.trainer.on(Events.EPOCH_STARTED)
        def step_scheduler() -> None:
            program.scheduler.step()

        return program

    make().run(stop_at=stop_at)
    after = make()
    resume(after.objects, after.saver)
    after.run()
    assert after.scheduler.last_epoch == 3
    assert after.firsts[2] == 0.5**3


def test_changes_by_the_program_after_the_resume_stay(tmp_path: Path) -> None:
    Program(tmp_path).run(stop_at=25)
    after = Program(tmp_path)
    after.trainer.add_event_handler(Events.STARTED, lambda: after.optimizer.param_groups[0].update(lr=77.0))
    resume(after.objects, after.saver)
    after.optimizer.param_groups[0]["lr"] = 0.25
    after.run()
    assert after.firsts[2] == 0.25


def test_a_later_run_of_the_engine_is_not_changed(tmp_path: Path) -> None:
    Program(tmp_path).run(stop_at=25)
    after = Program(tmp_path)
    resume(after.objects, after.saver)
    after.run()
    after.trainer.add_event_handler(Events.STARTED, change_all, after)
    after.firsts = []
    after.trainer.run(range(10), max_epochs=4)
    assert after.firsts[5] == {"steps": -1, "notes": ["a new run"]}


def test_a_removed_file_is_named_when_it_is_needed(tmp_path: Path) -> None:
    Program(tmp_path, LARGE).run(stop_at=25)
    after = Program(tmp_path, LARGE)
    after.trainer.add_event_handler(Events.STARTED, change_all, after)
    found = resume(after.objects, after.saver)
    assert found is not None
    found.unlink()
    with pytest.raises(FileNotFoundError, match=found.name):
        after.run()


class Killed(BaseException):
    """Stands for the end of the process."""


class Draws(Program):
    """A program whose checkpoint stands before or after other handlers of an event."""

    def __init__(self, folder: Path, event: Events, *, is_first: bool, kill_at: int | None) -> None:
        self.rates: list[Any] = []
        self.kill_at = kill_at
        super().__init__(folder)
        self.rng = RngState(self.trainer)
        self.objects["rng"] = self.rng
        self.saver = Checkpoint(self.objects, DiskSaver(folder, require_empty=False), n_saved=1)
        if is_first:
            self.trainer.add_event_handler(event, self.saver)
        self.trainer.add_event_handler(event, self.change)
        if not is_first:
            self.trainer.add_event_handler(event, self.saver)

    def change(self) -> None:
        self.counter.counts["steps"] += 1
        self.scheduler.step()
        self.counter.counts["notes"] = [*self.counter.counts["notes"], torch.rand(1).item()]

    def step(self, engine: Engine, batch: float) -> float:
        if engine.state.iteration == self.kill_at:
            raise Killed
        self.rates.append((engine.state.iteration, self.optimizer.param_groups[0]["lr"], torch.rand(1).item()))
        return batch


def train_through_kills(
    folder: Path, event: Events, kills: list[int], *, is_first: bool, has_latest: bool
) -> tuple[Draws, Draws]:
    """Return a program that ran alone, and one that was killed in some iterations; both have trained to the end.

    Args:
        folder: of the checkpoints.
        event: of the program's checkpoint.
        kills: the iterations in which it is killed, one in each start.
        is_first: see `Draws`.
        has_latest: whether another checkpoint saves after each second iteration. The newest file of both is resumed.
    """

    def run(own: Path, kill_at: int | None) -> Draws:
        torch.manual_seed(0)
        program = Draws(own, event, is_first=is_first, kill_at=kill_at)
        if has_latest:
            latest = Checkpoint(program.objects, DiskSaver(own, require_empty=False), "latest", n_saved=1)
            program.trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), latest)
        resume(program.objects, own if has_latest else program.saver, engine=program.trainer)
        with contextlib.suppress(Killed):
            program.trainer.run([1.0, 2.0, 3.0], max_epochs=3)
        return program

    alone = run(folder / "alone", None)
    for kill_at in kills:
        run(folder / "killed", kill_at)
    resumed = run(folder / "killed", None)
    assert resumed.rates == alone.rates[-len(resumed.rates) :]
    assert resumed.counter.counts == alone.counter.counts
    return alone, resumed


@pytest.mark.parametrize("kills", [[6], [6, 6], [6, 6, 7]])
@pytest.mark.parametrize("is_first", [True, False], ids=["checkpoint first", "checkpoint last"])
@pytest.mark.parametrize("event", [Events.EPOCH_STARTED, Events.ITERATION_STARTED, Events.STARTED])
def test_handlers_before_and_after_a_checkpoint_have_their_effects_once(
    tmp_path: Path, event: Events, *, is_first: bool, kills: list[int]
) -> None:
    alone, resumed = train_through_kills(tmp_path, event, kills, is_first=is_first, has_latest=False)
    assert len(resumed.rates) < len(alone.rates) or event == Events.STARTED


@pytest.mark.parametrize("kills", [[6], [6, 6], [6, 6, 7]])
@pytest.mark.parametrize("is_first", [True, False], ids=["checkpoint first", "checkpoint last"])
@pytest.mark.parametrize("event", [Events.EPOCH_STARTED, Events.ITERATION_STARTED, Events.STARTED])
def test_no_checkpoint_saves_in_an_event_that_was_fired_before_the_save(
    tmp_path: Path, event: Events, *, is_first: bool, kills: list[int]
) -> None:
    train_through_kills(tmp_path, event, kills, is_first=is_first, has_latest=True)
