"""An engine that its caller runs in steps, such as :class:`~distckpt.Loop`.

Like :mod:`distckpt.handlers.ignite_hooks`, this module relies on private names of ignite's engine.
"""

from collections.abc import Callable, Generator
from enum import Enum, auto
from typing import Any, NoReturn

from ignite.engine import Engine, Events, State
from ignite.engine.engine import _EngineTerminateException

from distckpt.handlers.engine_events import KeepsEventName, enter_run, leave_run
from distckpt.handlers.ignite_hooks import after_run, before_run, end_run

_ITERATION_STARTED, _ITERATION_COMPLETED = Events.ITERATION_STARTED, Events.ITERATION_COMPLETED  # slow to look up


class Pause(Enum):
    """Where the run of a :class:`SteppedEngine` pauses."""

    RUN_STARTED = auto()
    EPOCH_TRAINED = auto()
    """In a resumed run: all batches of an epoch were trained before. The caller does what follows them."""
    EPOCH_STARTED = auto()
    ITERATION_STARTED = auto()
    """The caller makes the step."""
    ITERATION_COMPLETED = auto()  # only of an engine that pauses after iterations
    BATCHES_ENDED = auto()
    """The epoch has no further batch: EPOCH_COMPLETED is not fired yet. Or the run has stopped, after all events."""
    RUN_ENDED = auto()


class SteppedEngine(KeepsEventName, Engine):
    """An engine that its caller runs from one :class:`Pause` to the next.

    ignite implements its run as a generator, for ``interrupt()``. Here the generator yields at more places. What
    happens between them, and the order of events, are as in ignite. With `pauses_after_iterations` the engine also
    pauses between two iterations, for a loop that may end after any of them.

    Attributes:
        pause: where the run is paused; None if there is no run.
        end_epoch: see :func:`end_trained_epoch`; None if no epoch is to be ended.
    """

    interrupt_resume_enabled = True  # the generator, even if a program prefers ignite's other loop

    def __init__(self, *, pauses_after_iterations: bool = False) -> None:
        super().__init__(lambda engine, _batch: engine.state.output)  # which the step has set
        self.pause: Pause | None = None
        self.end_epoch: Callable[[Engine], None] | None = None
        self._pauses_after_iterations = pauses_after_iterations
        self._is_stopped_in_epoch = False

    def begin(self, data: Any, max_epochs: int | None, max_iters: int | None, epoch_length: int | None) -> None:
        """Start a run and fire STARTED; the arguments are those of ``Engine.run()``.

        A resumed run that had ended is at ``Pause.RUN_ENDED`` at once.
        """
        self.end_epoch = None
        if before_run(self, data, max_epochs, max_iters, epoch_length) is not None:
            self.pause = Pause.RUN_ENDED
            return
        Engine.run.__wrapped__(self, data, max_epochs, max_iters, epoch_length)  # type: ignore[attr-defined]
        leave_run(self)  # of a run that the program has abandoned
        enter_run(self)
        self.advance()

    def advance(self) -> Pause:
        """Run to the next pause and return it."""
        return self._go_on(lambda generator: generator.send(None))

    def throw(self, error: BaseException) -> Pause:
        """Raise an exception in the run, as if its step had raised it; return the next pause if a handler caught it."""
        return self._go_on(lambda generator: generator.throw(error))

    def _go_on(self, resume: Callable[[Generator[Any, None, State]], Pause]) -> Pause:
        generator = self._internal_run_generator
        if generator is None:
            raise RuntimeError("there is no run")
        try:
            try:
                self.pause = pause = resume(generator)
            except StopIteration:
                self._internal_run_generator = None
                self.pause = pause = Pause.RUN_ENDED
                leave_run(self)
                after_run(self)
        except BaseException as raised:
            self._internal_run_generator = self.pause = None
            leave_run(self)
            end_run(self, raised)
            raise
        if pause is Pause.RUN_ENDED:
            end_run(self, None)
        return pause

    def interrupt(self) -> NoReturn:
        """Raise RuntimeError: the program has control between two steps anyway."""
        raise RuntimeError(f"{type(self).__name__} cannot be interrupted: leave its for statements instead")

    def _internal_run(self) -> State:
        self._internal_run_generator = self._internal_run_as_gen()
        return self.state

    def _maybe_terminate_or_interrupt(self) -> Generator[Any, None, None]:
        if self.should_terminate or self.should_terminate_single_epoch:
            yield from super()._maybe_terminate_or_interrupt()
        fired = self.last_event_name
        if fired is _ITERATION_STARTED:
            yield Pause.ITERATION_STARTED  # the iteration is completed before the run may stop
        elif fired is _ITERATION_COMPLETED and self._pauses_after_iterations:
            yield Pause.ITERATION_COMPLETED
            yield from super()._maybe_terminate_or_interrupt()
        elif fired is Events.STARTED or fired is Events.EPOCH_STARTED:
            yield Pause.RUN_STARTED if fired is Events.STARTED else Pause.EPOCH_STARTED
            if self.end_epoch is not None:
                yield Pause.EPOCH_TRAINED
                end, self.end_epoch = self.end_epoch, None
                end(self)
            yield from super()._maybe_terminate_or_interrupt()

    def _run_once_on_dataset_as_gen(self) -> Generator[Any, None, float]:
        try:
            time_s: float = yield from super()._run_once_on_dataset_as_gen()
        except _EngineTerminateException:
            self._is_stopped_in_epoch = True
            raise
        yield Pause.BATCHES_ENDED
        return time_s

    def _internal_run_as_gen(self) -> Generator[Any, None, State]:
        self._is_stopped_in_epoch = False
        state: State = yield from super()._internal_run_as_gen()
        if self._is_stopped_in_epoch:
            # After TERMINATE and COMPLETED: a resumed run repeats what the caller does now, so no checkpoint of these
            # events may hold its effects.
            try:
                yield Pause.BATCHES_ENDED
            except BaseException as error:  # noqa: BLE001 - as ignite does
                self._handle_exception(error)
        return state


def end_trained_epoch(engine: Engine, end: Callable[[Engine], None]) -> None:
    """Call `end` for an epoch whose batches are all trained.

    Calls it at once or, for a :class:`SteppedEngine`, after the program has done the rest of the epoch. To be called
    after STARTED.
    """
    if isinstance(engine, SteppedEngine):
        engine.end_epoch = end
    else:
        end(engine)
