"""ZeroRedundancyOptimizer: it is consolidated on all ranks or on none, and the saving rank's directory counts.

The fault of ignite's `Checkpoint`: ranks whose scores differ do not all come to the consolidation, which hangs.
"""

from pathlib import Path

import pytest
import torch
from torch.distributed.optim import ZeroRedundancyOptimizer

from distckpt import Checkpoint, DiskSaver
from tests.distributed.programs import (
    HUNG,
    IGNITE,
    OURS,
    fire,
    gather,
    handlers,
    model_of,
    on_ranks,
    unless_hung,
    warned,
)
from tests.support import job, run_distributed
from tests.support.selection import torch_only

pytestmark = torch_only

WORLDS = pytest.mark.parametrize("world_size", [2, 3])
PRIORITIES = ([1.0, 2.0], [2.0, 1.0], [2.0, 0.0])
"""By rank: a score for each of two epochs; the mean falls, the first rank's rises."""


def sharded(model: torch.nn.Module) -> ZeroRedundancyOptimizer:
    """Return an optimizer that has made one step, so that each rank holds the momentum of its share."""
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.SGD, lr=0.5, momentum=0.9)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    optimizer.step()
    return optimizer


def consolidating_by_score(library: str, folder: Path) -> str:
    """Save a sharded optimizer by a score that differs between the ranks."""
    mine = iter(PRIORITIES[job.rank()])
    model = model_of(1.0)
    handler = handlers(library).Checkpoint(
        {"model": model, "optimizer": sharded(model)},
        handlers(library).DiskSaver(folder),
        score_function=lambda _: next(mine),
    )

    def run() -> str:
        fire(handler, times=2)
        job.barrier()
        return str(handler.last_checkpoint.name)

    with warned():
        return unless_hung(run)


@WORLDS
def test_ignites_ranks_hang_in_the_consolidation(tmp_path: Path, world_size: int) -> None:
    assert on_ranks(consolidating_by_score, IGNITE, world_size, tmp_path) == [HUNG] * world_size


@WORLDS
def test_a_sharded_optimizer_is_consolidated_on_all_ranks_or_on_none(tmp_path: Path, world_size: int) -> None:
    (name,) = set(on_ranks(consolidating_by_score, OURS, world_size, tmp_path))
    saved = torch.load(tmp_path / name, weights_only=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    momenta = [saved["optimizer"]["state"][index]["momentum_buffer"] for index in range(2)]
    assert [momentum.unique().tolist() for momentum in momenta] == [[1.0], [2.0]], "every rank's share"


@run_distributed(world_size=2)
def test_a_sharded_optimizer_is_loaded_into_one_of_another_world_size(tmp_path: Path) -> None:
    model = model_of(1.0)
    handler = Checkpoint({"model": model, "optimizer": sharded(model)}, tmp_path)
    fire(handler)
    plain = torch.optim.SGD(model_of(0.0).parameters(), lr=0.1, momentum=0.9)
    path = handler.last_checkpoint
    assert path is not None
    Checkpoint.load_objects({"model": model_of(0.0), "optimizer": plain}, path)
    assert [state["momentum_buffer"].unique().tolist() for state in plain.state.values()] == [[1.0], [2.0]]


@pytest.mark.parametrize("saving", [0, 1])
@run_distributed(world_size=2)
def test_directory_of_the_saving_rank_is_the_one_written_to(tmp_path: Path, saving: int) -> None:
    mine, its = tmp_path / f"rank{job.rank()}", tmp_path / f"rank{saving}"
    model = model_of(1.0)
    handler = Checkpoint(
        {"model": model, "optimizer": sharded(model)}, DiskSaver(mine, save_on_rank=saving), save_on_rank=saving
    )
    fire(handler, times=2)
    job.barrier()
    assert [path.name for path in tmp_path.iterdir()] == [its.name], "the others make no directory"
    assert [path.name for path in its.iterdir()] == ["checkpoint_2.pt"]


@pytest.mark.parametrize("saving", [0, 1])
@run_distributed(world_size=2)
def test_last_checkpoint_lies_in_the_directory_of_the_saving_rank(tmp_path: Path, saving: int) -> None:
    mine, its = tmp_path / f"rank{job.rank()}", tmp_path / f"rank{saving}"
    handler = Checkpoint({"model": model_of(1.0)}, DiskSaver(mine, save_on_rank=saving), save_on_rank=saving)
    fire(handler)
    assert gather(handler.last_checkpoint) == [its / "model_1.pt"] * 2


@pytest.mark.parametrize("saving", [0, 1])
@run_distributed(world_size=2)
def test_ranks_that_do_not_save_pass_an_empty_state(saving: int) -> None:
    passed: list[object] = []
    model = model_of(1.0)
    handler = Checkpoint(
        {"model": model, "optimizer": sharded(model)},
        lambda checkpoint, _filename, _metadata: passed.append(checkpoint["optimizer"]),
        save_on_rank=saving,
    )
    fire(handler)
    assert gather([bool(state) for state in passed]) == [[rank == saving] for rank in range(2)]
