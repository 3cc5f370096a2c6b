"""A SteppedEngine that pauses after iterations."""

import pytest
from ignite.engine import Events

from distckpt.handlers.stepped_engine import Pause, SteppedEngine


def begun(**limits: int) -> SteppedEngine:
    """Return an engine whose run has started, and pauses after iterations."""
    engine = SteppedEngine(pauses_after_iterations=True)
    engine.begin(None, limits.get("max_epochs"), limits.get("max_iters"), limits["epoch_length"])
    return engine


def test_the_run_stands_still_between_an_iteration_and_the_next() -> None:
    engine = begun(max_epochs=1, epoch_length=2)
    pauses = [engine.pause]
    while engine.pause is not Pause.RUN_ENDED:
        pauses.append(engine.advance())
    assert pauses == [
        Pause.RUN_STARTED,
        Pause.EPOCH_STARTED,
        *[Pause.ITERATION_STARTED, Pause.ITERATION_COMPLETED] * 2,
        Pause.BATCHES_ENDED,
        Pause.RUN_ENDED,
    ]


@pytest.mark.parametrize("stops_in_handler", [True, False])
def test_a_run_that_stops_after_an_iteration_starts_no_other(stops_in_handler: bool) -> None:  # noqa: FBT001 - a case
    engine = begun(max_epochs=2, epoch_length=3)
    if stops_in_handler:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.terminate)
    while engine.state.iteration < 2 or engine.pause is Pause.ITERATION_STARTED:
        engine.advance()
    assert engine.pause is (Pause.BATCHES_ENDED if stops_in_handler else Pause.ITERATION_COMPLETED)
    engine.terminate()
    while engine.advance() is not Pause.RUN_ENDED:
        pass
    assert engine.state.iteration == 2


def test_without_the_argument_an_iteration_follows_the_other_at_once() -> None:
    engine = SteppedEngine()
    engine.begin(None, 1, None, 2)
    engine.advance()
    assert [engine.advance(), engine.advance()] == [Pause.ITERATION_STARTED] * 2
    while engine.advance() is not Pause.RUN_ENDED:
        pass
