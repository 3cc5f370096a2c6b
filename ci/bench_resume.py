"""Measure the time to resume in the middle of an epoch: with a ResumableSampler, and by drawing and dropping batches.

A run of 1,000,000 batches of 32 samples stops in the middle of its second epoch and resumes. The time is wall time from
`resume` to the first trained batch. For comparison: torch's RandomSampler with an RngState, at 1% of the size.

Run it as ``PYTHONPATH=. python ci/bench_resume.py [--quick]``; both take a few seconds. Exit status 1 if the best of
three runs with ResumableSampler takes more than 1 s.
"""

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch.utils.data import DataLoader, Dataset, RandomSampler

from distckpt import Checkpoint, DiskSaver, ResumableSampler, RngState, resume

NUM_BATCHES, BATCH_SIZE = 1_000_000, 32
FRACTION = 100
"""The size is divided by this where batches are dropped."""
LIMIT_S = 1.0
ROUNDS = 3


class Numbers(Dataset[torch.Tensor]):
    """A map-style data set of equal samples.

    Args:
        length: number of samples.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._sample = torch.zeros(1)

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._length

    def __getitem__(self, index: int) -> torch.Tensor:
        """Return a sample."""
        return self._sample


def build(folder: Path, sampler: Any, length: int) -> tuple[Engine, dict[str, Any], Checkpoint, DataLoader[Any]]:
    """Return the trainer, the objects to save, the handler and the data loader."""
    trainer = Engine(lambda _engine, _batch: None)
    trainer.logger.disabled = True
    objects = {"trainer": trainer, "rng": RngState(trainer)}
    saver = Checkpoint(objects, DiskSaver(folder, require_empty=False))
    return trainer, objects, saver, DataLoader(Numbers(length), batch_size=BATCH_SIZE, sampler=sampler)


def save_in_the_middle(folder: Path, sampler: Any, num_batches: int) -> None:
    """Save in the middle of the second epoch. With a ResumableSampler only the last batch before it is trained."""
    trainer, _, saver, loader = build(folder, sampler, num_batches * BATCH_SIZE)
    middle = num_batches + num_batches // 2
    if isinstance(sampler, ResumableSampler):
        trainer.load_state_dict({"iteration": middle - 1, "epoch_length": num_batches, "max_epochs": 3})
        position = (num_batches // 2 - 1) * BATCH_SIZE
        sampler.load_state_dict(sampler.state_dict() | {"epoch": 1, "position": position})

    def stop(engine: Engine) -> None:
        if engine.state.iteration == middle:
            saver(engine)
            engine.terminate()

    trainer.add_event_handler(Events.ITERATION_COMPLETED, stop)
    trainer.run(loader, max_epochs=3)


def time_resume(folder: Path, sampler: Any, num_batches: int) -> tuple[float, int]:
    """Return the seconds from `resume` to the first batch, and its iteration."""
    trainer, objects, saver, loader = build(folder, sampler, num_batches * BATCH_SIZE)
    begin_s = time.perf_counter()
    took_s: list[float] = []

    def stop() -> None:
        took_s.append(time.perf_counter() - begin_s)
        trainer.terminate()

    trainer.add_event_handler(Events.ITERATION_STARTED, stop)
    resume(objects, saver, engine=trainer)
    trainer.run(loader, max_epochs=3)
    return took_s[0], trainer.state.iteration


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="no effect: the benchmark takes a few seconds")
    parser.parse_args()
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory() as name:
        ours, torchs = Path(name) / "ours", Path(name) / "torchs"
        length = NUM_BATCHES * BATCH_SIZE
        save_in_the_middle(ours, ResumableSampler(length, seed=7), NUM_BATCHES)
        timed = [time_resume(ours, ResumableSampler(length, seed=7), NUM_BATCHES) for _ in range(ROUNDS)]
        small = NUM_BATCHES // FRACTION
        save_in_the_middle(torchs, RandomSampler(range(small * BATCH_SIZE)), small)
        dropped_s, _ = time_resume(torchs, RandomSampler(range(small * BATCH_SIZE)), small)
    best_s = min(took_s for took_s, _ in timed)
    iterations = {iteration for _, iteration in timed}
    seconds = ", ".join(f"{took_s:.3f}" for took_s, _ in timed)
    print(f"ResumableSampler, {NUM_BATCHES:,} batches of {BATCH_SIZE}: {seconds} s to iteration {iterations}")
    print(f"RandomSampler, {small:,} batches, of which {small // 2:,} are dropped: {dropped_s:.3f} s")
    print(f"at {NUM_BATCHES:,} batches that would be {dropped_s * FRACTION:.0f} s")
    is_right = best_s <= LIMIT_S and iterations == {NUM_BATCHES + NUM_BATCHES // 2 + 1}
    print(f"{'ok' if is_right else 'FAILED'}: at most {LIMIT_S:.0f} s, in the middle of the epoch")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
