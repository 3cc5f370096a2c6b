"""The vote of an engine: facts of its handlers during an event, one count at its end, and what follows from it.

Owns when a vote is held, the engine's stop reason, and which iteration a NaN was found in. How a vote is counted lies
in :mod:`distckpt.consensus.step_vote`. Layer L5.
"""

import sys
import traceback
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch.distributed as dist
from ignite.engine import Engine, Events

from distckpt.backends.base import Backend, default_timeout_s
from distckpt.backends.detect import current
from distckpt.consensus import liveness
from distckpt.consensus.agree import Seat
from distckpt.consensus.step_vote import Answer, Ballot, Fact, Motion, Result, Scope
from distckpt.errors import CollectiveError, PhaseError, RanksDriftedApart
from distckpt.handlers.firing import after_event, engines_firing, hooks_of, return_to_event, set_hooks
from distckpt.handlers.places import counts_iterations

__all__ = [
    "StopReason",
    "Voter",
    "check_pace",
    "engine_that_looks_for_nan",
    "exit_after_run",
    "is_poisoned",
    "nan_is_looked_for",
    "nan_is_looked_for_later",
    "num_runs",
    "others_vote",
    "poison",
    "settle",
    "stop",
    "stop_reason",
]

StopReason = Literal["nan", "early_stop", "time_limit", "preempted"]

# What Gloo, NCCL, Horovod and the store say when a peer is gone; they raise bare RuntimeErrors.
_WORDS_OF_A_BROKEN_COLLECTIVE = (
    "gloo",
    "nccl",
    "peer",
    "connection",
    "socket",
    "process group",
    "timed out",
    "horovod",
)

_TOLD = "_distckpt_told"  # on an exception that the other ranks have been told of


class Voter(ABC):
    """Mixin of handlers that vote.

    Attributes:
        lag: 0 to act in the iteration that caused it, 1 to act one iteration later; None for no wish.
        every: hold the vote on each so-many-th iteration; None for no wish.
        timeout_s: seconds to wait for the other ranks; None for the default.
    """

    fact: ClassVar[Fact]
    """What its answer is to."""
    is_exact: ClassVar[bool] = False
    """Whether its vote must not lag."""
    lag: int | None
    every: int | None
    timeout_s: float | None
    _seat: Seat

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

    def _vote(self, engine: Engine, backend: Backend, *, watch: str | None = None) -> None:
        """All ranks. Put a fact on the engine's ballot; it is counted when the event's last handler has run.

        Args:
            engine: whose event it is.
            backend: the job's.
            watch: see :meth:`~distckpt.consensus.agree.Seat.take`.
        """
        return_to_event(engine)
        vote = _vote_of(engine)
        motion = vote.motion_of(self, backend)
        if motion is None:
            motion = vote.welcome(self, engine, backend, watch)
        vote.put(motion, self, engine)


def check_pace(lag: int | None, every: int | None) -> None:
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


def stop(engine: Engine, reason: StopReason) -> None:
    """Rank-local. Stop the engine's run, and remember why; the first reason stands."""
    vote = _vote_of(engine)
    if vote.reason is None:
        vote.reason = reason
    engine.terminate()


def stop_reason(engine: Engine) -> StopReason | None:
    """Return why a handler of distckpt's stopped the engine's last run; None where none did. Rank-local.

    It is the same on every rank.

    Example:
        >>> from distckpt import TerminateOnNan
        >>> trainer = Engine(lambda engine, batch: float("nan"))
        >>> trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan()) and None
        >>> trainer.run([0, 1]) and None
        >>> stop_reason(trainer)
        'nan'
    """
    vote = hooks_of(engine)
    return None if vote is None else vote.reason


def num_runs(engine: Engine) -> int:
    """Return a number that tells one run of the engine from the next, once a handler has voted or stopped it."""
    vote = hooks_of(engine)
    return 0 if vote is None else int(vote.num_runs)


def exit_after_run(engine: Engine, code: int) -> None:
    """Rank-local. Let the program end with an exit code when the engine's run is over."""
    _vote_of(engine).exit_code = code


