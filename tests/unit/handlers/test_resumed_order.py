"""A resumed pass has the order of the interrupted one, whatever drew or iterated between its start and its batches."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from distckpt import Checkpoint, DiskSaver, ResumableSampler, RngState, resume

Attach = Callable[[Engine], None]


class KilledError(Exception):
    """What ends a run in its middle."""


def draw_validation_seed() -> None:
    for _ in DataLoader(TensorDataset(torch.arange(2))):  # it draws a seed for its workers, though it has none
        pass


def make_shuffled(**kwargs: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(12)), batch_size=2, shuffle=True, **kwargs)


def terminate_second_batch(trainer: Engine) -> None:
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), trainer.terminate_epoch)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, draw_validation_seed)


def terminate_and_skip(trainer: Engine) -> None:
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED(once=2), lambda: trainer.terminate_epoch(skip_epoch_completed=True)
    )
    trainer.add_event_handler(Events.EPOCH_STARTED, draw_validation_seed)


def terminate_between_passes(trainer: Engine) -> None:
    trainer.add_event_handler(
        Events.DATALOADER_STOP_ITERATION, lambda: trainer.terminate_epoch() if trainer.state.epoch == 1 else None
    )
    trainer.add_event_handler(Events.EPOCH_COMPLETED, draw_validation_seed)


def draw_before_batches(trainer: Engine) -> None:
    trainer.add_event_handler(Events.GET_BATCH_STARTED(every=3), draw_validation_seed)


DRAWS: list[Attach] = [terminate_second_batch, terminate_and_skip, terminate_between_passes, draw_before_batches]


def train(
    folder: Path | None,
    attach: Attach,
    *,
    event: Any = Events.ITERATION_COMPLETED,
    die_at: int = 0,
    run: dict[str, int] | None = None,
    **loader: Any,
) -> list[tuple[Any, ...]]:
    """Train; return the batches, with the step's random numbers. Resume from a folder if it has a file."""
    torch.manual_seed(0)
    if "generator" in loader:
        loader["generator"] = torch.Generator().manual_seed(5)
    seen: list[tuple[Any, ...]] = []

    def step(engine: Engine, batch: Any) -> None:
        if engine.state.iteration == die_at:
            raise KilledError
        seen.append((engine.state.epoch, engine.state.iteration, batch[0].tolist(), torch.rand(1).item()))

    trainer = Engine(step)
    attach(trainer)
    objects = {"trainer": trainer, "rng": RngState(trainer)}
    if folder is not None:
        saver = Checkpoint(objects, DiskSaver(folder, require_empty=False), n_saved=2)
        trainer.add_event_handler(event, saver)
        resume(objects, saver)
    with contextlib.suppress(KilledError):
        trainer.run(make_shuffled(**loader), **(run or {"max_epochs": 3}))
    return seen


def resumed(folder: Path, attach: Attach, die_at: tuple[int, ...], **kwargs: Any) -> list[tuple[Any, ...]]:
    """Train, killed at each of some iterations; return the last of each iteration's batches."""
    last: dict[int, tuple[Any, ...]] = {}
    for number in (*die_at, 0):
        last |= {one[1]: one for one in train(folder, attach, die_at=number, **kwargs)}
    return [last[number] for number in sorted(last)]


@pytest.mark.parametrize("event", [Events.ITERATION_COMPLETED, Events.GET_BATCH_COMPLETED], ids=str)
@pytest.mark.parametrize("loader", [{}, {"generator": None}], ids=["global generator", "own generator"])
@pytest.mark.parametrize("attach", DRAWS)
def test_numbers_drawn_between_an_iterator_and_its_first_batch_keep_the_order(
    tmp_path: Path, attach: Attach, loader: dict[str, Any], event: Any
) -> None:
    run = {"max_epochs": 3, "epoch_length": 8} if attach is terminate_between_passes else {"max_epochs": 3}
    alone = train(None, attach, run=run, **loader)
    for die_at in ((3,), (4,), (5, 6), (8, 9), (10, 12)):
        folder = tmp_path / str(die_at)
        assert resumed(folder, attach, die_at, event=event, run=run, **loader) == alone


