"""load_objects: from where, into what, with which errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from ignite.handlers import Checkpoint as Ignites
from torch import nn

from distckpt import Checkpoint, DiskSaver
from distckpt.loading.restore import check_complete
from distckpt.ptformat.reader import OpenCheckpoint, read_pt
from tests.support.equality import equal
from tests.unit.toys import Notebook, linear, run_epochs, snapshot

load = Checkpoint.load_objects


def _as_mapping(path: Path) -> Any:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("source", [_as_mapping, str, Path])
def test_a_checkpoint_is_a_mapping_a_string_or_a_path(tmp_path: Path, source: Callable[[Path], Any]) -> None:
    objects = {"model": linear(1), "book": Notebook({"page": 3})}
    run_epochs(Checkpoint(objects, tmp_path), 1)
    fresh = {"model": linear(2), "book": Notebook()}
    load(fresh, source(tmp_path / "checkpoint_1.pt"))
    assert equal(snapshot(fresh), snapshot(objects))


@pytest.mark.parametrize("wrong", [None, 12, [], b"a.pt", Notebook()])
def test_any_other_source_is_a_type_error(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"^Argument checkpoint should be a string or a dictionary, but given"):
        load({"model": linear(0)}, wrong)


@pytest.mark.parametrize("wrong", [linear(0), [linear(0)], None])
def test_objects_that_are_no_mapping_are_a_type_error_that_names_the_argument(wrong: Any) -> None:
    with pytest.raises(TypeError, match="to_load should be a dictionary, but given"):
        load(wrong, linear(0).state_dict())


@pytest.mark.parametrize("wrong", [{"a": 1}, {"a": {"b": [linear(0), 0.5]}}])
def test_an_object_that_cannot_be_loaded_into_is_a_type_error(wrong: dict[str, Any]) -> None:
    for library in (Checkpoint, Ignites):
        with pytest.raises(TypeError, match=r"^Object <class '(int|float)'> should have `load_state_dict` method"):
            library.load_objects(wrong, {"a": {"b": [{}, {}]}})


def test_a_missing_key_is_named() -> None:
    objects = {"model": linear(0), "x": linear(1)}
    for library in (Checkpoint, Ignites):
        with pytest.raises(ValueError, match=r"^Key 'x' from x is not found in y"):
            library.load_objects(objects, {"model": linear(2).state_dict(), "other": {}})


def test_a_list_of_another_length_is_named() -> None:
    state = linear(2).state_dict()
    for library in (Checkpoint, Ignites):
        with pytest.raises(ValueError, match=r"^Size of y: 1 does not match the size of x: '2'"):
            library.load_objects({"a": [linear(0), linear(1)], "b": linear(3)}, {"a": [state], "b": state})


@pytest.mark.parametrize("state", [{"a": 3}, {"a": None}, {"a": "text"}, {"a": {}}, {"a": []}])
def test_a_tree_of_another_shape_is_refused(state: dict[str, Any]) -> None:
    objects = {"a": {"deep": linear(0)}, "b": linear(1)}
    before = snapshot({"b": objects["b"]})
    with pytest.raises(ValueError, match=r"checkpoint holds|not found in y"):
        load(objects, {**state, "b": linear(2).state_dict()})
    assert equal(snapshot({"b": objects["b"]}), before)


def test_more_in_the_checkpoint_than_is_asked_for_is_no_error() -> None:
    model = linear(0)
    load({"model": model}, {"model": linear(1).state_dict(), "optimizer": {}, "epoch": 3})
    assert equal(model.state_dict(), linear(1).state_dict())


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("name", ["model", "weight", "bias", "state"])
def test_one_object_takes_its_bare_state_under_any_name(name: str, bare: bool) -> None:  # noqa: FBT001
    model, state = linear(0), linear(1).state_dict()
    load({name: model}, state if bare else {name: state})
    assert equal(model.state_dict(), state)


@pytest.mark.parametrize("name", ["optimizer", "state", "param_groups"])
def test_one_optimizer_takes_its_bare_state_under_any_name(name: str) -> None:
    source = torch.optim.SGD(linear(0).parameters(), lr=0.7)
    fresh = torch.optim.SGD(linear(0).parameters(), lr=0.1)
    load({name: fresh}, source.state_dict())
    assert fresh.param_groups[0]["lr"] == 0.7


@pytest.mark.parametrize("name", ["model", "weight", "state"])
def test_one_object_makes_the_round_trip_under_any_name(tmp_path: Path, name: str) -> None:
    model, fresh = linear(0), linear(1)
    run_epochs(Checkpoint({name: model}, tmp_path), 1)
    load({name: fresh}, tmp_path / f"{name}_1.pt")
    assert equal(fresh.state_dict(), model.state_dict())


@pytest.mark.parametrize("item", [None, 3, "text", [1], (), torch.ones(2)])
@pytest.mark.parametrize("own", [None, {}, {"w": torch.ones(1)}])
def test_one_of_several_objects_gets_its_own_state_whatever_that_is(tmp_path: Path, item: Any, own: Any) -> None:
    """Its live state may be of another type by now."""
    saved = Notebook()
    saved.state = item
    run_epochs(Checkpoint({"ema": saved, "model": linear(0)}, tmp_path), 1)
    for checkpoint in (tmp_path / "checkpoint_1.pt", {"ema": item, "model": linear(0).state_dict()}):
        ema = Notebook(own)
        load({"ema": ema}, checkpoint)
        assert equal({"": ema.state}, {"": item})


def test_one_object_whose_state_has_its_name_makes_the_round_trip(tmp_path: Path) -> None:
    run_epochs(Checkpoint({"page": Notebook({"page": 3})}, tmp_path), 1)
    fresh = Notebook({"page": 0})
    load({"page": fresh}, tmp_path / "page_1.pt")
    assert fresh.state == {"page": 3}


class TensorState(nn.Module):
    """A module whose state is a tensor."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), value))

    def state_dict(self, *_: Any, **__: Any) -> Any:
        return self.weight.detach()

    def load_state_dict(self, state_dict: Any, *_: Any, **__: Any) -> Any:
        self.weight.data.copy_(state_dict)


