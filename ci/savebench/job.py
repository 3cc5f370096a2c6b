"""The training job whose state is saved: a small GPT with AdamW under DistributedDataParallel."""

import contextlib
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ci.savebench.meeting import Meeting

NUM_LAYERS = 12
NUM_HEADS = 4
CONTEXT = 8  # tokens in a batch of one: a step takes less time than the save that is measured
BYTES_A_PARAMETER = 12  # the weight and AdamW's two moments, in float32


class Block(nn.Module):
    """A transformer block of twelve parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_before = nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_between = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the next layer's input: float32 (batch, time, width)."""
        batch, time, width = x.shape
        heads = self.attend(self.norm_before(x)).view(batch, time, 3, NUM_HEADS, width // NUM_HEADS)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).reshape(batch, time, width))
        widened = nn.functional.gelu(self.widen(self.norm_between(x)))
        narrowed: torch.Tensor = self.narrow(widened)
        return x + narrowed


class SmallGpt(nn.Module):
    """A GPT of 149 parameters."""

    def __init__(self, width: int, num_words: int) -> None:
        super().__init__()
        self.words = nn.Embedding(num_words, width)
        self.places = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(NUM_LAYERS))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_words, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits, float32 (batch, time, words), of tokens, int64 (batch, time)."""
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def shape_of(state_bytes: int) -> tuple[int, int]:
    """Return the width and the vocabulary size of a model whose state has about `state_bytes` bytes."""
    num_parameters = state_bytes // BYTES_A_PARAMETER

    def num_without_words(width: int) -> int:
        return NUM_LAYERS * (12 * width**2 + 13 * width) + (CONTEXT + 2) * width

    width = 16
    while num_without_words(width + 16) <= 0.9 * num_parameters:
        width += 16
    return width, max(64, (num_parameters - num_without_words(width)) // (2 * width))


class Job:
    """The training job on one rank.

    Args:
        meeting: exchanges values between the ranks.
        state_bytes: approximate size of the model and the optimizer's state.
        folder: folder for checkpoints.
        device: where the model is.

    Attributes:
        model: the model as the user trains it, wrapped.
        module: the model inside.
        optimizer: AdamW, whose states exist.
        num_steps: number of steps taken.
        step_guard: returns a context in which the optimizer may change the state, for contestants that still copy it.
        is_sharded: whether each rank has a shard of the state; otherwise each has all of it.
    """

    is_sharded: ClassVar[bool] = False

    def __init__(self, meeting: Meeting, state_bytes: int, folder: Path, device: torch.device) -> None:
        self.meeting = meeting
        self.rank, self.world_size = meeting.rank, meeting.world_size
        self.folder, self.device = folder, device
        torch.manual_seed(1)
        width, self._num_words = shape_of(state_bytes)
        self.module = SmallGpt(width, self._num_words).to(device)
        self.model = self.parallelize()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self._random = torch.Generator().manual_seed(self.rank)
        self.num_steps = 0
        self.step_guard: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
        for _ in range(2):  # after the first, DistributedDataParallel orders its buckets by the gradients
            self.train()

    def parallelize(self) -> nn.Module:
        """Collective. Return the model as it is trained."""
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(self.module, device_ids=devices, gradient_as_bucket_view=True)

    def step(self, *_: Any) -> float:
        """Collective. Take the step that the engine repeats; return the loss."""
        return self.train()

    def train(self) -> float:
        """Collective. Train on one batch; return the loss."""
        tokens = torch.randint(self._num_words, (1, CONTEXT + 1), generator=self._random).to(self.device)
        logits = self.model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships it without types
        with self.step_guard():
            self.optimizer.step()
        self.num_steps += 1
        return loss.item()

    def objects(self) -> dict[str, Any]:
        """Return the objects to save and load."""
        return {"model": self.module, "optimizer": self.optimizer}

    def wrapped(self) -> dict[str, Any]:
        """Return the objects as a user trains them and passes them to ignite's handlers."""
        return {"model": self.model, "optimizer": self.optimizer}

    def state(self) -> dict[str, Any]:
        """Return the state. Its tensors are the live ones."""
        return {name: thing.state_dict() for name, thing in self.objects().items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Load a state into the live objects."""
        for name, thing in self.objects().items():
            thing.load_state_dict(state[name])

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every live tensor of the state, with its name. A sharded one has the size of the whole."""
        yield from self.module.state_dict().items()
        for index, kept in self.optimizer.state_dict()["state"].items():
            for name, tensor in sorted(kept.items()):
                yield f"{index}.{name}", tensor

    def size(self) -> tuple[int, int]:
        """Return the number of tensors in the state, and their bytes."""
        sizes = [tensor.nbytes for _, tensor in self.tensors()]
        return len(sizes), sum(sizes)

    def local_tensors(self) -> Iterator[torch.Tensor]:
        """Yield what this rank holds of every tensor."""
        yield from (tensor for _, tensor in self.tensors())

    def fingerprint(self) -> int:
        """Collective. Return a checksum of the state."""
        total = 0
        for name, tensor in self.tensors():
            total = zlib.crc32(name.encode(), total)
            total = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).numpy().data, total)
        return total
