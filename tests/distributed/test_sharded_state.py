"""Sharded state that cannot be kept is refused on every rank; a replicated DTensor is saved as a plain tensor.

The fault: each rank's shard looks like a tensor, so that rank 0's was saved for the whole and loaded into all.
"""

import dataclasses
import warnings
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor

from distckpt import Checkpoint, DiskSaver, ShardedStateError, resume
from tests.distributed.programs import Stateful, fire, gather, kinds, raised
from tests.support import job, run_distributed

pytestmark = pytest.mark.only_on("gloo", why="device meshes over Gloo")
Pair = namedtuple("Pair", "a b")  # noqa: PYI024 - an untyped one is what states hold


@dataclasses.dataclass
class Record:
    """A class of the user's that holds a tensor."""

    tensor: torch.Tensor


class Wrapped(torch.Tensor):
    """A wrapper subclass, as quantised weights are, with a tensor inside."""

    def __new__(cls, inner: torch.Tensor) -> Self:
        made: Any = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        made.held = inner
        found: Self = made
        return found

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError


@pytest.fixture(autouse=True)
def _torch_warns_of_its_own_calls() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2,))


def sharded() -> DTensor:
    return distribute_tensor(torch.arange(4.0), mesh(), [Shard(0)])


def replicated(value: torch.Tensor | None = None) -> DTensor:
    return distribute_tensor(torch.arange(4.0) if value is None else value, mesh(), [Replicate()])


def summand() -> DTensor:
    return DTensor.from_local(torch.ones(2), mesh(), [Partial()])


def old_kind() -> Any:
    return sharded_tensor.zeros(ChunkShardingSpec(dim=0, placements=["rank:0/cpu", "rank:1/cpu"]), 4, 2)


def _with_attribute(tensor: Any) -> OrderedDict[str, Any]:
    state: OrderedDict[str, Any] = OrderedDict(a=1)
    vars(state)["kept"] = {"x": tensor} if not isinstance(tensor, torch.Tensor) else tensor
    return state


SHARDED: dict[str, Callable[[], Any]] = {
    "Partial": summand,
    "ShardedTensor": old_kind,
    "Parameter": lambda: nn.Parameter(summand()),
    "inside of a wrapper subclass": lambda: Wrapped(sharded()),
}
AROUND: dict[str, tuple[Callable[[Any], Any], str]] = {
    "dict": (lambda tensor: {"layer.weight": tensor}, "layer.weight"),
    "nested": (lambda tensor: {"a": [0, ({"b": tensor},)]}, "a.1.0.b"),
    "attribute of an OrderedDict": (_with_attribute, "kept"),
    "namedtuple": (lambda tensor: {"pair": Pair(1, tensor)}, "pair.1"),
    "defaultdict": (lambda tensor: defaultdict(list, all=[tensor]), "all.0"),
    "object of a user's class": (lambda tensor: {"record": Record(tensor)}, "record.tensor"),
}
SAVERS: dict[str, dict[str, Any]] = {
    "foreground": {},
    "background": {"background": True},
    "shared": {"share_write": "world"},
    "torch's own writer": {"_use_new_zipfile_serialization": False},
}


def refused(to_save: Mapping[str, Any], folder: Path, obj: Stateful | None = None, **options: Any) -> str:
    """Save something good, then `to_save`; return what every rank raises. The good one has to stand."""
    stands = Checkpoint(to_save, DiskSaver(folder, require_empty=False, **options))
    if obj is not None:
        bad, obj.state = obj.state, {"fine": torch.ones(1)}
        engine = fire(stands)
        obj.state = bad
    else:
        engine = None
    job.barrier()
    before = sorted(path.name for path in folder.iterdir())
    job.barrier()
    error = raised(lambda: fire(stands, engine=engine, times=2))
    job.barrier()
    assert sorted(path.name for path in folder.iterdir()) == before
    assert {"ShardedStateError", "NotImplementedError"} <= set(kinds(error))
    assert all("ShardedStateError" in one for one in gather(kinds(error)))
    assert "full_state_dict=True" in str(error)
    return str(error)


