"""The first run of a resumed engine: it continues at the resume point, with the generators and objects as restored.

ignite (pytorch-ignite 0.5.5) continues at the engine's iteration and starts a new pass over the data: an interrupted
epoch would train its first batches twice and its last ones never. A completed run would start again at iteration 0.
:class:`FastForward` corrects that in the engine's first run after a resume.
"""

import logging
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from ignite.engine import DeterministicEngine, Engine, Events, State

from distckpt._messages import log_level
from distckpt.backends.detect import current
from distckpt.coordination import phases
from distckpt.handlers.data_loaders import find_random_sampler, num_batches_of, samplers_of, stateful_parts_of
from distckpt.handlers.engine_events import after_event, set_start_hook
from distckpt.handlers.epoch_metrics import show_trained_epoch, unknown_as_nan
from distckpt.handlers.ignite_hooks import (
    add_first_handler,
    end_expectation,
    expect_run,
    get_handlers,
    get_iterator,
    set_init_iter,
    set_rng_states,
    take_rng_states,
)
from distckpt.handlers.progress import continue_from
from distckpt.handlers.restored_state import RestoredState
from distckpt.handlers.resume_point import ResumePoint, fit_to_data
from distckpt.handlers.rng_state import RngState
from distckpt.handlers.run_limits import ReachedLimits, RunLimits
from distckpt.handlers.sample_order import (
    draw_first_indices,
    exhaust_sampler,
    skip_batches,
    start_workers,
    warn_if_epoch_unknown,
    warn_if_order_differs,
    warn_if_pass_end_lost,
    warn_if_ranks_changed,
    warn_of_new_workers,
)
from distckpt.handlers.sampler_position import SamplerPosition
from distckpt.handlers.stepped_engine import end_trained_epoch
from distckpt.samplers import find_resumable

_logger = logging.getLogger(__name__)


