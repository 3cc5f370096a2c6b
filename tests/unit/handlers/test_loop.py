"""A Loop fires the events of an Engine in the same order, whatever ends the run, and continues where one was saved."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch.utils.data import DataLoader, TensorDataset

from distckpt import Checkpoint, DiskSaver, Loop, RngState, TerminateOnNan, resume, stop_reason
from tests.support.selection import quick


class StepError(Exception):
    """What a step raises."""


class Anew:
    """Data without a length."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


DATA: dict[str, Callable[[], Any]] = {"a list": lambda: list(range(5)), "no length": Anew, "none": lambda: None}
RUNS: list[dict[str, int]] = [{"max_epochs": 3}, {"max_iters": 7}, {"max_epochs": 3, "epoch_length": 4}]
PLAIN_EVENTS = [event for event in Events if event not in (Events.EXCEPTION_RAISED, Events.INTERRUPT)]

MAX_ACTS = 2  # ignite begins epoch after epoch where each is ended before its first iteration

Row = tuple[Any, ...]


def record(engine: Engine, rows: list[Row]) -> None:
    """Append a row to `rows` for each event that the engine fires."""

    def note(name: str) -> None:
        state = engine.state
        rows.append((name, state.epoch, state.iteration, state.epoch_length, state.batch, state.output))

    for event in PLAIN_EVENTS:
        engine.add_event_handler(event, lambda *_, name=event.name, **__: note(name))


def drive(loop: Loop, step: Callable[[Engine, Any], Any]) -> None:
    """Run a Loop to its end with a step function."""
    with loop:
        for _ in loop.epochs():
            for batch in loop.batches():
                loop.output = step(loop, batch)


def run_both(
    step: Callable[[Engine, Any], Any], data: str, run: dict[str, int], attach: Callable[[Engine], object] | None = None
) -> tuple[list[Row], list[Row]]:
    """Run the same program on an Engine and on a Loop, and return the events of both, with the error that left it."""
    found: list[list[Row]] = []
    if data == "none":
        run = {"epoch_length": 5, **run}
    for kind in ("engine", "loop"):
        rows: list[Row] = []
        engine = Engine(step) if kind == "engine" else Loop(DATA[data](), **run)
        engine.logger.disabled = True
        record(engine, rows)
        if attach is not None:
            attach(engine)
        try:
            if isinstance(engine, Loop):
                drive(engine, step)
            else:
                engine.run(DATA[data](), **run)
        except Exception as error:  # noqa: BLE001 - compared
            rows.append((type(error).__name__, str(error)))
        rows.append(("end", engine.state.epoch, engine.state.iteration, str(engine.last_event_name)))
        found.append(rows)
    return found[0], found[1]


# -- events ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("data", DATA)
def test_a_run_fires_the_events_of_an_engine(data: str, run: dict[str, int]) -> None:
    engine, loop = run_both(lambda _, batch: (batch, "out"), data, run)
    assert loop == engine
    assert [row[0] for row in loop].count("ITERATION_COMPLETED") > 6


@pytest.mark.parametrize("act", ["terminate", "terminate_epoch", "raise"])
@pytest.mark.parametrize("event", [event.name for event in PLAIN_EVENTS])
@pytest.mark.parametrize("run", RUNS[:2], ids=str)
def test_a_handler_ends_it_at_each_event_as_an_engine(run: dict[str, int], event: str, act: str) -> None:
    def attach(engine: Engine) -> None:
        acted: list[int] = []

        @engine.on(Events[event])
        def end(*_: Any, **__: Any) -> None:
            if engine.state.iteration in (0, 3) and len(acted) < MAX_ACTS:
                acted.append(engine.state.iteration)
                if act == "raise":
                    raise StepError("of a handler")
                getattr(engine, act)()

    engine, loop = run_both(lambda _, batch: batch, "a list", run, attach)
    assert loop == engine


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("act", ["terminate", "terminate_epoch", "raise"])
def test_a_step_ends_it_as_an_engines(data: str, act: str) -> None:
    def step(engine: Engine, batch: Any) -> Any:
        if engine.state.iteration == 7:
            if act == "raise":
                raise StepError("of a step")
            getattr(engine, act)()
        return batch

    engine, loop = run_both(step, data, RUNS[0])
    assert loop == engine


def test_data_may_be_replaced_at_an_epoch() -> None:
    def attach(engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED(once=2), lambda: engine.set_data(list("abcde")))

    engine, loop = run_both(lambda _, batch: batch, "a list", RUNS[0], attach)
    assert loop == engine
    assert ("ITERATION_COMPLETED", 2, 6, 5, "a", "a") in loop


