"""A file of whole tensors loads into DTensors of any placement: each rank reads its own parts, without a collective."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import distckpt
from distckpt import Checkpoint, resume
from distckpt.ptformat.reader import OpenCheckpoint
from tests.support import job, run_distributed, run_ranks
from tests.support.equality import equal

pytestmark = pytest.mark.only_on("gloo", why="device meshes over Gloo")

AS_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.int8}


@pytest.fixture(autouse=True)
def _torch_warns_of_its_own_calls() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def no_collectives() -> Iterator[None]:
    seen: Any = CommDebugMode()  # type: ignore[no-untyped-call]
    with seen:
        yield
    assert seen.get_total_counts() == 0


def load(objects: Any, checkpoint: Any, **options: Any) -> Any:
    """Load without a collective."""
    with no_collectives():
        return Checkpoint.load_objects(objects, checkpoint, **options)


def saved(folder: Path, state: Any) -> Path:
    """Let rank 0 write a file of plain tensors."""
    job.barrier()  # the ranks may still read the last one
    if job.rank() == 0:
        torch.save(state, folder / "a.pt")
    job.barrier()
    return folder / "a.pt"


# -- single tensors ----------------------------------------------------------------------------------

Layout = tuple[tuple[int, ...], DeviceMesh, Sequence[Any]]  # shape, mesh, placements


def layouts() -> dict[str, Layout]:
    """Return every way of sharding that the world allows. Collective."""
    world = job.world_size()
    one = init_device_mesh("cpu", (world,))
    tp = 2 if world % 2 == 0 else 1
    two = init_device_mesh("cpu", (world // tp, tp))
    sub = DeviceMesh("cpu", list(range(max(world - 1, 1))))
    strided = _StridedShard(0, split_factor=tp) if tp > 1 else Shard(0)
    return {
        "rows": ((12, 5), one, [Shard(0)]),
        "columns": ((5, 12), one, [Shard(1)]),
        "middle": ((3, 8, 2), one, [Shard(1)]),
        "uneven": ((7, 3), one, [Shard(0)]),
        "uneven columns": ((2, 7), one, [Shard(1)]),
        "empty": ((1, 3), one, [Shard(0)]),
        "vector": ((5,), one, [Shard(0)]),
        "scalar": ((), one, [Replicate()]),
        "replicated": ((4, 3), one, [Replicate()]),
        "hybrid": ((8, 3), two, [Replicate(), Shard(0)]),
        "both dimensions": ((6, 7), two, [Shard(0), Shard(1)]),
        "rows twice": ((9, 2), two, [Shard(0), Shard(0)]),
        "strided": ((8, 3), two, [strided, Shard(0)]),
        "strided, uneven": ((5, 3), two, [strided, Shard(0)]),
        "sub-mesh": ((6, 3), sub, [Shard(0)]),
        "columns of a sub-mesh": ((3, 4), sub, [Shard(1)]),
    }


def distribute(whole: torch.Tensor, layout: Layout) -> DTensor:
    """Cut a whole tensor by torch's own way, without a collective."""
    _, mesh, placements = layout
    local = whole
    coordinate = mesh.get_coordinate()
    for num, part, placement in zip(mesh.shape, coordinate or (), placements, strict=False):
        if not placement.is_replicate():
            local = placement._split_tensor(local, num, with_padding=False, contiguous=True)[0][part]
    local = local.new_empty(0) if coordinate is None else local.clone()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def numbered(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(AS_INTEGERS[tensor.dtype]).to(torch.int32)


def gathered(tensor: Any) -> torch.Tensor:
    """Return a DTensor's bits as one tensor. Collective: Gloo gathers integers."""
    local = bits(tensor.to_local().detach())
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    ).full_tensor()


