"""Contract of `Backend`: host values travel beside the job's own collectives and never pair with them."""

import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine

import distckpt
from distckpt import CollectiveTimeout
from distckpt.backends.base import Backend
from distckpt.backends.detect import current
from tests.contracts.implementations import SEVERAL_RANKS, clause
from tests.support import job, run_distributed
from tests.support.selection import only_on, torch_only


@only_on("gloo", "horovod", why="a reduction that is begun, and waited for later: torch_xla has none")
@clause(SEVERAL_RANKS)
def test_host_values_pass_while_the_jobs_reduction_is_in_flight(backend: Backend) -> None:
    for step in range(10):
        gradient = torch.full((1000,), float(backend.rank + step), device=backend.device())
        if backend.rank == 0:  # starts its reduction before the vote, the others after it
            finish = job.start_all_reduce(gradient)
            assert backend.all_reduce_ints([step], "MAX") == [step]
            total = finish()
        else:
            assert backend.all_reduce_ints([step], "MAX") == [step]
            total = job.all_reduce(gradient)
        expected = float(sum(rank + step for rank in range(backend.world_size)))
        assert total.cpu().eq(expected).all()


@torch_only
@clause(SEVERAL_RANKS)
def test_ranks_that_made_different_numbers_of_groups_still_meet(backend: Backend) -> None:
    if backend.rank == 1:
        for _ in range(3):
            dist.new_group([1], use_local_synchronization=True)
    assert backend.gather_objects(backend.rank) == list(range(backend.world_size))


@clause(SEVERAL_RANKS)
def test_jobs_group_works_on_after_ours_was_given_up(backend: Backend) -> None:
    backend.barrier()
    if backend.rank == 0:
        with pytest.raises(CollectiveTimeout):
            backend.barrier(timeout_s=0.25)
    assert job.all_reduce(torch.ones(1, device=backend.device())).item() == backend.world_size


@run_distributed(world_size=2)
def test_one_rank_alone_may_build_every_handler(tmp_path: Path) -> None:
    trainer = Engine(lambda _engine, _batch: None)
    backend = current()
    if backend.rank == 1:  # not the coordinator: it looks at the directory and leaves it alone
        model = torch.nn.Linear(1, 1)
        saver = distckpt.DiskSaver(tmp_path / "saver", create_dir=True)
        distckpt.Checkpoint({"model": model}, saver, score_name="accuracy", include_self=True)
        distckpt.Checkpoint({"model": model}, tmp_path / "checkpoints", n_saved=None)
        distckpt.ModelCheckpoint(tmp_path / "models", "best")
        distckpt.EarlyStopping(3, lambda _engine: 0.0, trainer).attach(trainer)
        distckpt.TerminateOnNan()
        distckpt.TimeLimit(10)
        distckpt.Timer().attach(trainer)
        distckpt.global_step_from_engine(trainer)
        assert isinstance(current(), type(backend))
        assert not backend._control_group._is_formed, "a constructor has formed the group"  # type: ignore[attr-defined]
    total = job.all_reduce(torch.ones(1, device=job.device()))  # would pair with a constructor's collective
    assert total.item() == 2
    assert list(tmp_path.iterdir()) == []
    backend.barrier()


@clause()
def test_tickets_number_the_objects_of_a_kind(backend: Backend) -> None:
    tickets = [backend.next_object_id(kind) for kind in ("Checkpoint", "Checkpoint", "TimeLimit")]
    if backend.world_size == 1 and backend.name == "serial":
        assert tickets == [None] * 3
    else:
        assert tickets == ["Checkpoint#0", "Checkpoint#1", "TimeLimit#0"]


@clause()
def test_the_roll_is_called_without_a_collective(backend: Backend) -> None:
    assert backend.store_barrier("the first event of Checkpoint#0", depends_on=None, timeout_s=10.0) is None
    assert backend.store_barrier("the first event of Checkpoint#1", depends_on="a ticket", timeout_s=10.0) is None


@clause(SEVERAL_RANKS)
def test_ranks_missing_from_the_roll_are_named(backend: Backend) -> None:
    if backend.rank == 0:
        absent = tuple(range(1, backend.world_size))
        with pytest.raises(CollectiveTimeout, match=r"waited 0\.25 s for the first event of TimeLimit#0") as caught:
            backend.store_barrier("the first event of TimeLimit#0", depends_on=None, timeout_s=0.25)
        assert caught.value.missing == absent


@clause(SEVERAL_RANKS)
def test_a_rank_that_answers_the_roll_twice_does_not_stand_for_two(backend: Backend) -> None:
    if backend.rank == 0:
        for _ in range(3):
            with pytest.raises(CollectiveTimeout) as caught:
                backend.store_barrier("the first event of TimeLimit#0", depends_on=None, timeout_s=0.25)
            assert caught.value.missing == tuple(range(1, backend.world_size))


@clause(SEVERAL_RANKS)
def test_a_note_ends_the_roll_on_ranks_that_watch_for_it(backend: Backend) -> None:
    if backend.rank == 0:
        thread = threading.Thread(target=backend.post_note, args=("DiskSaver#0", "über full"))
        thread.start()
        thread.join()
    else:
        news = backend.store_barrier("the first event of Checkpoint#0", depends_on="DiskSaver#0", timeout_s=10.0)
        assert news == "über full"


@clause(SEVERAL_RANKS)
def test_a_note_about_something_else_is_not_heard(backend: Backend) -> None:
    store = job.store()
    if backend.rank == 0:
        backend.post_note("DiskSaver#1", "not about yours")
        store.set("posted", "1")
    store.wait(["posted"], timedelta(seconds=10))
    assert backend.store_barrier("the first event of Checkpoint#0", depends_on="DiskSaver#0", timeout_s=10.0) is None
