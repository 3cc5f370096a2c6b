"""Where a resumed run continues: its next iteration and epoch, and the next batch of its data.

A checkpoint's record holds the resume point (see :func:`~distckpt.handlers.progress.position_of`). A file without a
record has the engine's ``iteration`` alone; a pass over the data is then taken to be an epoch. :func:`fit_to_data`
translates a resume point for data in other batches or a job of another size. Rank-local; issues no collectives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ignite.engine import Engine
from torch.utils.data import BatchSampler, IterableDataset, Sampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from distckpt.handlers.data_loaders import batch_size_of, num_batches_of, num_samples_of, samplers_of
from distckpt.handlers.object_trees import find_path, iter_objects

_INTEGERS = ("trained", "epoch", "in_epoch", "batches", "scale")
_OPTIONAL = ("epoch_length", "samples", "length", "batch_size", "num_samples", "seed", "world_size")
_FLAGS = ("epoch_begun", "pass_begun", "iteration_begun", "is_drawn", "is_end_due")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """What a run has trained; the names are those of a manifest's record. A pass is one iterator over the data."""

    trained: int  # iterations trained in the run; the engine's own ``iteration`` may be one more
    epoch: int  # completed epochs
    in_epoch: int  # iterations trained in the epoch under way; 0 between two epochs
    epoch_begun: bool  # an epoch is under way, even if none of its iterations is trained
    epoch_length: int | None  # the engine's, in iterations; None if unknown, as for all that follow
    batches: int | None = None  # trained in the pass under way; 0 if the next batch starts a pass
    samples: int | None = None  # likewise
    length: int | None = None  # batches in a pass
    batch_size: int | None = None  # samples in a batch
    num_samples: int | None = None  # samples in a pass
    pass_begun: bool = False  # a pass is under way and has more batches
    iteration_begun: bool = False  # an iteration was started and not trained
    is_drawn: bool = False  # the next batch was already drawn from the data
    is_end_due: bool = False  # the last batch of an epoch is trained, and EPOCH_COMPLETED has not been fired
    is_rest_done: bool = False  # likewise, and a Loop's program has done what follows the batches
    is_pass_end_due: bool = False  # all batches of the pass are trained, and the next one is not requested
    event: str | None = None  # the event of the save; None outside of a run
    scale: int = 0  # number of resumes that changed the number of samples in an iteration
    seed: int | None = None  # of a DeterministicEngine's run
    world_size: int | None = None  # number of ranks
    sampler: Mapping[str, Any] | None = None  # the state of a ResumableSampler
    pass_epoch: int | None = None  # of another sampler, when the pass under way drew its order
    sampler_epoch: int | None = None  # of that sampler, at the save
    output: Any = None  # the numbers in the engine's output, if the epoch may have ended; see epoch_numbers.py
    metrics: Mapping[str, Any] | None = None  # likewise
    lacking: Sequence[str] = ()  # names of what is left out of both

    @classmethod
    def from_record(cls, position: Any) -> "ResumePoint | None":
        """Return the resume point that a manifest's record holds; None if it is malformed."""
        if not isinstance(position, Mapping):
            return None
        known: dict[str, Any] = {field.name: position.get(field.name) for field in fields(cls)}
        known["is_rest_done"] = known["is_rest_done"] is True  # missing in older files
        is_sound = (
            all(_is_count(known[name]) for name in _INTEGERS)
            and all(known[name] is None or _is_count(known[name]) for name in _OPTIONAL)
            and all(isinstance(known[name], bool) for name in _FLAGS)
        )
        if not is_sound:
            return None
        known["event"] = known["event"] if isinstance(known["event"], str) else None
        known["is_pass_end_due"] = known["is_pass_end_due"] is True
        for name in ("pass_epoch", "sampler_epoch"):
            known[name] = known[name] if _is_int(known[name]) else None
        for name in ("sampler", "metrics"):
            known[name] = known[name] if isinstance(known[name], Mapping) else None
        known["lacking"] = [str(one) for one in known["lacking"]] if isinstance(known["lacking"], list) else ()
        return cls(**known)

    @classmethod
    def from_engine(cls, engine: Engine) -> "ResumePoint":
        """Return the resume point that follows from an engine's state alone."""
        trained, length = engine.state.iteration, engine.state.epoch_length
        in_epoch = trained % length if length else trained
        return cls(
            trained=trained,
            epoch=engine.state.epoch,
            in_epoch=in_epoch,
            epoch_begun=in_epoch > 0,
            epoch_length=length,
        )

    def is_run_complete(self, max_epochs: int | None, max_iters: int | None) -> bool:
        """Return True if a run with these limits has nothing left to train."""
        if max_iters is None and max_epochs is not None and self.epoch >= max_epochs:
            return True
        return is_last_iteration(self.trained, self.epoch_length, max_epochs, max_iters)

    @property
    def is_mid_pass(self) -> bool:
        """Return True if a pass is under way and has more batches."""
        return self.pass_begun or (bool(self.batches) and self.batches != self.length)


