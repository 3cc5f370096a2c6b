"""Stages of one process: names that occur twice, groups, and other ways of naming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distckpt
from distckpt import StageState, StateMismatchError


def stage(name: str, tied: float = 1.0) -> nn.Module:
    """Return a stage with a layer of its own, and a parameter that another stage has too."""
    module = nn.Module()
    module.add_module(name, nn.Linear(4, 4))
    module.register_parameter("tied", nn.Parameter(torch.full((4,), tied)))
    return module


def step(*optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()


def built(*, one_optimizer: bool) -> tuple[list[nn.Module], list[torch.optim.Optimizer], dict[str, Any]]:
    modules = [stage("first"), stage("second")]
    parameters = [list(module.parameters()) for module in modules]
    groups = [[*parameters[0], *parameters[1]]] if one_optimizer else parameters
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(one) for one in groups]
    objects = {
        "model": StageState(modules),
        "optimizer": StageState(optimizers[0] if one_optimizer else optimizers, modules),
    }
    return modules, optimizers, objects


@pytest.mark.parametrize("is_stepped", [False, True])
@pytest.mark.parametrize("one_optimizer", [False, True])
def test_parameters_of_one_name_have_states_of_their_own_after_a_load(
    tmp_path: Path, *, one_optimizer: bool, is_stepped: bool
) -> None:
    _, optimizers, objects = built(one_optimizer=one_optimizer)
    step(*optimizers)
    distckpt.save(objects, tmp_path / "a.pt")
    modules, optimizers, objects = built(one_optimizer=one_optimizer)
    if is_stepped:
        step(*optimizers)
    distckpt.load(objects, tmp_path / "a.pt")
    states = [one for optimizer in optimizers for one in optimizer.state.values()]
    tensors = [one for state in states for one in state.values()]
    assert len({one.data_ptr() for one in tensors}) == len(tensors) == 3 * 6
    step(*optimizers)
    assert [float(state["step"]) for state in states] == [2.0] * 6
    tied: list[Any] = [module.tied for module in modules]
    assert torch.equal(*tied)
    distckpt.save(objects, tmp_path / "b.pt")


def test_modules_do_not_share_memory_after_a_load_by_assignment(tmp_path: Path) -> None:
    modules, _, objects = built(one_optimizer=False)
    distckpt.save({"model": objects["model"]}, tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    distckpt.Checkpoint.load_objects({"model": objects["model"]}, tmp_path / "a.pt", assign=True)
    objects["model"].load_state_dict(state.get("model", state))
    tied: list[Any] = [module.tied for module in modules]
    assert tied[0].data_ptr() != tied[1].data_ptr()


def layers(*numbers: int) -> nn.Module:
    module = nn.Module()
    for number in numbers:
        module.add_module(f"layer{number}", nn.Linear(2, 2, bias=False))
    return module


def test_a_plain_optimizer_does_not_take_states_by_name(tmp_path: Path) -> None:
    """The names are in the order of the stages, torch's optimizers go by the order of the model."""
    modules = [layers(0, 2), layers(1, 3)]
    optimizers = [torch.optim.AdamW(one.named_parameters()) for one in modules]
    step(*optimizers)
    for module, optimizer in zip(modules, optimizers, strict=True):
        for name, parameter in module.named_parameters():
            optimizer.state[parameter]["exp_avg"].fill_(int(name[5]))
    path = distckpt.save({"optimizer": StageState(optimizers, modules)}, tmp_path / "a.pt")
    whole = layers(0, 1, 2, 3)
    plain = torch.optim.AdamW(whole.named_parameters())
    with pytest.raises(
        StateMismatchError, match=r"holds the states of parameters by name.*StageState\(optimizer, model"
    ):
        distckpt.load({"optimizer": plain}, path)
    assert not plain.state
    distckpt.load({"optimizer": StageState(plain, whole)}, path)
    averages = [float(plain.state[parameter]["exp_avg"][0, 0]) for parameter in whole.parameters()]
    assert averages == [0.0, 1.0, 2.0, 3.0]
    mapped = torch.optim.AdamW(whole.named_parameters())
    mapped.register_load_state_dict_pre_hook(lambda _optimizer, state: StageState(mapped, whole).parts_of(state)[0][1])
    distckpt.load({"optimizer": mapped}, path)
    assert [float(mapped.state[one]["exp_avg"][0, 0]) for one in whole.parameters()] == averages


def test_parameters_of_one_name_with_different_states_are_refused() -> None:
    modules, (optimizer,), objects = built(one_optimizer=True)
    step(optimizer)
    tied: Any = modules[1].tied
    optimizer.state[tied]["exp_avg"].fill_(7.0)
    with pytest.raises(ValueError, match="two parameters of this rank are called 'tied', with different values"):
        objects["optimizer"].state_dict()
    optimizer.state[tied]["exp_avg"].fill_(torch.nan)
    first: Any = modules[0].tied
    optimizer.state[first]["exp_avg"].fill_(torch.nan)
    assert objects["optimizer"].state_dict()["state"]["tied"]["exp_avg"].isnan().all(), "equal bits"


def test_lists_of_tensors_are_compared() -> None:
    modules, (optimizer,), objects = built(one_optimizer=True)
    step(optimizer)
    tied: list[Any] = [module.tied for module in modules]
    for one in tied:
        optimizer.state[one]["history"] = [torch.ones(2), (torch.zeros(1), 3)]
    assert torch.equal(objects["optimizer"].state_dict()["state"]["tied"]["history"][0], torch.ones(2))
    optimizer.state[tied[1]]["history"][0].fill_(7.0)
    with pytest.raises(ValueError, match="two parameters of this rank are called 'tied', with different values"):
        objects["optimizer"].state_dict()


def test_an_empty_group_takes_the_hyperparameters_of_the_file(tmp_path: Path) -> None:
    def make(lr: float) -> tuple[torch.optim.Optimizer, StageState]:
        module = layers(0)
        groups: list[dict[str, Any]] = [{"params": list(module.parameters())}, {"params": [], "weight_decay": 0.5}]
        optimizer = torch.optim.AdamW(groups, lr=lr)
        return optimizer, StageState(optimizer, module)

    path = distckpt.save({"optimizer": make(0.125)[1]}, tmp_path / "a.pt")
    optimizer, state = make(0.5)
    distckpt.load({"optimizer": state}, path)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


@pytest.mark.parametrize("compiled", ["the saved one", "the loaded one"])
def test_a_compiled_part_has_the_same_names(tmp_path: Path, compiled: str) -> None:
    def make(*, is_compiled: bool) -> tuple[torch.optim.Optimizer, StageState]:
        module: Any = layers(0, 1)
        if is_compiled:
            module.layer0 = torch.compile(module.layer0, backend="eager")
        optimizer = torch.optim.AdamW(module.parameters())
        return optimizer, StageState(optimizer, module)

    optimizer, state = make(is_compiled=compiled == "the saved one")
    step(optimizer)
    path = distckpt.save({"optimizer": state}, tmp_path / "a.pt")
    optimizer, state = make(is_compiled=compiled == "the loaded one")
    distckpt.load({"optimizer": state}, path)
    assert [float(one["step"]) for one in optimizer.state.values()] == [1.0, 1.0]


def test_a_state_that_belongs_to_no_parameter_is_refused() -> None:
    module = layers(0)
    optimizer: Any = torch.optim.SGD(module.parameters())
    optimizer.state["global"] = {"count": 1}
    with pytest.raises(ValueError, match="the SGD has a state 'global' that belongs to no parameter"):
        StageState(optimizer, module).state_dict()
