"""A handler that one rank alone has: nothing hangs at its construction, and its first event says who lacks it.

The fault of ignite's handlers: the constructor asks for the rank, which starts collectives, which hang the job.
"""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from ignite.engine import Engine
from torch.distributed import distributed_c10d as c10d

from distckpt import Checkpoint, CollectiveTimeout, EarlyStopping, TerminateOnNan, TimeLimit
from distckpt.backends.detect import current
from tests.distributed.idist import fresh_idist
from tests.distributed.programs import (
    HANG_LIMIT_S,
    HUNG,
    IGNITE,
    OURS,
    fire,
    gather,
    handlers,
    idle_engine,
    model_of,
    training_step,
    unless_hung,
    warm_up,
)
from tests.support import job, run_distributed, run_ranks
from tests.support.runtime import RUNTIME

WORLDS = pytest.mark.parametrize("world_size", [2, 3])
TIMEOUT_S = 0.5


def built_on_rank_0_alone(library: str) -> str:
    """Build a handler on rank 0, then train on all ranks."""
    lib = handlers(library)
    limit = c10d.default_pg_timeout
    c10d.default_pg_timeout = timedelta(seconds=HANG_LIMIT_S)  # of the group that ignite makes

    def run() -> str:
        if job.rank() == 0:
            lib.EarlyStopping(3, lambda _: 0.0, idle_engine())
        return f"trained with a gradient of {training_step():g}"

    try:
        with fresh_idist():
            return unless_hung(run)
    finally:
        c10d.default_pg_timeout = limit


def test_ignites_constructor_hangs_the_job() -> None:
    warm_up(2)
    ends = run_ranks(built_on_rank_0_alone, 2, IGNITE, collective_timeout_s=HANG_LIMIT_S)
    assert ends == [HUNG, HUNG]


@WORLDS
def test_a_constructor_disturbs_nobody(world_size: int) -> None:
    ends = run_ranks(built_on_rank_0_alone, world_size, OURS)
    assert ends == [f"trained with a gradient of {world_size}"] * world_size


def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint({"model": model_of(1.0)}, folder, timeout_s=TIMEOUT_S)


def early_stopping(_folder: Path) -> EarlyStopping:
    return EarlyStopping(2, lambda _: 0.0, idle_engine(), timeout_s=TIMEOUT_S)


def terminate_on_nan(_folder: Path) -> TerminateOnNan:
    return TerminateOnNan(timeout_s=TIMEOUT_S)


def time_limit(_folder: Path) -> TimeLimit:
    return TimeLimit(10, timeout_s=TIMEOUT_S)


KINDS: list[Callable[[Path], Callable[[Engine], None]]] = [checkpoint, early_stopping, terminate_on_nan, time_limit]


@pytest.mark.parametrize("build", KINDS)
@run_distributed(world_size=2)
def test_first_event_names_the_rank_that_lacks_the_handler(
    tmp_path: Path, build: Callable[[Path], Callable[[Engine], None]]
) -> None:
    handler = build(tmp_path)
    if job.rank() == 0:
        name = type(handler).__name__
        with pytest.raises(CollectiveTimeout, match=f"the first event of {name}#0, but rank 1 did not come") as caught:
            fire(handler)
        assert caught.value.missing == (1,)
        assert "Handlers have to be built and attached on all ranks" in str(caught.value)
    job.barrier()
    assert list(tmp_path.iterdir()) == []


@run_distributed(world_size=3)
def test_every_rank_that_lacks_the_handler_is_named(tmp_path: Path) -> None:
    handler = checkpoint(tmp_path)
    if RUNTIME == "horovod":  # rank 0 keeps the notes there: without it nothing is known of others
        current().barrier()
    if job.rank() == 1:
        with pytest.raises(CollectiveTimeout, match="ranks 0, 2 did not come") as caught:
            fire(handler)
        assert caught.value.missing == (0, 2)


@run_distributed(world_size=3)
def test_both_ranks_that_have_the_handler_name_the_third(tmp_path: Path) -> None:
    handler = checkpoint(tmp_path)
    handler.timeout_s = 1.5
    job.barrier()
    if job.rank() != 2:
        with pytest.raises(CollectiveTimeout) as caught:
            fire(handler)
        assert caught.value.missing == (2,)


@run_distributed(world_size=2, env={"DISTCKPT_TIMEOUT_S": "0.75"})
def test_limit_of_the_environment_holds_where_none_is_given() -> None:
    if job.rank() == 0:
        with pytest.raises(CollectiveTimeout, match=r"waited 0\.75 s for the first event of TimeLimit#0"):
            fire(TimeLimit(10))


@run_distributed(world_size=2)
def test_a_second_event_says_it_again(tmp_path: Path) -> None:
    handler = checkpoint(tmp_path)
    if job.rank() == 0:
        for _ in range(2):
            with pytest.raises(CollectiveTimeout, match="rank 1 did not come"):
                handler(idle_engine())
    job.barrier()


@run_distributed(world_size=2)
def test_handlers_that_are_attached_on_both_ranks_meet(tmp_path: Path) -> None:
    """What one rank builds beside them, and never attaches, does not matter."""
    if job.rank() == 1:
        checkpoint(tmp_path / "never attached")
        terminate_on_nan(tmp_path)
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path / "attached")
    fire(handler)
    assert gather(handler.last_checkpoint) == [tmp_path / "attached" / "model_1.pt"] * 2