@pytest.mark.parametrize("kind", SHARDED)
@run_distributed(world_size=2)
def test_sharded_tensor_of_any_kind_is_refused_on_every_rank_with_its_key(tmp_path: Path, kind: str) -> None:
    obj = Stateful({"layer": {"weight": SHARDED[kind]()}})
    told = refused({"fine": Stateful({"a": 1}), "net": obj}, tmp_path, obj)
    assert "to_save['net'], key 'layer.weight'" in told


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("around", AROUND)
@run_distributed(world_size=2)
def test_sharded_tensor_is_found_wherever_it_stands_and_however_it_is_written(
    tmp_path: Path, around: str, saver: str
) -> None:
    put, key = AROUND[around]
    obj = Stateful(put(summand()))
    assert key in refused({"net": obj}, tmp_path, obj, **SAVERS[saver])


@run_distributed(world_size=2)
def test_custom_save_handler_never_sees_a_sharded_state() -> None:
    seen: list[Any] = []
    handler = Checkpoint({"net": Stateful({"w": sharded()})}, lambda state, _name: seen.append(state))
    assert "ShardedStateError" in kinds(raised(lambda: fire(handler)))
    assert gather(len(seen)) == [0, 0]


@run_distributed(world_size=2)
def test_disk_saver_called_directly_refuses_a_sharded_state_on_every_rank(tmp_path: Path) -> None:
    saver = DiskSaver(tmp_path)
    with pytest.raises(ShardedStateError, match=r"the checkpoint, key 'net\.w', is a DTensor"):
        saver({"net": {"w": sharded()}}, "a.pt")
    state = {"record": Record(sharded())}
    if job.rank() == 0:
        with pytest.raises(ShardedStateError, match=r"Key 'record\.tensor' of the state is a DTensor"):
            saver(state, "a.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("saver", [*SAVERS, "custom", "direct"])
@run_distributed(world_size=2)
def test_replicated_dtensor_is_saved_as_the_plain_tensor_it_stands_for(tmp_path: Path, saver: str) -> None:
    one = replicated()
    state = _with_attribute(replicated())
    state |= {
        "list": [one, one],
        "tuple": (replicated(torch.ones(2, 2)),),
        "parameter": nn.Parameter(replicated()),
        "whole shard": distribute_tensor(torch.arange(3.0), DeviceMesh("cpu", [job.rank()]), [Shard(0)]),
        "tied": DTensor.from_local(one.to_local()[:2], mesh(), [Replicate()]),
        "under way": all_reduce(torch.arange(2.0), "sum", [0, 1]),
        "pair": Pair(replicated(), 2) if saver == "custom" else (replicated(), 2),
    }
    seen: list[Any] = []
    if saver == "custom":
        fire(Checkpoint({"net": Stateful(state)}, lambda found, _name: seen.append(found)))
        found = seen[0]
    else:
        if saver == "direct":
            DiskSaver(tmp_path, require_empty=False)(state, "net_1.pt")
        else:
            handler = Checkpoint({"net": Stateful(state)}, DiskSaver(tmp_path, **SAVERS[saver]))
            fire(handler)
            handler.wait_until_finished()
        job.barrier()
        found = torch.load(tmp_path / "net_1.pt", weights_only=True)
    tensors = [*found["list"], *found["tuple"], found["whole shard"], found["tied"], vars(found)["kept"]]
    tensors.append(found["pair"][0])
    assert [type(one) for one in tensors] == [torch.Tensor] * len(tensors)
    assert [one.tolist() for one in tensors] == [
        [0, 1, 2, 3], [0, 1, 2, 3], [[1, 1], [1, 1]], [0, 1, 2], [0, 1], [0, 1, 2, 3], [0, 1, 2, 3],
    ]  # fmt: skip
    assert (type(found["under way"]), found["under way"].tolist()) == (torch.Tensor, [0, 2])
    assert type(found["parameter"]) is nn.Parameter
    assert found["parameter"].requires_grad
    assert found["list"][0] is found["list"][1]
    found["list"][0][0] = 7
    assert found["tied"].tolist() == [7, 1]


@run_distributed(world_size=2)
def test_fsdp2_module_is_refused_by_torchs_own_writer_and_its_full_state_is_saved(tmp_path: Path) -> None:
    net: Any = nn.Linear(4, 4, bias=False)
    fully_shard(net, mesh=mesh())
    torchs_own: Any = {"_use_new_zipfile_serialization": False}
    assert "to_save['net'], key 'weight', is a DTensor" in refused({"net": net}, tmp_path / "a", **torchs_own)

    class Full:
        def state_dict(self) -> Any:
            return get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))

        def load_state_dict(self, state: Any) -> None:
            raise NotImplementedError

    with torch.no_grad():
        net.weight.to_local().fill_(10.0 + job.rank())
    handler = Checkpoint({"net": Full()}, tmp_path / "c")
    fire(handler)
    plain = nn.Linear(4, 4, bias=False)
    path = handler.last_checkpoint
    assert path is not None
    Checkpoint.load_objects({"net": plain}, path)
    assert plain.weight[:, 0].tolist() == [10, 10, 11, 11]


