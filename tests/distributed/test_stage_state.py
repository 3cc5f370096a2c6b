"""Stages of a pipeline, saved by name as one plain file and loaded after any other split."""

import copy
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import nn

import distckpt
from distckpt import Checkpoint, DiskSaver, ShardedStateError, StageState, StateMismatchError, resume
from distckpt.ptformat.reader import verify
from tests.distributed.programs import all_equal, gather, raised
from tests.distributed.test_collectives import counted_collectives, counts
from tests.distributed.test_different_objects import Keeping, files_in
from tests.support import RankFailedError, job, run_distributed, run_ranks

pytestmark = pytest.mark.only_on("gloo", why="stages send over Gloo")
LAYERS = 5
WIDTH = 40


class Stage(nn.Module):
    """Some layers of the model, under their names in the whole model."""

    def __init__(self, numbers: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for number in numbers:
            torch.manual_seed(number)
            # Layer 2 is larger than what the ranks exchange in one message.
            self.layers[str(number)] = nn.Sequential(
                nn.Linear(WIDTH, WIDTH * (20 if number == 2 else 1)),
                nn.Tanh(),
                nn.Linear(WIDTH * (20 if number == 2 else 1), WIDTH),
            )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            inputs = layer(inputs)
        return inputs


def layers_of(rank: int, world_size: int) -> list[int]:
    return [number for number in range(LAYERS) if number * world_size // LAYERS == rank]


def build(numbers: Sequence[int] | None = None, *, named: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Stage(layers_of(job.rank(), job.world_size()) if numbers is None else numbers)
    weights = [(name, one) for name, one in model.named_parameters() if name.endswith("weight")]
    others = [(name, one) for name, one in model.named_parameters() if not name.endswith("weight")]
    groups: Any = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    if not named:
        groups = [{**group, "params": [one for _, one in group["params"]]} for group in groups]
    return model, torch.optim.AdamW(groups, lr=0.01)


def wrapped(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": StageState(model), "optimizer": StageState(optimizer, model)}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """Take one step of the pipeline: activations go up the ranks, gradients down."""
    optimizer.zero_grad()
    rank, last = job.rank(), job.world_size() - 1
    inputs = torch.linspace(-1, 1, 8 * WIDTH).reshape(8, WIDTH) * (number + 1)
    if rank > 0:
        dist.recv(inputs, rank - 1)
        inputs.requires_grad_()
    outputs = model(inputs)
    if rank == last:
        outputs.square().mean().backward()
    else:
        dist.send(outputs.detach(), rank + 1)
        gradient = torch.empty_like(outputs)
        dist.recv(gradient, rank + 1)
        outputs.backward(gradient)
    if rank > 0:
        assert inputs.grad is not None
        dist.send(inputs.grad, rank - 1)
    optimizer.step()


def alone(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train the whole model in this process, without a pipeline and without distckpt."""
    model, optimizer = build(range(LAYERS))
    for number in range(steps):
        optimizer.zero_grad()
        inputs = torch.linspace(-1, 1, 8 * WIDTH).reshape(8, WIDTH) * (number + 1)
        model(inputs).square().mean().backward()
        optimizer.step()
    return model, optimizer


def by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    names = {id(one): name for name, one in model.named_parameters()}
    return {names[id(one)]: kept for one, kept in optimizer.state.items()}


def check_file(path: Path, steps: int) -> None:
    """Compare a file with the state of a model that was never split."""
    verify(path)
    state = torch.load(path, weights_only=True)
    model, optimizer = alone(steps)
    expected = model.state_dict()
    assert state["model"].keys() == expected.keys()
    for name, one in expected.items():
        assert type(state["model"][name]) is torch.Tensor
        assert torch.equal(state["model"][name], one), name
    kept = by_name(model, optimizer)
    assert state["optimizer"]["state"].keys() == kept.keys()
    for name, tensors in kept.items():
        assert all(torch.equal(state["optimizer"]["state"][name][key], one) for key, one in tensors.items()), name
    groups = state["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert sorted(groups[0]["params"] + groups[1]["params"]) == sorted(expected)
    plain = Stage(range(LAYERS))
    plain.load_state_dict(state["model"])


def check_trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    whole, its_optimizer = alone(steps)
    expected, kept = whole.state_dict(), by_name(whole, its_optimizer)
    for name, one in model.state_dict().items():
        assert torch.equal(one, expected[name]), name
    for name, tensors in by_name(model, optimizer).items():
        assert all(torch.equal(kept[name][key], one) for key, one in tensors.items()), name


def saving(how: str, folder: Path) -> Callable[[Mapping[str, Any], int], Path]:
    def by_function(objects: Mapping[str, Any], number: int) -> Path:
        path = folder / f"{number}.pt"
        if how == "save":
            return distckpt.save(objects, path, step=number)
        return distckpt.async_save(objects, path, step=number).result()

    return by_function


def train_and_save(folder: Path, how: str, steps: int) -> None:
    model, optimizer = build(named=how == "async_save")
    save = saving(how, folder)
    objects = wrapped(model, optimizer)
    if how == "async_save":
        objects["optimizer"] = StageState(optimizer)
    for number in range(steps):
        step(model, optimizer, number)
        save(objects, number)
    job.barrier()
    check_file(folder / f"{steps - 1}.pt", steps)


def load_and_train(path: Path, before: int, steps: int) -> None:
    model, optimizer = build()
    report = distckpt.load(wrapped(model, optimizer), path)
    assert not report
    check_trained(model, optimizer, before)
    for number in range(before, before + steps):
        step(model, optimizer, number)
    check_trained(model, optimizer, before + steps)


@pytest.mark.parametrize("how", ["save", "async_save"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_pipeline_goes_on_after_any_other_split(tmp_path: Path, world_size: int, how: str) -> None:
    run_ranks(train_and_save, world_size, tmp_path, how, 2)
    for other in {1, 2, world_size % 4 + 1} - {world_size if world_size > 2 else 0}:
        run_ranks(load_and_train, other, tmp_path / "1.pt", 2, 2)


def train_with_handler(folder: Path, total: int, *, background: bool) -> int:
    """Train until a number of iterations, from the newest checkpoint; return the iteration at the start."""
    model, optimizer = build()
    trainer = Engine(lambda engine, _: step(model, optimizer, engine.state.iteration - 1))
    to_save = {**wrapped(model, optimizer), "trainer": trainer}
    saver = DiskSaver(folder, background=background, require_empty=False)
    handler = Checkpoint(to_save, saver, n_saved=2)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    resume(to_save, handler, engine=trainer)
    begun = trainer.state.iteration
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=total), trainer.terminate)
    trainer.run([0] * 6, max_epochs=1)
    handler.wait_until_finished()
    check_trained(model, optimizer, total)
    return begun


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_a_run_resumes_on_other_numbers_of_ranks(tmp_path: Path, *, background: bool) -> None:
    for world_size, total in ((2, 2), (3, 3), (2, 5)):
        begun = run_ranks(_train_with, world_size, tmp_path, total, background)
        assert begun == [{2: 0, 3: 2, 5: 3}[total]] * world_size


def _die_in_training(folder: Path) -> None:
    model, optimizer = build()
    for number in range(3):
        step(model, optimizer, number)
        distckpt.async_save(wrapped(model, optimizer), folder / f"{number}.pt", step=number).result()
        job.barrier()
    distckpt.async_save(wrapped(model, optimizer), folder / "3.pt")
    os.kill(os.getpid(), signal.SIGKILL)


def _load_latest(folder: Path) -> None:
    path = distckpt.latest(folder)
    assert path is not None
    assert path.name in ("2.pt", "3.pt")
    load_and_train(path, 3, 2)


def test_a_killed_pipeline_goes_on_bit_equal(tmp_path: Path) -> None:
    with pytest.raises(RankFailedError):
        run_ranks(_die_in_training, 2, tmp_path, fresh=True)
    run_ranks(_load_latest, 2, tmp_path)


def _train_with(folder: Path, total: int, background: bool) -> int:  # noqa: FBT001 - run_ranks passes it by place
    return train_with_handler(folder, total, background=background)


@run_distributed(world_size=4)
def test_stages_with_replicas_and_tied_tensors_are_saved_once(tmp_path: Path) -> None:
    """Two stages on two ranks each; the first and the last one share an embedding, and each has a tie of its own."""
    stage = job.rank() // 2
    model = nn.Module()
    model.embedding = nn.Embedding(70, 300)
    model.embedding.weight.data.copy_(torch.arange(21_000.0).reshape(70, 300))
    own = nn.Module()
    own.first, own.second = nn.Linear(3, 3), nn.Linear(3, 3)
    own.second.weight = own.first.weight
    for parameter in own.parameters():
        parameter.data.fill_(float(stage))
    own.register_buffer("seen", torch.tensor(float(job.rank())))
    model.add_module(f"stage{stage}", own)
    path = distckpt.save({"model": StageState(model)}, tmp_path / "a.pt")
    job.barrier()
    verify(path)
    state = torch.load(path, weights_only=True)
    assert torch.equal(state["embedding.weight"], model.embedding.weight)
    for number in (0, 1):
        assert state[f"stage{number}.first.weight"].eq(number).all()
        assert state[f"stage{number}.seen"] == 2 * number, "the buffer of the lowest rank"
        ties = [state[f"stage{number}.{name}.weight"].data_ptr() for name in ("first", "second")]
        assert ties[0] == ties[1]
    model.embedding.weight.data[3, 3] += job.rank() == 3
    error = raised(lambda: distckpt.save({"model": StageState(model)}, tmp_path / "a.pt"))
    assert isinstance(error, ShardedStateError)
    assert "a module: 'embedding.weight' is on rank 0 and on rank 3, with other values" in str(error)
    assert all_equal(gather(str(error)))
    assert files_in(tmp_path) == ["a.pt"]
    verify(path)


def check_refused(make: Callable[[], Any], folder: Path, text: str, kind: type[Exception] = ShardedStateError) -> None:
    """Check that each way of saving what `make` returns raises one error on all ranks, and writes nothing."""
    for save in (distckpt.save, distckpt.async_save):
        error = raised(lambda save=save: save({"stage": make()}, folder / "a.pt"))  # type: ignore[misc]  # a default of a lambda
        assert text in str(error)
        assert isinstance(error, kind)
        assert all_equal(gather(str(error)))
    assert files_in(folder) == []


def _refused(kind: str) -> Any:
    rank = job.rank()
    model, optimizer = build()
    if kind == "shape":
        return StageState(nn.Linear(2, 2 + rank))
    if kind == "kind":
        return StageState(model) if rank else StageState(optimizer, model)
    if kind == "hyperparameter":
        optimizer.param_groups[1]["lr"] = 0.01 * (rank + 1)
        return StageState(optimizer, model)
    if kind == "sparse":
        model.register_buffer("sparse", torch.ones(2, 2).to_sparse() if rank else torch.ones(1))
        return StageState(model)
    assert kind == "failing"
    if rank:
        model.register_state_dict_pre_hook(_fail)  # type: ignore[no-untyped-call]  # torch ships it without types
    return StageState(model)


def _fail(*_: object) -> None:
    raise OSError("no state")


REFUSED = {
    "shape": "a module: 'weight' is on rank 0 and on rank 1, with another form or value",
    "kind": "rank 0 has an optimizer, rank 1 has a module",
    "hyperparameter": "an optimizer: param_groups[1] has lr 0.01 on rank 0 and 0.02 on rank 1",
    "sparse": "a module, 'sparse': a tensor of layout torch.sparse_coo",
    "failing": "no state",
}


@pytest.mark.parametrize("kind", REFUSED)
@run_distributed(world_size=2)
def test_stages_that_do_not_fit_together_are_refused_on_all_ranks(tmp_path: Path, kind: str) -> None:
    kind_of_error = OSError if kind == "failing" else ShardedStateError
    check_refused(lambda: _refused(kind), tmp_path, REFUSED[kind], kind_of_error)


@run_distributed(world_size=2)
def test_a_save_handler_of_the_users_is_refused(tmp_path: Path) -> None:
    model, _ = build()
    handler = Checkpoint({"model": StageState(model)}, Keeping(tmp_path))
    trainer = Engine(lambda *_: None)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
    error = raised(lambda: trainer.run([0]))
    assert isinstance(error, ShardedStateError)
    assert "to_save['model'], key 'layers.0.0.weight', is a tensor that rank 0 holds" in str(error)
    assert files_in(tmp_path) == []


@run_distributed(world_size=2)
def test_a_pipeline_loads_the_file_of_a_plain_model(tmp_path: Path) -> None:
    model, optimizer = build(range(LAYERS), named=True)
    model(torch.ones(1, WIDTH)).sum().backward()
    optimizer.step()
    path = tmp_path / f"{job.rank()}.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    stage, its_optimizer = build()
    assert not distckpt.load(wrapped(stage, its_optimizer), path)
    assert all(torch.equal(one, model.state_dict()[name]) for name, one in stage.state_dict().items())
    kept = by_name(model, optimizer)
    found = by_name(stage, its_optimizer)
    assert found.keys() == dict(stage.named_parameters()).keys()
    assert all(torch.equal(one, kept[name][key]) for name, state in found.items() for key, one in state.items())


@run_distributed(world_size=2)
def test_the_forms_of_stages_are_exchanged_once() -> None:
    model, _ = build()
    state = StageState(model)

    def collectives() -> tuple[int, int]:
        with counted_collectives() as entered:
            whole = state.distckpt_consolidate(0)
        assert len(whole) == 4 * LAYERS
        return counts(entered)

    assert [collectives() for _ in range(3)] == [(2, 2), (1, 1), (1, 1)]
    model.register_buffer("more", torch.ones(1 + job.rank()))
    model.register_buffer("other", torch.ones(1))
    error = raised(collectives)
    assert "a module: 'more' is on rank 0 and on rank 1, with another form or value" in str(error)
    model.more = torch.ones(3)
    with counted_collectives() as entered:
        assert state.distckpt_consolidate(0)["more"].shape == (3,)
    assert counts(entered) == (2, 2), "buffers' values are not compared"


class Refusing:
    """An object that takes no state."""

    def state_dict(self) -> dict[str, int]:
        return {"a": 1}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise RuntimeError(f"refused {len(state)}")


@run_distributed(world_size=2)
def test_a_load_that_fails_changes_no_stage(tmp_path: Path) -> None:
    model, optimizer = build()
    step(model, optimizer, 0)
    objects = {**wrapped(model, optimizer), "other": Refusing()}
    path = distckpt.save(objects, tmp_path / "a.pt")
    fresh, its_optimizer = build()
    before = copy.deepcopy(fresh.state_dict())
    others = {**wrapped(fresh, its_optimizer), "other": Refusing()}
    error = raised(lambda: distckpt.load(others, path))
    assert "refused 1" in str(error)
    assert all(torch.equal(one, before[name]) for name, one in fresh.state_dict().items())
    assert not its_optimizer.state

    more, its_optimizer = build([0, 7] if job.rank() else None)
    before = copy.deepcopy(more.state_dict())
    error = raised(lambda: distckpt.load(wrapped(more, its_optimizer), path))
    assert isinstance(error, StateMismatchError)
    assert 'Missing key(s) in state_dict: "layers.7.0.weight"' in str(error)
    assert "'optimizer' has no state of layers.7.0.weight" in str(error)
    assert all(torch.equal(one, before[name]) for name, one in more.state_dict().items())
    report = distckpt.load({"model": StageState(more)}, path, strict=False)
    assert ("model.layers.7.0.weight" in report.missing) == (job.rank() == 1)
    assert not torch.equal(more.state_dict()["layers.0.0.weight"], before["layers.0.0.weight"])


def test_an_optimizer_without_names_is_refused() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match="group 0 of the SGD has no names of parameters"):
        StageState(optimizer)
    with pytest.raises(ValueError, match="parameter 0 of group 0 of the SGD is not in the module"):
        StageState(optimizer, nn.Linear(1, 1))
    state = optimizer.state_dict()
    with pytest.raises(StateMismatchError, match="numbers its parameters, and its groups have no 'param_names'"):
        StageState(optimizer, model).load_state_dict(state)
    with pytest.raises(TypeError, match="Argument stage should be"):
        StageState(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Argument module should be"):
        StageState(model, model)
