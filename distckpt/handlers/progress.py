"""An engine's progress: trained iterations, completed epochs, and the position in the pass over its data.

ignite keeps only ``state.iteration``, and raises it before a batch is trained. It tells neither the batches trained in
a pass, nor where an epoch started after ``terminate_epoch()``. The counters here tell both. The wrapped
``Engine._fire_event`` in :mod:`distckpt.handlers.ignite_hooks` updates them, with two assignments an iteration.

A pass starts when ignite makes a new iterator over the data. It need not be an epoch: ``epoch_length`` may differ from
the data's length.
"""

import weakref
from dataclasses import dataclass
from typing import Any

from ignite.engine import DeterministicEngine, Engine, Events

from distckpt.backends.detect import current
from distckpt.handlers.data_loaders import batch_size_of, find_epoch_sampler, num_batches_of, num_samples_of
from distckpt.handlers.epoch_metrics import shown_numbers
from distckpt.handlers.ignite_hooks import get_init_iter, get_iterator
from distckpt.handlers.resume_point import ResumePoint
from distckpt.samplers import ResumableSampler, find_resumable

_ATTRIBUTE = "_distckpt_progress"
_FIRST_BATCH = (Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED)


@dataclass(slots=True)
class Progress:
    """The counters of one engine."""

    trained: int = 0  # iterations trained in the run
    epochs: int = 0  # completed epochs
    epoch_began_at: int = 0  # `trained` at the start of the present epoch
    has_epoch_begun: bool = False  # an epoch is under way
    is_rest_done: bool = False  # a Loop's program has done what follows the epoch's batches
    # `trained` at the start of the present pass; negative if a resumed run has fewer iterations than the one before.
    pass_began_at: int = 0
    iterator_began_at: int = 0  # `trained` when the present iterator was made
    needs_iterator: bool = True  # ignite makes a new iterator before the next batch, or has just made it
    awaits_batch: bool = True  # the present iterator has given no batch yet
    sampler_start: Any = None  # `ResumableSampler.distckpt_start` of the present iterator; None if it draws no indices
    pass_epoch: int | None = None  # another sampler's epoch when the present iterator drew its order; None likewise
    scale: int = 0  # as in ResumePoint
    resumed: ResumePoint | None = None  # where the next run continues; None if it starts where ignite would

    def begin_pass(self) -> None:
        """Count the following batches from here, as those of a new iterator."""
        self.pass_began_at = self.iterator_began_at = self.trained
        self.needs_iterator = False
        self.awaits_batch, self.sampler_start, self.pass_epoch = True, None, None

    def end_pass(self) -> None:
        """Count the following batches as those of a new pass."""
        self.begin_pass()
        self.needs_iterator = True


def progress_of(engine: Engine) -> Progress:
    """Return the engine's counters. Before its first run they follow from its ``state``."""
    progress: Progress | None = vars(engine).get(_ATTRIBUTE)
    if progress is None:
        progress = vars(engine)[_ATTRIBUTE] = Progress()
        _begin_run(engine, progress)
    return progress


def continue_from(engine: Engine, point: ResumePoint | None) -> None:
    """Let the counters of the engine's next run start at a resume point; None cancels an earlier call."""
    progress = progress_of(engine)
    progress.resumed, progress.scale = point, 0 if point is None else point.scale
    _begin_run(engine, progress)


