"""Is every number of an output finite? Every kind of value, alone and nested, at once and without waiting."""

import math
import re
import sys
import warnings
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from distckpt.handlers import finite
from distckpt.handlers.finite import _accelerator_of, _nonfinite_flag, all_finite, describe_nonfinite, nonfinite_flag
from tests.support import run_distributed

INF, NAN = math.inf, math.nan
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
Pair = namedtuple("Pair", "loss other")  # noqa: PYI024 - an untyped one is what users return


class Logged(torch.Tensor):
    """A subclass that means nothing by it."""


def jagged_with_holes(fill: float, hole: float) -> torch.Tensor:
    """Return rows of lengths 1, 2, 2 whose buffer holds other numbers between them and behind."""
    buffer = torch.full((3, 5), hole)
    for row, (start, length) in enumerate([(0, 1), (1, 2), (1, 2)]):
        buffer[row, start : start + length] = fill
    return torch.nested.narrow(buffer, 1, torch.tensor([0, 1, 1]), torch.tensor([1, 2, 2]), layout=torch.jagged)


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
        "nested, of float8": torch.nested.nested_tensor([torch.ones(2)]).to(torch.float8_e5m2),
        "jagged, of float8": torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged).to(torch.float8_e5m2),
        "jagged, holes are not looked at": jagged_with_holes(1.0, NAN),
        "jagged, transposed": torch.nested.nested_tensor(
            [torch.ones(2, 4), torch.ones(3, 4)], layout=torch.jagged
        ).transpose(1, 2),
        "meta": torch.empty(3, device="meta"),
        "0-d meta": torch.empty((), device="meta"),
        "subclass": torch.ones(3).as_subclass(Logged),
        "finite with an infinite norm": torch.tensor(complex(3e38, 3e38)),
        "view of a conjugate": torch.ones(3, dtype=torch.complex64).conj().imag,
        "two float4 in a byte": torch.full((3,), 255, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
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
        "jagged with holes": jagged_with_holes(NAN, 1.0),
        "jagged, of float8": torch.nested.nested_tensor([torch.tensor([NAN])], layout=torch.jagged).to(
            torch.float8_e5m2
        ),
        "subclass": torch.tensor([1.0, NAN]).as_subclass(Logged),
        "conjugated": torch.tensor([1 + 0j, complex(0, -INF)]).conj(),
        "sparse coo, sum of terms is not finite": torch.sparse_coo_tensor(torch.tensor([[0, 0]]), [3e38, 3e38], (2,)),
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


@pytest.mark.parametrize("num_tensors", [2, 3, 4, 100])
@pytest.mark.parametrize("shape", [(), (1,), (32,), (4, 8), (70, 70)], ids=str)
def test_one_broken_tensor_among_many_is_found(shape: tuple[int, ...], num_tensors: int) -> None:
    tensors = [torch.full(shape, 3e38, requires_grad=index % 2 == 1) for index in range(num_tensors)]
    assert all_finite(tensors)
    assert nonfinite_flag(tensors) is False
    assert deferred(tensors) is False
    for place in (0, num_tensors // 2, num_tensors - 1):
        for value in (NAN, INF, -INF):
            broken = torch.full(shape, 3e38)
            broken.view(-1)[-1] = value
            others = [*tensors[:place], broken, *tensors[place + 1 :]]
            assert not all_finite(others)
            assert nonfinite_flag(others) is True
            assert deferred(others) is True


def test_kinds_are_judged_together() -> None:
    finite = [value for value in FINITE.values() if isinstance(value, torch.Tensor)]
    assert all_finite(finite)
    assert deferred(finite) is False
    for broken in NOT_FINITE.values():
        assert not all_finite([*finite, broken])
        assert not all_finite([broken, *finite])


def test_what_stands_before_a_thing_that_is_no_number_decides() -> None:
    for broken in (NAN, torch.tensor(NAN), torch.tensor([1.0, INF])):
        assert not all_finite([broken, object()])
        assert nonfinite_flag([broken, object()]) is True
        assert describe_nonfinite([broken, object()]) is not None
        for look in (all_finite, nonfinite_flag, describe_nonfinite):
            with pytest.raises(TypeError):
                look([object(), broken])
            with pytest.raises(TypeError):
                look([1.0, torch.ones(3), object()])


class RefusesToWait(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Raises where torch would make the host wait for numbers of a device, or would write to a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        waits = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "_unique2", "_coalesce"}
        assert name not in waits, f"{name} waits for the device"
        assert name != "_to_copy" or (kwargs or {}).get("device") is None, "a copy to another device"
        assert not func._schema.is_mutable, f"{name} writes to a tensor"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting() -> Iterator[None]:
    refusal = AssertionError("tolist waits for the device")  # no operation that a mode would see
    with mock.patch.object(torch.Tensor, "tolist", side_effect=refusal), RefusesToWait():  # type: ignore[no-untyped-call]
        yield


def deferred(output: Any, accelerator_of: Callable[[torch.Tensor], Hashable | None] = lambda _: "a device") -> Any:
    """Judge an output as if its tensors were on an accelerator; return what the host would read in the end."""
    with no_waiting():
        flag = _nonfinite_flag(output, accelerator_of)
    if isinstance(flag, bool):
        return flag
    assert (flag.dtype, flag.shape, flag.requires_grad) == (torch.bool, (), False)
    return flag.item()


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("kind", FINITE)
def test_flag_of_finite_values(kind: str, holder: str) -> None:
    output = HOLDERS[holder](FINITE[kind])
    assert nonfinite_flag(output) is False
    assert deferred(output) is False


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("kind", NOT_FINITE)
def test_flag_of_broken_values(kind: str, holder: str) -> None:
    output = HOLDERS[holder](NOT_FINITE[kind])
    assert nonfinite_flag(output) is True
    # The one kind that would have to be added up first; its terms are finite.
    assert deferred(output) is (kind != "sparse coo, sum of terms is not finite")


def test_watch_over_waiting_sees_it() -> None:
    tensor, jagged = torch.ones(2), jagged_with_holes(1.0, 1.0)
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 0]]), [1.0, 2.0], (2,))
    waits = [lambda: all_finite(tensor), lambda: bool(tensor[0]), sparse.coalesce, jagged.unbind]
    for wait in waits:
        with pytest.raises(AssertionError, match="waits for the device"), no_waiting():
            wait()


