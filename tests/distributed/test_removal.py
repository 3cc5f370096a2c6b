"""Older checkpoints are removed once, by the saving rank; one that is gone is a warning in the log.

After the commit, but before the save where a save handler may keep several names in one place.

The fault of ignite's `Checkpoint`: the saving rank raises alone when a file was removed by hand.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events

from distckpt import BaseSaveHandler, Checkpoint, DiskSaver
from tests.distributed.programs import (
    HUNG,
    IGNITE,
    OURS,
    fire,
    gather,
    handlers,
    logged,
    model_of,
    on_ranks,
    raised,
    training_step,
    unless_hung,
)
from tests.support import job, run_distributed

WORLDS = pytest.mark.parametrize("world_size", [2, 3])


def with_a_file_removed_by_hand(library: str, folder: Path) -> tuple[str, list[str]]:
    """Train and save after each epoch; somebody removes the first checkpoint."""
    lib, trainer = handlers(library), Engine(training_step)
    handler = lib.Checkpoint({"model": model_of(1.0)}, lib.DiskSaver(folder))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)

    @trainer.on(Events.EPOCH_STARTED(once=2))
    def remove_by_hand() -> None:
        if job.rank() == 0:
            (folder / "model_2.pt").unlink()

    def run() -> str:
        error = raised(lambda: trainer.run([0, 0], max_epochs=3))
        if isinstance(error, RuntimeError):
            raise error
        return "done" if error is None else type(error).__name__

    with logged("distckpt") as messages:
        end = unless_hung(run)
    return end, [one for one in messages if "removing" in one]


@WORLDS
def test_ignites_saving_rank_raises_alone_and_the_others_hang(tmp_path: Path, world_size: int) -> None:
    ends = [end for end, _ in on_ranks(with_a_file_removed_by_hand, IGNITE, world_size, tmp_path)]
    assert ends == ["FileNotFoundError", *[HUNG] * (world_size - 1)]


@WORLDS
def test_a_file_removed_by_hand_is_a_warning_and_no_more(tmp_path: Path, world_size: int) -> None:
    for end, messages in on_ranks(with_a_file_removed_by_hand, OURS, world_size, tmp_path):
        assert end == "done"
        (message,) = messages
        assert message.startswith("Checkpoint: while removing older checkpoints: rank 0: model_2.pt was already gone")
    assert [path.name for path in tmp_path.iterdir()] == ["model_6.pt"]


@run_distributed(world_size=2)
def test_a_file_that_cannot_be_removed_is_tried_again_by_the_next_save(tmp_path: Path) -> None:
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path)
    engine = fire(handler)
    job.barrier()
    if job.rank() == 0:  # a directory of that name: unlink refuses it, whoever asks
        (tmp_path / "model_1.pt").unlink()
        (tmp_path / "model_1.pt").mkdir()
    with logged("distckpt") as messages:
        engine.run([0], max_epochs=2)
    (message,) = [one for one in messages if "removing" in one]
    assert "rank 0: model_1.pt could not be removed" in message
    assert message.endswith("The next save tries again.")
    assert gather(handler.last_checkpoint) == [tmp_path / "model_2.pt"] * 2
    if job.rank() == 0:
        (tmp_path / "model_1.pt").rmdir()
        (tmp_path / "model_1.pt").touch()
    job.barrier()
    engine.run([0], max_epochs=3)
    job.barrier()
    assert [path.name for path in tmp_path.iterdir()] == ["model_3.pt"]


@pytest.mark.parametrize("n_saved", [1, 2, 3, None])
@run_distributed(world_size=2)
def test_as_many_are_kept_as_asked_for(tmp_path: Path, n_saved: int | None) -> None:
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path, n_saved=n_saved)
    fire(handler, times=5)
    job.barrier()
    expected = [f"model_{number}.pt" for number in range(1, 6)][-(n_saved or 5) :]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected
    assert gather([name for _, name in handler.state_dict()["_saved"]]) == [expected] * 2


@run_distributed(world_size=2)
def test_best_are_kept_and_the_worst_of_them_is_evicted(tmp_path: Path) -> None:
    scores = iter([0.3, 0.1, 0.5, 0.2, 0.4])
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path, score_function=lambda _: next(scores), n_saved=2)
    fire(handler, times=5)
    job.barrier()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_0.4000.pt", "model_0.5000.pt"]
    assert gather(handler.last_checkpoint) == [tmp_path / "model_0.5000.pt"] * 2


@pytest.mark.parametrize("saving", [0, 1])
@run_distributed(world_size=2)
def test_ranks_that_do_not_save_touch_no_directory(tmp_path: Path, saving: int) -> None:
    mine = tmp_path / f"disk of rank {job.rank()}"
    decoys = [f"model_{number}.pt" for number in range(1, 4)]
    if job.rank() != saving:
        mine.mkdir()
        for name in decoys:
            (mine / name).write_text("not yours", encoding="utf-8")
    before = mine.stat().st_mtime_ns if mine.exists() else 0
    saver = DiskSaver(mine, save_on_rank=saving, require_empty=False)
    fire(Checkpoint({"model": model_of(1.0)}, saver), times=3)
    found = sorted(path.name for path in mine.iterdir())
    if job.rank() == saving:
        assert found == ["model_3.pt"]
    else:
        assert found == decoys
        assert mine.stat().st_mtime_ns == before
        saver.remove("model_1.pt")
        assert sorted(path.name for path in mine.iterdir()) == decoys


@run_distributed(world_size=2)
def test_a_user_that_removes_a_missing_file_is_told_on_the_saving_rank(tmp_path: Path) -> None:
    saver = DiskSaver(tmp_path)
    error = raised(lambda: saver.remove("never.pt"))
    if job.rank() == 0:
        assert isinstance(error, FileNotFoundError)
        assert "never.pt" in str(error)
    else:
        assert error is None


class Recorder(BaseSaveHandler):
    """A save handler that notes its calls; it is called on every rank."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, _checkpoint: object, filename: str, metadata: Any = None) -> None:
        """Note a save."""
        self.calls.append(f"save {filename} {metadata['priority']}")

    def remove(self, filename: str) -> None:
        """Note a removal."""
        self.calls.append(f"remove {filename}")


