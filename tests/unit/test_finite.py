"""Is every number of an output finite? Every kind of value, alone and nested."""

import math
import sys
import warnings
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from distckpt.state.finite import all_finite

INF, NAN = math.inf, math.nan
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
Pair = namedtuple("Pair", "loss other")  # noqa: PYI024 - an untyped one is what users return


def finite_values() -> dict[str, object]:
    return {
        "None": None,
        "text": "nan",
        "bytes": b"inf",
        "bool": True,
        "int": 3,
        "int above float64's range": 10**400,
        "float": 0.1,
        "float above float32's range": 1e300,
        "largest float": sys.float_info.max,
        "smallest float": 5e-324,
        "negative zero": -0.0,
        "complex": complex(1e300, -1e300),
        "Decimal": Decimal("0.1"),
        "Fraction": Fraction(1, 3),
        "Fraction above float64's range": Fraction(10**400, 3),
        "NumPy float": np.float32(1),
        "NumPy int": np.int64(1),
        "NumPy bool": np.bool_(True),  # noqa: FBT003 - NumPy's bool is the point
        "NumPy text": np.str_("nan"),
        "NumPy date": np.datetime64("NaT"),
        "NumPy array": np.ones((2, 3)),
        "NumPy array, large": np.full(4, 1e308),
        "NumPy array, empty": np.ones(0),
        "NumPy array, 0-d": np.array(1.0),
        "NumPy array of ints": np.ones(2, dtype=np.int8),
        "NumPy array of objects": np.array([None, "a"], dtype=object),
        "NumPy array of texts": np.array(["nan"]),
        "NumPy complex array": np.ones(2, dtype=np.complex64),
        "empty list": [],
        "empty dict": {},
        "tensor": torch.ones(2, 3),
        "0-d tensor": torch.tensor(1.0),
        "empty tensor": torch.empty(0),
        "empty tensor of rank 3": torch.empty(2, 0, 3),
        "requires grad": torch.ones(2, requires_grad=True),
        "0-d, requires grad": torch.ones((), requires_grad=True) * 2,
        "bool tensor": torch.tensor([True, False]),
        "int tensor": torch.tensor([2**62, 2**62, 2**62]),
        "unsigned tensor": torch.ones(2, dtype=torch.uint64),
        "sum overflows float32": torch.full((4,), 3e38),
        "sum overflows float16": torch.full((100,), 6e4, dtype=torch.float16),
        "sum overflows bfloat16": torch.full((4,), 3e38, dtype=torch.bfloat16),
        "sum overflows float64": torch.full((4,), 1e308, dtype=torch.float64),
        "sum overflows to both sides": torch.tensor([3e38] * 4 + [-3e38] * 4),
        "complex sum overflows": torch.full((4,), complex(3e38, -3e38)),
        "not contiguous": torch.ones(4, 4)[::2, 1],
        "expanded": torch.ones(1).expand(1000),
        "sparse coo": torch.eye(3).to_sparse(),
        "sparse coo, uncoalesced": torch.sparse_coo_tensor(torch.tensor([[0, 0]]), [1.0, 2.0], (2,)),
        "sparse coo, empty": torch.zeros(3).to_sparse(),
        "sparse coo of ints": torch.eye(3, dtype=torch.int64).to_sparse(),
        "sparse, requires grad": torch.eye(2, requires_grad=True).to_sparse(),
        "sparse csr": torch.eye(3).to_sparse_csr(),
        "sparse csc": torch.eye(3).to_sparse_csc(),
        "sparse bsr": torch.eye(4).to_sparse_bsr((2, 2)),
        "float8 e8m0": torch.ones(3).to(torch.float8_e8m0fnu),
        "conjugated": torch.ones(3, dtype=torch.complex64).conj(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "nested, strided": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.strided),
        "nested, jagged": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        **{f"{dtype}": torch.ones(3).to(dtype) for dtype in (*FLOATS, *COMPLEX, *FLOAT8)},
    }


