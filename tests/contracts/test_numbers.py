"""Contract of `Backend`: small vectors of numbers, reduced to the same bits on every rank."""

import math
import struct

import pytest
import torch

from distckpt.backends.base import Backend, ReduceOp
from tests.contracts.implementations import EVERY, SEVERAL_RANKS, clause

LARGEST, SMALLEST = 2**63 - 1, -(2**63)
SUBNORMAL = 5e-324
OPS: tuple[ReduceOp, ...] = ("SUM", "MIN", "MAX")


def bits(values: list[float]) -> list[bytes]:
    return [struct.pack("<d", value) for value in values]


def reduce_floats(backend: Backend, values: list[float], op: ReduceOp = "SUM") -> list[float]:
    mine = torch.tensor(values, dtype=torch.float64)
    result: list[float] = backend.reduce_host(mine, op, what="floats", timeout_s=None).tolist()
    return result


def is_any(backend: Backend, flag: bool) -> bool:  # noqa: FBT001 - the value is the vote
    return backend.check_in_sync("any", [int(flag)], timeout_s=None) == [1]


def is_all(backend: Backend, flag: bool) -> bool:  # noqa: FBT001
    return backend.check_in_sync("all", [int(not flag)], timeout_s=None) == [0]


@clause()
def test_ints_are_exact_up_to_64_bits(backend: Backend) -> None:
    last = backend.world_size - 1
    mine = [2**53 + 1, LARGEST, SMALLEST, -1] if backend.rank == last else [0, 0, 0, 0]
    assert backend.all_reduce_ints(mine, "SUM") == [2**53 + 1, LARGEST, SMALLEST, -1]


@clause()
def test_smallest_and_largest_int_of_all_ranks(backend: Backend) -> None:
    rank, last = backend.rank, backend.world_size - 1
    mine = [rank, -rank, LARGEST - rank, SMALLEST + rank, 2**53 + rank]
    assert backend.all_reduce_ints(mine, "MAX") == [last, 0, LARGEST, SMALLEST + last, 2**53 + last]
    assert backend.all_reduce_ints(mine, "MIN") == [0, -last, LARGEST - last, SMALLEST, 2**53]


@clause()
def test_sum_is_the_default(backend: Backend) -> None:
    assert backend.all_reduce_ints([1, backend.rank]) == [backend.world_size, sum(range(backend.world_size))]
    assert reduce_floats(backend, [0.5]) == [0.5 * backend.world_size]


@pytest.mark.parametrize("op", OPS)
@clause()
def test_a_float_that_one_rank_brings_keeps_its_bits(backend: Backend, op: ReduceOp) -> None:
    values = [0.1, 1 / 3, SUBNORMAL, 2.0**-1074 * 3, 1.7976931348623157e308, math.nextafter(1.0, 2.0), 2.0**53 + 2]
    neutral = {"SUM": 0.0, "MIN": math.inf, "MAX": -math.inf}[op]
    mine = values if backend.rank == backend.world_size - 1 else [neutral] * len(values)
    assert bits(reduce_floats(backend, mine, op)) == bits(values)


@clause()
def test_infinities_pass(backend: Backend) -> None:
    assert reduce_floats(backend, [math.inf, -math.inf], "SUM") == [math.inf, -math.inf]
    assert reduce_floats(backend, [math.inf if backend.rank == 0 else 0.0], "MAX") == [math.inf]


@clause()
def test_a_sum_of_floats_has_the_same_bits_on_every_rank(backend: Backend) -> None:
    mine = [0.1 * (backend.rank + 1), 1e16 * (-1) ** backend.rank, 1.0 / (backend.rank + 3)]
    total = reduce_floats(backend, mine)
    everybodys = backend.gather_objects([value.hex() for value in total])
    assert everybodys == [[value.hex() for value in total]] * backend.world_size


@clause()
def test_results_are_plain_numbers(backend: Backend) -> None:
    (whole,), (real,) = backend.all_reduce_ints([3], "MAX"), reduce_floats(backend, [3.0], "MAX")
    assert (type(whole), type(real)) == (int, float)


@clause()
def test_an_empty_vector_stays_empty(backend: Backend) -> None:
    assert backend.all_reduce_ints([]) == []
    assert reduce_floats(backend, []) == []


@clause()
def test_a_long_vector_is_reduced_element_by_element(backend: Backend) -> None:
    size, rank = backend.world_size, backend.rank
    mine = [rank * 100_000 + index for index in range(10_000)]
    assert backend.all_reduce_ints(mine, "MIN") == list(range(10_000))
    assert backend.all_reduce_ints(mine, "MAX") == [(size - 1) * 100_000 + index for index in range(10_000)]


@clause()
def test_what_is_reduced_is_left_as_it_was(backend: Backend) -> None:
    mine = torch.tensor([backend.rank, 7], dtype=torch.int64)
    result = backend.reduce_host(mine, "SUM", what="a test", timeout_s=None)
    assert mine.tolist() == [backend.rank, 7]
    assert result.dtype is torch.int64
    assert result.data_ptr() != mine.data_ptr()


@clause()
def test_a_number_that_does_not_fit_is_refused_before_anybody_is_asked(backend: Backend) -> None:
    with pytest.raises((OverflowError, RuntimeError, ValueError)):
        backend.all_reduce_ints([2**63])
    backend.barrier()  # the ranks are together still


@clause()
def test_any_and_all_of_the_ranks(backend: Backend) -> None:
    everyone, nobody = [True] * backend.world_size, [False] * backend.world_size
    for same in (True, False):
        assert (is_any(backend, same), is_all(backend, same)) == (same, same)
    for one in range(backend.world_size):
        only_one = [rank == one for rank in range(backend.world_size)]
        assert is_any(backend, only_one[backend.rank]) is True
        assert is_all(backend, only_one[backend.rank]) is (only_one == everyone)
        assert is_any(backend, not only_one[backend.rank]) is ([not flag for flag in only_one] != nobody)
        assert is_all(backend, not only_one[backend.rank]) is False


@clause(SEVERAL_RANKS)
def test_many_reductions_in_a_row_keep_their_order(backend: Backend) -> None:
    for number in range(200):
        assert backend.all_reduce_ints([number], "MAX") == [number]


@clause(EVERY)
def test_barrier_returns_once_every_rank_has_come(backend: Backend) -> None:
    for _ in range(3):
        backend.barrier()
