"""The order in which a loader of torch's draws its samples: what it depends on, and how it is the same again.

Read off torch 2.13's ``torch/utils/data/{dataloader,sampler,distributed}.py``:

- An iterator over a DataLoader draws a seed for its workers from ``loader.generator``. Persistent workers keep theirs:
  from the second pass on the loader resets the iterator that it has, and draws no seed.
- A sampler draws as its first index is asked for. ``RandomSampler(generator=g)`` draws a whole order more from ``g`` as
  it is exhausted, which ignite notices as the next epoch begins. With workers that came with the last batches already.
- A loader draws ahead of what is trained if it has workers.

Rank-local; issues no collectives.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Protocol

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from distckpt.handlers.progress import samplers_of
from distckpt.handlers.rng_generators import is_generator

__all__ = [
    "begins_by_reset",
    "end_pass",
    "generators_in",
    "is_of_data",
    "make_workers",
    "sampler_that_draws",
    "warn_of_order",
    "warn_of_ranks",
    "warn_of_workers",
]

_PREFIX = "state.dataloader"
_MAX_OBJECTS = 2000
_MAX_ITEMS = 100
"""Longer containers hold the data themselves."""
_OPAQUE = (
    *(torch.Tensor, torch.nn.Module, torch.device, torch.dtype, str, bytes, int, float, complex, range),
    *(type, ModuleType, FunctionType, BuiltinFunctionType, MethodType),
)
_UNSHUFFLED = (SequentialSampler, DistributedSampler, list, tuple, range)
"""Samplers whose order does not depend on generators."""
_SEEDED_AT_ONCE = (SubsetRandomSampler, WeightedRandomSampler)
"""Samplers that draw from a generator as a pass begins, and never again."""


class _Generators(Protocol):
    """What is asked of an RngState."""

    @property
    def has_state(self) -> bool: ...

    @property
    def pass_began_at(self) -> int | None: ...

    def missing_of(self, data: Any) -> list[str]: ...

    def put_back_pass(self) -> None: ...

    def now(self) -> Callable[[], None]: ...


def generators_in(data: Any) -> dict[str, Any]:
    """Return the generators that data hold, by where they hang: a loader's, its samplers', its data set's.

    Each comes once, by the shortest way to it. Generators of torch's, of Python's and of NumPy's count.

    Example:
        >>> loader = DataLoader(range(3), shuffle=True, generator=torch.Generator())
        >>> list(generators_in(loader))
        ['state.dataloader.generator']
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    level: list[tuple[str, Any]] = [(_PREFIX, data)]
    while level and len(seen) < _MAX_OBJECTS:
        below: list[tuple[str, Any]] = []
        for path, one in level:
            if one is None or isinstance(one, _OPAQUE) or id(one) in seen:
                continue
            seen.add(id(one))
            if is_generator(one):
                found[path] = one
            else:
                below.extend((f"{path}.{name}", item) for name, item in _parts_of(one))
        level = below
    return found


