"""Entry points in the manner of ignite's `idist`: the collectives that user code calls, on every backend."""

import math
from pathlib import Path

import pytest
import torch

import distckpt
from distckpt.backends.base import Backend, TensorOp
from tests.contracts.implementations import SEVERAL_RANKS, clause

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
OTHERS = (torch.bool, torch.complex64, torch.uint16, torch.float8_e4m3fn)
EXPECTED: dict[TensorOp, tuple[int, int]] = {"SUM": (6, 8), "PRODUCT": (6, 15), "MIN": (1, 3), "MAX": (3, 5)}
"""Of 1, 2 and 3; and of 3 and 5: for three ranks, and for two."""


def mine(backend: Backend) -> int:
    return {1: [3], 2: [3, 5], 3: [1, 2, 3]}[backend.world_size][backend.rank]


def expected(backend: Backend, op: TensorOp) -> int:
    return {1: 3, 2: EXPECTED[op][1], 3: EXPECTED[op][0]}[backend.world_size]


@pytest.mark.parametrize("op", EXPECTED)
@clause()
def test_numbers_are_reduced(backend: Backend, op: TensorOp) -> None:
    whole, real = distckpt.all_reduce(mine(backend), op), distckpt.all_reduce(float(mine(backend)), op)
    assert (whole, real) == (expected(backend, op), float(expected(backend, op)))
    assert (type(whole), type(real)) == (int, float)


@pytest.mark.parametrize("op", EXPECTED)
@pytest.mark.parametrize("dtype", [*FLOATS, *INTS], ids=str)
@clause()
def test_tensors_of_every_dtype_are_reduced(backend: Backend, op: TensorOp, dtype: torch.dtype) -> None:
    tensor = torch.full((2, 3), mine(backend), dtype=dtype, device=backend.device())
    result = distckpt.all_reduce(tensor, op)
    assert (result.dtype, result.shape, result.device) == (dtype, tensor.shape, tensor.device)
    assert result.cpu().eq(expected(backend, op)).all()
    assert tensor.cpu().eq(mine(backend)).all(), "what was given is left as it was"


@clause()
def test_complex_tensors_are_summed(backend: Backend) -> None:
    total = distckpt.all_reduce(torch.tensor([complex(1, backend.rank)], device=backend.device()))
    assert total.tolist() == [complex(backend.world_size, sum(range(backend.world_size)))]


@clause()
def test_bits_are_reduced(backend: Backend) -> None:
    everyones, nobodys = 0b1000, 0b0001
    tensor = torch.tensor([everyones | (2 if backend.rank == 0 else 0), nobodys & 0], device=backend.device())
    alone = backend.world_size == 1
    assert distckpt.all_reduce(tensor, "AND").tolist() == [everyones | (2 if alone else 0), 0]
    assert distckpt.all_reduce(tensor, "OR").tolist() == [everyones | 2, 0]


@clause()
def test_booleans_are_reduced(backend: Backend) -> None:
    only_first = torch.tensor([backend.rank == 0, True, False], device=backend.device())
    alone = backend.world_size == 1
    results: dict[TensorOp, list[bool]] = {"AND": [alone, True, False], "OR": [True, True, False]}
    for op, result in results.items():
        reduced = distckpt.all_reduce(only_first, op)
        assert reduced.dtype is torch.bool
        assert reduced.tolist() == result
    assert distckpt.all_reduce(only_first, "MIN").tolist() == [alone, True, False]
    assert distckpt.all_reduce(only_first, "MAX").tolist() == [True, True, False]
    assert distckpt.all_reduce(only_first, "SUM").tolist() == [True, True, False], "torch's own: any"


@clause()
def test_numbers_are_exact(backend: Backend) -> None:
    last = backend.rank == backend.world_size - 1
    for value in (0.1, 5e-324, math.pi * 1e300):
        assert distckpt.all_reduce(value if last else 0.0) == value
    for number in (2**24 + 1, 2**53 + 1, 2**63 - 1):
        assert distckpt.all_reduce(number if last else 0) == number


@clause()
def test_tensors_of_every_shape_are_reduced(backend: Backend) -> None:
    where = backend.device()
    assert distckpt.all_reduce(torch.tensor(1.0, device=where)).shape == ()
    assert distckpt.all_reduce(torch.empty(0, 3, device=where)).shape == (0, 3)
    skewed = torch.arange(6.0, device=where).reshape(2, 3).t()
    assert distckpt.all_reduce(skewed).tolist() == (skewed.cpu() * backend.world_size).tolist()
    parameter = torch.nn.Parameter(torch.ones(2, device=where))
    total = distckpt.all_reduce(parameter)
    assert total.tolist() == [backend.world_size] * 2
    assert not total.requires_grad


@clause()
def test_an_operation_that_the_dtype_does_not_have_leaves_the_ranks_together(backend: Backend) -> None:
    for real in (torch.ones(1, device=backend.device()), 1.0):
        with pytest.raises(TypeError, match="AND takes integers or booleans, but given"):
            distckpt.all_reduce(real, "AND")
    backend.barrier(timeout_s=5.0)


@clause()
def test_an_unknown_operation_is_refused(backend: Backend) -> None:
    with pytest.raises(ValueError, match=r"^Unsupported reduction operation: 'MEDIAN'"):
        distckpt.all_reduce(1, "MEDIAN")  # type: ignore[call-overload]
    backend.barrier()


