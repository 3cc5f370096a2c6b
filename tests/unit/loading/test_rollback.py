"""A load that fails leaves every object as it was, whichever object refuses, and in whatever order."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from ignite.metrics import Average
from torch import nn

from distckpt import Checkpoint, EarlyStopping, PartialLoadError
from tests.support.equality import equal
from tests.unit.toys import InMemory, Notebook, Refuses, idle_engine, linear, run_epochs, snapshot


class InPlace(Notebook):
    """Holds a tensor, and copies into it."""

    def __init__(self, value: float) -> None:
        self.mean = torch.full((2,), value)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean.clone()}

    def load_state_dict(self, state: Any) -> None:
        self.mean.copy_(state["mean"])


class Nested(Notebook):
    """Fills a list inside a dictionary."""

    def __init__(self, value: float) -> None:
        self.stats: dict[str, Any] = {"losses": [value], "seen": {value}}

    def state_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.stats)

    def load_state_dict(self, state: Any) -> None:
        self.stats["losses"][:] = state["losses"]
        self.stats["seen"].clear()
        self.stats["seen"] |= state["seen"]


class Holder(Notebook):
    """Holds a module, as an average of weights does."""

    def __init__(self, seed: int) -> None:
        self.module = linear(seed)

    def state_dict(self) -> dict[str, Any]:
        return self.module.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.module.load_state_dict(state)


class Slots:
    """Has no ``__dict__``."""

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Any) -> None:
        self.value = state["value"]


class SlotsAndMore(Slots):
    """Has a ``__dict__`` in addition to its slots."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.more = value

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.more = state["value"]


class HalfWay(Notebook):
    """Fails after the first half of its own state."""

    def __init__(self, first: int, second: int) -> None:
        self.first, self.second = first, second

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first, "second": self.second}

    def load_state_dict(self, state: Any) -> None:
        self.first = state["first"]
        self.second = state["absent"]


class Power:
    """The callable of a LambdaLR, with a state of its own."""

    def __init__(self, base: float) -> None:
        self.base = base

    def __call__(self, epoch: int) -> float:
        return self.base**epoch


def _sgd(seed: int, *, steps: int = 0) -> torch.optim.SGD:
    layer = linear(seed)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1 + seed, momentum=0.9)
    for _ in range(steps):
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    return optimizer


def _stepped(make: Callable[[torch.optim.Optimizer], Any], seed: int) -> Any:
    optimizer = _sgd(seed)
    scheduler = make(optimizer)
    for _ in range(2 * seed):
        optimizer.step()
        scheduler.step()
    return scheduler


def _sequential(optimizer: torch.optim.Optimizer) -> Any:
    lr = torch.optim.lr_scheduler
    parts = [lr.ConstantLR(optimizer, total_iters=1), lr.ExponentialLR(optimizer, gamma=0.9)]
    return lr.SequentialLR(optimizer, parts, milestones=[1])


def _chained(optimizer: torch.optim.Optimizer) -> Any:
    lr = torch.optim.lr_scheduler
    return lr.ChainedScheduler([lr.ConstantLR(optimizer, total_iters=1), lr.ExponentialLR(optimizer, gamma=0.9)])


def _engine(seed: int) -> Engine:
    engine = idle_engine()
    engine.run([0] * seed, max_epochs=seed + 1)
    return engine


def _scaler(seed: int) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**seed)
    scaler.scale(torch.ones(1))
    return scaler


def _checkpoint(seed: int) -> Checkpoint:
    handler = Checkpoint({"model": linear(0)}, InMemory(), n_saved=None)
    run_epochs(handler, seed)
    return handler


def _stopping(seed: int) -> EarlyStopping:
    handler = EarlyStopping(9, lambda _engine: -seed, idle_engine())
    for _ in range(seed):
        handler(None)
    return handler


def _batch_norm(seed: int) -> nn.Module:
    module = nn.Sequential(nn.BatchNorm1d(2), linear(seed))
    module(torch.full((3, 2), float(seed)))
    return module


