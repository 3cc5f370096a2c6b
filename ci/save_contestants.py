"""What bench_save measures: the state that is saved, and the contestants that save and load it.

Owns how each one is called, as its own documentation says. Must not know what is measured of it.
"""

import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Final

import ignite.handlers
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ignite.engine import Engine
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import distckpt

__all__ = ["CONTESTANTS", "MIB", "Contestant", "Objects"]

MIB: Final = 1 << 20
NUM_LAYERS: Final = 12
FLOATS_PER_PARAMETER: Final = 3  # the parameter and AdamW's two moments


class Objects:
    """A model of some 150 parameters and its optimizer with states, alike on every rank."""

    def __init__(self, num_mib: int) -> None:
        torch.manual_seed(1)
        per_layer = num_mib * MIB / 4 / FLOATS_PER_PARAMETER / NUM_LAYERS
        width = max(int((per_layer / 12) ** 0.5) // 8 * 8, 8)
        self.model = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, dim_feedforward=4 * width) for _ in range(NUM_LAYERS)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> list[torch.Tensor]:
        """Return all tensors that are saved."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*(parameter.detach() for parameter in self.model.parameters()), *states]

    def to_save(self) -> dict[str, Any]:
        """Return what a checkpoint handler is given."""
        return {"model": self.model, "optimizer": self.optimizer}

    def spoil(self) -> None:
        """Let nothing be what it was, so that a load has something to bring back."""
        with torch.no_grad():
            for tensor in self.tensors():
                tensor.fill_(-1.0)


class Contestant(ABC):
    """One way to save and load. All methods are called on all ranks."""

    name: str
    syncs = False
    """Whether what it wrote is synced when :meth:`save` returns."""

    def __init__(self, objects: Objects, folder: Path) -> None:
        self.objects = objects
        self.folder = folder / self.name.replace(" ", "_")
        if dist.get_rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        dist.barrier()

    @abstractmethod
    def save(self, step: int) -> None:
        """Save, over or beside the checkpoint before."""

    @abstractmethod
    def load(self) -> None:
        """Load the last one into the objects."""


class Ours(Contestant):
    """distckpt's Checkpoint and DiskSaver."""

    name = "distckpt"
    syncs = True

    def __init__(self, objects: Objects, folder: Path) -> None:
        super().__init__(objects, folder)
        saver = distckpt.DiskSaver(self.folder, require_empty=False)
        self.handler: Any = distckpt.Checkpoint(objects.to_save(), saver)
        self.engine = Engine(lambda _engine, _batch: None)

    def save(self, step: int) -> None:
        """Fire the handler."""
        self.engine.state.iteration = step
        self.handler(self.engine)

    def load(self) -> None:
        """Verified, into the live objects."""
        distckpt.Checkpoint.load_objects(self.objects.to_save(), self.handler.last_checkpoint)


class Ignites(Contestant):
    """ignite's Checkpoint and DiskSaver."""

    name = "ignite Checkpoint"

    def __init__(self, objects: Objects, folder: Path) -> None:
        super().__init__(objects, folder)
        saver = ignite.handlers.DiskSaver(str(self.folder), require_empty=False)
        self.handler: Any = ignite.handlers.Checkpoint(objects.to_save(), saver)
        self.engine = Engine(lambda _engine, _batch: None)

    def save(self, step: int) -> None:
        """Fire the handler; the other ranks wait, as they do in training at the next reduction."""
        self.engine.state.iteration = step
        self.handler(self.engine)
        dist.barrier()

    def load(self) -> None:
        """As its documentation says."""
        path = self.folder / Path(self.handler.last_checkpoint).name
        ignite.handlers.Checkpoint.load_objects(self.objects.to_save(), str(path))


class TorchSave(Contestant):
    """torch.save by rank 0."""

    name = "torch.save"

    def save(self, step: int) -> None:
        """Write on rank 0, while the others wait."""
        del step
        if dist.get_rank() == 0:
            states = {name: obj.state_dict() for name, obj in self.objects.to_save().items()}
            torch.save(states, self.folder / "a.pt")
        dist.barrier()

    def load(self) -> None:
        """Read by torch.load on every rank."""
        states = torch.load(self.folder / "a.pt", map_location="cpu", weights_only=True)
        for name, obj in self.objects.to_save().items():
            obj.load_state_dict(states[name])


class TorchDistributed(Contestant):
    """torch.distributed.checkpoint.save."""

    name = "DCP save"

    def _states(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.objects.model, self.objects.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self, step: int) -> None:
        """Let it deduplicate and write on all ranks."""
        del step
        dcp.save(self._states(), checkpoint_id=self.folder)

    def load(self) -> None:
        """Load in place."""
        states = self._states()
        dcp.load(states, checkpoint_id=self.folder)
        model, optimizer = states["model"], states["optimizer"]
        set_state_dict(self.objects.model, self.objects.optimizer, model_state_dict=model, optim_state_dict=optimizer)


CONTESTANTS: Final[tuple[type[Contestant], ...]] = (Ours, TorchSave, Ignites, TorchDistributed)
