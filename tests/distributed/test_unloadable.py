"""Two ranks, and a state that loading would refuse from some save on."""

import datetime as dt
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from distckpt import Checkpoint, DiskSaver, RemoteRankError, resume
from tests.distributed.programs import gather, idle_engine, model_of, warned
from tests.support import job, run_distributed
from tests.unit.toys import Notebook

SAVERS: dict[str, dict[str, Any]] = {
    "foreground": {},
    "background": {"background": True},
    "shared": {"share_write": "world", "background": True},
}


@pytest.mark.parametrize("saving", [0, 1])
@pytest.mark.parametrize("options", SAVERS)
@run_distributed(world_size=2)
def test_newest_file_that_loads_stays_and_all_ranks_resume_from_it(tmp_path: Path, options: str, saving: int) -> None:
    book, engine = Notebook({"best": 0}), idle_engine()
    model, _, _ = job.data_parallel(model_of(1.0), torch.optim.SGD)
    saver = DiskSaver(tmp_path, save_on_rank=saving, **SAVERS[options])
    handler = Checkpoint({"model": model, "book": book}, saver)
    with warned() as messages:
        for number in range(4):
            engine.state.iteration = number
            book.state = {"best": number if number < 2 else dt.timedelta(number)}
            handler(engine)
            handler.wait_until_finished()
            job.barrier()
    told = [one for one in messages if "'book.best' (datetime.timedelta)" in one]
    assert gather(len(told)) == [2 if rank == saving else 0 for rank in range(2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_1.pt", "checkpoint_3.pt"]
    assert [path.name for path in gather(handler.last_checkpoint)] == ["checkpoint_3.pt"] * 2
    found = resume({"model": model, "book": book}, tmp_path)
    assert gather((found, book.state)) == [(tmp_path / "checkpoint_1.pt", {"best": 1})] * 2
    engine.state.iteration = 4
    handler(engine)
    handler.wait_until_finished()
    job.barrier()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_4.pt"]


@pytest.mark.parametrize("options", SAVERS)
@run_distributed(world_size=2)
def test_warnings_that_are_errors_stop_the_save_on_all_ranks(tmp_path: Path, options: str) -> None:
    book, engine = Notebook({"best": 0}), idle_engine()
    handler = Checkpoint({"book": book}, DiskSaver(tmp_path, **SAVERS[options]))
    handler(engine)
    handler.wait_until_finished()
    engine.state.iteration, book.state = 1, {"best": dt.timedelta(1)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RemoteRankError, match=r"'book\.best'"):
            handler(engine)
    job.barrier()
    assert [path.name for path in tmp_path.iterdir()] == ["book_0.pt"]
