"""Attributes are compared with known values, with native code and without. Also runs on installed wheels."""

import random
from array import array
from typing import Any

import pytest
import torch

from distckpt import _compare

BUILT: Any = vars(_compare)["_native"]
WAYS = {"as built": BUILT, "no extension": None}


@pytest.fixture(params=WAYS, autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run each test with the native code that is here, and without any."""
    monkeypatch.setattr(_compare, "_native", WAYS[request.param])
    return str(request.param)


def row_of(number: complex) -> tuple[Any, ...]:
    return number.real, number.imag, number.conjugate()


def have_values(objects: list[Any], rows: list[tuple[Any, ...]]) -> bool:
    return _compare.have_values(objects, rows, ("real", "imag"), ("conjugate",))


NUMBERS = [complex(number, random.Random(number).random()) for number in range(1500)]


def test_equal_values_are_equal() -> None:
    assert have_values(NUMBERS, list(map(row_of, NUMBERS)))
    assert have_values([], [])
    assert _compare.have_values(NUMBERS[:2], [(), ()], (), ())


@pytest.mark.parametrize("number", [0, 1, 511, 512, 1499])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_every_value_counts(number: int, column: int) -> None:
    rows = list(map(row_of, NUMBERS))
    row = list(rows[number])
    row[column] = "another"
    rows[number] = tuple(row)
    assert not have_values(NUMBERS, rows)


@pytest.mark.parametrize(
    "rows", [[], [row_of(1j)], [row_of(1j)] * 3, [row_of(1j), (0.0, 1.0)], [(0.0, 1.0, -1j, 0)] * 2]
)
def test_rows_that_are_not_there_are_an_error(rows: list[tuple[Any, ...]]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - zip's own text, or ours
        have_values([1j, 1j], rows)


def test_the_error_of_an_attribute_is_raised() -> None:
    class Failing:
        @property
        def real(self) -> float:
            raise RuntimeError("no part is real")

    with pytest.raises(RuntimeError, match="no part is real"):
        have_values([1j, Failing()], [row_of(1j)] * 2)
    with pytest.raises(AttributeError):
        have_values([object()], [row_of(1j)])


def test_the_error_of_a_comparison_is_raised() -> None:
    class Failing:
        def __eq__(self, other: object) -> bool:
            raise RuntimeError("not comparable")

        __hash__ = None  # type: ignore[assignment]  # as Python sets it

    with pytest.raises(RuntimeError, match="not comparable"):
        have_values([1j], [(0.0, Failing(), -1j)])


# --- layouts ---

API = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
NEEDS_API = pytest.mark.skipif(BUILT is None or API is None, reason="no extension, or a torch without exchange API")


def layout_of(tensor: torch.Tensor) -> bytes:
    begin = int(tensor.storage_offset()) * tensor.element_size()
    return _compare.layout_of(begin, 2, 8 * tensor.element_size(), (1, 0), tensor.shape, tensor.stride())


TENSORS = [
    torch.ones(3), torch.ones(2, 3), torch.ones(3, 2).t(), torch.ones(20)[5:15], torch.tensor(1.0),
    torch.ones(4, dtype=torch.float64), torch.ones(1, 6).as_strided((1, 6), (99, 1)), torch.ones(2, 1, 1, 1, 1, 3),
]  # fmt: skip


def test_an_exchange_api_needs_the_extension(way: str) -> None:
    assert _compare.has_layouts(object()) == (way == "as built" and BUILT is not None)
    assert not _compare.has_layouts(None)


@NEEDS_API
@pytest.mark.parametrize("way", ["as built"], indirect=True)
def test_each_tensor_has_its_own_layout_only() -> None:
    addresses = array("Q", bytes(8 * len(TENSORS)))
    layouts = list(map(layout_of, TENSORS))
    assert len(set(layouts)) == len(layouts)
    assert _compare.have_layouts(API, TENSORS, layouts, addresses)
    assert list(addresses) == [one.untyped_storage().data_ptr() for one in TENSORS]
    for tensor in TENSORS:
        for other, layout in zip(TENSORS, layouts, strict=True):
            found = _compare.have_layouts(
                API, [torch.ones(1), tensor], [layout_of(torch.ones(1)), layout], array("Q", [0, 0])
            )
            assert found == (other is tensor)


@NEEDS_API
@pytest.mark.parametrize("way", ["as built"], indirect=True)
def test_layouts_that_are_not_there_are_an_error() -> None:
    one = torch.ones(2)
    for tensors, layouts, room in (([one], [], 1), ([one], [layout_of(one)], 2), ([], [], 1)):
        with pytest.raises(ValueError, match="not as many"):
            _compare.have_layouts(API, tensors, layouts, array("Q", bytes(8 * room)))
    for layout in (b"", layout_of(one)[:-8], layout_of(one) + b"12345678"):
        assert not _compare.have_layouts(API, [one], [layout], array("Q", [0]))
    with pytest.raises(TypeError):
        _compare.have_layouts(API, [one], ["text"], array("Q", [0]))  # type: ignore[list-item]  # on purpose
    with pytest.raises(ValueError, match="PyCapsule"):
        _compare.have_layouts(object(), [one], [layout_of(one)], array("Q", [0]))


@NEEDS_API
@pytest.mark.parametrize("way", ["as built"], indirect=True)
def test_a_tensor_without_a_layout_is_an_error() -> None:
    with pytest.raises(RuntimeError):
        _compare.have_layouts(API, [torch.ones(2, 2).to_sparse()], [layout_of(torch.ones(2, 2))], array("Q", [0]))
