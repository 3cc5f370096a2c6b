"""A sharded state of the form of an earlier save is not searched and pickled anew; its file is as if it were."""

import contextlib
import gc
import json
import weakref
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import distckpt
from distckpt.ptformat.pickler import pickle_state
from distckpt.ptformat.reader import verify
from distckpt.ptformat.state_form import StateForms
from distckpt.saving import captured_state
from distckpt.saving.captured_state import attached_state, detached
from distckpt.saving.staging import thread_memory
from tests.distributed.programs import Stateful, kinds, raised
from tests.distributed.test_sharded_saves import assert_equal, mesh_of, numbers, shard, tensors_of, trained, whole
from tests.support import job, run_distributed

pytestmark = [
    pytest.mark.only_on("gloo", why="device meshes over Gloo"),
    pytest.mark.filterwarnings("ignore"),  # torch warns of its own calls
]


@contextlib.contextmanager
def counted_pickles() -> Iterator[list[object]]:
    """Yield a list that gets an item for each state that is pickled anew on this rank."""
    found: list[object] = []

    def count(*args: Any, **options: Any) -> Any:
        found.append(args)
        return pickle_state(*args, **options)

    with mock.patch.object(captured_state, "pickle_state", count):
        yield found


def save(objects: Mapping[str, Any], path: Path, *, background: bool = False) -> int:
    """Save; return how many states this rank has pickled anew."""
    with counted_pickles() as found:
        if background:
            distckpt.async_save(objects, path).wait()
        else:
            distckpt.save(objects, path)
    job.barrier()
    return len(found)


def forget() -> None:
    thread_memory().plain_forms, thread_memory().live_forms = StateForms(), StateForms()


def records_of(path: Path) -> list[Any]:
    """Return name, offset and bytes of each record of a file, and its manifest without the time."""
    with zipfile.ZipFile(path) as file:
        found: list[Any] = [(one.filename, one.header_offset, file.read(one)) for one in file.infolist()]
    (manifest,) = (data for name, _, data in found if name.endswith("distckpt.json"))
    head, _, rest = manifest.partition(b"\n")
    fields = json.loads(head.strip().rstrip(b",") + (b"" if head.strip().endswith(b"}") else b"}"))
    fields.pop("wall_time_s")
    return [one for one in found if not one[0].endswith("distckpt.json")] + [fields, rest]


def check(objects: Mapping[str, Any], folder: Path, expected: Any, *, background: bool = False) -> None:
    """Save objects of a known form, and then anew; both files have to be equal, and hold what is expected."""
    assert save(objects, folder / "known.pt", background=background) == 0
    forget()
    assert save(objects, folder / "anew.pt", background=background) == 1
    if job.rank() == 0:
        verify(folder / "known.pt")
        assert_equal(torch.load(folder / "known.pt", weights_only=True), expected)
        assert records_of(folder / "known.pt") == records_of(folder / "anew.pt")
    job.barrier()