@pytest.mark.parametrize("others", [{}, {"other": 1}])
def test_a_module_whose_state_is_a_tensor_gets_it(tmp_path: Path, others: dict[str, Any]) -> None:
    to_save = {"model": TensorState(7.0), **{name: Notebook({"x": one}) for name, one in others.items()}}
    run_epochs(Checkpoint(to_save, tmp_path), 1)
    fresh = TensorState(0.0)
    load({"model": fresh}, next(tmp_path.glob("*.pt")))
    assert fresh.weight.tolist() == [7.0, 7.0]


class Wrapper:
    """An object of the user's whose state has the state of a model."""

    def __init__(self, epoch: int) -> None:
        self.model, self.epoch = linear(epoch), epoch
        self.num_calls = 0

    def state_dict(self) -> dict[str, Any]:
        self.num_calls += 1
        return {"model": self.model.state_dict(), "epoch": self.epoch, **({"best": 1} if self.epoch > 8 else {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.epoch = state["epoch"]


@pytest.mark.parametrize("name", ["model", "epoch", "wrapper"])
def test_one_object_whose_state_has_a_state_of_its_name_makes_the_round_trip(tmp_path: Path, name: str) -> None:
    saved, fresh = Wrapper(9), Wrapper(0)
    run_epochs(Checkpoint({name: saved}, tmp_path), 1)
    load({name: fresh}, tmp_path / f"{name}_1.pt")
    assert fresh.epoch == 9
    assert equal(fresh.model.state_dict(), saved.model.state_dict())
    run_epochs(Checkpoint({name: Wrapper(8), "other": linear(1)}, DiskSaver(tmp_path, require_empty=False)), 1)
    load({name: fresh}, tmp_path / "checkpoint_1.pt")
    assert fresh.epoch == 8


def test_the_state_of_an_object_is_not_asked_for_to_pair_it_with_one(tmp_path: Path) -> None:
    run_epochs(Checkpoint({"wrapper": Wrapper(9)}, tmp_path), 1)
    fresh = Wrapper(0)
    file, state = OpenCheckpoint(tmp_path / "wrapper_1.pt"), read_pt(tmp_path / "wrapper_1.pt")
    with file:
        check_complete({"wrapper": fresh}, state, file)
        check_complete({"model": fresh}, {"model": {}, "other": 1})
    assert fresh.num_calls == 0


def test_nested_mappings_and_lists_make_the_round_trip(tmp_path: Path) -> None:
    def tree(seed: int) -> dict[str, Any]:
        nets = {"a": linear(seed), "list": [linear(seed + 1), {"deep": (linear(seed + 2), Notebook({"seed": seed}))}]}
        return {"nets": nets, "module_list": nn.ModuleList([linear(seed + 3)]), "last": linear(seed + 4)}

    def states(one: Any) -> Any:
        if hasattr(one, "state_dict"):
            return one.state_dict()
        return {key: states(one[key]) for key in one} if isinstance(one, dict) else [states(item) for item in one]

    source, fresh = tree(10), tree(20)
    run_epochs(Checkpoint(source, tmp_path), 1)
    load(fresh, tmp_path / "checkpoint_1.pt")
    assert equal(states(fresh), states(source))


@pytest.mark.parametrize("kind", [list, dict])
def test_one_collection_of_objects_makes_the_round_trip(tmp_path: Path, kind: type) -> None:
    def collection(seed: int) -> tuple[list[nn.Module], Any]:
        nets: list[nn.Module] = [linear(seed), linear(seed + 1)]
        return nets, nets if kind is list else dict(zip("ab", nets, strict=True))

    (source, saved), (fresh, loaded) = collection(0), collection(5)
    run_epochs(Checkpoint({"nets": saved}, tmp_path), 1)
    load({"nets": loaded}, tmp_path / "nets_1.pt")
    for one, other in zip(source, fresh, strict=True):
        assert equal(one.state_dict(), other.state_dict())


class _Strict(Notebook):
    """Takes a state and nothing else."""

    def load_state_dict(self, state: Any, **kwargs: Any) -> None:
        assert not kwargs
        super().load_state_dict(state)


def test_keyword_arguments_go_to_modules_only() -> None:
    model, optimizer, book = linear(0), torch.optim.SGD(linear(0).parameters(), lr=0.1), _Strict()
    state = {"model": {"weight": torch.ones(2, 2)}, "optimizer": optimizer.state_dict(), "book": {"page": 1}}
    load({"model": model, "optimizer": optimizer, "book": book}, state, strict=False)
    assert torch.equal(model.weight, torch.ones(2, 2))
    assert book.state == {"page": 1}


def test_assigned_tensors_are_the_checkpoints_own() -> None:
    model, state = linear(0), {key: value.clone() for key, value in linear(1).state_dict().items()}
    load({"model": model}, state, assign=True)
    assert model.weight.data_ptr() == state["weight"].data_ptr()


def test_an_unknown_keyword_argument_is_a_type_error_and_changes_nothing() -> None:
    objects = {"book": Notebook({"page": 1}), "model": linear(0)}
    before = snapshot(objects)
    with pytest.raises(TypeError, match="strikt"):
        load(objects, {"book": {"page": 2}, "model": linear(1).state_dict()}, strikt=False)
    assert equal(snapshot(objects), before)


def test_the_source_is_not_changed() -> None:
    state = {"model": linear(1).state_dict(), "book": {"pages": [1, 2]}}
    before = {"model": {key: value.clone() for key, value in state["model"].items()}, "book": {"pages": [1, 2]}}
    load({"model": linear(0), "book": Notebook()}, state)
    assert equal(dict(state["model"]), before["model"])
    assert state["book"] == before["book"]


def test_nothing_to_load_is_no_error() -> None:
    load({}, {"model": {}})


@pytest.mark.parametrize("how", ["saved", "whole"])
def test_a_group_of_objects_may_have_a_member_of_its_own_name(tmp_path: Path, how: str) -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    objects = {"model": {"model": model, "ema": nn.Linear(2, 2)}}
    if how == "saved":
        handler = Checkpoint(objects, tmp_path)
        handler(Engine(lambda _engine, _batch: None))
        path = handler.last_checkpoint
    else:
        path = tmp_path / "whole.pt"
        states = {key: one.state_dict() for key, one in objects["model"].items()}
        torch.save({"model": states}, path)
    assert path is not None
    Checkpoint.load_objects({"model": {"model": other}}, str(path))
    assert torch.equal(other.weight, model.weight)