def find_engine(to_load: Mapping[str, Any], record: Mapping[str, Any]) -> Engine | None:
    """Return the only engine in `to_load`, or of several the one that ran during the save; None if unknown."""
    engines = {path: obj for path, obj in iter_objects(to_load) if isinstance(obj, Engine)}
    if len({id(engine) for engine in engines.values()}) == 1:
        return next(iter(engines.values()))
    return engines.get(_engine_key(record) or ())


def _engine_key(record: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return the path to the state of the engine that ran during the save; None if unknown."""
    engine = record.get("engine")
    key = engine.get("key") if isinstance(engine, Mapping) else None
    return tuple(key) if isinstance(key, list) else None


def find_resume_point(
    engine: Engine, to_load: Mapping[str, Any], record: Mapping[str, Any], rank: int, world_size: int
) -> ResumePoint:
    """Return the resume point that this rank recorded, else the one that follows from the engine's state."""
    recorded, key = record.get("engine"), _engine_key(record)
    path = find_path(engine, to_load)
    is_of_engine = key is None or path is None or key == path
    if is_of_engine and isinstance(recorded, Mapping) and recorded.get("iteration") == engine.state.iteration:
        data = record.get("data")
        positions = data if isinstance(data, list) else [data]
        position = positions[rank] if len(positions) == world_size else positions[0]
        point = ResumePoint.from_record(position)
        if point is not None:
            return point
    return ResumePoint.from_engine(engine)


def is_last_iteration(iteration: int, epoch_length: int | None, max_epochs: int | None, max_iters: int | None) -> bool:
    """Return True if a run with these limits ends with `iteration`. ignite's own check is true for a whole epoch."""
    if max_iters is not None:
        return iteration >= max_iters
    return max_epochs is not None and epoch_length is not None and iteration >= max_epochs * epoch_length


def fit_to_data(
    point: ResumePoint,
    data: Any,
    epoch_length: int | None,
    *,
    knows_pass: bool,
    counts_epochs: bool,
    world_size: int,
    num_left: int | None = None,
) -> ResumePoint:
    """Translate a resume point for the resumed run's data, which may come in other batches.

    Args:
        point: the recorded one; its `batches` is not None.
        data: the argument of ``engine.run()``.
        epoch_length: the argument of ``engine.run()``, in iterations; None if not given.
        knows_pass: True if the generators' states from the start of the pass are known.
        counts_epochs: True if the run's limit is in epochs. Otherwise iterations keep their numbers.
        world_size: number of ranks.
        num_left: batches left in the pass, if the data continue by themselves; else None.

    Raises:
        ValueError: the position in the new batches cannot be determined.
    """
    length, size, total = num_batches_of(data), batch_size_of(data), num_samples_of(data)
    pairs = ((point.length, length), (point.batch_size, size), (point.num_samples, total))
    if num_left is None and all(before is None or now is None or before == now for before, now in pairs):
        return point
    is_pass_an_epoch = point.epoch_length == point.length or (num_left is not None and point.length is None)
    new_length = epoch_length or (length if is_pass_an_epoch else point.epoch_length) or point.epoch_length
    batches = 0
    if num_left is not None and length is not None:
        batches = max(0, length - num_left)
    elif point.is_mid_pass:
        problem = _why_unknown(point, data, world_size, knows_pass=knows_pass)
        if problem:
            raise ValueError(_refusal(point, length, size, problem))
        batches = (point.samples or 0) // (size or 1)
        if _distributed_sampler_of(data) is not None:
            batches = (point.samples or 0) * (point.world_size or world_size) // ((size or 1) * world_size)
    in_epoch = point.in_epoch
    if is_pass_an_epoch and in_epoch:
        in_epoch = batches
    elif in_epoch and new_length != point.epoch_length:
        problem = f"an epoch of {point.epoch_length} iterations is under way"
        raise ValueError(_refusal(point, length, size, problem))
    trained = point.trained - point.in_epoch + in_epoch
    if new_length is not None and new_length != point.epoch_length and counts_epochs:
        trained = point.epoch * new_length + in_epoch
    fitted = replace(
        point,
        trained=trained,
        in_epoch=in_epoch,
        epoch_length=new_length,
        batches=batches,
        length=length,
        batch_size=size,
        num_samples=total,
        scale=point.scale + (trained != point.trained),
    )
    if num_left == 0 and length:  # fewer samples are left than a batch has, and the loader leaves them out
        return _end_pass(fitted, ends_epoch=is_pass_an_epoch and in_epoch > 0)
    return fitted


def _end_pass(point: ResumePoint, *, ends_epoch: bool) -> ResumePoint:
    """Return the resume point after the pass under way, and after its epoch's last batch if `ends_epoch`."""
    point = replace(point, batches=0, pass_begun=False, iteration_begun=False, is_drawn=False)
    if ends_epoch:
        point = replace(point, epoch=point.epoch + 1, in_epoch=0, epoch_begun=False, is_end_due=True)
    return point


def _distributed_sampler_of(data: Any) -> Any:
    """Return torch's DistributedSampler, which deals one order out to the ranks in turn; None if there is none."""
    return next((sampler for sampler in samplers_of(data) if type(sampler) is DistributedSampler), None)


def _why_unknown(  # noqa: PLR0911 - one return for each reason
    point: ResumePoint, data: Any, world_size: int, *, knows_pass: bool
) -> str:
    """Return why the position in the new batches is unknown; empty if it is known."""
    size, total, samplers = batch_size_of(data), num_samples_of(data), list(samplers_of(data))
    inner = samplers[-1] if samplers else None
    if point.samples is None or size is None:
        return "the number of samples in a batch is not known"
    if len(samplers) > 1 and type(samplers[0]) is not BatchSampler:
        return f"{type(samplers[0]).__name__} makes batches of its own"
    if isinstance(getattr(data, "dataset", None), IterableDataset) and getattr(data, "num_workers", 0) > 1:
        return "the batches come from several workers in turn"
    distributed = _distributed_sampler_of(data)
    if distributed is not None:
        return _why_unknown_on_ranks(point, distributed, num_batches_of(data), size, world_size)
    is_in_sequence = inner is None or isinstance(inner, SequentialSampler) or not isinstance(inner, Sampler)
    if total != point.num_samples and point.num_samples is not None and not is_in_sequence:
        return f"the data had {point.num_samples} samples and have {total} now, in another order"
    if not is_in_sequence and not isinstance(inner, DistributedSampler) and not knows_pass:
        return f"the order of {type(inner).__name__} is not known without an RngState(trainer) in the checkpoint"
    if point.samples % size:
        return f"{point.samples} samples are no whole number of batches of {size}"
    return ""


def _why_unknown_on_ranks(point: ResumePoint, sampler: Any, length: int | None, size: int, world_size: int) -> str:
    """Return why the position in a DistributedSampler's order is unknown; empty if it is known.

    The samples that all ranks have trained are a prefix of the order. It must be a whole number of steps of all ranks.
    """
    before, num_samples = point.world_size or world_size, len(sampler.dataset)
    num_each = num_samples // before if sampler.drop_last else -(-num_samples // before)
    if point.num_samples != num_each:
        return f"{before} ranks had {point.num_samples} samples each, and the data have {num_samples} now"
    trained = (point.samples or 0) * before
    if trained % (size * world_size):
        return f"the {trained} samples of {before} ranks are no whole number of steps of {world_size} x {size}"
    if length is not None and trained // (size * world_size) >= length:
        return "fewer samples are left than a step has"
    return ""


def _refusal(point: ResumePoint, length: int | None, size: int | None, problem: str) -> str:
    def in_batches(num: int | None, batch_size: int | None) -> str:
        return f"{num} batches" + (f" of {batch_size}" if batch_size is not None else "")

    trained = f"{point.batches} of {in_batches(point.length, point.batch_size)}"
    if point.samples is not None:
        trained += f" ({point.samples} samples)"
    return (
        f"resume: the run had trained {trained} of a pass over its data, which have {in_batches(length, size)} now. It "
        f"cannot continue there: {problem}. Nothing was trained. Finish the epoch with the batches of before, or use a "
        f"distckpt.ResumableSampler, which continues at any sample"
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_int(value) and value >= 0
