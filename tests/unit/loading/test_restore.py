"""All objects get their state, or none does: optimizers, schedulers, engines, users' objects; and what errors say."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from torch import nn
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

from distckpt.loading.api import load_objects
from distckpt.loading.restore import prepare
from distckpt.saving.capture import map_tree


class InPlace:
    """Takes its state into the tensors and containers that it has."""

    def __init__(self, value: float = 0.0) -> None:
        self.mean, self.log = torch.full((2,), value), {"deep": [[value]]}

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean.clone(), "log": copy.deepcopy(self.log)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean.copy_(state["mean"])
        self.log["deep"][0][:] = state["log"]["deep"][0]


class Slots:
    """Has no attributes that could be looked up by `vars`."""

    __slots__ = ("mean",)

    def __init__(self, value: float = 0.0) -> None:
        self.mean = torch.full((2,), value)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean.copy_(state["mean"])


class OwnSGD(torch.optim.SGD):
    """Takes its state into the buffers that it has."""

    def load_state_dict(self, state_dict: Any) -> None:
        for held, given in zip(self.state.values(), state_dict["state"].values(), strict=True):
            held["momentum_buffer"].copy_(given["momentum_buffer"])
        for group, given in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group["lr"] = given["lr"]


class Refuses:
    """Fails half-way, unless it is given a state of its own."""

    def __init__(self) -> None:
        self.seen = [0]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def load_state_dict(self, state: Any) -> None:
        self.seen.append(1)
        if "seen" not in state:
            raise RuntimeError("it refuses")
        self.seen[:] = state["seen"]


def stepped(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> torch.optim.Optimizer:
    """Return an optimizer that has a state."""
    layer = nn.Linear(2, 2)
    optimizer = kind(layer.parameters(), **options)

    def loss() -> Any:
        optimizer.zero_grad()
        layer(torch.ones(1, 2)).square().sum().backward()
        return torch.ones(())

    for _ in range(3):
        optimizer.step(loss)
    return optimizer


def scheduler(kind: Callable[..., Any], num_steps: int, **options: Any) -> Any:
    optimizer = stepped(torch.optim.SGD, lr=1.0)
    made = kind(optimizer, **options)
    for _ in range(num_steps):
        optimizer.step()
        made.step()
    return made


def engine(num_epochs: int) -> Engine:
    made = Engine(lambda _engine, _batch: None)
    made.run([0, 0], max_epochs=num_epochs)
    return made


# For each kind an object, and another one whose state differs.
KINDS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "SGD": (
        lambda: stepped(torch.optim.SGD, lr=0.1, momentum=0.9),
        lambda: stepped(torch.optim.SGD, lr=0.2, momentum=0.8),
    ),
    "Adam": (lambda: stepped(torch.optim.Adam, lr=0.1), lambda: stepped(torch.optim.Adam, lr=0.2, amsgrad=True)),
    "LBFGS": (lambda: stepped(torch.optim.LBFGS, lr=0.1), lambda: stepped(torch.optim.LBFGS, lr=0.2)),
    "own optimizer": (
        lambda: stepped(OwnSGD, lr=0.1, momentum=0.9),
        lambda: stepped(OwnSGD, lr=0.2, momentum=0.9),
    ),
    "StepLR": (
        lambda: scheduler(lr_scheduler.StepLR, 1, step_size=2),
        lambda: scheduler(lr_scheduler.StepLR, 3, step_size=2),
    ),
    "OneCycleLR": (
        lambda: scheduler(lr_scheduler.OneCycleLR, 1, max_lr=1.0, total_steps=9),
        lambda: scheduler(lr_scheduler.OneCycleLR, 3, max_lr=1.0, total_steps=9),
    ),
    "Engine": (lambda: engine(1), lambda: engine(3)),
    "object": (InPlace, lambda: InPlace(3.0)),
    "object with slots": (Slots, lambda: Slots(3.0)),
}
MISFITS: dict[str, tuple[Callable[[], Any], Any]] = {
    "module": (lambda: nn.Linear(2, 2), {"weight": torch.ones(3, 3), "bias": torch.ones(2)}),
    "groups": (lambda: stepped(torch.optim.SGD), {"state": {}, "param_groups": [{"params": []}]}),
    "no optimizer's": (lambda: stepped(torch.optim.SGD), {"weight": 1}),
    "another optimizer's": (
        lambda: stepped(torch.optim.Adam),
        stepped(torch.optim.SGD, lr=0.1, momentum=0.9).state_dict(),
    ),
    "damaged optimizer's": (
        lambda: stepped(torch.optim.SGD),
        {**stepped(torch.optim.SGD, lr=0.7).state_dict(), "state": [1]},
    ),
    "object": (Refuses, {}),
    "engine": (lambda: engine(1), {"nothing": 1}),
    "list": (lambda: [nn.ReLU()], []),
    "nested": (lambda: {"x": nn.ReLU()}, {}),
}
ERRORS = (RuntimeError, ValueError, KeyError, AttributeError, TypeError)


def bits(value: Any) -> Any:
    """Describe a state so that `==` compares types and bits."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.contiguous().reshape(-1).view(torch.uint8).tolist()
    if isinstance(value, dict):
        return [(key, bits(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    return type(value), repr(value)


def state_of(tree: Any) -> Any:
    if isinstance(tree, dict | list):
        return [state_of(item) for item in (tree.values() if isinstance(tree, dict) else tree)]
    return bits(tree.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_good_state_loads_to_the_bit(kind: str) -> None:
    make, make_other = KINDS[kind]
    obj, state = make(), copy.deepcopy(make_other().state_dict())
    assert bits(obj.state_dict()) != bits(state), "the test would prove nothing"
    load_objects({"o": obj, "last": nn.ReLU()}, {"o": state, "last": {}})
    assert bits(obj.state_dict()) == bits(state)


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_changed_when_one_does_not_fit(kind: str, misfit: str, *, first: bool) -> None:
    (make, make_other), (make_bad, bad_state) = KINDS[kind], MISFITS[misfit]
    objects = {"good": make(), "bad": make_bad()} if first else {"bad": make_bad(), "good": make()}
    before = state_of(objects)
    with pytest.raises(ERRORS):
        load_objects(objects, {"good": copy.deepcopy(make_other().state_dict()), "bad": bad_state})
    assert state_of(objects) == before


@pytest.mark.parametrize("misfit", ["another optimizer's", "object"])
def test_of_all_kinds_together_none_is_changed(misfit: str) -> None:
    make_bad, bad_state = MISFITS[misfit]
    objects = {**{kind: make() for kind, (make, _) in KINDS.items()}, "module": nn.Linear(1, 1), "bad": make_bad()}
    states = {kind: copy.deepcopy(make_other().state_dict()) for kind, (_, make_other) in KINDS.items()}
    before = state_of(objects)
    with pytest.raises(ERRORS):
        load_objects(objects, {**states, "module": nn.Linear(1, 1).state_dict(), "bad": bad_state})
    assert state_of(objects) == before


def test_optimizer_goes_on_with_its_own_parameters_after_a_failed_load() -> None:
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    with pytest.raises(KeyError):
        load_objects({"o": optimizer}, {"o": MISFITS["another optimizer's"][1]})
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, layer.weight)


@pytest.mark.parametrize(
    ("objects", "state", "message"),
    [
        ({"a": 1, "b": 1}, {"a": {}}, r"Key 'b' from x is not found in y: dict_keys\(\['a'\]\)"),
        ({"a": {"b": 1}, "c": 1}, {"a": {}, "c": {}}, "Key 'b' from x is not found in y"),
        ({"a": [1, 1]}, {"a": [{}]}, "Size of y: 1 does not match the size of x: '2'"),
        (
            {"a": [1], "b": 1},
            {"a": {}, "b": {}},
            r"to_load holds <class 'list'> at 'a', but the checkpoint holds <class",
        ),
    ],
)
def test_what_is_missing_is_named(objects: Any, state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(map_tree(lambda _: nn.ReLU(), objects), state, {})


class Allocations(TorchDispatchMode):
    """Adds up the bytes of every storage, off the meta device, that an operation makes."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then look at what it made."""
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.device.type != "meta":
            storage = made.untyped_storage()
            self.num_bytes += 0 if storage.data_ptr() in self.known else storage.nbytes()
        return made


def test_dry_run_takes_no_memory() -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.TransformerEncoderLayer(64, 2))
    state = copy.deepcopy(module.state_dict())
    with Allocations([*module.state_dict().values(), *state.values()]) as allocated:
        load_objects({"m": module, "o": InPlace()}, {"m": state, "o": InPlace(1.0).state_dict()})
    assert allocated.num_bytes < 100
