"""A save holds the state of its call: in every order of handlers, from every place, with one vote an iteration."""

import contextlib
import itertools
import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import HandlersTimeProfiler

from distckpt import Checkpoint, DiskSaver, ModelCheckpoint, Preemption, TerminateOnNan, TimeLimit, stop_reason
from distckpt.backends.detect import current
from tests.distributed.programs import gather, idle_engine
from tests.distributed.voters import LIMIT_S, VOTERS, Weights, attached, counted, rank_is_last
from tests.support import run_distributed, run_ranks
from tests.support.selection import process_ranks_only

WORLDS = pytest.mark.parametrize("world_size", [1, 2])


class Averaged:
    """Weights for which others are swapped in while they are evaluated and saved."""

    def __init__(self) -> None:
        self.value = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the present value."""
        return {"value": torch.tensor(self.value)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a value over."""
        self.value = state["value"].item()


@contextlib.contextmanager
def votes_of(trainer: Engine) -> Iterator[dict[int, int]]:
    """Count the votes that begin in each of the trainer's iterations."""
    begun: dict[int, int] = {}
    backend = current()
    start = backend.start_sync_check

    def start_and_count(*args: Any, **kwargs: Any) -> Any:
        if ", voting (" in str(kwargs.get("description")):
            begun[trainer.state.iteration] = begun.get(trainer.state.iteration, 0) + 1
        return start(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "start_sync_check", start_and_count)
        yield begun


def running(engine: Engine) -> Callable[[], None]:
    """Return a handler that runs the engine."""

    def run() -> None:
        engine.run([0])

    return run


def never_better() -> Callable[[Engine], float]:
    """Return a score that falls from call to call."""
    falling = iter(range(0, -100, -1))
    return lambda _: float(next(falling))


def held_in(folder: str) -> dict[str, float]:
    """Return the value in each file."""
    return {path.name: torch.load(path, weights_only=True)["value"].item() for path in sorted(Path(folder).iterdir())}


# -- the table -----------------------------------------------------------------------------------------

TABLE = list(
    itertools.product(("before", "after"), ("trainer", "evaluator"), ("attached", "called"), (False, True), (0, 1))
)
"""Orders, engines, ways to the Checkpoint, whether it saves in the background, lags."""


def save_while_swapped(
    folder: str, order: str, where: str, way: str, background: bool, lag: int  # noqa: FBT001
) -> tuple[Any, ...]:  # fmt: skip
    """Save in each second of six iterations, the fourth of which breaks on the last rank; weights are swapped in."""
    weights = Averaged()

    def step(engine: Engine, _batch: object) -> float:
        weights.value = float(engine.state.iteration)
        return math.nan if engine.state.iteration == 4 and rank_is_last() else 0.5

    trainer, evaluator = Engine(step), idle_engine()
    saver = DiskSaver(folder, background=background)
    checkpoint = Checkpoint(
        {"weights": weights}, saver, n_saved=None, global_step_transform=lambda *_: trainer.state.iteration
    )
    on = trainer if where == "trainer" else evaluator
    event = Events.ITERATION_COMPLETED(every=2)
    is_there: list[bool] = []

    def call() -> None:
        checkpoint(on)
        is_there.append(checkpoint.has_pending_save or checkpoint.last_checkpoint is not None)

    nan = TerminateOnNan(timeout_s=LIMIT_S, lag=lag)
    if order == "after":
        trainer.add_event_handler(Events.ITERATION_COMPLETED, nan)
    trainer.add_event_handler(event, lambda: setattr(weights, "value", -weights.value))
    if where == "evaluator":
        trainer.add_event_handler(event, running(evaluator))
        evaluator.add_event_handler(Events.COMPLETED, checkpoint if way == "attached" else call)
    else:
        trainer.add_event_handler(event, checkpoint if way == "attached" else call)
    trainer.add_event_handler(event, lambda: setattr(weights, "value", 1e9))
    if order == "before":
        trainer.add_event_handler(Events.ITERATION_COMPLETED, nan)
    with votes_of(trainer) as votes:
        trainer.run([0] * 6)
    return held_in(folder), trainer.state.iteration, stop_reason(trainer), votes, set(is_there)


