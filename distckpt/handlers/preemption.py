"""Stop a run when its process receives a signal: :class:`Preemption`, and its signal receiver."""

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

from ignite.engine import Engine, Events

from distckpt._messages import log_level
from distckpt.backends.detect import current
from distckpt.coordination.votes import Answer, DeferredAnswer, VoteKind
from distckpt.handlers.checkpoint import Checkpoint
from distckpt.handlers.engine_events import after_event, is_iteration_event
from distckpt.handlers.engine_votes import (
    Voter,
    exit_after_run,
    hold_votes,
    is_nonfinite,
    is_off_schedule,
    stop_reason,
    stop_run,
)
from distckpt.handlers.ignite_hooks import find_attachments
from distckpt.handlers.runs import run_of

_LOG_TIMEOUT_S = 10.0  # for a log record that is being written
_Saver = Callable[[Engine], Any] | Checkpoint  # a ModelCheckpoint is called with what it is attached with
_SignalHandler = Callable[[int, FrameType | None], Any] | int | signal.Handlers


class Preemption(Voter):
    """Handler that saves and stops the run, on every rank at the same iteration, when any rank receives a signal.

    Construct it on all ranks, as soon as the trainer exists; it attaches itself. A signal only sets a flag. The next
    vote agrees on it; then all ranks call `checkpoint` once, for the same iteration, and the run ends. Votes are held
    after each iteration and epoch and at the start of a run, together with those of the other handlers. An evaluation
    runs to its end before the signal is acted on, unless :meth:`attach` shortens it. At the start of a run nothing is
    saved. A second signal changes nothing, nor does a signal after the last training step: call :meth:`close` then.
    After a signal, a later run of the same trainer ends where it starts.

    A :class:`~distckpt.Checkpoint` attached to the trainer names its file as on its own event. If that is
    EPOCH_COMPLETED, the name has the epoch in progress, and the end of that epoch replaces the file after a resume. A
    Checkpoint with a ``score_function`` that is attached to another engine, such as an evaluator, is not called.

    Args:
        trainer: the engine whose run ends.
        checkpoint: called with `trainer` to save; a :class:`~distckpt.Checkpoint`, any callable, or several of them.
            A Checkpoint that has saved the iteration already is not called. One that keeps the best scores may have
            nothing to save. None saves nothing.
        signals: the signals' numbers. Their previous handlers still run, except defaults that end a process.
        grace_s: seconds between the signal and the forced end; ``torchrun`` waits 30. The log says if a save cannot
            end in time. None if unknown.
        exit_code: ends the program with this code after the trainer's COMPLETED handlers; 0 lets it continue. 75 is
            the usual code for "saved, requeue". Without effect if another handler has just ended the run, as for NaN.
        lag: 0 to stop in the iteration after which the vote is held, 1 to stop one iteration later; see
            :class:`~distckpt.TerminateOnNan`.
        every: hold the vote, and stop, every N iterations only. If gradients of N batches are accumulated, give N:
            a stop between two of them would lose the accumulated gradients.
        timeout_s: seconds to wait for the other ranks; None for ``DISTCKPT_TIMEOUT_S``, or 300.

    Attributes:
        requested: whether this process has received one of the signals.
        preempted: whether a signal ended the last run; the same on every rank.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value.

    Example:
        >>> import os
        >>> trainer = Engine(lambda engine, batch: os.kill(os.getpid(), signal.SIGUSR1) if batch == 2 else None)
        >>> preemption = Preemption(trainer, lambda trainer: print("saved", trainer.state.iteration))
        >>> trainer.run([0, 1, 2, 3]).iteration
        saved 3
        3
        >>> preemption.preempted
        True
        >>> preemption.close()
    """

    vote_kind = VoteKind.SIGNAL

    def __init__(
        self,
        trainer: Engine,
        checkpoint: _Saver | Sequence[_Saver] | None = None,
        signals: Iterable[int] = (signal.SIGTERM, signal.SIGUSR1),
        *,
        grace_s: float | None = None,
        exit_code: int = 0,
        lag: int | None = None,
        every: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        _check_engine("trainer", trainer)
        savers: list[_Saver] = (
            [] if checkpoint is None else list(checkpoint) if isinstance(checkpoint, Sequence) else [checkpoint]
        )
        for one in savers:
            if not callable(one):
                msg = f"Argument checkpoint should be callable, or a sequence of callables, but given {type(one)}"
                raise TypeError(msg)
        numbers = _check_signals(signals)
        _check_numbers(grace_s, exit_code)
        self._init_voter(__name__, lag=lag, every=every, timeout_s=timeout_s)
        self.grace_s = grace_s
        self.exit_code = exit_code
        self.preempted = False
        self._trainer = trainer
        self._savers = savers
        self._has_trained = False
        self._has_answered = False
        self._receiver = _SignalReceiver(numbers)
        if not self._receiver.install():
            self.logger.warning(
                "Preemption: constructed outside the main thread, where Python cannot handle signals; this rank acts "
                "only on signals that other ranks receive"
            )
        for event in (Events.STARTED, Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED):
            trainer.add_event_handler(event, self)

    @property
    def requested(self) -> bool:
        """Whether this process has received one of the signals."""
        return self._receiver.received is not None

    def attach(self, evaluator: Engine) -> None:
        """Vote in an evaluator's iterations too, and end it on a signal, without its COMPLETED handlers.

        Its metrics then cover a part of the data. The trainer stops at its next vote.

        Args:
            evaluator: an engine that runs the same number of iterations on all ranks.
        """
        _check_engine("evaluator", evaluator)
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self)

    def close(self) -> None:
        """Restore the signals' previous handlers; handlers installed later stay, and may still pass signals on to them.

        Rank-local. :attr:`requested` keeps its value.
        """
        self._receiver.remove()

    def __call__(self, engine: Engine) -> None:
        """Collective, after the event: one reduction with all handlers that vote."""
        if engine is self._trainer:
            self._has_trained = engine.last_event_name != Events.STARTED
            if not self._has_trained:
                self.preempted = self._has_answered = False
        backend = current()
        if backend.world_size == 1 and not self.lag:
            if self.requested or not is_iteration_event(engine):
                after_event(engine, self._answer_alone)
            return
        self._vote(engine, backend)

    def _probe(self, engine: Engine) -> Answer:
        if self.requested:
            return self._describe
        # An evaluation may follow in the same event: a signal during it counts too.
        return None if is_iteration_event(engine) else DeferredAnswer(_ReceivedFlag(self._receiver), self._describe)

    def _answer_alone(self, engine: Engine) -> None:
        if self.requested:
            hold_votes(engine)  # a NaN of this iteration comes first, as in a vote
            self._act(engine, {0: self._describe()})

    def _describe(self) -> dict[str, Any]:
        if self._receiver.received is None:
            return {}
        name, at_s = self._receiver.received
        left_s = None if self.grace_s is None else self.grace_s - (time.monotonic() - at_s)
        return {"signal": name, "left_s": left_s}

    def _act(self, engine: Engine, reports: Mapping[int, Any]) -> None:
        """Collective. Save and stop the trainer; stop an evaluator."""
        received = ", ".join(f"rank {rank}: {one['signal']}" for rank, one in reports.items())
        level = log_level(current().rank, {0, *reports})
        if engine is not self._trainer:
            self.logger.log(level, "Preemption: received a signal (%s); the evaluation ends", received)
            engine.terminate(skip_completed=True)
            return
        if self._has_answered:
            return  # a pending vote has found the same
        if self._has_trained and is_off_schedule(engine, self):
            return  # the next vote finds the signal again
        if _ends_epoch(engine):
            return  # the vote on EPOCH_COMPLETED answers, after that event's own handlers
        self._has_answered = True
        step = engine.state.iteration
        self.logger.log(level, "Preemption: received a signal (%s); the run ends at iteration %d", received, step)
        signals = [{"rank": rank, "signal": one["signal"]} for rank, one in reports.items()]
        run_of(engine).record.add(engine, "signal", signals=signals)
        stop_run(engine, "preempted")
        self.preempted = stop_reason(engine) == "preempted"
        if self.exit_code and self.preempted:
            exit_after_run(engine, self.exit_code)
        left = [one["left_s"] for one in reports.values() if one["left_s"] is not None]
        end_s = time.monotonic() + min(left) if left else None
        # After the event: an evaluator's save within the event may have counted the vote.
        after_event(engine, lambda _: self._save(engine, end_s))

    def _save(self, engine: Engine, end_s: float | None) -> None:
        """Collective. Call the savers that have not saved this iteration; log whether they end before `end_s`."""
        hold_votes(engine)
        step = engine.state.iteration
        if not self._has_trained or is_nonfinite(engine):
            why = "was voted NaN" if is_nonfinite(engine) else "is the run's start"
            self._warn("Preemption: iteration %d %s: nothing is saved", step, why)
            return
        due = [one for one in self._savers if self._is_due(engine, one)]
        if not due:
            return
        usual_s = sum(one.last_save_s for one in due if isinstance(one, Checkpoint))
        event = engine.last_event_name
        with _DeadlineLog(self.logger, step, end_s, usual_s):
            for one in due:
                if isinstance(one, Checkpoint):
                    attached = find_attachments(engine, one)
                    calls = [attachment.call_original for attachment in attached]
                    one.save_early(engine, attached[0].event if attached else event, calls)
                else:
                    one(engine)
                engine.last_event_name = event  # a user's callable may have fired other events
            for one in self._savers:
                if isinstance(one, Checkpoint):
                    one.wait_until_finished()  # the process may be killed after the grace period
        for one in due:
            if isinstance(one, Checkpoint) and not one.has_saved_at(engine):
                self._warn_unsaved(engine, one, "had nothing to save")

    def _warn(self, message: str, *args: object) -> None:
        self.logger.log(log_level(current().rank, {0}), message, *args)

    def _is_due(self, engine: Engine, saver: _Saver) -> bool:
        if not isinstance(saver, Checkpoint):
            return True
        if saver.has_saved_at(engine):
            saver.save_early(engine, engine.last_event_name)  # keeps it from saving the iteration again
            return False
        if saver.score_function is not None and not find_attachments(engine, saver):
            self._warn_unsaved(engine, saver, "has the score of another engine, and is not asked to save")
            return False
        return True

    def _warn_unsaved(self, engine: Engine, saver: Checkpoint, why: str) -> None:
        self._warn(
            "Preemption: a Checkpoint %s at iteration %d; give one without a score_function. Its last one is %s",
            why,
            engine.state.iteration,
            saver.last_checkpoint,
        )


