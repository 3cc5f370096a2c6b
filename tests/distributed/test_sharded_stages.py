"""Stages of a pipeline that are sharded too, and ranks that have several stages."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import distckpt
from distckpt import ShardedStateError, StageState
from distckpt.ptformat.reader import verify
from tests.distributed.programs import all_equal, gather, raised
from tests.distributed.test_different_objects import files_in
from tests.distributed.test_sharded_saves import whole
from tests.distributed.test_stage_state import (
    LAYERS,
    WIDTH,
    Stage,
    alone,
    by_name,
    check_file,
    check_refused,
    check_trained,
)
from tests.support import job, run_distributed, run_ranks

pytestmark = pytest.mark.only_on("gloo", why="stages send over Gloo")
SHAPES = {"pipeline, FSDP2": (2, 2, 1), "pipeline, tensor parallel": (2, 1, 2), "FSDP2, tensor parallel": (1, 2, 2)}
"""Number of stages, of ranks that share parameters by FSDP2, and of ranks of tensor parallelism."""


def groups_of(model: nn.Module) -> Any:
    weights = [one for name, one in model.named_parameters() if name.endswith("weight")]
    others = [one for name, one in model.named_parameters() if not name.endswith("weight")]
    return [{"params": weights}, {"params": others, "weight_decay": 0.0}]


class ShardedStage(Stage):
    """A stage that returns no view, of which FSDP2 warns."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs).clone()


def layers_of(stage: int, num_stages: int) -> list[int]:
    return [number for number in range(LAYERS) if number * num_stages // LAYERS == stage]


def mesh_of(shape: Sequence[int]) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(shape), mesh_dim_names=("stages", "shards", "parts"))