class FastForward:
    """Handlers for a resumed engine's next run. They detach themselves when its first iteration starts.

    1. Before ``run()``: return if nothing is left to train within its limits; a call with higher limits is then the
       next run. Translate the resume point for the given data, or raise on all ranks. Capture the restored objects.
    2. STARTED, after all other handlers: restore the objects that these have changed. If the last batch of an epoch was
       trained before the save, and EPOCH_COMPLETED was not fired: set the generators to their loaded states, fire it.
    3. EPOCH_STARTED, before all other handlers, between two epochs: set the generators to their loaded states, or to
       those after step 2. Other handlers then draw the same numbers as in an uninterrupted run.
    4. EPOCH_STARTED, after all other handlers, before ignite makes the iterator: in an interrupted epoch, restore the
       objects that these have changed. In the middle of a pass, set the generators to their states from the start of
       the pass, so that its order is the same.
    5. GET_BATCH_STARTED: set the generators to their states before the first batch of the pass. Draw and drop the
       batches that are already trained, then set the generators to their loaded states. If the next batch had been
       drawn before the save, set the generators after it is drawn.
    6. ITERATION_STARTED: without data, set the generators here. If the iteration had been started before the save,
       restore the objects that handlers have changed.
    7. EPOCH_COMPLETED, if the interrupted epoch had no batch left: set the numbers in the engine's state as in step 2.

    An event in which the checkpoint was saved is restored where it was saved, not after all handlers.

    If the run starts at another iteration, the handlers do nothing. Without `skip_batches`, no batch is dropped.
    """

    def __init__(
        self,
        engine: Engine,
        point: ResumePoint,
        restored: RestoredState,
        *,
        skip_batches: bool,
        timeout_s: float | None,
    ) -> None:
        self._point = self._recorded = point
        self._restored = restored
        self._rng_states = [one for one in restored.objects if isinstance(one, RngState)]
        self._skip_batches = skip_batches
        self._timeout_s = timeout_s
        self._reached_limits = ReachedLimits(engine, restored, self._rng_states)
        self._is_saved_on_started = restored.saved.event_name == "STARTED"
        self._has_ended_epoch = False
        self._has_begun_batches = False
        self._resets_workers = False
        self._num_consumed = 0
        self._sampler = SamplerPosition(point, restored.objects)
        self._restore_generators: list[Callable[[], None]] = []
        self._restore_between_epochs: list[Callable[[], None]] = []
        self._engine_rng_states: Any = None
        self._while_unknown = ExitStack()
        for handler in get_handlers(engine, Events.EPOCH_STARTED):
            earlier = getattr(handler, "__self__", None)
            if isinstance(earlier, FastForward):  # of another resume, without a run since
                earlier.detach(engine)
        self._position_engine(engine)
        set_start_hook(engine, self)
        for event, handler in self._handlers():
            add_first_handler(engine, event, handler)

    def detach(self, engine: Engine) -> None:
        """Remove the handlers from the engine."""
        set_start_hook(engine, None)
        self._while_unknown.close()
        for event, handler in self._handlers():
            if engine.has_event_handler(handler, event):
                engine.remove_event_handler(handler, event)

    def _handlers(self) -> list[tuple[Events, Callable[[Engine], None]]]:
        return [
            (Events.STARTED, self._on_started),
            (Events.EPOCH_STARTED, self._on_epoch_started),
            (Events.GET_BATCH_STARTED, self._on_get_batch_started),
            (Events.GET_BATCH_COMPLETED, self._on_get_batch_completed),
            (Events.ITERATION_STARTED, self._on_iteration_started),
            (Events.EPOCH_COMPLETED, self._on_epoch_completed),
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
        """Collective. Translate the resume point for the arguments of ``engine.run()``.

        Returns:
            The engine's state if nothing is left to train; None to start the run.

        Raises:
            ValueError: the position in the data cannot be determined; raised on every rank.
        """
        state = engine.state
        limits = RunLimits(max_epochs or state.max_epochs, max_iters or state.max_iters)
        is_reset = state.max_epochs is None and state.max_iters is None and state.iteration > 0
        if state.iteration != self._point.trained or is_reset or not self._reached_limits.are_passed_by(limits):
            self._cancel(engine)
            return None
        self._restore_between_epochs = self._reached_limits.leave()
        if get_iterator(engine) is not None:  # set_data() was called
            data = state.dataloader
        recorded, backend = self._recorded, current()
        fitted: list[ResumePoint] = []

        def fit() -> bool:
            if recorded.is_run_complete(limits.max_epochs, limits.max_iters) and not self._is_end_due_within(limits):
                return True
            fitted.append(self._fit(engine, data, epoch_length))
            return False

        sync_point = phases.SyncPoint(handler="resume", phase="finding where the run continues", step=0)
        are_complete = phases.run(backend, sync_point, fit, timeout_s=self._timeout_s)
        level = log_level(backend.rank, {0})
        if all(are_complete):
            state.epoch = recorded.epoch + (recorded.in_epoch > 0)  # as when the run ended, maybe within an epoch
            self._reached_limits.reach(limits, stateful_parts_of(data))
            _logger.log(
                level,
                "resume: nothing is left to train within the limits of this run(): iteration %d, epoch %d was reached. "
                "A run() with higher limits continues there; another one starts at iteration 0, as in ignite",
                state.iteration,
                state.epoch,
            )
            return state
        if any(are_complete):
            ranks = [rank for rank, is_complete in enumerate(are_complete) if is_complete]
            msg = f"resume: the run was complete on ranks {ranks}, and not on the others: they trained other data"
            raise ValueError(msg)
        self._point = fitted[0]
        self._position_engine(engine)
        if self._point.is_end_due:
            expect_run(engine)
        set_init_iter(engine, self._point.in_epoch)  # ignite derives it from the iteration
        if self._point.scale != recorded.scale:
            _logger.log(
                level,
                "resume: an epoch has %s iterations now, and had %s: continuing at iteration %d, epoch %d",
                self._point.epoch_length,
                recorded.epoch_length,
                self._point.trained,
                self._point.epoch,
            )
        self._restored.capture(excluded=stateful_parts_of(data))
        return None

    def _is_end_due_within(self, limits: RunLimits) -> bool:
        """Return True if the end of the recorded epoch is still to come, in a run with these limits."""
        recorded, max_epochs, max_iters = self._recorded, limits.max_epochs, limits.max_iters
        is_within = max_epochs is None or recorded.epoch <= max_epochs
        return recorded.is_end_due and is_within and (max_iters is None or recorded.trained <= max_iters)

    def _fit(self, engine: Engine, data: Any, epoch_length: int | None) -> ResumePoint:
        num_left = self._sampler.load(data)
        return fit_to_data(
            replace(self._recorded, batches=self._num_batches_trained(data)),
            data,
            epoch_length,
            knows_pass=self._pass_began_at is not None,
            counts_epochs=engine.state.max_iters is None,
            world_size=current().world_size,
            num_left=num_left,
        )

    def _num_batches_trained(self, data: Any) -> int:
        """Return the number of batches trained in the pass under way."""
        recorded = self._recorded
        if recorded.batches is not None:
            return recorded.batches
        began_at, length = self._pass_began_at, num_batches_of(data)
        if began_at is None:  # then a pass is taken to be an epoch, unless the data tell their length
            began_at, length = 0, length or recorded.epoch_length
        num_since = recorded.trained - began_at
        return num_since % length if length else num_since

    @property
    def _pass_began_at(self) -> int | None:
        """Return the iteration at which the loaded pass started; None if no RngState recorded it."""
        return next((one.pass_began_at for one in self._rng_states if one.pass_began_at is not None), None)

    def _position_engine(self, engine: Engine) -> None:
        point, state = self._point, engine.state
        state.iteration, state.epoch, state.epoch_length = point.trained, point.epoch, point.epoch_length
        engine.should_terminate = False  # of the run before; ignite would restart the epoch's count
        continue_from(engine, point)

    def _cancel(self, engine: Engine) -> None:
        """Let the next run start as it would without a resume."""
        self.detach(engine)
        end_expectation(engine)
        self._restored.release_histories()
        set_init_iter(engine, None)
        continue_from(engine, None)

    # -- in the run --------------------------------------------------------------------------------

    def _on_started(self, engine: Engine) -> None:
        set_start_hook(engine, None)
        end_expectation(engine)
        if self._has_ended_epoch:  # the run ended with that epoch: this one continues where it ended
            self.detach(engine)
            continue_from(engine, None)
            return
        self._has_begun_batches = False
        self._restore_where_saved(
            engine, "STARTED", self._restore_loaded if self._is_saved_on_started else lambda: None
        )
        after_event(engine, self._after_started)

    def _after_started(self, engine: Engine) -> None:
        if self._is_saved_on_started:
            self._restore_between_epochs = [one.capture_current() for one in self._rng_states]
        if self._point.seed is not None and isinstance(engine, DeterministicEngine):
            engine.state.seed = self._point.seed
        if self._point.is_end_due and engine.state.iteration == self._point.trained:
            self._restore_loaded()
            show_trained_epoch(engine, self._point, self._restored.objects)
            if self._point.is_rest_done:
                self._end_epoch(engine)
            else:
                end_trained_epoch(engine, self._end_epoch)

    def _end_epoch(self, engine: Engine) -> None:
        self._has_ended_epoch = True
        _logger.log(
            log_level(current().rank, {0}),
            "resume: the batches of epoch %d were all trained before: firing EPOCH_COMPLETED",
            engine.state.epoch,
        )
        with unknown_as_nan(engine, self._restored.objects):
            engine.fire_event(Events.EPOCH_COMPLETED)
        engine.should_terminate_single_epoch = False  # as ignite does after this event
        self._restore_between_epochs = [one.capture_current() for one in self._rng_states]

    def _on_epoch_started(self, engine: Engine) -> None:
        if self._has_begun_batches:  # the epoch before had no batch: the data were exhausted
            self.detach(engine)
            return
        if engine.state.iteration != self._point.trained:
            self.detach(engine)
            set_init_iter(engine, None)  # a handler of STARTED has set another iteration
            return
        if self._point.epoch_begun:
            self._restored.keep_histories()
            self._restore_where_saved(engine, "EPOCH_STARTED", self._restore_loaded)
        elif self._restore_between_epochs:
            for restore in self._restore_between_epochs:
                restore()
        else:
            self._restore_loaded()
        after_event(engine, self._before_iterator)

    def _before_iterator(self, engine: Engine) -> None:
        point, data = self._point, engine.state.dataloader
        self._sampler.begin_iterator(data)
        if data is None:
            return
        self._num_consumed = (point.batches or 0) if point.is_mid_pass else 0
        if self._data_know_position(engine, data):
            self._skip_batches = False
        elif point.trained:
            warn_if_order_differs(data, self._rng_states, is_mid_pass=point.is_mid_pass and self._num_consumed > 0)
            warn_if_epoch_unknown(data, point)
            warn_if_pass_end_lost(engine, self._recorded)
            warn_if_ranks_changed(data, self._recorded.world_size, current().world_size, is_mid_pass=point.is_mid_pass)
        if not point.is_mid_pass and self._is_exhaustion_due(data):
            exhaust_sampler(data, self._rng_states)
        self._restore_generators = [one.capture_current() for one in self._rng_states]
        self._resets_workers = self._begins_by_reset(data)
        if self._resets_workers and find_random_sampler(data) is not None:
            start_workers(data, self._rng_states)
            self._resets_workers = False
        if point.is_mid_pass:
            self._engine_rng_states = take_rng_states(engine)  # to be set after the order is drawn
            for one in self._rng_states:
                one.begin_pass(point.trained - self._num_consumed, is_order_drawn=self._is_order_drawn)

    @property
    def _is_order_drawn(self) -> bool:
        """Return True if a batch of the pass under way was drawn before the save."""
        return self._point.is_mid_pass and (self._num_consumed > 0 or self._point.is_drawn)

    def _is_exhaustion_due(self, data: Any) -> bool:
        """Return True if all batches of the loaded pass were trained, and ignite had not asked for another one."""
        began_at, trained = self._pass_began_at, self._recorded.trained
        return began_at is not None and trained > began_at and trained - began_at == num_batches_of(data)

    def _begins_by_reset(self, data: Any) -> bool:
        """Return True if, without the interruption, persistent workers that already ran would start the pass."""
        if not getattr(data, "persistent_workers", False) or not any(one.is_loaded for one in self._rng_states):
            return False
        if self._point.is_mid_pass:
            return any(one.is_pass_begun_by_reset for one in self._rng_states)
        return self._point.trained > 0

    def _data_know_position(self, engine: Engine, data: Any) -> bool:
        """Return True if the data, their sampler or a DeterministicEngine find the position by themselves."""
        sampler = find_resumable(data)
        if sampler is not None and sampler.distckpt_is_positioned:
            if self._point.is_mid_pass and self._num_consumed:
                warn_of_new_workers(data)
            return True
        if isinstance(engine, DeterministicEngine):
            return True
        loaded = self._restored.objects
        parts = [part for part in stateful_parts_of(data) if any(part is one for one in loaded)]
        if self._point.is_drawn and parts:
            warnings.warn(
                f"resume: the checkpoint was saved after batch {self._point.trained + 1} was drawn and before it was "
                f"trained. {type(parts[0]).__name__} continues after it: it is not trained. Save on "
                f"ITERATION_COMPLETED",
                stacklevel=2,
            )
        is_sampler = any(part is one for part in parts for one in samplers_of(data))
        if is_sampler and getattr(data, "num_workers", None):
            warnings.warn(
                f"resume: the loader's workers draw batches before they are trained, and the state of "
                f"{type(parts[0]).__name__} counts them: batches may never be trained. Use a distckpt.ResumableSampler",
                stacklevel=2,
            )
        if parts or not (hasattr(data, "state_dict") and hasattr(data, "load_state_dict")):
            return bool(parts)
        return any(data is held for one in loaded for held in getattr(one, "__dict__", {}).values())

    def _on_get_batch_started(self, engine: Engine) -> None:
        if self._has_begun_batches:
            return
        self._has_begun_batches = True
        if engine.state.iteration != self._point.trained:
            self.detach(engine)
            return
        if self._is_order_drawn:
            for one in self._rng_states:
                one.restore_first_batch()
        self._sampler.end_drawing(engine, is_order_drawn=self._is_order_drawn)
        if self._is_order_drawn:
            self._draw_again(engine)
        if self._engine_rng_states is not None:
            draw_first_indices(get_iterator(engine))
            set_rng_states(self._engine_rng_states)
        if (self._point.is_mid_pass and not self._point.is_drawn) or self._resets_workers:
            self._set_generators()

    def _on_get_batch_completed(self, engine: Engine) -> None:
        if self._point.is_drawn and not self._point.iteration_begun:
            self._set_generators()  # now, since a handler may save here; again below, since another may draw
            after_event(engine, self._after_batch_drawn)

    def _after_batch_drawn(self, engine: Engine) -> None:
        self._sampler.restore_next_epoch(engine)
        self._set_generators()

    def _draw_again(self, engine: Engine) -> None:
        """Draw the trained batches, as before the save."""
        if self._num_consumed and self._skip_batches:
            skip_batches(get_iterator(engine), self._num_consumed, engine.state.epoch)
        if self._point.is_drawn:  # the batch is drawn after handlers that may draw numbers again
            for one in self._rng_states:
                one.keep_during_event(engine)

    def _on_iteration_started(self, engine: Engine) -> None:
        self.detach(engine)
        if engine.state.iteration != self._point.trained + 1:
            return
        if engine.state.dataloader is None and self._point.epoch_begun:
            self._restore_generators = [one.restore_loaded for one in self._rng_states]
            self._set_generators()
        if self._point.iteration_begun:
            self._set_generators()  # as above
            self._restored.keep_histories()
            self._restore_where_saved(engine, "ITERATION_STARTED", lambda: self._after_batch_drawn(engine))

    def _restore_where_saved(self, engine: Engine, event_name: str, restore_generators: Callable[[], None]) -> None:
        """Restore objects, sampler and generators where the checkpoint was saved, or after the present event."""

        def restore_more() -> None:
            self._sampler.load_again(engine.state.dataloader)
            restore_generators()

        self._restored.restore_in_event(engine, event_name, restore_more)

    def _on_epoch_completed(self, engine: Engine) -> None:
        if self._has_begun_batches and self._point.in_epoch:  # data without a length had no further batch
            show_trained_epoch(engine, self._point, self._restored.objects)
            self._while_unknown.enter_context(unknown_as_nan(engine, self._restored.objects))
            after_event(engine, self.detach)

    def _restore_loaded(self) -> None:
        for one in self._rng_states:
            one.restore_loaded()

    def _set_generators(self) -> None:
        for restore in self._restore_generators:
            restore()