@WORLDS
def test_what_is_saved_is_the_state_of_the_call_and_never_a_step_voted_nan(tmp_path: Path, world_size: int) -> None:
    results = run_ranks(_save_in_each_way, world_size, str(tmp_path))
    for rank, by_way in enumerate(results):
        for way, (held, ended, reason, votes, is_there) in by_way.items():
            assert held == {"weights_2.pt": -2.0}, (rank, way)
            assert (ended, reason) == (4, "nan"), (rank, way)
            assert is_there == ({True} if "called" in way else set()), (rank, way)
            # Nothing is put off: an iteration's vote is the one that its save needs.
            assert votes == ({} if world_size == 1 else dict.fromkeys(range(1, 5), 1)), (rank, way)


def _save_in_each_way(folder: str) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    return {way: save_while_swapped(f"{folder}/{number}", *way) for number, way in enumerate(TABLE)}


@pytest.mark.parametrize("pace", [{"every": 3}, {"every": 5, "lag": 1}])
@WORLDS
def test_a_save_between_two_votes_has_its_own_iteration_looked_at(
    tmp_path: Path, world_size: int, pace: dict[str, Any]
) -> None:
    for where in ("trainer", "evaluator"):
        (held, ended, reason), *others = run_ranks(_save_between, world_size, str(tmp_path / where), where, pace)
        assert others == [(held, ended, reason)] * (world_size - 1)
        assert held == {"weights_2.pt": 2.0}
        assert (ended, reason) == (4, "nan")


def _save_between(folder: str, where: str, pace: dict[str, Any]) -> tuple[dict[str, float], int, str | None]:
    weights, evaluator = Averaged(), idle_engine()

    def step(engine: Engine, _batch: object) -> float:
        weights.value = float(engine.state.iteration)
        return math.nan if engine.state.iteration == 4 and rank_is_last() else 0.5

    trainer = Engine(step)
    checkpoint = Checkpoint(
        {"weights": weights}, folder, n_saved=None, global_step_transform=lambda *_: trainer.state.iteration
    )
    save: Callable[..., None] = checkpoint if where == "trainer" else running(evaluator)
    evaluator.add_event_handler(Events.COMPLETED, checkpoint)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), save)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S, **pace))
    trainer.run([0] * 6)
    return held_in(folder), trainer.state.iteration, stop_reason(trainer)


# -- what it costs -------------------------------------------------------------------------------------


def reductions_of(folder: str, order: tuple[str, ...], num_scores: int) -> list[int]:
    """Return the collectives of the second to the fifth iteration, with Checkpoints whose scores never improve."""
    counts: list[int] = []
    trainer = Engine(lambda _engine, _batch: 0.5)
    savers = [
        Checkpoint({"weights": Weights()}, f"{folder}/{number}", score_function=never_better())
        for number in range(num_scores)
    ]
    with attached(trainer, order, savers[0], Events.ITERATION_COMPLETED):
        for other in savers[1:]:
            trainer.add_event_handler(Events.ITERATION_COMPLETED, other)
        with counted() as log:

            @trainer.on(Events.ITERATION_STARTED)
            def note() -> None:
                counts.append(log.count("reduce") + log.count("gather") + log.count("broadcast"))

            trainer.run([0] * 6)
    return [after - before for before, after in itertools.pairwise(counts)][1:]


@run_distributed(world_size=2)
def test_a_score_that_nobody_wants_costs_the_one_vote_in_every_order(tmp_path: Path) -> None:
    for number, order in enumerate(itertools.permutations(VOTERS)):
        assert reductions_of(str(tmp_path / str(number)), order, 1) == [1] * 4, order


@run_distributed(world_size=2)
def test_a_score_alone_costs_one_vote_and_each_further_one_a_vote_of_its_own(tmp_path: Path) -> None:
    assert reductions_of(str(tmp_path / "alone"), ("checkpoint",), 1) == [1] * 4
    assert reductions_of(str(tmp_path / "two"), VOTERS, 2) == [2] * 4
    assert reductions_of(str(tmp_path / "three"), ("checkpoint", "nan"), 3) == [3] * 4


