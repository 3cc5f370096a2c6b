"""Sharded state where the runtime's ranks cannot exchange bytes: refused on all ranks, and the job goes on."""

from pathlib import Path

import torch
from torch import nn

import distckpt
from distckpt import ShardedStateError, StageState
from tests.distributed.programs import all_equal, gather, raised
from tests.support import job, run_distributed
from tests.support.selection import only_on

pytestmark = only_on("horovod", "xla", why="ranks of torch.distributed exchange bytes")


@run_distributed(world_size=2)
def test_stages_of_a_pipeline_are_refused_and_the_job_goes_on(tmp_path: Path) -> None:
    stages = nn.ModuleDict({f"layer{job.rank()}": nn.Linear(300, 300)})
    to_save, path = {"model": StageState(stages)}, tmp_path / "a.pt"
    for save in (lambda: distckpt.save(to_save, path), lambda: distckpt.async_save(to_save, path).result()):
        error = raised(save)
        assert isinstance(error, ShardedStateError), error
        assert "whose ranks cannot exchange bytes. Nothing was saved" in str(error)
        assert all_equal(gather(str(error)))
    distckpt.save({"model": nn.Linear(2, 2)}, tmp_path / "b.pt")
    job.barrier()
    assert [one.name for one in tmp_path.iterdir()] == ["b.pt"]
    assert list(torch.load(tmp_path / "b.pt", weights_only=True)) == ["weight", "bias"]
