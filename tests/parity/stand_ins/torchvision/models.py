"""A small network under the name of a large one."""

from torch import nn


def resnet18(num_classes: int) -> nn.Module:
    """Return a network with a convolution, a batch norm and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 5, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 7 * 7, num_classes)
    )
