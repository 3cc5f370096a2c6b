"""Where a resumed run goes on: which iteration of which epoch comes first, and which batch of the data.

A checkpoint's record says what was trained (see :func:`~distckpt.handlers.progress.position_of`). A file without a
record has the engine's ``iteration`` alone: there a pass over the data is taken for an epoch. Once the data of the
resumed run are known, :func:`fit_to_data` says what that means for them. Rank-local; issues no collectives.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ignite.engine import Engine
from torch.utils.data import BatchSampler, IterableDataset, RandomSampler, Sampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from distckpt.handlers.progress import batch_size_of, length_of, num_samples_of, samplers_of

__all__ = ["StartPoint", "fit_to_data", "start_of_record", "start_of_state"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StartPoint:
    """What a run has behind it; see :func:`~distckpt.handlers.progress.position_of` for the attributes' meaning.

    Attributes:
        batches: batches of the pass to leave out; None where they follow from `trained` and the data's length.
    """

    trained: int
    epoch: int
    in_epoch: int
    epoch_begun: bool
    epoch_length: int | None
    batches: int | None = None
    samples: int | None = None
    length: int | None = None
    batch_size: int | None = None
    num_samples: int | None = None
    pass_begun: bool = False
    iteration_begun: bool = False
    is_drawn: bool = False
    is_end_due: bool = False
    event: str | None = None
    scale: int = 0
    seed: int | None = None
    world_size: int | None = None
    sampler: Mapping[str, Any] | None = None

    def is_at_end(self, max_epochs: int | None, max_iters: int | None) -> bool:
        """Return True if a run up to one of these ends has nothing left to do."""
        if max_iters is not None:
            return self.trained >= max_iters
        if max_epochs is None:
            return False
        length = self.epoch_length
        return self.epoch >= max_epochs or (length is not None and self.trained >= length * max_epochs)

    @property
    def is_mid_pass(self) -> bool:
        """Whether the iterator over the data was made, and has more to give."""
        return self.pass_begun or (bool(self.batches) and self.batches != self.length)


_INTEGERS = ("trained", "epoch", "in_epoch", "batches", "scale")
_OPTIONAL = ("epoch_length", "samples", "length", "batch_size", "num_samples", "seed", "world_size")
_FLAGS = ("epoch_begun", "pass_begun", "iteration_begun", "is_drawn", "is_end_due")


def start_of_record(position: Any) -> StartPoint | None:
    """Return what a record's position says; None if it is none."""
    if not isinstance(position, Mapping):
        return None
    numbers = {name: position.get(name) for name in (*_INTEGERS, *_OPTIONAL)}
    flags = {name: position.get(name) for name in _FLAGS}
    is_sound = (
        all(_is_count(numbers[name]) for name in _INTEGERS)
        and all(numbers[name] is None or _is_count(numbers[name]) for name in _OPTIONAL)
        and all(isinstance(flag, bool) for flag in flags.values())
    )
    if not is_sound:
        return None
    event, sampler = position.get("event"), position.get("sampler")
    known: dict[str, Any] = {**numbers, **flags}
    known["event"] = event if isinstance(event, str) else None
    known["sampler"] = sampler if isinstance(sampler, Mapping) else None
    return StartPoint(**known)


def start_of_state(engine: Engine) -> StartPoint:
    """Return what an engine's own state says: passes are taken to be epochs."""
    trained, length = engine.state.iteration, engine.state.epoch_length
    in_epoch = trained % length if length else trained
    return StartPoint(
        trained=trained,
        epoch=engine.state.epoch,
        in_epoch=in_epoch,
        epoch_begun=in_epoch > 0,
        epoch_length=length,
    )


