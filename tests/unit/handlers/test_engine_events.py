"""Handlers that vote are called once an event: at their place, or before, where a save needs their answer."""

import copy
import functools
import itertools
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from ignite.engine import Engine, Events
from ignite.handlers import HandlersTimeProfiler

from distckpt import Checkpoint, Preemption, TerminateOnNan, TimeLimit, stop_reason
from tests.unit.toys import InMemory, Notebook

NAN = float("nan")


def breaking_at(iteration: int) -> Engine:
    return Engine(lambda engine, _batch: NAN if engine.state.iteration == iteration else 0.5)


def saver_on(trainer: Engine, event: Any = Events.ITERATION_COMPLETED) -> InMemory:
    kept = InMemory()
    trainer.add_event_handler(event, Checkpoint({"obj": Notebook({"a": 1})}, kept, n_saved=None))
    return kept


def saved(kept: InMemory) -> list[int]:
    return sorted(int(name.removesuffix(".pt").rpartition("_")[2]) for name in kept.files)


class Careful(TerminateOnNan):
    """A program's own, which looks only from its second iteration on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def __call__(self, engine: Engine) -> None:
        """Look, or do not."""
        self.calls.append(engine.state.iteration)
        if engine.state.iteration > 1:
            super().__call__(engine)


def test_an_overridden_handler_is_called_once_an_event_and_decides_for_itself() -> None:
    for breaks_at, expected in ((1, [1, 2, 3]), (2, [1])):
        trainer, careful = breaking_at(breaks_at), Careful()
        kept = saver_on(trainer)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, careful)
        trainer.run([0] * 3)
        assert saved(kept) == expected
        assert careful.calls == list(range(1, trainer.state.iteration + 1))


def test_a_filter_of_the_programs_own_is_asked_once_an_event() -> None:
    asked: list[int] = []
    answers = itertools.cycle([False, True])

    def sometimes(_engine: Engine, number: int) -> bool:
        asked.append(number)
        return next(answers)

    trainer = breaking_at(4)
    kept = saver_on(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(event_filter=sometimes), TerminateOnNan())
    trainer.run([0] * 6)
    assert asked == [1, 2, 3, 4]
    assert saved(kept) == [1, 2, 3]


def test_a_step_on_which_nan_is_not_looked_for_is_saved() -> None:
    trainer = breaking_at(3)
    kept = saver_on(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), TerminateOnNan())
    trainer.run([0] * 5)
    assert saved(kept) == [1, 2, 3, 4, 5]
    assert stop_reason(trainer) is None


def wrapped_by_functools(nan: TerminateOnNan) -> Callable[..., None]:
    @functools.wraps(nan)
    def call(engine: Engine) -> None:
        nan(engine)

    return call


WRAPPERS: dict[str, Callable[[TerminateOnNan], Callable[..., Any]]] = {
    "functools.wraps": wrapped_by_functools,
    "partial": functools.partial,
    "method": lambda nan: nan.__call__,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_plain_wrapper_does_not_hide_a_handler(wrapper: str) -> None:
    trainer = breaking_at(3)
    kept = saver_on(trainer)
    wrapped = WRAPPERS[wrapper](TerminateOnNan())
    trainer.add_event_handler(Events.ITERATION_COMPLETED, wrapped)
    trainer.run([0] * 5)
    assert saved(kept) == [1, 2]
    assert trainer.has_event_handler(wrapped, Events.ITERATION_COMPLETED)


def test_a_method_that_does_not_vote_is_not_called_early() -> None:
    trainer, calls = breaking_at(9), list[int]()

    class Noting(TerminateOnNan):
        def note(self, engine: Engine) -> None:
            calls.append(len(kept.files) - engine.state.iteration)

    kept = saver_on(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, Noting().note)
    trainer.run([0] * 3)
    assert calls == [0, 0, 0], "after the save"


def test_a_wrapper_that_claims_to_wrap_itself_is_attached_as_it_is() -> None:
    def call(engine: Engine) -> None:
        called.append(engine.state.iteration)

    called: list[int] = []
    vars(call)["__wrapped__"] = call
    trainer = breaking_at(9)
    # A signature that ends nowhere is refused by Python itself; ignite's check is not what is tested.
    vars(call)["__signature__"] = None
    trainer.add_event_handler(Events.ITERATION_COMPLETED, call)
    trainer.run([0])
    assert called == [1]


@pytest.mark.parametrize("event", [Events.ITERATION_COMPLETED, Events.ITERATION_COMPLETED(every=1)])
@pytest.mark.parametrize("way", ["handle", "context", "engine"])
def test_a_handler_that_was_removed_is_not_asked(event: Any, way: str) -> None:
    trainer, nan = breaking_at(3), TerminateOnNan()
    kept = saver_on(trainer)
    handle = trainer.add_event_handler(event, nan)
    assert trainer.has_event_handler(nan, Events.ITERATION_COMPLETED)
    if way == "handle":
        handle.remove()
    elif way == "context":
        with handle:
            pass
    else:
        trainer.remove_event_handler(nan, Events.ITERATION_COMPLETED)
    assert not trainer.has_event_handler(nan, Events.ITERATION_COMPLETED)
    trainer.run([0] * 4)
    assert saved(kept) == [1, 2, 3, 4]


def test_a_handler_of_several_events_is_removed_from_all_of_them() -> None:
    trainer, nan = breaking_at(2), TerminateOnNan()
    events = Events.ITERATION_COMPLETED(every=2) | Events.EPOCH_COMPLETED
    kept = saver_on(trainer)
    trainer.add_event_handler(events, nan).remove()
    trainer.run([0] * 3)
    assert saved(kept) == [1, 2, 3]


def test_a_profile_knows_the_handlers_by_their_names() -> None:
    trainer, profiler = breaking_at(9), HandlersTimeProfiler()
    nan, limit = TerminateOnNan(), TimeLimit(3600)
    for handler in (nan, limit):
        trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    profiler.attach(trainer)
    trainer.run([0] * 3)
    names = {row[0] for row in profiler.get_results()}
    assert {"TerminateOnNan", "TimeLimit"} <= names
    assert trainer.has_event_handler(nan)
    trainer.remove_event_handler(limit, Events.ITERATION_COMPLETED)


def test_who_looks_into_the_engines_list_finds_the_handlers() -> None:
    trainer, preemption = breaking_at(9), TerminateOnNan(lag=1)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, preemption)
    ((entry, *_),) = trainer._event_handlers[Events.ITERATION_COMPLETED]
    assert isinstance(entry, TerminateOnNan)
    assert entry.lag == 1
    assert entry == preemption


def test_a_copy_of_the_trainer_has_handlers_of_its_own() -> None:
    trainer = breaking_at(3)
    nan = TerminateOnNan()
    trainer.add_event_handler(Events.ITERATION_COMPLETED, nan)
    twin = copy.deepcopy(trainer)
    ((entry, *_),) = twin._event_handlers[Events.ITERATION_COMPLETED]
    assert entry.tracked is not nan
    assert trainer.run([0] * 5).iteration == 3


def test_a_handler_attached_twice_answers_once() -> None:
    trainer, nan = breaking_at(6), TerminateOnNan()
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), nan)
    kept = saver_on(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=3), nan)
    trainer.run([0] * 8)
    assert saved(kept) == [1, 2, 3, 4, 5]


def test_a_call_of_a_programs_own_function_has_saved_when_it_returns() -> None:
    trainer, kept, known = breaking_at(7), InMemory(), list[tuple[int, int]]()
    checkpoint = Checkpoint({"obj": Notebook({"a": 1})}, kept, n_saved=None)

    @trainer.on(Events.ITERATION_COMPLETED(every=2))
    def save_and_upload(engine: Engine) -> None:
        checkpoint(engine)
        known.append((engine.state.iteration, len(kept.files)))

    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    trainer.run([0] * 8)
    assert known == [(2, 1), (4, 2), (6, 3)]


def test_an_event_of_a_programs_own_within_the_iteration_has_the_iteration_looked_at() -> None:
    trainer, kept = breaking_at(2), InMemory()
    trainer.register_events("best_found")
    trainer.add_event_handler("best_found", Checkpoint({"obj": Notebook({"a": 1})}, kept, n_saved=None))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: engine.fire_event("best_found"))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    trainer.run([0] * 3)
    assert saved(kept) == [1]
    assert stop_reason(trainer) == "nan"


def test_a_preemption_called_early_saves_when_the_event_is_over() -> None:
    order: list[str] = []

    def step(engine: Engine, _batch: object) -> float:
        if engine.state.iteration == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return 0.5

    trainer = Engine(step)
    kept = saver_on(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    preemption = Preemption(trainer, lambda _engine: order.append("saved"))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: order.append("last handler"))
    trainer.run([0] * 5)
    preemption.close()
    assert (trainer.state.iteration, preemption.preempted) == (2, True)
    assert saved(kept) == [1, 2]
    assert order == ["last handler", "last handler", "saved"]