def save_each_twice(world_size: int, folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = tensors_of(world_size, dtype)
        state: dict[str, Any] = {"tensors": tensors, "plain": torch.ones(3), "step": 1, "text": "x"}
        objects = {"one": Stateful(state), "other": [Stateful({"a": torch.ones(20_000)})]}
        forget()
        assert save(objects, folder / "first.pt") == 1
        for tensor in tensors.values():
            if tensor.device_mesh.get_coordinate() is not None:
                tensor.to_local().add_(1)
        fresh = {name: numbers(*one.shape, dtype=dtype) + 1 for name, one in tensors.items()}
        fresh["its transpose"] = fresh["square"].t()
        twice = {"square": fresh["square"] + 1, "its transpose": fresh["its transpose"] + 1}  # one storage
        state |= {"tensors": dict(tensors), "plain": torch.zeros(3), "step": 2, "text": "another"}
        expected = {"one": {**state, "tensors": fresh | twice}, "other": [{"a": torch.ones(20_000)}]}
        check(objects, folder, expected, background=dtype is torch.float32)


@run_distributed(world_size=2)
def test_two_ranks_save_every_placement_as_anew(tmp_path: Path) -> None:
    save_each_twice(2, tmp_path)


@run_distributed(world_size=4)
def test_four_ranks_save_every_placement_as_anew(tmp_path: Path) -> None:
    save_each_twice(4, tmp_path)


@run_distributed(world_size=4)
def test_trained_models_and_their_optimizers_are_saved_as_anew(tmp_path: Path) -> None:
    meshes = {
        "FSDP2": (mesh_of(4), False),
        "HSDP": (init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")), False),
        "FSDP2+TP": (init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), True),
    }
    for name, (mesh, is_parallel) in meshes.items():
        model, optimizer = trained(mesh, tensor_parallel=is_parallel)
        objects: dict[str, Any] = {"model": model, "optimizer": optimizer}
        save(objects, tmp_path / "first.pt")
        assert attached_state(model) is not None
        for _ in range(2):
            model(torch.randn(8, 257)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] *= 0.5
        expected = {key: whole(one.state_dict()) for key, one in objects.items()}
        check(objects, tmp_path, expected, background=name == "HSDP")


def state_of(line: DeviceMesh) -> dict[str, Any]:
    rows = shard(numbers(70, 999), line, [Shard(0)])
    inner = OrderedDict(plain=torch.ones(3), step=3, text="x")
    return {"a": rows, "b": shard(numbers(4, 3), line, [Shard(0)]), "c": rows.detach(), "more": inner}


def _replaced(key: str, make: Callable[[DeviceMesh, DTensor], Any]) -> Callable[[dict[str, Any], DeviceMesh], None]:
    def change(state: dict[str, Any], line: DeviceMesh) -> None:
        state[key] = make(line, state[key])

    return change


def _padded(line: DeviceMesh, tensor: DTensor) -> DTensor:
    """Return the same tensor at an offset of a longer storage."""
    local = tensor.to_local()
    longer = torch.cat([torch.zeros(1, *local.shape[1:]), local])
    return DTensor.from_local(longer[1:], line, [Shard(0)], shape=tensor.shape, stride=tensor.stride())


def _strided(line: DeviceMesh, tensor: DTensor) -> DTensor:
    """Return a tensor of which each rank holds every other row, in local tensors of the same shape."""
    rows = numbers(4, 3)[job.rank() :: 2].clone()
    return DTensor.from_local(
        rows, line, [_StridedShard(0, split_factor=2)], shape=tensor.shape, stride=tensor.stride()
    )


CHANGES: dict[str, Callable[[dict[str, Any], DeviceMesh], Any]] = {
    "placement": _replaced("b", lambda line, _: shard(numbers(4, 3), line, [Shard(1)])),
    "order of rows": _replaced("b", _strided),
    "replicas": _replaced("b", lambda line, _: shard(numbers(4, 3), line, [Replicate()])),
    "mesh": _replaced("b", lambda _line, _: shard(numbers(4, 3), DeviceMesh("cpu", [0, 1]), [Shard(0)])),
    "part of the ranks": _replaced("b", lambda _line, _: shard(numbers(4, 3), DeviceMesh("cpu", [0]), [Shard(0)])),
    "shape": _replaced("b", lambda line, _: shard(numbers(3, 4), line, [Shard(0)])),
    "number of rows": _replaced("b", lambda line, _: shard(numbers(6, 3), line, [Shard(0)])),
    "dtype": _replaced("b", lambda line, _: shard(numbers(4, 3, dtype=torch.float64), line, [Shard(0)])),
    "dtype of one size": _replaced("b", lambda line, _: shard(numbers(4, 3).int(), line, [Shard(0)])),
    "gradients": _replaced("b", lambda _, tensor: tensor.detach().requires_grad_()),
    "a parameter": _replaced("b", lambda _, tensor: nn.Parameter(tensor, requires_grad=False)),
    "an offset": _replaced("b", _padded),
    "a plain tensor": _replaced("b", lambda *_: numbers(4, 3)),
    "a DTensor for a plain tensor": lambda state, line: state["more"].update(plain=shard(numbers(3), line, [Shard(0)])),
    "no tie": _replaced("c", lambda _, tensor: tensor.clone()),
    "another tie": lambda state, line: state.update(a=shard(numbers(70, 999), line, [Shard(0)])),
    "one object twice": lambda state, _: state.update(c=state["a"]),
    "a number's type": lambda state, _: state["more"].update(step=3.0),
    "text for a number": lambda state, _: state["more"].update(step="3"),
    "plain tensor's shape": lambda state, _: state["more"].update(plain=torch.ones(4)),
    "another key": lambda state, _: state["more"].update(key=state["more"].pop("text")),
    "one more": lambda state, line: state.update(d=shard(numbers(4, 3), line, [Shard(0)])),
    "one less": lambda state, _: state.pop("b"),
    "order": lambda state, _: state.update(b=state.pop("b")),
    "an attribute": lambda state, _: setattr(state["more"], "_metadata", {"version": 1}),
}


@pytest.mark.parametrize("what", CHANGES)
@run_distributed(world_size=2)
def test_a_state_of_another_form_is_pickled_anew(tmp_path: Path, what: str) -> None:
    forget()
    line = mesh_of(2)
    state = state_of(line)
    thing = Stateful(state)
    assert save({"one": thing}, tmp_path / "first.pt") == 1
    assert save({"one": thing}, tmp_path / "first.pt") == 0
    CHANGES[what](state, line)
    assert save({"one": thing}, tmp_path / "file.pt") == 1
    if what in ("part of the ranks", "order of rows"):  # torch cannot gather these
        state["b"] = numbers(4, 3)
    expected = whole(state)
    if job.rank() == 0:
        verify(tmp_path / "file.pt")
        found = torch.load(tmp_path / "file.pt", weights_only=True)
        if what == "a parameter":
            assert isinstance(found["b"], nn.Parameter)
            found["b"] = found["b"].detach()
        assert_equal(found, expected)
    job.barrier()
    forget()
    assert save({"one": Stateful(state_of(line))}, tmp_path / "first.pt") == 1


def _tied_anew(state: dict[str, Any], line: DeviceMesh) -> None:
    state["a"] = shard(numbers(70, 999) + 1, line, [Shard(0)])
    state["c"] = state["a"].detach()


KEPT: dict[str, Callable[[dict[str, Any], DeviceMesh], Any]] = {
    "another object": _replaced("b", lambda line, _: shard(numbers(4, 3) + 1, line, [Shard(0)])),
    "both tied ones": _tied_anew,
    "a number": lambda state, _: state["more"].update(step=2**40),
    "text": lambda state, _: state["more"].update(text="another text"),
    "a plain tensor": lambda state, _: state["more"].update(plain=torch.zeros(3)),
    "containers": lambda state, _: state.update(more=OrderedDict(state["more"])),
}


@pytest.mark.parametrize("what", KEPT)
@run_distributed(world_size=2)
def test_other_values_and_objects_of_the_same_form_are_saved(tmp_path: Path, what: str) -> None:
    forget()
    line = mesh_of(2)
    state = state_of(line)
    save({"one": Stateful(state)}, tmp_path / "first.pt")
    KEPT[what](state, line)
    check({"one": Stateful(state)}, tmp_path, whole(state))


@run_distributed(world_size=2)
def test_another_set_of_objects_is_pickled_anew(tmp_path: Path) -> None:
    forget()
    line = mesh_of(2)
    one, other = (Stateful({"a": shard(numbers(8, 3) + number, line, [Shard(0)])}) for number in range(2))
    for objects in ({"one": one}, {"one": one, "other": other}, {"other": one, "one": other}, {"one": [one, other]}):
        assert save(objects, tmp_path / "file.pt") == 1
        assert save(objects, tmp_path / "file.pt") == 0
    found = torch.load(tmp_path / "file.pt", weights_only=True)
    assert [torch.equal(state["a"], numbers(8, 3) + number) for number, state in enumerate(found)] == [True, True]


@run_distributed(world_size=2)
def test_a_state_under_another_name_has_that_name(tmp_path: Path) -> None:
    forget()
    state = state_of(mesh_of(2))
    save({"one": Stateful(state)}, tmp_path / "file.pt")
    state["more"]["step"] = job.rank() or "text"  # so that rank 0 alone meets a new form
    assert save({"other": Stateful(state)}, tmp_path / "file.pt") == 1
    state["b"] = shard(numbers(4, 3), mesh_of(2), [Shard(job.rank())])
    error = raised(lambda: save({"other": Stateful(state)}, tmp_path / "file.pt"))
    assert "to_save['other'], key 'b'" in str(error)
    assert "to_save['one']" not in str(error)


@run_distributed(world_size=2)
def test_shards_that_change_on_one_rank_are_one_error_as_ever(tmp_path: Path) -> None:
    forget()
    line = mesh_of(2)
    good, path = state_of(line), tmp_path / "file.pt"
    save({"one": Stateful(good)}, path)
    bad = good | {"b": shard(numbers(4, 3), line, [Shard(job.rank())])}
    error = raised(lambda: save({"one": Stateful(bad)}, path))
    assert "ShardedStateError" in kinds(error)
    assert "to_save['one'], key 'b'" in str(error)
    job.barrier()
    assert_equal(torch.load(path, weights_only=True)["b"], numbers(4, 3))
    check({"one": Stateful(good)}, tmp_path, whole(good))


@pytest.mark.parametrize("changed", [0, 1])
@run_distributed(world_size=2)
def test_a_plain_value_that_changes_on_one_rank_is_pickled_anew_there(tmp_path: Path, changed: int) -> None:
    forget()
    state = state_of(mesh_of(2))
    save({"one": Stateful(state)}, tmp_path / "first.pt")
    if job.rank() == changed:
        state["more"]["step"] = "text"
    assert save({"one": Stateful(state)}, tmp_path / "file.pt") == int(job.rank() == changed)
    verify(tmp_path / "file.pt")
    found = torch.load(tmp_path / "file.pt", weights_only=True)
    assert_equal(found["a"], numbers(70, 999))
    assert found["more"]["step"] == ("text" if changed == 0 else 3)


def sharded_module(*inner: nn.Module) -> nn.Sequential:
    module = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20), *inner)
    line = mesh_of(2)
    for layer in module:
        fully_shard(layer, mesh=line)
    module.append(nn.Linear(3, 3))  # a plain one
    return module


