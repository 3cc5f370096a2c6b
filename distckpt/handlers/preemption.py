"""Ending a run in good order when its process is told to stop.

Owns :class:`Preemption`: what a signal means to a run.
"""

import logging
import math
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ignite.engine import Engine, Events

from distckpt._messages import log_level
from distckpt._values import check_timeout
from distckpt.backends.detect import current
from distckpt.coordination.phases import HandlerId
from distckpt.coordination.votes import Answer, Pending, VoteKind
from distckpt.handlers.checkpoint import Checkpoint
from distckpt.handlers.deadline import Deadline
from distckpt.handlers.engine_events import after_event, is_iteration_event
from distckpt.handlers.engine_votes import (
    Voter,
    check_schedule,
    count_votes,
    exit_after_run,
    is_nonfinite,
    is_off_schedule,
    stop_reason,
    stop_run,
)
from distckpt.handlers.ignite_hooks import find_attachments
from distckpt.handlers.signals import SignalReceiver, check_signals

__all__ = ["Preemption"]

_Saver = Callable[[Engine], Any] | Checkpoint  # a ModelCheckpoint is called with what it is attached with


class Preemption(Voter):
    """Handler that saves and stops the run, on every rank at the same iteration, when any rank is sent a signal.

    Make it on all ranks, as soon as the trainer is there; it attaches itself. A signal only sets a flag. The next vote
    agrees on it; all ranks then call `checkpoint` once, for the same iteration, and the run ends. The vote is held
    after each iteration and epoch and at the start of a run, with those of the other handlers: an evaluation ends
    before the signal is answered, unless :meth:`attach` shortens it. At the start of a run nothing has been trained
    and nothing is saved. A second signal changes nothing. So does one that comes when nothing more is trained: call
    :meth:`close` then. A later run of the same trainer ends where it starts.

    A :class:`~distckpt.Checkpoint` that is attached to the trainer names its file as on its own event: one of
    EPOCH_COMPLETED by the epoch in progress, whose end replaces it after a resume. One with a ``score_function`` that
    is attached elsewhere, to an evaluator, is not called, since its score is not the trainer's.

    Args:
        trainer: the engine whose run is ended.
        checkpoint: called with `trainer` to save; a :class:`~distckpt.Checkpoint`, any callable, or several of them.
            A Checkpoint that has saved the iteration already is not called. One that keeps the best of a score may
            find that there is nothing to save. None saves nothing.
        signals: which ones; SIGTERM and SIGUSR1. What was there to handle them before still runs; what ends a process
            by default does not.
        grace_s: seconds between the signal and the end by force, if known (``torchrun``: 30). The log says when a save
            cannot end in time.
        exit_code: ends the program with this code when the trainer's COMPLETED handlers have run; 0 lets it go on to
            its own end. 75 is the usual code for "saved, put me back in the queue". Without effect where another
            handler has just ended the run, as for NaN.
        lag: 0 to stop in the iteration after which the vote is held, 1 one iteration later; see
            :class:`~distckpt.TerminateOnNan`.
        every: hold the vote, and stop, on every N-th iteration only. Where gradients of N batches are accumulated, give
            N: a stop between two of them would lose what is accumulated.
        timeout_s: seconds to wait for the other ranks; None for ``DISTCKPT_TIMEOUT_S``, or 300.

    Attributes:
        requested: whether this process was sent one of the signals.
        preempted: whether the last run was ended for it; the same on every rank.

    Raises:
        TypeError: an argument is of the wrong type.
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
        if not isinstance(trainer, Engine):
            msg = f"Argument trainer should be an instance of Engine, but given {type(trainer)}"
            raise TypeError(msg)
        savers: list[_Saver] = (
            [] if checkpoint is None else list(checkpoint) if isinstance(checkpoint, Sequence) else [checkpoint]
        )
        for one in savers:
            if not callable(one):
                msg = f"Argument checkpoint should be callable, or a sequence of callables, but given {type(one)}"
                raise TypeError(msg)
        numbers = check_signals(signals)
        _check_numbers(grace_s, exit_code)
        check_schedule(lag, every)
        check_timeout(timeout_s)
        self.lag = lag
        self.every = every
        self.timeout_s = timeout_s
        self.grace_s = grace_s
        self.exit_code = exit_code
        self.preempted = False
        self.logger = logging.getLogger(f"{__name__}.{type(self).__name__}")
        self._trainer = trainer
        self._savers = savers
        self._has_trained = False
        self._has_answered = False
        self._handler_id = HandlerId(type(self).__name__)
        self._catcher = SignalReceiver(numbers)
        if not self._catcher.install():
            self.logger.warning(
                "Preemption: made outside the main thread, where Python lets nobody handle signals; this rank will "
                "hear of them from the other ranks only"
            )
        trainer.add_event_handler(Events.STARTED, self)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self)

    @property
    def requested(self) -> bool:
        """Whether this process was sent one of the signals."""
        return self._catcher.received is not None

    def attach(self, evaluator: Engine) -> None:
        """Hold the vote in an evaluator's iterations too, and end it for a signal, without its COMPLETED handlers.

        Its metrics are not those of the whole data then. The trainer is stopped at its next vote.

        Args:
            evaluator: it has to run the same number of iterations on all ranks.

        Raises:
            TypeError: it is no Engine.
        """
        if not isinstance(evaluator, Engine):
            msg = f"Argument evaluator should be an instance of Engine, but given {type(evaluator)}"
            raise TypeError(msg)
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self)

    def close(self) -> None:
        """Give the signals back to those who handled them before. Rank-local.

        What was received stays so. Somebody who has come since stays, and what this one passed signals on to is still
        called.
        """
        self._catcher.remove()

    def __call__(self, engine: Engine) -> None:
        """Collective, when the event is over: one reduction with all handlers that vote."""
        event = engine.last_event_name
        if engine is self._trainer:
            self._has_trained = event != Events.STARTED
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
        # Where an evaluation may follow in the same event, a signal during it is to be counted with the rest.
        return None if is_iteration_event(engine) else Pending(_WhenCounted(self._catcher), self._describe)

    def _answer_alone(self, engine: Engine) -> None:
        if self.requested:
            count_votes(engine)  # what broke in this iteration comes first, as in a vote
            self._act(engine, {0: self._describe()})

    def _describe(self) -> dict[str, Any]:
        if self._catcher.received is None:  # not asked for, then
            return {}
        name, at_s = self._catcher.received
        left_s = None if self.grace_s is None else self.grace_s - (time.monotonic() - at_s)
        return {"signal": name, "left_s": left_s}

    def _act(self, engine: Engine, said: Mapping[int, Any]) -> None:
        """Collective. Save, and stop; in an evaluator: stop it."""
        told = ", ".join(f"rank {rank}: {one['signal']}" for rank, one in said.items())
        level = log_level(current().rank, {0, *said})
        if engine is not self._trainer:
            self.logger.log(level, "Preemption: told to stop (%s); the evaluation ends", told)
            engine.terminate(skip_completed=True)
            return
        if self._has_answered:
            return  # a vote that was under way has found the same
        if self._has_trained and is_off_schedule(engine, self):
            return  # the signal is still there at the next vote
        if _ends_an_epoch(engine):
            return  # the epoch's own handlers come first; the vote on them answers
        self._has_answered = True
        step = engine.state.iteration
        self.logger.log(level, "Preemption: told to stop (%s); the run ends at iteration %d", told, step)
        stop_run(engine, "preempted")
        self.preempted = stop_reason(engine) == "preempted"
        if self.exit_code and self.preempted:
            exit_after_run(engine, self.exit_code)
        left = [one["left_s"] for one in said.values() if one["left_s"] is not None]
        end_s = time.monotonic() + min(left) if left else None
        # An evaluator's save in the middle of the event may have had the vote counted.
        after_event(engine, lambda _: self._save(engine, end_s))

    def _save(self, engine: Engine, end_s: float | None) -> None:
        """Collective."""
        count_votes(engine)
        step = engine.state.iteration
        if not self._has_trained or is_nonfinite(engine):
            why = "was voted NaN" if is_nonfinite(engine) else "is where this run began"
            self._warn("Preemption: iteration %d %s: nothing is saved", step, why)
            return
        due = [one for one in self._savers if self._is_due(engine, one)]
        if not due:
            return
        usual_s = sum(one.last_save_s for one in due if isinstance(one, Checkpoint))
        event = engine.last_event_name
        with Deadline(self.logger, step, end_s, usual_s, reports=current().rank == 0):
            for one in due:
                if isinstance(one, Checkpoint):
                    turns = find_attachments(engine, one)
                    one.save_early(engine, turns[0].event if turns else event, [turn.call_original for turn in turns])
                else:
                    one(engine)
                engine.last_event_name = event  # a user's callable may have fired events of its own
            for one in self._savers:
                if isinstance(one, Checkpoint):
                    one.wait_until_finished()  # in the background; the process has its grace and no more
        for one in due:
            if isinstance(one, Checkpoint) and not one.has_saved_at(engine):
                self._say_unsaved(engine, one, "found nothing to save")

    def _warn(self, message: str, *args: object) -> None:
        """All ranks. Log what is so on all of them."""
        self.logger.log(log_level(current().rank, {0}), message, *args)

    def _is_due(self, engine: Engine, saver: _Saver) -> bool:
        if not isinstance(saver, Checkpoint):
            return True
        if saver.has_saved_at(engine):
            saver.save_early(engine, engine.last_event_name)  # which keeps it from saving the iteration once more
            return False
        if saver.score_function is not None and not find_attachments(engine, saver):
            self._say_unsaved(engine, saver, "has the score of another engine, and is not asked to save")
            return False
        return True

    def _say_unsaved(self, engine: Engine, saver: Checkpoint, why: str) -> None:
        self._warn(
            "Preemption: a Checkpoint %s at iteration %d; give one without a score_function. Its last one is %s",
            why,
            engine.state.iteration,
            saver.last_checkpoint,
        )


def _check_numbers(grace_s: object, exit_code: object) -> None:
    """Check two of the arguments.

    Raises:
        TypeError: one is no number.
        ValueError: one has a wrong value.
    """
    if grace_s is not None and (not isinstance(grace_s, int | float) or isinstance(grace_s, bool)):
        msg = f"Argument grace_s should be a positive number of seconds or None, but given {type(grace_s)}"
        raise TypeError(msg)
    if grace_s is not None and not 0 < grace_s < math.inf:
        msg = f"Argument grace_s should be a positive number of seconds or None, but given {grace_s!r}"
        raise ValueError(msg)
    if not isinstance(exit_code, int) or isinstance(exit_code, bool):
        msg = f"Argument exit_code should be an integer between 0 and 255, but given {type(exit_code)}"
        raise TypeError(msg)
    if not 0 <= exit_code <= 255:  # noqa: PLR2004 - what a process can return
        msg = f"Argument exit_code should be an integer between 0 and 255, but given {exit_code}"
        raise ValueError(msg)


def _ends_an_epoch(engine: Engine) -> bool:
    """Tell whether this is an epoch's last iteration, but not yet the event of its end.

    A run that ended here would never fire EPOCH_COMPLETED for it, neither now nor after a resume.
    """
    length = engine.state.epoch_length
    return is_iteration_event(engine) and length is not None and engine.state.iteration % length == 0


class _WhenCounted:
    """The answer at the moment of the count."""

    def __init__(self, catcher: "SignalReceiver") -> None:
        self._catcher = catcher

    def is_ready(self) -> bool:
        return True

    def value(self) -> bool:
        return self._catcher.received is not None

    def as_tensor(self) -> None:
        """Nothing on an accelerator."""
