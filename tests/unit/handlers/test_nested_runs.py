"""An engine that runs in another one's loop or step function belongs to that engine's run, as one in an event does."""

import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events

from distckpt import Checkpoint, DiskSaver, Loop, TerminateOnNan, global_step_from_engine, resume, stop_reason
from distckpt.handlers.engine_events import get_running_engines

SCORES = (0.5, 0.9, 0.3, 0.2, 0.1, 0.05)
Evaluate = Callable[[Engine], object]
Run = Callable[[Evaluate], tuple[Engine, Callable[[], object]]]


def score_of(trainer: Engine, _evaluator: Engine) -> float:
    """Return the score of the trainer's epoch."""
    return SCORES[trainer.state.epoch - 1]


class StepError(Exception):
    """What a step raises."""


def in_a_loop(evaluate: Evaluate, *, is_last: bool) -> tuple[Engine, Callable[[], object]]:
    """Return a Loop that evaluates in each epoch, and the function that runs it.

    Args:
        evaluate: evaluates.
        is_last: whether it is called after the epoch's batches, or else in the last iteration.
    """
    loop = Loop([0, 1], max_epochs=6)

    def run() -> None:
        with loop:
            for _ in loop.epochs():
                for batch in loop.batches():
                    loop.output = batch
                    if batch == 1 and not is_last:
                        evaluate(loop)
                if is_last:
                    evaluate(loop)

    return loop, run


def after_the_batches(evaluate: Evaluate) -> tuple[Engine, Callable[[], object]]:
    """Return a Loop that evaluates after each epoch's batches, and the function that runs it."""
    return in_a_loop(evaluate, is_last=True)


def among_the_batches(evaluate: Evaluate) -> tuple[Engine, Callable[[], object]]:
    """Return a Loop that evaluates in each epoch's last iteration, and the function that runs it."""
    return in_a_loop(evaluate, is_last=False)


def in_the_step_function(evaluate: Evaluate) -> tuple[Engine, Callable[[], object]]:
    """Return an engine whose step evaluates in each epoch's last iteration, and the function that runs it."""
    trainer = Engine(lambda engine, batch: evaluate(engine) if batch == 1 else None)
    return trainer, lambda: trainer.run([0, 1], max_epochs=6)


def drive(loop: Loop) -> None:
    """Run a Loop to its end."""
    with loop:
        for _ in loop.epochs():
            for _ in loop.batches():
                pass


RUNS: list[Run] = [after_the_batches, among_the_batches, in_the_step_function]


@pytest.mark.parametrize("make_run", RUNS)
def test_a_handler_of_an_evaluation_continues_its_history_after_a_resume(make_run: Run, tmp_path: Path) -> None:
    for stop_after in (3, 6):
        model, evaluator = torch.nn.Linear(1, 1), Engine(lambda _engine, _batch: None)

        def evaluate(trainer: Engine, evaluator: Engine = evaluator, stop_after: int = stop_after) -> None:
            evaluator.run([0])
            if trainer.state.epoch == stop_after:
                trainer.terminate()

        trainer, run = make_run(evaluate)
        to_save = {"model": model, "trainer": trainer}
        latest = Checkpoint(to_save, DiskSaver(tmp_path, require_empty=False), n_saved=1)
        best = Checkpoint(
            {"model": model},
            DiskSaver(tmp_path, require_empty=False),
            "best",
            n_saved=1,
            score_function=functools.partial(score_of, trainer),
            global_step_transform=global_step_from_engine(trainer),
        )
        evaluator.add_event_handler(Events.COMPLETED, best)
        trainer.add_event_handler(Events.EPOCH_COMPLETED | Events.COMPLETED, latest)
        resume(to_save, latest, engine=trainer)
        run()
        found = [path.name for path in tmp_path.glob("best*.pt")]
        assert found == ["best_model_2_0.9000.pt"]


def test_an_evaluation_in_a_loop_does_not_save_a_state_that_was_voted_nan(tmp_path: Path) -> None:
    model, evaluator, loop = torch.nn.Linear(1, 1), Engine(lambda _engine, _batch: None), Loop([0, 1, 2], max_epochs=2)
    saver = DiskSaver(tmp_path)
    evaluator.add_event_handler(Events.COMPLETED, Checkpoint({"model": model}, saver, score_function=lambda _: 1.0))
    loop.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    with loop:
        for _ in loop.epochs():
            for batch in loop.batches():
                loop.output = float("nan") if batch == 1 else 0.0
            evaluator.run([0])
    assert stop_reason(loop) == "nan"
    assert list(tmp_path.glob("*.pt")) == []


def test_a_trainer_in_the_step_of_another_engine_continues_at_its_own_position(tmp_path: Path) -> None:
    trained: list[int] = []
    for stop_at in (3, None):

        def step(engine: Engine, batch: int, stop_at: int | None = stop_at) -> None:
            if engine.state.iteration == stop_at:
                raise StepError
            trained.append(batch)

        model, trainer = torch.nn.Linear(1, 1), Engine(step)
        to_save = {"model": model, "trainer": trainer}
        latest = Checkpoint(to_save, DiskSaver(tmp_path, require_empty=False), n_saved=1)
        best = Checkpoint(
            {"model": model},
            DiskSaver(tmp_path, require_empty=False),
            "best",
            n_saved=1,
            score_function=lambda engine: -engine.state.iteration,
        )
        for handler in (latest, best):
            trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)

        def search_step(_engine: Engine, _batch: int, trainer: Engine = trainer) -> None:
            trainer.run(range(5), max_epochs=1)

        search = Engine(search_step)
        resume(to_save, latest, engine=trainer)
        if stop_at is None:
            search.run([0])
        else:
            with pytest.raises(StepError):
                search.run([0])
    assert trained == [0, 1, 2, 3, 4]
    assert [path.name for path in tmp_path.glob("best*.pt")] == ["best_model_-1.pt"]


def test_running_engines_are_ordered_from_the_outside() -> None:
    seen: list[list[Engine]] = []

    def note(*_: Any) -> None:
        seen.append(get_running_engines())

    innermost = Engine(note)
    loop = Loop([0], max_epochs=1)

    def step(_engine: Engine, _batch: Any) -> None:
        with loop:
            for _ in loop.epochs():
                for _ in loop.batches():
                    innermost.run([0])
                note()

    inner, outer = Engine(step), Engine(note)
    outer.add_event_handler(Events.EPOCH_COMPLETED, lambda: inner.run([0]))
    outer.run([0])
    assert seen == [[outer], [outer, inner, loop, innermost], [outer, inner, loop]]
    assert get_running_engines() == []


def test_no_engine_runs_after_errors() -> None:
    def fail(*_: Any) -> None:
        raise StepError

    engine, loop = Engine(fail), Loop([0], max_epochs=1)
    with pytest.raises(StepError):
        engine.run([0])
    loop.add_event_handler(Events.EPOCH_COMPLETED, fail)
    with pytest.raises(StepError):
        drive(loop)
    failing = Loop([0], max_epochs=1)
    failing.add_event_handler(Events.STARTED, fail)
    with pytest.raises(StepError):
        drive(failing)
    assert get_running_engines() == []


def test_a_loop_that_the_program_has_abandoned_surrounds_no_engine() -> None:
    loop = Loop([0], max_epochs=1)
    loop.__enter__()
    assert get_running_engines() == [loop]
    del loop
    gc.collect()
    assert get_running_engines() == []
