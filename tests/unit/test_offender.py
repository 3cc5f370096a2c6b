"""The first number of an output that is not finite: where it is, what it is, how many there are."""

import math
import pickle
from collections import OrderedDict
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distckpt.handlers import finite
from distckpt.handlers.finite import Offender, all_finite, first_offender, nonfinite_flag
from tests.unit.test_finite import FINITE, HOLDERS, NOT_FINITE, Logged, deferred

INF, NAN = math.inf, math.nan


def number_at(path: str, output: object) -> complex:
    """Return the number that a path leads to: it is Python."""
    found: Any = eval(path, {"output": output})  # noqa: S307 - what is evaluated is what is tested
    if isinstance(found, torch.Tensor):
        found = found.float() if found.dtype.itemsize == 1 else found
        found = found.item()
    return complex(0, 0) + (math.nan if str(found) == "sNaN" else found if isinstance(found, complex) else float(found))


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("kind", FINITE)
def test_finite_values_have_none(kind: str, holder: str) -> None:
    assert first_offender(HOLDERS[holder](FINITE[kind])) is None


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("kind", NOT_FINITE)
def test_path_leads_to_the_value(kind: str, holder: str) -> None:
    output = HOLDERS[holder](NOT_FINITE[kind])
    found = first_offender(output)
    assert found is not None
    number = number_at(found.path, output)
    assert str(number.real) == found.value
    assert 1 <= found.num_broken <= found.num_values
    assert str(found).startswith(f"{found.path} is {found.value} (")


class Out(NamedTuple):
    loss: object
    rest: object = 1.0


def broken_at(shape: tuple[int, ...], **values: float) -> torch.Tensor:
    """Return ones with values at places in row-major order: ``broken_at((2, 2), at3=NAN)``."""
    tensor = torch.ones(shape)
    for place, value in values.items():
        tensor.view(-1)[int(place.removeprefix("at"))] = value
    return tensor


LINES: list[tuple[object, str]] = [
    (NAN, "output is nan (float)"),
    (-INF, "output is -inf (float)"),
    ({"loss": INF}, "output['loss'] is inf (float)"),
    ({3: [1.0, {"a": NAN}]}, "output[3][1]['a'] is nan (float)"),
    ({("a", 1): NAN}, "output[('a', 1)] is nan (float)"),
    ({"it's": NAN}, 'output["it\'s"] is nan (float)'),
    (OrderedDict(a=1.0, b=NAN, c=INF), "output['b'] is nan (float)"),
    (MappingProxyType({"a": NAN}), "output['a'] is nan (float)"),
    (Out(0.5, [NAN]), "output.rest[0] is nan (float)"),
    ((0.5, NAN), "output[1] is nan (float)"),
    (torch.tensor(NAN), "output is nan (float32 () on cpu)"),
    (torch.tensor([NAN]), "output[0] is nan (float32 (1,) on cpu)"),
    (
        {"logits": broken_at((32, 10), at27=NAN, at28=INF, at300=-INF)},
        "output['logits'][2, 7] is nan (3 of 320 values are not finite, float32 (32, 10) on cpu)",
    ),
    (
        [1, {"logits": broken_at((2, 3, 4), at23=-INF).double()}],
        "output[1]['logits'][1, 2, 3] is -inf (1 of 24 values is not finite, float64 (2, 3, 4) on cpu)",
    ),
    (
        broken_at((4, 4), at5=NAN, at6=INF).t(),
        "output[1, 1] is nan (2 of 16 values are not finite, float32 (4, 4) on cpu)",
    ),
    (
        torch.tensor([1j, complex(1, -INF), complex(NAN, NAN)]),
        "output[1].imag is -inf (2 of 3 values are not finite, complex64 (3,) on cpu)",
    ),
    (
        torch.tensor([complex(INF, NAN), 1j], dtype=torch.complex32),
        "output[0].real is inf (1 of 2 values is not finite, complex32 (2,) on cpu)",
    ),
    (complex(1, NAN), "output.imag is nan (complex)"),
    (
        {"e": torch.tensor([[0, 1.0], [NAN, 0]]).to_sparse()},
        "output['e'].coalesce().values()[1] is nan (1 of 2 values is not finite, float32 (2,) on cpu)",
    ),
    (
        torch.nested.nested_tensor([torch.ones(2), broken_at((3,), at2=INF)], layout=torch.jagged),
        "output[1][2] is inf (1 of 3 values is not finite, float32 (3,) on cpu)",
    ),
    (
        broken_at((2,), at1=NAN).as_subclass(Logged),
        "output[1] is nan (1 of 2 values is not finite, float32 (2,) on cpu)",
    ),
    (np.float32("nan"), "output is nan (NumPy float32 ())"),
    ([np.array(INF)], "output[0] is inf (NumPy float64 ())"),
    (
        np.array([[1, 2], [-INF, NAN]], dtype=np.float16),
        "output[1, 0] is -inf (2 of 4 values are not finite, NumPy float16 (2, 2))",
    ),
    (np.array([1j, complex(0, INF)]), "output[1].imag is inf (1 of 2 values is not finite, NumPy complex128 (2,))"),
]


@pytest.mark.parametrize(("output", "line"), LINES, ids=[line for _, line in LINES])
def test_line_says_where_what_and_how_many(output: object, line: str) -> None:
    assert str(first_offender(output)) == line


def test_the_first_in_the_order_of_nesting_is_named() -> None:
    output = [1.0, [torch.ones(2), {"a": torch.tensor([1.0, INF]), "b": NAN}], NAN]
    assert str(first_offender(output)).startswith("output[1][1]['a'][1] is inf")


@pytest.mark.parametrize("place", [0, 6, 7, 8, 13, 19])
def test_large_tensors_are_looked_at_in_pieces(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "_CHUNK_NUMEL", 7)
    tensor = torch.ones(4, 5)
    tensor.view(-1)[place:] = NAN
    tensor.view(-1)[place] = -INF
    found = first_offender(tensor)
    assert found is not None
    assert (found.path, found.value) == (f"output[{place // 5}, {place % 5}]", "-inf")
    assert (found.num_broken, found.num_values) == (20 - place, 20)


def test_output_is_not_changed() -> None:
    tensor = torch.tensor([1.0, NAN], requires_grad=True)
    version = tensor._version
    assert first_offender(tensor) is not None
    assert tensor._version == version


def test_it_travels_between_ranks() -> None:
    found = first_offender([torch.tensor([1.0, NAN])])
    assert isinstance(found, Offender)
    assert pickle.loads(pickle.dumps(found)) == found  # noqa: S301 - our own bytes


@pytest.mark.parametrize("value", [object(), {1.0}, torch.nn.Linear(1, 1)], ids=lambda value: type(value).__name__)
def test_anything_else_is_a_type_error_that_names_it(value: object) -> None:
    for holder in HOLDERS.values():
        with pytest.raises(TypeError) as caught:
            first_offender(holder(value))
        assert str(type(value)) in str(caught.value)


LEAVES = st.sampled_from([*FINITE.values(), *[0.5] * 40, *NOT_FINITE.values()])
NESTS = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner) | st.tuples(inner)
)


@given(output=NESTS)
def test_every_look_at_an_output_says_the_same(output: object) -> None:
    is_finite = all_finite(output)
    assert nonfinite_flag(output) is not is_finite
    found = first_offender(output)
    assert (found is None) is is_finite
    if found is None or "coalesce" not in found.path:
        assert deferred(output) is not is_finite
