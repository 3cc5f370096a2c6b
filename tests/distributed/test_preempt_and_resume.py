"""A run that gets SIGTERM and resumes ends bit-equal to an uninterrupted run.

Everything is real: processes of their own, DistributedDataParallel on Gloo, a signal of the operating system's.
"""

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from distckpt import Checkpoint, DiskSaver, Preemption, RngState, global_step_from_engine, resume, stop_reason
from tests.support import run_ranks
from tests.support.equality import equal
from tests.support.limits import PROGRAM_LIMIT_S
from tests.support.selection import only_on, quick

MAX_EPOCHS = 3
EPOCH_LENGTH = 8
LAST = MAX_EPOCHS * EPOCH_LENGTH

pytestmark = [
    pytest.mark.slow,
    only_on("gloo", why="DistributedDataParallel keeps BatchNorm's buffers, which are saved once, alike on all ranks"),
]


class Noisy(TensorDataset):
    """Data with noise that each rank draws from its own generators, as augmentations do."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        """Return a sample and its target."""
        sample, target = (tensor[index] for tensor in self.tensors)
        return sample + 0.1 * torch.randn_like(sample) + 0.1 * random.random(), target


class Training:
    """The program, the same for an interrupted, a resumed and an uninterrupted run."""

    def __init__(self, folder: Path, data: str) -> None:
        rank = dist.get_rank()
        torch.manual_seed(1)
        network = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))
        self.model = DistributedDataParallel(network)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=0.05, total_steps=LAST)
        torch.manual_seed(100 + rank)
        random.seed(100 + rank)
        self.loader, self.sampler = loader_of(data)
        self.losses: list[float] = []
        self.trainer = Engine(self._step)
        self.objects = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "trainer": self.trainer,
            "rng": RngState(self.trainer),
        }
        self.checkpoint = Checkpoint(
            self.objects,
            DiskSaver(folder, require_empty=False),
            n_saved=2,
            global_step_transform=global_step_from_engine(self.trainer),
        )
        self.trainer.add_event_handler(Events.EPOCH_STARTED, self._begin_epoch)
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self._end_step)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self.checkpoint)
        self.preemption = Preemption(self.trainer, self.checkpoint)

    def _begin_epoch(self) -> None:
        if self.sampler is not None:
            self.sampler.set_epoch(self.trainer.state.epoch)

    def _end_epoch(self) -> None:
        self.optimizer.param_groups[0]["weight_decay"] *= 0.5  # each epoch has to end once, also an interrupted one

    def _end_step(self) -> None:
        self.scheduler.step()

    def _step(self, _engine: Engine, batch: list[torch.Tensor]) -> float:
        sample, target = batch
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(sample), target)
        loss.backward()  # type: ignore[no-untyped-call]  # torch has not typed it
        self.optimizer.step()
        self.losses.append(loss.item())
        return loss.item()

    def state(self) -> dict[str, Any]:
        """Return everything that a run leaves behind on this rank, but for the order of its files."""
        return {
            "model": self.model.module.state_dict(),  # parameters and BatchNorm's buffers
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {key: value for key, value in self.scheduler.state_dict().items() if not callable(value)},
            "trainer": dict(self.trainer.state_dict()),
            "next": [random.random(), *torch.rand(3).tolist()],
        }


def loader_of(data: str) -> tuple[Any, Any]:
    """Return batches of this rank's own: by a sampler shuffled by epoch, by torch's generator, or made by workers."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    own = torch.Generator().manual_seed(5)
    num_samples = 4 * EPOCH_LENGTH * world_size
    dataset = Noisy(torch.randn(num_samples, 4, generator=own), torch.randint(2, (num_samples,), generator=own))
    if data == "shuffled by torch":
        share = torch.utils.data.Subset(dataset, range(rank, num_samples, world_size))
        return DataLoader(share, batch_size=4, shuffle=True), None
    sampler: Any = DistributedSampler(dataset, shuffle=True, seed=3)
    num_workers = 1 if data == "by workers" else 0
    return DataLoader(dataset, batch_size=4, sampler=sampler, num_workers=num_workers), sampler


