"""Resumed runs over torch's loaders have the order of an uninterrupted run, or warn before the first batch."""

import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from distckpt import Checkpoint, DiskSaver, ResumableSampler, RngState, resume
from distckpt.handlers.data_loaders import find_generators, find_random_sampler
from distckpt.handlers.sample_order import warn_if_ranks_changed
from tests.support.selection import quick

LENGTH = 20
DATA = TensorDataset(torch.arange(LENGTH))
Make = Callable[[], Any]


class Program:
    """A program that trains on a loader for three epochs; it may stop at an iteration and resume."""

    def __init__(self, folder: Path, make: Make, *, rng: str = "trainer", sampler_is_saved: bool = False) -> None:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002 - the global generator is the point
        self.loader = make()
        self.seen: list[list[int]] = []
        self.warned: list[str] = []
        self.trainer = Engine(lambda _engine, batch: self.seen.append(batch[0].tolist()))
        self.trainer.logger.disabled = True
        self.objects: dict[str, Any] = {"trainer": self.trainer}
        if rng:
            self.objects["rng"] = RngState(self.trainer) if rng == "trainer" else RngState()
        if sampler_is_saved:
            self.objects["sampler"] = self.loader.sampler
        self.saver = Checkpoint(self.objects, DiskSaver(folder, require_empty=False))

    def run(self, stop_at: int | None = None) -> list[list[int]]:
        """Resume, and train up to an iteration or to the end; return the batches."""

        def stop(engine: Engine) -> None:
            if engine.state.iteration == stop_at:
                self.saver(engine)
                engine.terminate()

        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, stop)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            resume(self.objects, self.saver, engine=self.trainer)
            self.trainer.run(self.loader, max_epochs=3)
        self.warned = [str(one.message) for one in warned if str(one.message).startswith("resume:")]
        return self.seen


def in_parts(folder: Path, make: Make, *stops: int, **options: Any) -> tuple[list[list[int]], list[str]]:
    """Train in parts; return all batches and what was warned of."""
    batches, warned = [], []
    for stop in (*stops, None):
        program = Program(folder, make, **options)
        batches += program.run(stop)
        warned += program.warned
    return batches, warned


class Drawing(Sampler[int]):
    """A sampler of a program's own that draws a little with each index, and once more at its end."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw

    def __iter__(self) -> Iterator[int]:
        """Draw each index as it is asked for."""
        for _ in range(LENGTH):
            yield int(self.draw() * LENGTH)
        self.draw()

    def __len__(self) -> int:
        """Return the number of indices."""
        return LENGTH


class Outer(Sampler[int]):
    """A sampler around another one."""

    def __init__(self, sampler: Sampler[int]) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[int]:
        """Yield the other one's indices, backwards."""
        return reversed(list(self.sampler))

    def __len__(self) -> int:
        """Return the number of indices."""
        return LENGTH


class Grouped(BatchSampler):
    """A batch sampler that shuffles its batches by a generator of its own."""

    def __init__(self) -> None:
        super().__init__(SequentialSampler(DATA), 2, drop_last=False)
        self.rng = np.random.default_rng(4)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches in another order each time."""
        batches = list(super().__iter__())
        return (batches[index] for index in self.rng.permutation(len(batches)))


def own() -> torch.Generator:
    """Return a generator of a loader's own."""
    return torch.Generator().manual_seed(7)


def owned_by_a_sampler() -> Any:
    """Return a loader whose sampler and workers' seed have generators of their own."""
    return DataLoader(DATA, 2, sampler=RandomSampler(DATA, generator=own()), generator=own())


