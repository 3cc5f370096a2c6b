"""The first run of a resumed engine: where it goes on in the data, and what was drawn at random before.

ignite (pytorch-ignite 0.5.5) counts on from the engine's iteration, and begins the data anew: a begun epoch would see
its first batches twice and its last ones never. A run that had ended would begin once more at iteration 0. What is
mended here happens in the engine's first run after the resume, and never again.
"""

import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from ignite.engine import DeterministicEngine, Engine, Events, State
from ignite.engine.deterministic import _set_rng_states  # what the engine itself calls
from torch.utils.data import IterableDataset
from torch.utils.data.dataloader import _SingleProcessDataLoaderIter

from distckpt._messages import log_level
from distckpt.backends.detect import current
from distckpt.coordination import phases
from distckpt.handlers.data_loaders import (
    end_pass,
    make_workers,
    sampler_that_draws,
    warn_of_order,
    warn_of_ranks,
    warn_of_workers,
)
from distckpt.handlers.engine_events import after_event, set_start_hook
from distckpt.handlers.ignite_hooks import add_first_handler, get_handlers, get_iterator, set_init_iter
from distckpt.handlers.progress import Resumption, go_on, length_of, samplers_of
from distckpt.handlers.restored_state import Restored
from distckpt.handlers.resume_point import StartPoint, fit_to_data
from distckpt.handlers.rng_state import RngState
from distckpt.samplers import batches_left, find_resumable

__all__ = ["FastForward"]

_logger = logging.getLogger(__name__)


