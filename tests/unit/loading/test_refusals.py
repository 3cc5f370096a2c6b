"""What refuses a state leaves all objects as they were, from a file and from a mapping; the rest loads as in torch."""

import array
import copy
import random
import warnings
from collections import Counter, defaultdict, deque, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.metrics import Average
from torch import nn

from distckpt import Checkpoint, LoadReport, PartialLoadError, StateMismatchError
from tests.support.equality import equal
from tests.unit.toys import Notebook, Refuses, linear, snapshot

load = Checkpoint.load_objects
FLOAT4 = torch.arange(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)


class Held(nn.Module):
    """Holds one buffer."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.layer = linear(0)
        self.register_buffer("it", tensor)


def hooked(tensor: torch.Tensor) -> Held:
    """Return the same, not plain: there is no dry run."""
    module = Held(tensor)
    module.register_load_state_dict_post_hook(lambda *_: None)  # type: ignore[no-untyped-call]  # torch ships it without types
    return module


def in_inference_mode() -> torch.Tensor:
    with torch.inference_mode():
        return torch.zeros(4)


def without_memory() -> torch.Tensor:
    tensor = torch.zeros(4)
    tensor.untyped_storage().resize_(4)
    return tensor


BASE = torch.arange(8.0)

# A live tensor, and a state that it refuses though their shapes agree.
PAIRS: dict[str, tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]] = {
    "expanded": (lambda: torch.zeros(1).expand(4), lambda: torch.ones(4)),
    "expanded inside": (lambda: torch.zeros(2, 1, 2).expand(2, 3, 2), lambda: torch.ones(2, 3, 2)),
    "inference tensor": (in_inference_mode, lambda: torch.ones(4)),
    "no data": (lambda: torch.zeros(4), lambda: torch.ones(4, device="meta")),
    "float4 into float32": (lambda: torch.zeros(4), lambda: FLOAT4),
    "bits into integers": (
        lambda: torch.zeros(4, dtype=torch.int64),
        lambda: torch.zeros(4, dtype=torch.uint8).view(torch.bits8),
    ),
}


@pytest.mark.parametrize("from_file", [True, False], ids=["file", "mapping"])
@pytest.mark.parametrize("make", [Held, hooked], ids=["plain", "hooked"])
@pytest.mark.parametrize("pair", PAIRS)
def test_what_only_a_live_tensor_refuses_changes_nothing(
    tmp_path: Path, pair: str, make: Callable[[torch.Tensor], Held], *, from_file: bool
) -> None:
    live, given = PAIRS[pair]
    objects: dict[str, Any] = {"first": linear(1), "held": make(live()), "last": linear(2), "n": Notebook({"page": 1})}
    new = {f"layer.{key}": value for key, value in linear(5).state_dict().items()}
    states = {"first": linear(3).state_dict(), "held": {**new, "it": given()}, "last": linear(4).state_dict()}
    source: Any = {**states, "n": {"page": 2}}
    if from_file:
        torch.save(source, tmp_path / "a.pt")
        source = tmp_path / "a.pt"
    others = {name: one for name, one in objects.items() if name != "held"}
    before = snapshot({**others, "layer": objects["held"].layer})
    with pytest.raises(RuntimeError, match='While copying the parameter named "it"') as caught:
        load(objects, source)
    assert equal(snapshot({**others, "layer": objects["held"].layer}), before)
    assert not isinstance(caught.value, PartialLoadError)
    if make is Held:
        assert isinstance(caught.value, StateMismatchError)
        assert caught.value.mismatched == ("held.it",)


def test_a_live_tensor_whose_memory_was_given_back_is_refused() -> None:
    objects = {"first": linear(1), "held": Held(without_memory())}
    before = snapshot({"first": objects["first"]})
    new = {f"layer.{key}": value for key, value in linear(5).state_dict().items()}
    with pytest.raises(StateMismatchError, match="memory was given back"):
        load(objects, {"first": linear(3).state_dict(), "held": {**new, "it": torch.ones(4)}})
    assert equal(snapshot({"first": objects["first"]}), before)


def test_a_state_that_overlaps_with_the_live_tensor_changes_nothing() -> None:
    base = torch.arange(8.0)
    objects = {"first": linear(1), "held": Held(base[:4])}
    before = snapshot(objects)
    new = {f"layer.{key}": value for key, value in linear(5).state_dict().items()}
    with pytest.raises(RuntimeError, match="single memory location"):
        load(objects, {"first": linear(3).state_dict(), "held": {**new, "it": base[2:6]}})
    assert equal(snapshot(objects), before)


def test_a_modules_own_state_loads_into_it() -> None:
    module = Held(torch.ones(4))
    before = snapshot({"m": module})
    load({"m": module}, {"m": module.state_dict()})
    assert equal(snapshot({"m": module}), before)


# -- passed over -----------------------------------------------------------------------------------------


def odd_tensors() -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes, or deprecated
        return {
            "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            "mkldnn": torch.ones(2, 2).to_mkldnn(),
            "sparse": torch.eye(2).to_sparse_csr(),
            "float4": FLOAT4,
        }


@pytest.mark.parametrize("kind", list(odd_tensors()))
def test_an_unexpected_tensor_of_any_kind_is_passed_over_and_reported(kind: str) -> None:
    model, state = linear(0), {**linear(1).state_dict(), "more": odd_tensors()[kind]}
    assert load({"m": model}, {"m": state}, strict=False) == LoadReport(unexpected=("m.more",))
    assert equal(model.state_dict(), linear(1).state_dict())
    with pytest.raises(StateMismatchError) as caught:
        load({"m": model}, {"m": state})
    assert caught.value.unexpected == ("m.more",)


# -- put back ----------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["x", "y"])  # noqa: PYI024 - of the kind that programs have


class InPlace:
    """Takes its state into the containers that it has."""

    def __init__(self, number: int) -> None:
        self.mapping, self.list, self.set = {"deep": [number]}, [number], {number}
        self.deque, self.bytes, self.array = deque([number], maxlen=2), bytearray([number]), array.array("i", [number])
        self.counter, self.default = Counter(a=number), defaultdict(list, a=[number])
        self.tensor, self.pair, self.nan = torch.full((2,), float(number)), Pair(number, [number]), float("nan")

    def state_dict(self) -> dict[str, Any]:
        return vars(self)  # all of it is live

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, given in dict(state).items():
            mine: Any = getattr(self, name)
            if isinstance(mine, dict | set):
                mine.clear()
                mine.update(given)
            elif isinstance(mine, list | bytearray | array.array):
                mine[:] = given
            elif isinstance(mine, deque):
                mine.clear()
                mine.extend(given)
            elif isinstance(mine, torch.Tensor):
                mine.copy_(given)
            else:
                setattr(self, name, given)


class Generators:
    """Draws from generators of its own."""

    def __init__(self, number: int) -> None:
        self.python, self.torch = random.Random(number), torch.Generator()
        self.torch.manual_seed(number)

    def state_dict(self) -> dict[str, Any]:
        return {"python": self.python.getstate(), "torch": self.torch.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.python.setstate(state["python"])
        self.torch.set_state(state["torch"])


def average(number: int) -> Average:
    metric = Average()
    metric.update(torch.tensor(float(number)))
    return metric


@pytest.mark.parametrize("make", [InPlace, Generators, average])
def test_what_is_loaded_in_place_is_put_back(make: Callable[[int], Any]) -> None:
    live = make(1)
    before = repr(live.state_dict())
    other = make(2)
    with pytest.raises(RuntimeError, match="it refuses") as caught:
        load({"it": live, "bad": Refuses()}, {"it": copy.deepcopy(other.state_dict()), "bad": {}})
    assert not isinstance(caught.value, PartialLoadError)
    assert repr(live.state_dict()) == before
    assert repr(other.state_dict()) != before


class Holds:
    """Holds a tensor of whatever kind in its state, and a number."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.number = tensor, 0

    def state_dict(self) -> dict[str, Any]:
        return {"tensor": self.tensor, "number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


def per_channel() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        scales, points = torch.tensor([0.1, 0.2]), torch.tensor([0.0, 0.0])
        return torch.quantize_per_channel(torch.ones(2, 4), scales, points, 0, torch.quint4x2)


ODD: dict[str, Callable[[], torch.Tensor]] = {
    "quantised per channel": per_channel,
    "without memory": without_memory,
    "expanded": lambda: torch.zeros(1).expand(3),
    "expanded beyond all memory": lambda: torch.zeros(1).expand(10**15),
    "with a graph": lambda: torch.ones(2, requires_grad=True) * 2,
    "lazy": nn.UninitializedParameter,
}


@pytest.mark.parametrize("kind", ODD)
def test_copying_a_state_never_fails_a_load_that_fits(kind: str) -> None:
    holds = Holds(ODD[kind]())
    load({"it": holds, "model": linear(0)}, {"it": {"number": 3}, "model": linear(1).state_dict()})
    assert holds.number == 3
    with pytest.raises(RuntimeError, match="it refuses"):
        load({"it": holds, "bad": Refuses()}, {"it": {"number": 4}, "bad": {}})
    assert holds.number == 3


# -- a state that is no mapping ----------------------------------------------------------------------------


@pytest.mark.parametrize("state", [torch.arange(3), [1, 2], (1, {"a": 2}), 7, None, "text", 0.5])
@pytest.mark.parametrize("from_file", [True, False], ids=["file", "mapping"])
def test_a_state_that_is_no_mapping_belongs_to_its_object(tmp_path: Path, state: Any, *, from_file: bool) -> None:
    source: Any = {"it": state, "model": linear(1).state_dict()}
    if from_file:
        torch.save(source, tmp_path / "a.pt")
        source = tmp_path / "a.pt"
    fresh = Notebook(copy.copy(state) if state is not None else 1)
    load({"it": fresh}, source)
    assert equal(fresh.state, state)
    load({"it": fresh, "model": linear(0)}, source)
    assert equal(fresh.state, state)


# -- torch.compile -------------------------------------------------------------------------------------------


def compiled(module: nn.Module) -> nn.Module:
    made: nn.Module = torch.compile(module)  # type: ignore[assignment]  # of a module it makes a module
    return made


def parts(seed: int, *, what: str) -> nn.Module:
    """Return a module of which nothing, all, a part, or both are compiled."""
    torch.manual_seed(seed)
    inner: nn.Module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    module = nn.Sequential(compiled(inner) if what in ("part", "both") else inner, nn.Linear(2, 2))
    return compiled(module) if what in ("all", "both") else module


@pytest.mark.parametrize("saved", ["no", "all", "part", "both"])
@pytest.mark.parametrize("live", ["no", "all", "part", "both"])
@pytest.mark.parametrize("from_file", [True, False], ids=["file", "mapping"])
def test_what_is_compiled_makes_no_difference(tmp_path: Path, saved: str, live: str, *, from_file: bool) -> None:
    state = parts(1, what=saved).state_dict()  # as ignite saves it
    module = parts(2, what=live)
    before = {name: one.data_ptr() for name, one in module.named_parameters()}
    source: Any = {"m": state, "other": {}}
    if from_file:
        torch.save(source, tmp_path / "a.pt")
        source = tmp_path / "a.pt"
    load({"m": module, "other": nn.ReLU()}, source)
    for mine, given in zip(module.state_dict().values(), state.values(), strict=True):
        assert torch.equal(mine, given)
    assert {name: one.data_ptr() for name, one in module.named_parameters()} == before


def test_a_compiled_data_parallel_loads_into_the_module_itself() -> None:
    state = compiled(nn.DataParallel(linear(1))).state_dict()
    assert list(state) == ["_orig_mod.module.weight", "_orig_mod.module.bias"]
    for module in (linear(0), compiled(linear(0)), nn.DataParallel(compiled(linear(0)))):
        load({"m": module}, {"m": state})
        assert equal(list(module.state_dict().values()), list(state.values()))


def test_names_that_are_the_modules_own_are_left_alone() -> None:
    module = nn.Module()
    module._orig_mod = nn.Linear(2, 2)
    module.weight = nn.Parameter(torch.zeros(1))
    state = {key: value + 1 for key, value in module.state_dict().items()}
    load({"m": module}, {"m": state})
    assert equal(dict(module.state_dict()), state)
