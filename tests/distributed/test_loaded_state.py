"""Handler state that was loaded on the coordinator alone holds on every rank.

The fault of ignite's handlers: a program that resumes on rank 0 only has ranks with different histories from then on.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from distckpt import Checkpoint, DiskSaver, EarlyStopping
from tests.distributed.programs import IGNITE, OURS, fire, gather, handlers, idle_engine, model_of, on_ranks
from tests.support import job, run_distributed

WORLDS = pytest.mark.parametrize("world_size", [2, 3])
HISTORY: list[tuple[float, str]] = [(0.5, "model_0.5000.pt"), (0.7, "model_0.7000.pt")]


def history_after_resuming(library: str, folder: Path) -> tuple[str, list[str]]:
    """Load a Checkpoint's history on rank 0, save once more; return the last checkpoint and the history."""
    lib = handlers(library)
    handler = lib.Checkpoint(
        {"model": model_of(1.0)},
        lib.DiskSaver(folder, require_empty=False),
        score_function=lambda _: 0.6,
        n_saved=2,
    )
    if job.rank() == 0:
        handler.load_state_dict({"_saved": HISTORY})
    fire(handler)
    job.barrier()
    return handler.last_checkpoint.name, [name for _, name in handler.state_dict()["_saved"]]


def put_history(folder: Path) -> None:
    for _, name in HISTORY:
        torch.save(model_of(0.0).state_dict(), folder / name)


@WORLDS
def test_ignites_histories_diverge(tmp_path: Path, world_size: int) -> None:
    put_history(tmp_path)
    first, *others = on_ranks(history_after_resuming, IGNITE, world_size, tmp_path)
    assert first == ("model_0.7000.pt", ["model_0.6000.pt", "model_0.7000.pt"])
    assert others == [("model_0.6000.pt", ["model_0.6000.pt"])] * (world_size - 1)


@WORLDS
def test_coordinators_history_holds_on_all_ranks(tmp_path: Path, world_size: int) -> None:
    put_history(tmp_path)
    ends = on_ranks(history_after_resuming, OURS, world_size, tmp_path)
    assert ends == [("model_0.7000.pt", ["model_0.6000.pt", "model_0.7000.pt"])] * world_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_0.6000.pt", "model_0.7000.pt"]


def patience_after_resuming(library: str) -> tuple[int, float, bool | str]:
    """Load the state of an EarlyStopping on rank 0, see one more score; return its state and whether it stops."""
    trainer = idle_engine()
    stopper = handlers(library).EarlyStopping(2, lambda _: 0.5, trainer)
    if job.rank() == 0:
        stopper.load_state_dict({"counter": 1, "best_score": 0.9, "threshold_mode": "abs"})
    fire(stopper)
    return stopper.counter, stopper.best_score, trainer.should_terminate


@WORLDS
def test_ignites_early_stopping_forgets_on_the_other_ranks(world_size: int) -> None:
    ends = on_ranks(patience_after_resuming, IGNITE, world_size)
    assert ends == [(2, 0.9, True), *[(0, 0.5, False)] * (world_size - 1)]


@WORLDS
def test_coordinators_patience_holds_on_all_ranks(world_size: int) -> None:
    assert on_ranks(patience_after_resuming, OURS, world_size) == [(2, 0.9, True)] * world_size


@run_distributed(world_size=2)
def test_threshold_mode_that_one_rank_loaded_holds_on_all() -> None:
    trainer, scores = idle_engine(), iter([10.0, 14.0])
    stopper = EarlyStopping(1, lambda _: next(scores), trainer, threshold=0.5)
    if job.rank() == 0:
        stopper.load_state_dict({"counter": 0, "best_score": None, "threshold_mode": "rel"})
    fire(stopper, times=2)
    # 14 is more than 10 + 0.5, but less than 10 * 1.5.
    ends = gather((stopper.counter, stopper.best_score, trainer.should_terminate, stopper.threshold_mode))
    assert ends == [(1, 14.0, True, "rel")] * 2


@run_distributed(world_size=2)
def test_history_that_the_coordinator_lacks_is_forgotten_by_the_others(tmp_path: Path) -> None:
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path, n_saved=2)
    if job.rank() == 1:
        handler.load_state_dict({"_saved": [(7, "model_7.pt")]})
    fire(handler)
    assert gather(handler.state_dict()["_saved"]) == [[(1, "model_1.pt")]] * 2


@run_distributed(world_size=2)
def test_history_holds_even_where_nothing_is_saved(tmp_path: Path) -> None:
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path, score_function=lambda _: 0.1)
    if job.rank() == 0:
        handler.load_state_dict({"_saved": HISTORY[1:]})
    fire(handler)
    job.barrier()
    assert gather(handler.last_checkpoint) == [tmp_path / "model_0.7000.pt"] * 2
    assert list(tmp_path.iterdir()) == []


@run_distributed(world_size=2)
def test_coordinator_is_the_saving_rank(tmp_path: Path) -> None:
    saver = DiskSaver(tmp_path, save_on_rank=1)
    handler = Checkpoint({"model": model_of(1.0)}, saver, n_saved=2)
    handler.load_state_dict({"saved": [(5 + job.rank(), f"of rank {job.rank()}.pt")]})
    fire(handler)
    expected = [[(1, "model_1.pt"), (6, "of rank 1.pt")]] * 2
    assert gather(handler.state_dict()["_saved"]) == expected


@run_distributed(world_size=2)
def test_reset_of_one_rank_is_that_of_the_coordinator(tmp_path: Path) -> None:
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path, n_saved=None)
    fire(handler, times=2)
    if job.rank() == 0:
        handler.reset()
    fire(handler)
    assert gather(handler.state_dict()["_saved"]) == [[(1, "model_1.pt")]] * 2


@run_distributed(world_size=2)
def test_handlers_own_state_in_the_file_is_what_all_ranks_hold(tmp_path: Path) -> None:
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path, n_saved=2, include_self=True)
    fire(handler, times=3)
    job.barrier()
    path = handler.last_checkpoint
    assert path is not None
    saved: dict[str, Any] = torch.load(path, weights_only=True)
    assert saved["checkpointer"] == OrderedDict(_saved=[(2, "model_2.pt"), (3, "model_3.pt")])
    twin = Checkpoint({"model": model_of(0.0)}, DiskSaver(tmp_path, require_empty=False), n_saved=2, include_self=True)
    Checkpoint.load_objects({"model": model_of(0.0), "checkpointer": twin}, path)
    assert gather(twin.state_dict()) == [handler.state_dict()] * 2
