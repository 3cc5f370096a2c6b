"""Ranks of one machine vote through memory that they share; where one cannot, all do without."""

import os
import time
from typing import Any

import pytest
import torch

from distckpt import CollectiveError
from distckpt.backends.base import Backend
from distckpt.backends.control_group import SHARED_MEMORY_VARIABLE
from distckpt.backends.detect import current
from distckpt.backends.shared_memory import ROOM_BYTES
from distckpt.backends.torch_dist import TorchDistBackend
from tests.distributed.programs import gather, raised
from tests.support import fresh_ranks, job, run_distributed, run_ranks
from tests.support.selection import torch_only

pytestmark = torch_only

WORLDS = pytest.mark.parametrize("world_size", [2, 3])


def shares_memory() -> bool:
    backend = current()
    assert isinstance(backend, TorchDistBackend)
    return backend._control_group._memory is not None


def meet_often(without_it: list[int]) -> tuple[bool, list[list[int]]]:
    """Meet a hundred times with different numbers; some ranks are told to do without shared memory."""
    rank = job.rank()
    if rank in without_it:
        os.environ[SHARED_MEMORY_VARIABLE] = "0"
    try:
        backend = current()
        found = []
        for turn in range(100):
            begun = backend.start_sync_check("place", [turn * (rank + 1), rank, -turn], sequence=turn, timeout_s=20.0)
            if turn % 7 == rank:
                time.sleep(0.002)
            found.append(begun())
            if turn % 10 == 0:
                assert backend.gather_objects([turn, rank]) == [[turn, one] for one in range(backend.world_size)]
        return shares_memory(), found
    finally:
        os.environ.pop(SHARED_MEMORY_VARIABLE, None)


@WORLDS
@pytest.mark.parametrize("without_it", [[], [0], [1], [0, 1]])
def test_numbers_are_the_same_with_and_without_it(world_size: int, without_it: list[int]) -> None:
    results = run_ranks(meet_often, world_size, without_it)
    expected = [[turn * world_size, world_size - 1, -turn] for turn in range(100)]
    assert results == [(not without_it, expected)] * world_size


@run_distributed(world_size=2)
def test_a_meeting_that_is_given_up_before_its_end_does_no_harm_to_the_next() -> None:
    backend = current()
    backend.barrier()
    for turn in range(10):
        backend.start_sync_check("dropped", [turn], sequence=turn, timeout_s=20.0)
    assert backend.start_sync_check("kept", [job.rank()], timeout_s=20.0)() == [1]


@run_distributed(world_size=2)
def test_a_rank_that_leaves_the_job_is_named_at_once() -> None:
    backend = current()
    backend.barrier()
    gather(shares_memory())
    if job.rank() == 1:
        backend.close()
        return
    begin_s = time.monotonic()
    error = raised(lambda: backend.barrier(timeout_s=60.0))
    assert isinstance(error, CollectiveError)
    assert error.missing == (1,)
    assert time.monotonic() - begin_s < 10.0


def gather_with_one_missing(num_bytes: int) -> bool:
    backend = current()
    backend.barrier()
    assert shares_memory()
    if job.rank() == 2:
        return bool(gather("late"))
    error = raised(lambda: backend.gather_host(b"here", num_bytes, what="a gather", timeout_s=1.0))
    assert isinstance(error, CollectiveError)
    assert error.missing == (2,)
    return bool(gather("done"))


@pytest.mark.parametrize("num_bytes", [4, ROOM_BYTES, ROOM_BYTES + 1])
def test_who_is_missing_from_a_gathering_is_found_where_it_goes(num_bytes: int) -> None:
    """In the memory, or, where it is too long for that and goes over Gloo, not there."""
    assert run_ranks(gather_with_one_missing, 3, num_bytes) == [True] * 3