class Extra(nn.Module):
    def get_extra_state(self) -> torch.Tensor:
        return torch.ones(2, requires_grad=True)

    def set_extra_state(self, state: Any) -> None:
        """Do nothing."""


class Renames(nn.Linear):
    def state_dict(self, *args: Any, **options: Any) -> Any:
        options["prefix"] = f"{options.get('prefix', '')}own."
        return super().state_dict(*args, **options)


class Doubles(nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:  # noqa: FBT001 - torch's
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}twice"] = 2 * self.weight.detach()


def _hooked() -> nn.Module:
    module: Any = nn.Linear(4, 4)
    module.register_state_dict_post_hook(lambda _module, state, prefix, _: state.update({f"{prefix}n": torch.ones(1)}))
    return module  # type: ignore[no-any-return]  # as below


def _hooked_before() -> nn.Module:
    module: Any = nn.Linear(4, 4)
    module.register_state_dict_pre_hook(lambda module, _prefix, keep_vars: module.weight.data.fill_(float(keep_vars)))
    return module  # type: ignore[no-any-return]  # as below


def _patched() -> nn.Module:
    module: Any = nn.Linear(4, 4)
    module.state_dict = lambda *_, destination, prefix, **__: destination.update({f"{prefix}own": torch.ones(1)})
    return module  # type: ignore[no-any-return]  # Any, for untyped methods


