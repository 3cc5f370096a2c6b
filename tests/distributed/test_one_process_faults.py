"""Faults of ignite's handlers that one process is enough for, and their absence, on every rank of two."""

import math
import os
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events

from distckpt import Checkpoint, DiskSaver, EarlyStopping
from distckpt.storage.direct_io import DirectFile
from tests.distributed.programs import IGNITE, OURS, fire, gather, handlers, idle_engine, model_of, on_ranks, warned
from tests.support import fresh_ranks, job, run_distributed, send_to_parent
from tests.support.selection import torch_only


def best_of_scores_that_begin_with_nan(library: str, folder: Path) -> list[str]:
    """Save by a score that is NaN at first."""
    lib, scores = handlers(library), iter([math.nan, 0.5, 0.7])
    handler = lib.Checkpoint({"model": model_of(1.0)}, lib.DiskSaver(folder), score_function=lambda _: next(scores))
    with warned():
        fire(handler, times=3)
    job.barrier()
    return sorted(path.name for path in folder.iterdir())


def test_ignites_nan_score_blocks_every_later_checkpoint(tmp_path: Path) -> None:
    assert on_ranks(best_of_scores_that_begin_with_nan, IGNITE, 2, tmp_path) == [["model_nan.pt"]] * 2


def test_a_nan_score_is_not_better_than_anything(tmp_path: Path) -> None:
    assert on_ranks(best_of_scores_that_begin_with_nan, OURS, 2, tmp_path) == [["model_0.7000.pt"]] * 2


def patience_with_nan(library: str) -> tuple[int, bool | str]:
    """Watch a score that becomes NaN."""
    trainer, scores = idle_engine(), iter([0.5, math.nan, math.nan, math.nan])
    stopper = handlers(library).EarlyStopping(3, lambda _: next(scores), trainer)
    fire(stopper, times=4)
    return stopper.counter, trainer.should_terminate


def test_ignites_early_stopping_takes_nan_for_an_improvement() -> None:
    assert on_ranks(patience_with_nan, IGNITE, 2) == [(0, False)] * 2


def test_nan_is_no_improvement() -> None:
    assert on_ranks(patience_with_nan, OURS, 2) == [(3, True)] * 2


def two_checkpoints_on_one_event(library: str, folder: Path) -> list[str]:
    """Save twice on one event of an epoch of three iterations, named by the global step."""
    lib, engine = handlers(library), idle_engine()
    for name in ("first", "second"):
        handler = lib.Checkpoint(
            {"model": model_of(1.0)},
            lib.DiskSaver(folder, require_empty=False),
            name,
            global_step_transform=lib.global_step_from_engine(engine),
        )
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), handler)
    engine.run([0] * 3)
    job.barrier()
    return sorted(path.name for path in folder.iterdir())


def test_ignites_second_checkpoint_on_an_event_is_named_by_another(tmp_path: Path) -> None:
    ends = on_ranks(two_checkpoints_on_one_event, IGNITE, 2, tmp_path)
    assert ends == [["first_model_3.pt", "second_model_1.pt"]] * 2


def test_both_checkpoints_on_an_event_are_named_by_it(tmp_path: Path) -> None:
    ends = on_ranks(two_checkpoints_on_one_event, OURS, 2, tmp_path)
    assert ends == [["first_model_3.pt", "second_model_3.pt"]] * 2


def listening_before_the_first_save(library: str, folder: Path) -> str | list[int]:
    """Listen for saved checkpoints as the documentation shows, before any is saved."""
    lib, engine, told = handlers(library), idle_engine(), []
    handler = lib.Checkpoint({"model": model_of(1.0)}, lib.DiskSaver(folder))
    taught: Any = Engine._assert_allowed_event
    if library == IGNITE:  # as it is in a program that does not import ours
        Engine._assert_allowed_event = taught.__wrapped__  # type: ignore[method-assign]
    try:
        engine.on(lib.Checkpoint.SAVED_CHECKPOINT)(lambda: told.append(engine.state.epoch))
    except ValueError as error:
        return str(error)
    finally:
        Engine._assert_allowed_event = taught  # type: ignore[method-assign]
    fire(handler, times=2, engine=engine)
    return told


def test_ignites_cannot_be_listened_to_before_the_first_save(tmp_path: Path) -> None:
    for message in on_ranks(listening_before_the_first_save, IGNITE, 2, tmp_path):
        assert "SAVED_CHECKPOINT is not a valid event" in message


