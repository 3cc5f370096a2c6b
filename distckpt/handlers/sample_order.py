"""Reproduce the order in which a DataLoader draws samples after a resume, or warn that it differs.

Facts read from torch 2.13, ``torch/utils/data/{dataloader,sampler,distributed}.py``:

- A new iterator over a DataLoader draws a seed for its workers from ``loader.generator``. Persistent workers keep their
  seeds: from the second pass on, the loader resets its iterator and draws no seed.
- A sampler draws when its first index is requested. An exhausted ``RandomSampler(generator=g)`` draws another whole
  order from ``g``. Without workers, ignite exhausts the sampler at the start of the next epoch. Workers exhaust it with
  the last batches of the pass.
- A loader with workers draws batches before they are trained.

Rank-local; issues no collectives.
"""

import itertools
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler
from torch.utils.data.dataloader import _SingleProcessDataLoaderIter

from distckpt._messages import log_level
from distckpt.backends.detect import current
from distckpt.handlers.data_loaders import (
    find_epoch_sampler,
    find_random_sampler,
    num_batches_of,
    resets_workers,
    samplers_of,
)
from distckpt.handlers.engine_events import TrackedHandler
from distckpt.handlers.ignite_hooks import get_handlers
from distckpt.handlers.resume_point import ResumePoint
from distckpt.handlers.rng_state import RngState

_logger = logging.getLogger(__name__)
_DRAW_ONCE = (SubsetRandomSampler, WeightedRandomSampler)
"""Samplers that draw from a generator only at the start of a pass."""


def start_workers(data: Any, rng_states: Sequence[RngState]) -> None:
    """Start a loader's persistent workers, so that the next pass resets them as a later pass does.

    The generators keep their states. The reset drops the batches that the workers draw here.
    """
    if not isinstance(data, DataLoader) or not data.persistent_workers or resets_workers(data):
        return
    restore = [one.capture_current() for one in rng_states]
    iter(data)
    for function in restore:
        function()
    warn_of_new_workers(data)


def exhaust_sampler(data: Any, rng_states: Sequence[RngState]) -> None:
    """Make the random draws that exhausting a sampler makes, for a pass whose batches have all been trained.

    Call it with the generators as the checkpoint has them. The sampler yields the indices of that pass again; no sample
    is loaded.
    """
    sampler = find_random_sampler(data)
    if not isinstance(data, DataLoader) or data.num_workers or sampler is None:
        return
    if isinstance(sampler, _DRAW_ONCE) or (type(sampler) is RandomSampler and sampler.generator is None):
        return
    restore = [one.capture_current() for one in rng_states]
    for one in rng_states:
        one.restore_pass_start()
    torch.empty((), dtype=torch.int64).random_(generator=data.generator)  # the seed of the pass's workers
    indices = iter(data.sampler if data.batch_sampler is None else data.batch_sampler)
    for one in rng_states:
        one.restore_first_batch()
    for _ in range(len(data)):
        next(indices, None)
    for function in restore:
        function()
    next(indices, None)


def draw_first_indices(iterator: Any) -> None:
    """Let a loader's iterator without workers draw its first indices, and with them the order of the pass."""
    indices = getattr(iterator, "_sampler_iter", None)
    if isinstance(iterator, _SingleProcessDataLoaderIter) and indices is not None:
        first = list(itertools.islice(indices, 1))
        iterator._sampler_iter = itertools.chain(first, indices)  # noqa: SLF001 - there is no public way


def warn_of_new_workers(data: Any) -> None:
    """Warn that random numbers drawn inside a loader's new workers differ from the uninterrupted run."""
    if getattr(data, "num_workers", 0):
        warnings.warn(
            "resume: the loader starts new workers. The samples come in the same order as without the interruption. "
            "Random numbers that the data set draws inside the workers differ",
            stacklevel=2,
        )