MODULES: dict[str, Callable[[], nn.Module]] = {
    "nothing of its own": lambda: nn.Linear(4, 4),
    "an extra state": Extra,
    "a state_dict": lambda: Renames(4, 4),
    "a _save_to_state_dict": lambda: Doubles(4, 4),
    "a hook": _hooked,
    "a hook that runs before": _hooked_before,
    "a method of the object": _patched,
}


@pytest.mark.parametrize("what", MODULES)
@run_distributed(world_size=2)
def test_the_state_of_a_module_is_that_of_its_state_dict(tmp_path: Path, what: str) -> None:
    module = sharded_module()
    module.append(MODULES[what]())
    expected: Any = module.state_dict()
    found: Any = attached_state(module)
    assert (found is not None) == (what == "nothing of its own")
    if found is not None:
        assert found["0.weight"] is module[0].weight
        found = detached(found)
        assert found._metadata == expected._metadata
        assert list(found) == list(expected)
        assert [one.requires_grad for one in found.values()] == [False] * len(found)
    forget()
    for _ in range(2):
        save({"model": module}, tmp_path / "file.pt")
    assert_equal(torch.load(tmp_path / "file.pt", weights_only=True), whole(expected))


@run_distributed(world_size=2)
def test_tied_parameters_and_plain_ones_stay_as_they_are(tmp_path: Path) -> None:
    forget()
    module = sharded_module(nn.Linear(20, 20), nn.Linear(20, 20))
    module[3].weight = module[2].weight
    assert module.state_dict(keep_vars=True)["3.weight"] is module[2].weight
    save({"model": module}, tmp_path / "first.pt")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    check({"model": module}, tmp_path, whole(module.state_dict()))
    found = torch.load(tmp_path / "known.pt", weights_only=True)
    assert found["3.weight"].untyped_storage()._cdata == found["2.weight"].untyped_storage()._cdata