def test_deferred_flag_is_a_tensor_of_its_own() -> None:
    loss = (torch.ones(3, requires_grad=True) * 2).sum()
    flag = _nonfinite_flag({"loss": loss, "y": torch.ones(2)}, lambda _: 0)
    assert isinstance(flag, torch.Tensor)
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own


def test_flag_is_plain_where_the_host_knows() -> None:
    on_device = torch.ones(2)

    def accelerator_of(tensor: torch.Tensor) -> Hashable | None:
        return 0 if tensor is on_device else None

    assert _nonfinite_flag([on_device, torch.tensor(NAN)], accelerator_of) is True
    assert _nonfinite_flag([on_device, NAN], accelerator_of) is True
    assert isinstance(_nonfinite_flag([on_device, torch.ones(2)], accelerator_of), torch.Tensor)
    assert _nonfinite_flag([torch.ones(2, dtype=torch.int64), torch.empty(0)], lambda _: 0) is False
    with pytest.raises(TypeError):
        _nonfinite_flag([torch.tensor(NAN), object()], lambda _: 0)


@pytest.mark.parametrize("broken", [None, 0, 1, 2, 3, 4])
def test_flags_of_several_devices_become_one(broken: int | None) -> None:
    tensors = [torch.full((3,), NAN if index == broken else 1.0) for index in range(5)]
    places = {id(tensor): index % 3 for index, tensor in enumerate(tensors)}
    assert deferred(tensors, lambda tensor: places[id(tensor)]) is (broken is not None)


