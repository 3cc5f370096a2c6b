"""From live objects to plain state: what is replaced, and what stays the same object."""

import copy
from collections import OrderedDict, deque, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distckpt import DiskSaver
from distckpt.ptformat.reader import read_pt
from distckpt.ptformat.sharded import find_paths
from distckpt.saving.capture import capture, check_objects, map_tree
from distckpt.saving.plain_state import plain_state

Pair = namedtuple("Pair", "a b")  # noqa: PYI024 - an untyped one is what states hold


class Stateful:
    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state


@pytest.mark.parametrize(
    ("state", "plain"),
    [
        (np.float64(0.1), 0.1),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),  # noqa: FBT003 - NumPy's bool is the point
        (np.str_("a"), "a"),
        ({"a": np.float64(1)}, {"a": 1.0}),
        ([1, np.int8(2)], [1, 2]),
        ((1, (np.int8(2),)), (1, (2,))),
        ({"a": [{"b": (np.float64(1), None)}]}, {"a": [{"b": (1.0, None)}]}),
        (OrderedDict(b=np.int8(1), a=2), OrderedDict(b=1, a=2)),
    ],
    ids=repr,
)
def test_numpy_scalars_become_python_values(state: Any, plain: Any) -> None:
    result = plain_state(state)
    assert repr(result) == repr(plain)  # types too: NumPy's show theirs
    assert type(result) is type(plain)


@pytest.mark.parametrize(
    "scalar",
    [
        np.datetime64("2026-01-01"),
        np.datetime64("2026-01-01T00:00:00.123456789", "ns"),
        np.datetime64("2026-01-01T00:00", "m"),
        np.datetime64("NaT"),
        np.timedelta64(5, "ns"),
        np.timedelta64(5, "D"),
        np.zeros(1, [("a", "i4"), ("b", "f8")])[0],
        np.longdouble(1) / 3,
    ],
    ids=repr,
)
def test_numpy_scalar_without_a_python_equal_is_kept_and_loads(scalar: Any, tmp_path: Any) -> None:
    state = capture({"s": Stateful({"it": scalar, "n": np.int64(1)})}, rank=0, save_on_rank=0)
    DiskSaver(tmp_path)(state, "a.pt")
    found = read_pt(tmp_path / "a.pt")["s"]
    assert (type(found["it"]), found["it"].dtype, found["it"].tobytes()) == (
        type(scalar),
        scalar.dtype,
        scalar.tobytes(),
    )
    assert type(found["n"]) is int


@pytest.mark.parametrize(
    "state",
    [
        {"a": [1, (2, {"b": None})]},
        OrderedDict(a=torch.ones(2)),
        [torch.ones(1)],
        (),
        "text",
        np.ones(2),
        Pair(1, 2),
        {1, 2},
        None,
    ],
    ids=lambda state: type(state).__name__,
)
def test_state_without_numpy_scalars_is_returned_itself(state: Any) -> None:
    assert plain_state(state) is state


def test_state_may_contain_itself() -> None:
    state: dict[str, Any] = {"a": [np.float64(1)]}
    state["self"] = state
    found = capture({"s": Stateful(state)}, rank=0, save_on_rank=0)["s"]
    assert type(found["a"][0]) is float
    assert found["self"] is state


def _shared(kind: type, innermost: Any) -> Any:
    """Nest 15 containers, with 12 ** 15 paths to the innermost one."""
    state = innermost
    for _ in range(15):
        state = dict.fromkeys(range(12), state) if kind is dict else kind([state] * 12)
    return state


@pytest.mark.parametrize("kind", [list, tuple, dict])
@pytest.mark.parametrize("innermost", [[np.float64(1)], [1.0], (1.0, "a"), {1}], ids=repr)
def test_container_with_many_references_is_visited_once(kind: type, innermost: Any, tmp_path: Any) -> None:
    state = capture({"s": Stateful({"tree": _shared(kind, innermost)})}, rank=0, save_on_rank=0)
    DiskSaver(tmp_path)(state, "a.pt")
    found = read_pt(tmp_path / "a.pt")["s"]["tree"]
    for _ in range(15):
        found, other = found[0], found[11]
        assert found is other, "one container was saved as two"
    assert found == innermost


def test_list_with_two_references_stays_one_list() -> None:
    shared = [np.float64(1)]
    found = plain_state({"a": shared, "b": {"c": (shared,)}})
    assert type(found["a"][0]) is float
    assert found["b"]["c"][0] is found["a"]


@pytest.mark.parametrize("innermost", [1, np.float64(1)], ids=["plain", "NumPy"])
def test_containers_that_hold_each_other_are_visited_once(innermost: Any) -> None:
    ring: list[Any] = [[innermost] for _ in range(40)]
    for one in ring:
        one.extend(ring)
    found = capture({"s": Stateful(ring)}, rank=0, save_on_rank=0)["s"]
    assert [type(one[0]) for one in found] == [type(plain_state(innermost))] * 40


class _Raising(dict[str, Any]):
    def items(self) -> Any:
        raise KeyError("asked for its items")

    def __iter__(self) -> Any:
        raise KeyError("asked for its keys")

    def __reduce__(self) -> Any:
        return dict, ({"told": 1},)


class _RaisingList(list[Any]):
    def __iter__(self) -> Any:
        raise KeyError("asked for its items")

    def __reduce__(self) -> Any:
        return list, ((1,),)


