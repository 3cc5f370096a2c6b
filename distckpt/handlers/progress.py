"""How far an engine's run is: iterations, epochs, and the present pass over the data, counted as they happen.

ignite keeps one number, ``state.iteration``. It is raised before a batch is trained, and tells neither how many batches
of a pass were trained, nor where an epoch began after ``terminate_epoch()``. These counters do. They are kept on the
engine by the hook around its events in :mod:`distckpt.handlers.ignite_hooks`, and cost two assignments an iteration.

A pass begins where ignite makes a new iterator over the data. It need not be an epoch: ``epoch_length`` may be another
than the data's length.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ignite.engine import DeterministicEngine, Engine, Events

from distckpt.backends.detect import current
from distckpt.handlers.ignite_hooks import get_init_iter, get_iterator
from distckpt.samplers import find_resumable

__all__ = [
    "Progress",
    "Resumption",
    "batch_size_of",
    "count_event",
    "epochs_over",
    "go_on",
    "length_of",
    "num_samples_of",
    "position_of",
    "progress_of",
    "samplers_of",
]

_ATTRIBUTE = "_distckpt_progress"


@dataclass(slots=True)
class Progress:
    """The counters of one engine.

    Attributes:
        trained: iterations trained in the run; the next one has the following number.
        epochs: epochs that are over.
        epoch_began_at: `trained` as the present epoch began.
        has_epoch_begun: whether an epoch has begun and is not over.
        pass_began_at: `trained` as the present pass over the data began; negative where a resumed run has fewer
            iterations than the one that began the pass.
        iterator_began_at: `trained` as the present iterator was made.
        needs_iterator: whether a new iterator is to be made before the next batch, unless one was trained since.
        scale: how often a resume has changed what an iteration counts for.
        resumed: what the next run goes on with; None for a run that begins where ignite would.
    """

    trained: int = 0
    epochs: int = 0
    epoch_began_at: int = 0
    has_epoch_begun: bool = False
    pass_began_at: int = 0
    iterator_began_at: int = 0
    needs_iterator: bool = True
    scale: int = 0
    resumed: "Resumption | None" = None

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
        self.begin_pass()
        self.needs_iterator = True


class Resumption(NamedTuple):
    """What a resumed run has behind it.

    Attributes:
        in_epoch: iterations trained in the epoch that has begun.
        batches: batches trained in the pass that has begun.
        has_epoch_begun: whether an epoch has begun, of which nothing may be trained yet.
    """

    in_epoch: int
    batches: int
    has_epoch_begun: bool


def progress_of(engine: Engine) -> Progress:
    """Return the engine's counters; before its first run, those of an engine that stands at its ``state``."""
    progress: Progress | None = vars(engine).get(_ATTRIBUTE)
    if progress is None:
        progress = vars(engine)[_ATTRIBUTE] = Progress()
        _begin_run(engine, progress)
    return progress


def go_on(engine: Engine, resumed: Resumption | None, scale: int = 0) -> None:
    """Let the engine's next run, which begins at its ``state``, count on from what was trained before.

    Args:
        engine: it does not run.
        resumed: see :class:`Resumption`; None takes back what was said before.
        scale: see :class:`Progress`.
    """
    progress = progress_of(engine)
    progress.resumed, progress.scale = resumed, scale
    _begin_run(engine, progress)


def count_event(engine: Engine, event: Any) -> None:
    """Count an event that is not one of each iteration's, before its handlers. Called by the hook around events."""
    progress = progress_of(engine)
    if engine.last_event_name is Events.TERMINATE_SINGLE_EPOCH:  # after which ignite has made an iterator
        progress.needs_iterator = False
    if event is Events.STARTED:
        _begin_run(engine, progress)
    elif event is Events.EPOCH_STARTED:
        progress.epochs = engine.state.epoch - 1
        progress.epoch_began_at = progress.trained - _behind(engine, progress)
        progress.has_epoch_begun = True
        if get_iterator(engine) is None:  # ignite makes it after this event
            _begin_first_pass(progress)
            progress.needs_iterator = True
            _follow(engine.state.dataloader, progress)
        progress.resumed = None
    elif event is Events.DATALOADER_STOP_ITERATION:
        progress.end_pass()
    elif event is Events.TERMINATE_SINGLE_EPOCH:
        _end_epoch(engine, progress)
        progress.end_pass()
    elif event is Events.EPOCH_COMPLETED:
        _end_epoch(engine, progress)
        if engine.last_event_name is Events.GET_BATCH_STARTED:  # data without a length have come to their end
            progress.end_pass()


def _begin_run(engine: Engine, progress: Progress) -> None:
    progress.trained, progress.epochs = engine.state.iteration, engine.state.epoch
    behind = _behind(engine, progress)
    progress.epoch_began_at = progress.trained - behind
    progress.has_epoch_begun = behind > 0 if progress.resumed is None else progress.resumed.has_epoch_begun
    _begin_first_pass(progress)
    progress.needs_iterator = get_iterator(engine) is None


def _begin_first_pass(progress: Progress) -> None:
    progress.begin_pass()
    if progress.resumed is not None:
        progress.pass_began_at -= progress.resumed.batches


def _end_epoch(engine: Engine, progress: Progress) -> None:
    # An iteration that was begun and not trained is passed over: the next one counts on from it.
    progress.trained, progress.epochs, progress.has_epoch_begun = engine.state.iteration, engine.state.epoch, False


