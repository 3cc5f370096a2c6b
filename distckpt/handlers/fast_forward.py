"""The first epoch of a resumed run: which batches it has had already, and what was drawn at random before.

Owns what ignite leaves out when a run goes on in the middle of an epoch (pytorch-ignite 0.5.5): it counts on from
where the run was, but begins the data anew, so that the epoch would see its first batches twice and its last ones
never. Rank-local; issues no collectives. Layer L5.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ignite.engine import Engine, Events
from torch.utils.data import RandomSampler

from distckpt.backends.detect import current
from distckpt.handlers.firing import after_event
from distckpt.handlers.rng_state import RngState
from distckpt.log_level import level_on

__all__ = ["FastForward"]

_logger = logging.getLogger(__name__)


class FastForward:
    """Handlers that act once, in the first epoch of the engine's next run, and are gone then.

    1. EPOCH_STARTED, before all others: at the border of two epochs the generators are set to what was loaded. What
       other handlers of the event draw comes after that, as in a run that goes through.
    2. EPOCH_STARTED, after all others, when ignite is about to make the iterator: in the middle of a pass over the
       data the generators are set to what they were as the pass began, so that it has the same order.
    3. GET_BATCH_STARTED: the batches that were trained already are drawn and dropped, then the generators are set to
       what was loaded. Without data: ITERATION_STARTED, and there is nothing to drop.

    Nothing of it happens if the run begins at another iteration.

    Args:
        engine: it has been restored.
        generators: they have been loaded.
        skip_batches: whether to drop the batches; without, the data know by themselves where to go on.
    """

    def __init__(self, engine: Engine, generators: Sequence[RngState], *, skip_batches: bool) -> None:
        self._iteration = engine.state.iteration
        self._generators = list(generators)
        self._skip_batches = skip_batches
        self._is_mid_epoch = False
        self._num_seen = 0
        self._targets: list[Callable[[], None]] = []
        for one in _on(engine):  # of an earlier resume, and no run since
            one.detach(engine)
        for event, handler in self._handlers():
            engine.add_event_handler(event, handler)
            handlers = engine._event_handlers[event]  # noqa: SLF001 - there is no public way to be the first
            handlers.insert(0, handlers.pop())

    def detach(self, engine: Engine) -> None:
        """Take the handlers off the engine."""
        for event, handler in self._handlers():
            if engine.has_event_handler(handler, event):
                engine.remove_event_handler(handler, event)

    def _handlers(self) -> list[tuple[Events, Callable[[Engine], None]]]:
        return [
            (Events.EPOCH_STARTED, self._begin_epoch),
            (Events.GET_BATCH_STARTED, self._begin_batches),
            (Events.ITERATION_STARTED, self._begin_iteration),
        ]

    def _begin_epoch(self, engine: Engine) -> None:
        if engine.state.iteration != self._iteration:
            self.detach(engine)
            return
        length = engine.state.epoch_length
        self._is_mid_epoch = bool(self._iteration % length if length else self._iteration)
        if not self._is_mid_epoch:
            self._put_back()
        after_event(engine, self._before_iterator)

    def _before_iterator(self, engine: Engine) -> None:
        data = engine.state.dataloader
        if data is None:
            return
        self._num_seen = self._position_in(data, engine.state.epoch_length)
        if self._is_mid_epoch:
            self._put_back()
        self._targets = [one.now() for one in self._generators]
        if self._num_seen:
            self._warn_of_order(data)
            for one in self._generators:
                one.begin_pass(self._iteration - self._num_seen)

    def _position_in(self, data: Any, epoch_length: int | None) -> int:
        """Return how many batches of the pass under way have been trained."""
        began_at = next((one.pass_began_at for one in self._generators if one.pass_began_at is not None), None)
        length = _length_of(data)
        if began_at is None:  # then passes are taken to be epochs, if the data do not tell their length
            began_at, length = 0, length or epoch_length or 0
        num_since = self._iteration - began_at
        return num_since % length if length else num_since

    def _warn_of_order(self, data: Any) -> None:
        sampler = getattr(data, "sampler", None)
        if not isinstance(sampler, RandomSampler) or any(one.pass_began_at is not None for one in self._generators):
            return
        warnings.warn(
            "resume: the order of the begun epoch is not known: a DataLoader(shuffle=True) draws it from torch's "
            "generator as the epoch begins. Some samples will come twice and others not at all in this epoch. Save an "
            "RngState(trainer) with the other objects, or use a DistributedSampler",
            stacklevel=2,
        )

    def _begin_batches(self, engine: Engine) -> None:
        self.detach(engine)
        if engine.state.iteration != self._iteration or not self._num_seen:
            return
        if self._skip_batches:
            self._skip(engine)
        for put_back in self._targets:
            put_back()

    def _skip(self, engine: Engine) -> None:
        iterator: Iterator[Any] = engine._dataloader_iter  # type: ignore[assignment]  # noqa: SLF001 - it is private, and made by now
        num_skipped = 0
        for _ in range(self._num_seen):
            try:
                next(iterator)
            except StopIteration:
                warnings.warn(
                    f"resume: {self._num_seen} batches of this pass over the data were trained before, but the data "
                    f"ended after {num_skipped}. Are they the same data, in batches of the same size?",
                    stacklevel=2,
                )
                break
            num_skipped += 1
        _logger.log(
            level_on(current().rank, {0}),
            "resume: dropped %d batches of epoch %d that were trained before",
            num_skipped,
            engine.state.epoch,
        )

    def _begin_iteration(self, engine: Engine) -> None:
        # Reached without data only; the iteration has been counted.
        self.detach(engine)
        if engine.state.iteration == self._iteration + 1 and self._is_mid_epoch:
            self._put_back()

    def _put_back(self) -> None:
        for one in self._generators:
            one.put_back()


def _on(engine: Engine) -> list[FastForward]:
    handlers = engine._event_handlers.get(Events.EPOCH_STARTED, ())  # noqa: SLF001 - no public list of them
    owners = [getattr(handler, "__self__", None) for handler, *_ in handlers]
    return [owner for owner in owners if isinstance(owner, FastForward)]


def _length_of(data: Any) -> int:
    """Return the number of batches in a pass over the data; 0 where that is unknown."""
    try:
        return len(data)
    except TypeError:
        return 0
