"""A run that was interrupted and is never taken up again is no failure of its rank."""

import gc

from ignite.engine import Engine, Events

from distckpt import Checkpoint, TerminateOnNan
from tests.distributed.failures import Stateful
from tests.support import job, run_distributed
from tests.support.selection import process_ranks_only
from tests.unit.toys import InMemory

pytestmark = process_ranks_only


def trainer_that_votes() -> Engine:
    """Return an engine whose handlers vote in each iteration."""
    trainer = Engine(lambda _engine, _batch: 0.5)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(timeout_s=10))
    return trainer


def interrupted() -> Engine:
    """Return one whose run was interrupted in its second iteration."""
    trainer = trainer_that_votes()
    with trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda engine: engine.interrupt()):
        trainer.run([0] * 4)
    assert trainer.state.iteration == 2
    return trainer


@run_distributed(world_size=2)
def test_an_interrupted_engine_that_is_thrown_away_on_one_rank_is_not_taken_for_an_error() -> None:
    trainer: Engine | None = interrupted()
    job.store_barrier()
    if job.rank() == 0:
        trainer = None
        gc.collect()
    job.store_barrier()
    assert trainer_that_votes().run([0] * 3).iteration == 3
    assert (trainer is None) == (job.rank() == 0)


@run_distributed(world_size=2)
def test_a_run_that_begins_anew_after_an_interrupt_votes_and_saves() -> None:
    trainer, kept = interrupted(), InMemory()
    trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint({"obj": Stateful()}, kept, timeout_s=10))
    trainer.state.max_epochs = None  # ignite takes the run up again otherwise
    trainer.run([1] * 3, max_epochs=1)
    assert trainer.state.iteration == 3
    assert list(kept.files) == ["obj_3.pt"]
    job.store_barrier()