def _check_engine(name: str, engine: object) -> None:
    if not isinstance(engine, Engine):
        raise TypeError(f"Argument {name} should be an instance of Engine, but given {type(engine)}")


def _check_numbers(grace_s: object, exit_code: object) -> None:
    if grace_s is not None and (not isinstance(grace_s, int | float) or isinstance(grace_s, bool)):
        raise TypeError(f"Argument grace_s should be a positive number of seconds or None, but given {type(grace_s)}")
    if grace_s is not None and not 0 < grace_s < math.inf:
        raise ValueError(f"Argument grace_s should be a positive number of seconds or None, but given {grace_s!r}")
    if not isinstance(exit_code, int) or isinstance(exit_code, bool):
        raise TypeError(f"Argument exit_code should be an integer between 0 and 255, but given {type(exit_code)}")
    if not 0 <= exit_code <= 255:  # noqa: PLR2004 - the exit codes of a process
        raise ValueError(f"Argument exit_code should be an integer between 0 and 255, but given {exit_code}")


def _check_signals(signals: object) -> list[int]:
    """Return the signals' numbers, each once."""
    given: list[Any] = list(signals) if isinstance(signals, Iterable) else [None]
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in given):
        msg = f"Argument signals should be several signals' numbers, as (signal.SIGTERM,), but given {signals!r}"
        raise TypeError(msg)
    numbers = list(dict.fromkeys(int(one) for one in given))
    if not numbers:
        raise ValueError("Argument signals should name at least one signal, but is empty")
    for number in numbers:
        if number not in signal.valid_signals() or number in (signal.SIGKILL, signal.SIGSTOP):
            msg = f"Argument signals should name signals that a process can handle, but given {_name_of(number)}"
            raise ValueError(msg)
    return numbers