def fsdp1(*, use_orig_params: bool) -> FullyShardedDataParallel:
    torch.manual_seed(0)
    return FullyShardedDataParallel(nn.Linear(3, 4), use_orig_params=use_orig_params, device_id=torch.device("cpu"))


@pytest.mark.parametrize("use_orig_params", [False, True])
@run_distributed(world_size=2)
def test_fsdp1_is_refused_where_its_state_is_a_shard_and_saved_where_it_is_full(
    tmp_path: Path, *, use_orig_params: bool
) -> None:
    net: Any = fsdp1(use_orig_params=use_orig_params)
    around = nn.Sequential(net, nn.Linear(1, 1))
    for number, kind in enumerate((StateDictType.SHARDED_STATE_DICT, StateDictType.LOCAL_STATE_DICT)):
        with FullyShardedDataParallel.state_dict_type(net, kind):
            assert kind.name in refused({"net": net}, tmp_path / f"a{number}")
            assert kind.name in refused({"net": around}, tmp_path / f"b{number}")
    assert "inside of a FullyShardedDataParallel" in refused({"net": net.module}, tmp_path / "c")
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert "has flattened and sharded" in refused({"optimizer": optimizer}, tmp_path / "d")
    raw = Stateful({"parameters": list(net.parameters())})
    assert "key 'parameters.0'" in refused({"raw": raw}, tmp_path / "e", raw)
    handler = Checkpoint({"net": around}, tmp_path / "f")
    fire(handler)
    path = handler.last_checkpoint
    assert path is not None
    plain = nn.Sequential(nn.Linear(3, 4), nn.Linear(1, 1))
    Checkpoint.load_objects({"net": plain}, path)
    with FullyShardedDataParallel.summon_full_params(net):
        assert torch.equal(plain.get_parameter("0.weight"), net.module.weight.view(4, 3))


@pytest.mark.parametrize("use_orig_params", [False, True])
@run_distributed(world_size=2)
def test_fsdp1_loads_the_full_state_that_it_has_saved(tmp_path: Path, *, use_orig_params: bool) -> None:
    net: Any = fsdp1(use_orig_params=use_orig_params)
    fire(Checkpoint({"net": net}, tmp_path))
    job.barrier()
    for load in (Checkpoint.load_objects, resume):
        again: Any = fsdp1(use_orig_params=use_orig_params)
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.fill_(7.0)
        source: Any = tmp_path if load is resume else tmp_path / "net_1.pt"
        load({"net": again}, source)
        assert all(torch.equal(one, other) for one, other in zip(again.parameters(), net.parameters(), strict=True))
    for kind in (StateDictType.SHARDED_STATE_DICT, StateDictType.LOCAL_STATE_DICT):
        with FullyShardedDataParallel.state_dict_type(net, kind), pytest.raises(ShardedStateError, match=kind.name):
            Checkpoint.load_objects({"net": net}, tmp_path / "net_1.pt")


