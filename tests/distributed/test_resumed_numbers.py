"""Random numbers after `resume`, on several ranks: each rank's own, and those of ranks that a job has gained."""

import random
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events

from distckpt import (
    Checkpoint,
    RemoteRankError,
    RngState,
    resume,
)
from tests.distributed.programs import idle_engine, warned
from tests.support import job, run_distributed, run_ranks
from tests.support.selection import only_on, process_ranks_only

WORLDS = pytest.mark.parametrize("world_size", [2, 3])


def draw() -> list[float]:
    """Draw a few numbers of each kind."""
    return [random.random(), *torch.rand(2).tolist()]


def save_numbers(folder: Path) -> list[float]:
    """Save after drawing from a seed of this rank's own; return what is drawn next."""
    rank = job.rank()
    random.seed(rank)
    torch.manual_seed(rank)
    draw()
    trainer = idle_engine()
    handler = Checkpoint({"trainer": trainer, "rng": RngState(trainer)}, folder)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
    trainer.run(range(2), max_epochs=1)
    return draw()


def load_numbers(folder: Path) -> tuple[list[str], list[float], list[float]]:
    """Resume; return the warnings, what is drawn next, and what would be drawn next without."""
    rank = job.rank()
    random.seed(rank + 10)
    torch.manual_seed(rank + 10)
    untouched = draw()
    random.seed(rank + 10)
    torch.manual_seed(rank + 10)
    trainer = idle_engine()
    with warned() as messages:
        resume({"trainer": trainer, "rng": RngState(trainer)}, folder, engine=trainer)
    return messages, draw(), untouched


@process_ranks_only
@WORLDS
def test_each_rank_gets_its_own_random_numbers_back(tmp_path: Path, world_size: int) -> None:
    saved = run_ranks(save_numbers, world_size, tmp_path)
    assert len({tuple(numbers) for numbers in saved}) == world_size, "every rank's are others"
    loaded = run_ranks(load_numbers, world_size, tmp_path)
    assert [messages for messages, _, _ in loaded] == [[]] * world_size
    assert [numbers for _, numbers, _ in loaded] == saved


@only_on("gloo", why="each rank is a process, and jobs of three take part")
@pytest.mark.parametrize(("before", "now"), [(1, 2), (2, 3), (3, 2), (2, 1)])
def test_in_a_job_of_another_size_ranks_keep_their_random_numbers_and_new_ones_get_others(
    tmp_path: Path, before: int, now: int
) -> None:
    saved = run_ranks(save_numbers, before, tmp_path)
    loaded = run_ranks(load_numbers, now, tmp_path)
    for rank, (messages, numbers, untouched) in enumerate(loaded):
        assert len(messages) == 1
        assert f"of a job of {before} ranks, and this job has {now}" in messages[0]
        if rank < before:
            assert numbers == saved[rank]
        else:
            assert f"ranks {list(range(before, now))} get states derived from all of these" in messages[0]
            assert numbers != untouched
    assert len({tuple(numbers) for _, numbers, _ in loaded}) == now, "every rank's are others"
    assert [numbers for _, numbers, _ in run_ranks(load_numbers, now, tmp_path)] == [one for _, one, _ in loaded]


@run_distributed(world_size=2)
def test_a_generator_that_fails_on_one_rank_raises_on_all(tmp_path: Path) -> None:
    source = RngState()
    if job.rank() == 1:
        source._capture = lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    trainer = Engine(lambda _engine, _batch: None)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint({"rng": source}, tmp_path))
    with pytest.raises(RemoteRankError, match="division by zero") as caught:
        trainer.run([0])
    assert isinstance(caught.value, ArithmeticError)
    assert list(tmp_path.iterdir()) == []
