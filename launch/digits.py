"""The data and the network: scikit-learn's handwritten digits and a small convolutional classifier.

It imports neither distckpt nor torch.distributed: a plain script can use it too.
"""

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
        numbers: int64 (N,), which samples of the data set they are.
    """

    images: Tensor
    labels: Tensor
    numbers: Tensor

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.labels)

    def take(self, index: Tensor | slice) -> "Samples":
        """Return the samples at `index`."""
        return Samples(images=self.images[index], labels=self.labels[index], numbers=self.numbers[index])


def load(device: torch.device) -> tuple[Samples, Samples]:
    """Return the training and the validation samples (1437 and 360), in `device`'s memory."""
    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1).div(16.0)
    labels = torch.as_tensor(digits.target, dtype=torch.int64)
    numbers = torch.arange(len(labels)).to(device)
    everything = Samples(images=images.to(device), labels=labels.to(device), numbers=numbers)
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(SPLIT_SEED)).to(device)
    return everything.take(order[NUM_VALIDATION:]), everything.take(order[:NUM_VALIDATION])


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