def test_ours_can_be_listened_to_before_the_first_save(tmp_path: Path) -> None:
    assert on_ranks(listening_before_the_first_save, OURS, 2, tmp_path) == [[1, 2]] * 2


def save_and_die_in_the_second_save(folders: list[Path], libraries: list[str]) -> None:
    """Save once; die in the middle of the second write. Each rank is a world of one with a library of its own."""
    rank = int(os.environ["RANK"])  # there is no job
    lib, folder, obj = handlers(libraries[rank]), folders[rank], model_of(1.0)
    handler = lib.Checkpoint({"model": obj}, lib.DiskSaver(folder))
    engine = fire(handler)
    send_to_parent(sorted(path.name for path in folder.iterdir()))

    write = DirectFile.write

    def deadly_save(_state: object, sink: Any, **_options: object) -> None:
        sink.write(bytes(3_000_000))
        os.kill(os.getpid(), signal.SIGKILL)

    def deadly_write(self: DirectFile, data: memoryview, offset: int) -> None:
        write(self, data, offset)
        os.kill(os.getpid(), signal.SIGKILL)

    vars(torch)["save"], DirectFile.write = deadly_save, deadly_write  # type: ignore[method-assign]  # ignite's, ours
    engine.run([0], max_epochs=2)


@torch_only
def test_a_killed_save_leaves_the_older_checkpoint_where_ignites_leaves_none(tmp_path: Path) -> None:
    folders = [tmp_path / "ignite", tmp_path / "ours"]
    with fresh_ranks(save_and_die_in_the_second_save, 2, folders, [IGNITE, OURS], backend=None) as ranks:
        assert [ranks.receive(rank) for rank in range(2)] == [["model_1.pt"]] * 2
        ends = ranks.finish(may_fail=[0, 1])
    assert [end.exit_code for end in ends] == [-signal.SIGKILL] * 2
    ignites, ours = ([path.name for path in folder.glob("*.pt")] for folder in folders)
    assert (ignites, ours) == ([], ["model_1.pt"])
    (theirs,) = folders[0].iterdir()
    assert stat.S_IMODE(theirs.stat().st_mode) == 0o600, "a temporary file that stays for ever"
    Checkpoint.load_objects({"model": model_of(0.0)}, folders[1] / "model_1.pt")
    (temporary,) = (path for path in folders[1].iterdir() if path.suffix != ".pt")
    fire(Checkpoint({"model": model_of(1.0)}, DiskSaver(folders[1], require_empty=False)))
    assert not temporary.exists(), "cleared by the next save"


def calls_of_a_save(library: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Save twice with ``n_saved=1``; return the order of the second save's calls that make it durable."""
    calls: list[str] = []
    originals = {name: getattr(os, name) for name in ("fsync", "rename", "replace", "unlink")}

    def note(name: str, *args: Any, **kwargs: Any) -> Any:
        kind = name
        if name == "fsync":
            kind = "fsync of the directory" if stat.S_ISDIR(os.fstat(args[0]).st_mode) else "fsync"
        calls.append(kind)
        return originals[name](*args, **kwargs)

    lib = handlers(library)
    engine = fire(lib.Checkpoint({"model": model_of(1.0)}, lib.DiskSaver(folder)))
    for name in originals:
        monkeypatch.setattr(os, name, lambda *args, _name=name, **kwargs: note(_name, *args, **kwargs))
    engine.run([0], max_epochs=2)
    monkeypatch.undo()
    return calls


def test_ignite_removes_first_and_syncs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert calls_of_a_save(IGNITE, tmp_path, monkeypatch) == ["unlink", "replace"]


def test_ours_syncs_then_renames_then_syncs_then_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ["fsync", "rename", "fsync of the directory", "unlink"]
    assert calls_of_a_save(OURS, tmp_path, monkeypatch) == expected


@run_distributed(world_size=2)
def test_several_handlers_share_one_run(tmp_path: Path) -> None:
    engine = idle_engine()
    best = Checkpoint({"model": model_of(1.0)}, tmp_path / "best", score_function=lambda _: engine.state.epoch % 3)
    latest = Checkpoint({"model": model_of(1.0)}, tmp_path / "latest", n_saved=2)
    for handler in (best, latest, EarlyStopping(2, lambda _: engine.state.epoch % 3, engine)):
        engine.add_event_handler(Events.EPOCH_COMPLETED, handler)
    engine.run([0], max_epochs=9)
    job.barrier()
    assert gather(engine.state.epoch) == [4, 4]
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["model_2.pt"]
    assert sorted(path.name for path in (tmp_path / "latest").iterdir()) == ["model_3.pt", "model_4.pt"]