class _RaisingSet(set[Any]):
    def __iter__(self) -> Any:
        raise KeyError("asked for its items")

    def __reduce__(self) -> Any:
        return set, ([1],)


@pytest.mark.filterwarnings("ignore:.*load_objects will refuse it:UserWarning")
@pytest.mark.parametrize(
    "odd", [_Raising(a=1), _RaisingList([1]), _RaisingSet([1])], ids=lambda odd: type(odd).__name__
)
def test_container_whose_iteration_raises_is_left_to_the_pickler(odd: Any, tmp_path: Any) -> None:
    state = capture({"s": Stateful({"odd": odd, "n": np.int64(1)})}, rank=0, save_on_rank=0)
    DiskSaver(tmp_path)(state, "a.pt")
    torch.save(state, tmp_path / "b.pt")
    mine, torchs = (torch.load(tmp_path / name, weights_only=False)["s"] for name in ("a.pt", "b.pt"))
    assert mine == torchs
    assert mine["n"] == 1


def test_numpy_scalar_in_a_named_tuple_becomes_a_python_value() -> None:
    found = plain_state(Pair(np.int64(1), 2))
    assert found == Pair(1, 2)
    assert type(found.a) is int


def test_only_containers_on_the_path_to_a_numpy_scalar_are_copied() -> None:
    clean, tensor = {"x": [1, 2]}, torch.ones(2)
    state: dict[str, Any] = {"clean": clean, "tensor": tensor, "dirty": [np.float64(1)]}
    before = copy.copy(state)
    result = plain_state(state)
    assert result is not state
    assert result["clean"] is clean
    assert result["tensor"] is tensor
    assert state == before, "the object's own state must not change"
    assert type(state["dirty"][0]) is np.float64


def test_metadata_of_a_module_survives_a_replacement() -> None:
    state: Any = nn.BatchNorm1d(2).state_dict()
    state["extra"] = np.float64(1)  # as a get_extra_state may hold
    result: Any = plain_state(state)
    assert type(result) is OrderedDict
    assert vars(result)["_metadata"] == state._metadata
    assert result["weight"] is state["weight"]
    assert list(result) == list(state)


def test_captured_tensors_are_the_live_ones() -> None:
    module = nn.Linear(2, 3)
    captured = capture({"m": module}, rank=0, save_on_rank=0)
    assert captured["m"]["weight"].data_ptr() == module.weight.data_ptr()


def test_tree_keeps_its_shape() -> None:
    one, two = Stateful({"n": np.int64(1)}), Stateful({"n": 2})
    tree = {"list": [one, two], "tuple": (one,), "dict": OrderedDict(deep={"x": two}), "empty": [], "single": one}
    captured = capture(tree, rank=0, save_on_rank=0)
    assert captured == {
        "list": [{"n": 1}, {"n": 2}],
        "tuple": [{"n": 1}],
        "dict": {"deep": {"x": {"n": 2}}},
        "empty": [],
        "single": {"n": 1},
    }


def test_containers_with_a_state_of_their_own_are_leaves() -> None:
    modules = nn.ModuleDict({"a": nn.Linear(1, 1)})
    listed = nn.ModuleList([nn.Linear(1, 1)])
    assert map_tree(type, {"d": modules, "l": [listed]}) == {"d": nn.ModuleDict, "l": [nn.ModuleList]}
    assert set(capture({"d": modules}, rank=0, save_on_rank=0)["d"]) == {"a.weight", "a.bias"}


def test_captured_numpy_scalars_can_be_loaded_without_executing(tmp_path: Any) -> None:
    state = capture({"s": Stateful({"best": np.float64(0.1), "seen": [np.int64(2)]})}, rank=0, save_on_rank=0)
    torch.save(state, tmp_path / "a.pt")
    assert read_pt(tmp_path / "a.pt") == {"s": {"best": 0.1, "seen": [2]}}


@pytest.mark.parametrize("method", ["state_dict", "load_state_dict"])
@pytest.mark.parametrize("odd", [1, None, "text", object(), len], ids=lambda odd: type(odd).__name__)
def test_object_without_the_method_is_a_type_error(odd: Any, method: str) -> None:
    for tree in ({"a": odd}, {"a": [nn.Linear(1, 1), odd]}, {"a": {"b": (odd,)}}):
        with pytest.raises(TypeError, match="should have") as caught:
            check_objects(tree, method)
        assert str(caught.value) == f"Object {type(odd)} should have `{method}` method"


def test_object_that_cannot_load_is_named() -> None:
    check_objects({"a": Stateful(1)}, "state_dict")
    with pytest.raises(TypeError, match="Stateful'> should have `load_state_dict` method"):
        check_objects({"a": Stateful(1)}, "load_state_dict")


class _Slotted:
    __slots__ = ("it", "other")

    def __init__(self, it: Any) -> None:
        self.it = it


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda one: deque([0, one]), "a.1"),
        (_Slotted, "a.it"),
        (lambda one: {_Slotted({"b": deque([one])})}, "a.0.it.b.0"),
    ],
    ids=["deque", "slots", "both"],
)
def test_refused_object_is_located_in_all_that_pickle_visits(wrap: Any, path: str) -> None:
    one = torch.ones(1)
    assert find_paths({"fine": [1], "a": wrap(one)}, lambda met: met is one) == [path]
