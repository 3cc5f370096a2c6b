"""Modules with hooks, extra state, tied weights and other ways of their own are tried before anything is changed."""

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from distckpt import Checkpoint
from distckpt.loading import dry_run
from tests.support.equality import equal
from tests.unit.toys import Refuses, linear, snapshot

WRONG = linear(1, in_features=3).state_dict()


def _load_next_to_a_mismatch(module: nn.Module, state: dict[str, Any]) -> None:
    """Load `module` together with another that does not fit, in both orders."""
    for names in (("module", "misfit"), ("misfit", "module")):
        objects = {name: {"module": module, "misfit": linear(0)}[name] for name in names}
        with pytest.raises(RuntimeError, match="size mismatch"):
            Checkpoint.load_objects(objects, {"module": state, "misfit": WRONG})


class Logged(nn.Linear):
    """Counts its loads in a list, which a shallow copy would share."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.log: list[str] = []

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:  # noqa: FBT001, FBT002
        self.log.append("load")
        return super().load_state_dict(state_dict, strict, assign)


class LoggedBelow(Logged):
    """Counts where torch calls each sub-module."""

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:  # noqa: FBT001, FBT002
        return nn.Linear.load_state_dict(self, state_dict, strict, assign)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.log.append("load")
        super()._load_from_state_dict(*args)


class ExtraState(nn.Linear):
    """Keeps a setting next to its weights."""

    def __init__(self, setting: int) -> None:
        super().__init__(2, 2)
        self.settings = {"value": setting}

    def get_extra_state(self) -> dict[str, int]:
        return dict(self.settings)

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.settings.update(state)


class ExtraStateAndLock(ExtraState):
    """... and something that cannot be copied."""

    def __init__(self, setting: int) -> None:
        super().__init__(setting)
        self.lock = threading.Lock()


class Hooked(nn.Linear):
    """Registers hooks of its own on loading: one before, one after."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.log: list[str] = []
        self.register_load_state_dict_pre_hook(type(self).before)  # type: ignore[no-untyped-call]
        self._register_load_state_dict_pre_hook(self.bound)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(type(self).after)  # type: ignore[no-untyped-call]

    @staticmethod
    def before(module: Any, state: Any, prefix: str, *_args: Any) -> None:
        module.log.append("before")
        module.register_buffer("scale", torch.zeros(3))
        state.setdefault(f"{prefix}scale", torch.ones(3))

    def bound(self, *_args: Any) -> None:
        self.log.append("bound")

    @staticmethod
    def after(module: Any, _keys: Any) -> None:
        module.log.append("after")


class LooksAtValues(nn.Linear):
    """Looks at the numbers it is to load, as an observer of a quantised network does."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if state_dict[f"{prefix}weight"].abs().max().item() > 100:
            msg = "too large"
            raise RuntimeError(msg)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Tied(nn.Module):
    """Two layers, one weight."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.one, self.two = linear(seed), linear(seed + 1)
        self.two.weight = self.one.weight