def count_event(engine: Engine, event: Any) -> None:
    """Update the counters before the handlers of an event.

    Of the events of every iteration, it counts those of a pass's first batch.
    """
    progress = progress_of(engine)
    if engine.last_event_name is Events.TERMINATE_SINGLE_EPOCH:  # after which ignite has made an iterator
        progress.needs_iterator = False
        note_sampler_start(engine, is_drawn=False)
    if event in _FIRST_BATCH:
        note_sampler_start(engine, is_drawn=event is Events.GET_BATCH_COMPLETED)
        progress.awaits_batch = event is Events.GET_BATCH_STARTED
        progress.needs_iterator &= progress.awaits_batch
    elif event is Events.STARTED:
        _begin_run(engine, progress)
    elif event is Events.EPOCH_STARTED:
        progress.epochs = engine.state.epoch - 1
        progress.epoch_began_at = progress.trained - _num_trained_in_epoch(engine, progress)
        progress.has_epoch_begun, progress.is_rest_done = True, False
        if get_iterator(engine) is None:  # ignite makes it after this event
            _begin_first_pass(progress)
            progress.needs_iterator = True
            _count_for_sampler(engine, progress)
        progress.resumed = None
    elif event is Events.DATALOADER_STOP_ITERATION:
        progress.end_pass()
    elif event is Events.TERMINATE_SINGLE_EPOCH:
        _terminate_epoch(engine, progress)
    elif event is Events.EPOCH_COMPLETED:
        _end_epoch(engine, progress)
        if engine.last_event_name is Events.GET_BATCH_STARTED:  # data without a length are exhausted
            progress.end_pass()


def note_sampler_start(engine: Engine, *, is_drawn: bool) -> None:
    """Note the position or epoch at which the present iterator's sampler started, if it has drawn its first index.

    Another engine may iterate over the same loader afterwards, as an evaluator does, or a handler change the epoch. A
    loader with workers draws indices when its iterator is made, another one with its first batch: `is_drawn` is True
    after that.
    """
    progress, data = progress_of(engine), engine.state.dataloader
    if not is_drawn and not getattr(data, "num_workers", 0):
        return
    sampler, other = find_resumable(data), find_epoch_sampler(data)
    if sampler is not None and progress.sampler_start is None:
        progress.sampler_start = sampler.distckpt_start
    if other is not None and progress.pass_epoch is None:
        progress.pass_epoch = other.epoch


def _count_for_sampler(engine: Engine, progress: Progress) -> None:
    """Let the state of the data's ResumableSampler, too, count trained samples."""
    data, reference = engine.state.dataloader, weakref.ref(engine)

    def is_iterating() -> bool:
        counting = reference()
        return counting is not None and get_iterator(counting) is not None

    sampler = find_resumable(data)
    if sampler is not None:
        sampler.distckpt_set_engine(lambda: _sampler_position(sampler, data, progress), is_iterating)


def _begin_run(engine: Engine, progress: Progress) -> None:
    progress.trained, progress.epochs = engine.state.iteration, engine.state.epoch
    num_trained = _num_trained_in_epoch(engine, progress)
    progress.epoch_began_at = progress.trained - num_trained
    progress.has_epoch_begun = num_trained > 0 if progress.resumed is None else progress.resumed.epoch_begun
    _begin_first_pass(progress)
    progress.needs_iterator = get_iterator(engine) is None


def _begin_first_pass(progress: Progress) -> None:
    progress.begin_pass()
    if progress.resumed is not None:
        progress.pass_began_at -= progress.resumed.batches or 0
        progress.pass_epoch = progress.resumed.pass_epoch


def _end_epoch(engine: Engine, progress: Progress) -> None:
    # ignite skips an iteration that was started and not trained: the next one has the following number.
    progress.trained, progress.epochs, progress.has_epoch_begun = engine.state.iteration, engine.state.epoch, False


def _terminate_epoch(engine: Engine, progress: Progress) -> None:
    _end_epoch(engine, progress)
    progress.end_pass()
    if engine.should_terminate_single_epoch != "skip_epoch_completed":  # which is still to come
        progress.epochs, progress.has_epoch_begun = engine.state.epoch - 1, True


def _num_trained_in_epoch(engine: Engine, progress: Progress) -> int:
    """Return the number of iterations of the next epoch that are trained before it starts, as ignite counts them."""
    if progress.resumed is not None:
        return progress.resumed.in_epoch
    if get_iterator(engine) is not None:  # set after the run's first epoch
        return 0
    init_iter = get_init_iter(engine)
    if init_iter is not None:  # set where a terminated run continues
        return init_iter
    length = engine.state.epoch_length
    return progress.trained % length if length else progress.trained


def num_completed_epochs(engine: Engine) -> int:
    """Return the number of epochs whose last batch is trained. Rank-local."""
    progress = progress_of(engine)
    return progress.epochs + (progress.has_epoch_begun and not _is_epoch_under_way(engine, progress))


