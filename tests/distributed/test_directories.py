"""A directory that is not empty, or missing, is refused by every rank: at construction, or at the first event.

The fault of ignite's `DiskSaver`: the saving rank alone looks, and raises alone.
"""

import errno
import os
import re
import time
from datetime import timedelta
from pathlib import Path

import pytest
from ignite.engine import Engine, Events

from distckpt import Checkpoint, DiskSaver, ModelCheckpoint, RemoteRankError
from tests.distributed.programs import (
    HUNG,
    IGNITE,
    OURS,
    fire,
    gather,
    handlers,
    model_of,
    on_ranks,
    raised,
    training_step,
    unless_hung,
)
from tests.support import job, run_distributed

WORLDS = pytest.mark.parametrize("world_size", [2, 3])
NOT_EMPTY = re.compile(r"^Files \['old.pt'\] with extension '.pt' are already present in the directory ")


def building_in_a_shared_directory(library: str, folder: Path) -> str:
    """Build a saver in a directory that is not empty, and train."""
    lib, trainer = handlers(library), Engine(training_step)

    def run() -> str:
        try:
            trainer.add_event_handler(Events.EPOCH_COMPLETED, lib.Checkpoint({"model": model_of(1.0)}, folder))
        except ValueError as error:
            return "refused" if NOT_EMPTY.match(str(error)) else str(error)
        trainer.run([0, 0])
        return "trained"

    return unless_hung(run)


@WORLDS
def test_ignites_saving_rank_refuses_alone_and_the_others_hang(tmp_path: Path, world_size: int) -> None:
    (tmp_path / "old.pt").touch()
    ends = on_ranks(building_in_a_shared_directory, IGNITE, world_size, tmp_path)
    assert ends == ["refused", *[HUNG] * (world_size - 1)]


@WORLDS
def test_every_rank_refuses_a_shared_directory_that_is_not_empty(tmp_path: Path, world_size: int) -> None:
    (tmp_path / "old.pt").touch()
    assert on_ranks(building_in_a_shared_directory, OURS, world_size, tmp_path) == ["refused"] * world_size
    assert [path.name for path in tmp_path.iterdir()] == ["old.pt"]


@pytest.mark.parametrize("saving", [0, 1])
@run_distributed(world_size=2)
def test_what_only_the_saving_rank_sees_reaches_the_others_at_the_first_event(tmp_path: Path, saving: int) -> None:
    mine = tmp_path / f"disk of rank {job.rank()}"
    if job.rank() == saving:
        mine.mkdir()
        (mine / "old.pt").touch()
        with pytest.raises(ValueError, match=NOT_EMPTY):
            DiskSaver(mine, save_on_rank=saving)
        return
    handler = Checkpoint({"model": model_of(1.0)}, DiskSaver(mine, save_on_rank=saving))
    begin = time.monotonic()
    with pytest.raises(ValueError, match=NOT_EMPTY) as caught:
        fire(handler)
    assert time.monotonic() - begin < 10.0, "told, not timed out"
    assert isinstance(caught.value, RemoteRankError)
    assert f"on rank {saving}, while: constructing Checkpoint#0" in str(caught.value)
    assert not mine.exists()


@run_distributed(world_size=3)
def test_what_one_of_the_other_ranks_sees_reaches_all(tmp_path: Path) -> None:
    mine = tmp_path / f"disk of rank {job.rank()}"
    if job.rank() == 2:
        mine.mkdir()
        (mine / "old.pt").touch()
        with pytest.raises(ValueError, match=NOT_EMPTY):
            DiskSaver(mine)
        return
    with pytest.raises(ValueError, match=NOT_EMPTY):
        fire(Checkpoint({"model": model_of(1.0)}, DiskSaver(mine)))


@run_distributed(world_size=2)
def test_note_is_about_the_saver_of_the_same_number(tmp_path: Path) -> None:
    good = DiskSaver(tmp_path / "good")
    mine = tmp_path / f"disk of rank {job.rank()}"
    if job.rank() == 0:
        mine.mkdir()
        (mine / "old.pt").touch()
        with pytest.raises(ValueError, match=NOT_EMPTY):
            DiskSaver(mine)
    else:
        DiskSaver(mine)
    handler = Checkpoint({"model": model_of(1.0)}, good)
    fire(handler)
    assert gather(handler.last_checkpoint) == [tmp_path / "good" / "model_1.pt"] * 2


@run_distributed(world_size=2)
def test_model_checkpoint_refuses_on_every_rank_too(tmp_path: Path) -> None:
    (tmp_path / "old.pt").touch()
    with pytest.raises(ValueError, match=NOT_EMPTY):
        ModelCheckpoint(tmp_path, "best")
    handler = ModelCheckpoint(tmp_path, "best", require_empty=False)
    engine = Engine(training_step)
    engine.add_event_handler(Events.EPOCH_COMPLETED, handler, {"model": model_of(1.0)})
    engine.run([0])
    job.barrier()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best_model_1.pt", "old.pt"]


@run_distributed(world_size=2)
def test_a_missing_directory_is_refused_on_every_rank(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^Directory path '.*nowhere' is not found"):
        DiskSaver(tmp_path / "nowhere", create_dir=False)
    job.barrier()
    assert list(tmp_path.iterdir()) == []


@run_distributed(world_size=2)
def test_a_directory_that_cannot_be_made_is_an_error_of_both_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").touch(exist_ok=True)
    job.barrier()
    below = tmp_path / "file" / "checkpoints"
    if job.rank() == 0:
        error = raised(lambda: DiskSaver(below))
        assert isinstance(error, OSError)
        assert error.errno == errno.ENOTDIR
    else:
        error = raised(lambda: fire(Checkpoint({"model": model_of(1.0)}, below)))
        assert isinstance(error, OSError | ValueError)
    assert "file" in str(error)


@run_distributed(world_size=2)
def test_files_of_other_kinds_do_not_count(tmp_path: Path) -> None:
    if job.rank() == 0:
        for name in ("notes.txt", "old.pth", "pt", "checkpoint.pt.bak"):
            (tmp_path / name).touch()
    job.barrier()
    DiskSaver(tmp_path)


@run_distributed(world_size=2)
def test_a_rank_may_come_late_to_find_the_first_checkpoint_of_the_same_run(tmp_path: Path) -> None:
    """A slow rank builds its saver when the fast one has built its own; neither has saved: nobody is refused."""
    store = job.store()
    if job.rank() == 1:
        store.wait(["built"], timedelta(seconds=10))
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path / "new")
    store.set("built", "1")
    fire(handler)
    assert handler.last_checkpoint == tmp_path / "new" / "model_1.pt"


@run_distributed(world_size=2)
def test_files_have_the_permissions_that_the_umask_gives(tmp_path: Path) -> None:
    os.umask(0o027)
    fire(Checkpoint({"model": model_of(1.0)}, tmp_path / "new"))
    job.barrier()
    assert (tmp_path / "new" / "model_1.pt").stat().st_mode & 0o777 == 0o640