def test_handlers_that_fire_events_of_their_own_do_not_disturb_it() -> None:
    def attach(engine: Engine) -> None:
        engine.register_events("mine")
        for event in set(PLAIN_EVENTS) - {Events.DATALOADER_STOP_ITERATION}:  # ignite looks for it as the last event
            engine.add_event_handler(event, lambda *_, **__: engine.fire_event("mine"))

    engine, loop = run_both(lambda _, batch: batch, "a list", RUNS[0], attach)
    assert loop[:-1] == engine[:-1]


# -- for and with ------------------------------------------------------------------------------------------------------


def events_of(loop: Loop) -> list[Row]:
    """Return a list that gets the events of each iteration and epoch, and of the run's end."""
    rows: list[Row] = []
    for event in PLAIN_EVENTS:
        if not event.name.startswith("GET_BATCH"):
            loop.add_event_handler(event, lambda *_, name=event.name, **__: rows.append((name, loop.state.iteration)))
    return rows


def test_break_completes_the_iteration_and_ends_the_epoch() -> None:
    loop = Loop(range(3), max_epochs=2)
    rows = events_of(loop)
    drawn = []
    with loop:
        for _ in loop.epochs():
            for batch in loop.batches():
                drawn.append(batch)
                if batch == 1:
                    break
            rows.append(("after the batches",))
    epoch = [("TERMINATE_SINGLE_EPOCH", 2), ("EPOCH_COMPLETED", 2)]
    assert rows[3:] == [
        *[("ITERATION_COMPLETED", 1), ("ITERATION_STARTED", 2), ("after the batches",), ("ITERATION_COMPLETED", 2)],
        *epoch,
        *[("EPOCH_STARTED", 2), ("ITERATION_STARTED", 3), ("ITERATION_COMPLETED", 3), ("ITERATION_STARTED", 4)],
        *[("after the batches",), ("ITERATION_COMPLETED", 4), ("TERMINATE_SINGLE_EPOCH", 4), ("EPOCH_COMPLETED", 4)],
        ("COMPLETED", 4),
    ]
    assert drawn == [0, 1, 0, 1]


def test_an_epochs_batches_may_be_drawn_in_several_for_statements() -> None:
    loop, drawn = Loop(range(7), max_epochs=2), list[list[int]]()
    with loop:
        for _ in loop.epochs():
            drawn.extend(list(itertools.islice(loop.batches(), 2)) for _ in range(5))
    assert drawn == [[0, 1], [2, 3], [4, 5], [6], []] * 2
    assert loop.state.iteration == 14


def test_what_follows_the_batches_runs_before_the_epochs_end() -> None:
    loop = Loop(range(2), max_epochs=2)
    rows = events_of(loop)
    with loop:
        for epoch in loop.epochs():
            for _ in loop.batches():
                pass
            rows.append(("epoch", epoch))
    ends = [row for row in rows if row[0] in ("epoch", "EPOCH_COMPLETED", "COMPLETED")]
    assert ends == [("epoch", 1), ("EPOCH_COMPLETED", 2), ("epoch", 2), ("EPOCH_COMPLETED", 4), ("COMPLETED", 4)]


@pytest.mark.parametrize("where", ["before", "epoch", "batch", "after the batches"])
def test_leaving_early_stops_the_run(where: str) -> None:
    loop = Loop(range(3), max_epochs=2)
    rows = events_of(loop)

    def train() -> None:
        with loop:
            if where == "before":
                return
            for _ in loop.epochs():
                if where == "epoch":
                    return
                for _ in loop.batches():
                    if where == "batch":
                        return
                if where == "after the batches":
                    return

    train()
    num_trained = {"batch": 1, "after the batches": 3}.get(where, 0)
    assert [name for name, _ in rows].count("ITERATION_COMPLETED") == num_trained
    assert rows[-2:] == [("TERMINATE", num_trained), ("COMPLETED", num_trained)]


@pytest.mark.parametrize("where", ["before", "epoch", "batch", "after the batches"])
@pytest.mark.parametrize("error", [StepError("mine"), KeyboardInterrupt()], ids=["an error", "an interrupt"])
def test_an_exception_is_handled_as_one_of_a_step(where: str, error: BaseException) -> None:
    loop = Loop(range(3), max_epochs=2)
    seen: list[BaseException] = []

    def train() -> None:
        with loop:
            if where == "before":
                raise error
            for _ in loop.epochs():
                if where == "epoch":
                    raise error
                for _ in loop.batches():
                    if where == "batch":
                        raise error
                raise error

    with pytest.raises(type(error)) as caught:
        train()
    assert caught.value is error

    loop.add_event_handler(Events.EXCEPTION_RAISED, lambda _, raised: seen.append(raised))
    rows = events_of(loop)
    train()  # the handler has caught it: the run ends, and the program goes on
    assert set(seen) == {error}
    if where == "batch" and isinstance(error, Exception):
        assert rows[-1][0] == "COMPLETED"