MADE: dict[str, Make] = {
    "shuffle": lambda: DataLoader(DATA, 2, shuffle=True),
    "a generator": lambda: DataLoader(DATA, 2, shuffle=True, generator=own()),
    "a generator, batches that do not divide": lambda: DataLoader(DATA, 3, shuffle=True, generator=own()),
    "a generator, drop_last": lambda: DataLoader(DATA, 3, shuffle=True, generator=own(), drop_last=True),
    "two generators": owned_by_a_sampler,
    "more samples than there are": lambda: DataLoader(
        DATA, 2, sampler=RandomSampler(DATA, num_samples=30, generator=own())
    ),
    "replacement": lambda: DataLoader(DATA, 2, sampler=RandomSampler(DATA, replacement=True, generator=own())),
    "subset": lambda: DataLoader(DATA, 2, sampler=SubsetRandomSampler(range(LENGTH), generator=own())),
    "weights": lambda: DataLoader(DATA, 2, sampler=WeightedRandomSampler([1.0] * LENGTH, LENGTH)),
    "batch sampler": lambda: DataLoader(
        DATA, batch_sampler=BatchSampler(RandomSampler(DATA, generator=own()), 4, drop_last=False)
    ),
    "nested": lambda: DataLoader(DATA, 2, sampler=Outer(RandomSampler(DATA, generator=own()))),
    "Python's generator": lambda: DataLoader(DATA, 2, sampler=Drawing(random.random)),
    "a Python generator": lambda: DataLoader(DATA, 2, sampler=Keeping(random.Random(5))),
    "batches by NumPy": lambda: DataLoader(DATA, batch_sampler=Grouped()),
    "persistent": lambda: DataLoader(DATA, 2, shuffle=True, num_workers=1, persistent_workers=True),
    "persistent, a generator": lambda: DataLoader(
        DATA, 2, shuffle=True, num_workers=1, persistent_workers=True, generator=own()
    ),
    "workers, a generator": lambda: DataLoader(DATA, 2, shuffle=True, num_workers=2, generator=own()),
    "ours": lambda: DataLoader(DATA, 2, sampler=ResumableSampler(DATA)),
    "ours, persistent": lambda: DataLoader(
        DATA, 3, sampler=ResumableSampler(DATA), num_workers=1, persistent_workers=True
    ),
}