def train(folder: Path, data: str, when: str, step: int) -> dict[str, Any]:
    """Train from where the last process was; the last rank is sent SIGTERM in one moment of one iteration."""
    training = Training(folder, data)

    def kill_me() -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    found = resume(training.objects, training.checkpoint, engine=training.trainer, timeout_s=PROGRAM_LIMIT_S)
    if when == "step":
        training.trainer.add_event_handler(Events.ITERATION_STARTED(once=step), kill_me)
    elif when == "end of epoch":
        training.trainer.add_event_handler(Events.EPOCH_COMPLETED(once=step // EPOCH_LENGTH), kill_me)
    training.trainer.run(training.loader, max_epochs=MAX_EPOCHS)
    training.preemption.close()
    return {
        "resumed from": None if found is None else found.name,
        "reason": stop_reason(training.trainer),
        "iteration": training.trainer.state.iteration,
        "losses": training.losses,
        "files": sorted(os.listdir(folder)),
        "state": training.state(),
    }


def run(folder: Path, data: str, when: str, step: int) -> list[dict[str, Any]]:
    """Train on two ranks: in processes of their own where they are sent a signal, or start others."""
    is_fresh = when != "never" or data == "by workers"
    ends = run_ranks(train, 2, folder, data, when, step, fresh=is_fresh)
    for name in ("resumed from", "reason", "iteration"):
        assert len({str(end[name]) for end in ends}) == 1, f"{name} is the same on every rank"
    return ends


def run_with(interruptions: list[tuple[str, int]], folder: Path, data: str) -> list[dict[str, Any]]:
    """Train with interruptions; check each of them; return the end, with the losses of all parts."""
    losses: list[list[float]] = [[], []]
    resumed_from, ends = None, list[dict[str, Any]]()
    for when, step in [*interruptions, ("never", LAST)]:
        ends = run(folder, data, when, step)
        assert ends[0]["resumed from"] == resumed_from
        assert ends[0]["iteration"] == step
        assert ends[0]["reason"] == ("preempted" if when != "never" else None)
        resumed_from = f"checkpoint_{-(-step // EPOCH_LENGTH)}.pt"
        assert resumed_from in ends[0]["files"]
        for rank, end in enumerate(ends):
            losses[rank] += end["losses"]
    return [{**end, "losses": losses[rank]} for rank, end in enumerate(ends)]


_ALONE: dict[str, list[dict[str, Any]]] = {}


@pytest.fixture
def alone(data: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what the ranks come to that nobody interrupts."""
    if data not in _ALONE:
        _ALONE[data] = run(tmp_path_factory.mktemp("alone"), data, "never", LAST)
    return _ALONE[data]


MIDDLE, END = ("step", 13), ("end of epoch", 8)


@quick(3)
@pytest.mark.parametrize(
    ("data", "interruptions"),
    [
        ("by epoch", [MIDDLE]),
        ("by epoch", [("step", 11), ("step", 14), ("step", 16)]),
        ("by epoch", [END]),
        ("shuffled by torch", [MIDDLE, ("step", 15)]),
        ("by workers", [MIDDLE]),
    ],
    ids=[
        "in the middle of an epoch",
        "twice in one epoch and in its last step",
        "at the end of an epoch",
        "twice in an order that torch's generator drew",
        "with workers",
    ],
)
def test_a_preempted_and_resumed_run_ends_bit_equal_to_an_uninterrupted_one(
    tmp_path: Path, alone: list[dict[str, Any]], data: str, interruptions: list[tuple[str, int]]
) -> None:
    ends = run_with(interruptions, tmp_path, data)
    for end, other in zip(ends, alone, strict=True):
        assert end["losses"] == other["losses"]
        for name, state in end["state"].items():
            assert equal(state, other["state"][name]), name
        assert end["files"] == other["files"]


@pytest.mark.parametrize("data", ["by epoch"])
def test_the_comparison_finds_a_run_that_restarts_its_epoch(
    tmp_path: Path, alone: list[dict[str, Any]], data: str
) -> None:
    """Negative control: the same harness, with ignite's own way of resuming."""
    run(tmp_path / "killed", data, *MIDDLE)
    ends = run_ranks(train_as_ignite_does, 2, tmp_path / "killed")
    for end, other in zip(ends, alone, strict=True):
        assert end["iteration"] == other["iteration"]
        assert not equal(end["state"]["model"], other["state"]["model"])


def train_as_ignite_does(folder: Path) -> dict[str, Any]:
    """Load the newest checkpoint and run on."""
    training = Training(folder, "by epoch")
    training.preemption.close()
    Checkpoint.load_objects(training.objects, folder / "checkpoint_2.pt")
    training.trainer.run(training.loader, max_epochs=MAX_EPOCHS)
    return {"iteration": training.trainer.state.iteration, "state": training.state()}
