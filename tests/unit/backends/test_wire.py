"""Small values to bytes and back: equal in value, type and bits; never by executing code."""

import enum
import json
import math
from collections import OrderedDict, namedtuple
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distckpt.backends import wire
from tests.support.equality import equal

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex32,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)
KEYS = st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.binary(), st.tuples(st.integers(), st.text()))
LEAVES = st.one_of(KEYS, st.floats(), st.complex_numbers(), st.frozensets(KEYS), st.sets(st.integers()))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(KEYS, inner), st.dictionaries(st.text(), inner)
    ),
    max_leaves=20,
)


class Colour(enum.IntEnum):
    RED = 3


Pair = namedtuple("Pair", "first second")  # noqa: PYI024 - an untyped one is what users send


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def returned(value: Any) -> Any:
    return wire.decode(wire.encode(value))


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        [True, 1, 1.0],
        [2**53 - 1, 2**53 + 1, -(2**53) - 1, 2**70, 0, -1],
        [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, 2.0**53 + 2],
        [0.0, -0.0, math.nan, math.inf, -math.inf],
        ["", "naïve 検査点 \N{PARTY POPPER}", "\0\n\u2028", "\ud800", "a\udfffb", "\udc00\ud800", "\\ud800", "NaN"],
        [b"", bytes(range(256))],
        [0j, complex(-0.0, math.nan), complex(math.inf, 0.1)],
        (1, (2, ()), [3, (4,)]),
        [set(), {1, 2}, frozenset(), frozenset({"a", 1, None, (1, 2)})],
        {},
        {"a": {"b": {"c": [None, {"d": ()}]}}},
        {1: "int", None: "none", "1": "text", (1, 2): "tuple", 0.5: 0, b"b": 1, frozenset({1}): 2},
        {"$": 1},
        {"$": "tuple", "v": [1, 2]},
        {"$": "tensor", "v": "", "dtype": "float32", "shape": [0]},
        {"x": {"$": None}},
        {"$$": {"$": {"$": "$"}}},
        {"b": 1, "a": 2},
        [Path("a/ß"), Path(), Path("/")],
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_value_comes_back_equal(value: object) -> None:
    assert equal(returned(value), value)
    assert equal(returned([value]), [value])
    assert equal(returned({"k": value}), {"k": value})


@given(VALUES)
def test_any_nesting_comes_back_equal(value: object) -> None:
    assert equal(returned(value), value)


@given(st.one_of(st.integers(), st.floats(), st.text(st.characters())))
def test_encoding_is_ascii_and_plain_json(value: object) -> None:
    json.loads(wire.encode(value).decode("ascii"))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (0,), (2, 0, 3)], ids=str)
def test_tensor_comes_back_with_dtype_shape_and_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    high = 2 if dtype is torch.bool else 256
    data = torch.randint(0, high, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    tensor = data.view(dtype).reshape(shape)
    other = returned(tensor)
    assert (other.dtype, other.shape, other.device) == (dtype, tensor.shape, torch.device("cpu"))
    assert raw(other) == raw(tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).T,
        torch.arange(12)[::3],
        torch.ones(1).expand(5),
        torch.arange(8.0).reshape(2, 2, 2).permute(2, 0, 1),
        torch.tensor([1 + 2j, 3 - 4j]).conj(),
        torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        torch.ones(3, requires_grad=True),
        torch.nn.Parameter(torch.ones(2)),
        torch.arange(10)[3:5],
    ],
    ids=["transposed", "strided", "expanded", "permuted", "conjugated", "negated", "grad", "parameter", "slice"],
)
def test_view_of_a_tensor_is_sent_as_what_it_shows(tensor: torch.Tensor) -> None:
    other = returned(tensor)
    assert torch.equal(other, tensor.detach())
    assert not other.requires_grad


def test_small_slice_of_a_large_tensor_stays_small() -> None:
    assert len(wire.encode(torch.zeros(10_000)[:2])) < 200


def test_returned_tensor_can_be_written_to() -> None:
    other = returned(torch.zeros(3))
    other += 1
    assert other.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float64(0.1), 0.1),
        (np.float32(0.1), float(np.float32(0.1))),
        (np.int64(2**63 - 1), 2**63 - 1),
        (np.uint64(2**64 - 1), 2**64 - 1),
        (np.bool_(True), True),  # noqa: FBT003 - NumPy's bool is the point
        (np.complex128(1j), 1j),
        (np.str_("ß"), "ß"),
        (np.bytes_(b"b"), b"b"),
        (Colour.RED, 3),
        (bytearray(b"ab"), b"ab"),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (Pair(1, 2), (1, 2)),
        ({np.int32(1): np.float64(2)}, {1: 2.0}),
        ({"$": np.float64(2), Colour.RED: [np.int8(1)]}, {"$": 2.0, 3: [1]}),
    ],
    ids=repr,
)
def test_subclasses_and_numpy_scalars_come_back_as_pythons_own(value: object, plain: object) -> None:
    assert equal(returned(value), plain)


class Own:
    pass


@pytest.mark.parametrize(
    "value",
    [
        *(Own(), Own, len, range(3), Decimal(1), np.zeros(2), memoryview(b""), PurePosixPath("a"), iter([])),
        *(np.longdouble(0.5), np.clongdouble(1j), np.datetime64(1, "ns"), np.void(b"ab")),  # no Python type holds them
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_types_are_refused_and_named(value: object) -> None:
    for holder in (value, [value], {"k": (value,)}):
        with pytest.raises(TypeError) as caught:
            wire.encode(holder)
        assert str(type(value)) in str(caught.value)


@pytest.mark.parametrize("dtype", ["load", "os", "__class__", "Tensor", "float32x"], ids=lambda name: f"torch.{name}")
def test_only_dtypes_are_looked_up_in_torch(dtype: str) -> None:
    with pytest.raises(TypeError, match="no such dtype"):
        wire.decode(json.dumps({"$": "tensor", "v": "", "dtype": dtype, "shape": []}).encode())


@pytest.mark.parametrize("data", [b"", b"\x80\x04N.", b"cos\nsystem\n", b"__import__('os')", b'{"$":"eval","v":"1"}'])
def test_what_is_not_its_own_encoding_is_an_error(data: bytes) -> None:
    with pytest.raises((ValueError, KeyError)):
        wire.decode(data)
