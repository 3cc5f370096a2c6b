"""A rank whose own error is pending and that then waits in vain for the others raises its own error."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ignite.engine import Engine, Events

from distckpt import Checkpoint, CollectiveError, CollectiveTimeout, RemoteRankError, TerminateOnNan
from distckpt.backends.detect import current
from distckpt.coordination import phases
from tests.distributed.failures import Stateful
from tests.distributed.programs import fire, raised
from tests.support import job, run_distributed
from tests.support.selection import process_ranks_only

pytestmark = process_ranks_only

LIMIT_S = 1.5


class OwnError(Exception):
    """A program's own."""


def place(doing: str) -> phases.SyncPoint:
    """Return a place."""
    return phases.SyncPoint(handler="test", phase=doing, step=0)


def failing(error: BaseException) -> Callable[[], None]:
    """Return work that fails."""

    def work() -> None:
        raise error

    return work


def check_own(error: BaseException | None, own: BaseException) -> None:
    """Check that an error is the rank's own, and says that the others were not told."""
    assert error is own
    (note,) = own.__notes__
    assert note.startswith("The other ranks do not know of it: rank 1: ")
    assert isinstance(own.__context__, CollectiveError)


@pytest.mark.parametrize("own", [OwnError("boom"), KeyboardInterrupt()], ids=["an error", "an interrupt"])
@run_distributed(world_size=2)
def test_a_phase_that_the_others_do_not_come_to_ends_with_the_rank_s_own_error(own: BaseException) -> None:
    phases.run(current(), place("meeting"), lambda: None)
    if job.rank() == 1:
        with pytest.raises(type(own)) as caught:
            phases.run(current(), place("failing"), failing(own), timeout_s=LIMIT_S)
        check_own(caught.value, own)
    job.store_barrier()


@run_distributed(world_size=2)
def test_a_collective_s_error_in_a_vote_is_raised_on_all_ranks(tmp_path: Path) -> None:
    def score(_engine: Engine) -> float:
        if job.rank() == 1:
            raise CollectiveError("a collective of the program's own broke")
        return 0.5

    trainer = Engine(lambda _engine, _batch: None)
    handler = Checkpoint({"state": Stateful(1.0)}, tmp_path, score_function=score)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    error = raised(lambda: trainer.run([0]))
    assert isinstance(error, RemoteRankError)
    assert "a collective of the program's own broke (CollectiveError on rank 1, while: " in str(error)
    assert not hasattr(error, "__notes__")


@run_distributed(world_size=2)
def test_a_phase_that_was_given_up_earlier_ends_with_the_rank_s_own_error() -> None:
    phases.run(current(), place("meeting"), lambda: None)
    if job.rank() == 1:
        error = raised(lambda: phases.run(current(), place("waiting"), lambda: None, timeout_s=LIMIT_S))
        assert isinstance(error, CollectiveTimeout), "without an error of its own it is the time-out's"
        own = OwnError("boom")
        begin_s = time.monotonic()
        check_own(raised(lambda: phases.run(current(), place("failing"), failing(own), timeout_s=LIMIT_S)), own)
        assert time.monotonic() - begin_s < LIMIT_S
    job.store_barrier()


@run_distributed(world_size=2)
def test_what_an_own_error_was_raised_from_stays_its_context() -> None:
    phases.run(current(), place("meeting"), lambda: None)
    if job.rank() == 1:
        first, own = KeyError("first"), OwnError("boom")

        def work() -> None:
            try:
                raise first
            except KeyError:
                raise own  # noqa: B904 - the context is what is looked at

        assert raised(lambda: phases.run(current(), place("failing"), work, timeout_s=LIMIT_S)) is own
        assert own.__context__ is first
        assert own.__cause__ is None
    job.store_barrier()


@run_distributed(world_size=2)
def test_a_save_that_fails_where_the_others_do_not_come_ends_with_the_rank_s_own_error(tmp_path: object) -> None:
    obj, own = Stateful(), OwnError("boom")
    handler = Checkpoint({"obj": obj}, str(tmp_path), timeout_s=LIMIT_S, score_function=lambda _: 0.5)
    fire(handler)
    if job.rank() == 1:
        handler.score_function = lambda _: failing(own)()
        check_own(raised(lambda: fire(handler, times=2)), own)
    job.store_barrier()


@run_distributed(world_size=2)
def test_a_vote_that_the_others_do_not_come_to_ends_with_the_rank_s_own_error() -> None:
    own = OwnError("boom")

    def transform(_output: object) -> float:
        if trainer.state.iteration == 2 and job.rank() == 1:
            raise own
        return 0.0

    trainer = Engine(lambda _engine, _batch: None)
    handler = TerminateOnNan(output_transform=transform)
    handler.timeout_s = LIMIT_S
    trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    if job.rank() == 1:
        error = raised(lambda: trainer.run([0, 1], max_epochs=1))
        check_own(error, own)
    else:
        trainer.add_event_handler(Events.ITERATION_STARTED(once=2), job.store_barrier)
        raised(lambda: trainer.run([0, 1], max_epochs=1))
    if job.rank() == 1:
        job.store_barrier()


@run_distributed(world_size=2)
def test_a_phase_within_a_phase_is_raised_as_it_was() -> None:
    own = OwnError("boom")

    def inner() -> None:
        phases.run(current(), place("inner"), failing(own) if job.rank() == 1 else lambda: None)

    error = raised(lambda: phases.run(current(), place("outer"), inner))
    assert "outer" not in str(error)
    assert str(error).startswith("boom (OwnError on rank 1, while: test, inner")
    assert (error is not None and error.__cause__ is own) is (job.rank() == 1)