@run_distributed(world_size=2)
def test_parameters_that_an_object_returns_stay_parameters(tmp_path: Path) -> None:
    forget()
    module = nn.Linear(30, 20)
    fully_shard(module, mesh=mesh_of(2))
    for _ in range(2):
        save({"one": module}, tmp_path / "file.pt")
    state = OrderedDict(module.state_dict(keep_vars=True))
    vars(state).update(vars(module.state_dict()))
    assert save({"one": Stateful(state)}, tmp_path / "file.pt") == 1
    found = torch.load(tmp_path / "file.pt", weights_only=True)
    assert [type(one) for one in found.values()] == [nn.Parameter] * 2
    assert save({"one": module}, tmp_path / "file.pt") == 0
    found = torch.load(tmp_path / "file.pt", weights_only=True)
    assert [type(one) for one in found.values()] == [torch.Tensor] * 2


@run_distributed(world_size=2)
def test_a_refused_form_is_refused_again(tmp_path: Path) -> None:
    forget()
    line = mesh_of(2)
    odd = DTensor.from_local(numbers(3, 2), line, [Shard(0)], shape=torch.Size([8, 2]), stride=(2, 1))
    for _ in range(2):
        error = raised(lambda: save({"one": Stateful({"odd": odd})}, tmp_path / "file.pt"))
        assert "key 'odd' is a DTensor of which this rank holds a shard of shape (3, 2)" in str(error)
    job.barrier()
    assert list(tmp_path.iterdir()) == []


def alive_after_saves(path: Path) -> list[Any]:
    """Save a state twice and drop it; return what is alive of its tensors and its mesh."""
    forget()
    line = DeviceMesh("cpu", [0, 1])
    state = state_of(line)
    for _ in range(2):
        save({"one": Stateful(state)}, path)
    watched = [weakref.ref(state["a"]), weakref.ref(state["a"].to_local()), weakref.ref(state["more"]["plain"])]
    watched.append(weakref.ref(line))  # which keeps its process groups alive
    state.clear()
    del line
    gc.collect()
    return [one() for one in watched]


@run_distributed(world_size=2)
def test_a_known_form_keeps_no_tensor_and_no_mesh_alive(tmp_path: Path) -> None:
    alive_after_saves(tmp_path / "file.pt")  # torch's own caches keep the first mesh of those that are equal
    assert alive_after_saves(tmp_path / "file.pt") == [None] * 4
