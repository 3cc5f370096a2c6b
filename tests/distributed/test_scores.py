"""Ranks whose scores differ believe in the same checkpoint, and that one exists.

The fault of ignite's `Checkpoint`: each rank keeps a history of its own score, and files that were never written.
"""

import math
from pathlib import Path

import pytest
import torch

import distckpt
from distckpt import Checkpoint, EarlyStopping
from distckpt.policy.scores import ScoreRule
from tests.distributed.programs import (
    IGNITE,
    OURS,
    all_equal,
    fire,
    gather,
    handlers,
    idle_engine,
    logged,
    model_of,
    on_ranks,
    warned,
)
from tests.support import job, run_distributed

WORLDS = pytest.mark.parametrize("world_size", [2, 3])
SCORES = ([0.1, 0.2, 0.3], [0.9, 0.5, 0.2], [0.4, 0.8, 0.6])
"""By rank: a score for each of three epochs. The means of two: 0.5, 0.35, 0.25; of three 0.4667, 0.5, 0.3667."""


def kept_by_score(library: str, folder: Path, n_saved: int) -> tuple[str, bool, list[str]]:
    """Save by a score that differs between the ranks; return the last checkpoint, whether it exists, all that do."""
    mine = iter(SCORES[job.rank()])
    saver = handlers(library).DiskSaver(folder)
    handler = handlers(library).Checkpoint(
        {"model": model_of(1.0)}, saver, score_function=lambda _: next(mine), score_name="accuracy", n_saved=n_saved
    )
    with warned():
        fire(handler, times=3)
    job.barrier()
    last = handler.last_checkpoint
    return last.name, last.exists(), sorted(path.name for path in folder.iterdir())


@WORLDS
def test_ignites_ranks_believe_in_files_of_their_own(tmp_path: Path, world_size: int) -> None:
    ends = on_ranks(kept_by_score, IGNITE, world_size, tmp_path, 1)
    assert not all_equal([last for last, _, _ in ends])
    assert [exists for _, exists, _ in ends] == [True, *[False] * (world_size - 1)]


@WORLDS
@pytest.mark.parametrize("n_saved", [1, 2])
def test_last_checkpoint_is_one_for_all_ranks_and_on_disk(tmp_path: Path, world_size: int, n_saved: int) -> None:
    ends = on_ranks(kept_by_score, OURS, world_size, tmp_path, n_saved)
    best = "model_accuracy=0.5000.pt"
    kept = [[best], ["model_accuracy=0.3500.pt", best] if world_size == 2 else ["model_accuracy=0.4667.pt", best]]
    assert ends == [(best, True, kept[n_saved - 1])] * world_size


RULES: list[tuple[ScoreRule, float]] = [("mean", 0.5), ("min", 0.1), ("max", 0.9), ("coordinator", 0.1)]


@pytest.mark.parametrize(("rule", "expected"), RULES)
@run_distributed(world_size=2)
def test_rule_says_which_score_counts(tmp_path: Path, rule: ScoreRule, expected: float) -> None:
    mine = SCORES[job.rank()][0]
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path, score_function=lambda _: mine, score_rule=rule)
    with warned() as messages:
        fire(handler)
    (message,) = messages
    assert message.startswith("Checkpoint: the ranks have different scores, [0.1, 0.9]; ")
    assert f"{rule} counts, {expected}" in message
    assert handler.state_dict()["_saved"] == [(expected, f"model_{expected:.4f}.pt")]


@run_distributed(world_size=3)
def test_coordinators_score_is_that_of_the_saving_rank(tmp_path: Path) -> None:
    mine = SCORES[job.rank()][0]
    handler = Checkpoint(
        {"model": model_of(1.0)}, tmp_path, score_function=lambda _: mine, score_rule="coordinator", save_on_rank=2
    )
    with warned():
        fire(handler)
    assert gather(handler.state_dict()["_saved"]) == [[(0.4, "model_0.4000.pt")]] * 3