@run_distributed(world_size=2)
def test_fsdp1_that_gathers_on_rank_0_alone_is_refused_where_another_rank_saves(tmp_path: Path) -> None:
    net = fsdp1(use_orig_params=True)
    with FullyShardedDataParallel.state_dict_type(
        net, StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=True)
    ):
        handler = Checkpoint({"net": net}, DiskSaver(tmp_path, save_on_rank=1), save_on_rank=1)
        error = raised(lambda: fire(handler))
    assert "ShardedStateError" in kinds(error)
    assert "rank 1, which saves, gets no state" in str(error)


@run_distributed(world_size=2)
def test_nothing_is_loaded_into_objects_that_are_sharded_in_other_ways(tmp_path: Path) -> None:
    def values() -> dict[str, Any]:
        return {"net": nn.Linear(4, 4, bias=False), "other": nn.Linear(1, 1)}

    handler = Checkpoint(values(), tmp_path)
    fire(handler)
    path = handler.last_checkpoint
    assert path is not None
    other = nn.Linear(1, 1)
    before = other.weight.item()
    for kind in (old_kind, summand):
        net = nn.Linear(4, 4, bias=False)
        net.weight = nn.Parameter(kind(), requires_grad=False)
        for to_load in ({"net": net, "other": other}, {"other": other, "net": nn.ModuleList([net])}):
            error = raised(partial(Checkpoint.load_objects, to_load, path))
            assert isinstance(error, ShardedStateError)
            assert "to_load['net'], key" in str(error)
            assert "ShardedStateError" in kinds(raised(partial(resume, to_load, tmp_path)))
    for parameters in (fsdp1(use_orig_params=True).parameters(), [nn.Parameter(summand())]):
        with pytest.raises(ShardedStateError, match=r"to_load\['optimizer'\]"):
            Checkpoint.load_objects({"optimizer": torch.optim.SGD(parameters)}, path)
    around: Any = fully_shard(nn.Sequential(nn.Linear(1, 1)), mesh=mesh())
    with torch.no_grad():
        around(torch.ones(1, 1))
    with pytest.raises(ShardedStateError, match="has gathered its parameters"):
        Checkpoint.load_objects({"other": around[0]}, path)
    assert other.weight.item() == before


