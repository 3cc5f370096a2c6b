"""The vote of an engine: facts of its handlers during an event, one count of them, and what follows from it.

Owns what a handler needs for it, the engine's stop reason, and which iteration a NaN was found in. When a vote is held
lies in :mod:`distckpt.handlers.vote_rounds`, how it is counted in :mod:`distckpt.coordination.votes`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from ignite.engine import Engine, Events

from distckpt.backends.base import Backend
from distckpt.coordination.phases import HandlerId, SyncPoint
from distckpt.coordination.votes import Answer, VoteKind
from distckpt.handlers.engine_events import (
    TrackedHandler,
    get_attachments,
    get_early_handlers,
    get_firing_engines,
    get_hooks,
    get_tracked_handlers,
    is_iteration_event,
    restore_event_name,
    run_early,
    set_hooks,
)
from distckpt.handlers.progress import progress_of
from distckpt.handlers.vote_rounds import EngineVotes

StopReason = Literal["nan", "early_stop", "time_limit", "preempted"]


class Voter(TrackedHandler, ABC):
    """Mixin of handlers that vote.

    Attributes:
        lag: 0 to act in the iteration that caused it, 1 to act one iteration later; None for no wish.
        every: hold the vote on each so-many-th iteration; None for no wish.
        timeout_s: seconds to wait for the other ranks; None for the default.
    """

    vote_kind: ClassVar[VoteKind]
    """What its answer is to."""
    may_run_early: ClassVar[bool] = True
    detects_nan: ClassVar[bool] = False
    lag: int | None
    every: int | None
    timeout_s: float | None
    _handler_id: HandlerId

    @abstractmethod
    def _probe(self, engine: Engine) -> Answer:
        """Rank-local. Tell whether it is so on this rank, and what the other ranks should know of it."""

    @abstractmethod
    def _act(self, engine: Engine, said: Mapping[int, Any]) -> None:
        """All ranks, where one said yes. Act on it.

        Args:
            engine: whose event it is.
            said: what each rank that said yes tells of it.
        """

    def _object_id(self) -> str | None:
        """Return the `watch` of :meth:`~distckpt.coordination.phases.HandlerId.advance`."""
        return None

    def _vote(self, engine: Engine, backend: Backend) -> None:
        """All ranks. Put a fact on the engine's ballot; :func:`count_votes` or the event's end counts it.

        Args:
            engine: whose event it is.
            backend: the job's.
        """
        restore_event_name(engine)
        vote = _vote_of(engine)
        motion = vote.motion_of(self, backend)
        if motion is None:
            motion = vote.welcome(self, engine, backend)
        vote.put(motion, self, engine)


class Poller(Voter):
    """A voter that nobody attaches: it votes after each iteration for as long as it has something in flight."""

    @abstractmethod
    def poll(self, engine: Engine) -> None:
        """All ranks. Vote."""

    @abstractmethod
    def wait_all(self, engine: Engine) -> None:
        """Collective. End what is in flight, for the engine's run ends."""

    @abstractmethod
    def abort(self, error: BaseException) -> None:
        """End what is in flight, for an exception leaves the engine's run.

        Collective where all ranks are bound to come here.
        """


def start_polling(engine: Engine, poller: Poller) -> None:
    """All ranks. Let a poller vote from now on."""
    pollers = _vote_of(engine).pollers
    if poller not in pollers:
        pollers.append(poller)


def stop_polling(engine: Engine, poller: Poller) -> None:
    """All ranks. Let it vote no more."""
    pollers = _vote_of(engine).pollers
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
    """All ranks. Take the handler's seat for this call, and return what makes its places.

    Ranks have to be at the same iteration on events that count iterations. On others only the number of calls has to
    agree: at the end of an evaluation the ranks may have seen shards of unequal length.

    Args:
        handler_id: the handler's.
        backend: the job's.
        engine: on which the handler is called; None when a user calls it.
        depends_on: see :meth:`HandlerId.advance`.
        timeout_s: seconds to wait for the other ranks; None for the default.

    Returns:
        Makes a place from what is done there.
    """
    handler, sequence = handler_id.advance(backend, depends_on=depends_on, timeout_s=timeout_s)
    if engine is None:
        return lambda doing: SyncPoint(handler=handler, phase=doing, step=0, sequence=sequence)
    event, step = engine.last_event_name, engine.state.iteration
    name = getattr(event, "name", event)
    if is_iteration_event(engine):
        sequence = step
    return lambda doing: SyncPoint(handler=handler, phase=f"on {name}, {doing}", step=step, sequence=sequence)


def check_schedule(lag: int | None, every: int | None) -> None:
    """Refuse a lag or an interval that makes no sense.

    Raises:
        ValueError: `lag` is neither 0 nor 1, or `every` is not positive.
    """
    if lag not in (None, 0, 1) or isinstance(lag, bool):
        msg = f"Argument lag should be 0 or 1, but given {lag!r}"
        raise ValueError(msg)
    if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
        msg = f"Argument every should be a positive integer. Given {every!r}"
        raise ValueError(msg)


