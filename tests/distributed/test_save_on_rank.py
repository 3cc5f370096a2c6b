"""Any rank may be the one that saves, and it has to be one of the job, the same for all."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from distckpt import Checkpoint, DiskSaver, ModelCheckpoint
from tests.distributed.programs import fire, gather, model_of, raised
from tests.support import job, run_distributed


@pytest.mark.parametrize("saving", [0, 1, 2])
@run_distributed(world_size=3)
def test_content_is_that_of_the_saving_rank(tmp_path: Path, saving: int) -> None:
    handler = Checkpoint({"model": model_of(float(job.rank()))}, tmp_path, save_on_rank=saving)
    fire(handler, times=2)
    job.barrier()
    path = handler.last_checkpoint
    assert gather(path) == [tmp_path / "model_2.pt"] * 3
    assert path is not None
    assert torch.load(path, weights_only=True)["weight"].unique().tolist() == [float(saving)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model_2.pt"]


@run_distributed(world_size=2)
def test_model_checkpoint_saves_on_the_rank_that_it_is_told(tmp_path: Path) -> None:
    handler = ModelCheckpoint(tmp_path, "best", save_on_rank=1)
    model = model_of(float(job.rank()))
    fire(lambda engine: handler(engine, {"model": model}))
    job.barrier()
    saved = torch.load(tmp_path / "best_model_1.pt", weights_only=True)
    assert saved["weight"].unique().tolist() == [1.0]


@run_distributed(world_size=2)
def test_rank_of_the_disk_saver_comes_first(tmp_path: Path) -> None:
    handler = Checkpoint({"model": model_of(float(job.rank()))}, DiskSaver(tmp_path, save_on_rank=1))
    fire(handler)
    job.barrier()
    saved = torch.load(tmp_path / "model_1.pt", weights_only=True)
    assert saved["weight"].unique().tolist() == [1.0]


@run_distributed(world_size=2)
def test_a_rank_that_the_job_does_not_have_is_refused_on_every_rank(tmp_path: Path) -> None:
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path / "new", save_on_rank=2)
    with pytest.raises(ValueError, match=r"save_on_rank should be a rank of this job \(0 to 1\), but given 2"):
        fire(handler)
    job.barrier()
    assert list(tmp_path.iterdir()) == []


@run_distributed(world_size=2)
def test_ranks_that_name_different_ones_are_refused_on_every_rank(tmp_path: Path) -> None:
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path, save_on_rank=job.rank())
    error = raised(lambda: fire(handler))
    assert isinstance(error, ValueError)
    assert "save_on_rank should be the same on every rank, but is, by rank: [0, 1]" in str(error)
    assert gather(str(error)) == [str(error)] * 2


@pytest.mark.parametrize(("rank", "kind"), [(-1, ValueError), (True, TypeError), ("0", TypeError), (None, TypeError)])
@run_distributed(world_size=2)
def test_what_is_no_rank_is_refused_at_construction(tmp_path: Path, rank: object, kind: type[Exception]) -> None:
    wrong: Any = rank
    for build in (partial(Checkpoint, {"model": model_of(1.0)}), DiskSaver, ModelCheckpoint):
        with pytest.raises(kind, match="save_on_rank"):
            build(tmp_path, save_on_rank=wrong)
    job.barrier()