@pytest.mark.filterwarnings("ignore:resume. the loader starts new workers")
@pytest.mark.parametrize("persistent_workers", [False, True])
def test_workers_that_have_drawn_the_order_before_keep_it(tmp_path: Path, *, persistent_workers: bool) -> None:
    loader: dict[str, Any] = {"num_workers": 1, "persistent_workers": persistent_workers}
    alone = train(None, terminate_second_batch, **loader)
    assert resumed(tmp_path, terminate_second_batch, (5, 9), **loader) == alone


# -- an evaluator on the trainer's loader ------------------------------------------------------------------------------

EVALUATIONS = {
    "started": Events.STARTED,
    "epoch started": Events.EPOCH_STARTED,
    "batch wanted": Events.GET_BATCH_STARTED(every=3),
    "batch drawn": Events.GET_BATCH_COMPLETED(every=3),
    "iteration completed": Events.ITERATION_COMPLETED(every=2),
    "epoch completed": Events.EPOCH_COMPLETED,
    "pass over": Events.DATALOADER_STOP_ITERATION,
}
SAVES = {
    "iteration completed": Events.ITERATION_COMPLETED,
    "batch drawn": Events.GET_BATCH_COMPLETED,
    "epoch completed": Events.EPOCH_COMPLETED,
}


def evaluate_beside(folder: Path | None, evaluation: Any, die_at: int = 0, **options: Any) -> list[tuple[Any, ...]]:
    """Train on a ResumableSampler's loader, over which an evaluator iterates too; return the trained batches."""
    data = range(12)
    sampler = ResumableSampler(data, num_replicas=1, rank=0, seed=1)
    loader: DataLoader[Any] = DataLoader(data, batch_size=2, sampler=sampler, **options.get("loader", {}))  # type: ignore[arg-type]
    seen: list[tuple[Any, ...]] = []

    def step(engine: Engine, batch: Any) -> None:
        if engine.state.iteration == die_at:
            raise KilledError
        seen.append((engine.state.epoch, engine.state.iteration, batch.tolist()))

    trainer, evaluator = Engine(step), Engine(lambda _engine, _batch: None)
    length = options.get("evaluated", 6)

    def evaluate() -> None:
        evaluator.run(loader, epoch_length=length)

    trainer.add_event_handler(evaluation, evaluate)
    objects: dict[str, Any] = {"trainer": trainer}
    if options.get("saves_sampler"):
        objects["sampler"] = sampler
    if folder is not None:
        saver = Checkpoint(objects, DiskSaver(folder, require_empty=False), n_saved=2)
        trainer.add_event_handler(SAVES[options.get("save", "iteration completed")], saver)
        resume(objects, saver, engine=trainer)
    with contextlib.suppress(KilledError):
        trainer.run(loader, max_epochs=4, epoch_length=options.get("epoch_length"))
    return seen