def stop_run(engine: Engine, reason: StopReason) -> None:
    """Rank-local. Stop the engine's run, and remember why; the first reason stands."""
    vote = _vote_of(engine)
    if vote.reason is None:
        vote.reason = reason
    engine.terminate()


def stop_reason(engine: Engine) -> StopReason | None:
    """Return why a handler of distckpt's stopped the engine's last run; None where none did. Rank-local.

    It is the same on every rank.

    Example:
        >>> from ignite.engine import Events
        >>> from distckpt import TerminateOnNan
        >>> trainer = Engine(lambda engine, batch: float("nan"))
        >>> trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan()) and None
        >>> trainer.run([0, 1]) and None
        >>> stop_reason(trainer)
        'nan'
    """
    vote = get_hooks(engine)
    return None if vote is None else vote.reason


def is_off_schedule(engine: Engine, voter: Voter) -> bool:
    """Return True if a handler of iterations is between two on which the engine's handlers vote, by their ``every``.

    A run is not stopped there: gradients of several batches may be accumulated, and are no part of a checkpoint. The
    trained iterations count: a save may have the vote held as an iteration begins, which is not trained yet.
    """
    if not any(one.tracked is voter for one in get_attachments(engine, Events.ITERATION_COMPLETED)):
        return False  # it may not come to such an iteration for many epochs
    if _is_last_iteration(engine):
        return False  # the run ends here by itself: nothing is lost
    every = max((one.every or 1 for one in get_tracked_handlers(engine) if isinstance(one, Voter)), default=1)
    return progress_of(engine).trained % every > 0


def _is_last_iteration(engine: Engine) -> bool:
    state = engine.state  # ignite's own question takes all of the last epoch for its end
    if state.max_iters is not None:
        return bool(state.iteration >= state.max_iters)
    if state.max_epochs is None or state.epoch_length is None:
        return False
    return bool(state.iteration >= state.max_epochs * state.epoch_length)


def get_run_number(engine: Engine) -> int:
    """Return a number that tells one run of the engine from the next, once a handler has voted or stopped it."""
    vote = get_hooks(engine)
    return 0 if vote is None else int(vote.num_runs)


def announce_errors(engine: Engine, *, is_uncaught: bool) -> None:
    """Rank-local. Let the other ranks hear of the exception under way, should it leave the engine's run.

    Args:
        engine: which handles an exception.
        is_uncaught: whether it leaves the run though its handlers do not raise.
    """
    for one in (engine, *get_firing_engines()):
        _vote_of(one).announces_errors = True
    _vote_of(engine).has_uncaught_error = is_uncaught


def exit_after_run(engine: Engine, code: int) -> None:
    """Rank-local. Let the program end with an exit code when the engine's run is over."""
    _vote_of(engine).exit_code = code


def mark_nonfinite(engine: Engine) -> None:
    """Rank-local. Remember that the engine's present iteration was voted NaN."""
    _vote_of(engine).nonfinite_at = engine.state.iteration


def is_nonfinite(engine: Engine) -> bool:
    """Return True if the engine's present iteration was voted NaN, or that of an engine around its event."""
    for one in (engine, *get_firing_engines()):
        vote = get_hooks(one)
        if vote is not None and vote.nonfinite_at is not None and vote.nonfinite_at == one.state.iteration:
            return True
    return False


def count_votes(
    engine: Engine, saver: Voter | None = None, backend: Backend | None = None, *, asks: bool = False
) -> None:
    """Collective where a vote is open or looks for NaN. Count the votes of the engine and of those around its event.

    1. (all ranks) where something is on an engine's ballot, or a handler that looks for NaN is still to be called in
       its event, or `saver` asks: put `saver` on it, and call the handlers that are still to be called. They are
       skipped at their own place. In an event of each iteration of the engine's own all that vote are called, so that
       one reduction counts them. Elsewhere much may happen until the event is over: there only those that look for NaN.
    2. (all ranks) count: what lags, and what is on the ballot. Act on both.

    Only where all ranks are bound to come, as in a save.

    Args:
        engine: the engine on whose event something is saved.
        saver: the handler that saves, in a job of several ranks.
        backend: the job's; for `saver`.
        asks: whether it has something to ask on the engine's ballot.
    """
    for one in dict.fromkeys((*get_firing_engines(), engine)):
        vote, is_own = get_hooks(one), one is engine
        to_come = [voter for voter in get_early_handlers(one) if voter.detects_nan]
        if to_come or (asks and is_own) or (vote is not None and vote.has_ballot):
            if saver is not None and backend is not None:
                saver._vote(one, backend)  # noqa: SLF001 - it is a voter's
            run_early(one, None if is_own and is_iteration_event(one) else to_come)
            vote = vote or get_hooks(one)
        if vote is not None:
            restore_event_name(one)
            vote.settle(one)


def _vote_of(engine: Engine) -> EngineVotes:
    vote: EngineVotes | None = get_hooks(engine)
    if vote is None:
        vote = EngineVotes()
        set_hooks(engine, vote)
    return vote