def _parts_of(one: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(one, list | tuple):
        items: Any = enumerate(one)
    elif isinstance(one, dict):
        items = one.items()
    elif isinstance(one, DataLoader):
        items = ((name, item) for name, item in vars(one).items() if name != "_iterator")
    else:
        yield from getattr(one, "__dict__", {}).items()
        return
    if not isinstance(one, list | tuple | dict) or len(one) <= _MAX_ITEMS:
        yield from ((str(name), item) for name, item in items)


def is_of_data(name: str) -> bool:
    """Return True for a name that :func:`generators_in` gives."""
    return name == _PREFIX or name.startswith(f"{_PREFIX}.")


def sampler_that_draws(data: Any) -> Any:
    """Return the sampler of a loader that may draw the order of the samples from a generator; None if there is none.

    Of torch's samplers it is known. One of another class may.
    """
    if isinstance(getattr(data, "dataset", None), IterableDataset):
        return None
    drawing = None
    for one in samplers_of(data):
        if type(one) is not BatchSampler and not isinstance(one, _UNSHUFFLED):
            drawing = one
    return drawing


def begins_by_reset(data: Any) -> bool:
    """Return True if a loader has persistent workers, and they are there: it resets its iterator and draws no seed."""
    return getattr(data, "_iterator", None) is not None and bool(getattr(data, "persistent_workers", False))


def make_workers(data: Any, generators: Sequence[_Generators]) -> None:
    """Start a loader's persistent workers where they are not there yet, so that its next pass begins as a later one.

    The batches that they draw ahead are left by the reset. The generators stay as they are. What the data set draws at
    random in its workers is another than in the run before, which a warning says.
    """
    if not isinstance(data, DataLoader) or not data.persistent_workers or begins_by_reset(data):
        return
    put_back = [one.now() for one in generators]
    iter(data)
    for put in put_back:
        put()
    warn_of_workers(data)


def warn_of_workers(data: Any) -> None:
    """Warn that the workers of a loader begin anew, where they had drawn before in the run left alone."""
    if getattr(data, "num_workers", 0):
        warnings.warn(
            "resume: the loader's workers begin anew. The samples come in the order of the run before. If the data set "
            "draws at random in the workers, it draws other numbers than in the run before",
            stacklevel=2,
        )


def end_pass(data: Any, generators: Sequence[_Generators]) -> None:
    """Let a loader's sampler draw what it draws as it is exhausted, of a pass whose batches have all been trained.

    The generators are as the run left them. The samplers that may draw then are asked for the indices of that pass
    again; none of its samples is loaded.
    """
    drawing = sampler_that_draws(data)
    if not isinstance(data, DataLoader) or data.num_workers or drawing is None:
        return
    if isinstance(drawing, _SEEDED_AT_ONCE) or (type(drawing) is RandomSampler and drawing.generator is None):
        return
    put_back = [one.now() for one in generators]
    for one in generators:
        one.put_back_pass()
    torch.empty((), dtype=torch.int64).random_(generator=data.generator)  # the seed of the pass's workers
    indices = iter(data.sampler if data.batch_sampler is None else data.batch_sampler)
    for _ in range(len(data)):
        next(indices, None)
    for put in put_back:
        put()
    next(indices, None)


def warn_of_order(data: Any, generators: Sequence[_Generators], *, is_mid_pass: bool) -> None:
    """Warn where the order of the samples to come is not that of the run left alone."""
    drawing = sampler_that_draws(data)
    if drawing is None:
        return
    is_known = isinstance(drawing, (RandomSampler, *_SEEDED_AT_ONCE))
    kind = f"a {type(drawing).__name__} {'draws' if is_known else 'may draw'} it"
    loaded = [one for one in generators if one.has_state]
    if is_mid_pass and not any(one.pass_began_at is not None for one in loaded):
        warnings.warn(
            f"resume: the order of the begun epoch is not known: {kind} from a generator as the epoch begins. Some "
            f"samples will come twice and others not at all in this epoch. Save an RngState(trainer) with the other "
            f"objects, or use a distckpt.ResumableSampler",
            stacklevel=2,
        )
    elif not loaded:
        warnings.warn(
            f"resume: the epochs that follow have another order than in the run before: {kind} from a generator. Save "
            f"an RngState(trainer) with the other objects, or use a distckpt.ResumableSampler",
            stacklevel=2,
        )
    else:
        missing = sorted(set.intersection(*(set(one.missing_of(data)) for one in loaded)))
        if missing:
            warnings.warn(
                f"resume: the checkpoint lacks the states of the generators {', '.join(missing)}: the order of the "
                f"samples is another than in the run before. Give the trainer to the RngState: RngState(trainer)",
                stacklevel=2,
            )


def warn_of_ranks(data: Any, before: int | None, now: int, *, is_mid_pass: bool) -> None:
    """Warn where a pass goes on on another number of ranks, and the loader does not share the data among them."""
    if before in (None, now) or not is_mid_pass or not isinstance(data, DataLoader):
        return
    if any(isinstance(one, DistributedSampler) for one in samplers_of(data)):
        return
    warnings.warn(
        f"resume: the run had {before} ranks and has {now}, in the middle of a pass over its data, and each rank draws "
        f"all of them: its loader has no sampler that shares them among the ranks. Ranks that were there before go on "
        f"in their own order, new ones at the same batch of another order. Use a distckpt.ResumableSampler",
        stacklevel=2,
    )
