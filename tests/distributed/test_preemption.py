"""Preemption on several ranks: real processes and real signals."""

import math
import os
import random
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events

from distckpt import (
    Checkpoint,
    DiskSaver,
    Preemption,
    TerminateOnNan,
    global_step_from_engine,
    stop_reason,
)
from tests.distributed.programs import all_equal, gather, logged, training_step
from tests.distributed.voters import Weights, stored
from tests.support import job, run_ranks
from tests.support.selection import process_ranks_only

pytestmark = process_ranks_only

TERM, USR1 = signal.SIGTERM, signal.SIGUSR1
WORLDS = pytest.mark.parametrize("world_size", [2, 3])
LOGGER = "distckpt.handlers.preemption.Preemption"
LIMIT_S = 60.0  # of each wait: none should come near it, on however busy a machine


# -- one run, to which something happens ---------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What happens in a run of two epochs of six iterations.

    Attributes:
        signals: which rank is sent which signal, and when: an iteration, or "startup", "started", "evaluation",
            "write" (while a checkpoint is written) or "written".
        pace: of the vote.
        event: on which the checkpoint is attached: "epoch", "iteration", or nowhere.
        attaches: whether an evaluation is ended for the signal.
        has_nan_on: a rank whose output breaks in the iteration of the first signal.
    """

    signals: Sequence[tuple[int, signal.Signals, int | str]]
    pace: Mapping[str, Any] = field(default_factory=dict)
    event: str = ""
    attaches: bool = False
    has_nan_on: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What a run came to on one rank."""

    iteration: int
    reason: str | None
    preempted: bool
    requested: bool
    evaluated: int
    history: list[tuple[float, str]]
    told: list[str]


