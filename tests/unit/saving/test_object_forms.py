"""The digests by which ranks compare their modules and optimizers."""

import gc
from typing import Any

import pytest
import torch
from torch import nn

from distckpt.saving import object_forms
from distckpt.saving.object_forms import FormDigests, captured_objects


def test_equal_forms_have_equal_digests_whatever_their_values() -> None:
    one, other = (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(2))
    digests = FormDigests()
    assert digests.digest(one, one.state_dict()) == digests.digest(other, other.state_dict())
    wide = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert digests.digest(wide, wide.state_dict()) != digests.digest(one, one.state_dict())


def test_the_order_of_names_does_not_matter() -> None:
    one, digests = nn.Linear(2, 2), FormDigests()
    other = nn.Linear(2, 2)
    assert digests.digest(one, one.state_dict()) == digests.digest(other, dict(reversed(other.state_dict().items())))


@pytest.mark.parametrize("state", [{}, {1: torch.ones(1)}, None, []])
def test_a_state_without_names_is_not_compared(state: Any) -> None:
    assert FormDigests().digest(nn.Linear(1, 1), state) is None


def test_tensors_are_looked_at_again_only_where_the_list_of_them_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    described: list[object] = []
    describe = object_forms.describe_form

    def count(obj: Any, state: Any) -> dict[str, str]:
        described.append(obj)
        return describe(obj, state)

    monkeypatch.setattr(object_forms, "describe_form", count)
    model = nn.Sequential(nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters())
    digests = FormDigests()
    for _ in range(3):
        digests.digest(model, model.state_dict())
        digests.digest(optimizer, optimizer.state_dict())
    assert described == [model, optimizer]
    model.append(nn.Linear(2, 2))
    optimizer.add_param_group({"params": list(model[1].parameters())})
    digests.digest(model, model.state_dict())
    digests.digest(optimizer, optimizer.state_dict())
    assert described == [model, optimizer] * 2


@pytest.mark.parametrize("change", ["shape", "dtype", "no tensor"])
def test_a_tensor_of_another_form_under_the_same_name_gives_another_digest(change: str) -> None:
    model, digests = nn.Linear(2, 2), FormDigests()
    state = model.state_dict()
    before = digests.digest(model, state)
    changed: dict[str, Any] = {
        "shape": torch.ones(2, 3),
        "dtype": state["weight"].double(),
        "no tensor": None,
    }
    assert digests.digest(model, {**state, "weight": changed[change]}) != before
    assert digests.digest(model, state) == before


def test_an_optimizer_with_a_parameter_of_another_shape_has_another_digest() -> None:
    optimizer, digests = torch.optim.SGD([nn.Parameter(torch.ones(2))]), FormDigests()
    before = digests.digest(optimizer, optimizer.state_dict())
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(3))]
    assert digests.digest(optimizer, optimizer.state_dict()) != before


def test_a_module_without_shapes_is_described_until_it_has_them() -> None:
    model, digests = nn.LazyLinear(2), FormDigests()
    before = digests.digest(model, model.state_dict())
    assert digests.digest(model, model.state_dict()) == before
    model(torch.ones(1, 3))
    assert digests.digest(model, model.state_dict()) != before


def test_objects_are_not_kept_alive() -> None:
    digests = FormDigests()

    def compare_and_drop(width: int) -> None:
        model = nn.Linear(width, 2)
        digests.digest(model, model.state_dict())

    for width in range(1, 20):
        compare_and_drop(width)
    gc.collect()
    last = nn.Linear(2, 2)
    digests.digest(last, last.state_dict())
    assert len(digests._known) == 1


def test_one_rank_has_nothing_to_compare() -> None:
    objects = captured_objects(world_size=1)
    objects.add("model", nn.Linear(1, 1), nn.Linear(1, 1).state_dict())
    assert objects.digests() == {}
