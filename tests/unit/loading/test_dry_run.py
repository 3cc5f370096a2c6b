"""Modules of every make: a good state loads to the bit, and a failed load leaves their state as it was."""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from distckpt.loading import dry_run
from distckpt.loading.api import load_objects
from distckpt.loading.dry_run import try_load


class Noted(nn.Module):
    """A layer that notes what happens to it: a number, a list, a nested one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.num_loads = 0
        self.log: list[str] = []
        self.nested: dict[str, list[int]] = {"deep": []}

    def note(self, *_: object) -> None:
        self.num_loads += 1
        self.log.append("load")
        self.nested["deep"].append(self.num_loads)


class OwnLoad(Noted):
    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.note()
        return super().load_state_dict(*args, **kwargs)


class OwnPart(Noted):
    def _load_from_state_dict(self, *args: Any) -> None:
        self.note()
        super()._load_from_state_dict(*args)


class ReadsValues(nn.Module):
    """Looks into the state that it gets, as observers and versioned modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("version", torch.tensor(2))
        self.seen = 0

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self.seen = int(state[prefix + "version"].item())
        super()._load_from_state_dict(state, prefix, *args)


class Resizes(nn.Module):
    """Takes the shape of what it gets, as torch's observers do."""

    def __init__(self, num: int = 0) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(num))

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self.get_buffer("seen").resize_(state[prefix + "seen"].shape)
        super()._load_from_state_dict(state, prefix, *args)


class Extra(nn.Module):
    """Keeps more than tensors, and takes it back in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.words: dict[str, list[int]] = {"a": [0]}
        self.mean = torch.zeros(2)  # neither a parameter nor a buffer

    def get_extra_state(self) -> dict[str, Any]:
        return {"words": copy.deepcopy(self.words), "mean": self.mean.clone()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.words["a"][:] = state["words"]["a"]
        self.mean.copy_(state["mean"])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
        self.decoder.weight = self.encoder.weight
        self.register_buffer("kept", torch.zeros(2))
        self.register_buffer("scratch", torch.arange(2.0), persistent=False)
        self.twice = nn.ModuleList([self.encoder, self.encoder])


def hooked(*, pre: bool, with_module: bool) -> Noted:
    module: Any = Noted()
    if not pre:
        hook = (lambda part, _: part.note()) if with_module else (lambda _, __: module.note())
        module.register_load_state_dict_post_hook(hook)
    elif with_module:
        module.register_load_state_dict_pre_hook(Noted.note)
    else:
        module.layer._register_load_state_dict_pre_hook(module.note)
    noted: Noted = module
    return noted


def nested() -> nn.Module:
    tables = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(1, 2), nn.Sequential(nn.BatchNorm2d(3))])})
    return nn.ModuleDict({"x": tables, "p": nn.ParameterList([torch.zeros(2)]), "n": nn.Identity()})


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is, and people still have it
        made: nn.Module = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    return made


KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(2, 3),
    "batch norm": lambda: nn.BatchNorm1d(2),
    "batch norm without statistics": lambda: nn.BatchNorm1d(2, track_running_stats=False),
    "half precision": lambda: nn.Linear(2, 2).to(torch.bfloat16),
    "frozen": lambda: nn.Linear(2, 2).requires_grad_(requires_grad=False),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "tied": Tied,
    "nested": nested,
    "no tensors": nn.ReLU,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(2, 2)),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(2, 2))),
    "scripted": scripted,
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2)),
    "lazy": lambda: nn.Sequential(nn.LazyLinear(2)),
    "own load_state_dict": OwnLoad,
    "own _load_from_state_dict": OwnPart,
    "inside another": lambda: nn.Sequential(OwnPart(), OwnLoad()),
    "reads values": ReadsValues,
    "resizes": Resizes,
    "extra state": Extra,
    "pre-hook with module": lambda: hooked(pre=True, with_module=True),
    "pre-hook, bound": lambda: hooked(pre=True, with_module=False),
    "post-hook with module": lambda: hooked(pre=False, with_module=True),
    "post-hook, bound": lambda: hooked(pre=False, with_module=False),
}
SOURCES: dict[str, Callable[[], nn.Module]] = {
    **KINDS,
    "lazy": lambda: nn.Sequential(nn.Linear(3, 2)),
    "resizes": lambda: Resizes(3),
}


def other_state(kind: str) -> dict[str, Any]:
    """Return a state that fits, in which every number differs from a fresh module's."""
    state = copy.deepcopy(SOURCES[kind]().state_dict())
    for value in state.values():
        if isinstance(value, torch.Tensor):
            value.add_(1)
        else:
            value.update(words={"a": [7, 8]}, mean=torch.full((2,), 5.0))
    return state


def bits(value: Any) -> Any:
    """Describe a value so that `==` compares bits and, for tensors, identity."""
    if nn.parameter.is_lazy(value):
        return id(value), type(value)
    if isinstance(value, torch.Tensor):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).tolist() if value.numel() else []
        return id(value), type(value), value.dtype, value.shape, value.requires_grad, raw
    return {key: bits(item) for key, item in value.items()} if isinstance(value, dict) else copy.deepcopy(value)


def held(module: nn.Module) -> dict[str, Any]:
    """Describe all tensors of a module, non-persistent buffers too, and what else its state tells."""
    found = {f"param {name}": bits(value) for name, value in module.named_parameters(remove_duplicate=False)}
    found |= {f"buffer {name}": bits(value) for name, value in module.named_buffers(remove_duplicate=False)}
    more = {name: str(value) for name, value in module.state_dict().items() if not isinstance(value, torch.Tensor)}
    return found | more