class Tensors(nn.Module):
    """A module that has these tensors as parameters, the last one as a buffer."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        *parameters, buffer = tensors
        for name in parameters:
            self.register_parameter(name, nn.Parameter(tensors[name], requires_grad=False))
        self.register_buffer(buffer, tensors[buffer])


def layouts_load(path: str, dtype: torch.dtype, saved_dtype: torch.dtype) -> int:
    """Load a file into DTensors of all layouts; return the number of those that hold what the file does."""
    found = layouts()
    wholes = {name: numbered(layout[0], saved_dtype) for name, layout in found.items()}
    file = saved(Path(path), {"net": wholes})
    zeros: Any = {name: distribute(torch.zeros(layout[0]).to(dtype), layout) for name, layout in found.items()}
    locals_before = {name: one._local_tensor.data_ptr() for name, one in zeros.items()}
    net = Tensors(zeros)
    load({"net": net}, file)
    for name, loaded in net.state_dict().items():
        whole = wholes[name].to(dtype)
        assert torch.equal(bits(loaded.to_local()), bits(distribute(whole, found[name]).to_local())), name
        assert loaded.to_local().data_ptr() == locals_before[name]
        if found[name][1].get_coordinate() is not None:
            assert torch.equal(gathered(loaded), bits(whole)), name
    return len(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_layout_gets_the_bits_of_the_whole_tensor(tmp_path: Path, world_size: int, dtype: torch.dtype) -> None:
    assert run_ranks(layouts_load, world_size, str(tmp_path), dtype, dtype) == [16] * world_size


@pytest.mark.parametrize("world_size", [3, 4])
def test_every_layout_is_converted_to_the_dtype_of_the_live_tensor(tmp_path: Path, world_size: int) -> None:
    assert run_ranks(layouts_load, world_size, str(tmp_path), torch.bfloat16, torch.float32) == [16] * world_size


def in_other_ways(path: str) -> None:
    """Load mappings, torch's older format, tensors that are stored transposed, and with ``assign=True``."""
    found = layouts()
    wholes = {name: numbered(layout[0], torch.float32) for name, layout in found.items()}
    turned = {name: whole.T.contiguous().T if whole.dim() == 2 else whole for name, whole in wholes.items()}

    def check(state: Any, **options: Any) -> None:
        zeros = {name: distribute(torch.zeros(layout[0]), layout) for name, layout in found.items()}
        net = Tensors(zeros)
        load({"net": net}, state, **options)
        for name, loaded in net.state_dict().items():
            assert type(loaded) is DTensor
            assert torch.equal(loaded.to_local(), distribute(wholes[name], found[name]).to_local()), name

    check({"net": wholes})
    check({"net": turned}, strict=False)
    check(saved(Path(path), {"net": turned}))
    check(saved(Path(path), {"net": wholes}), assign=True)
    if job.rank() == 0:
        torch.save({"net": wholes}, f"{path}/old.pt", _use_new_zipfile_serialization=False)
    job.barrier()
    check(f"{path}/old.pt")


@pytest.mark.parametrize("world_size", [2, 4])
def test_mappings_and_files_of_other_forms_load_too(tmp_path: Path, world_size: int) -> None:
    run_ranks(in_other_ways, world_size, str(tmp_path))


# -- models and optimizers ---------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers with rows that divide evenly, and two that do not."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)
        self.norm, self.last = nn.LayerNorm(4), nn.Linear(4, 1)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        hidden: torch.Tensor = self.last(self.norm(self.second(self.first(batch).relu())))
        return hidden


def plain() -> nn.Module:
    torch.manual_seed(7)
    return Net()