def poison(engine: Engine) -> None:
    """Rank-local. Remember that the engine's present iteration was voted NaN."""
    _vote_of(engine).poisoned_at = engine.state.iteration


def is_poisoned(engine: Engine, around: Sequence[Engine] = ()) -> bool:
    """Tell whether the step that is to be saved on this event was voted NaN: the engine's, or that of one around it.

    Args:
        engine: whose event it is.
        around: which engines were around it, if it is over.
    """
    for one in (engine, *around, *engines_firing()):
        vote = hooks_of(one)
        if vote is not None and vote.poisoned_at is not None and vote.poisoned_at == one.state.iteration:
            return True
    return False


def settle(engine: Engine, around: Sequence[Engine] = ()) -> None:
    """Collective where a vote is open. Hold what is open of the votes of the engine and of the engines around it.

    Args:
        engine: whose event it is.
        around: see :func:`is_poisoned`.
    """
    seen: list[Engine] = []
    for one in (*around, *engines_firing(), engine):
        vote = hooks_of(one)
        if vote is not None and one not in seen:
            seen.append(one)
            vote.settle(one)


def others_vote(me: Voter, engine: Engine) -> bool:
    """Tell whether another handler votes on the event that the engine fires now. Rank-local."""
    vote = hooks_of(engine)
    if vote is not None and vote.is_scheduled:
        return True
    return engine in engines_firing() and any(voter is not me for voter in _voters_on(engine))


def nan_is_looked_for_later(me: Voter, engine: Engine) -> bool:
    """Tell whether NaN is looked for on the event that the engine fires now, but only after `me` has run."""
    is_later = is_known = False
    for voter in _voters_on(engine) if engine in engines_firing() else ():
        is_known = is_known or voter is me
        is_later = is_later or (voter.fact is Fact.NAN and is_known)
    return is_later or (not is_known and nan_is_looked_for(engine))


def nan_is_looked_for(engine: Engine) -> bool:
    """Tell whether NaN is looked for on the event that the engine fires now. Rank-local."""
    return engine in engines_firing() and any(voter.fact is Fact.NAN for voter in _voters_on(engine))


def engine_that_looks_for_nan(engine: Engine) -> Engine | None:
    """Return the outermost engine around `engine` that fires an event on which NaN is looked for. Rank-local."""
    return next((one for one in engines_firing() if one is not engine and nan_is_looked_for(one)), None)


def _voters_on(engine: Engine) -> Iterator[Voter]:
    """Yield the handlers that vote on the event that the engine fires now, in their order."""
    for handler, *_ in engine._event_handlers.get(engine.last_event_name, ()):  # noqa: SLF001 - no public list of them
        inner = _unwrapped(handler)
        if isinstance(inner, Voter):
            yield inner


def _unwrapped(handler: Any) -> Any:
    """Return the handler inside the wrapper that ignite puts around one with an event filter, or a method's object."""
    parent = getattr(handler, "_parent", None)
    handler = parent() if isinstance(parent, weakref.ref) else handler
    return getattr(handler, "__self__", handler)


