"""Contract of `Backend`: small objects come to every rank equal to what was sent, in value and in type."""

import enum
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distckpt.backends import wire
from distckpt.backends.base import Backend
from tests.contracts.implementations import SEVERAL_RANKS, clause
from tests.support.equality import equal

BIG = 2**53 + 1
TEXT = "naïve Ünïcödé, 検査点, \N{PARTY POPPER}, \0, \ud800, \n"


class Colour(enum.IntEnum):
    RED = 3


OBJECTS: dict[str, object] = {
    "None": None,
    "booleans": [True, False],
    "text": TEXT,
    "empty": ["", b"", [], {}, ()],
    "ints": [0, -1, BIG, -BIG, 2**63 - 1, -(2**63), 2**64, 10**100],
    "floats": [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 2.0**53 + 2, math.nextafter(1.0, 2.0)],
    "infinities": [math.inf, -math.inf],
    "complex": [1j, complex(0.1, -0.0)],
    "bytes": bytes(range(256)),
    "tuples": (1, (2, (3,)), [4, (5,)]),
    "sets": [{1, 2, 3}, frozenset({"a"})],
    "nested": {"a": {"ß": [None, {"deep": (0.1, BIG)}]}, "list": [[[]]]},
    "keys": {1: "int", None: "none", (1, 2): "tuple", 0.5: "float", "$": "mark", b"b": 0},
    "like our marks": {"$": "tuple", "v": [1, 2]},
    "path": Path("some/where ß"),
}


@pytest.mark.parametrize("kind", OBJECTS)
@clause()
def test_every_rank_receives_an_equal_object(backend: Backend, kind: str) -> None:
    value = OBJECTS[kind]
    for src in range(backend.world_size):
        received = backend.broadcast_object(value if backend.rank == src else "ignored", src)
        assert equal(received, value)
    assert equal(backend.gather_objects(value), [value] * backend.world_size)


@clause()
def test_nan_arrives_as_nan(backend: Backend) -> None:
    received = backend.broadcast_object({"score": [math.nan]})
    assert math.isnan(received["score"][0])
    assert all(math.isnan(value) for value in backend.gather_objects(math.nan))


@clause()
def test_objects_are_gathered_in_rank_order(backend: Backend) -> None:
    mine = {"rank": backend.rank, "square": backend.rank**2}
    ranks = range(backend.world_size)
    assert backend.gather_objects(mine) == [{"rank": rank, "square": rank**2} for rank in ranks]


@clause()
def test_objects_of_all_sizes_are_gathered_together(backend: Backend) -> None:
    sizes = [0, 1_000_000, 3][: backend.world_size]
    received = backend.gather_objects(bytes([backend.rank]) * sizes[backend.rank])
    assert received == [bytes([rank]) * size for rank, size in enumerate(sizes)]


@clause(SEVERAL_RANKS)
def test_bytes_are_gathered_only_where_they_differ(backend: Backend) -> None:
    gathered: list[bytes] = []
    gather = backend.gather_host

    def count(data: bytes, num_bytes: int, **kwargs: Any) -> list[bytes]:
        gathered.append(data)
        return gather(data, num_bytes, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "gather_host", count)
        for data in (b"", b"x", b"y" * 10_000):
            assert backend.gather_in_sync("equal", data, timeout_s=None) == [data] * backend.world_size
        assert not gathered
        last = backend.world_size - 1
        found = backend.gather_in_sync("one differs", b"b" if backend.rank == last else b"a", timeout_s=None)
        assert found == [b"a"] * last + [b"b"]
        assert len(gathered) == 1


@clause()
def test_a_megabyte_of_text_is_broadcast(backend: Backend) -> None:
    text = "検" * 350_000
    assert backend.broadcast_object(text if backend.rank == 0 else None) == text


@clause()
def test_objects_of_different_types_are_gathered_together(backend: Backend) -> None:
    mine: list[object] = [None, "text", [1.5, {"a": b"b"}]]
    assert backend.gather_objects(mine[backend.rank]) == mine[: backend.world_size]


@clause()
def test_tensors_keep_dtype_shape_and_bits(backend: Backend) -> None:
    tensors = [
        torch.tensor([0.1, float("-inf"), 5e-324], dtype=torch.float64),
        torch.tensor([[1, 2], [3, 4]], dtype=torch.int64) * 2**60,
        torch.tensor(0.1, dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.empty(0, 3),
        torch.arange(6).reshape(2, 3).t(),
    ]
    for tensor in tensors:
        received = backend.broadcast_object(tensor if backend.rank == 0 else None)
        assert (received.dtype, received.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(received, tensor)


@clause()
def test_numpys_scalars_and_subclasses_arrive_as_pythons_own(backend: Backend) -> None:
    received = backend.broadcast_object([np.float64(0.1), np.int64(BIG), np.bool_(1), Colour.RED])
    assert equal(received, [0.1, BIG, True, 3])
    assert equal(backend.broadcast_object(OrderedDict(b=1, a=2)), {"b": 1, "a": 2})


@clause()
def test_an_object_that_cannot_be_sent_is_a_type_error_on_every_rank(backend: Backend) -> None:
    culprit = backend.world_size - 1
    mine = {"fine": 1, "not": object()} if backend.rank == culprit else {"fine": 1}
    with pytest.raises(TypeError, match=f"rank {culprit}: cannot send <class 'object'>"):
        backend.gather_objects(mine)
    with pytest.raises(TypeError, match="cannot send <class 'object'>"):
        backend.broadcast_object(mine, src=culprit)
    assert backend.gather_objects(1) == [1] * backend.world_size, "the ranks are together still"


@clause(SEVERAL_RANKS)
def test_every_rank_that_cannot_send_is_named(backend: Backend) -> None:
    with pytest.raises(TypeError) as caught:
        backend.gather_objects(lambda: None)
    assert [f"rank {rank}: " in str(caught.value) for rank in range(backend.world_size)] == [True] * backend.world_size


@clause(SEVERAL_RANKS)
def test_what_the_other_ranks_bring_to_a_broadcast_is_ignored(backend: Backend) -> None:
    mine = "the value" if backend.rank == 1 else object()
    assert backend.broadcast_object(mine, src=1) == "the value"


@clause()
def test_a_source_that_the_job_does_not_have_is_refused_on_every_rank(backend: Backend) -> None:
    for src in (-1, backend.world_size):
        with pytest.raises(ValueError, match="src should be a rank of this job"):
            backend.broadcast_object("value", src)
    backend.barrier()


@clause()
def test_a_received_object_is_a_copy(backend: Backend) -> None:
    mine = [1, [2]]
    received = backend.broadcast_object(mine)
    received[1].append(3)
    assert mine == [1, [2]]


def test_an_unknown_mark_executes_nothing() -> None:
    for data in (b'{"$":"system","v":"true"}', b'{"$":"tensor","v":"","dtype":"load","shape":[0]}'):
        with pytest.raises((KeyError, TypeError)):
            wire.decode(data)
