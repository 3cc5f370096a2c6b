"""A job of data-parallel training in which every number is the step, so that a mixture of two steps is found.

What is known to be the same on all ranks is in it, a DDP-wrapped model's parameters and its optimizer's state, beside
what is not: a buffer, and a counter. All are changed in place by a real step of training, as a background save or
a shared one will meet them.
"""

from pathlib import Path
from typing import Any

import ignite.handlers
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import distckpt
from tests.crash.subject import KEY, numbers_in

__all__ = ["Trained", "local_of", "shard_parameters"]

# Larger than the writer's buffer, so that a save is several writes.
_LENGTHS = (400_000, 1000, 10)


class Trained:
    """The objects that one rank trains and saves.

    Args:
        step: the first step.
        is_sharded: whether each rank has a shard of the parameters instead of a replica.
    """

    def __init__(self, step: int = 0, *, is_sharded: bool = False) -> None:
        model = _Model(step)
        self._model: nn.Module = model
        if is_sharded:
            shard_parameters(model.values)
        elif dist.is_initialized():
            self._model = nn.parallel.DistributedDataParallel(model)
        self._optimizer = _Counting(model.parameters(), step)
        self._counter = _Counter(step)
        self.to_save = {"model": self._model, "optimizer": self._optimizer, KEY: self._counter}

    @property
    def step(self) -> int:
        """The number of trained steps."""
        return self._counter.step

    def advance(self) -> None:
        """Train for a step; over all ranks, if there are several."""
        self._optimizer.zero_grad()
        self._model().backward()
        self._optimizer.step()
        self._counter.step += 1

    def handler(self, save_handler: Any, kind: Any = distckpt.Checkpoint, **kwargs: Any) -> Any:
        """Return a `kind` of Checkpoint that saves all objects, keeps one, and names files by the step."""
        return kind(
            self.to_save,
            save_handler,
            n_saved=1,
            filename_pattern=KEY + "_{global_step}.{ext}",
            global_step_transform=lambda *_: self.step,
            **kwargs,
        )

    def ignite_handler(self, directory: Path) -> Any:
        """Return the same Checkpoint of ignite's."""
        saver = ignite.handlers.DiskSaver(str(directory), require_empty=False)
        return self.handler(saver, kind=ignite.handlers.Checkpoint)

    def check(self) -> None:
        """Assert that all live objects are of one step."""
        live = {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}
        assert set(numbers_in(live)) == {float(self.step)}, f"of step {self.step}: {set(numbers_in(live))}"


def shard_parameters(parameters: nn.ParameterList) -> None:
    """Replace parameters by DTensors that are sharded over all ranks. Every rank has the whole values."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for index, parameter in enumerate(parameters):
        shard = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
        parameters[index] = nn.Parameter(shard)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _Model(nn.Module):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.values = nn.ParameterList(nn.Parameter(torch.full((length,), float(step))) for length in _LENGTHS)
        self.register_buffer("seen", torch.full((1000,), float(step)))

    def forward(self) -> torch.Tensor:
        assert isinstance(self.seen, torch.Tensor)
        self.seen += 1
        return -sum((local_of(values).sum() for values in self.values), torch.zeros(()))


class _Counting(torch.optim.Optimizer):
    """Adds one to each parameter, the gradients being minus one; its state is a copy."""

    def __init__(self, parameters: Any, step: int) -> None:
        super().__init__(parameters, {})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["copy"] = torch.full_like(parameter, float(step))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad)
                self.state[parameter]["copy"].sub_(parameter.grad)


class _Counter:
    def __init__(self, step: int) -> None:
        self.step = step

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: Any) -> None:
        self.step = int(state["step"])
