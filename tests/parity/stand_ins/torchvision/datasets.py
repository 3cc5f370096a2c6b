"""Data sets of random images, each image drawn from a seed of its own."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset

NUM_CLASSES = 10


class FakeData(Dataset[tuple[Any, int]]):
    """Images with values between 0 and 1.

    Args:
        size: how many.
        image_size: channels, height, width.
        transform: applied to each.
        seed: of the first image.
    """

    def __init__(
        self,
        size: int = 64,
        image_size: tuple[int, int, int] = (3, 32, 32),
        transform: Callable[[torch.Tensor], Any] = lambda image: image,
        *,
        seed: int = 0,
    ) -> None:
        self._size, self._image_size, self._transform, self._seed = size, image_size, transform, seed

    def __len__(self) -> int:
        """Return the number of images."""
        return self._size

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return an image and its class."""
        if not 0 <= index < self._size:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(self._seed + index)
        return self._transform(torch.rand(self._image_size, generator=generator)), index % NUM_CLASSES


class CIFAR10(FakeData):
    """Colour images of 32 x 32."""

    def __init__(self, root: Any, *, train: bool = True, download: bool = False, transform: Any) -> None:
        del root, download
        super().__init__(96 if train else 32, (3, 32, 32), transform, seed=0 if train else 10_000)


class MNIST(FakeData):
    """Grey images of 28 x 28."""

    def __init__(self, root: Any, *, train: bool = True, download: bool = False, transform: Any) -> None:
        del root, download
        super().__init__(96 if train else 32, (1, 28, 28), transform, seed=0 if train else 10_000)