class FastForward:
    """What a resumed engine's next run does once, and is gone then.

    1. Before ``run()`` does anything: return where nothing is left to do. Find the place in the data that are given; if
       it cannot be told, raise on all ranks. Note what the restored objects are.
    2. STARTED, after all other handlers: put back what these have changed.
    3. EPOCH_STARTED, before all others: at the border of two epochs the generators are set to what was loaded. What
       other handlers of the event draw comes after that, as in a run that goes through.
    4. EPOCH_STARTED, after all others, when ignite is about to make the iterator: in an epoch that had begun, put back
       what these handlers have changed. In the middle of a pass over the data the generators are set to what they were
       as the pass began, so that it has the same order.
    5. GET_BATCH_STARTED: the batches that were trained already are drawn and dropped, then the generators are set to
       what was loaded. If the next batch had been drawn, that is done after it is drawn.
    6. ITERATION_STARTED: without data, the generators are set here. If the iteration had begun, put back what the
       handlers have changed.

    Nothing of it happens if the run begins at another iteration.

    Args:
        engine: it has been restored.
        start: what the run has behind it.
        restored: the objects that have been restored.
        skip_batches: whether to drop the batches; without, the data know by themselves where to go on.
        timeout_s: seconds to wait for the other ranks; None for the default.
    """

    def __init__(
        self,
        engine: Engine,
        start: StartPoint,
        restored: Restored,
        *,
        skip_batches: bool,
        timeout_s: float | None,
    ) -> None:
        self._start = self._recorded = start
        self._loaded = restored.objects
        self._generators = [one for one in self._loaded if isinstance(one, RngState)]
        self._restored = restored
        self._skip_batches = skip_batches
        self._timeout_s = timeout_s
        self._has_given_out = False
        self._is_reset = False
        self._num_seen = 0
        self._targets: list[Callable[[], None]] = []
        self._rng_states: Any = None
        for one in _on(engine):  # of an earlier resume, and no run since
            one.detach(engine)
        self._place(engine)
        set_start_hook(engine, self)
        for event, handler in self._handlers():
            add_first_handler(engine, event, handler)

    def detach(self, engine: Engine) -> None:
        """Take the handlers off the engine, and let it begin its epochs by itself."""
        set_start_hook(engine, None)
        for event, handler in self._handlers():
            if engine.has_event_handler(handler, event):
                engine.remove_event_handler(handler, event)

    def _handlers(self) -> list[tuple[Events, Callable[[Engine], None]]]:
        return [
            (Events.STARTED, self._begin_run),
            (Events.EPOCH_STARTED, self._begin_epoch),
            (Events.GET_BATCH_STARTED, self._begin_batches),
            (Events.GET_BATCH_COMPLETED, self._end_batch),
            (Events.ITERATION_STARTED, self._begin_iteration),
        ]

    # -- before the run ----------------------------------------------------------------------------

    def before_run(
        self,
        engine: Engine,
        data: Any = None,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        epoch_length: int | None = None,
    ) -> State | None:
        """Collective. Find where the run goes on, once its arguments are known.

        Args:
            engine: its ``run()`` was called.
            data: as the other arguments, what that was given.
            max_epochs: see there.
            max_iters: see there.
            epoch_length: see there.

        Returns:
            The engine's state if nothing is left to do; None if the run is to begin.

        Raises:
            ValueError: the place in the data cannot be told; on every rank.
        """
        state = engine.state
        is_begun_anew = state.max_epochs is None and state.max_iters is None and state.iteration > 0
        if state.iteration != self._start.trained or is_begun_anew:
            self._leave(engine)
            return None
        if get_iterator(engine) is not None:  # set_data() was called
            data = state.dataloader
        start = self._recorded
        ends = (max_epochs or state.max_epochs, max_iters or state.max_iters)
        backend = current()
        fitted: list[StartPoint] = []

        def look() -> bool:
            if start.is_at_end(*ends):
                return True
            fitted.append(self._fit(start, engine, data, epoch_length))
            return False

        place = phases.SyncPoint(handler="resume", phase="finding where the run goes on", step=0)
        are_at_end = phases.run(backend, place, look, timeout_s=self._timeout_s)
        if start.is_end_due:
            _logger.log(
                log_level(backend.rank, {0}),
                "resume: the checkpoint was saved before EPOCH_COMPLETED of epoch %d: its handlers do not run for it. "
                "Save on EPOCH_COMPLETED, after them, where that matters",
                start.epoch,
            )
        if all(are_at_end):
            self._leave(engine)
            _logger.log(
                log_level(backend.rank, {0}),
                "resume: nothing is left to do: the run had come to its end, at iteration %d, epoch %d. A later run() "
                "begins anew, as in ignite",
                start.trained,
                start.epoch,
            )
            return state
        if any(are_at_end):
            ranks = [rank for rank, is_so in enumerate(are_at_end) if is_so]
            msg = (
                f"resume: the run had come to its end on ranks {ranks}, and not on the others: they trained other data"
            )
            raise ValueError(msg)
        self._start = fitted[0]
        self._place(engine)
        set_init_iter(engine, self._start.in_epoch)  # ignite derives it from the iteration
        if self._start.scale != start.scale:
            _logger.log(
                log_level(backend.rank, {0}),
                "resume: an epoch has %s iterations now, and had %s: going on at iteration %d, epoch %d",
                self._start.epoch_length,
                start.epoch_length,
                self._start.trained,
                self._start.epoch,
            )
        self._restored.note(_parts_of(data))
        return None

    def _fit(self, start: StartPoint, engine: Engine, data: Any, epoch_length: int | None) -> StartPoint:
        start = replace(start, batches=self._batches(start, data))
        return fit_to_data(
            start,
            data,
            epoch_length,
            knows_pass=self._pass_began_at is not None,
            counts_epochs=engine.state.max_iters is None,
            world_size=current().world_size,
            left=self._go_on_in(data),
        )

    def _go_on_in(self, data: Any) -> int | None:
        """Let a sampler of ours go on where the run was; return how many batches are left of its pass, or None."""
        sampler = find_resumable(data)
        if sampler is None:
            return None
        if self._recorded.sampler is not None:
            sampler.load_state_dict(self._recorded.sampler)
        return batches_left(data) if sampler.distckpt_is_positioned else None

    def _batches(self, start: StartPoint, data: Any) -> int:
        """Return how many batches of the pass under way have been trained."""
        if start.batches is not None:
            return start.batches
        began_at, length = self._pass_began_at, length_of(data)
        if began_at is None:  # then passes are taken to be epochs, if the data do not tell their length
            began_at, length = 0, length or start.epoch_length
        num_since = start.trained - began_at
        return num_since % length if length else num_since

    @property
    def _pass_began_at(self) -> int | None:
        """The iteration at which the loaded pass over the data began; None where no RngState noted it."""
        return next((one.pass_began_at for one in self._generators if one.pass_began_at is not None), None)

    def _place(self, engine: Engine) -> None:
        """Let the engine stand where the run goes on."""
        start, state = self._start, engine.state
        state.iteration, state.epoch, state.epoch_length = start.trained, start.epoch, start.epoch_length
        engine.should_terminate = False  # of the run before; ignite would begin the epoch's count anew
        go_on(engine, Resumption(start.in_epoch, start.batches or 0, start.epoch_begun), start.scale)

    def _leave(self, engine: Engine) -> None:
        """Let the next run begin as it would without a resume."""
        self.detach(engine)
        set_init_iter(engine, None)
        go_on(engine, None)

    # -- in the run --------------------------------------------------------------------------------

    def _begin_run(self, engine: Engine) -> None:
        set_start_hook(engine, None)
        self._has_given_out = False
        after_event(engine, self._after_started)

    def _after_started(self, engine: Engine) -> None:
        self._restored.put_back("STARTED")
        if self._start.seed is not None and isinstance(engine, DeterministicEngine):
            engine.state.seed = self._start.seed

    def _begin_epoch(self, engine: Engine) -> None:
        if self._has_given_out:  # an epoch without a batch came before: the data had no more to give
            self.detach(engine)
            return
        if engine.state.iteration != self._start.trained:
            self.detach(engine)
            set_init_iter(engine, None)  # a handler of STARTED has set another iteration
            return
        if self._start.epoch_begun:
            self._restored.hold_histories()
        else:
            self._put_back()
        after_event(engine, self._before_iterator)

    def _before_iterator(self, engine: Engine) -> None:
        if self._start.epoch_begun:
            self._restored.put_back("EPOCH_STARTED")
        data = engine.state.dataloader
        if data is None:
            return
        start = self._start
        self._num_seen = (start.batches or 0) if start.is_mid_pass else 0
        if start.epoch_begun:
            self._put_back()
        is_placed = self._knows_its_place(engine, data)
        if is_placed:
            self._skip_batches = False
        elif start.trained:
            warn_of_order(data, self._generators, is_mid_pass=start.is_mid_pass and self._num_seen > 0)
            warn_of_ranks(data, self._recorded.world_size, current().world_size, is_mid_pass=start.is_mid_pass)
        if not start.is_mid_pass and self._is_end_unnoticed(data):
            end_pass(data, self._generators)
        self._targets = [one.now() for one in self._generators]
        self._is_reset = self._begins_by_reset(data)
        if self._is_reset and sampler_that_draws(data) is not None:
            make_workers(data, self._generators)
            self._is_reset = False
        self._take_rng_states(engine)
        if start.is_mid_pass:
            for one in self._generators:
                one.begin_pass(start.trained - self._num_seen)

    def _take_rng_states(self, engine: Engine) -> None:
        """Keep a DeterministicEngine from setting its generators before a loader without workers draws its order."""
        if self._start.is_mid_pass and isinstance(engine, DeterministicEngine):
            self._rng_states = getattr(engine.state, "rng_states", None)
            setattr(engine.state, "rng_states", None)  # noqa: B010 - no attribute that is declared

    def _is_end_unnoticed(self, data: Any) -> bool:
        """Return True if all batches of the loaded pass were trained, and ignite had not asked for one more."""
        began_at = self._pass_began_at
        return (
            began_at is not None
            and self._recorded.trained > began_at
            and (self._recorded.trained - began_at == length_of(data))
        )

    def _begins_by_reset(self, data: Any) -> bool:
        """Return True if the pass was begun, or would have been, by workers that were there before."""
        if not getattr(data, "persistent_workers", False) or not any(one.has_state for one in self._generators):
            return False
        if self._start.is_mid_pass:
            return any(one.is_pass_begun_by_reset for one in self._generators)
        return self._start.trained > 0

    def _knows_its_place(self, engine: Engine, data: Any) -> bool:
        """Return True if the data, or what they draw their indices from, have been restored themselves."""
        sampler = find_resumable(data)
        if sampler is not None and sampler.distckpt_is_positioned:
            if self._start.is_mid_pass and self._num_seen:
                warn_of_workers(data)
            return True
        if isinstance(engine, DeterministicEngine):
            return True
        parts = [part for part in _parts_of(data) if any(part is one for one in self._loaded)]
        if self._start.is_drawn and parts:
            warnings.warn(
                f"resume: the checkpoint was saved after batch {self._start.trained + 1} was drawn and before it was "
                f"trained. {type(parts[0]).__name__} goes on after it: it is not trained. Save on ITERATION_COMPLETED",
                stacklevel=2,
            )
        is_sampler = any(part is one for part in parts for one in samplers_of(data))
        if is_sampler and getattr(data, "num_workers", None):
            warnings.warn(
                f"resume: the workers of the loader draw ahead of what is trained, and so does the state of "
                f"{type(parts[0]).__name__}: batches may never be trained. Use a distckpt.ResumableSampler",
                stacklevel=2,
            )
        return bool(parts) or self._is_held(data)

    def _is_held(self, data: Any) -> bool:
        """Return True if an object that was restored holds data that have a state of their own."""
        has_state = hasattr(data, "state_dict") and hasattr(data, "load_state_dict")
        return has_state and any(data is held for one in self._loaded for held in getattr(one, "__dict__", {}).values())

    def _begin_batches(self, engine: Engine) -> None:
        if self._has_given_out:
            return
        self._has_given_out = True
        if engine.state.iteration != self._start.trained:
            self.detach(engine)
            return
        if self._num_seen and self._skip_batches:
            self._skip(engine)
        if self._rng_states is not None:
            _draw_order(get_iterator(engine))
            _set_rng_states(self._rng_states)
        if (self._start.is_mid_pass and not self._start.is_drawn) or self._is_reset:
            self._put_back_targets()

    def _end_batch(self, engine: Engine) -> None:
        if self._start.is_drawn and not self._start.iteration_begun:
            self._put_back_targets()  # before too: a handler may save
            after_event(engine, lambda _: self._put_back_targets())

    def _skip(self, engine: Engine) -> None:
        iterator: Iterator[Any] = get_iterator(engine)  # type: ignore[assignment]  # made by now
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
            log_level(current().rank, {0}),
            "resume: dropped %d batches of epoch %d that were trained before",
            num_skipped,
            engine.state.epoch,
        )

    def _begin_iteration(self, engine: Engine) -> None:
        self.detach(engine)
        start = self._start
        if engine.state.iteration != start.trained + 1:
            return
        if engine.state.dataloader is None and start.epoch_begun:
            self._targets = [one.put_back for one in self._generators]
            self._put_back_targets()
        if start.iteration_begun:
            self._put_back_targets()  # before too: a handler may save
            self._restored.hold_histories()
            after_event(engine, self._after_iteration_started)

    def _after_iteration_started(self, engine: Engine) -> None:
        del engine
        self._restored.put_back("ITERATION_STARTED")
        self._put_back_targets()

    def _put_back(self) -> None:
        for one in self._generators:
            one.put_back()

    def _put_back_targets(self) -> None:
        for put_back in self._targets:
            put_back()


def _draw_order(iterator: Any) -> None:
    """Let a loader's iterator draw its first indices, and with them the order of the pass."""
    indices = getattr(iterator, "_sampler_iter", None)
    if isinstance(iterator, _SingleProcessDataLoaderIter) and indices is not None:
        first = list(itertools.islice(indices, 1))
        iterator._sampler_iter = itertools.chain(first, indices)  # noqa: SLF001 - there is no public way


def _parts_of(data: Any) -> Sequence[Any]:
    """Return what may know its place in the data: a loader, its samplers, its data set if that is drawn in sequence."""
    parts = [data, *samplers_of(data)]
    dataset = getattr(data, "dataset", None)
    if isinstance(dataset, IterableDataset) and not getattr(
        data, "num_workers", None
    ):  # workers draw from copies of it
        parts.append(dataset)
    return parts


def _on(engine: Engine) -> list[FastForward]:
    owners = [getattr(handler, "__self__", None) for handler in get_handlers(engine, Events.EPOCH_STARTED)]
    return [owner for owner in owners if isinstance(owner, FastForward)]