@clause()
def test_what_is_no_number_is_not_reduced(backend: Backend) -> None:
    with pytest.raises(TypeError, match=r"^Unhandled input type <class 'str'>"):
        distckpt.all_reduce("text")  # type: ignore[call-overload]
    backend.barrier()


@clause()
def test_tensors_are_gathered_along_the_first_dimension(backend: Backend) -> None:
    size, where = backend.world_size, backend.device()
    rows = distckpt.all_gather(torch.full((2, 3), backend.rank, device=where))
    assert rows.shape == (2 * size, 3)
    assert rows.cpu()[:, 0].tolist() == [rank for rank in range(size) for _ in range(2)]
    assert distckpt.all_gather(torch.tensor(backend.rank * 0.1, device=where)).shape == (size,)
    flags = distckpt.all_gather(torch.tensor([backend.rank == 0], device=where))
    assert flags.tolist() == [True] + [False] * (size - 1)


@pytest.mark.parametrize("dtype", [*FLOATS, *INTS, *OTHERS], ids=str)
@clause()
def test_tensors_of_every_dtype_are_gathered_and_broadcast(backend: Backend, dtype: torch.dtype) -> None:
    mine_here = torch.tensor([[0, 1, backend.rank]], device=backend.device()).to(dtype)
    rows = distckpt.all_gather(mine_here)
    assert rows.dtype is dtype
    numbers = rows.cpu().to(torch.complex64).real.tolist()
    assert numbers == [[0, 1, min(rank, 1) if dtype is torch.bool else rank] for rank in range(backend.world_size)]
    received = distckpt.broadcast(mine_here, src=backend.world_size - 1)
    assert received.dtype is dtype
    assert received.cpu().to(torch.complex64).real.tolist() == numbers[-1:]


@clause()
def test_objects_are_gathered_in_a_list(backend: Backend) -> None:
    ranks, size = range(backend.world_size), backend.world_size
    assert distckpt.all_gather(backend.rank) == list(ranks)
    assert distckpt.all_gather(0.1) == [0.1] * size
    assert distckpt.all_gather(f"ß{backend.rank}") == [f"ß{rank}" for rank in ranks]
    assert distckpt.all_gather(None) == [None] * size
    assert distckpt.all_gather({"rank": (backend.rank,)}) == [{"rank": (rank,)} for rank in ranks]


@pytest.mark.parametrize("safe_mode", [False, True], ids=["plain", "safe_mode"])
@clause()
def test_every_rank_receives_the_sources_value(backend: Backend, *, safe_mode: bool) -> None:
    for src in range(backend.world_size):
        for value in (0.1, 2**53 + 1, "ßtext", Path("a/ß"), None, {"a": [1, None]}, True):
            given = value if backend.rank == src else type(value)() if value is not None else None
            received = distckpt.broadcast(given, src=src, safe_mode=safe_mode)
            assert received == value
            assert type(received) is type(value)


@pytest.mark.parametrize("safe_mode", [False, True], ids=["plain", "safe_mode"])
@clause()
def test_every_rank_receives_the_sources_tensor(backend: Backend, *, safe_mode: bool) -> None:
    for dtype in (torch.float64, torch.int64, torch.bool, torch.bfloat16):
        value = torch.tensor([[0, 1], [1, 0]], dtype=dtype, device=backend.device())
        given = value if backend.rank == 0 else torch.zeros_like(value)
        received = distckpt.broadcast(given, safe_mode=safe_mode)
        assert received.dtype is dtype
        assert torch.equal(received.cpu(), value.cpu())


@clause()
def test_safe_mode_lets_the_others_pass_anything(backend: Backend) -> None:
    last = backend.world_size - 1
    tensor = torch.tensor([0.1, 2.0], dtype=torch.float64, device=backend.device())
    for others in (None, "text", object(), torch.zeros(7)):
        received = distckpt.broadcast(tensor if backend.rank == last else others, src=last, safe_mode=True)
        assert torch.equal(received.cpu(), tensor.cpu())
        assert received.dtype is torch.float64
    given = "value" if backend.rank == last else torch.zeros(2)
    assert distckpt.broadcast(given, src=last, safe_mode=True) == "value"


@clause()
def test_a_source_outside_the_job_is_refused(backend: Backend) -> None:
    for safe_mode in (False, True):
        with pytest.raises(ValueError, match="src should be a rank of this job"):
            distckpt.broadcast(1, src=backend.world_size, safe_mode=safe_mode)
    distckpt.barrier()


@clause()
def test_a_function_runs_on_one_rank_only(backend: Backend) -> None:
    last = backend.world_size - 1

    @distckpt.one_rank_only(rank=last)
    def doubled(number: int, *, plus: int = 0) -> int:
        """Doc."""
        return 2 * number + plus

    assert doubled(4, plus=1) == (9 if backend.rank == last else None)
    assert (doubled.__name__, doubled.__doc__) == ("doubled", "Doc.")


@clause(SEVERAL_RANKS)
def test_ranks_wait_for_the_one_that_runs(backend: Backend, tmp_path: Path) -> None:
    @distckpt.one_rank_only(with_barrier=True)
    def write() -> None:
        (tmp_path / "done").touch()

    write()
    assert (tmp_path / "done").exists()
    backend.barrier()


@clause(SEVERAL_RANKS)
def test_ranks_do_not_wait_for_ever_for_one_that_raises(backend: Backend) -> None:
    @distckpt.one_rank_only(with_barrier=True)
    def fails() -> None:
        raise OSError("full")

    if backend.rank == 0:
        with pytest.raises(OSError, match="full"):
            fails()
    else:
        fails()
    backend.barrier()
