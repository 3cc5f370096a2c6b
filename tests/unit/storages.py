"""Storages with known bytes."""

import torch

__all__ = ["bytes_of", "storages_of"]


def storages_of(*sizes: int) -> list[torch.UntypedStorage]:
    """Make one of each size, of random bytes that are the same each time."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).untyped_storage() for size in sizes]


def bytes_of(storage: torch.UntypedStorage) -> bytes:
    """Return what it holds; its own iterator makes a Python number of each byte."""
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes()
