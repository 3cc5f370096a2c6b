"""How far an engine's run is: iterations, epochs, and the present pass over the data, counted as they happen.

ignite keeps one number, ``state.iteration``. It is raised before a batch is trained, and tells neither how many batches
of a pass were trained, nor where an epoch began after ``terminate_epoch()``. These counters do. They are kept on the
engine by the hook around its events in :mod:`distckpt.handlers.firing`, and cost one assignment an iteration.

A pass begins where ignite makes a new iterator over the data. It need not be an epoch: ``epoch_length`` may be another
than the data's length.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ignite.engine import Engine, Events

from distckpt.backends.detect import current

__all__ = ["Progress", "batch_size_of", "length_of", "position_of", "progress_of", "samplers_of"]

_ATTRIBUTE = "_distckpt_progress"


@dataclass(slots=True)
class Progress:
    """The counters of one engine.

    Attributes:
        trained: iterations trained in the run; the next one has the following number.
        epoch_began_at: `trained` as the present epoch began.
        pass_began_at: `trained` as the present pass over the data began. Negative where a resumed run has begun it with
            larger batches.
        iterator_began_at: `trained` as the present iterator was made.
        is_epoch_over: whether no more of the present epoch is to come.
        needs_iterator: whether a new iterator is to be made before the next batch, unless one was trained since.
        scale: how often the number of iterations in an epoch was changed by a resume.
    """

    trained: int = 0
    epoch_began_at: int = 0
    pass_began_at: int = 0
    iterator_began_at: int = 0
    is_epoch_over: bool = True
    needs_iterator: bool = True
    scale: int = 0

    @property
    def is_pass_over(self) -> bool:
        """Whether a new iterator is to be made before the next batch."""
        return self.needs_iterator and self.trained == self.iterator_began_at

    def begin_pass(self) -> None:
        """Count from here on batches of a new iterator."""
        self.pass_began_at = self.iterator_began_at = self.trained
        self.needs_iterator = False

    def end_pass(self) -> None:
        """Count the batches that follow to a new pass."""
        self.pass_began_at = self.iterator_began_at = self.trained
        self.needs_iterator = True


def progress_of(engine: Engine) -> Progress:
    """Return the engine's counters; before its first run, those of an engine that stands at its ``state``."""
    progress: Progress | None = vars(engine).get(_ATTRIBUTE)
    if progress is None:
        progress = vars(engine)[_ATTRIBUTE] = Progress()
        _begin_run(engine, progress)
    return progress


def count_event(engine: Engine, event: Any) -> None:
    """Count an event that is not one of each iteration's, before its handlers. Called by the hook around events."""
    progress = progress_of(engine)
    if event is Events.STARTED:
        _begin_run(engine, progress)
    elif event is Events.EPOCH_STARTED:
        progress.epoch_began_at = progress.trained
        progress.is_epoch_over = False
        if engine._dataloader_iter is None:  # noqa: SLF001 - ignite makes it after this event; no public way to ask
            progress.begin_pass()
    elif event is Events.DATALOADER_STOP_ITERATION:
        progress.end_pass()
    elif event is Events.TERMINATE_SINGLE_EPOCH:
        # An iteration that was begun and not trained is passed over: the next one counts on from it.
        progress.trained = engine.state.iteration
        progress.is_epoch_over = True
        progress.end_pass()
    elif event is Events.EPOCH_COMPLETED:
        progress.trained = engine.state.iteration
        progress.is_epoch_over = True
        if engine.last_event_name is Events.GET_BATCH_STARTED:  # data without a length have come to their end
            progress.end_pass()


def _begin_run(engine: Engine, progress: Progress) -> None:
    progress.trained = progress.epoch_began_at = engine.state.iteration
    progress.is_epoch_over = True
    progress.end_pass()


def position_of(engine: Engine) -> dict[str, Any]:
    """Return which data the engine has trained, as plain JSON for a checkpoint's record. Rank-local.

    Returns:
        trained: iterations trained in the run. The engine's own ``iteration`` may be one more.
        epoch: epochs that are over.
        in_epoch: iterations trained in the epoch that has begun; 0 between two epochs.
        epoch_length: the engine's; None where it is not known yet.
        batches: batches trained in this pass over the data; 0 where the next batch begins a new pass.
        samples: samples trained in this pass; None where the loader has no batch size.
        length: of the loader in batches; None if it has none.
        batch_size: of the loader; None if it has none.
        is_drawn: whether the batch that follows has been drawn.
        event: the event on which this is asked; None outside of a run.
        scale: see :class:`Progress`.
        world_size: number of ranks of the job.
        sampler: the position of a sampler that knows how to go on, see :func:`samplers_of`; None without one.
    """
    progress, state, data = progress_of(engine), engine.state, getattr(engine.state, "dataloader", None)
    in_epoch = progress.trained - progress.epoch_began_at
    is_over = progress.is_epoch_over or in_epoch == state.epoch_length
    batches, length, batch_size = progress.trained - progress.pass_began_at, length_of(data), batch_size_of(data)
    event = engine.last_event_name
    is_drawn = state.iteration > progress.trained or event is Events.GET_BATCH_COMPLETED
    return {
        "trained": progress.trained,
        "epoch": state.epoch if is_over else max(0, state.epoch - 1),
        "in_epoch": 0 if is_over else in_epoch,
        "epoch_length": state.epoch_length,
        "batches": 0 if batches == length else batches,
        "samples": 0 if batches == length else samples_in(data, batches),
        "length": length,
        "batch_size": batch_size,
        "is_drawn": is_drawn,
        "event": None if event is None else str(getattr(event, "name", event)),
        "scale": progress.scale,
        "world_size": current().world_size,
        "sampler": _sampler_position(data, progress),
    }


def length_of(data: Any) -> int | None:
    """Return the number of batches in a pass over the data; None where that is unknown."""
    try:
        return len(data)
    except TypeError:
        return None


def batch_size_of(data: Any) -> int | None:
    """Return the number of samples in a loader's batch; None where it tells none."""
    for one in (data, getattr(data, "batch_sampler", None)):
        size = getattr(one, "batch_size", None)
        if isinstance(size, int) and not isinstance(size, bool) and size > 0:
            return size
    return None


def samples_in(data: Any, batches: int) -> int | None:
    """Return the number of samples in the first batches of a pass; None where the loader has no batch size."""
    size = batch_size_of(data)
    if size is None:
        return None
    its = [one for one in samplers_of(data) if one is not getattr(data, "batch_sampler", None)]
    total = length_of(its[-1]) if its else None
    return batches * size if total is None else min(batches * size, total)


def samplers_of(data: Any) -> Iterator[Any]:
    """Yield what a loader draws its indices from: its batch sampler, and the samplers within. The innermost is last."""
    seen: set[int] = set()
    one = getattr(data, "batch_sampler", None)
    if one is None:
        one = getattr(data, "sampler", None)
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = getattr(one, "sampler", None)


def _sampler_position(data: Any, progress: Progress) -> Any:
    """Ask the sampler that has ``distckpt_position``.

    It is called with the number of samples that this rank has trained since the sampler's last ``__iter__``, or None
    where the pass is over and the sampler's next ``__iter__`` begins a new one.
    """
    for one in samplers_of(data):
        if hasattr(one, "distckpt_position"):
            since = (progress.trained - progress.iterator_began_at) * (batch_size_of(data) or 1)
            return one.distckpt_position(None if progress.is_pass_over else since)
    return None
