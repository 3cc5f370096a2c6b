"""Transforms of image tensors; those that are random draw from torch's generator."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

Transform = Callable[[torch.Tensor], torch.Tensor]


class Compose:
    """One transform after the other."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self._transforms = transforms

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Apply them."""
        for transform in self._transforms:
            image = transform(image)
        return image


class ToTensor:
    """Nothing: the images are tensors."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Return `image`."""
        return image


class Normalize:
    """Subtract a mean, and divide, for each channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self._mean, self._std = (torch.tensor(one).reshape(-1, 1, 1) for one in (mean, std))

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Do it."""
        return (image - self._mean) / self._std


class Pad:
    """Add a black border."""

    def __init__(self, padding: int) -> None:
        self._padding = padding

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Add it."""
        return functional.pad(image, [self._padding] * 4)


class RandomCrop:
    """Cut a square out, anywhere."""

    def __init__(self, size: int, **_options: Any) -> None:
        self._size = size

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Cut it out."""
        top, left = (int(torch.randint(extent - self._size + 1, ())) for extent in image.shape[1:])
        return image[:, top : top + self._size, left : left + self._size]


class RandomHorizontalFlip:
    """Turn every second image around."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Turn it around, or not."""
        return image.flip(-1) if torch.rand(()) < 0.5 else image


class Resize:
    """Nothing: only images that have the size are asked for."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Return `image`."""
        assert image.shape[-1] == self._size
        return image


CenterCrop = Resize
