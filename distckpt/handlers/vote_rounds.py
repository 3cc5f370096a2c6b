"""The votes of one engine on one rank: when they are held, and what an engine's run does around them.

Owns the ballot of an engine, and what follows from a count. What handlers see of it lies in
:mod:`distckpt.handlers.engine_votes`.
"""

import contextlib
import logging
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from ignite.engine import Engine, Events

from distckpt._messages import log_level
from distckpt.backends.base import Backend, default_timeout_s
from distckpt.backends.detect import current
from distckpt.coordination.heartbeat import HeartbeatMonitor
from distckpt.coordination.liveness import ensure_heartbeat
from distckpt.coordination.votes import VoteEntry, VoteResult, VoteRound, VoteScope
from distckpt.errors import CollectiveError, DesyncError, RemoteRankError
from distckpt.handlers.engine_events import after_event, get_firing_engines, get_hooks, is_iteration_event

if TYPE_CHECKING:
    from distckpt.handlers.engine_votes import Poller, StopReason, Voter

_logger = logging.getLogger(__name__)
_TOLD = "_distckpt_told"  # on an exception that the other ranks have been told of


class EngineVotes:
    """The votes of one engine on one rank; kept on the engine.

    Attributes:
        reason: why the last run was stopped.
        exit_code: with which to end the program after this run; 0 to go on.
        num_runs: how many runs have begun since there is this object.
        nonfinite_at: the iteration that was voted NaN.
        is_scheduled: whether somebody has voted on the event under way, and the count is still to come.
        pollers: those who vote after each iteration without being attached.
        announces_errors: whether the other ranks are told of an exception that leaves a run, though no handler votes.
        has_uncaught_error: whether the exception under way leaves the run though its handlers do not raise.
    """

    def __init__(self) -> None:
        self.reason: StopReason | None = None
        self.exit_code = 0
        self.num_runs = 0
        self.nonfinite_at: int | None = None
        self.pollers: list[Poller] = []
        self.announces_errors = self.has_uncaught_error = False
        self._backend: Backend | None = None
        self._monitor: HeartbeatMonitor | None = None
        self._name = ""
        self._start_anew(None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "EngineVotes":
        """Return a new one: a copy of an engine votes for itself."""
        return EngineVotes()

    def __reduce__(self) -> tuple[Any, ...]:
        """Start anew in another process."""
        return (EngineVotes, ())

    def _start_anew(self, backend: Backend | None) -> None:
        self._backend = backend
        self._rank = 0 if backend is None else backend.rank
        self._ballot = VoteRound()
        self._pending: Callable[[], VoteResult] | None = None
        self._num_votes = 0
        self.is_scheduled = False
        self._default_timeout_s = default_timeout_s()  # once: it reads the environment
        self._scope: VoteScope | None = None
        self._counts_iterations = True
        self._event: tuple[Any, str, bool] = (None, "", False)
        self._forget_voters()

    def _forget_voters(self) -> None:
        # By the identity of the handler, which is kept alive beside it: some handlers compare by value.
        self._motions: dict[int, tuple[VoteEntry, Voter]] = {}
        self._voters: dict[VoteEntry, Voter] = {}
        self._pace: dict[str, tuple[int, str]] = {}
        self._lag, self._every, self._pace_told = 0, 1, ""
        self._timeout_s: float | None = None

    # -- during an event ---------------------------------------------------------------------------

    def motion_of(self, voter: "Voter", backend: Backend) -> VoteEntry | None:
        """Return what the handler asks in this job; None if it is new to it. Rank-local."""
        found = self._motions.get(id(voter))
        return None if found is None or backend is not self._backend else found[0]

    def welcome(self, voter: "Voter", engine: Engine, backend: Backend) -> VoteEntry:
        """All ranks. Let a handler take part, after all ranks have it."""
        if backend is not self._backend:  # another job than before
            self._start_anew(backend)
            ticket = backend.next_object_id("vote") if backend.world_size > 1 else None
            self._name = ticket or "vote"
        if voter.may_run_early:  # a Checkpoint by itself starts no heartbeats
            self._monitor = ensure_heartbeat(backend, voter.timeout_s)
        if self._monitor is not None:
            self._monitor.enter_run(engine.state.iteration)
        depends_on = voter._object_id()  # noqa: SLF001 - it is a voter's
        who, _ = voter._handler_id.advance(backend, depends_on=depends_on, timeout_s=voter.timeout_s)  # noqa: SLF001 - as above
        self._agree_on_pace(voter, who)
        motion = VoteEntry(who, voter.vote_kind)
        self._motions[id(voter)] = motion, voter
        self._voters[motion] = voter
        return motion

    def put(self, motion: VoteEntry, voter: "Voter", engine: Engine) -> None:
        """Rank-local. Put a handler's answer on the ballot."""
        if self._monitor is not None:
            self._monitor.enter_run(engine.state.iteration)
        self._ballot.add(self._rank, motion, voter._probe, engine)  # noqa: SLF001 - it is a voter's
        if not self.is_scheduled:
            self.is_scheduled = True
            # Said now: a handler of the user's may fire events of its own before this one is over.
            self._look_where(engine)
            after_event(engine, self._end_of_event)

    def _look_where(self, engine: Engine) -> None:
        event, step = engine.last_event_name, engine.state.iteration
        if event is not self._event[0]:
            self._event = event, str(getattr(event, "name", event)), is_iteration_event(engine)
        _, name, self._counts_iterations = self._event
        self._num_votes += 1
        self._scope = VoteScope(self._name, name, step, step if self._counts_iterations else self._num_votes)

    def _agree_on_pace(self, voter: "Voter", who: str) -> None:
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

    # -- at its end, or where a save needs to know --------------------------------------------------

    @property
    def has_ballot(self) -> bool:
        """Whether a handler has voted, and the count is still to come."""
        return bool(self._ballot)

    def _end_of_event(self, engine: Engine) -> None:
        """Collective. Hold the vote, or leave it to run, and act on what is known."""
        self.is_scheduled = False
        if not self._ballot:
            return  # a save has had it counted
        if engine.state.iteration % self._every and self._counts_iterations:
            return  # what is on the ballot stays there
        before = self._finish_pending()
        if self._lag and self._counts_iterations and not (before is not None and (before.reports or before.cleared)):
            self._pending = self._start()
        else:
            self._act(engine, before, self._start()())

    def settle(self, engine: Engine) -> None:
        """Collective where something is open: finish the vote under way, and hold the one that is due later.

        Only where all ranks are bound to ask, as in a save.
        """
        self.is_scheduled = False
        before = self._finish_pending()
        self._act(engine, before, self._start()() if self._ballot else None)

    def _start(self) -> Callable[[], VoteResult]:
        if self._backend is None or self._scope is None:  # nothing was brought
            msg = "a vote without a ballot"
            raise AssertionError(msg)
        self._scope.schedule = self._pace_told  # of all handlers; the scope was made with the event's first one
        timeout_s = self._default_timeout_s if self._timeout_s is None else self._timeout_s
        return self._ballot.start(self._backend, self._scope, timeout_s=timeout_s)

    def _finish_pending(self) -> VoteResult | None:
        pending, self._pending = self._pending, None
        return None if pending is None else pending()

    def _act(self, engine: Engine, *results: VoteResult | None) -> None:
        """Let each handler act on the results, in the order of :class:`VoteKind`, then of the ballot."""
        said = [(motion, answers) for result in results if result for motion, answers in result.reports.items()]
        said += [(motion, {}) for result in results if result for motion in result.cleared]
        if not said:
            return
        event = engine.last_event_name
        for motion, answers in sorted(said, key=lambda one: one[0].kind):
            # A handler that saves asks for the event's name; another one may have fired events since.
            engine.last_event_name = event
            self._voters[motion]._act(engine, answers)  # noqa: SLF001 - it is a voter's
        engine.last_event_name = event

    # -- around a run ------------------------------------------------------------------------------

    def after_iteration(self, engine: Engine) -> None:
        """All ranks. Let the pollers vote, with the iteration's other voters."""
        for poller in tuple(self.pollers):
            poller.poll(engine)

    def _wait_all(self, engine: Engine) -> None:
        for poller in tuple(self.pollers):
            poller.wait_all(engine)

    def before_event(self, engine: Engine, event: Any) -> None:
        """Begin a run with a clean slate, and end it with nothing open."""
        if event is Events.STARTED:
            self.reason, self.exit_code = None, 0
            self.num_runs += 1
            self._forget_open_votes()
            self._forget_voters()  # handlers may have been removed, or be another's with another pace
            if self.nonfinite_at != engine.state.iteration:
                self.nonfinite_at = None  # a run that begins anew comes to the same iteration again
        else:
            if self._backend is not None and self._backend is current():
                self.settle(engine)
            self._wait_all(engine)

    def after_run(self, engine: Engine) -> None:
        """End what is in flight, and the program where a handler asked for an exit code."""
        self._wait_all(engine)
        self._leave()
        if self.exit_code:
            code, self.exit_code = self.exit_code, 0
            _logger.log(log_level(current().rank, {0}), "The run was preempted: the program ends, exit code %d", code)
            sys.exit(code)

    def is_uncaught(self, engine: Engine) -> bool:
        """Return True if an exception leaves the run though no handler of EXCEPTION_RAISED has raised."""
        del engine
        is_so, self.has_uncaught_error = self.has_uncaught_error, False
        return is_so

    def on_exception(self, engine: Engine, error: BaseException) -> BaseException:
        """Tell the other ranks, or find out whether it is another's death that is felt here; end what is in flight."""
        self.has_uncaught_error = False
        if isinstance(error, GeneratorExit):
            return error  # an interrupted run is thrown away, at any time: `run` has returned, nothing is in flight
        leaving = self._tell_others(engine, error)
        for poller in tuple(self.pollers):
            poller.abort(leaving)
        return leaving

    def _tell_others(self, engine: Engine, error: BaseException) -> BaseException:
        self._forget_open_votes()
        backend = current()
        monitor = self._monitor_of(backend)
        if monitor is None:
            return error
        if vars(error).get(_TOLD) and not monitor.in_run:
            return error  # ignite says it twice: where the exception is raised, and around the run
        if any(get_hooks(one) is not None for one in get_firing_engines()):
            return error  # the engine around this one may catch it; if not, it will tell
        monitor.step = engine.state.iteration
        vars(error)[_TOLD] = True
        try:
            if isinstance(error, RemoteRankError | DesyncError):
                return error  # raised on every rank alike
            is_runtimes = isinstance(error, backend.passthrough_errors) or is_peer_error(error)
            if not isinstance(error, CollectiveError) and is_runtimes:
                failure = monitor.find_lost_ranks()
                if failure is not None:
                    return failure
            monitor.report_error(error, "".join(traceback.format_exception(error)))
        finally:
            if not get_firing_engines():
                monitor.leave_run()
        return error

    def _monitor_of(self, backend: Backend) -> HeartbeatMonitor | None:
        """Return the job's monitor. Where no handler votes it begins with an error that is to be announced."""
        monitor = self._monitor if self._backend is backend else None
        if monitor is None and self.announces_errors:
            with contextlib.suppress(CollectiveError):  # the store is lost: no rank can be told
                monitor = ensure_heartbeat(backend, self._timeout_s)
        return monitor

    def _forget_open_votes(self) -> None:
        self._pending, self.is_scheduled = None, False
        self._ballot = VoteRound()

    def _leave(self) -> None:
        if self._monitor is not None and not get_firing_engines():
            self._monitor.leave_run()


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


def is_peer_error(error: BaseException) -> bool:
    """Tell whether an exception is what a runtime raises when a peer is gone."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _WORDS_OF_A_BROKEN_COLLECTIVE)