def fsdp(net: nn.Module) -> Any:
    mesh = init_device_mesh("cpu", (job.world_size(),))
    for child in net.children():
        fully_shard(child, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def fsdp_and_tensor_parallel(net: nn.Module) -> Any:
    mesh = init_device_mesh("cpu", (job.world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(net, mesh["tp"], {"first": ColwiseParallel(), "second": RowwiseParallel()})
    for child in net.children():
        fully_shard(child, mesh=mesh["dp"])
    return fully_shard(net, mesh=mesh["dp"])


def hybrid(net: nn.Module) -> Any:
    mesh = init_device_mesh("cpu", (2, job.world_size() // 2), mesh_dim_names=("replicate", "shard"))
    return fully_shard(net, mesh=mesh)


SHARDED: dict[str, Callable[[nn.Module], Any]] = {
    "fsdp": fsdp,
    "tensor parallel": fsdp_and_tensor_parallel,
    "hybrid": hybrid,
}
BATCH = torch.linspace(-1, 1, 24).view(6, 4)


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net(BATCH).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(num_steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    net = plain()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    for _ in range(num_steps):
        step(net, optimizer)
    return net, optimizer


def whole(state: Any) -> Any:
    """Return a state with whole tensors. Collective."""
    if isinstance(state, dict):
        return {key: whole(item) for key, item in state.items()}
    return state.full_tensor() if isinstance(state, DTensor) else state


def into_sharded(path: str, kind: str, num_steps: int) -> None:
    """Load a plain model's file into a sharded model that has trained for some steps."""
    net, optimizer = trained(2)
    file = saved(Path(path), {"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    sharded = SHARDED[kind](plain())
    its_optimizer = torch.optim.AdamW(sharded.parameters(), lr=0.5)
    for _ in range(num_steps):
        step(sharded, its_optimizer)
    assert load({"net": sharded, "optimizer": its_optimizer}, file) == distckpt.LoadReport()
    assert all(type(one) is DTensor for one in sharded.parameters())
    assert equal(whole(sharded.state_dict()), dict(net.state_dict()))
    assert equal(whole(its_optimizer.state_dict()), optimizer.state_dict())
    step(net, optimizer)
    step(sharded, its_optimizer)
    for ours, theirs in zip(whole(sharded.state_dict()).values(), net.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("num_steps", [0, 1])
@pytest.mark.parametrize(
    ("kind", "world_size"), [("fsdp", 1), ("fsdp", 2), ("fsdp", 3), ("tensor parallel", 4), ("hybrid", 4)]
)
def test_sharded_model_goes_on_from_a_plain_models_file(
    tmp_path: Path, kind: str, world_size: int, num_steps: int
) -> None:
    run_ranks(into_sharded, world_size, str(tmp_path), kind, num_steps)


KINDS_AND_SIZES = [("fsdp", 1), ("fsdp", 2), ("fsdp", 3), ("tensor parallel", 4), ("hybrid", 4)]


def save_sharded(path: str, kind: str) -> Any:
    """Save a sharded model that has trained for two steps; return its whole state."""
    net = SHARDED[kind](plain())
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    for _ in range(2):
        step(net, optimizer)
    distckpt.save({"net": net, "optimizer": optimizer}, path)
    return whole({"net": dict(net.state_dict()), "optimizer": optimizer.state_dict()})


def load_resharded(path: str, kind: str) -> Any:
    """Load a file into another model; return its whole state."""
    net = SHARDED[kind](plain()) if kind in SHARDED else plain()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.5)
    distckpt.load({"net": net, "optimizer": optimizer}, path)
    return whole({"net": dict(net.state_dict()), "optimizer": optimizer.state_dict()})


@pytest.mark.parametrize(("kind", "world_size"), KINDS_AND_SIZES)
def test_sharded_save_loads_on_every_other_number_of_ranks_and_layout(
    tmp_path: Path, kind: str, world_size: int
) -> None:
    path = str(tmp_path / "a.pt")
    wanted = run_ranks(save_sharded, world_size, path, kind)[0]
    for other, num_ranks in [("plain", 1), ("plain", 2), *KINDS_AND_SIZES]:
        assert all(equal(found, wanted) for found in run_ranks(load_resharded, num_ranks, path, other))


@run_distributed(world_size=2)
def test_file_of_a_sharded_model_loads_into_a_plain_one(tmp_path: Path) -> None:
    sharded = fsdp(plain())
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=0.1)
    step(sharded, optimizer)
    state = whole({"net": dict(sharded.state_dict()), "optimizer": optimizer.state_dict()})
    net, its_optimizer = trained(0)
    load({"net": net, "optimizer": its_optimizer}, saved(tmp_path, state))
    assert equal(dict(net.state_dict()), state["net"])
    assert equal(its_optimizer.state_dict(), state["optimizer"])


@run_distributed(world_size=2)
def test_model_whose_parameters_are_gathered_loads(tmp_path: Path) -> None:
    net, _ = trained(2)
    sharded: Any = fully_shard(plain(), mesh=init_device_mesh("cpu", (2,)))
    with torch.no_grad():
        sharded(BATCH)
    assert any(type(one) is nn.Parameter for one in sharded.parameters())
    load({"net": sharded}, saved(tmp_path, {"net": net.state_dict()}))
    assert equal(whole(sharded.state_dict()), dict(net.state_dict()))


@run_distributed(world_size=2)
def test_collective_load_and_resume_load_sharded_objects(tmp_path: Path) -> None:
    net, optimizer = trained(2)
    file = saved(tmp_path, {"net": net.state_dict(), "optimizer": optimizer.state_dict()})

    def resume_from(objects: Any) -> Any:
        return resume(objects, tmp_path)

    for loads in (partial(distckpt.load, path=file), resume_from):
        sharded = fsdp(plain())
        its_optimizer = torch.optim.AdamW(sharded.parameters())
        loads({"net": sharded, "optimizer": its_optimizer})
        assert equal(whole(sharded.state_dict()), dict(net.state_dict()))
        assert equal(whole(its_optimizer.state_dict()), optimizer.state_dict())


def moments(optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    for state in optimizer.state.values():
        yield from (state["exp_avg"], state["exp_avg_sq"])


@run_distributed(world_size=2)
def test_tied_parameters_stay_tied(tmp_path: Path) -> None:
    def tied() -> Any:
        net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        net[1].weight = net[0].weight
        return net

    wanted = tied().state_dict()
    net = fully_shard(tied(), mesh=init_device_mesh("cpu", (2,)))
    load({"net": net}, saved(tmp_path, {"net": wanted}))
    assert net[0].weight is net[1].weight
    assert torch.equal(net[1].weight.full_tensor(), wanted["0.weight"])


@run_distributed(world_size=2)
def test_ranks_read_their_own_shards_once_and_nothing_else(tmp_path: Path) -> None:
    net = nn.Linear(512, 512, bias=False)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 512)).sum().backward()
    optimizer.step()
    file = saved(tmp_path, {"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    sharded: Any = fully_shard(nn.Linear(512, 512, bias=False), mesh=init_device_mesh("cpu", (2,)))
    fresh = torch.optim.AdamW(sharded.parameters())
    read: list[int] = []
    real = OpenCheckpoint.read

    def count(self: OpenCheckpoint, requests: Any) -> None:
        noted = list(requests)
        read.extend(num_bytes for _, num_bytes, _ in noted)
        real(self, noted)

    for is_fresh in (True, False):
        read.clear()
        memory = [one.to_local().data_ptr() for one in (sharded.weight, *moments(fresh))]
        with mock.patch.object(OpenCheckpoint, "read", count):
            load({"net": sharded, "optimizer": fresh}, file, verify=False)
        shard = 512 * 512 * 4 // 2
        assert sorted(read) == [4, shard, shard, shard]  # a step, and three shards
        if not is_fresh:
            assert [one.to_local().data_ptr() for one in (sharded.weight, *moments(fresh))] == memory
    assert equal(whole(fresh.state_dict()), optimizer.state_dict())
