"""Votes of an engine's handlers: the base classes of handlers that vote, and what handlers tell their engine.

During an event each of these handlers adds its answer to one round. The vote is held after the event's last
handler, or earlier where a save calls :func:`hold_votes`. :mod:`distckpt.handlers.vote_rounds` decides when.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from ignite.engine import Engine, Events

from distckpt._values import check_timeout
from distckpt.backends.base import Backend
from distckpt.coordination.phases import HandlerId, SyncPoint
from distckpt.coordination.votes import Answer, VoteKind
from distckpt.handlers.engine_events import (
    TrackedHandler,
    get_attachments,
    get_early_handlers,
    get_hooks,
    get_run,
    get_running_engines,
    get_tracked_handlers,
    is_iteration_event,
    restore_event_name,
    run_early,
    set_hooks,
)
from distckpt.handlers.progress import progress_of
from distckpt.handlers.resume_point import is_last_iteration
from distckpt.handlers.vote_rounds import EngineVotes

StopReason = Literal["nan", "early_stop", "time_limit", "preempted"]


class Voter(TrackedHandler, ABC):
    """Mixin of handlers that vote.

    Attributes:
        lag: 0 to act in the iteration that is voted on, 1 to act one iteration later; None for no preference.
        every: hold the vote every N iterations; None for no preference.
        timeout_s: seconds to wait for the other ranks; None for the default.
    """

    vote_kind: ClassVar[VoteKind]
    """What the handler reports."""
    may_run_early: ClassVar[bool] = True
    detects_nan: ClassVar[bool] = False
    lag: int | None
    every: int | None
    timeout_s: float | None
    _handler_id: HandlerId

    def _init_voter(self, module: str, *, lag: int | None, every: int | None, timeout_s: float | None) -> None:
        """Check and set the arguments of a handler that users construct; `module` names its logger."""
        if lag not in (None, 0, 1) or isinstance(lag, bool):
            raise ValueError(f"Argument lag should be 0 or 1, but given {lag!r}")
        if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ValueError(f"Argument every should be a positive integer. Given {every!r}")
        check_timeout(timeout_s)
        self.lag, self.every, self.timeout_s = lag, every, timeout_s
        self.logger = logging.getLogger(f"{module}.{type(self).__name__}")
        self._handler_id = HandlerId(type(self).__name__)

    @abstractmethod
    def _probe(self, engine: Engine) -> Answer:
        """Rank-local. Return this rank's answer."""

    @abstractmethod
    def _act(self, engine: Engine, reports: Mapping[int, Any]) -> None:
        """All ranks. Act on a vote in which a rank said yes or, for a level-triggered kind, no rank did.

        Args:
            engine: the engine whose event it is.
            reports: the detail of each rank that said yes.
        """

    def _object_id(self) -> str | None:
        """Return `depends_on` for :meth:`~distckpt.coordination.phases.HandlerId.advance`."""
        return None

    def _vote(self, engine: Engine, backend: Backend) -> None:
        """All ranks. Add this handler's answer to the engine's round.

        Args:
            engine: the engine whose event it is.
            backend: the job's backend.
        """
        restore_event_name(engine)
        _votes_of(engine).vote(self, engine, backend)


class Poller(Voter):
    """A voter that is not attached: it votes after each iteration while background work is open."""

    @abstractmethod
    def poll(self, engine: Engine) -> None:
        """All ranks. Vote."""

    @abstractmethod
    def wait_all(self, engine: Engine) -> None:
        """Collective. Finish the background work before the engine's run ends."""

    @abstractmethod
    def abort(self, error: BaseException) -> None:
        """End the background work because an exception leaves the engine's run.

        Collective if all ranks raise the error.
        """


def start_polling(engine: Engine, poller: Poller) -> None:
    """All ranks. Let a poller vote from now on."""
    pollers = _votes_of(engine).pollers
    if poller not in pollers:
        pollers.append(poller)


def stop_polling(engine: Engine, poller: Poller) -> None:
    """All ranks. Stop the poller's votes."""
    pollers = _votes_of(engine).pollers
    if poller in pollers:
        pollers.remove(poller)


def next_sync_point(
    handler_id: HandlerId,
    backend: Backend,
    engine: Engine | None,
    *,
    depends_on: str | None = None,
    timeout_s: float | None = None,
) -> Callable[[str], SyncPoint]:
    """All ranks. Count a call of the handler, and return a function that makes the call's sync points.

    On events that count iterations, ranks have to be at the same iteration. On other events only the number of calls
    has to agree: after an evaluation the ranks may have seen data shards of unequal length.

    Args:
        handler_id: the handler's id.
        backend: the job's backend.
        engine: the engine that calls the handler; None if a user calls it.
        depends_on: see :meth:`HandlerId.advance`.
        timeout_s: seconds to wait for the other ranks; None for the default.

    Returns:
        A function that takes the name of a phase and returns its sync point.
    """
    handler, sequence = handler_id.advance(backend, depends_on=depends_on, timeout_s=timeout_s)
    if engine is None:
        return lambda phase: SyncPoint(handler=handler, phase=phase, step=0, sequence=sequence)
    event, step = engine.last_event_name, engine.state.iteration
    name = getattr(event, "name", event)
    if is_iteration_event(engine):
        sequence = step
    return lambda phase: SyncPoint(handler=handler, phase=f"on {name}, {phase}", step=step, sequence=sequence)


