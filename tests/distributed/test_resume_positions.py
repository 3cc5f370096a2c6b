"""Each rank continues at its own position. Data that one rank cannot continue with are refused on all ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch.utils.data import DataLoader, TensorDataset

from distckpt import Checkpoint, DiskSaver, TimeLimit, resume
from distckpt.backends.detect import current
from tests.distributed.programs import kinds, logged, raised
from tests.support import run_ranks

WORLDS = pytest.mark.parametrize("world_size", [2, 3])


def of(event: tuple[str, int]) -> Any:
    """Return an event: each one, or once."""
    name, once = event
    return Events[name](once=once) if once else Events[name]


class Counter:
    """Counts the steps of an epoch."""

    def __init__(self) -> None:
        self.num = 0

    def reset(self) -> None:
        self.num = 0

    def state_dict(self) -> dict[str, int]:
        return {"num": self.num}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.num = state["num"]


class Program:
    """A program that is stopped in an iteration, and resumed."""

    def __init__(self, folder: Path, event: tuple[str, int]) -> None:
        self.seen: list[Any] = []
        self.counter = Counter()
        self.trainer = Engine(self.step)
        self.trainer.add_event_handler(Events.EPOCH_STARTED, self.counter.reset)
        self.objects = {"trainer": self.trainer, "counter": self.counter}
        self.saver = Checkpoint(self.objects, DiskSaver(folder, require_empty=False))
        self.trainer.add_event_handler(of(event), self.saver)

    def step(self, engine: Engine, batch: Any) -> None:
        self.counter.num += 1
        value = batch[0].tolist() if isinstance(batch, list) else batch
        self.seen.append((engine.state.epoch, value))

    def run(self, data: Any, stop_on: tuple[str, int] | None = None, **run: int) -> list[Any]:
        if stop_on is not None:
            self.trainer.add_event_handler(of(stop_on), self.trainer.terminate)
        resume(self.objects, self.saver)
        self.trainer.run(data, **run)
        return self.seen


def on_unequal_data(
    folder: Path, event: tuple[str, int], stop_on: tuple[str, int], run: dict[str, int]
) -> tuple[list[Any], list[Any]]:
    """Return what this rank trains alone, and in two parts."""
    data = range(10 - 4 * (current().rank % 2))
    alone = Program(folder / "alone", event).run(data, None, **run)
    parts = Program(folder / "parts", event).run(data, stop_on, **run)
    return alone, parts + Program(folder / "parts", event).run(data, None, **run)


@WORLDS
def test_each_rank_continues_with_epochs_of_its_own_length(tmp_path: Path, world_size: int) -> None:
    event, stop_on = ("EPOCH_COMPLETED", 0), ("EPOCH_COMPLETED", 2)
    ends = run_ranks(on_unequal_data, world_size, tmp_path, event, stop_on, {"max_epochs": 4})
    assert all(parts == alone for alone, parts in ends)
    assert [len(alone) for alone, _ in ends] == [40, 24, 40][:world_size]


@pytest.mark.parametrize("at", [5, 8, 15])
def test_each_rank_continues_in_a_pass_of_its_own_length(tmp_path: Path, at: int) -> None:
    event = ("ITERATION_COMPLETED", at)
    run = {"max_epochs": 3, "epoch_length": 8}
    ends = run_ranks(on_unequal_data, 2, tmp_path, event, event, run)
    assert all(parts == alone for alone, parts in ends)
    assert ends[0][0] != ends[1][0]


def in_other_batches(folder: Path, sizes: list[int]) -> tuple[tuple[str, ...], str, int]:
    """Return the error of a resume with another batch size on this rank, and how many steps it trained."""

    def loader(size: int) -> Any:
        return DataLoader(TensorDataset(torch.arange(24)), size)

    event = ("ITERATION_COMPLETED", 9)
    Program(folder, event).run(loader(4), event, max_epochs=3)
    program = Program(folder, event)
    error = raised(lambda: program.run(loader(sizes[current().rank]), max_epochs=3))
    return kinds(error), str(error), len(program.seen)


@WORLDS
def test_a_batch_size_that_one_rank_cannot_continue_with_is_refused_on_all(tmp_path: Path, world_size: int) -> None:
    ends = run_ranks(in_other_batches, world_size, tmp_path, [2, 5, 2])
    assert all("ValueError" in kind and num == 0 for kind, _, num in ends)
    assert all("12 samples are no whole number of batches of 5" in text and "rank 1" in text for _, text, _ in ends)


def test_batch_sizes_that_all_ranks_can_continue_with_are_accepted(tmp_path: Path) -> None:
    ends = run_ranks(in_other_batches, 2, tmp_path, [2, 2])
    assert ends == [((), "None", 18)] * 2


def with_handlers_that_undo(folder: Path, undoing_rank: int) -> tuple[int, list[str]]:
    """Return the number of counted steps and the log, where a handler of one rank changes the counter."""
    event = ("ITERATION_COMPLETED", 13)
    Program(folder, event).run(range(10), event, max_epochs=2)
    program = Program(folder, event)
    if current().rank == undoing_rank:
        program.trainer.add_event_handler(Events.STARTED, lambda: setattr(program.counter, "num", -100))
    with logged("distckpt.handlers.restored_state") as messages:
        program.run(range(10), max_epochs=2)
    return program.counter.num, messages


@pytest.mark.parametrize("undoing_rank", [0, 1])
def test_changes_on_one_rank_are_reverted_on_all(tmp_path: Path, undoing_rank: int) -> None:
    messages = [f"resume: handlers of {event} changed counter: restored" for event in ("STARTED", "EPOCH_STARTED")]
    assert run_ranks(with_handlers_that_undo, 2, tmp_path, undoing_rank) == [(10, messages)] * 2


def that_had_ended(folder: Path) -> tuple[int, bool]:
    """Return how many steps a resume of a run trains that had come to its end."""
    Program(folder, ("EPOCH_COMPLETED", 0)).run(range(4), max_epochs=2)
    program = Program(folder, ("EPOCH_COMPLETED", 0))
    found = resume(program.objects, program.saver)
    program.trainer.run(range(4), max_epochs=2)
    return len(program.seen), found is not None and found.has_ended


@WORLDS
def test_a_complete_run_trains_no_more_on_any_rank(tmp_path: Path, world_size: int) -> None:
    assert run_ranks(that_had_ended, world_size, tmp_path) == [(0, True)] * world_size


def over_time(every: int, lag: int) -> int:
    """Return the iteration in which a run is stopped whose time is over on one rank at iteration 3."""
    trainer, limit = Engine(lambda _engine, _batch: None), TimeLimit(3600, every=every, lag=lag)

    @trainer.on(Events.ITERATION_STARTED(once=3))
    def let_time_pass() -> None:
        if current().rank == 1:
            limit.start_time = -1e9

    trainer.add_event_handler(Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED, limit)
    trainer.run(range(3), max_epochs=9)
    return trainer.state.iteration


@pytest.mark.parametrize(("every", "lag", "stops_at"), [(1, 0, 3), (2, 0, 4), (4, 0, 4), (2, 1, 6)])
def test_ranks_stop_between_two_accumulated_steps(every: int, lag: int, stops_at: int) -> None:
    assert run_ranks(over_time, 2, every, lag) == [stops_at] * 2