MISFITS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "other shape": (lambda: nn.Linear(2, 2), {"weight": torch.ones(3, 2), "bias": torch.ones(2)}),
    "missing key": (lambda: nn.Linear(2, 2), {"weight": torch.ones(2, 2)}),
    "more keys": (nn.ReLU, {"weight": torch.ones(2, 2)}),
    "misfit with code of its own": (OwnLoad, {"layer.weight": torch.ones(2, 2)}),
    "misfit with a parametrization": (KINDS["weight norm"], {"bias": torch.ones(2)}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}], ids=["plain", "not strict", "assign"])
def test_good_state_loads_to_the_bit(kind: str, options: dict[str, bool]) -> None:
    module, state = KINDS[kind](), other_state(kind)
    expected = {key: bits(value) for key, value in state.items()}
    load_objects({"m": module, "other": nn.ReLU()}, {"m": state, "other": {}}, **options)
    loaded = module.state_dict()
    assert list(loaded) == list(state)
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(loaded[key], value), key
        else:
            assert str(loaded[key]) == str(value)
    assert {key: bits(value) for key, value in state.items()} == expected, "the state itself was changed"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("options", [{}, {"assign": True}], ids=["plain", "assign"])
def test_failed_load_leaves_the_state_as_it_was(kind: str, misfit: str, options: dict[str, bool]) -> None:
    module, state = KINDS[kind](), other_state(kind)
    make_bad, bad_state = MISFITS[misfit]
    bad = make_bad()
    before, bad_before, state_before = held(module), held(bad), bits(dict(state))
    with pytest.raises(RuntimeError, match="Error"):
        load_objects({"good": module, "bad": bad}, {"good": state, "bad": bad_state}, **options)
    assert held(module) == before
    assert held(bad) == bad_before
    assert bits(dict(state)) == state_before


@pytest.mark.parametrize("kind", ["own load_state_dict", "own _load_from_state_dict", "pre-hook, bound"])
def test_modules_own_code_runs_once_for_one_load(kind: str) -> None:
    module = KINDS[kind]()
    load_objects({"m": module}, {"m": other_state(kind)})
    assert vars(module)["log"] == ["load"]
    assert vars(module)["nested"] == {"deep": [1]}


def test_state_of_an_older_batch_norm_loads() -> None:
    module = nn.BatchNorm1d(2)
    state = {key: value + 1 for key, value in module.state_dict().items() if key != "num_batches_tracked"}
    load_objects({"m": module}, {"m": state})
    assert torch.equal(module.weight, state["weight"])


def test_a_dry_run_refuses_what_the_module_would_and_does_not_warn() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        try_load(nn.Linear(2, 2), {"weight": torch.ones(3, 3), "bias": torch.ones(2)}, {})
    try_load(nn.Linear(2, 2), {}, {"strict": False})


def dotted() -> tuple[nn.Module, Any]:
    module = nn.Module()
    module._parameters["a.b"] = nn.Parameter(torch.ones(2))
    return module, module.state_dict()


def named_as_extra_state() -> tuple[nn.Module, Any]:
    module = nn.Module()
    module.register_buffer("_extra_state", torch.ones(2))
    return module, module.state_dict()


def left_by_assign() -> tuple[nn.Module, Any]:
    state: Any = OrderedDict(weight=torch.ones(2, 2, dtype=torch.int64), bias=torch.ones(2))
    state._metadata = {"": {"version": 1, "assign_to_params_buffers": True}}
    return nn.Linear(2, 2), state


def without_metadata_of_a_part() -> tuple[nn.Module, Any]:
    state: Any = nn.Linear(2, 2).state_dict()
    state._metadata = {"": None}
    return nn.Linear(2, 2), state


def of_another_shape() -> tuple[nn.Module, Any]:
    return nn.Linear(2, 2), nn.Linear(3, 2).state_dict()


def with_rules_of_its_own() -> tuple[nn.Module, Any]:
    state: Any = OrderedDict(running_mean=torch.ones(2), running_var=torch.ones(2))
    state._metadata = {"": {"version": None}}
    module = nn.InstanceNorm1d(2)
    module.running_mean, module.running_var = torch.zeros(2), torch.ones(2)
    return module, state


def with_a_pair() -> tuple[nn.Module, Any]:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).state_dict()


ODD = [
    dotted,
    named_as_extra_state,
    left_by_assign,
    without_metadata_of_a_part,
    of_another_shape,
    with_rules_of_its_own,
    with_a_pair,
]


@pytest.mark.parametrize("options", [{}, {"strict": False}, {"unknown": 1}], ids=str)
@pytest.mark.parametrize("make", ODD)
def test_a_comparison_finds_what_the_twin_would(
    make: Callable[[], tuple[nn.Module, Any]], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, state = make()
    outcomes: list[Any] = []
    for _ in range(2):
        try:
            outcomes.append(try_load(module, state, options))
        except Exception as error:  # noqa: BLE001 - what it raises is what is compared
            outcomes.append((type(error).__name__, str(error)))
        monkeypatch.setattr(dry_run, "loads_by_name", lambda _: False)
    assert outcomes[0] == outcomes[1]


def test_a_state_of_the_same_keys_and_shapes_needs_no_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(dry_run, "_make_twin", made.append)
    module, state = with_a_pair()
    try_load(module, state, {})
    assert made == []