def other_values() -> dict[str, object]:
    return {
        "nan": NAN,
        "inf": INF,
        "-inf": -INF,
        "float subclass": np.float64("nan"),
        "complex nan": complex(0, NAN),
        "complex inf": complex(INF, 0),
        "Decimal NaN": Decimal("NaN"),
        "Decimal signalling NaN": Decimal("sNaN"),
        "Decimal inf": Decimal("-Infinity"),
        "NumPy float32": np.float32("nan"),
        "NumPy float16": np.float16("inf"),
        "NumPy complex": np.complex64(complex(1, INF)),
        "NumPy array": np.array([1, NAN]),
        "NumPy 0-d array": np.array(INF),
        "NumPy complex array": np.array([1j, complex(NAN, 0)]),
        "0-d tensor": torch.tensor(NAN),
        "0-d, requires grad": torch.tensor(INF, requires_grad=True),
        "requires grad": torch.tensor([1.0, NAN], requires_grad=True),
        "both infinities": torch.tensor([INF, -INF]),
        "one among many": torch.cat([torch.zeros(9999), torch.tensor([NAN])]),
        "large and inf": torch.tensor([3e38, 3e38, -INF]),
        "complex, imaginary part": torch.tensor([1 + 0j, complex(0, NAN)]),
        "complex, 0-d": torch.tensor(complex(INF, 0)),
        "not contiguous": torch.full((4, 4), NAN)[::2, 1],
        "sparse coo": torch.sparse_coo_tensor(torch.tensor([[0, 1]]), [1.0, NAN], (3,)),
        "sparse csr": torch.tensor([[0, INF], [1, 0]]).to_sparse_csr(),
        "sparse csc": torch.tensor([[0, NAN], [1, 0]]).to_sparse_csc(),
        "sparse bsr": torch.full((4, 4), NAN).to_sparse_bsr((2, 2)),
        "float8 e8m0": torch.tensor([1.0, NAN]).to(torch.float8_e8m0fnu),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.tensor([NAN])], layout=torch.strided),
        "jagged": torch.nested.nested_tensor([torch.ones(2), torch.tensor([INF])], layout=torch.jagged),
        **{f"{dtype}": torch.tensor([1.0, NAN]).to(dtype) for dtype in (*FLOATS, *COMPLEX, *FLOAT8)},
    }


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch says once of each of its prototypes that it is one
    FINITE, NOT_FINITE = finite_values(), other_values()
HOLDERS: dict[str, Callable[[Any], Any]] = {
    "alone": lambda value: value,
    "list": lambda value: [1.0, value],
    "tuple": lambda value: (value,),
    "deque": lambda value: deque([value]),
    "namedtuple": lambda value: Pair(loss=0.5, other=value),
    "dict": lambda value: {"loss": 1.0, "other": value},
    "OrderedDict": lambda value: OrderedDict(a=value),
    "mapping": lambda value: MappingProxyType({"a": value}),
    "deep": lambda value: {"a": [({"b": [value]}, None), "text"]},
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("kind", FINITE)
def test_finite(kind: str, holder: str) -> None:
    assert all_finite(HOLDERS[holder](FINITE[kind])) is True


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("kind", NOT_FINITE)
def test_not_finite(kind: str, holder: str) -> None:
    assert all_finite(HOLDERS[holder](NOT_FINITE[kind])) is False


@pytest.mark.parametrize(
    "value", [object(), len, {1.0}, iter([1.0]), torch.nn.Linear(1, 1), range], ids=lambda value: type(value).__name__
)
def test_anything_else_is_a_type_error_that_names_it(value: object) -> None:
    for holder in HOLDERS.values():
        with pytest.raises(TypeError) as caught:
            all_finite(holder(value))
        assert str(type(value)) in str(caught.value)


def test_range_is_a_sequence_of_ints() -> None:
    assert all_finite(range(3))


def test_keys_are_not_looked_at() -> None:
    assert all_finite({NAN: 1.0})


def test_output_is_not_changed_and_its_graph_not_extended() -> None:
    loss = (torch.ones(3, requires_grad=True) * 2).sum()
    with torch.inference_mode(mode=False):
        assert all_finite(loss)
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own
    tensor = torch.tensor([1.0, NAN])
    version = tensor._version
    assert not all_finite(tensor)
    assert tensor._version == version


def test_without_numpy_numbers_and_tensors_are_known_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numpy")
    assert all_finite([1.0, 2, 1j, Fraction(1, 2), None, torch.ones(2)])
    assert "numpy" not in sys.modules
