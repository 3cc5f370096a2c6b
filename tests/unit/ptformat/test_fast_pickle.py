"""A plain state's pickle, made in one walk: what is read from it is what is read from torch's."""

import io
import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distckpt import DiskSaver
from distckpt.ptformat.fast_pickle import NotPlain, pickle_plain
from distckpt.ptformat.pickler import pickle_like_torch, pickle_state

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]


class Reader(pickle.Unpickler):
    """Reads a pickle with its storages; a storage is told by its number."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))

    def persistent_load(self, pid: Any) -> Any:
        return ("pid", *pid)

    def find_class(self, module: str, name: str) -> Any:
        if name == "_rebuild_tensor_v2":
            return lambda *args: ("tensor", *args[:-1], args[-1] or None)  # of its hooks torch's tells by an empty dict
        return super().find_class(module, name)


def read(data: bytes) -> Any:
    return Reader(data).load()


def described(tree: Any) -> Any:
    """Return a tree such that two are equal only where types and order are."""
    if isinstance(tree, dict):
        return (
            type(tree),
            [(described(key), described(item)) for key, item in tree.items()],
            described(vars(tree)) if (isinstance(tree, OrderedDict) and vars(tree)) else None,
        )
    if isinstance(tree, list | tuple):
        return type(tree), [described(item) for item in tree]
    return type(tree), repr(tree)


scalars = st.one_of(
    st.none(), st.booleans(), st.floats(), st.text(max_size=6), st.integers(), st.integers(-(10**30), 10**30),
    st.sampled_from([0, 255, 256, 65535, 65536, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, -1, -128, -129, 2**63]),
)  # fmt: skip
tensors = st.builds(
    lambda dtype, shape, grad: torch.zeros(shape, dtype=dtype, requires_grad=grad and dtype.is_floating_point),
    st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=4), st.booleans(),
)  # fmt: skip
trees = st.recursive(
    scalars | tensors,
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3).map(OrderedDict)
    ),
    max_leaves=25,
)  # fmt: skip


@given(tree=trees)
def test_what_is_read_is_what_is_read_from_torchs(tree: Any) -> None:
    pickled = pickle_plain(tree)
    exact = pickle_like_torch(tree)
    assert described(read(pickled.data)) == described(read(exact.data))
    assert [one.nbytes() for one in pickled.storages] == [one.nbytes() for one in exact.storages]
    assert list(pickle_state(tree).tensors()) == list(exact.tensors())


def test_a_trained_models_state_takes_the_short_way() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    pickled = pickle_plain(state)
    assert described(read(pickled.data)) == described(read(pickle_like_torch(state).data))
    assert vars(read(pickled.data)["model"])["_metadata"][""] == {"version": 1}


def test_a_shared_storage_is_there_once_with_its_views() -> None:
    base = torch.arange(20, dtype=torch.float32)
    state = [base, base[3:9], base.view(4, 5).t(), torch.ones(1)]
    pickled = pickle_plain(state)
    assert len(pickled.storages) == 2
    assert read(pickled.data) == read(pickle_like_torch(state).data)


def test_more_forms_than_a_byte_can_number_are_told_apart(tmp_path: Path) -> None:
    state = [torch.empty(number, 1) for number in range(300)] + [torch.empty(number, 1, 2) for number in range(300)]
    pickled = pickle_plain(state)
    assert read(pickled.data) == read(pickle_like_torch(state).data)
    DiskSaver(tmp_path, require_empty=False)({"all": state}, "c.pt")
    loaded = torch.load(tmp_path / "c.pt", weights_only=True)["all"]
    assert [one.shape for one in loaded] == [one.shape for one in state]


def test_a_tensor_costs_a_reader_one_call_and_seventeen_opcodes() -> None:
    """They take microseconds each in torch's own reader; every rank's load has to wait for them."""
    few, many = (
        [op.name for op, _, _ in pickletools.genops(pickle_plain([torch.ones(9, 9) for _ in range(number)]).data)]
        for number in (10, 20)
    )
    assert len(many) - len(few) == 10 * 17
    assert many.count("REDUCE") == 20


@pytest.mark.parametrize("make", [lambda: torch.ones(3), lambda: torch.ones(3, requires_grad=True)])
def test_what_torch_reads_takes_hooks_of_its_own(tmp_path: Path, make: Any) -> None:
    DiskSaver(tmp_path, require_empty=False)({"a": make(), "b": make()}, "c.pt")
    loaded = torch.load(tmp_path / "c.pt", weights_only=True)
    calls: list[str] = []
    first, second = (loaded[name].requires_grad_() for name in ("a", "b"))
    first.register_hook(lambda _: calls.append("a"))
    (first + second).sum().backward()
    assert calls == ["a"]


@pytest.mark.parametrize("make", [list, dict, lambda: torch.ones(1)])
def test_an_object_that_stands_twice_is_one_after_loading(make: Any) -> None:
    one = make()
    with pytest.raises(NotPlain):
        pickle_plain([one, one])
    first, second = read(pickle_state([one, one]).data)
    assert first is second


def test_what_is_not_plain_is_left_to_python() -> None:
    class Text(str):
        __slots__ = ()

    inside: list[Any] = []
    inside.append(inside)
    for value in (torch.Size([1]), Text("a"), 1j, b"a", {1}, nn.Parameter(torch.ones(1)), 1 << 3000, inside):
        with pytest.raises(NotPlain):
            pickle_plain([value])


def test_a_state_that_is_too_deep_is_left_to_python() -> None:
    deep: Any = 0
    for _ in range(200):
        deep = [deep]
    with pytest.raises(NotPlain):
        pickle_plain(deep)


def test_memory_that_is_viewed_as_two_types_is_refused_as_torch_does() -> None:
    tensor = torch.ones(4)
    with pytest.raises(RuntimeError, match="view the same data as different types"):
        pickle_plain([tensor, tensor.view(torch.int32)])