class EngineVote:
    """The votes of one engine on one rank; kept on the engine.

    Attributes:
        reason: why the last run was stopped.
        exit_code: with which to end the program after this run; 0 to go on.
        num_runs: how many runs have begun since there is this object.
        poisoned_at: the iteration that was voted NaN.
        is_scheduled: whether somebody has voted on the event under way, and the count is still to come.
    """

    def __init__(self) -> None:
        self.reason: StopReason | None = None
        self.exit_code = 0
        self.num_runs = 0
        self.poisoned_at: int | None = None
        self._backend: Backend | None = None
        self._watch: liveness.Watch | None = None
        self._name = ""
        self._start_anew(None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "EngineVote":
        """Return a new one: a copy of an engine votes for itself."""
        return EngineVote()

    def __reduce__(self) -> tuple[Any, ...]:
        """Start anew in another process."""
        return (EngineVote, ())

    def _start_anew(self, backend: Backend | None) -> None:
        self._backend = backend
        self._rank = 0 if backend is None else backend.rank
        self._ballot = Ballot()
        self._pending: Callable[[], Result] | None = None
        self._num_votes = 0
        self._is_exact = False
        self.is_scheduled = False
        self._default_timeout_s = default_timeout_s()  # once: it reads the environment
        self._scope: Scope | None = None
        self._counts_iterations = True
        self._event: tuple[Any, str, bool] = (None, "", False)
        self._forget_voters()

    def _forget_voters(self) -> None:
        # By the identity of the handler, which is kept alive beside it: some handlers compare by value.
        self._motions: dict[int, tuple[Motion, Voter]] = {}
        self._voters: dict[Motion, Voter] = {}
        self._pace: dict[str, tuple[int, str]] = {}
        self._lag, self._every, self._pace_told = 0, 1, ""
        self._timeout_s: float | None = None

    # -- during an event ---------------------------------------------------------------------------

    def motion_of(self, voter: Voter, backend: Backend) -> Motion | None:
        """Return what the handler asks in this job; None if it is new to it. Rank-local."""
        found = self._motions.get(id(voter))
        return None if found is None or backend is not self._backend else found[0]

    def welcome(self, voter: Voter, engine: Engine, backend: Backend, watch: str | None) -> Motion:
        """All ranks. Let a handler take part, after all ranks have it."""
        if backend is not self._backend:  # another job than before
            self._start_anew(backend)
            ticket = backend.take_ticket("vote") if backend.world_size > 1 else None
            self._name = ticket or "vote"
        self._watch = liveness.ensure(backend, voter.timeout_s)
        if self._watch is not None:
            self._watch.enter(engine.state.iteration)
        who, _ = voter._seat.take(backend, watch=watch, timeout_s=voter.timeout_s)  # noqa: SLF001 - it is a voter's
        self._agree_on_pace(voter, who)
        motion = Motion(who, voter.fact)
        self._motions[id(voter)] = motion, voter
        self._voters[motion] = voter
        return motion

    def put(self, motion: Motion, voter: Voter, engine: Engine) -> None:
        """Rank-local. Put a handler's answer on the ballot."""
        if self._watch is not None:
            self._watch.enter(engine.state.iteration)
        self._ballot.put(self._rank, motion, voter._probe, engine)  # noqa: SLF001 - it is a voter's
        if voter.is_exact:
            self._is_exact = True
        if not self.is_scheduled:
            self.is_scheduled = True
            # Said now: a handler of the user's may fire events of its own before this one is over.
            self._look_where(engine)
            after_event(engine, self._end_of_event)

    def _look_where(self, engine: Engine) -> None:
        event, step = engine.last_event_name, engine.state.iteration
        if event is not self._event[0]:
            self._event = event, str(getattr(event, "name", event)), counts_iterations(engine)
        _, name, self._counts_iterations = self._event
        self._num_votes += 1
        self._scope = Scope(self._name, name, step, step if self._counts_iterations else self._num_votes)

    def _agree_on_pace(self, voter: Voter, who: str) -> None:
        """Take a handler's wishes; two that differ are a mistake.

        Raises:
            ValueError: another handler of this engine wishes for something else.
        """
        for name in ("lag", "every"):
            value = getattr(voter, name)
            if value is None:
                continue
            before, other = self._pace.setdefault(name, (value, who))
            if before != value:
                msg = (
                    f"The handlers of one engine share one vote, but {who} has {name}={value} and {other} has "
                    f"{name}={before}. Give it to one of them, or the same to all."
                )
                raise ValueError(msg)
        self._lag, self._every = self._pace.get("lag", (0, ""))[0], self._pace.get("every", (1, ""))[0]
        paces = ((name, value) for name, (value, _) in sorted(self._pace.items(), reverse=True))
        self._pace_told = "".join(f", {name}={value}" for name, value in paces if value > (name == "every"))
        if voter.timeout_s is not None:
            self._timeout_s = voter.timeout_s if self._timeout_s is None else min(self._timeout_s, voter.timeout_s)

    # -- at its end --------------------------------------------------------------------------------

    def _end_of_event(self, engine: Engine) -> None:
        """Collective. Hold the vote, or leave it to run, and act on what is known."""
        self.is_scheduled = False
        if not self._ballot:
            return  # somebody who needed to know has had it counted
        is_exact = self._is_exact or not self._counts_iterations
        if engine.state.iteration % self._every and not is_exact:
            return  # what is on the ballot stays there
        self._is_exact = False
        before = self._finish_pending()
        if self._lag and not is_exact and (before is None or not before.said):
            self._pending = self._start()
        else:
            self._act(engine, before, self._start()())

    def settle(self, engine: Engine) -> None:
        """Collective where something is open: finish the vote under way, and hold the one that is due later.

        Only where all ranks are bound to ask, as in a save.
        """
        before = self._finish_pending()
        self._act(engine, before, self._start()() if self._ballot else None)

    def _start(self) -> Callable[[], Result]:
        if self._backend is None or self._scope is None:  # nothing was brought
            msg = "a vote without a ballot"
            raise AssertionError(msg)
        self._scope.pace = self._pace_told  # of all handlers; the scope was made with the event's first one
        timeout_s = self._default_timeout_s if self._timeout_s is None else self._timeout_s
        return self._ballot.start(self._backend, self._scope, timeout_s=timeout_s)

    def _finish_pending(self) -> Result | None:
        pending, self._pending = self._pending, None
        return None if pending is None else pending()

    def _act(self, engine: Engine, *results: Result | None) -> None:
        """Let each handler act on the results, in the order of :class:`Fact`, then of the ballot."""
        said = [(motion, answers) for result in results if result for motion, answers in result.said.items()]
        if not said:
            return
        event = engine.last_event_name
        for motion, answers in sorted(said, key=lambda one: one[0].fact):
            # A handler that saves asks for the event's name; another one may have fired events since.
            engine.last_event_name = event
            self._voters[motion]._act(engine, answers)  # noqa: SLF001 - it is a voter's
        engine.last_event_name = event

    # -- around a run ------------------------------------------------------------------------------

    def before_event(self, engine: Engine, event: Any) -> None:
        """Begin a run with a clean slate, and end it with nothing open."""
        if event is Events.STARTED:
            self.reason, self.exit_code = None, 0
            self.num_runs += 1
            self._forget_open_votes()
            self._forget_voters()  # handlers may have been removed, or be another's with another pace
            if self.poisoned_at != engine.state.iteration:
                self.poisoned_at = None  # a run that begins anew comes to the same iteration again
        elif self._backend is not None and self._backend is current():
            self.settle(engine)

    def after_run(self, engine: Engine) -> None:
        """End the program where a handler asked for an exit code."""
        self._leave()
        if self.exit_code:
            code, self.exit_code = self.exit_code, 0
            engine.logger.info("Ending the program with exit code %d", code)
            sys.exit(code)

    def on_exception(self, engine: Engine, error: BaseException) -> BaseException:
        """Tell the other ranks, and find out whether it is another rank's death that is felt here."""
        self._forget_open_votes()
        watch = self._watch
        if watch is None or self._backend is not current():
            return error
        if vars(error).get(_TOLD) and not watch.in_run:
            return error  # ignite says it twice: where the exception is raised, and around the run
        if any(hooks_of(one) is not None for one in engines_firing()):
            return error  # the engine around this one may catch it; if not, it will tell
        watch.step = engine.state.iteration
        vars(error)[_TOLD] = True
        try:
            if isinstance(error, PhaseError | RanksDriftedApart):
                return error  # raised on every rank alike
            is_runtimes = isinstance(error, self._backend.untouched) or _is_of_a_broken_collective(error)
            if not isinstance(error, CollectiveError) and is_runtimes:
                news = watch.suspect()
                if news is not None:
                    return news
            watch.report(error, "".join(traceback.format_exception(error)))
        finally:
            self._leave()
        return error

    def _forget_open_votes(self) -> None:
        self._pending, self.is_scheduled, self._is_exact = None, False, False
        self._ballot = Ballot()

    def _leave(self) -> None:
        if self._watch is not None and not engines_firing():
            self._watch.leave()


def _is_of_a_broken_collective(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _WORDS_OF_A_BROKEN_COLLECTIVE)


def _vote_of(engine: Engine) -> EngineVote:
    vote: EngineVote | None = hooks_of(engine)
    if vote is None:
        vote = EngineVote()
        set_hooks(engine, vote)
    return vote