def gather_in_all_lengths() -> bool:
    """Gather, four times under a vote that is open meanwhile: the memory keeps four operations, and the next is one."""
    backend, rank = current(), job.rank()
    backend.barrier()
    assert shares_memory()
    over_gloo = told_of_gatherings_over_gloo()
    for turn, longest in enumerate([0, 1, 7, 100, ROOM_BYTES - 1, ROOM_BYTES, ROOM_BYTES + 1, 3 * ROOM_BYTES] * 5):
        lengths = [max(longest - 3 * abs(one - turn % backend.world_size), 0) for one in range(backend.world_size)]
        brought = [bytes([one + turn]) * length for one, length in enumerate(lengths)]
        vote = backend.start_sync_check("place", [turn + rank], sequence=turn, timeout_s=20.0)
        if turn % 5 == rank:
            time.sleep(0.003)
        before = len(over_gloo)
        for _ in range(4):
            assert backend.gather_host(brought[rank], longest, what="a gather", timeout_s=20.0) == brought
        assert len(over_gloo) - before == (0 if longest <= ROOM_BYTES else 4)
        assert vote() == [turn + backend.world_size - 1]
    return True


def told_of_gatherings_over_gloo() -> list[int]:
    backend = current()
    assert isinstance(backend, TorchDistBackend)
    transport, told = backend._control_group._transport, []
    gather = transport.gather

    def gather_and_tell(result: Any, mine: Any, timeout_s: float) -> Any:
        told.append(mine.numel())
        return gather(result, mine, timeout_s)

    transport.gather = gather_and_tell  # type: ignore[method-assign]
    return told


@WORLDS
def test_what_is_gathered_is_what_each_rank_brought(world_size: int) -> None:
    assert run_ranks(gather_in_all_lengths, world_size) == [True] * world_size


@WORLDS
def test_a_slow_rank_finds_a_vote_that_others_have_left_behind_them(world_size: int) -> None:
    assert run_ranks(vote_while_much_goes_over_gloo, world_size) == [True] * world_size


def vote_while_much_goes_over_gloo() -> bool:
    backend, rank = current(), job.rank()
    backend.barrier()
    assert shares_memory()
    for turn in range(3):
        vote = backend.start_sync_check("place", [rank], sequence=turn, timeout_s=20.0)
        for number in range(3):  # the fourth operation after the vote takes its place
            values = torch.tensor([number + rank])
            assert backend.reduce_host(values, "MAX", what="one", timeout_s=20.0).item() == number + rank_above(backend)
        if rank == 1:
            time.sleep(0.2)
        assert backend.gather_host(b"x", 1, what="a gather", timeout_s=20.0) == [b"x"] * backend.world_size
        assert vote() == [rank_above(backend)]
    return True


def rank_above(backend: Backend) -> int:
    return backend.world_size - 1


def fail_in_a_vote_that_a_gathering_ends() -> bool:
    backend = current()
    backend.barrier()
    assert shares_memory()
    if job.rank() == 1:
        return bool(gather("late"))
    vote = backend.start_sync_check("place", [5], timeout_s=0.5)
    assert isinstance(raised(lambda: backend.gather_host(b"x", 1, what="a gather", timeout_s=20.0)), CollectiveError)
    assert isinstance(raised(vote), CollectiveError), "this rank's own numbers are no result"
    return bool(gather("done"))


def test_a_vote_that_failed_when_another_operation_had_to_begin_has_no_result() -> None:
    assert run_ranks(fail_in_a_vote_that_a_gathering_ends, 2) == [True] * 2


def die_before(operation: str, victim: int) -> tuple[str, object, bool]:
    backend = current()
    backend.barrier()
    assert shares_memory()
    if job.rank() == victim:
        os._exit(3)
    begin_s = time.monotonic()
    if operation == "vote":
        error = raised(lambda: backend.barrier(timeout_s=60.0))
    else:
        error = raised(lambda: backend.gather_host(b"x", 1, what="a gather", timeout_s=60.0))
    return type(error).__name__, getattr(error, "missing", None), time.monotonic() - begin_s < 10.0


@pytest.mark.parametrize("operation", ["vote", "gathering"])
@pytest.mark.parametrize("victim", [1, 2])
def test_a_rank_that_dies_is_noticed_at_once(operation: str, victim: int) -> None:
    with fresh_ranks(die_before, 3, operation, victim) as ranks:
        ends = ranks.finish(may_fail=[victim])
    assert ends[victim].exit_code == 3
    for rank in {0, 1, 2} - {victim}:
        assert ends[rank].value == ("CollectiveError", (victim,), True)