@pytest.mark.filterwarnings("ignore:resume. the loader starts new workers")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epoch_length": 4},
        {"evaluated": 2},
        {"evaluated": 2, "epoch_length": 4, "save": "epoch completed"},
        {"save": "batch drawn"},
        {"save": "epoch completed", "epoch_length": 4, "saves_sampler": True},
        {"saves_sampler": True},
        {"loader": {"num_workers": 1}, "epoch_length": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_an_evaluator_on_the_same_loader_leaves_the_trainers_position(
    tmp_path: Path, evaluation: str, options: dict[str, Any]
) -> None:
    alone = evaluate_beside(None, EVALUATIONS[evaluation], **options)
    kills: tuple[tuple[int, ...], ...] = ((5,), (7, 8), (9, 10, 12))
    if evaluation == "pass over":
        kills = ((5,), (8, 9), (10, 12))  # a resume after the last batch of a pass does not fire this event
    for die_at in kills if "loader" not in options else ((6, 9),):
        folder, last = tmp_path / str(die_at), dict[int, tuple[Any, ...]]()
        for number in (*die_at, 0):
            found = evaluate_beside(folder, EVALUATIONS[evaluation], number, **options)
            last |= {one[1]: one for one in found}
        assert [last[number] for number in sorted(last)] == alone


# -- a sampler with set_epoch, and passes that are not epochs ----------------------------------------------------------

EPOCH_EVENTS = {
    "epoch started": Events.EPOCH_STARTED,
    "epoch completed": Events.EPOCH_COMPLETED,
    "pass over": Events.DATALOADER_STOP_ITERATION,
    "batch wanted": Events.GET_BATCH_STARTED,
}


def set_epochs(folder: Path | None, epochs_on: Any, die_at: int = 0, **options: Any) -> list[tuple[Any, ...]]:
    """Train on a DistributedSampler's loader, whose epoch a handler sets; return the trained batches."""
    data = range(5)
    sampler: DistributedSampler[int] = DistributedSampler(data, num_replicas=1, rank=0)  # type: ignore[arg-type]
    loader: DataLoader[Any] = DataLoader(data, sampler=sampler, num_workers=options.get("num_workers", 0))  # type: ignore[arg-type]
    seen: list[tuple[Any, ...]] = []

    def step(engine: Engine, batch: Any) -> None:
        if engine.state.iteration == die_at:
            raise KilledError
        seen.append((engine.state.epoch, engine.state.iteration, batch.tolist()))

    trainer = Engine(step)
    trainer.add_event_handler(epochs_on, lambda: sampler.set_epoch(trainer.state.epoch))
    objects = {"trainer": trainer}
    if folder is not None:
        saver = Checkpoint(objects, DiskSaver(folder, require_empty=False), n_saved=2)
        trainer.add_event_handler(options.get("save", Events.ITERATION_COMPLETED), saver)
        resume(objects, saver, engine=trainer)
    with contextlib.suppress(KilledError):
        trainer.run(loader, max_epochs=6, epoch_length=options.get("epoch_length", 3))
    return seen


@pytest.mark.parametrize(
    "options",
    [{}, {"epoch_length": 5}, {"epoch_length": 8}, {"save": Events.GET_BATCH_COMPLETED}, {"num_workers": 1}],
    ids=str,
)
@pytest.mark.parametrize("epochs_on", EPOCH_EVENTS)
def test_a_pass_continues_under_the_epoch_that_it_began_with(
    tmp_path: Path, epochs_on: str, options: dict[str, Any]
) -> None:
    alone = set_epochs(None, EPOCH_EVENTS[epochs_on], **options)
    kills: tuple[tuple[int, ...], ...] = ((4,), (5,), (8, 9), (10, 12), (14, 15))
    for die_at in kills if "num_workers" not in options else ((8, 9),):
        folder, last = tmp_path / str(die_at), dict[int, tuple[Any, ...]]()
        for number in (*die_at, 0):
            last |= {one[1]: one for one in set_epochs(folder, EPOCH_EVENTS[epochs_on], number, **options)}
        assert [last[number] for number in sorted(last)] == alone


def test_an_epoch_set_by_the_program_stays(tmp_path: Path) -> None:
    orders = []
    for num_epochs in (1, 2):
        sampler: DistributedSampler[int] = DistributedSampler(range(5), num_replicas=1, rank=0)  # type: ignore[arg-type]
        trainer = Engine(lambda _engine, _batch: None)
        saver = Checkpoint({"trainer": trainer}, DiskSaver(tmp_path, require_empty=False))
        trainer.add_event_handler(Events.EPOCH_COMPLETED, saver)
        resume(saver.to_save, saver, engine=trainer)
        sampler.set_epoch(6 + num_epochs)
        trainer.run(DataLoader(range(5), sampler=sampler), max_epochs=num_epochs)  # type: ignore[arg-type]
        orders.append(sampler.epoch)
    assert orders == [7, 8]


def test_an_unknown_epoch_of_a_pass_is_warned_of(tmp_path: Path) -> None:
    trainer = Engine(lambda _engine, _batch: None)
    torch.save({"trainer": {"epoch_length": 3, "iteration": 4, "max_epochs": 4}}, tmp_path / "a.pt")
    resume({"trainer": trainer}, tmp_path, engine=trainer)
    sampler: DistributedSampler[int] = DistributedSampler(range(5), num_replicas=1, rank=0)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="does not say for which epoch DistributedSampler drew the order"):
        trainer.run(DataLoader(range(5), sampler=sampler), max_epochs=4, epoch_length=3)  # type: ignore[arg-type]