def _behind(engine: Engine, progress: Progress) -> int:
    """Return how many iterations of the epoch that is about to begin are behind the run, as ignite takes it."""
    if progress.resumed is not None:
        return progress.resumed.in_epoch
    if get_iterator(engine) is not None:  # set after the run's first epoch
        return 0
    init_iter = get_init_iter(engine)
    if init_iter is not None:  # set where a terminated run goes on
        return init_iter
    length = engine.state.epoch_length
    return progress.trained % length if length else progress.trained


def epochs_over(engine: Engine) -> int:
    """Return how many epochs are over. One whose last batch is trained is. Rank-local."""
    progress = progress_of(engine)
    return progress.epochs + (progress.has_epoch_begun and not _has_more_to_train(engine, progress))


def _has_more_to_train(engine: Engine, progress: Progress) -> bool:
    """Return True if an epoch has begun, and neither its last batch is trained nor it was terminated."""
    in_epoch = progress.trained - progress.epoch_began_at
    is_left = in_epoch != engine.state.epoch_length and not engine.should_terminate_single_epoch
    return progress.has_epoch_begun and is_left


def position_of(engine: Engine) -> dict[str, Any]:
    """Return which data the engine has trained, as plain JSON for a checkpoint's record. Rank-local.

    Returns:
        trained: iterations trained in the run. The engine's own ``iteration`` may be one more.
        epoch: epochs that are over.
        in_epoch: iterations trained in the epoch that has begun; 0 between two epochs.
        epoch_begun: whether an epoch has begun, of which nothing may be trained yet.
        is_end_due: whether the last batch of an epoch is trained, and EPOCH_COMPLETED is still to come.
        pass_begun: whether the iterator over the data was made, and has more to give.
        iteration_begun: whether an iteration has begun and is not trained.
        is_drawn: whether the batch that follows has been drawn.
        epoch_length: the engine's; None where it is not known yet.
        batches: batches trained in this pass over the data; 0 where the next batch begins a new pass.
        samples: samples trained in this pass; None where the loader has no batch size.
        length: of the loader in batches; None if it has none.
        batch_size: of the loader; None if it has none.
        num_samples: in a pass; None where the loader does not tell.
        event: the event on which this is asked; None outside of a run.
        scale: see :class:`Progress`.
        seed: of a DeterministicEngine's run; else None.
        world_size: number of ranks of the job.
        sampler: the position of a sampler that knows how to go on; None without one.
    """
    progress, state, data = progress_of(engine), engine.state, getattr(engine.state, "dataloader", None)
    in_epoch = progress.trained - progress.epoch_began_at
    is_terminated = progress.has_epoch_begun and bool(engine.should_terminate_single_epoch)
    has_begun = _has_more_to_train(engine, progress)
    batches, length = progress.trained - progress.pass_began_at, length_of(data)
    batches = length or 0 if is_terminated else batches  # ignite makes a new iterator then
    event = engine.last_event_name
    has_iteration_begun = state.iteration > progress.trained and not is_terminated
    is_drawn = has_iteration_begun or (event is Events.GET_BATCH_COMPLETED and not is_terminated)
    has_iterator = not progress.needs_iterator or event is Events.GET_BATCH_STARTED
    has_pass_begun = batches != length and not is_terminated and (batches > 0 or is_drawn or has_iterator)
    batches = 0 if data is None or batches == length else batches
    return {
        "trained": state.iteration if is_terminated else progress.trained,
        "epoch": epochs_over(engine),
        "in_epoch": in_epoch if has_begun else 0,
        "epoch_begun": has_begun,
        "is_end_due": progress.has_epoch_begun and not has_begun,
        "pass_begun": data is not None and has_pass_begun,
        "iteration_begun": has_iteration_begun,
        "is_drawn": is_drawn,
        "epoch_length": state.epoch_length,
        "batches": batches,
        "samples": samples_in(data, batches),
        "length": length,
        "batch_size": batch_size_of(data),
        "num_samples": num_samples_of(data),
        "event": None if event is None else str(getattr(event, "name", event)),
        "scale": progress.scale,
        "seed": getattr(state, "seed", None) if isinstance(engine, DeterministicEngine) else None,
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


def num_samples_of(data: Any) -> int | None:
    """Return the number of samples that a loader's sampler gives in a pass; None where that is unknown."""
    its = [one for one in samplers_of(data) if one is not getattr(data, "batch_sampler", None)]
    return length_of(its[-1]) if its else None


def samples_in(data: Any, batches: int) -> int | None:
    """Return the number of samples in the first batches of a pass; None where the loader has no batch size."""
    size, total = batch_size_of(data), num_samples_of(data)
    if size is None:
        return None
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


def _sampler_position(data: Any, progress: Progress) -> dict[str, Any] | None:
    sampler = find_resumable(data)
    return None if sampler is None else sampler.distckpt_position(_samples_since(data, progress))


def _samples_since(data: Any, progress: Progress) -> int | None:
    """Return how many samples of the present iterator were trained; None where the next batch begins a new pass."""
    if progress.is_pass_over or progress.trained - progress.pass_began_at == length_of(data):
        return None
    return (progress.trained - progress.iterator_began_at) * (batch_size_of(data) or 1)


def _follow(data: Any, progress: Progress) -> None:
    """Let a sampler of ours count what is trained, where it is itself among the objects of a checkpoint."""
    sampler = find_resumable(data)
    if sampler is not None:
        sampler.distckpt_follow(lambda: _samples_since(data, progress))
