"""Straight into live tensors go only objects whose state torch's own code alone sees; all others load as in torch."""

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torchs

from distckpt import Checkpoint, DiskSaver
from distckpt.loading.dry_run import try_load
from distckpt.loading.plain_objects import is_plain_optimizer
from distckpt.ptformat.reader import OpenCheckpoint
from tests.support.equality import equal
from tests.unit.toys import linear

load = Checkpoint.load_objects


def is_plain(module: nn.Module) -> bool:
    return try_load(module, module.state_dict(), {}) is not None


def doubling(own: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that loads twice what it is given, under the name of the one that it wraps."""

    @functools.wraps(own)
    def load_doubled(*args: Any, **kwargs: Any) -> Any:
        given = next(one for one in args if isinstance(one, dict) and one)
        for key, value in given.items():
            given[key] = value * 2
        return own(*args, **kwargs)

    return load_doubled


# Each puts code that doubles in the way of a Linear's state.


def on_the_instance(name: str) -> Callable[[nn.Module, pytest.MonkeyPatch], None]:
    return lambda module, _: setattr(module, name, doubling(getattr(module, name)))


def on_the_class(kind: type, name: str) -> Callable[[nn.Module, pytest.MonkeyPatch], None]:
    def put(_module: nn.Module, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(kind, name, doubling(getattr(kind, name)), raising=False)

    return put


def by_a_hook(module: nn.Module, _: pytest.MonkeyPatch) -> None:
    def hook(_module: nn.Module, state: dict[str, Any], *_args: Any) -> None:
        state.update({key: value * 2 for key, value in state.items()})

    module.register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]  # torch ships it without types


def through_a_decorator_of_torchs(_: nn.Module, patch: pytest.MonkeyPatch) -> None:
    mine = doubling(nn.Module._load_from_state_dict)
    patch.setattr(nn.Linear, "_load_from_state_dict", torch.no_grad()(mine), raising=False)


def by_its_code(_: nn.Module, patch: pytest.MonkeyPatch) -> None:
    def twice(self: Any, state: Any, prefix: str, *args: Any) -> None:
        state = {key: value * 2 for key, value in state.items()}
        torch.nn.Module.__base_load(self, state, prefix, *args)  # type: ignore[attr-defined]  # put there below

    own: Any = nn.Module._load_from_state_dict
    kept: Any = FunctionType(own.__code__, own.__globals__, closure=own.__closure__)
    patch.setattr(nn.Module, "__base_load", kept, raising=False)
    patch.setattr(own, "__code__", twice.__code__)


WAYS: dict[str, Callable[[nn.Module, pytest.MonkeyPatch], None]] = {
    "load_state_dict of the instance": on_the_instance("load_state_dict"),
    "_load_from_state_dict of the instance": on_the_instance("_load_from_state_dict"),
    "load_state_dict of Module": on_the_class(nn.Module, "load_state_dict"),
    "_load_from_state_dict of Linear": on_the_class(nn.Linear, "_load_from_state_dict"),
    "_load_from_state_dict of Module": on_the_class(nn.Module, "_load_from_state_dict"),
    "a hook": by_a_hook,
    "a decorator": through_a_decorator_of_torchs,
    "the code of the method itself": by_its_code,
}


@pytest.mark.parametrize("from_file", [True, False], ids=["file", "mapping"])
@pytest.mark.parametrize("where", WAYS)
def test_code_that_is_put_in_the_way_of_a_state_sees_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, *, from_file: bool
) -> None:
    state = dict(linear(1).state_dict())
    source: Any = {"m": dict(state), "other": linear(2).state_dict()}
    DiskSaver(tmp_path)(source, "a.pt")
    module, other = linear(0), linear(3)
    assert is_plain(module)
    WAYS[where](module, monkeypatch)
    assert not is_plain(module)
    load({"m": module, "other": other}, tmp_path / "a.pt" if from_file else source)
    monkeypatch.undo()
    assert equal(dict(module.state_dict()), {key: 2 * one for key, one in state.items()})
    assert is_plain(linear(0)), "and it is noticed when it is gone"


def test_a_base_that_super_reaches_is_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_plain(nn.BatchNorm1d(2))
    monkeypatch.setattr(nn.Module, "_load_from_state_dict", doubling(nn.Module._load_from_state_dict))
    assert not is_plain(nn.BatchNorm1d(2)), "its own method is torch's, and calls that one"


class Subclass(torch.Tensor):
    """A tensor that sees what is done to it."""


class SetsItsOwn(nn.Linear):
    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)


def with_a_tensor_of(kind: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.register_buffer("more", kind(torch.ones(2)))
    return nn.Sequential(layer)


def with_a_method_of_a_tensor() -> nn.Module:
    module = nn.Linear(2, 2)
    vars(module.weight)["copy_"] = lambda _: None
    return module


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # deprecated, and people still have them
@pytest.mark.parametrize(
    "make",
    [
        lambda: SetsItsOwn(2, 2),
        lambda: with_a_tensor_of(lambda one: one.as_subclass(Subclass)),
        lambda: with_a_tensor_of(lambda one: one.to_sparse()),
        lambda: with_a_tensor_of(lambda one: torch.quantize_per_tensor(one, 0.1, 0, torch.quint8)),
        with_a_method_of_a_tensor,
    ],
    ids=["__setattr__", "subclass", "sparse", "quantised", "tensor's method"],
)
def test_what_is_not_proven_is_not_plain(make: Callable[[], nn.Module]) -> None:
    assert not is_plain(make())


def test_hooks_on_registration_see_what_is_assigned() -> None:
    handle = torchs.register_module_parameter_registration_hook(lambda *_: None)
    try:
        assert not is_plain(linear(0))
    finally:
        handle.remove()
    assert is_plain(linear(0))


def test_modules_of_torchs_and_of_users_that_override_nothing_are_plain() -> None:
    class Ordinary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.layer = list(range(1000)), nn.LSTM(2, 2)
            self.layer.compile()

        def __del__(self) -> None:  # not run for the twin
            raised.append(1)

    raised: list[int] = []
    made = Ordinary()
    compiled: Any = torch.compile(nn.Linear(2, 2))
    for module in (made, nn.Sequential(nn.BatchNorm1d(2), made), nn.Sequential(compiled)):
        assert is_plain(module)
    assert not raised


# -- optimizers ----------------------------------------------------------------------------------------


def stepped(seed: int, kind: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW) -> torch.optim.Optimizer:
    module = linear(seed)
    optimizer = kind(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer


class OwnState(torch.optim.AdamW):
    """Looks at the state when it is set."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        for held in state.get("state", {}).values():
            held["exp_avg"] = held["exp_avg"] * 2
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch ships it without types


@pytest.mark.parametrize("way", ["instance", "class", "subclass"])
def test_an_optimizers_own_way_sees_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    saved = copy.deepcopy(stepped(1).state_dict())
    DiskSaver(tmp_path)({"o": saved}, "a.pt")
    live = stepped(0, OwnState if way == "subclass" else torch.optim.AdamW)
    own = torch.optim.Optimizer.load_state_dict

    def scaled(optimizer: Any, state: Any) -> None:
        for held in state["state"].values():
            held["exp_avg"].mul_(2)
        own(optimizer, state)

    if way == "instance":
        live.load_state_dict = functools.partial(scaled, live)  # type: ignore[method-assign]
    elif way == "class":
        monkeypatch.setattr(torch.optim.Optimizer, "load_state_dict", functools.wraps(own)(scaled))
    assert not is_plain_optimizer(live)
    load({"o": live}, tmp_path / "a.pt")
    for number, held in saved["state"].items():
        assert torch.equal(live.state_dict()["state"][number]["exp_avg"], 2 * held["exp_avg"])


# -- every byte that is handed out was read ------------------------------------------------------------


class Keeps:
    """Takes whatever it is given."""

    def __init__(self) -> None:
        self.state: Any = None

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def hidden() -> Iterator[tuple[str, Any, Callable[[Any], torch.Tensor]]]:
    tensor = torch.arange(64.0)
    attribute: Any = OrderedDict(a=1)
    attribute.hidden = {"deep": [tensor]}
    yield "an attribute", {"o": attribute}, lambda state: state["o"].hidden["deep"][0]
    yield "a view", {"o": tensor[3:9]}, lambda state: state["o"]
    yield "the same tensor", {"o": tensor}, lambda state: state["o"]
    yield "a key", {(tensor[5:7],): 1}, lambda state: next(iter(state))[0]
    yield "a tuple", {"o": [({"t": (tensor[::2],)},)]}, lambda state: state["o"][0][0]["t"][0]


@pytest.mark.parametrize("number", range(5), ids=[name for name, _, _ in hidden()])
def test_tensors_are_read_wherever_they_hide_next_to_a_live_one(tmp_path: Path, number: int) -> None:
    _, state, find = list(hidden())[number]
    expected = find(state).clone()
    whole = find({"o": torch.arange(64.0)}) if number == 2 else torch.arange(64.0)
    torch.save({"m": {"it": state["o"] if number == 2 else whole}, "k": state}, tmp_path / "a.pt")
    module, keeps = nn.Module(), Keeps()
    module.register_buffer("it", torch.zeros(64))
    load({"m": module, "k": keeps}, tmp_path / "a.pt")
    assert torch.equal(find(keeps.state), expected)
    assert torch.equal(module.get_buffer("it"), torch.arange(64.0))


def test_what_no_object_is_given_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"m": linear(1).state_dict(), "more": [torch.ones(100_000)]}, tmp_path / "a.pt")
    read, real = list[int](), OpenCheckpoint.read

    def watched(self: OpenCheckpoint, parts: Any) -> None:
        parts = list(parts)
        read.extend(num_bytes for _, num_bytes, _ in parts)
        real(self, parts)

    monkeypatch.setattr(OpenCheckpoint, "read", watched)
    model = linear(0)
    load({"m": model}, tmp_path / "a.pt", verify=False)
    assert equal(model.state_dict(), linear(1).state_dict())
    assert sum(read) == 24