def test_a_pass_end_that_is_not_reported_again_is_warned_of(tmp_path: Path) -> None:
    set_epochs(tmp_path, Events.DATALOADER_STOP_ITERATION, 6)
    with pytest.warns(UserWarning, match="DATALOADER_STOP_ITERATION are not called for that pass"):
        set_epochs(tmp_path, Events.DATALOADER_STOP_ITERATION)


# -- a last batch that is left out -------------------------------------------------------------------------------------


def leave_out(folder: Path, batch_size: int, die_at: int = 0, **run: int) -> tuple[list[int], list[str]]:
    """Train on a ResumableSampler's loader with ``drop_last``; return the samples and the fired events."""
    data = range(48)
    sampler = ResumableSampler(data, num_replicas=1, rank=0, seed=1)
    loader: DataLoader[Any] = DataLoader(data, batch_size=batch_size, sampler=sampler, drop_last=True)  # type: ignore[arg-type]
    samples: list[int] = []
    events: list[str] = []

    def step(engine: Engine, batch: Any) -> None:
        if engine.state.iteration == die_at:
            raise KilledError
        samples.extend(batch.tolist())

    trainer = Engine(step)
    saver = Checkpoint({"trainer": trainer}, DiskSaver(folder, require_empty=False), n_saved=1)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, saver)
    for event in (Events.EPOCH_STARTED, Events.EPOCH_COMPLETED, Events.COMPLETED):
        trainer.add_event_handler(event, lambda _, name: events.append(f"{name} {trainer.state.epoch}"), event.name)
    resume(saver.to_save, saver, engine=trainer)
    with contextlib.suppress(KilledError):
        trainer.run(loader, **run)
    return samples, events


def test_an_epoch_whose_last_samples_are_no_batch_ends(tmp_path: Path) -> None:
    first, _ = leave_out(tmp_path, 4, 12, max_epochs=1)
    assert len(first) == 44
    rest, events = leave_out(tmp_path, 8, 8, max_epochs=2)
    assert events == ["EPOCH_COMPLETED 1", "EPOCH_STARTED 2"]
    again, events = leave_out(tmp_path, 8, max_epochs=2)
    assert events == ["EPOCH_STARTED 2", "EPOCH_COMPLETED 2", "COMPLETED 2"]
    assert len(rest) == 8
    assert sorted(rest + again) == list(range(48))


def test_a_run_whose_last_samples_are_no_batch_ends(tmp_path: Path) -> None:
    leave_out(tmp_path, 4, 12, max_epochs=1)
    assert leave_out(tmp_path, 8, max_epochs=1) == ([], ["EPOCH_COMPLETED 1", "COMPLETED 1"])


def test_a_pass_whose_last_samples_are_no_batch_ends_within_an_epoch(tmp_path: Path) -> None:
    leave_out(tmp_path, 4, 12, max_epochs=2, epoch_length=15)
    rest, events = leave_out(tmp_path, 8, max_epochs=2, epoch_length=15)
    assert events == ["EPOCH_STARTED 1", "EPOCH_COMPLETED 1", "EPOCH_STARTED 2", "EPOCH_COMPLETED 2", "COMPLETED 2"]
    assert len(rest) == 8 * (30 - 11)
    assert sorted(rest[:48]) == list(range(48))
