"""Loads into sharded objects that do not fit."""

import copy
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

import distckpt
from distckpt import RemoteRankError, ShardedStateError, StateMismatchError
from distckpt.loading import inplace
from tests.distributed.programs import Stateful, gather, kinds, raised
from tests.distributed.test_sharded_loading import (
    Net,
    Tensors,
    distribute,
    fsdp,
    load,
    plain,
    saved,
    step,
    trained,
    whole,
)
from tests.support import job, run_distributed
from tests.support.equality import equal

pytestmark = pytest.mark.only_on("gloo", why="device meshes over Gloo")


@pytest.fixture(autouse=True)
def _torch_warns_of_its_own_calls() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def copies(*objects: Any) -> list[Any]:
    return [copy.deepcopy(one.state_dict()) for one in objects]


def local(state: Any) -> Any:
    """Return a state with local shards."""
    if isinstance(state, dict):
        return {key: local(item) for key, item in state.items()}
    return state.to_local() if isinstance(state, DTensor) else state


class Refuses:
    """An object that refuses every state."""

    def state_dict(self) -> Any:
        return {}

    def load_state_dict(self, state: Any) -> None:
        del state
        raise ZeroDivisionError


class Holds:
    """An object of the user's whose state has DTensors."""

    def __init__(self, tensor: Any) -> None:
        self.tensors = [tensor]

    def state_dict(self) -> Any:
        return {"average": {"tensors": self.tensors}}

    def load_state_dict(self, state: Any) -> None:
        for ours, theirs in zip(self.tensors, state["average"]["tensors"], strict=True):
            ours.copy_(theirs)


class Hooked(Net):
    """A module that looks at the states it loads."""

    def _load_from_state_dict(self, state: Any, *args: Any) -> None:
        assert all(type(state[key]) is DTensor for key in state if key.endswith("weight"))
        super()._load_from_state_dict(state, *args)


@run_distributed(world_size=2)
def test_objects_with_ways_of_their_own_get_dtensors_and_are_put_back_if_another_refuses(tmp_path: Path) -> None:
    net, optimizer = trained(2)
    rows = torch.arange(6.0).view(3, 2)
    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "average": {"average": {"tensors": [rows]}}}
    file = saved(tmp_path, {**state, "refuses": {}})
    torch.manual_seed(1)
    sharded = fsdp(Hooked())
    its_optimizer = torch.optim.AdamW(sharded.parameters())
    its_optimizer.register_load_state_dict_pre_hook(lambda _, state: state)
    step(sharded, its_optimizer)
    layout = (rows.shape, init_device_mesh("cpu", (2,)), [Shard(0)])
    average = Holds(distribute(torch.zeros(3, 2), layout))
    objects = {"net": sharded, "optimizer": its_optimizer, "average": average}
    before = local(copies(*objects.values())[0]), local(copies(*objects.values())[1])
    with pytest.raises(ZeroDivisionError):
        load({**objects, "refuses": Refuses()}, file)
    assert equal(local(sharded.state_dict()), before[0])
    assert equal(local(its_optimizer.state_dict()), before[1])
    assert not average.tensors[0].to_local().any()
    load(objects, file)
    assert equal(whole(sharded.state_dict()), dict(net.state_dict()))
    assert equal(whole(its_optimizer.state_dict()), optimizer.state_dict())
    assert torch.equal(average.tensors[0].full_tensor(), rows)


@pytest.mark.parametrize("fault", ["object", "module", "optimizer"])
@run_distributed(world_size=2)
def test_nothing_is_changed_if_one_object_does_not_fit(tmp_path: Path, fault: str) -> None:
    net, optimizer = trained(2)
    file = saved(tmp_path, {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "other": {}})
    sharded = fsdp(plain())
    its_optimizer = torch.optim.AdamW(sharded.parameters())
    step(sharded, its_optimizer)
    others = {
        "object": Refuses(),
        "module": nn.Linear(1, 1),
        "optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters()),
    }
    before = [local(one) for one in copies(sharded, its_optimizer)]
    error: Any = ZeroDivisionError if fault == "object" else StateMismatchError
    with pytest.raises(error):
        load({"net": sharded, "optimizer": its_optimizer, "other": others[fault]}, file)
    assert equal(local(sharded.state_dict()), before[0])
    assert equal(local(its_optimizer.state_dict()), before[1])


@run_distributed(world_size=2)
def test_shapes_and_keys_that_differ_are_one_error_that_names_them(tmp_path: Path) -> None:
    state = plain().state_dict()
    state["first.weight"] = torch.zeros(8, 5)
    del state["last.bias"]
    state["extra"] = torch.zeros(1)
    file = saved(tmp_path, {"net": state})
    sharded = fsdp(plain())
    before = local(copies(sharded)[0])
    with pytest.raises(StateMismatchError) as caught:
        load({"net": sharded}, file)
    assert (caught.value.missing, caught.value.unexpected) == (("net.last.bias",), ("net.extra",))
    assert caught.value.mismatched == ("net.first.weight",)
    assert equal(local(sharded.state_dict()), before)
    state["first.weight"] = torch.zeros(8, 4)
    report = load({"net": sharded}, {"net": state}, strict=False)
    assert (report.missing, report.unexpected) == (("net.last.bias",), ("net.extra",))
    assert not local(sharded.state_dict())["first.weight"].any()