class Interrupted(DiskSaver):
    """Writes as ever; something happens before and after."""

    def __init__(self, folder: str, happens: Callable[[str], None]) -> None:
        super().__init__(folder)
        self._happens = happens

    def __call__(self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Write, on the saving rank."""
        self._happens("write")
        super().__call__(checkpoint, filename, metadata)
        self._happens("written")


def run_plans(folder: str, plans: Sequence[Plan]) -> list[Ended]:
    """Run one plan after the other; each has a folder of its own."""
    pids = gather(os.getpid())
    return [_run_plan(f"{folder}/{number}", plan, pids) for number, plan in enumerate(plans)]


def _run_plan(folder: str, plan: Plan, pids: Sequence[int]) -> Ended:
    rank = job.rank()

    def happens(when: int | str) -> None:
        for target, number, moment in plan.signals:
            # While the saving rank writes the others wait for it: it sends them theirs.
            is_sent_here = rank == 0 if moment in ("write", "written") else target == rank
            if moment == when and is_sent_here:
                os.kill(pids[target], number)

    weights = Weights()
    first = plan.signals[0][2] if plan.signals else None

    def step(engine: Engine, _batch: object) -> float:
        weights.step = engine.state.iteration
        training_step()
        happens(engine.state.iteration)
        return math.nan if plan.has_nan_on == rank and engine.state.iteration == first else 0.5

    def evaluate(engine: Engine, _batch: object) -> float:
        training_step()
        if engine.state.iteration == 2:
            happens("evaluation")
        return 0.5

    trainer, evaluator = Engine(step), Engine(evaluate)
    checkpoint = Checkpoint(
        {"weights": weights},
        Interrupted(folder, happens),
        "latest",
        n_saved=None,
        global_step_transform=global_step_from_engine(trainer),
        timeout_s=LIMIT_S,
    )
    preemption = Preemption(trainer, checkpoint, timeout_s=LIMIT_S, **plan.pace)
    if plan.attaches:
        preemption.attach(evaluator)
    if plan.event:
        event = Events.EPOCH_COMPLETED if plan.event == "epoch" else Events.ITERATION_COMPLETED(every=2)
        trainer.add_event_handler(event, checkpoint)
    if plan.has_nan_on is not None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S))
    trainer.add_event_handler(Events.STARTED, lambda: happens("started"))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([0] * 4))
    with logged(LOGGER) as told:
        happens("startup")
        trainer.run([0] * 6, max_epochs=2)
    preemption.close()
    return Ended(
        iteration=trainer.state.iteration,
        reason=stop_reason(trainer),
        preempted=preemption.preempted,
        requested=preemption.requested,
        evaluated=evaluator.state.iteration,
        history=checkpoint.state_dict()["_saved"],
        told=[line for line in told if "received a signal" in line],
    )


def ends_of(world_size: int, folder: Path, plans: Sequence[Plan]) -> list[Ended]:
    """Run plans; check that all ranks come to the same, each plan; return what they came to, with rank 0's requests."""
    by_rank = run_ranks(run_plans, world_size, str(folder), plans, timeout_s=LIMIT_S)
    for plan, ends in zip(plans, zip(*by_rank, strict=True), strict=True):
        told = {target for target, _, _ in plan.signals}
        assert [end.requested for end in ends] == [rank in told for rank in range(world_size)], plan
        assert all_equal([(end.iteration, end.reason, end.preempted, end.history, end.told) for end in ends]), plan
        assert (ends[0].reason == "preempted") is ends[0].preempted, plan
    for number, end in enumerate(by_rank[0]):
        assert sorted(name for _, name in end.history) == sorted(os.listdir(folder / str(number)))
    return by_rank[0]


@WORLDS
def test_a_signal_on_one_rank_stops_all_where_they_are_and_saves_that_once(tmp_path: Path, world_size: int) -> None:
    choice = random.Random(world_size)
    paces: list[dict[str, int]] = [{}, {"lag": 1}, {"every": 3}, {"every": 2, "lag": 1}]
    plans = [
        Plan(signals=[(choice.randrange(world_size), choice.choice([TERM, USR1]), choice.randint(1, 8))], pace=pace)
        for pace in paces
        for _ in range(3)
    ]
    for number, (plan, end) in enumerate(zip(plans, ends_of(world_size, tmp_path, plans), strict=True)):
        (target, name, at), lag, every = plan.signals[0], plan.pace.get("lag", 0), plan.pace.get("every", 1)
        assert isinstance(at, int)
        counted = at + -at % every
        expected = counted + every * lag
        # The vote at the end of an epoch waits for no lag, and is held in any case.
        expected = min(expected, at + -at % 6)
        assert (end.iteration, end.reason) == (expected, "preempted"), plan
        assert stored(tmp_path / str(number)) == [expected]
        assert len(end.told) == 1
        assert f"rank {target}: {name.name}" in end.told[0]


@WORLDS
def test_signals_on_several_ranks_are_answered_together(tmp_path: Path, world_size: int) -> None:
    last = world_size - 1
    plans = [
        Plan(signals=[(0, TERM, 4), (last, USR1, 4)]),
        Plan(signals=[(0, USR1, 4), (last, TERM, 4)], pace={"lag": 1}),
        Plan(signals=[(0, TERM, 4), (last, USR1, 5)], pace={"lag": 1}),
        Plan(signals=[(rank, TERM, 4) for rank in range(world_size)]),
        Plan(signals=[(0, TERM, 4), (0, USR1, 4), (0, TERM, 4)]),
    ]
    ends = ends_of(world_size, tmp_path, plans)
    assert [end.iteration for end in ends] == [4, 5, 5, 4, 4]
    assert [stored(tmp_path / str(number)) for number in range(5)] == [[4], [5], [5], [4], [4]]
    assert ends[0].told == [
        f"Preemption: received a signal (rank 0: SIGTERM, rank {last}: SIGUSR1); the run ends at iteration 4"
    ]
    assert ends[4].told == ["Preemption: received a signal (rank 0: SIGTERM); the run ends at iteration 4"]


@WORLDS
@pytest.mark.parametrize("pace", [{}, {"lag": 1}], ids=["at once", "lag"])
def test_a_signal_in_an_evaluation_or_in_the_start_is_answered_by_all(
    tmp_path: Path, world_size: int, pace: dict[str, int]
) -> None:
    last = world_size - 1
    plans = [
        Plan(signals=[(last, TERM, "startup")], pace=pace),
        Plan(signals=[(0, TERM, "started")], pace=pace, event="epoch"),
        Plan(signals=[(last, TERM, "evaluation")], pace=pace),
        Plan(signals=[(0, USR1, "evaluation")], pace=pace, event="epoch"),
        Plan(signals=[(last, TERM, "evaluation")], pace=pace, attaches=True),
    ]
    ends = ends_of(world_size, tmp_path, plans)
    assert [(end.iteration, end.preempted, end.evaluated) for end in ends] == [
        (0, True, 0),
        (0, True, 0),
        (6, True, 4),
        # A save before the evaluation had the vote of this event counted: the next one knows.
        (8 if pace else 7, True, 4),
        (6, True, 3 if pace else 2),
    ]
    assert [stored(tmp_path / str(number)) for number in range(3)] == [[], [], [6]]
    assert [stored(tmp_path / str(number)) for number in range(3, 5)] == [[6, ends[3].iteration], [6]]
    assert ends[3].history == [(1, "latest_weights_1.pt"), (1.5, "latest_weights_2.pt")]


@WORLDS
def test_an_epoch_that_is_saved_as_it_ends_is_not_saved_again_for_the_signal(tmp_path: Path, world_size: int) -> None:
    last = world_size - 1
    plans = [
        Plan(signals=[(0, TERM, 6)], pace={"lag": 1}, event="epoch"),
        Plan(signals=[(last, TERM, 5)], pace={"lag": 1}, event="epoch"),
        Plan(signals=[(last, TERM, 5)], pace={"every": 3}, event="epoch"),
        Plan(signals=[(0, TERM, 6)], event="iteration"),
    ]
    ends = ends_of(world_size, tmp_path, plans)
    assert [(end.iteration, end.preempted) for end in ends] == [(6, True)] * 4
    assert [stored(tmp_path / str(number)) for number in range(4)] == [[6], [6], [6], [2, 4, 6]]
    assert [end.history for end in ends[:3]] == [[(1, "latest_weights_1.pt")]] * 3


@WORLDS
def test_signals_while_the_checkpoint_is_written_do_not_break_it(tmp_path: Path, world_size: int) -> None:
    last = world_size - 1
    plans = [
        Plan(signals=[(last, TERM, 4), (0, TERM, "write"), (last, USR1, "write"), (0, USR1, "written")]),
        Plan(signals=[(0, TERM, 4), (last, TERM, "write"), (0, TERM, "written")], pace={"lag": 1}),
        # None before: the save of an epoch or an iteration is under way.
        Plan(signals=[(last, TERM, "write")], event="epoch"),
        Plan(signals=[(0, TERM, "write")], event="epoch"),
        Plan(signals=[(last, TERM, "written")], event="iteration"),
        Plan(signals=[(0, TERM, "write")], event="iteration", pace={"lag": 1}),
    ]
    ends = ends_of(world_size, tmp_path, plans)
    steps = [stored(tmp_path / str(number)) for number in range(len(plans))]
    assert all(end.preempted for end in ends)
    assert [end.iteration for end in ends[:2]] == [4, 5]
    assert steps[:2] == [[4], [5]]
    for end, saved in zip(ends[2:], steps[2:], strict=True):
        first, *_ = saved
        assert end.iteration == saved[-1]
        assert len(saved) == len(set(saved))
        assert first < end.iteration <= first + 2


@WORLDS
def test_an_iteration_that_broke_on_one_rank_is_not_saved_for_the_signal_of_another(
    tmp_path: Path, world_size: int
) -> None:
    plans = [
        Plan(signals=[(world_size - 1, TERM, 4)], has_nan_on=0),
        Plan(signals=[(0, TERM, 4)], has_nan_on=world_size - 1, event="iteration"),
    ]
    ends = ends_of(world_size, tmp_path, plans)
    assert [(end.iteration, end.reason) for end in ends] == [(4, "nan")] * 2
    assert [stored(tmp_path / str(number)) for number in range(2)] == [[], [2]]


# -- an epoch in progress, and a resume ----------------------------------------------------------------


def stop_and_resume(folder: str, ranks: Sequence[int], at: Sequence[int]) -> list[tuple[Any, ...]]:
    """Train epochs of four iterations, be stopped, resume and be stopped again; then finish the epoch."""
    pid = os.getpid()
    seen: list[tuple[Any, ...]] = []
    for target, moment in [*zip(ranks, at, strict=True), (-1, 0)]:
        weights = Weights()

        def step(
            engine: Engine, _batch: object, weights: Weights = weights, target: int = target, moment: int = moment
        ) -> None:
            weights.step = engine.state.iteration
            training_step()
            if job.rank() == target and engine.state.iteration == moment:
                os.kill(pid, TERM)

        trainer = Engine(step)
        checkpoint = Checkpoint(
            {"weights": weights, "trainer": trainer},
            DiskSaver(folder, require_empty=False),
            "latest",
            global_step_transform=global_step_from_engine(trainer),
            include_self=True,
            timeout_s=LIMIT_S,
        )
        trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)
        preemption = Preemption(trainer, checkpoint, timeout_s=LIMIT_S)
        if seen:
            objects = {"weights": weights, "trainer": trainer, "checkpointer": checkpoint}
            Checkpoint.load_objects(objects, str(checkpoint.last_checkpoint or f"{folder}/{seen[-1][1]}"))
        if target < 0:
            trainer.add_event_handler(Events.EPOCH_COMPLETED, trainer.terminate)
        trainer.run([0] * 4, max_epochs=5)
        preemption.close()
        ((priority, name),) = checkpoint.state_dict()["_saved"]
        seen.append((trainer.state.iteration, name, priority))
        job.barrier()
    return seen