def warn_if_order_differs(data: Any, rng_states: Sequence[RngState], *, is_mid_pass: bool) -> None:
    """Warn if the coming samples are in another order than without the interruption."""
    sampler = find_random_sampler(data)
    if sampler is None:
        return
    is_known = isinstance(sampler, (RandomSampler, *_DRAW_ONCE))
    source = f"a {type(sampler).__name__} {'draws' if is_known else 'may draw'} it"
    advice = "Save an RngState(trainer) with the other objects, or use a distckpt.ResumableSampler"
    loaded = [one for one in rng_states if one.is_loaded]
    if is_mid_pass and not any(one.pass_began_at is not None for one in loaded):
        warnings.warn(
            f"resume: the sample order of the interrupted epoch is not known: {source} from a generator when the epoch "
            f"starts. Some samples will come twice in this epoch, others never. {advice}",
            stacklevel=2,
        )
    elif not loaded:
        warnings.warn(
            f"resume: the following epochs have another sample order than without the interruption: {source} from a "
            f"generator. {advice}",
            stacklevel=2,
        )
    else:
        missing = sorted(set.intersection(*(set(one.missing_generators(data)) for one in loaded)))
        if missing:
            warnings.warn(
                f"resume: the checkpoint lacks the states of the generators {', '.join(missing)}: the samples come in "
                f"another order than without the interruption. Give the trainer to the RngState: RngState(trainer)",
                stacklevel=2,
            )


def warn_if_epoch_unknown(data: Any, point: ResumePoint) -> None:
    """Warn if a pass continues under an epoch that its order may not be of: passes are not epochs."""
    sampler = find_epoch_sampler(data)
    if not point.batches or point.pass_epoch is not None or point.epoch_length == num_batches_of(data):
        return
    if sampler is not None and getattr(sampler, "shuffle", True):
        warnings.warn(
            f"resume: the checkpoint does not say for which epoch {type(sampler).__name__} drew the order of the pass "
            f"under way, and passes are not epochs: some of its samples may come twice, others never. Use a "
            f"distckpt.ResumableSampler",
            stacklevel=2,
        )


def warn_if_pass_end_lost(engine: Engine, point: ResumePoint) -> None:
    """Warn if a handler of DATALOADER_STOP_ITERATION may have changed the order of the coming pass, and is not called.

    Handlers of this library and of the engine itself do not count.
    """
    if not point.is_pass_end_due or find_epoch_sampler(engine.state.dataloader) is None:
        return
    handlers = get_handlers(engine, Events.DATALOADER_STOP_ITERATION)
    owners = [getattr(handler, "__self__", handler) for handler in handlers]
    if not all(isinstance(owner, Engine | RngState | TrackedHandler) for owner in owners):
        warnings.warn(
            "resume: the checkpoint was saved after the last batch of a pass. The handlers of "
            "DATALOADER_STOP_ITERATION are not called for that pass: if one of them sets the sampler's epoch, the "
            "samples come in another order than without the interruption. Set the epoch on EPOCH_STARTED",
            stacklevel=2,
        )


def warn_if_ranks_changed(data: Any, before: int | None, now: int, *, is_mid_pass: bool) -> None:
    """Warn if a pass continues on another number of ranks, and the loader does not split the data among ranks."""
    if before in (None, now) or not is_mid_pass or not isinstance(data, DataLoader):
        return
    if any(isinstance(sampler, DistributedSampler) for sampler in samplers_of(data)):
        return
    warnings.warn(
        f"resume: the run had {before} ranks and has {now} now, in the middle of a pass over its data, and each rank "
        f"draws all of the data: its loader has no sampler that splits them among the ranks. Ranks of the interrupted "
        f"run continue in their own order, new ranks at the same batch of another order. Use a "
        f"distckpt.ResumableSampler",
        stacklevel=2,
    )


def skip_batches(iterator: Any, num_batches: int, epoch: int) -> None:
    """Draw and drop the batches of a pass that were trained before; warn if there are fewer.

    Args:
        iterator: ignite's, made by now.
        num_batches: that were trained.
        epoch: number of the epoch, for the log.
    """
    num_skipped = 0
    for _ in range(num_batches):
        try:
            next(iterator)
        except StopIteration:
            warnings.warn(
                f"resume: {num_batches} batches of this pass over the data were trained before, but the data ended "
                f"after {num_skipped}. Are they the same data, in batches of the same size?",
                stacklevel=2,
            )
            break
        num_skipped += 1
    level = log_level(current().rank, {0})
    _logger.log(level, "resume: skipped %d batches of epoch %d that were trained before", num_skipped, epoch)