def _is_epoch_under_way(engine: Engine, progress: Progress) -> bool:
    """Return True if an epoch was started and has more iterations to train."""
    in_epoch = progress.trained - progress.epoch_began_at
    is_left = in_epoch != engine.state.epoch_length and not engine.should_terminate_single_epoch
    return progress.has_epoch_begun and is_left


def position_of(engine: Engine) -> dict[str, Any]:
    """Return what the engine has trained, as plain JSON for a checkpoint's record. Rank-local.

    Returns:
        The attributes of :class:`~distckpt.handlers.resume_point.ResumePoint`.
    """
    progress, state, data = progress_of(engine), engine.state, getattr(engine.state, "dataloader", None)
    is_under_way = _is_epoch_under_way(engine, progress)
    is_terminated = progress.has_epoch_begun and bool(engine.should_terminate_single_epoch)
    is_end_skipped = engine.should_terminate_single_epoch == "skip_epoch_completed"
    batches, length = progress.trained - progress.pass_began_at, num_batches_of(data)
    is_pass_end_due = data is not None and 0 < batches == length and not is_terminated
    batches = length or 0 if is_terminated else batches  # ignite makes a new iterator then
    event = engine.last_event_name
    has_iteration_begun = state.iteration > progress.trained and not is_terminated
    is_drawn = has_iteration_begun or (event is Events.GET_BATCH_COMPLETED and not is_terminated)
    has_iterator = not progress.needs_iterator or event is Events.GET_BATCH_STARTED
    has_pass_begun = batches != length and not is_terminated and (batches > 0 or is_drawn or has_iterator)
    batches = 0 if data is None or batches == length else batches
    size, total, sampler = batch_size_of(data), num_samples_of(data), find_resumable(data)
    samples = None if size is None else batches * size
    is_end_due = progress.has_epoch_begun and not is_under_way and not is_end_skipped
    return {
        "trained": state.iteration if is_terminated else progress.trained,
        "epoch": num_completed_epochs(engine),
        "in_epoch": progress.trained - progress.epoch_began_at if is_under_way else 0,
        "epoch_begun": is_under_way,
        "is_end_due": is_end_due,
        "is_rest_done": is_end_due and progress.is_rest_done,
        "pass_begun": data is not None and has_pass_begun,
        "iteration_begun": has_iteration_begun,
        "is_drawn": is_drawn,
        "epoch_length": state.epoch_length,
        "batches": batches,
        "samples": samples if samples is None or total is None else min(samples, total),
        "length": length,
        "batch_size": size,
        "num_samples": total,
        "event": None if event is None else str(getattr(event, "name", event)),
        "scale": progress.scale,
        "seed": getattr(state, "seed", None) if isinstance(engine, DeterministicEngine) else None,
        "world_size": current().world_size,
        "sampler": None if sampler is None else _sampler_position(sampler, data, progress),
        "is_pass_end_due": is_pass_end_due,
        "pass_epoch": progress.pass_epoch if data is not None and has_pass_begun else None,
        "sampler_epoch": getattr(find_epoch_sampler(data), "epoch", None),
        **(shown_numbers(state) if is_end_due or (is_under_way and state.epoch_length is None) else {}),
    }


def _sampler_position(sampler: ResumableSampler, data: Any, progress: Progress) -> dict[str, Any]:
    num_trained = _num_samples_trained(data, progress)
    if not num_trained and progress.sampler_start is None:  # the iterator draws its first index after all others'
        num_trained = None
    return sampler.distckpt_position(num_trained, progress.sampler_start)


def _num_samples_trained(data: Any, progress: Progress) -> int | None:
    """Return the number of samples of the present iterator that were trained; None if the next batch starts a pass."""
    is_exhausted = progress.needs_iterator and progress.trained == progress.iterator_began_at
    if is_exhausted or progress.trained - progress.pass_began_at == num_batches_of(data):
        return None
    return (progress.trained - progress.iterator_began_at) * (batch_size_of(data) or 1)