def _ends_epoch(engine: Engine) -> bool:
    """Return True on an epoch's last iteration: a run that ended there would never fire EPOCH_COMPLETED for it."""
    length = engine.state.epoch_length
    return is_iteration_event(engine) and length is not None and engine.state.iteration % length == 0


class _SignalReceiver:
    """Receives signals and passes them on. It knows no engine, so that an installed receiver keeps no model alive.

    A deep copy is the same object: there is one process to signal. In a forked process, or after unpickling, it
    receives nothing, and a signal acts as without it.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self.received: tuple[str, float] | None = None  # the first signal's name, and its time, monotonic
        self._numbers = numbers
        self._previous: dict[int, _SignalHandler | None] = {}
        self._pid: int | None = None  # the process in which it receives

    def __deepcopy__(self, memo: dict[int, Any]) -> "_SignalReceiver":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (_SignalReceiver, (self._numbers,))

    def install(self) -> bool:
        """Start to receive; return False outside the main thread, where Python does not allow it."""
        if threading.current_thread() is not threading.main_thread():
            return False
        self._pid = os.getpid()
        for number in self._numbers:
            self._previous[number] = signal.getsignal(number)  # known before the first one can come
            signal.signal(number, self._receive)
        return True

    def remove(self) -> None:
        """Restore the previous handlers where no later one is installed; outside the main thread, pass signals on."""
        self._pid = None
        if threading.current_thread() is threading.main_thread():
            for number in self._previous:
                if signal.getsignal(number) == self._receive:
                    signal.signal(number, self._find_previous(number))

    def _is_open(self) -> bool:
        return self._pid == os.getpid()

    def _find_previous(self, number: int) -> _SignalHandler:
        """Return the previous handler, past receivers that are removed; the default if Python did not install it."""
        previous = self._previous.get(number)
        owner = getattr(previous, "__self__", None)
        if isinstance(owner, _SignalReceiver) and not owner._is_open():  # noqa: SLF001 - same class
            return owner._find_previous(number)  # noqa: SLF001 - same class
        return signal.SIG_DFL if previous is None else previous

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # Without logging: the main thread may hold the log's lock.
        is_open = self._is_open()
        if is_open and self.received is None:
            self.received = (_name_of(number), time.monotonic())
        previous = self._find_previous(number)
        if is_open and previous is signal.default_int_handler:
            return
        if callable(previous):
            previous(number, frame)
        elif not is_open and previous == signal.SIG_DFL and signal.getsignal(number) == self._receive:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


class _ReceivedFlag:
    """Whether the receiver has a signal when the vote is held, as a ``DeferredAnswer`` asks."""

    def __init__(self, receiver: _SignalReceiver) -> None:
        self._receiver = receiver

    def is_ready(self) -> bool:
        return True

    def value(self) -> bool:
        return self._receiver.received is not None

    def as_tensor(self) -> None:
        return None


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal between the first and the last
        return f"signal {number}"


class _DeadlineLog:
    """Logs whether a save can end, and has ended, before `end_s`.

    That is the time, monotonic, at which the process is killed; None if unknown.
    """

    def __init__(self, logger: logging.Logger, step: int, end_s: float | None, usual_s: float) -> None:
        self._logger = logger
        self._is_coordinator = current().rank == 0  # the other ranks log at DEBUG
        self._step = step
        self._end_s = end_s
        self._usual_s = usual_s
        self._begin_s = time.monotonic()
        self._timer: threading.Timer | None = None

    def __enter__(self) -> None:
        if self._end_s is None:
            return
        left_s = self._end_s - self._begin_s
        if self._usual_s > left_s:
            self._log(
                logging.WARNING,
                "Preemption: %.1f s are left, and the last save took %.1f s: that of iteration %d may not end in time",
                left_s,
                self._usual_s,
                self._step,
            )
        self._timer = threading.Timer(max(left_s, 0.0), self._log_missed)
        self._timer.daemon = True
        self._timer.start()

    def _log(self, level: int, message: str, *args: object) -> None:
        self._logger.log(level if self._is_coordinator else logging.DEBUG, message, *args)

    def _log_missed(self) -> None:
        self._log(
            logging.ERROR,
            "Preemption: no time is left, and the save of iteration %d has not ended; if the process is killed now, "
            "the previous checkpoint is intact",
            self._step,
        )

    def __exit__(self, *raised: object) -> None:
        if self._timer is None or self._end_s is None:
            return
        self._timer.cancel()
        now_s = time.monotonic()
        self._timer.join(_LOG_TIMEOUT_S)  # a record it has begun comes before the next one
        if raised[0] is None:
            self._log(
                logging.INFO,
                "Preemption: the save of iteration %d took %.1f s and ended %.1f s %s the deadline",
                self._step,
                now_s - self._begin_s,
                abs(self._end_s - now_s),
                "before" if now_s <= self._end_s else "after",
            )