@run_distributed(world_size=2)
def test_a_custom_handler_removes_before_it_saves_on_every_rank() -> None:
    recorder = Recorder()
    fire(Checkpoint({"model": model_of(1.0)}, recorder), times=3)
    expected = ["save model_1.pt 1", "remove model_1.pt", "save model_2.pt 2", "remove model_2.pt", "save model_3.pt 3"]
    assert gather(recorder.calls) == [expected] * 2


class _FixedName(DiskSaver):
    """Maps all names to one file, as MONAI's CheckpointSaver does."""

    def __call__(self, checkpoint: Any, filename: str, metadata: Any = None) -> None:
        del filename
        super().__call__(checkpoint, "best.pt", metadata)

    def remove(self, filename: str) -> None:
        del filename
        super().remove("best.pt")


class _FixedNameOnAllRanks(_FixedName):
    """Removes by code of its own, whichever rank it is on, and in its own time."""

    def remove(self, filename: str) -> None:
        del filename
        (self.dirname / "best.pt").unlink(missing_ok=True)


class _ClearsAll(DiskSaver):
    """Overrides `remove` alone."""

    def remove(self, filename: str) -> None:
        del filename
        for path in self.dirname.glob("*.pt"):
            path.unlink(missing_ok=True)


class _NoDiskSaver(BaseSaveHandler):
    """Writes one file on one rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, checkpoint: Any, filename: str, metadata: Any = None) -> None:
        del filename, metadata
        if job.rank() == 0:
            torch.save(checkpoint, self.folder / "best.pt")

    def remove(self, filename: str) -> None:
        del filename
        if job.rank() == 0:
            (self.folder / "best.pt").unlink()


def _save_thrice(saver: Any, folder: Path) -> list[str]:
    handler = Checkpoint({"model": model_of(1.0)}, saver)
    engine = Engine(training_step)
    engine.add_event_handler(Events.EPOCH_COMPLETED, handler)
    engine.run([0], max_epochs=3)
    job.barrier()
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("kind", [_FixedName, _FixedNameOnAllRanks, _ClearsAll])
@pytest.mark.parametrize("background", [False, True])
@run_distributed(world_size=2)
def test_the_removal_of_an_evicted_checkpoint_never_takes_what_was_just_written(
    tmp_path: Path,
    kind: type[DiskSaver],
    background: bool,  # noqa: FBT001
) -> None:
    expected = ["model_3.pt"] if kind is _ClearsAll else ["best.pt"]
    assert _save_thrice(kind(tmp_path, require_empty=False, background=background), tmp_path) == expected


@run_distributed(world_size=2)
def test_a_save_handler_that_is_no_disk_saver_removes_before_it_saves(tmp_path: Path) -> None:
    assert _save_thrice(_NoDiskSaver(tmp_path), tmp_path) == ["best.pt"]


@run_distributed(world_size=2)
def test_ranks_with_different_kinds_of_save_handlers_go_the_same_way(tmp_path: Path) -> None:
    saver = _FixedName(tmp_path) if job.rank() == 0 else lambda _checkpoint, _filename: None
    assert _save_thrice(saver, tmp_path) == ["best.pt"]
