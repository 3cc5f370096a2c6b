"""The counters of an engine's run: trained iterations, and the position in the present pass over the data."""

from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch.utils.data import DataLoader, TensorDataset

from distckpt.handlers.progress import position_of

LOADER = DataLoader(TensorDataset(torch.arange(10)), batch_size=4)


def positions_on(event: Any, data: Any, run: dict[str, Any], step: Any = lambda _engine, _batch: None) -> list[Any]:
    engine, seen = Engine(step), []
    engine.add_event_handler(event, lambda *_args: seen.append(position_of(engine)))
    engine.run(data, **run)
    return seen


def taken(positions: list[dict[str, Any]], *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(one[key] for key in keys) for one in positions]


def test_a_batch_counts_as_trained_when_its_step_is_done() -> None:
    before = positions_on(Events.ITERATION_STARTED, range(3), {"max_epochs": 1})
    assert taken(before, "trained", "batches", "is_drawn") == [(0, 0, True), (1, 1, True), (2, 2, True)]
    drawn = positions_on(Events.GET_BATCH_COMPLETED, range(3), {"max_epochs": 1})
    assert taken(drawn, "trained", "is_drawn") == [(0, True), (1, True), (2, True)]
    after = positions_on(Events.ITERATION_COMPLETED, range(3), {"max_epochs": 1})
    assert taken(after, "trained", "batches", "is_drawn") == [(1, 1, False), (2, 2, False), (3, 0, False)]


def test_the_batch_of_a_step_that_raised_is_not_trained() -> None:
    def step(_engine: Engine, batch: int) -> None:
        if batch == 2:
            msg = "out of memory"
            raise RuntimeError(msg)

    seen = positions_on(Events.EXCEPTION_RAISED, range(4), {"max_epochs": 1}, step)
    assert taken(seen[:1], "trained", "batches", "in_epoch", "is_drawn") == [(2, 2, 2, True)]


def test_a_terminated_epoch_ends_with_its_pass() -> None:
    engine, seen = Engine(lambda _engine, _batch: None), []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(once=3), lambda: engine.terminate_epoch(skip_epoch_completed=False)
    )
    for event in (Events.EPOCH_COMPLETED, Events.ITERATION_COMPLETED(event_filter=lambda _, number: number > 3)):
        engine.add_event_handler(event, lambda: seen.append(position_of(engine)))
    engine.run(range(5), max_epochs=2)
    keys = ("trained", "epoch", "in_epoch", "batches")
    assert taken(seen, *keys)[:3] == [(3, 1, 0, 0), (4, 1, 1, 1), (5, 1, 2, 2)]
    assert taken(seen, *keys)[-1] == (8, 2, 0, 0)


@pytest.mark.parametrize("data", [range(5), [0] * 5, LOADER], ids=["range", "list", "loader"])
def test_a_pass_is_not_an_epoch(data: Any) -> None:
    length = len(data)
    seen = positions_on(Events.EPOCH_COMPLETED, data, {"max_epochs": 4, "epoch_length": 2})
    assert taken(seen, "batches") == [((2 * epoch) % length,) for epoch in (1, 2, 3, 4)]
    assert taken(seen, "trained", "epoch", "in_epoch") == [(2 * epoch, epoch, 0) for epoch in (1, 2, 3, 4)]


def test_a_stream_without_a_length_ends_with_its_epoch() -> None:
    seen = positions_on(Events.EPOCH_COMPLETED | Events.ITERATION_COMPLETED, iter(range(3)), {"max_epochs": 1})
    assert taken(seen, "batches", "length") == [(1, None), (2, None), (3, None), (0, None)]
    assert taken(seen, "epoch", "in_epoch") == [(0, 1), (0, 2), (0, 3), (1, 0)]


def test_samples_are_those_of_the_loaders_batches() -> None:
    seen = positions_on(Events.ITERATION_COMPLETED, LOADER, {"max_epochs": 1, "epoch_length": 4})
    assert taken(seen, "samples", "batch_size", "length") == [(4, 4, 3), (8, 4, 3), (0, 4, 3), (4, 4, 3)]
    assert position_of(Engine(lambda _engine, _batch: None))["samples"] is None


def test_new_data_in_the_middle_of_a_run_begin_a_pass() -> None:
    engine, seen = Engine(lambda _engine, _batch: None), []
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: engine.set_data(range(7)))
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(position_of(engine)["batches"]))
    engine.run(range(5), max_epochs=1)
    assert seen == [1, 0, 1, 2, 3]
