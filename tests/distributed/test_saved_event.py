"""`SAVED_CHECKPOINT` fires on every rank, after the commit.

The fault of ignite's `Checkpoint`: ranks that do not save fire it while the file is still being written.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events

from distckpt import Checkpoint, CheckpointEvents
from distckpt.handlers import disk_saver
from tests.distributed.programs import IGNITE, OURS, fire, gather, handlers, idle_engine, model_of, on_ranks
from tests.support import job, run_distributed

WORLDS = pytest.mark.parametrize("world_size", [2, 3])
SLOW_S = {IGNITE: 5.0, OURS: 0.5}
"""The longest that a write takes; one of ignite's goes on as soon as the event has fired elsewhere."""


@contextlib.contextmanager
def written_by(write: Callable[..., None]) -> Iterator[None]:
    """Let the saving rank write so, with ignite's writer or ours: it is given first.

    On that rank alone: ranks may be threads of one process.
    """
    if job.rank() != 0:
        yield
        return
    before = torch.save, vars(disk_saver)["write_file"]
    vars(torch)["save"], vars(disk_saver)["write_file"] = (functools.partial(write, one) for one in before)
    try:
        yield
    finally:
        vars(torch)["save"], vars(disk_saver)["write_file"] = before


def with_a_slow_write(library: str, folder: Path) -> list[bool]:
    """Save with a disk that is slower than the other ranks; return what existed when the event fired."""
    lib, store, seen = handlers(library), job.store(), []

    def slow_write(write: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        # As long as it takes the others to tell of a checkpoint, if they do so before it is written.
        with contextlib.suppress(RuntimeError):
            store.wait(["told"], timedelta(seconds=SLOW_S[library]))
        write(*args, **kwargs)

    engine = idle_engine()
    handler = lib.Checkpoint({"model": model_of(1.0)}, lib.DiskSaver(folder))
    engine.register_events(*CheckpointEvents)

    @engine.on(lib.Checkpoint.SAVED_CHECKPOINT)
    def tell() -> None:
        seen.append((folder / "model_1.pt").exists())
        if job.rank() != 0:
            store.set("told", "1")

    with written_by(slow_write):
        fire(handler, engine=engine)
    return seen


@WORLDS
def test_ignites_ranks_tell_of_a_file_that_does_not_exist_yet(tmp_path: Path, world_size: int) -> None:
    ends = on_ranks(with_a_slow_write, IGNITE, world_size, tmp_path)
    assert ends[0] == [True]
    assert [False] in ends[1:]


@WORLDS
def test_ranks_tell_of_a_checkpoint_once_it_is_committed(tmp_path: Path, world_size: int) -> None:
    assert on_ranks(with_a_slow_write, OURS, world_size, tmp_path) == [[True]] * world_size


@run_distributed(world_size=2)
def test_event_fires_after_the_older_checkpoint_is_removed(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    engine = idle_engine()

    def wait_for_all(_engine: Engine) -> None:
        job.barrier()

    engine.add_event_handler(
        Checkpoint.SAVED_CHECKPOINT, lambda: seen.append(sorted(path.name for path in tmp_path.iterdir()))
    )
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path)
    engine.add_event_handler(Events.EPOCH_COMPLETED, handler)
    engine.add_event_handler(Events.EPOCH_COMPLETED, wait_for_all)
    engine.run([0], max_epochs=3)
    assert gather(seen) == [[["model_1.pt"], ["model_2.pt"], ["model_3.pt"]]] * 2


@run_distributed(world_size=2)
def test_event_knows_the_checkpoint_it_tells_of(tmp_path: Path) -> None:
    seen: list[str] = []
    engine = idle_engine()
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path)
    engine.add_event_handler(CheckpointEvents.SAVED_CHECKPOINT, lambda: seen.append(str(handler.last_checkpoint)))
    fire(handler, times=2, engine=engine)
    assert gather(seen) == [[str(tmp_path / "model_1.pt"), str(tmp_path / "model_2.pt")]] * 2


@run_distributed(world_size=2)
def test_event_does_not_fire_where_nothing_is_saved(tmp_path: Path) -> None:
    fired: list[int] = []
    scores = iter([0.5, 0.4, 0.6])
    engine = idle_engine()
    engine.add_event_handler(Checkpoint.SAVED_CHECKPOINT, lambda: fired.append(engine.state.epoch))
    fire(Checkpoint({"model": model_of(1.0)}, tmp_path, score_function=lambda _: next(scores)), times=3, engine=engine)
    assert gather(fired) == [[1, 3]] * 2


@run_distributed(world_size=2)
def test_a_write_may_take_longer_than_the_others_wait_for_anything_else(tmp_path: Path) -> None:
    store = job.store()

    def slow_write(write: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        with contextlib.suppress(RuntimeError):
            store.wait(["never set"], timedelta(seconds=4.0))
        write(*args, **kwargs)

    with written_by(slow_write):
        handler = Checkpoint({"model": model_of(1.0)}, tmp_path, timeout_s=2.0)
        fire(handler)
    assert gather(handler.last_checkpoint) == [tmp_path / "model_1.pt"] * 2


@run_distributed(world_size=2)
def test_a_second_checkpoint_may_be_saved_on_the_event_of_the_first(tmp_path: Path) -> None:
    engine = idle_engine()
    first = Checkpoint({"model": model_of(1.0)}, tmp_path / "first")
    second = Checkpoint({"model": model_of(1.0)}, tmp_path / "second")
    engine.add_event_handler(Checkpoint.SAVED_CHECKPOINT, second)
    fire(first, times=4, engine=engine)
    expected = [(tmp_path / "first" / "model_4.pt", tmp_path / "second" / "model_4.pt")] * 2
    assert gather((first.last_checkpoint, second.last_checkpoint)) == expected