def build(shape: Sequence[int]) -> tuple[nn.Module, torch.optim.Optimizer, DeviceMesh]:
    """Return this rank's stage, sharded, its optimizer, and the mesh of the job."""
    mesh = mesh_of(shape)
    model = ShardedStage(layers_of(mesh["stages"].get_local_rank(), shape[0]))
    for layer in model.layers.values():
        if shape[2] > 1:
            parallelize_module(layer, mesh["parts"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        elif shape[1] > 1:
            fully_shard(layer, mesh=mesh["shards"])
    if shape[1] > 1:
        fully_shard(model, mesh=mesh["shards"])
    return model, torch.optim.AdamW(groups_of(model), lr=0.01), mesh


def wrapped(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": StageState(model), "optimizer": StageState(optimizer, model)}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, mesh: DeviceMesh, number: int) -> None:
    """Take one step of the pipeline: each rank sends to the rank at its place in the next stage."""
    optimizer.zero_grad()
    stages = mesh["stages"]
    ranks, stage = stages.mesh.tolist(), stages.get_local_rank()
    inputs = torch.linspace(-1, 1, 8 * WIDTH).reshape(8, WIDTH) * (number + 1)
    if stage > 0:
        dist.recv(inputs, ranks[stage - 1])
        inputs.requires_grad_()
    outputs = model(inputs)
    if stage == len(ranks) - 1:
        outputs.square().mean().backward()
    else:
        dist.send(outputs.detach(), ranks[stage + 1])
        gradient = torch.empty_like(outputs)
        dist.recv(gradient, ranks[stage + 1])
        outputs.backward(gradient)
    if stage > 0:
        assert inputs.grad is not None
        dist.send(inputs.grad, ranks[stage - 1])
    optimizer.step()


def check_held(state: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Compare a file's state with what this rank and its peers hold together."""
    for name, one in whole(model.state_dict()).items():
        assert torch.equal(state["model"][name], one), name
    kept = whole(by_name(model, optimizer))
    assert kept.keys() == dict(model.named_parameters()).keys()
    for name, tensors in kept.items():
        its_state = state["optimizer"]["state"][name]
        assert its_state.keys() == tensors.keys()
        assert all(torch.equal(its_state[key], one) for key, one in tensors.items()), name


def check_loads(path: Path, shape: Sequence[int]) -> None:
    """Load a file into fresh objects of another layout."""
    model, optimizer, _ = build(shape)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert not distckpt.load(wrapped(model, optimizer), path)
    check_held(torch.load(path, weights_only=True), model, optimizer)


@pytest.mark.parametrize("name", SHAPES)
@run_distributed(world_size=4)
def test_sharded_stages_are_whole_in_the_file_and_load_in_any_layout(tmp_path: Path, name: str) -> None:
    model, optimizer, mesh = build(SHAPES[name])
    for number in range(2):
        step(model, optimizer, mesh, number)
    objects = wrapped(model, optimizer)
    assert any(isinstance(one, DTensor) for one in model.parameters())
    for number in range(2):  # the second save knows the form of the first
        foreground = distckpt.save(objects, tmp_path / f"a{number}.pt")
        background = distckpt.async_save(objects, tmp_path / f"b{number}.pt").result()
        for path in (foreground, background):
            verify(path)
            state = torch.load(path, weights_only=True, mmap=True)
            assert sorted(state["model"]) == sorted(Stage(range(LAYERS)).state_dict())
            check_held(state, model, optimizer)
        if number == 0:
            step(model, optimizer, mesh, 2)
    for shape in (*SHAPES.values(), (4, 1, 1), (1, 4, 1)):
        check_loads(tmp_path / "b1.pt", shape)
    plain = Stage(range(LAYERS))
    plain.load_state_dict(torch.load(tmp_path / "a1.pt", weights_only=True)["model"])


def _train_and_save(folder: Path) -> None:
    model, optimizer, mesh = build((2, 2, 1))
    for number in range(2):
        step(model, optimizer, mesh, number)
    distckpt.async_save(wrapped(model, optimizer), folder / "a.pt").result()
    job.barrier()
    check_file(folder / "a.pt", 2)


def _load_and_train(path: Path, shape: Sequence[int]) -> None:
    model, optimizer, mesh = build(shape)
    assert not distckpt.load(wrapped(model, optimizer), path)
    for number in (2, 3):
        step(model, optimizer, mesh, number)
    expected, its_optimizer = alone(4)
    for name, one in whole(model.state_dict()).items():
        assert torch.equal(one, expected.state_dict()[name]), name
    kept = by_name(expected, its_optimizer)
    for name, tensors in whole(by_name(model, optimizer)).items():
        assert all(torch.equal(kept[name][key], one) for key, one in tensors.items()), name


def test_a_pipeline_of_fsdp_stages_trains_on_as_a_model_that_was_never_split(tmp_path: Path) -> None:
    run_ranks(_train_and_save, 4, tmp_path)
    for world_size, shape in ((4, (2, 2, 1)), (2, (1, 2, 1)), (2, (2, 1, 1)), (1, (1, 1, 1))):
        run_ranks(_load_and_train, world_size, tmp_path / "a.pt", shape)


def placed(mesh: DeviceMesh, placements: Sequence[Any], seed: int = 0) -> nn.Module:
    model = nn.Module()
    values = torch.randn(61, 30, generator=torch.Generator().manual_seed(seed))
    model.weight = nn.Parameter(distribute_tensor(values, mesh, placements))
    return model


@run_distributed(world_size=4)
def test_a_name_on_several_meshes_is_compared_and_saved_once(tmp_path: Path) -> None:
    mesh = mesh_of((2, 1, 2))
    part = mesh["stages"]  # ranks 0 and 2, ranks 1 and 3
    for placements in ([Shard(0)], [Shard(1)], [Replicate()]):
        model = placed(part, placements)
        weight: Any = model.weight
        path = distckpt.save({"model": StageState(model)}, tmp_path / "a.pt")
        job.barrier()
        verify(path)
        assert torch.equal(torch.load(path, weights_only=True)["weight"], weight.full_tensor())
        with torch.no_grad():
            weight.to_local()[-1, -1] += job.rank() == 3
        error = raised(lambda model=model: distckpt.save({"model": StageState(model)}, tmp_path / "a.pt"))  # type: ignore[misc]  # a default of a lambda
        assert isinstance(error, ShardedStateError)
        first = 0 if placements == [Replicate()] else 2
        assert f"a module: 'weight' is on rank {first} and on rank 3, with other values" in str(error)
        assert all_equal(gather(str(error)))
        verify(path)
        job.barrier()


@run_distributed(world_size=2)
def test_tensors_that_only_one_rank_ties_are_saved_apart(tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Module()
    model.first, model.second, model.third = (placed(mesh, [Shard(0)], seed).weight for seed in (1, 2, 1))
    model.third = model.first
    if job.rank() == 0:
        model.second = model.first
    path = distckpt.save({"model": StageState(model)}, tmp_path / "a.pt")
    job.barrier()
    found = torch.load(path, weights_only=True)
    for name, one in model.state_dict().items():
        assert torch.equal(found[name].chunk(2)[job.rank()], one.to_local()), name
    assert found["third"].data_ptr() == found["first"].data_ptr()


REFUSED = {
    "partial": "its ranks hold summands",
    "absent": "a module: 'weight' is a DTensor over the ranks [0, 1], but rank 1 does not have it",
    "placements": "a module: 'weight' is on rank 0 and on rank 1, with another form or value",
    "meta": "a module, 'weight': a tensor on the meta device",
}


@pytest.mark.parametrize("kind", REFUSED)
@run_distributed(world_size=2)
def test_sharded_stages_that_do_not_fit_together_are_refused_on_all_ranks(tmp_path: Path, kind: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    placement = Partial() if kind == "partial" else Shard(1 if kind == "placements" and job.rank() else 0)
    model = nn.Module()
    model.weight = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [placement], run_check=False))
    if kind == "absent" and job.rank():
        model = nn.Linear(2, 2, bias=False)
        model.register_parameter("other", model._parameters.pop("weight"))
    if kind == "meta" and job.rank():
        model = nn.Linear(2, 2, device="meta")
    check_refused(lambda: StageState(model), tmp_path, REFUSED[kind])


class Interleaved:
    """The stages of a rank in an interleaved schedule: every n-th layer."""

    def __init__(self, *, one_optimizer: bool) -> None:
        rank, world_size = job.rank(), job.world_size()
        self.stages = [Stage([number]) for number in range(rank, LAYERS, world_size)]
        groups = [groups_of(stage) for stage in self.stages]
        if one_optimizer:
            joined = [
                {**pair[0], "params": list(itertools.chain.from_iterable(group["params"] for group in pair))}
                for pair in zip(*groups, strict=True)
            ]
            groups = [joined]
        self.optimizers = [torch.optim.AdamW(group, lr=0.01) for group in groups]

    def take_trained(self, steps: int) -> None:
        """Take the state of a model that was trained without a pipeline."""
        model, optimizer = alone(steps)
        kept = by_name(model, optimizer)
        for stage, its_optimizer in zip(self.stages, self.optimizers * len(self.stages), strict=False):
            stage.load_state_dict({name: model.state_dict()[name] for name in stage.state_dict()})
            for name, parameter in stage.named_parameters():
                its_optimizer.state[parameter] = {key: one.clone() for key, one in kept[name].items()}

    def objects(self) -> dict[str, Any]:
        optimizer = self.optimizers if len(self.optimizers) > 1 else self.optimizers[0]
        return {"model": StageState(self.stages), "optimizer": StageState(optimizer, self.stages)}

    def check(self, steps: int) -> None:
        for stage, optimizer in zip(self.stages, self.optimizers * len(self.stages), strict=False):
            names = dict(stage.named_parameters())
            assert all(parameter in optimizer.state for parameter in names.values())
            check_trained(stage, _Only(optimizer, stage), steps)  # type: ignore[arg-type]  # a part of an optimizer


class _Only:
    """The states of an optimizer that belong to one of its modules."""

    def __init__(self, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
        self.state = {one: optimizer.state[one] for one in module.parameters()}


def _save_interleaved(path: Path, one_optimizer: bool) -> None:  # noqa: FBT001 - run_ranks passes it by place
    mine = Interleaved(one_optimizer=one_optimizer)
    mine.take_trained(2)
    distckpt.save(mine.objects(), path)
    job.barrier()
    check_file(path, 2)


def _load_interleaved(path: Path, one_optimizer: bool) -> None:  # noqa: FBT001 - as above
    mine = Interleaved(one_optimizer=one_optimizer)
    assert not distckpt.load(mine.objects(), path)
    mine.check(2)


@pytest.mark.parametrize("one_optimizer", [True, False], ids=["one optimizer", "an optimizer for each stage"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_rank_may_have_several_stages(tmp_path: Path, world_size: int, *, one_optimizer: bool) -> None:
    path = tmp_path / "a.pt"
    run_ranks(_save_interleaved, world_size, path, one_optimizer)
    for other in {world_size, world_size % 3 + 1}:
        for is_one in (True, False):
            run_ranks(_load_interleaved, other, path, is_one)
    run_ranks(_load_and_train, 1, path, (1, 1, 1))


@run_distributed(world_size=2)
def test_stages_of_one_rank_share_a_name_only_if_their_values_are_equal(tmp_path: Path) -> None:
    stages = [Stage([job.rank()]), Stage([2 + job.rank()])]
    for stage in stages:
        stage.register_parameter("tied", nn.Parameter(torch.full((3,), 7.0)))
    distckpt.save({"model": StageState(stages)}, tmp_path / "a.pt")
    job.barrier()
    assert torch.load(tmp_path / "a.pt", weights_only=True)["tied"].eq(7).all()
    with torch.no_grad():
        dict(stages[1].named_parameters())["tied"].add_(job.rank())
    error = raised(lambda: distckpt.save({"model": StageState(stages)}, tmp_path / "a.pt"))
    assert isinstance(error, ShardedStateError)
    assert "a module: 'tied' is on rank 0 and on rank 1, with other values" in str(error)
    if job.rank():
        with pytest.raises(ValueError, match="two tensors of this rank are called 'tied', with different values"):
            StageState(stages).state_dict()


def test_lists_of_other_things_are_refused() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match="Argument stage should hold at least one module or optimizer"):
        StageState([])
    with pytest.raises(TypeError, match=r"Argument stage should be .*, an Optimizer, or a list of one"):
        StageState([model, optimizer])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Argument module should be .* of an optimizer, or a list"):
        StageState(optimizer, [optimizer])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="parameter 0 of group 0 of the SGD is not in the module"):
        StageState([optimizer], [nn.Linear(1, 1)])


@run_distributed(world_size=2)
def test_an_optimizer_is_saved_after_a_forward_pass_alone(tmp_path: Path) -> None:
    """FSDP2 keeps the root's parameters gathered then: others than the optimizer's stand in the module."""
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 30))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 30)).sum().backward()
    optimizer.step()
    objects = {"optimizer": StageState(optimizer, model)}
    with torch.no_grad():
        model(torch.ones(2, 30))
    path = distckpt.save(objects, tmp_path / "a.pt")
    job.barrier()
    with torch.no_grad():
        model(torch.ones(2, 30))
    objects = {"optimizer": StageState(optimizer, model)}
    assert not distckpt.load(objects, path)
    state = torch.load(path, weights_only=True)["state"]
    for name, kept in whole(by_name(model, optimizer)).items():
        assert all(torch.equal(state[name][key], one) for key, one in kept.items())


@run_distributed(world_size=2)
def test_an_optimizer_of_an_fsdp1_module_is_refused(tmp_path: Path) -> None:
    module = FullyShardedDataParallel(nn.Linear(4, 4), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = torch.optim.AdamW(module.parameters())
    error = raised(lambda: distckpt.save({"optimizer": StageState(optimizer, module)}, tmp_path / "a.pt"))
    assert isinstance(error, ShardedStateError)
    assert "StageState, an optimizer: its parameter 0 of group 0 is a parameter that FullyShardedData" in str(error)
    assert files_in(tmp_path) == []


@run_distributed(world_size=2)
def test_replicas_are_compared_and_buffers_are_those_of_the_lowest_rank(tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))

    def replicated(value: float) -> DTensor:
        return DTensor.from_local(torch.full((400,), value), mesh, [Replicate()], run_check=False)

    model = nn.Module()
    norm: Any = nn.BatchNorm1d(3)
    model.shared = model.alias = norm
    norm.running_mean.fill_(job.rank())
    for number in range(3):
        model.register_buffer(f"buffer{number}", replicated(job.rank()))
    values = torch.full((2,), 1 - 2j)
    model.register_buffer("complex", values)
    model.register_buffer("conjugate", values.conj())
    path = distckpt.save({"model": StageState(model)}, tmp_path / "a.pt")
    job.barrier()
    state = torch.load(path, weights_only=True)
    names = ("shared.running_mean", "alias.running_mean", "buffer0", "buffer1", "buffer2")
    assert all(state[name].eq(0).all() for name in names)
    assert state["complex"].eq(1 - 2j).all()
    assert state["conjugate"].eq(1 + 2j).all()
    job.barrier()
    model.weight = nn.Parameter(replicated(float(job.rank())))
    error = raised(lambda: distckpt.save({"model": StageState(model)}, tmp_path / "b.pt"))
    assert "a module: 'weight' is on rank 0 and on rank 1, with other values" in str(error)
    mixed = nn.Module()
    mixed.register_parameter("mixed", nn.Parameter(torch.full((2,), float(job.rank()))))
    if job.rank():
        mixed = nn.Module()
        mixed.register_buffer("mixed", torch.ones(2))
    error = raised(lambda: distckpt.save({"model": StageState(mixed)}, tmp_path / "b.pt"))
    assert "a module: 'mixed' is on rank 0 and on rank 1, with other values" in str(error)