@run_distributed(world_size=2)
def test_a_save_in_the_background_is_voted_on_with_the_score_of_another(tmp_path: Path) -> None:
    trainer, release = Engine(lambda _engine, _batch: 0.5), []
    best = Checkpoint({"weights": Weights()}, tmp_path / "best", score_function=never_better())
    latest = Checkpoint({"weights": Weights()}, DiskSaver(tmp_path / "latest", background=True))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), latest)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, best)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S))
    with votes_of(trainer) as votes:

        @trainer.on(Events.ITERATION_STARTED(once=3))
        def pretend_to_write() -> None:
            pending = latest._background_saves._pending
            if pending is not None:
                release.append(pending)
                vars(latest._background_saves)["_probe"] = lambda _engine: (
                    lambda: None
                )  # it is written for three iterations

        @trainer.on(Events.ITERATION_STARTED(once=6))
        def end_it() -> None:
            vars(latest._background_saves).pop("_probe", None)

        trainer.run([0] * 8)
    assert release, "it was under way in the third iteration"
    assert {step: votes[step] for step in (3, 4, 5)} == dict.fromkeys((3, 4, 5), 1)
    assert latest.last_checkpoint == tmp_path / "latest" / "weights_2.pt"


# -- the trainer around an evaluator -------------------------------------------------------------------


@run_distributed(world_size=2)
def test_what_happens_in_an_evaluation_after_its_save_is_still_heard_in_the_same_iteration(tmp_path: Path) -> None:
    trainer, evaluator, limit = idle_engine(), idle_engine(), TimeLimit(3600, timeout_s=LIMIT_S)
    evaluator.add_event_handler(Events.COMPLETED, Checkpoint({"weights": Weights()}, tmp_path, timeout_s=LIMIT_S))

    @trainer.on(Events.ITERATION_COMPLETED(every=2))
    def evaluate() -> None:
        evaluator.run([0])
        if trainer.state.iteration == 4 and rank_is_last():
            limit.start_time -= 3601

    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, limit)
    trainer.run([0] * 8)
    assert (trainer.state.iteration, stop_reason(trainer)) == (4, "time_limit")


@WORLDS
def test_an_engine_three_levels_deep_has_all_votes_around_it_held(tmp_path: Path, world_size: int) -> None:
    assert run_ranks(_save_three_levels_deep, world_size, str(tmp_path)) == [([1.0, 2.0], 3, "nan")] * world_size


def _save_three_levels_deep(folder: str) -> tuple[list[float], int, str | None]:
    weights = Averaged()

    def step(engine: Engine, _batch: object) -> float:
        weights.value = float(engine.state.iteration)
        return math.nan if engine.state.iteration == 3 and rank_is_last() else 0.5

    outer, middle, inner = Engine(step), idle_engine(), idle_engine()
    saver = Checkpoint(
        {"weights": weights}, folder, n_saved=None, global_step_transform=lambda *_: outer.state.iteration
    )
    outer.add_event_handler(Events.ITERATION_COMPLETED, running(middle))
    middle.add_event_handler(Events.ITERATION_COMPLETED, running(inner))
    inner.add_event_handler(Events.ITERATION_COMPLETED, saver)
    for engine in (outer, middle):
        engine.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S))
    outer.run([0] * 5)
    return sorted(held_in(folder).values()), outer.state.iteration, stop_reason(outer)


# -- one handler attached twice ------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True])
@WORLDS
def test_one_handler_attached_twice_saves_the_objects_of_each(
    tmp_path: Path, world_size: int, background: bool  # noqa: FBT001
) -> None:  # fmt: skip
    expected = {"a_2.pt": 1.0, "b_2.pt": 2.0}
    results = run_ranks(_save_two, world_size, str(tmp_path), background)
    assert results == [{"trainer": expected, "evaluator": expected}] * world_size