def is_off_schedule(engine: Engine, voter: Voter) -> bool:
    """Return True if the voter listens to iterations, and the present one is not a multiple of N (`every`).

    A run does not stop there: gradients of several batches may be accumulated, and a checkpoint does not hold them.
    The trained iterations are counted, since a save may hold the vote as an iteration begins.
    """
    if not any(one.tracked is voter for one in get_attachments(engine, Events.ITERATION_COMPLETED)):
        return False  # its events may not fall on a multiple of N for many epochs
    state = engine.state
    if is_last_iteration(state.iteration, state.epoch_length, state.max_epochs, state.max_iters):
        return False  # the run ends here anyway
    every = max((one.every or 1 for one in get_tracked_handlers(engine) if isinstance(one, Voter)), default=1)
    return progress_of(engine).trained % every > 0


def stop_run(engine: Engine, reason: StopReason) -> None:
    """Rank-local. Stop the engine's run and record why; the first reason stays."""
    votes = _votes_of(engine)
    run = get_run(engine)
    if votes.stop_reason is None:
        votes.stop_reason = reason
        if run is not None:
            run.record.stop(engine, reason)
    engine.terminate()


def stop_reason(engine: Engine) -> StopReason | None:
    """Return why a handler of distckpt stopped the engine's last run; None if no handler did. Rank-local.

    The reason is the same on every rank.

    Example:
        >>> from ignite.engine import Events
        >>> from distckpt import TerminateOnNan
        >>> trainer = Engine(lambda engine, batch: float("nan"))
        >>> trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan()) and None
        >>> trainer.run([0, 1]) and None
        >>> stop_reason(trainer)
        'nan'
    """
    votes = get_hooks(engine)
    return None if votes is None else votes.stop_reason


def announce_errors(engine: Engine, *, is_uncaught: bool) -> None:
    """Rank-local. Report the present exception to the other ranks if it leaves the engine's run.

    Args:
        engine: the engine that handles the exception.
        is_uncaught: whether the exception leaves the run although no handler of EXCEPTION_RAISED raises.
    """
    for one in (engine, *get_running_engines()):
        _votes_of(one).announces_errors = True
    _votes_of(engine).has_uncaught_error = is_uncaught


def exit_after_run(engine: Engine, code: int) -> None:
    """Rank-local. End the program with an exit code after the engine's run."""
    _votes_of(engine).exit_code = code


def mark_nonfinite(engine: Engine) -> None:
    """Rank-local. Record that the engine's present iteration was voted NaN."""
    _votes_of(engine).nonfinite_at = engine.state.iteration


def is_nonfinite(engine: Engine) -> bool:
    """Return True if the present iteration of the engine, or of one that runs around it, was voted NaN."""
    for one in (engine, *get_running_engines()):
        votes = get_hooks(one)
        if votes is not None and votes.nonfinite_at is not None and votes.nonfinite_at == one.state.iteration:
            return True
    return False


def hold_votes(
    engine: Engine, saver: Voter | None = None, backend: Backend | None = None, *, asks: bool = False
) -> None:
    """Collective if a vote is open or a handler detects NaN. Hold the votes of all running engines.

    Call it only where all ranks do, as in a save.

    1. (all ranks) for each engine with an open vote, a NaN detector still to be called, or a question by `saver`: let
       `saver` vote, and call the handlers that may run early. The event then skips them. In an iteration event of
       `engine` all voters are called, so that one reduction counts them; in other events only the NaN
       detectors are, since much may happen before the event ends.
    2. (all ranks) hold the pending and the present vote, and act on both.

    Args:
        engine: the engine on whose event the save runs.
        saver: the handler that saves, in a job of several ranks.
        backend: the job's backend, for `saver`.
        asks: whether `saver` has a question for `engine`'s vote.
    """
    for one in dict.fromkeys((*get_running_engines(), engine)):
        votes, is_own = get_hooks(one), one is engine
        detectors = [handler for handler in get_early_handlers(one) if handler.detects_nan]
        if detectors or (asks and is_own) or (votes is not None and votes.has_votes):
            if saver is not None and backend is not None:
                saver._vote(one, backend)  # noqa: SLF001 - Voter's method
            run_early(one, None if is_own and is_iteration_event(one) else detectors)
            votes = votes or get_hooks(one)
        if votes is not None:
            restore_event_name(one)
            votes.flush(one)


def _votes_of(engine: Engine) -> EngineVotes:
    votes: EngineVotes | None = get_hooks(engine)
    if votes is None:
        votes = EngineVotes()
        set_hooks(engine, votes)
    return votes