def replicated_net(value: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a module of replicated DTensors, with a buffer, and an optimizer that has stepped once."""
    net = distribute_module(nn.BatchNorm1d(4), mesh())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    step(net, optimizer)
    return net, optimizer


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Train on one batch."""
    optimizer.zero_grad()
    total: Any = net.get_parameter("weight") ** 2
    total.sum().backward()
    net.get_parameter("bias").grad = torch.ones_like(net.get_parameter("bias"))
    optimizer.step()


def held(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return all values, as numbers, and the types of the tensors."""
    tensors: list[Any] = [*net.state_dict().values()]
    tensors += [one for kept in optimizer.state.values() for one in kept.values()]
    return [(type(one), (one.to_local() if isinstance(one, DTensor) else one).tolist()) for one in tensors]


@pytest.mark.parametrize("options", [{}, {"background": True}])
@run_distributed(world_size=2)
def test_module_of_replicated_dtensors_and_its_optimizer_go_on_from_a_plain_file(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    net, optimizer = replicated_net(2.0)
    handler = Checkpoint({"net": net, "optimizer": optimizer}, DiskSaver(tmp_path, **options))
    fire(handler)
    handler.wait_until_finished()
    job.barrier()
    file = torch.load(tmp_path / "checkpoint_1.pt", weights_only=True)
    kept = [one for state in file["optimizer"]["state"].values() for one in state.values()]
    assert {type(one) for one in (*file["net"].values(), *kept)} == {torch.Tensor}
    step(net, optimizer)
    again, its_optimizer = replicated_net(5.0)
    assert resume({"net": again, "optimizer": its_optimizer}, tmp_path) == tmp_path / "checkpoint_1.pt"
    step(again, its_optimizer)
    assert held(again, its_optimizer) == held(net, optimizer)
    fresh = distribute_module(nn.BatchNorm1d(4), mesh())
    its_optimizer = torch.optim.AdamW(fresh.parameters())
    Checkpoint.load_objects({"net": fresh, "optimizer": its_optimizer}, tmp_path / "checkpoint_1.pt")
    step(fresh, its_optimizer)
    assert held(fresh, its_optimizer) == held(net, optimizer)


@run_distributed(world_size=2)
def test_where_another_object_refuses_replicated_dtensors_are_put_back(tmp_path: Path) -> None:
    class Refusing(Stateful):
        def load_state_dict(self, state: Any) -> None:
            del state
            raise ZeroDivisionError

    net, optimizer = replicated_net(2.0)
    fire(Checkpoint({"net": net, "optimizer": optimizer, "z": Stateful({})}, tmp_path))
    job.barrier()
    again, its_optimizer = replicated_net(5.0)
    before = held(again, its_optimizer)
    for bad in (Refusing({}), nn.Linear(1, 1)):
        assert raised(
            partial(
                Checkpoint.load_objects,
                {"net": again, "optimizer": its_optimizer, "z": bad},
                tmp_path / "checkpoint_1.pt",
            )
        )
        assert held(again, its_optimizer) == before


@run_distributed(world_size=2)
def test_checkpoint_in_memory_or_of_torchs_own_is_refused_where_it_is_sharded(tmp_path: Path) -> None:
    obj, other = Stateful(1), Stateful(2)
    for state in ({"w": sharded()}, [summand()]):
        with pytest.raises(ShardedStateError, match=r"the checkpoint's 'net', key '(w|0)', is a DTensor"):
            Checkpoint.load_objects({"other": other, "net": obj}, {"other": 3, "net": state})
    path = tmp_path / f"{job.rank()}.pt"
    torch.save({"other": 3, "net": {"w": sharded()}}, path)
    with pytest.raises(ShardedStateError, match="the checkpoint's 'net', key 'w', is a DTensor"):
        Checkpoint.load_objects({"other": other, "net": obj}, path)
    assert (obj.state, other.state) == (1, 2)
    Checkpoint.load_objects({"other": other, "net": obj}, {"other": 3, "net": {"w": replicated()}})
    assert type(obj.state["w"]) is torch.Tensor


@run_distributed(world_size=2)
def test_shards_over_one_rank_each_are_whole_and_load_again(tmp_path: Path) -> None:
    own = DeviceMesh("cpu", [job.rank()])
    net: Any = fully_shard(nn.Linear(3, 2), mesh=own)
    again: Any = fully_shard(nn.Linear(3, 2), mesh=own)
    with torch.no_grad():
        net(torch.ones(1, 3))
        again(torch.ones(1, 3))
    folder = tmp_path / str(job.rank())
    saver = DiskSaver(folder)
    saver({"net": net.state_dict()}, "a.pt")
    if job.rank() == 0:
        found = torch.load(folder / "a.pt", weights_only=True)["net"]
        assert type(found["weight"]) is torch.Tensor
        Checkpoint.load_objects({"net": again}, folder / "a.pt")
        ours, theirs = net.state_dict(), again.state_dict()
        assert all(torch.equal(ours[key].to_local(), theirs[key].to_local()) for key in ours)
        assert torch.equal(found["weight"], again.weight.to_local())


@pytest.mark.parametrize("package", ["deepspeed.runtime.engine", "megatron.core.tensor_parallel.layers"])
@run_distributed(world_size=2)
def test_objects_of_libraries_with_shards_of_their_own_are_refused_by_name(tmp_path: Path, package: str) -> None:
    kind: Any = type("Engine", (nn.Linear,), {"__module__": package})
    before = DiskSaver(tmp_path)
    for error in (
        raised(lambda: fire(Checkpoint({"net": kind(2, 2)}, before))),
        raised(lambda: Checkpoint.load_objects({"net": kind(2, 2)}, {"net": {}})),
    ):
        assert "ShardedStateError" in kinds(error)
        assert "['net'] is a Engine of " in str(error)
        assert package.split(".", maxsplit=1)[0] in str(error)
    assert not list(tmp_path.iterdir())
    fire(Checkpoint({"net": nn.Linear(2, 2)}, before))