def fit_to_data(
    start: StartPoint,
    data: Any,
    epoch_length: int | None,
    *,
    knows_pass: bool,
    counts_epochs: bool,
    world_size: int,
    left: int | None = None,
) -> StartPoint:
    """Return the same place in the data of the resumed run, whose batches may be others.

    Args:
        start: what the run has behind it.
        data: what ``engine.run()`` was given.
        epoch_length: likewise; None if it was not.
        knows_pass: whether the generators are known as they were when the pass began.
        counts_epochs: whether the run's end is given in epochs; else in iterations, which keep their number.
        world_size: the number of ranks.
        left: batches that the data give until the pass ends, where they go on by themselves; else None.

    Raises:
        ValueError: a pass had begun, and its place in the new batches cannot be told.
    """
    length, size, total = length_of(data), batch_size_of(data), num_samples_of(data)
    before = (start.length, start.batch_size, start.num_samples)
    pairs = zip(before, (length, size, total), strict=True)
    if left is None and all(one is None or other is None or one == other for one, other in pairs):
        return start
    is_pass_an_epoch = start.epoch_length == start.length or (left is not None and start.length is None)
    new_length = epoch_length or (length if is_pass_an_epoch else start.epoch_length) or start.epoch_length
    batches = 0
    if left is not None and length is not None:
        if not left and length:
            raise ValueError(_refusal(start, length, size, "fewer samples are left than a batch has"))
        batches = max(0, length - left)
    elif start.is_mid_pass:
        problem = _why_unknown(start, data, world_size, knows_pass=knows_pass)
        if problem:
            raise ValueError(_refusal(start, length, size, problem))
        batches = (start.samples or 0) // (size or 1)
        if _is_shared(data):
            batches = (start.samples or 0) * (start.world_size or world_size) // ((size or 1) * world_size)
    in_epoch = start.in_epoch
    if is_pass_an_epoch and in_epoch:
        in_epoch = batches
    elif in_epoch and new_length != start.epoch_length:
        raise ValueError(_refusal(start, length, size, f"an epoch of {start.epoch_length} iterations had begun"))
    trained = start.trained - start.in_epoch + in_epoch
    if new_length is not None and new_length != start.epoch_length and counts_epochs:
        trained = start.epoch * new_length + in_epoch
    return replace(
        start,
        trained=trained,
        in_epoch=in_epoch,
        epoch_length=new_length,
        batches=batches,
        length=length,
        batch_size=size,
        num_samples=total,
        scale=start.scale + (trained != start.trained),
    )


def _is_shared(data: Any) -> bool:
    """Return True if torch's DistributedSampler lets the ranks take turns in one order."""
    return any(type(one) is DistributedSampler for one in samplers_of(data))


def _why_unknown_on_ranks(start: StartPoint, data: Any, size: int, world_size: int) -> str:
    """Return why the place is unknown where ranks take turns in one order; empty if it is known.

    What all ranks have trained is the beginning of the order. On any number of ranks so many whole steps are left out.
    """
    inner: Any
    (inner,) = [one for one in samplers_of(data) if type(one) is DistributedSampler]
    before, num_samples = start.world_size or world_size, len(inner.dataset)
    num_each = num_samples // before if inner.drop_last else -(-num_samples // before)
    if start.num_samples != num_each:
        return f"{before} ranks had {start.num_samples} samples each, and the data have {num_samples} now"
    trained, length = (start.samples or 0) * before, length_of(data)
    if trained % (size * world_size):
        return f"the {trained} samples of {before} ranks are no whole number of steps of {world_size} x {size}"
    if length is not None and trained // (size * world_size) >= length:
        return "fewer samples are left than a step has"
    return ""


def _why_unknown(  # noqa: PLR0911 - one a reason
    start: StartPoint, data: Any, world_size: int, *, knows_pass: bool
) -> str:
    """Return why the place in the new batches is unknown; empty if it is known."""
    size, total, samplers = batch_size_of(data), num_samples_of(data), list(samplers_of(data))
    inner = samplers[-1] if samplers else None
    if start.samples is None or size is None:
        return "how many samples are in a batch is not known"
    if len(samplers) > 1 and type(samplers[0]) is not BatchSampler:
        return f"{type(samplers[0]).__name__} makes batches of its own"
    if isinstance(getattr(data, "dataset", None), IterableDataset) and getattr(data, "num_workers", 0) > 1:
        return "several workers give batches in turns"
    if _is_shared(data):
        return _why_unknown_on_ranks(start, data, size, world_size)
    is_in_sequence = inner is None or isinstance(inner, SequentialSampler) or not isinstance(inner, Sampler)
    if total != start.num_samples and start.num_samples is not None and not is_in_sequence:
        return f"the data had {start.num_samples} samples and have {total}, in another order"
    if isinstance(inner, RandomSampler) and not knows_pass:
        return "the order is not known without an RngState(trainer) in the checkpoint"
    if not is_in_sequence and not isinstance(inner, RandomSampler | DistributedSampler) and not knows_pass:
        return f"the order of {type(inner).__name__} is not known without an RngState(trainer) in the checkpoint"
    if start.samples % size:
        return f"{start.samples} samples are no whole number of batches of {size}"
    return ""


def _refusal(start: StartPoint, length: int | None, size: int | None, problem: str) -> str:
    def told(batches: int | None, batch_size: int | None) -> str:
        return f"{batches} batches" + (f" of {batch_size}" if batch_size is not None else "")

    trained = f"{start.batches} of {told(start.length, start.batch_size)}"
    if start.samples is not None:
        trained += f" ({start.samples} samples)"
    return (
        f"resume: the run had trained {trained} of a pass over its data, which have {told(length, size)} now. It "
        f"cannot go on there: {problem}. Nothing was trained. Finish the epoch with the batches of before, or use a "
        f"distckpt.ResumableSampler, which goes on at any sample"
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