@run_distributed(world_size=2)
def test_shard_of_another_shape_than_its_placements_give_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path, {"net": {"a": torch.ones(5)}})
    mesh = init_device_mesh("cpu", (2,))
    odd = DTensor.from_local(
        torch.zeros(4 - 3 * job.rank()), mesh, [Shard(0)], run_check=False, shape=torch.Size([5]), stride=(1,)
    )
    with pytest.raises(ShardedStateError, match=r"a DTensor whose placements \(S\(0\)\) over a mesh of 2 ranks give"):
        load({"net": Tensors({"a": odd})}, file)


@run_distributed(world_size=2)
def test_shards_in_a_wrapper_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path, {"net": {"a": torch.ones(4)}})
    wrapper: Any = LocalShardsWrapper([torch.zeros(2)], [(2 * job.rank(),)])
    mesh = init_device_mesh("cpu", (2,))
    held = DTensor.from_local(wrapper, mesh, [Shard(0)], run_check=False, shape=torch.Size([4]), stride=(1,))
    with pytest.raises(ShardedStateError, match=r"to_load\['net'\], key 'a', is a DTensor with placements"):
        load({"net": Tensors({"a": held})}, file)


@run_distributed(world_size=2)
def test_partial_sums_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path, {"net": {"a": torch.ones(2)}})
    mesh = init_device_mesh("cpu", (2,))
    summand = DTensor.from_local(torch.zeros(2), mesh, [Partial()], run_check=False)
    net = Tensors({"a": summand})
    with pytest.raises(ShardedStateError, match=r"to_load\['net'\], key 'a', is a DTensor whose placement P"):
        load({"net": net}, file)
    optimizer = torch.optim.SGD([nn.Parameter(summand)])
    with pytest.raises(ShardedStateError, match=r"its parameter 0 of group 0 is a DTensor whose placement P"):
        load({"optimizer": optimizer}, file)
    assert not summand.to_local().any()
    assert gather(1) == [1, 1]


class RefusesOnRankOne(Holds):
    """An object that rank 1 refuses to load."""

    def load_state_dict(self, state: Any) -> None:
        if job.rank() == 1 and state["average"]["tensors"][0].to_local().any():
            raise ValueError("refused here")
        super().load_state_dict(state)


class GathersOnRankOne:
    """An object whose state is gathered, as by torch's state API, and that rank 1 refuses to load."""

    def __init__(self) -> None:
        self.values = torch.zeros(2)
        self.refuses = True

    def state_dict(self) -> Any:
        return {"values": gather(self.values)}

    def load_state_dict(self, state: Any) -> None:
        loaded = gather(state["values"])[0]
        if self.refuses and job.rank() == 1 and bool(loaded[0].any()):
            raise ValueError("refused here")
        self.values = loaded[job.rank()]


@pytest.mark.parametrize("way", ["load", "resume"])
@run_distributed(world_size=2)
def test_an_object_with_a_collective_state_is_restored_on_all_ranks_together(tmp_path: Path, way: str) -> None:
    file = saved(tmp_path, {"gathers": {"values": [torch.ones(2), torch.ones(2)]}, "other": {}})
    gathers = GathersOnRankOne()
    objects = {"gathers": gathers, "other": Stateful({})}
    error = raised(partial(WAYS[way], objects, file))
    assert "ValueError" in kinds(error), error
    assert not gathers.values.any()
    gathers.refuses = False
    WAYS[way](objects, file)
    assert gathers.values.all()


def load_collectively(objects: Any, file: Path) -> None:
    distckpt.load(objects, file)


def resume(objects: Any, file: Path) -> None:
    distckpt.resume(objects, file.parent)


WAYS: dict[str, Any] = {"load": load_collectively, "resume": resume}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fault", ["object", "reading"])
@run_distributed(world_size=2)
def test_no_rank_keeps_what_it_has_loaded_if_another_rank_fails(
    tmp_path: Path, way: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, optimizer = trained(2)
    rows = torch.ones(4, 2)
    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "average": {"average": {"tensors": [rows]}}}
    file = saved(tmp_path, state)
    sharded = fsdp(plain())
    its_optimizer = torch.optim.AdamW(sharded.parameters())
    step(sharded, its_optimizer)
    layout = (rows.shape, init_device_mesh("cpu", (2,)), [Shard(0)])
    average = (RefusesOnRankOne if fault == "object" else Holds)(distribute(torch.zeros(4, 2), layout))
    objects = {"net": sharded, "optimizer": its_optimizer, "average": average}
    before = [local(one) for one in copies(sharded, its_optimizer)]

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        if fault == "reading" and job.rank() == 1:
            patched.setattr(inplace, "read_into", fail)
        error = raised(lambda: WAYS[way](objects, file))
    assert ("ValueError" if fault == "object" else "PartialLoadError") in kinds(error), error
    assert isinstance(error, RemoteRankError)
    assert not average.tensors[0].to_local().any()
    if fault == "object":
        assert equal(local(sharded.state_dict()), before[0])
        assert equal(local(its_optimizer.state_dict()), before[1])
    else:
        assert "Of optimizer, net some tensors hold the old values" in str(error)
    average.__class__ = Holds
    WAYS[way](objects, file)
    assert equal(whole(sharded.state_dict()), dict(net.state_dict()))
    assert equal(whole(its_optimizer.state_dict()), optimizer.state_dict())
    assert torch.equal(average.tensors[0].full_tensor(), rows)
