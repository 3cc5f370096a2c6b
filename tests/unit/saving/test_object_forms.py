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