def test_flag_stays_on_the_accelerator() -> None:
    with FakeTensorMode():  # any look at a number raises
        on_cuda = [torch.ones(3, device="cuda:0"), torch.ones((), dtype=torch.float16, device="cuda:0")]
        for output in (*on_cuda, on_cuda, {"loss": 0.5, "y": on_cuda[0]}, [torch.ones(2, device="cuda:1"), *on_cuda]):
            flag = nonfinite_flag(output)
            assert isinstance(flag, torch.Tensor)
            assert (flag.dtype, flag.shape, flag.device.type) == (torch.bool, (), "cuda")
        assert nonfinite_flag([*on_cuda, NAN]) is True
        assert nonfinite_flag(torch.ones(3, dtype=torch.int64, device="cuda:0")) is False
        assert _accelerator_of(on_cuda[0]) == torch.device("cuda:0")
    assert _accelerator_of(torch.ones(1)) is None
    assert _accelerator_of(torch.empty(1, device="meta")) is None


@run_distributed(world_size=2)
def test_each_rank_looks_at_its_own_shard_and_asks_nobody() -> None:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    shards = DTensor.from_local(torch.tensor([1.0, NAN if rank == 1 else 2.0]), mesh, [Shard(0)])
    whole = DTensor.from_local(torch.ones(2, requires_grad=True), mesh, [Replicate()])
    dist.barrier()
    if rank == 1:  # alone: a collective in here would never return
        assert not all_finite([shards, torch.ones(2), whole])
        assert nonfinite_flag(shards) is True
        assert deferred([shards, torch.ones(2)]) is True
        found = describe_nonfinite({"y": shards})
        assert found is not None
        assert found.startswith("output['y'].to_local()[1] is nan")
        assert all_finite(whole)
        assert describe_nonfinite(whole) is None
    dist.barrier()
    assert all_finite([shards, whole]) is (rank == 0)


# -- the first number that is not finite ---------------------------------------------------------


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
    assert describe_nonfinite(HOLDERS[holder](FINITE[kind])) is None


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("kind", NOT_FINITE)
def test_path_leads_to_the_value(kind: str, holder: str) -> None:
    output = HOLDERS[holder](NOT_FINITE[kind])
    found = describe_nonfinite(output)
    assert found is not None
    match = re.fullmatch(r"(.*) is (nan|inf|-inf) \(.*\)", found)
    assert match is not None
    path, value = match.groups()
    assert str(number_at(path, output).real) == value


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
    assert describe_nonfinite(output) == line


def test_the_first_in_the_order_of_nesting_is_named() -> None:
    output = [1.0, [torch.ones(2), {"a": torch.tensor([1.0, INF]), "b": NAN}], NAN]
    found = describe_nonfinite(output)
    assert found is not None
    assert found.startswith("output[1][1]['a'][1] is inf")


@pytest.mark.parametrize("place", [0, 6, 7, 8, 13, 19])
def test_large_tensors_are_looked_at_in_pieces(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "_CHUNK_NUMEL", 7)
    tensor = torch.ones(4, 5)
    tensor.view(-1)[place:] = NAN
    tensor.view(-1)[place] = -INF
    found = describe_nonfinite(tensor)
    verb = "is" if place == 19 else "are"
    text = f"output[{place // 5}, {place % 5}] is -inf ({20 - place} of 20 values {verb} not finite, "
    assert found is not None
    assert found.startswith(text)


def test_output_is_not_changed() -> None:
    tensor = torch.tensor([1.0, NAN], requires_grad=True)
    version = tensor._version
    assert describe_nonfinite(tensor) is not None
    assert tensor._version == version


LEAVES = st.sampled_from([*FINITE.values(), *[0.5] * 40, *NOT_FINITE.values()])
NESTS = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner) | st.tuples(inner)
)


@given(output=NESTS)
def test_every_look_at_an_output_says_the_same(output: object) -> None:
    is_finite = all_finite(output)
    assert nonfinite_flag(output) is not is_finite
    found = describe_nonfinite(output)
    assert (found is None) is is_finite
    if found is None or "coalesce" not in found:
        assert deferred(output) is not is_finite