def test_the_end_of_the_epoch_replaces_what_was_saved_in_the_middle_of_it(tmp_path: Path) -> None:
    results = run_ranks(stop_and_resume, 2, str(tmp_path), [1, 0], [10, 11])
    assert all_equal(results)
    names = ["latest_checkpoint_3.pt"] * 3
    assert [(step, name) for step, name, _ in results[0]] == list(zip([10, 11, 12], names, strict=True))
    assert [2 < priority < 3 for *_, priority in results[0]] == [True, True, False]
    assert os.listdir(tmp_path) == names[:1]
    assert torch.load(tmp_path / names[0], weights_only=True)["weights"]["step"] == 12


def stop_beside_a_best(folder: str) -> tuple[int, bool, list[str]]:
    """Be stopped where the best of an evaluation is given to save with."""
    trainer = Engine(lambda engine, _batch: os.kill(os.getpid(), TERM) if engine.state.iteration == 5 else None)
    evaluator = Engine(lambda _engine, _batch: training_step())
    best = Checkpoint(
        {"weights": Weights()},
        folder,
        score_function=lambda engine: float(engine.state.metrics["accuracy"]),
        timeout_s=LIMIT_S,
    )
    evaluator.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.state.metrics.update(accuracy=0.5))
    evaluator.add_event_handler(Events.COMPLETED, best)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([0]))
    preemption = Preemption(trainer, best, timeout_s=LIMIT_S)
    with logged(LOGGER) as told:
        trainer.run([0] * 3, max_epochs=4)
    preemption.close()
    return trainer.state.iteration, preemption.preempted, told[1:]


def test_the_best_of_an_evaluation_is_not_asked_to_save_on_any_rank(tmp_path: Path) -> None:
    results = run_ranks(stop_beside_a_best, 2, str(tmp_path))
    assert all_equal(results)
    iteration, preempted, (told,) = results[0]
    assert (iteration, preempted) == (5, True)
    assert "has the score of another engine, and is not asked to save at iteration 5" in told
    assert os.listdir(tmp_path) == ["weights_0.5000.pt"]