def test_misuse_is_said_in_words() -> None:
    loop = Loop(range(3))
    with pytest.raises(RuntimeError, match=r"inside `with loop:`"):
        next(loop.epochs())
    with pytest.raises(RuntimeError, match=r"inside `for epoch in loop.epochs"):
        next(loop.batches())
    with loop, pytest.raises(RuntimeError, match="under way"):
        loop.__enter__()
    with pytest.raises(RuntimeError, match="were not drawn"), loop:
        for _ in loop.epochs():
            pass
    with pytest.raises(RuntimeError, match="cannot be interrupted"):
        loop.interrupt()
    with pytest.raises(ValueError, match="mutually exclusive"), Loop([0], max_epochs=1, max_iters=1):
        pass


def test_a_second_run_begins_anew_and_a_stopped_one_continues() -> None:
    loop = Loop(range(3), max_epochs=2)
    for _ in range(2):
        drive(loop, lambda *_: None)
        assert loop.state.iteration == 6
    loop.add_event_handler(Events.ITERATION_COMPLETED(once=2), loop.terminate)
    drive(loop, lambda *_: None)
    assert loop.state.iteration == 2
    drive(loop, lambda *_: None)
    assert loop.state.iteration == 5  # ignite begins the next epoch


def test_a_nan_ends_both_for_statements() -> None:
    loop = Loop([0.0, float("nan"), 1.0], max_epochs=2)
    loop.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    drive(loop, lambda _, batch: batch)
    assert (loop.state.iteration, stop_reason(loop)) == (2, "nan")


# -- saving and resuming -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Program:
    """A training that may be killed in an iteration, on an Engine or on a Loop."""

    event: Any
    data: Callable[[], Any]

    def go(self, folder: Path | None, *, on_loop: bool, die_at: int = 0) -> list[Row]:
        torch.manual_seed(3)
        model = Trained()

        def step(engine: Engine, batch: Any) -> None:
            if engine.state.iteration == die_at:
                raise StepError
            indices = batch[0] if isinstance(batch, list) else batch
            model.seen.append([engine.state.iteration, torch.as_tensor(indices).tolist(), torch.rand(1).item()])

        trainer = Loop(self.data(), max_epochs=3) if on_loop else Engine(step)
        trainer.logger.disabled = True
        objects = {"model": model, "trainer": trainer, "rng": RngState(trainer)}
        if folder is not None:
            saver = Checkpoint(objects, DiskSaver(folder, require_empty=False), n_saved=2)
            trainer.add_event_handler(self.event, saver)
            resume(objects, saver)
        with contextlib.suppress(StepError):
            if isinstance(trainer, Loop):
                drive(trainer, step)
            else:
                trainer.run(self.data(), max_epochs=3)
        return model.seen


class Trained:
    """A model whose state is the list of its batches, each with a random number."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def state_dict(self) -> dict[str, Any]:
        return {"seen": [list(one) for one in self.seen]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = [list(one) for one in state["seen"]]


SAVES = {
    "iteration completed": Events.ITERATION_COMPLETED(every=2),
    "iteration started": Events.ITERATION_STARTED,
    "batch drawn": Events.GET_BATCH_COMPLETED,
    "epoch started": Events.EPOCH_STARTED,
    "epoch completed": Events.EPOCH_COMPLETED,
    "exception": Events.EXCEPTION_RAISED,
}
SOURCES: dict[str, Callable[[], Any]] = {
    "a range": lambda: range(7),
    "no length": Anew,
    "shuffled": lambda: DataLoader(TensorDataset(torch.arange(7)), batch_size=2, shuffle=True),
}


@quick(3)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("save", SAVES)
def test_a_killed_loop_continues_as_if_left_alone(tmp_path: Path, save: str, source: str) -> None:
    program = Program(SAVES[save], SOURCES[source])
    alone = program.go(None, on_loop=False)
    assert program.go(None, on_loop=True) == alone
    for first, second in ((True, True), (True, False), (False, True)):
        for die_at in (3, 5, 8):
            folder = tmp_path / f"{first}{second}{die_at}"
            program.go(folder, on_loop=first, die_at=die_at)
            assert program.go(folder, on_loop=second) == alone
            assert program.go(folder, on_loop=second) == alone  # it had ended
