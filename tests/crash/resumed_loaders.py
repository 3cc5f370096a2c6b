"""Runs that stop and resume on the same or another number of ranks, over a table of loaders.

A cell of the table is a kind of sampler, a kind of workers, the stops, and the numbers of ranks before and after. Every
rank returns the samples that it trained, with their epochs, and its warnings. `tests.crash.test_resumed_loaders` holds
the expected results.
"""

import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from distckpt import Checkpoint, DiskSaver, ResumableSampler, RngState, resume
from tests.support import run_ranks

LENGTH, BATCH_SIZE, MAX_EPOCHS = 36, 3, 3
"""Divisible by all numbers of ranks, so that each sample of an epoch comes exactly once."""

SAMPLERS = (
    "ResumableSampler",
    "DistributedSampler",
    "none",
    "RandomSampler",
    "RandomSampler with a generator",
    "RandomSampler with replacement",
    "SubsetRandomSampler",
    "SubsetRandomSampler with a generator",
    "WeightedRandomSampler",
    "BatchSampler of a RandomSampler",
)
_CLEAN: dict[str, Any] = {"num_workers": 2, "multiprocessing_context": "forkserver"}
"""A rank has threads; a worker that is forked from it may inherit a locked lock."""
WORKERS: dict[str, dict[str, Any]] = {
    "no workers": {},
    "2 workers": _CLEAN,
    "persistent workers": _CLEAN | {"persistent_workers": True},
}
STOPS: dict[str, tuple[tuple[int, int], ...]] = {
    "in an epoch": ((2, 2),),
    "at its end": ((1, 0),),
    "in the first": ((1, 1),),
    "twice": ((1, 2), (2, 3)),
}
"""The stops of a run: an epoch, and the number of its batches that are trained; 0 for all."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of the table, without the numbers of ranks."""

    sampler: str
    workers: str
    stops: str


@dataclass(slots=True)
class Leg:
    """A run on one rank, from a start to a stop.

    Attributes:
        batches: epoch and samples of each trained batch.
        warned: the warnings.
        refused: the error that ended the run before a batch was trained.
    """

    batches: list[tuple[int, list[int]]] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    refused: str = ""


def run_leg(folder: Path, cells: Sequence[tuple[str, Cell, tuple[int, int] | None]], num_ranks: int) -> list[Any]:
    """Run the next leg of several cells on the same ranks; return the legs of all ranks, by cell.

    Args:
        folder: the directory of all checkpoints.
        cells: a folder's name, the cell, and its next stop; None for the end of the run.
        num_ranks: number of ranks.
    """
    by_rank = run_ranks(_train_all, num_ranks, folder, list(cells))
    return [list(legs) for legs in zip(*by_rank, strict=True)]


def _train_all(folder: Path, cells: list[tuple[str, Cell, tuple[int, int] | None]]) -> list[Leg]:
    # A worker unpickles a data set that distckpt has wrapped: without this each one imports torch, ignite and distckpt.
    multiprocessing.set_forkserver_preload(["torch", "distckpt.handlers", "tests.support"])
    return [_train(folder / name, cell, stop) for name, cell, stop in cells]


def _train(folder: Path, cell: Cell, stop: tuple[int, int] | None) -> Leg:
    """Train the next leg."""
    leg = Leg()
    torch.manual_seed(100 + dist.get_rank())
    loader, sampler = _loader_of(cell)
    trainer = Engine(lambda engine, batch: leg.batches.append((engine.state.epoch, batch[0].tolist())))
    trainer.logger.disabled = True
    objects = {"trainer": trainer, "rng": RngState(trainer)}
    saver = Checkpoint(objects, DiskSaver(folder, require_empty=False), n_saved=2)

    def begin() -> None:
        if isinstance(sampler, DistributedSampler) and not isinstance(sampler, ResumableSampler):
            sampler.set_epoch(trainer.state.epoch)

    trainer.add_event_handler(Events.EPOCH_STARTED, begin)

    def stop_here() -> None:
        saver(trainer)
        trainer.terminate()

    if stop is not None:
        epoch, num_batches = stop

        def is_there(engine: Engine, _event: int) -> bool:
            return engine.state.epoch == epoch and sum(one == epoch for one, _ in leg.batches) == num_batches

        if num_batches:
            there: Any = Events.ITERATION_COMPLETED
            trainer.add_event_handler(there(event_filter=is_there), stop_here)
        else:
            trainer.add_event_handler(Events.EPOCH_COMPLETED(once=epoch), stop_here)
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        resume(objects, saver, engine=trainer)
        try:
            trainer.run(loader, max_epochs=MAX_EPOCHS)
        except ValueError as error:
            leg.refused = str(error)
    leg.warned = [str(one.message) for one in messages]
    workers = loader._iterator  # torch has no public way to end persistent ones
    if workers is not None:
        workers._shutdown_workers()  # type: ignore[attr-defined]  # as above
    return leg


def _loader_of(cell: Cell) -> tuple[DataLoader[Any], Any]:
    data = TensorDataset(torch.arange(LENGTH))
    own = torch.Generator().manual_seed(5)
    kind, _, how = cell.sampler.partition(" with ")
    samplers: dict[str, Callable[[], Any]] = {
        "ResumableSampler": lambda: ResumableSampler(data, seed=3),
        "DistributedSampler": lambda: DistributedSampler(data, seed=3),
        "none": lambda: None,
        "RandomSampler": lambda: RandomSampler(data),
        "RandomSampler a generator": lambda: RandomSampler(data, generator=own),
        "RandomSampler replacement": lambda: RandomSampler(data, replacement=True, num_samples=LENGTH),
        "SubsetRandomSampler": lambda: SubsetRandomSampler(range(LENGTH)),
        "SubsetRandomSampler a generator": lambda: SubsetRandomSampler(range(LENGTH), generator=own),
        "WeightedRandomSampler": lambda: WeightedRandomSampler([1.0 + i for i in range(LENGTH)], LENGTH),
        "BatchSampler of a RandomSampler": lambda: BatchSampler(RandomSampler(data), BATCH_SIZE, drop_last=False),
    }
    sampler: Any = samplers[f"{kind} {how}".strip()]()
    options = WORKERS[cell.workers]
    if isinstance(sampler, BatchSampler):
        return DataLoader(data, batch_sampler=sampler, **options), sampler
    return DataLoader(data, batch_size=BATCH_SIZE, sampler=sampler, **options), sampler