class Keeping(Drawing):
    """A sampler that keeps the generator that it draws from."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng.random)
        self.rng = rng


STOPS: dict[str, Callable[[int], tuple[int, ...]]] = {
    "in the second epoch": lambda length: (length + 2,),
    "after an epoch": lambda length: (length,),
    "in the first epoch": lambda _: (3,),
    "three times": lambda length: (2, length, length + 1),
    "after two epochs": lambda length: (2 * length,),
}


@quick(8)
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("name", MADE)
def test_with_an_rng_state_a_loader_continues_as_if_uninterrupted(tmp_path: Path, name: str, stop: str) -> None:
    make = MADE[name]
    alone, _ = in_parts(tmp_path / "alone", make)
    next_alone = torch.rand(3)
    batches, warned = in_parts(tmp_path / "parts", make, *STOPS[stop](len(alone) // 3))
    assert batches == alone
    assert torch.equal(torch.rand(3), next_alone), "what is drawn after the run is the same too"
    assert all("the loader starts new workers" in one for one in warned)
    assert not warned or "persistent" in name


@pytest.mark.parametrize("rng", ["", "trainer"])
@pytest.mark.parametrize("is_saved", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumable_sampler_continues_after_the_trained_samples_and_nothing_is_skipped_twice(
    tmp_path: Path, rng: str, num_workers: int, *, is_saved: bool
) -> None:
    def make() -> Any:
        return DataLoader(DATA, 2, sampler=ResumableSampler(DATA), num_workers=num_workers)

    alone, _ = in_parts(tmp_path / "alone", make, rng=rng)
    batches, warned = in_parts(tmp_path / "parts", make, 3, 10, 14, rng=rng, sampler_is_saved=is_saved)
    assert batches == alone
    assert all(sorted(itertools.chain(*alone[at : at + 10])) == list(range(LENGTH)) for at in (0, 10, 20))
    assert bool(warned) == bool(num_workers)


def test_a_resumable_sampler_continues_with_another_batch_size(tmp_path: Path) -> None:
    first = Program(tmp_path, lambda: DataLoader(DATA, 3, sampler=ResumableSampler(DATA))).run(3)
    rest = Program(tmp_path, lambda: DataLoader(DATA, 4, sampler=ResumableSampler(DATA))).run()
    assert sorted(itertools.chain(*first, *rest[:3])) == list(range(LENGTH))
    assert [len(batch) for batch in rest[:3]] == [4, 4, 3]
    assert all(sorted(itertools.chain(*rest[at : at + 5])) == list(range(LENGTH)) for at in (3, 8))


@pytest.mark.parametrize("name", ["shuffle", "subset", "weights", "batch sampler", "nested", "Python's generator"])
@pytest.mark.parametrize(("stop", "what"), [(10, "the following epochs"), (13, "the interrupted epoch")])
def test_without_an_rng_state_a_warning_comes_before_the_first_batch(
    tmp_path: Path, name: str, stop: int, what: str
) -> None:
    Program(tmp_path, MADE[name], rng="").run(5 if name == "batch sampler" and stop == 10 else stop)
    program = Program(tmp_path, MADE[name], rng="")
    program.run(stop + 1)
    assert len(program.warned) == 1
    assert what in program.warned[0]


def test_a_generator_that_was_not_saved_is_named_in_a_warning(tmp_path: Path) -> None:
    _, warned = in_parts(tmp_path, MADE["a generator"], 10, rng="without the trainer")
    assert len(warned) == 1
    assert "lacks the states of the generators state.dataloader.generator" in warned[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(DATA, 2),
        lambda: DataLoader(DATA, 2, sampler=DistributedSampler(DATA, num_replicas=1, rank=0)),
        lambda: DataLoader(DATA, 2, sampler=[3, 1, 4, 1, 5, 9, 2, 6]),
        lambda: DataLoader(DATA, batch_sampler=[[0, 1], [2, 3], [4, 5], [6]]),
    ],
    ids=["in sequence", "distributed", "a list", "a list of batches"],
)
@pytest.mark.parametrize("stop", [1, 4, 10])
def test_a_sampler_that_does_not_draw_gives_no_warning(tmp_path: Path, make: Make, stop: int) -> None:
    alone, _ = in_parts(tmp_path / "alone", make, rng="")
    batches, warned = in_parts(tmp_path / "parts", make, stop, rng="")
    assert (batches, warned) == (alone, [])


@pytest.mark.parametrize(("stop", "size", "is_known"), [(2, 4, True), (1, 4, False), (4, 4, True), (2, 3, False)])
def test_torchs_distributed_sampler_continues_with_another_batch_size_if_it_can(
    tmp_path: Path, stop: int, size: int, *, is_known: bool
) -> None:
    def make(size: int) -> Make:
        return lambda: DataLoader(DATA, size, sampler=DistributedSampler(DATA, num_replicas=1, rank=0))

    first = Program(tmp_path, make(2)).run(stop)
    program = Program(tmp_path, make(size))
    if is_known:
        rest = program.run()
        assert sorted(itertools.chain(*first, *rest[: (LENGTH - 2 * stop) // size])) == list(range(LENGTH))
    else:
        with pytest.raises(ValueError, match=r"no whole number of steps of 1 x .*ResumableSampler"):
            program.run()
        assert program.seen == []


class Endless(IterableDataset[Any]):
    """A stream."""

    def __iter__(self) -> Iterator[int]:
        """Yield without an end."""
        return itertools.count()


def test_samplers_that_draw_are_known() -> None:
    drawing = RandomSampler(DATA)
    assert find_random_sampler(DataLoader(DATA, sampler=drawing)) is drawing
    assert isinstance(find_random_sampler(DataLoader(DATA, batch_sampler=Grouped())), Grouped)
    assert find_random_sampler(DataLoader(Endless())) is None
    assert find_random_sampler([1, 2]) is None


def test_generators_are_found_by_path_and_samples_are_not_searched() -> None:
    generator = own()
    data: Any = [object()] * 1000
    loader: Any = DataLoader(data, shuffle=True, generator=generator)
    assert find_generators(loader) == {"state.dataloader.generator": generator}
    assert find_generators(None) == {}


def test_a_batch_sampler_over_a_distributed_sampler_splits_the_data_among_the_ranks() -> None:
    inner: Any = DistributedSampler(DATA, num_replicas=2, rank=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_ranks_changed(
            DataLoader(DATA, batch_sampler=BatchSampler(inner, 2, drop_last=False)), 1, 2, is_mid_pass=True
        )
    with pytest.warns(UserWarning, match="no sampler that splits them"):
        warn_if_ranks_changed(DataLoader(DATA, batch_size=2), 1, 2, is_mid_pass=True)
