"""Facts about the data that an engine draws its batches from: sizes, samplers and random number generators.

The data may be a DataLoader or any iterable. None stands for a fact that the data do not reveal. Rank-local; issues
no collectives.
"""

from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from distckpt.handlers.rng_generators import is_generator
from distckpt.samplers import ResumableSampler

_PREFIX = "state.dataloader"
_MAX_OBJECTS = 2000
_MAX_ITEMS = 100
"""Longer containers hold the samples themselves."""
_OPAQUE = (
    *(torch.Tensor, torch.nn.Module, torch.device, torch.dtype, str, bytes, int, float, complex, range),
    *(type, ModuleType, FunctionType, BuiltinFunctionType, MethodType),
)
_NOT_RANDOM = (SequentialSampler, DistributedSampler, list, tuple, range)
"""Samplers whose order does not depend on a generator's state."""


def num_batches_of(data: Any) -> int | None:
    """Return the number of batches in a pass over the data."""
    try:
        return len(data)
    except TypeError:
        return None


def batch_size_of(data: Any) -> int | None:
    """Return the number of samples in a loader's batch."""
    for source in (data, getattr(data, "batch_sampler", None)):
        size = getattr(source, "batch_size", None)
        if isinstance(size, int) and not isinstance(size, bool) and size > 0:
            return size
    return None


def num_samples_of(data: Any) -> int | None:
    """Return the number of samples that a loader's innermost sampler yields in a pass."""
    samplers = [sampler for sampler in samplers_of(data) if sampler is not getattr(data, "batch_sampler", None)]
    return num_batches_of(samplers[-1]) if samplers else None


def samplers_of(data: Any) -> Iterator[Any]:
    """Yield a loader's batch sampler and the samplers inside it, the innermost last."""
    seen: set[int] = set()
    sampler = getattr(data, "batch_sampler", None)
    if sampler is None:
        sampler = getattr(data, "sampler", None)
    while sampler is not None and id(sampler) not in seen:
        seen.add(id(sampler))
        yield sampler
        sampler = getattr(sampler, "sampler", None)


def find_random_sampler(data: Any) -> Any:
    """Return the loader's sampler that may draw the sample order from a generator; None if there is none.

    A sampler of an unknown class counts as one that may.
    """
    if isinstance(getattr(data, "dataset", None), IterableDataset):
        return None
    found = None
    for sampler in samplers_of(data):
        if type(sampler) is not BatchSampler and not isinstance(sampler, _NOT_RANDOM):
            found = sampler
    return found


def find_epoch_sampler(data: Any) -> Any:
    """Return the loader's sampler whose order depends on ``set_epoch``; None if there is none.

    A ResumableSampler does not count: its state holds the epoch.
    """
    for sampler in samplers_of(data):
        has_epoch = isinstance(getattr(sampler, "epoch", None), int) and callable(getattr(sampler, "set_epoch", None))
        if has_epoch and not isinstance(sampler, ResumableSampler):
            return sampler
    return None


def stateful_parts_of(data: Any) -> list[Any]:
    """Return the objects that may know the position in the data: the loader, its samplers, its iterable data set."""
    parts = [data, *samplers_of(data)]
    dataset = getattr(data, "dataset", None)
    if isinstance(dataset, IterableDataset) and not getattr(data, "num_workers", None):  # workers use copies of it
        parts.append(dataset)
    return parts


def resets_workers(data: Any) -> bool:
    """Return True if the loader's persistent workers run: its next pass resets them and draws no seed for them."""
    return getattr(data, "_iterator", None) is not None and bool(getattr(data, "persistent_workers", False))


def find_generators(data: Any) -> dict[str, Any]:
    """Return the random number generators that the data refer to, by their paths.

    Finds generators of torch, Python and NumPy in the loader, its samplers and its data set. Each generator comes once,
    by its shortest path.

    Example:
        >>> loader = DataLoader(range(3), shuffle=True, generator=torch.Generator())
        >>> list(find_generators(loader))
        ['state.dataloader.generator']
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    level: list[tuple[str, Any]] = [(_PREFIX, data)]
    while level and len(seen) < _MAX_OBJECTS:
        below: list[tuple[str, Any]] = []
        for path, obj in level:
            if obj is None or isinstance(obj, _OPAQUE) or id(obj) in seen:
                continue
            seen.add(id(obj))
            if is_generator(obj):
                found[path] = obj
            else:
                below.extend((f"{path}.{name}", item) for name, item in _items_of(obj))
        level = below
    return found


def is_data_generator(name: str) -> bool:
    """Return True for a path that :func:`find_generators` returns."""
    return name == _PREFIX or name.startswith(f"{_PREFIX}.")


def _items_of(obj: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(obj, DataLoader):
        yield from ((name, item) for name, item in vars(obj).items() if name != "_iterator")
    elif not isinstance(obj, list | tuple | dict):
        yield from getattr(obj, "__dict__", {}).items()
    elif len(obj) <= _MAX_ITEMS:
        items = obj.items() if isinstance(obj, dict) else enumerate(obj)
        yield from ((str(name), item) for name, item in items)