def _save_two(folder: str, background: bool) -> dict[str, Any]:  # noqa: FBT001
    found = {}
    for where in ("trainer", "evaluator"):
        trainer, evaluator = Engine(lambda _engine, _batch: 0.5), idle_engine()
        on, event = (
            (trainer, Events.ITERATION_COMPLETED(every=2)) if where == "trainer" else (evaluator, Events.COMPLETED)
        )
        saver = ModelCheckpoint(
            f"{folder}/{where}",
            n_saved=9,
            background=background,
            global_step_transform=lambda *_, trainer=trainer: trainer.state.iteration,
        )
        for name, value in (("a", 1.0), ("b", 2.0)):
            weights = Averaged()
            weights.value = value
            on.add_event_handler(event, saver, {name: weights})
        if where == "evaluator":
            trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), running(evaluator))
        trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S))
        trainer.run([0] * 2)
        found[where] = held_in(f"{folder}/{where}")
    return found


@process_ranks_only
@pytest.mark.parametrize("is_profiled", [False, True])
@WORLDS
def test_a_preemption_saves_all_objects_that_the_handler_is_attached_with(
    tmp_path: Path, world_size: int, is_profiled: bool  # noqa: FBT001
) -> None:  # fmt: skip
    results = run_ranks(_preempt_two, world_size, str(tmp_path), is_profiled)
    assert results == [({"a_3.pt": 1.0, "b_3.pt": 2.0}, 3)] * world_size


def _preempt_two(folder: str, is_profiled: bool) -> tuple[dict[str, float], int]:  # noqa: FBT001
    def step(engine: Engine, _batch: object) -> None:
        if engine.state.iteration == 3 and rank_is_last():
            os.kill(os.getpid(), signal.SIGTERM)

    trainer, saver = Engine(step), ModelCheckpoint(folder, n_saved=None, timeout_s=LIMIT_S)
    for name, value in (("a", 1.0), ("b", 2.0)):
        weights = Averaged()
        weights.value = value
        trainer.add_event_handler(Events.EPOCH_COMPLETED, saver, {name: weights})
    if is_profiled:
        HandlersTimeProfiler().attach(trainer)
    preemption = Preemption(trainer, saver, timeout_s=LIMIT_S)
    trainer.run([0] * 6)
    preemption.close()
    return held_in(folder), trainer.state.iteration


# -- wrappers ------------------------------------------------------------------------------------------


def save_beside_a_profiler(folder: str, profiler: str) -> tuple[list[float], int]:
    """Save in each second of eight iterations, the fourth of which breaks; a profiler replaces the engine's list."""
    weights = Averaged()

    def step(engine: Engine, _batch: object) -> float:
        weights.value = float(engine.state.iteration)
        return math.nan if engine.state.iteration == 4 and rank_is_last() else 0.5

    trainer = Engine(step)
    saver = Checkpoint({"weights": weights}, folder, n_saved=None, timeout_s=LIMIT_S)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), saver)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S))

    @trainer.on(Events.STARTED)
    def wrap_all() -> None:
        if profiler == "a program's own" or (profiler == "one rank's" and rank_is_last()):
            for entries in trainer._event_handlers.values():
                entries[:] = [
                    (lambda *given, call=call, **named: call(*given, **named), args, kwargs)
                    for call, args, kwargs in entries
                ]

    if profiler == "ignite's":
        HandlersTimeProfiler().attach(trainer)
    trainer.run([0] * 8)
    return sorted(held_in(folder).values()), trainer.state.iteration


@WORLDS
@pytest.mark.parametrize("profiler", ["ignite's", "a program's own", "one rank's"])
def test_a_profiler_that_hides_the_handlers_hides_no_nan(tmp_path: Path, world_size: int, profiler: str) -> None:
    assert run_ranks(save_beside_a_profiler, world_size, str(tmp_path), profiler) == [([2.0], 4)] * world_size


@run_distributed(world_size=2)
def test_a_handler_of_one_rank_between_two_checkpoints_changes_no_collective(tmp_path: Path) -> None:
    trainer = Engine(lambda _engine, _batch: 0.5)
    for number in range(2):
        saver = Checkpoint({"weights": Weights()}, tmp_path / str(number), score_function=never_better())
        trainer.add_event_handler(Events.ITERATION_COMPLETED, saver)
        if rank_is_last():
            trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: None)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=LIMIT_S))
    with votes_of(trainer) as votes:
        trainer.run([0] * 5)
    assert gather(votes) == [dict.fromkeys(range(1, 6), 2)] * 2
