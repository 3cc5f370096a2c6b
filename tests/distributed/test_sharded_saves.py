"""A sharded state is saved as one plain file with whole tensors, each rank writing the bytes that it holds."""

import ctypes
import itertools
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import distckpt
from distckpt import Checkpoint, DiskSaver, RngState
from distckpt.ptformat.reader import verify
from distckpt.storage import direct_io
from tests.distributed.programs import Stateful
from tests.support import job, run_distributed

pytestmark = [
    pytest.mark.only_on("gloo", why="device meshes over Gloo"),
    pytest.mark.filterwarnings("ignore"),  # torch warns of its own calls
]
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).remainder(199).reshape(shape).to(dtype)


def mesh_of(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape)


def shard(whole_tensor: torch.Tensor, mesh: DeviceMesh, placements: list[Any], **_: Any) -> DTensor:
    return distribute_tensor(whole_tensor, mesh, placements, src_data_rank=None)  # Gloo cannot scatter every dtype


def tensors_of(world_size: int, dtype: torch.dtype) -> dict[str, DTensor]:
    """Return a DTensor of each kind that this number of ranks allows: small, of one block and a bit, and large ones."""
    line = mesh_of(world_size)
    found = {
        "rows": shard(numbers(24, 5000, dtype=dtype), line, [Shard(0)]),
        "uneven": shard(numbers(4 * world_size + 1, 17_001, dtype=dtype), line, [Shard(0)]),
        "some empty": shard(numbers(1, 90_001, dtype=dtype), line, [Shard(0)]),
        "small": shard(numbers(5, 3, dtype=dtype), line, [Shard(0)]),
        "one row": shard(numbers(1, 3, dtype=dtype), line, [Shard(0)]),
        "vector": shard(numbers(70_001, dtype=dtype), line, [Shard(0)]),
        "nothing": shard(numbers(0, 7, dtype=dtype), line, [Shard(0)]),
        "columns": shard(numbers(300, 301, dtype=dtype), line, [Shard(1)]),
        "middle": shard(numbers(7, 50, 301, dtype=dtype), line, [Shard(1)]),
        "whole": shard(numbers(3, 4, dtype=dtype), line, [Replicate()]),
        "part of the ranks": shard(numbers(90, 1001, dtype=dtype), DeviceMesh("cpu", [0]), [Shard(0)]),
    }
    last = DeviceMesh("cpu", list(range(world_size // 2, world_size)))
    found["on the last ranks"] = shard(numbers(91, 1001, dtype=dtype), last, [Shard(0)])
    found["whole on the last ranks"] = shard(numbers(99, 1001, dtype=dtype), last, [Replicate()])
    found["square"] = shard(numbers(250, 250, dtype=dtype), last, [Replicate()])
    found["its transpose"] = found["square"].t()  # type: ignore[assignment]  # a DTensor, of the same storage
    if world_size % 2 == 0:
        square = mesh_of(2, world_size // 2)
        found["HSDP"] = shard(numbers(64, 4096, dtype=dtype), square, [Replicate(), Shard(0)])
        found["HSDP, small"] = shard(numbers(7, 11, dtype=dtype), square, [Replicate(), Shard(0)])
        found["shards of replicas"] = shard(numbers(65, 4000, dtype=dtype), square, [Shard(0), Replicate()])
        found["two dimensions"] = shard(numbers(130, 700, dtype=dtype), square, [Shard(0), Shard(1)])
        found["rows twice"] = shard(numbers(131, 700, dtype=dtype), square, [Shard(0), Shard(0)])
    return found


def whole(tree: Any) -> Any:
    """Return a state with whole tensors in place of DTensors. Collective."""
    if isinstance(tree, DTensor):
        return tree.full_tensor()
    if isinstance(tree, torch.Tensor):
        return tree.clone()
    if isinstance(tree, Mapping):
        return {key: whole(item) for key, item in tree.items()}
    return [whole(item) for item in tree] if isinstance(tree, list | tuple) else tree


def assert_equal(found: Any, expected: Any, name: str = "") -> None:
    if isinstance(expected, torch.Tensor):
        assert type(found) is torch.Tensor, name
        assert found.dtype is expected.dtype, name
        assert found.shape == expected.shape, name
        ours, theirs = (one.contiguous().reshape(-1).view(torch.uint8) for one in (found, expected))
        assert torch.equal(ours, theirs), name
    elif isinstance(expected, Mapping):
        assert list(found) == list(expected), name
        for key, item in expected.items():
            assert_equal(found[key], item, f"{name}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), name
        for index, item in enumerate(expected):
            assert_equal(found[index], item, f"{name}[{index}]")
    else:
        assert found == expected, name


def check_file(path: Path, expected: Any) -> None:
    """Compare a file with the expected state on rank 0; all ranks wait."""
    if job.rank() == 0:
        verify(path)
        assert_equal(torch.load(path, weights_only=True, mmap=True), expected)
        path.unlink()
    job.barrier()


def save(objects: Mapping[str, Any], path: Path, how: str) -> None:
    if how == "foreground":
        distckpt.save(objects, path)
    elif how == "background":
        distckpt.async_save(objects, path).wait()
    else:
        background = how.endswith("background")
        handler = Checkpoint(dict(objects), DiskSaver(path.parent, require_empty=False, background=background))
        engine = Engine(lambda _engine, _batch: None)
        engine.add_event_handler(Events.EPOCH_COMPLETED, handler)
        engine.run([0])
        if job.rank() == 0:
            (path.parent / str(handler.last_checkpoint)).rename(path)
        job.barrier()


def known(tensors: Mapping[str, DTensor]) -> dict[str, torch.Tensor]:
    """Return the whole tensors; a rank outside of a mesh cannot gather them."""
    found = {name: numbers(*one.shape, dtype=one.dtype) for name, one in tensors.items()}
    return found | {"its transpose": found["square"].t()}


def save_each(world_size: int, folder: Path) -> int:
    count = 0
    for dtype, how in itertools.product(DTYPES, ("foreground", "background", "handler", "handler background")):
        state: dict[str, Any] = {
            "tensors": tensors_of(world_size, dtype),
            "plain": torch.ones(3),
            "number": 7,
            "text": "x",
        }
        expected = state | {"tensors": known(state["tensors"])}
        save({"one": Stateful(state)}, folder / "file.pt", how)
        check_file(folder / "file.pt", expected)
        count += len(state["tensors"])
    return count


@run_distributed(world_size=2)
def test_two_ranks_save_every_placement_as_whole_tensors(tmp_path: Path) -> None:
    assert save_each(2, tmp_path) == 240


@run_distributed(world_size=3)
def test_three_ranks_save_every_placement_as_whole_tensors(tmp_path: Path) -> None:
    assert save_each(3, tmp_path) == 180


@run_distributed(world_size=4)
def test_four_ranks_save_every_placement_as_whole_tensors(tmp_path: Path) -> None:
    assert save_each(4, tmp_path) == 240


def trained(mesh: DeviceMesh, *, tensor_parallel: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(257, 300), nn.ReLU(), nn.Linear(300, 130), nn.LayerNorm(130))
    if tensor_parallel:
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
        mesh = mesh["dp"]
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        model(torch.randn(8, 257)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@run_distributed(world_size=4)
def test_fsdp_and_tensor_parallel_models_and_their_optimizers_are_whole_in_the_file(tmp_path: Path) -> None:
    meshes = {
        "FSDP2": (mesh_of(4), False),
        "HSDP": (init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")), False),
        "FSDP2+TP": (init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), True),
    }
    for (name, (mesh, is_parallel)), how in itertools.product(meshes.items(), ("foreground", "handler background")):
        model, optimizer = trained(mesh, tensor_parallel=is_parallel)
        expected = {"model": whole(model.state_dict()), "optimizer": whole(optimizer.state_dict())}
        placements = [str(getattr(one, "placements", "")) for one in model.parameters()]
        assert any("_StridedShard" in one for one in placements) == (name == "FSDP2+TP")
        save({"model": model, "optimizer": optimizer}, tmp_path / "file.pt", how)
        check_file(tmp_path / "file.pt", expected)


@run_distributed(world_size=2)
def test_tied_and_nested_tensors_keep_their_form(tmp_path: Path) -> None:
    line = mesh_of(2)
    tied = shard(numbers(10, 9), line, [Shard(0)])
    twin = tied.detach()
    deep: Any = Counter()  # a mapping whose items stay as they are
    deep["a"] = shard(numbers(4), line, [Shard(0)])
    parameter = nn.Parameter(shard(numbers(6), line, [Shard(0)]))
    ordered = OrderedDict(x=(tied, {"y": twin}), z=tied)
    state = {"ordered": ordered, "deep": deep, "parameter": parameter}
    distckpt.save({"one": Stateful(state)}, tmp_path / "file.pt")
    job.barrier()
    found = torch.load(tmp_path / "file.pt", weights_only=True)
    assert torch.equal(found["ordered"]["z"], numbers(10, 9))
    assert found["ordered"]["z"].untyped_storage()._cdata == found["ordered"]["x"][1]["y"].untyped_storage()._cdata
    assert torch.equal(found["deep"]["a"], numbers(4))
    assert isinstance(found["parameter"], nn.Parameter)
    assert torch.equal(found["parameter"], numbers(6))


@pytest.mark.parametrize("num_rows", [70, 15], ids=["large", "small"])
@run_distributed(world_size=2)
def test_replicas_that_have_other_numbers_on_each_rank_are_saved(tmp_path: Path, num_rows: int) -> None:
    whole_tensor = numbers(num_rows, 999)
    replica = DistributedDataParallel(nn.Sequential(*[nn.Linear(40, 40) for _ in range(6)]))
    first = {f"own {index}": torch.ones(500) for index in range(1 + 3 * job.rank())}
    state = {"shard": shard(whole_tensor, mesh_of(2), [Shard(0)])}
    objects = {"first": Stateful(first), "replica": replica, "state": Stateful(state)}
    distckpt.save(objects, tmp_path / "file.pt", share_write="world")
    check_file(
        tmp_path / "file.pt",
        {"first": {"own 0": torch.ones(500)}, "replica": replica.module.state_dict(), "state": {"shard": whole_tensor}},
    )


@run_distributed(world_size=2)
def test_tensors_of_one_storage_that_read_it_in_another_order_are_not_one_tensor(tmp_path: Path) -> None:
    mine = shard(numbers(8, 4), mesh_of(2), [Shard(0)])
    form: Any = {"run_check": False, "shape": mine.shape, "stride": mine.stride()}
    other = DTensor.from_local(mine.to_local().t(), mine.device_mesh, mine.placements, **form)
    state = {"one": mine, "other": other}
    expected = whole(state)
    distckpt.save({"s": Stateful(state)}, tmp_path / "file.pt")
    check_file(tmp_path / "file.pt", expected)


@run_distributed(world_size=2)
def test_a_background_save_holds_the_state_of_its_call(tmp_path: Path) -> None:
    model, optimizer = trained(mesh_of(2))
    expected = {"model": whole(model.state_dict()), "optimizer": whole(optimizer.state_dict())}
    pending = distckpt.async_save({"model": model, "optimizer": optimizer}, tmp_path / "file.pt")
    for _ in range(3):
        model(torch.randn(8, 257)).square().sum().backward()
        optimizer.step()
    pending.wait()
    check_file(tmp_path / "file.pt", expected)


@pytest.mark.skipif(vars(direct_io)["_native"] is None, reason="built without the C extension")
@run_distributed(world_size=2)
def test_a_background_save_ends_while_training_rarely_gives_up_the_gil(tmp_path: Path) -> None:
    step = ctypes.PyDLL(None).usleep  # PyDLL keeps the GIL, as a fused optimizer's step does
    tensors = {f"weight {at}": shard(numbers(2, 20_001 + at), mesh_of(2), [Shard(0)]) for at in range(150)}
    objects = {"one": Stateful(tensors)}
    pending = distckpt.async_save(objects, tmp_path / "file.pt")
    num_steps = 0
    while not pending.done():
        step(10_000)
        num_steps += 1
    pending.wait()
    assert num_steps < 75, "a rank does not wait for the GIL at each of its 150 tensors"
    check_file(tmp_path / "file.pt", {name: numbers(*one.shape) for name, one in tensors.items()})


@pytest.mark.parametrize("num_rows", [70, 15], ids=["large", "small"])
@run_distributed(world_size=2)
def test_states_that_differ_beside_the_shards_do_not_matter(tmp_path: Path, num_rows: int) -> None:
    whole_tensor = numbers(num_rows, 999)
    mine = shard(whole_tensor, mesh_of(2), [Shard(0)])
    extra = {f"own {index}": torch.ones(50_000 * (index + 1)) for index in range(3 * job.rank())}
    state = {"first": extra, "shard": mine, "rank": job.rank()}
    distckpt.save({"one": Stateful(state)}, tmp_path / "file.pt", save_on_rank=1)
    job.barrier()
    verify(tmp_path / "file.pt")
    found = torch.load(tmp_path / "file.pt", weights_only=True)
    assert found["rank"] == 1
    assert torch.equal(found["shard"], whole_tensor)
    assert [one.numel() for one in found["first"].values()] == [50_000, 100_000, 150_000]


@run_distributed(world_size=4)
def test_rows_that_fsdp_and_tensor_parallelism_share_unevenly_are_saved_whole(tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False))
    expected = model.state_dict()["0.weight"].clone()
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    distckpt.save({"model": model}, tmp_path / "file.pt")
    check_file(tmp_path / "file.pt", {"0.weight": expected})


@run_distributed(world_size=2)
def test_a_handler_removes_what_a_sharded_save_replaces(tmp_path: Path) -> None:
    model, optimizer = trained(mesh_of(2))
    handler = Checkpoint({"model": model, "optimizer": optimizer}, DiskSaver(tmp_path, background=True), n_saved=2)
    engine = Engine(lambda _engine, _batch: None)
    engine.add_event_handler(Events.EPOCH_COMPLETED, handler)
    engine.run([0], max_epochs=4)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["checkpoint_3.pt", "checkpoint_4.pt"]
    for one in tmp_path.iterdir():
        verify(one)


SHARED: list[dict[str, Any]] = [
    {"share_write": "node"},
    {"share_write": "world", "background": True},
    {"check_replicas": True},
    {"share_write": "node", "check_replicas": True, "background": True},
]


@run_distributed(world_size=2)
def test_replicas_and_random_states_are_saved_beside_shards(tmp_path: Path) -> None:
    for number, options in enumerate(SHARED):
        model, optimizer = trained(mesh_of(2))
        replica = DistributedDataParallel(nn.Linear(200, 200))
        objects: dict[str, Any] = {"rng": RngState(), "model": model, "optimizer": optimizer, "replica": replica}
        saver = DiskSaver(tmp_path / str(number), create_dir=True, **options)
        handler = Checkpoint(objects, saver, n_saved=1)
        engine = Engine(lambda _engine, _batch: None)
        engine.add_event_handler(Events.ITERATION_COMPLETED, handler)
        engine.run([0, 1, 2])
        expected = {name: whole(objects[name].state_dict()) for name in ("model", "optimizer")}
        handler.wait_until_finished()
        job.barrier()
        verify(Path(str(handler.last_checkpoint)))
        found = torch.load(str(handler.last_checkpoint), weights_only=True)
        assert_equal({name: found[name] for name in expected}, expected)
        assert torch.equal(found["replica"]["weight"], replica.module.weight)
        again, fresh = trained(mesh_of(2))[0], DistributedDataParallel(nn.Linear(200, 200))
        distckpt.resume({"model": again, "replica": fresh}, tmp_path / str(number))
        assert_equal(whole(again.state_dict()), expected["model"])
        assert torch.equal(fresh.module.weight, replica.module.weight)