def _scripted(seed: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is, and people still have it
        traced: nn.Module = torch.jit.trace(linear(seed), torch.ones(1, 2))  # type: ignore[no-untyped-call]
        return traced


def _plateau(seed: int) -> Any:
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(_sgd(seed))
    for _ in range(seed):
        scheduler.step(1.0)
    return scheduler


# Each makes an object whose state depends on the seed.
KINDS: dict[str, Callable[[int], Any]] = {
    "module": linear,
    "batch-norm": _batch_norm,
    "scripted": _scripted,
    "sgd": lambda seed: _sgd(seed, steps=seed),
    "exponential": lambda seed: _stepped(lambda one: torch.optim.lr_scheduler.ExponentialLR(one, gamma=0.9), seed),
    "plateau": _plateau,
    "sequential": lambda seed: _stepped(_sequential, seed),
    "chained": lambda seed: _stepped(_chained, seed),
    "lambda": lambda seed: torch.optim.lr_scheduler.LambdaLR(_sgd(0), Power(1 / (1 + seed))),
    "engine": _engine,
    "grad-scaler": _scaler,
    "checkpoint": _checkpoint,
    "early-stopping": _stopping,
    "attribute": lambda seed: Notebook({"page": seed}),
    "in-place": lambda seed: InPlace(float(seed)),
    "nested": lambda seed: Nested(float(seed)),
    "holder": Holder,
    "slots": Slots,
    "slots-and-more": SlotsAndMore,
    "ema": lambda seed: torch.optim.swa_utils.AveragedModel(linear(seed)),
}


MISFITS: dict[str, tuple[Callable[[], Any], Any]] = {
    "custom": (Refuses, {}),
    "half-way": (lambda: HalfWay(1, 2), {"first": 3, "second": 4}),
    "shape": (lambda: linear(0), linear(1, in_features=3).state_dict()),
    "missing": (lambda: linear(0), {"weight": torch.ones(2, 2)}),
    "unexpected": (lambda: linear(0), {**linear(1).state_dict(), "more": torch.ones(1)}),
    "groups": (lambda: _sgd(0), {"state": {}, "param_groups": [{"params": [0], "lr": 1.0}, {"params": [], "lr": 1.0}]}),
    "other-optimizer": (lambda: torch.optim.Adam(linear(0).parameters()), _sgd(1, steps=2).state_dict()),
    "no-optimizer": (lambda: _sgd(0), {"weight": torch.ones(1)}),
    "engine": (idle_engine, {"nothing": 1}),
    "scheduler": (lambda: _stepped(_sequential, 1), {"nothing": 1}),
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["before", "after"])
def test_every_object_is_as_before_when_one_refuses(kind: str, misfit: str, place: str) -> None:
    make, wrong_state = MISFITS[misfit]
    good, bad = KINDS[kind](1), make()
    objects = {"good": good, "bad": bad} if place == "after" else {"bad": bad, "good": good}
    states = {"good": KINDS[kind](3).state_dict(), "bad": wrong_state}
    before = snapshot(objects)
    assert not equal(before["good"], states["good"]), "the test would prove nothing"
    with pytest.raises((RuntimeError, ValueError, KeyError, AttributeError)):
        Checkpoint.load_objects(objects, states)
    assert equal(snapshot(objects), before)


@pytest.mark.parametrize("kind", KINDS)
def test_every_object_is_loaded_when_none_refuses(kind: str) -> None:
    good, other = KINDS[kind](1), linear(0)
    state = KINDS[kind](3).state_dict()
    Checkpoint.load_objects({"good": good, "other": other}, {"good": state, "other": linear(5).state_dict()})
    assert equal(good.state_dict(), state)
    assert equal(other.state_dict(), linear(5).state_dict())


@pytest.mark.parametrize("last", ["custom", "shape", "other-optimizer"])
def test_of_a_list_whose_last_refuses_every_earlier_one_is_as_before(last: str) -> None:
    make, wrong_state = MISFITS[last]
    objects = [make_one(1) for make_one in KINDS.values()]
    states = [make_one(3).state_dict() for make_one in KINDS.values()]
    before = [copy.deepcopy(one.state_dict()) for one in objects]
    with pytest.raises((RuntimeError, KeyError)):
        Checkpoint.load_objects({"all": [*objects, make()]}, {"all": [*states, wrong_state]})
    changed = [
        name for name, one, held in zip(KINDS, objects, before, strict=True) if not equal(one.state_dict(), held)
    ]
    assert changed == []


def test_what_others_refer_to_is_put_back_too() -> None:
    book = Nested(1.0)
    losses = book.stats["losses"]
    with pytest.raises(RuntimeError):
        Checkpoint.load_objects({"book": book, "bad": Refuses()}, {"book": Nested(2.0).state_dict(), "bad": {}})
    assert book.stats["losses"] is losses
    assert losses == [1.0]


def _loop(page: int) -> Any:
    state: dict[str, Any] = {"page": page, "pages": [torch.full((2,), float(page))]}
    state["self"] = [state, (state,)]
    return state


def _shared(page: int) -> Any:
    """Nest lists such that there are 12 ** 15 ways to the innermost one, and 15 lists."""
    state: list[Any] = [page]
    for _ in range(15):
        state = [state] * 12
    return {"page": page, "tree": state}


@pytest.mark.parametrize("make", [_loop, _shared])
def test_states_that_hold_one_container_in_many_places_are_put_back(make: Callable[[int], Any]) -> None:
    class Half(Notebook):
        def load_state_dict(self, state: Any) -> None:
            self.state = state
            if state["page"] == 2:
                raise KeyError("absent")

    book, half = Notebook(make(1)), Half(make(1))
    with pytest.raises(KeyError, match="absent") as caught:
        Checkpoint.load_objects({"book": book, "half": half}, {"book": make(3), "half": make(2)})
    assert not isinstance(caught.value, PartialLoadError)
    assert (book.state["page"], half.state["page"]) == (1, 1)


class Unready(Notebook):
    """Cannot tell its state, and so cannot be put back."""

    def state_dict(self) -> Any:
        raise LookupError


class Adds(Notebook):
    """Adds what it loads to what it has."""

    def __init__(self, number: int = 1) -> None:
        self.number = number

    def state_dict(self) -> Any:
        return {"number": self.number}

    def load_state_dict(self, state: Any) -> None:
        self.number += state["number"]


def test_an_object_that_cannot_tell_its_state_is_loaded_when_nothing_else_can_refuse() -> None:
    book = Unready({"page": 1})
    states = {"book": {"page": 2}, "bad": {}, "model": linear(0).state_dict()}
    with pytest.raises(RuntimeError, match="it refuses"):
        Checkpoint.load_objects({"book": book, "bad": Refuses(), "model": linear(1)}, states)
    assert book.state == {"page": 1}
    Checkpoint.load_objects({"book": book, "model": linear(1)}, states)
    assert book.state == {"page": 2}


def test_a_metric_with_more_state_than_it_gathers_is_put_back() -> None:
    class Counted(Average):
        extra = 2

        def state_dict(self) -> Any:
            return {"base": super().state_dict(), "extra": self.extra}

        def load_state_dict(self, state_dict: Any) -> None:
            self.extra = state_dict["extra"]
            super().load_state_dict(state_dict["base"])

    metric, other = Counted(), Counted()
    for one in (metric, other):
        one.reset()
    other.update(3.0)
    other.extra = 7
    with pytest.raises(RuntimeError, match="it refuses"):
        Checkpoint.load_objects({"metric": metric, "r": Refuses()}, {"metric": other.state_dict(), "r": {}})
    assert metric.extra == 2
    assert metric.num_examples == 0
    Checkpoint.load_objects({"metric": metric}, {"metric": other.state_dict()})
    assert (metric.extra, metric.compute()) == (7, 3.0)


def test_an_error_notes_which_objects_their_own_method_restored() -> None:
    class Keeps(Notebook):
        """Its ``load_state_dict`` changes more than its ``state_dict`` mentions."""

        scratch = 0

        def load_state_dict(self, state: Any) -> None:
            super().load_state_dict(state)
            self.scratch = 9

    keeps = Keeps({"n": 1})
    with pytest.raises(RuntimeError, match="it refuses") as caught:
        Checkpoint.load_objects({"keeps": keeps, "r": Refuses()}, {"keeps": {"n": 2}, "r": {}})
    assert keeps.state == {"n": 1}
    assert keeps.scratch == 9  # as the note says
    (note,) = caught.value.__notes__
    assert "'keeps'" in note
    assert "does not return" in note


def test_what_cannot_be_put_back_is_named_and_all_else_is() -> None:
    class Half(Unready):
        def load_state_dict(self, state: Any) -> None:
            super().load_state_dict(state)
            raise KeyError("absent")

    book, half, other = Notebook({"page": 1}), Half({"page": 1}), linear(0)
    before = snapshot({"other": other})
    states = {"book": {"page": 2}, "half": {"page": 2}, "other": linear(1).state_dict()}
    with pytest.raises(PartialLoadError, match=r"absent.*'half' could not be restored.*load it again") as caught:
        Checkpoint.load_objects({"book": book, "half": half, "other": other}, states)
    assert isinstance(caught.value, KeyError)
    assert book.state == {"page": 1}
    assert equal(snapshot({"other": other}), before)


def test_an_object_that_does_not_restore_its_state_is_named() -> None:
    with pytest.raises(PartialLoadError, match=r"it refuses. 'adds' could not be restored \(.*its load_state_dict\(\)"):
        Checkpoint.load_objects({"adds": Adds(), "bad": Refuses()}, {"adds": {"number": 2}, "bad": {}})


def test_interrupting_a_load_puts_everything_back() -> None:
    class Interrupted(Notebook):
        def load_state_dict(self, _state: Any) -> None:
            raise KeyboardInterrupt

    book = Notebook({"page": 1})
    with pytest.raises(KeyboardInterrupt):
        Checkpoint.load_objects({"book": book, "last": Interrupted()}, {"book": {"page": 2}, "last": {}})
    assert book.state == {"page": 1}
