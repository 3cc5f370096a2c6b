"""The data and the network: scikit-learn's handwritten digits and a small convolutional classifier.

Owns what is learned and from which samples, each rank's share of them included. Must not know about
engines, handlers or launchers: ranks are two plain numbers here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

NUM_CLASSES = 10
NUM_VALIDATION = 360
# The split is the same in every run, whatever its seed: accuracies of different runs can be compared.
SPLIT_SEED = 1797


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Images and what they show.

    Attributes:
        images: float32 (N, 1, 8, 8), in [0, 1].
        labels: int64 (N,).
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.labels)

    def take(self, index: Tensor | slice) -> "Samples":
        """Return the samples at `index`."""
        return Samples(images=self.images[index], labels=self.labels[index])


def load(device: torch.device) -> tuple[Samples, Samples]:
    """Return the training and the validation samples (1437 and 360), in `device`'s memory."""
    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1).div(16.0)
    labels = torch.as_tensor(digits.target, dtype=torch.int64)
    everything = Samples(images=images.to(device), labels=labels.to(device))
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(SPLIT_SEED)).to(device)
    return everything.take(order[NUM_VALIDATION:]), everything.take(order[:NUM_VALIDATION])


class TrainBatches:
    """One rank's share of each batch, in an order that depends on seed and epoch alone.

    The batch size is that of the whole job: with more ranks each takes fewer samples of the same batches,
    so a run may go on with another number of ranks and still see the same data in the same order.

    Args:
        samples: all training samples.
        batch_size: samples of one step over all ranks; an epoch's last, incomplete batch is dropped.
        seed: with the epoch, it fixes the order.
        rank: whose share.
        world_size: among how many ranks.

    Raises:
        ValueError: the ranks could not take equal shares, or there is not one whole batch.
    """

    def __init__(self, samples: Samples, *, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        if batch_size < 1 or batch_size % world_size:
            given = f"but given {batch_size}"
            raise ValueError(f"batch_size should be a positive multiple of world_size ({world_size}), {given}")
        if batch_size > len(samples):
            raise ValueError(f"batch_size should be at most {len(samples)}, all samples, but given {batch_size}")
        self._samples = samples
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass, before its first batch is drawn."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Return the number of steps in an epoch."""
        return len(self._samples) // self._batch_size

    def __iter__(self) -> Iterator[Samples]:
        """Yield this rank's share of each batch of the chosen epoch."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(len(self._samples), generator=generator)
        for step in range(len(self)):
            batch = order[step * self._batch_size : (step + 1) * self._batch_size]
            yield self._samples.take(batch[self._rank :: self._world_size].to(self._samples.labels.device))


class Net(nn.Module):
    """Two convolutions and a linear layer: 10,218 parameters.

    Example:
        >>> Net()(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
        )
        self.classify = nn.Linear(32 * 4 * 4, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores of each class: float32 (N, 10)."""
        scores: Tensor = self.classify(self.features(images))
        return scores