def _quiet(make: Callable[[], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy modules and the older norms warn that they are what they are
        return make()


UNUSUAL: dict[str, Callable[[], nn.Module]] = {
    "logged": Logged,
    "logged-below": LoggedBelow,
    "extra-state": lambda: ExtraState(1),
    "extra-state-and-lock": lambda: ExtraStateAndLock(1),
    "looks-at-values": lambda: LooksAtValues(2, 2),
    "tied": lambda: Tied(0),
    "batch-norm": lambda: nn.BatchNorm1d(2),
    "lstm": lambda: nn.LSTM(2, 2),
    "weight-norm": lambda: nn.utils.parametrizations.weight_norm(linear(0)),
    "spectral-norm": lambda: _quiet(lambda: nn.utils.spectral_norm(linear(0))),
    "frozen": lambda: linear(0).requires_grad_(requires_grad=False),
    "nested": lambda: nn.Sequential(LoggedBelow(), nn.ModuleList([ExtraState(1), nn.BatchNorm1d(2)])),
}


def _different(module: nn.Module) -> dict[str, Any]:
    """Return a state that fits `module` and differs in everything."""
    state: dict[str, Any] = {}
    for key, value in module.state_dict().items():
        state[key] = value + 1 if torch.is_tensor(value) else {"value": value["value"] + 1}
    return state


def _attributes(module: nn.Module) -> list[Any]:
    return [list(part.log) if isinstance(part, Logged | Hooked) else None for part in module.modules()]


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_modules_are_untouched_next_to_a_mismatch(kind: str) -> None:
    module = UNUSUAL[kind]()
    before, attributes = snapshot({"it": module}), _attributes(module)
    _load_next_to_a_mismatch(module, _different(module))
    assert equal(snapshot({"it": module}), before)
    assert _attributes(module) == attributes


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_modules_are_loaded_once_when_they_fit(kind: str) -> None:
    module = UNUSUAL[kind]()
    state = _different(module)
    Checkpoint.load_objects({"module": module, "other": linear(0)}, {"module": state, "other": linear(1).state_dict()})
    assert equal(dict(module.state_dict()), state)
    for part in module.modules():
        assert not isinstance(part, Logged) or part.log == ["load"]


@pytest.mark.parametrize("kind", [kind for kind in UNUSUAL if kind != "lstm"])
def test_unusual_modules_that_refuse_are_untouched(kind: str) -> None:
    module = UNUSUAL[kind]()
    before = snapshot({"it": module})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        Checkpoint.load_objects({"module": module}, {**_different(module), "surplus": torch.ones(1)})
    assert equal(snapshot({"it": module}), before)


def test_hooks_run_on_the_module_once_when_it_fits() -> None:
    module = Hooked()
    Checkpoint.load_objects(
        {"module": module, "other": linear(0)}, {"module": linear(1).state_dict(), "other": linear(2).state_dict()}
    )
    assert module.log == ["before", "bound", "after"]
    assert torch.equal(module.state_dict()["scale"], torch.ones(3))


def test_hooks_do_not_touch_the_module_next_to_a_mismatch() -> None:
    module = Hooked()
    before = snapshot({"it": module})
    _load_next_to_a_mismatch(module, linear(1).state_dict())
    assert module.log == []
    assert equal(snapshot({"it": module}), before)


def test_a_hook_that_raises_leaves_everything_as_it_was() -> None:
    def refuse(*_args: Any) -> None:
        raise LookupError

    modules = {"one": linear(0), "two": linear(1)}
    modules["two"].register_load_state_dict_pre_hook(refuse)  # type: ignore[no-untyped-call]
    before = snapshot(modules)
    with pytest.raises(LookupError):
        Checkpoint.load_objects(modules, {"one": linear(2).state_dict(), "two": linear(3).state_dict()})
    assert equal(snapshot(modules), before)


@pytest.mark.parametrize("when", ["pre", "post"])
def test_an_optimizers_hook_that_raises_leaves_everything_as_it_was(when: str) -> None:
    def refuse(*_args: Any) -> None:
        raise LookupError

    objects = {name: torch.optim.SGD(linear(0).parameters(), lr=0.1) for name in ("one", "two", "three")}
    register = getattr(objects["two"], f"register_load_state_dict_{when}_hook")
    register(refuse)
    before = snapshot(objects)
    state = torch.optim.SGD(linear(0).parameters(), lr=0.7).state_dict()
    with pytest.raises(LookupError):
        Checkpoint.load_objects(
            {**objects, "model": linear(0)}, {**dict.fromkeys(objects, state), "model": linear(1).state_dict()}
        )
    assert equal(snapshot(objects), before)


def test_values_that_a_module_refuses_are_refused_before_anything_changes() -> None:
    objects = {"first": linear(0), "picky": LooksAtValues(2, 2)}
    before = snapshot(objects)
    state = {"weight": torch.full((2, 2), 1e6), "bias": torch.zeros(2)}
    with pytest.raises(RuntimeError, match="too large"):
        Checkpoint.load_objects(objects, {"first": linear(1).state_dict(), "picky": state})
    assert equal(snapshot(objects), before)


def test_lazy_modules_are_materialised_by_their_state() -> None:
    lazy, source = _quiet(lambda: nn.LazyLinear(2)), linear(1, in_features=5)
    Checkpoint.load_objects(
        {"lazy": lazy, "other": linear(0)}, {"lazy": source.state_dict(), "other": linear(2).state_dict()}
    )
    assert equal(dict(lazy.state_dict()), dict(source.state_dict()))


@pytest.mark.parametrize("bad", [Refuses(), linear(0)])
def test_lazy_modules_stay_lazy_next_to_a_mismatch(bad: Any) -> None:
    lazy = _quiet(lambda: nn.LazyLinear(2))
    objects = {"lazy": lazy, "bad": bad}
    with pytest.raises(RuntimeError):
        Checkpoint.load_objects(objects, {"lazy": linear(1).state_dict(), "bad": WRONG})
    assert isinstance(lazy.weight, nn.UninitializedParameter)
    Checkpoint.load_objects({"lazy": lazy}, linear(1, in_features=5).state_dict())


def test_tied_weights_stay_tied() -> None:
    module = Tied(0)
    Checkpoint.load_objects(
        {"tied": module, "other": linear(0)}, {"tied": Tied(5).state_dict(), "other": linear(1).state_dict()}
    )
    assert module.one.weight is module.two.weight
    assert equal(module.state_dict(), Tied(5).state_dict())


def test_trying_costs_no_memory_for_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[str] = []
    real = dry_run._make_twin

    def watched(*args: Any) -> nn.Module:
        twin = real(*args)
        devices.extend(tensor.device.type for tensor in twin.parameters())
        return twin

    monkeypatch.setattr(dry_run, "_make_twin", watched)
    states = {"a": {**linear(2).state_dict(), "more": 1}, "b": {**linear(3).state_dict(), "more": 1}}
    Checkpoint.load_objects({"a": linear(0), "b": linear(1)}, states, strict=False)
    assert devices == ["meta"] * 4


def test_parameters_keep_their_identity_and_gradients() -> None:
    module = linear(0)
    weight = module.weight
    weight.grad = torch.ones(2, 2)
    Checkpoint.load_objects({"a": module, "b": linear(1)}, {"a": linear(2).state_dict(), "b": linear(3).state_dict()})
    assert module.weight is weight
    assert weight.requires_grad
    assert torch.equal(weight.grad, torch.ones(2, 2))