@pytest.mark.parametrize("score", [0.1, 1 / 3, 5e-324, 2**53 + 1, True, -0.0])
@run_distributed(world_size=3)
def test_equal_scores_are_taken_to_the_bit(tmp_path: Path, score: float) -> None:
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path, score_function=lambda _: score)
    with warned() as messages:
        fire(handler)
    assert messages == []
    ((kept, _),) = handler.state_dict()["_saved"]
    assert type(kept) is type(score)
    assert (kept, math.copysign(1, kept)) == (score, math.copysign(1, score))


@run_distributed(world_size=2)
def test_difference_is_said_once_by_each_handler(tmp_path: Path) -> None:
    def score(_: object) -> float:
        return float(job.rank())

    handler = Checkpoint({"model": model_of(1.0)}, tmp_path, score_function=score, greater_or_equal=True)
    stopper = EarlyStopping(9, score, idle_engine())
    with warned() as messages:
        engine = fire(handler, times=3)
        fire(stopper, times=3, engine=engine)
    assert [message.partition(":")[0] for message in messages] == ["Checkpoint", "EarlyStopping"]


@run_distributed(world_size=2)
def test_a_warning_made_an_error_is_one_on_every_rank(tmp_path: Path) -> None:
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path, score_function=lambda _: float(job.rank()))
    with pytest.raises(UserWarning, match="the ranks have different scores"):
        fire(handler)
    job.barrier()


@pytest.mark.parametrize("rule", ["mean", "min", "max"])
@run_distributed(world_size=2)
def test_nan_on_one_rank_saves_nothing_on_any(tmp_path: Path, rule: ScoreRule) -> None:
    mine = iter([math.nan, 0.7] if job.rank() == 1 else [0.9, 0.7])
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path, score_function=lambda _: next(mine), score_rule=rule)
    with warned() as messages, logged("distckpt") as said:
        fire(handler)
        assert gather(handler.last_checkpoint) == [None, None]
        fire(handler)
    (message,) = messages
    assert "the ranks have different scores, [0.9, nan]" in message
    assert [one for one in said if "not saved" in one] == [
        "Checkpoint: iteration 1 is not saved: the score is NaN. There is no earlier checkpoint."
    ]
    assert gather(handler.last_checkpoint) == [tmp_path / "model_0.7000.pt"] * 2, "a NaN blocks no later checkpoint"


@run_distributed(world_size=2)
def test_nan_on_one_rank_is_no_improvement_on_any() -> None:
    trainer = idle_engine()
    mine = iter([0.5, math.nan, math.nan] if job.rank() == 1 else [0.5, 0.9, 0.9])
    stopper = EarlyStopping(2, lambda _: next(mine), trainer)
    with warned():
        fire(stopper, times=3)
    assert gather((stopper.counter, stopper.best_score, trainer.should_terminate)) == [(2, 0.5, True)] * 2


@run_distributed(world_size=2)
def test_default_score_function_reads_the_metric_of_each_rank(tmp_path: Path) -> None:
    engine = idle_engine()
    engine.state.metrics["loss"] = [0.5, 0.25][job.rank()]
    handler = Checkpoint(
        {"model": model_of(1.0)},
        tmp_path,
        score_function=Checkpoint.get_default_score_fn("loss", -1.0),
        score_name="loss",
    )
    with warned():
        fire(handler, engine=engine)
    assert gather(handler.last_checkpoint) == [tmp_path / "model_loss=-0.3750.pt"] * 2


@run_distributed(world_size=2)
def test_a_rule_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"score_rule should be one of .* but given 'median'"):
        distckpt.Checkpoint({"model": torch.nn.Linear(1, 1)}, tmp_path, score_rule="median")
    with pytest.raises(ValueError, match=r"score_rule should be one of .* but given 'median'"):
        distckpt.EarlyStopping(1, lambda _: 0.0, idle_engine(), score_rule="median")
