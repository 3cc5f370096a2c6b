"""The vote rounds of one engine on one rank: when the votes are held, and what the engine's run does around them.

Handlers use :mod:`distckpt.handlers.engine_votes`. :mod:`distckpt.coordination.votes` counts the answers.
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
from distckpt.handlers.engine_events import after_event, get_enclosing_engines, get_hooks, is_iteration_event

if TYPE_CHECKING:
    from distckpt.handlers.engine_votes import Poller, StopReason, Voter

_logger = logging.getLogger(__name__)
_REPORTED = "_distckpt_reported"  # set on an exception that was reported to the other ranks
# Gloo, NCCL, Horovod and the store raise a bare RuntimeError with one of these words if a peer is gone.
_PEER_ERROR_WORDS = ("gloo", "nccl", "peer", "connection", "socket", "process group", "timed out", "horovod")


class EngineVotes:
    """The votes of one engine on one rank, with the hooks of :mod:`distckpt.handlers.engine_events`.

    Attributes:
        stop_reason: why the last run was stopped; None if no handler stopped it.
        exit_code: exit code of the program after this run; 0 to continue.
        nonfinite_at: the iteration that was voted NaN; None for none.
        pollers: voters that vote after each iteration without being attached.
        announces_errors: whether an exception that leaves a run is reported to other ranks even if no handler votes.
        has_uncaught_error: whether the present exception leaves the run although no handler of EXCEPTION_RAISED raises.
    """

    def __init__(self) -> None:
        self.stop_reason: StopReason | None = None
        self.exit_code = 0
        self.nonfinite_at: int | None = None
        self.pollers: list[Poller] = []
        self.announces_errors = self.has_uncaught_error = False
        self._monitor: HeartbeatMonitor | None = None
        self._name = ""
        self._start_anew(None)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return a new object: a copy of an engine votes for itself."""
        return (EngineVotes, ())

    def _start_anew(self, backend: Backend | None) -> None:
        self._backend = backend
        self._rank = 0 if backend is None else backend.rank
        self._num_votes = 0
        self._default_timeout_s = default_timeout_s()  # once: it reads the environment
        self._scope: VoteScope | None = None
        self._is_iteration_event = True
        self._event: tuple[Any, str, bool] = (None, "", False)
        self._forget_open_votes()
        self._forget_voters()

    def _forget_open_votes(self) -> None:
        self._pending: Callable[[], VoteResult] | None = None
        self._is_scheduled = False  # whether a count is due after the present event
        self._round = VoteRound()

    def _forget_voters(self) -> None:
        # By the handler's id, and the handler is kept alive: some handlers compare by value.
        self._entries: dict[int, tuple[VoteEntry, Voter]] = {}
        self._voters: dict[VoteEntry, Voter] = {}
        self._schedule: dict[str, tuple[int, str]] = {}
        self._lag, self._every, self._schedule_text = 0, 1, ""
        self._timeout_s: float | None = None

    # -- during an event ---------------------------------------------------------------------------

    def vote(self, voter: "Voter", engine: Engine, backend: Backend) -> None:
        """All ranks. Add a handler's answer to the round; the first time, wait until all ranks have the handler."""
        known = self._entries.get(id(voter))
        entry = self._register(voter, engine, backend) if known is None or backend is not self._backend else known[0]
        if self._monitor is not None:
            self._monitor.enter_run(engine.state.iteration)
        self._round.add(self._rank, entry, voter._probe, engine)  # noqa: SLF001 - Voter's method
        if not self._is_scheduled:
            self._is_scheduled = True
            self._set_scope(engine)  # now: a user's handler may fire other events before this event ends
            after_event(engine, self._count_after_event)

    def _register(self, voter: "Voter", engine: Engine, backend: Backend) -> VoteEntry:
        if backend is not self._backend:  # another job than before
            self._start_anew(backend)
            object_id = backend.next_object_id("vote") if backend.world_size > 1 else None
            self._name = object_id or "vote"
        if voter.may_run_early:  # a Checkpoint alone starts no heartbeats
            self._monitor = ensure_heartbeat(backend, voter.timeout_s)
        if self._monitor is not None:
            self._monitor.enter_run(engine.state.iteration)
        depends_on = voter._object_id()  # noqa: SLF001 - Voter's method; so below
        handler, _ = voter._handler_id.advance(backend, depends_on=depends_on, timeout_s=voter.timeout_s)  # noqa: SLF001
        self._merge_schedule(voter, handler)
        entry = VoteEntry(handler, voter.vote_kind)
        self._entries[id(voter)] = entry, voter
        self._voters[entry] = voter
        return entry

    def _set_scope(self, engine: Engine) -> None:
        event, step = engine.last_event_name, engine.state.iteration
        if event is not self._event[0]:
            self._event = event, str(getattr(event, "name", event)), is_iteration_event(engine)
        _, name, self._is_iteration_event = self._event
        self._num_votes += 1
        self._scope = VoteScope(self._name, name, step, step if self._is_iteration_event else self._num_votes)

    def _merge_schedule(self, voter: "Voter", handler: str) -> None:
        """Apply a handler's lag, interval and time-out.

        Raises:
            ValueError: another handler of this engine asks for a different lag or interval.
        """
        for name in ("lag", "every"):
            value = getattr(voter, name)
            if value is None:
                continue
            before, other = self._schedule.setdefault(name, (value, handler))
            if before != value:
                raise ValueError(
                    f"The handlers of one engine share one vote, but {handler} has {name}={value} and {other} has "
                    f"{name}={before}. Give it to one of them, or the same to all."
                )
        self._lag, self._every = self._schedule.get("lag", (0, ""))[0], self._schedule.get("every", (1, ""))[0]
        text = "" if self._lag == 0 else f", lag={self._lag}"
        self._schedule_text = text if self._every == 1 else f"{text}, every={self._every}"
        if voter.timeout_s is not None:
            self._timeout_s = voter.timeout_s if self._timeout_s is None else min(self._timeout_s, voter.timeout_s)

    # -- after an event, or when a save needs the result -------------------------------------------

    @property
    def has_votes(self) -> bool:
        """Whether the present round has answers that no vote has counted."""
        return bool(self._round)

    def _count_after_event(self, engine: Engine) -> None:
        """Collective. Hold the vote, or start it, and act on the known results."""
        self._is_scheduled = False
        if not self._round:
            return  # a save has held its vote
        if engine.state.iteration % self._every and self._is_iteration_event:
            return  # the answers stay in the round
        before = self._finish_pending()
        if self._lag and self._is_iteration_event and not (before is not None and (before.reports or before.cleared)):
            self._pending = self._start()
        else:
            self._act(engine, before, self._start()())

    def flush(self, engine: Engine) -> None:
        """Collective if a vote is open: finish the pending vote, hold the present one, and act on both.

        Call it only where all ranks do, as in a save.
        """
        self._is_scheduled = False
        before = self._finish_pending()
        self._act(engine, before, self._start()() if self._round else None)

    def _start(self) -> Callable[[], VoteResult]:
        if self._backend is None or self._scope is None:
            raise AssertionError("a vote without an answer")
        self._scope.schedule = self._schedule_text  # of all handlers: the event's first handler has made the scope
        timeout_s = self._default_timeout_s if self._timeout_s is None else self._timeout_s
        return self._round.start(self._backend, self._scope, timeout_s=timeout_s)

    def _finish_pending(self) -> VoteResult | None:
        pending, self._pending = self._pending, None
        return None if pending is None else pending()

    def _act(self, engine: Engine, *results: VoteResult | None) -> None:
        """Let each handler act on the results, in the order of :class:`VoteKind`, then of the round."""
        found = [item for result in results if result for item in result.reports.items()]
        found += [(entry, {}) for result in results if result for entry in result.cleared]
        if not found:
            return
        event = engine.last_event_name
        for entry, reports in sorted(found, key=lambda item: item[0].kind):
            # A handler that saves reads the event's name, but the handler before may have fired other events.
            engine.last_event_name = event
            self._voters[entry]._act(engine, reports)  # noqa: SLF001 - Voter's method
        engine.last_event_name = event

    # -- around a run ------------------------------------------------------------------------------

    def after_iteration(self, engine: Engine) -> None:
        """All ranks. Let the pollers vote, in the round of the iteration's other voters."""
        for poller in tuple(self.pollers):
            poller.poll(engine)

    def _wait_all(self, engine: Engine) -> None:
        for poller in tuple(self.pollers):
            poller.wait_all(engine)

    def before_event(self, engine: Engine, event: Any) -> None:
        """Reset the state before STARTED; before COMPLETED, count open votes and wait for background work."""
        if event is Events.STARTED:
            self.stop_reason, self.exit_code = None, 0
            self._forget_open_votes()
            self._forget_voters()  # handlers may have been removed, or replaced by some with another schedule
            if self.nonfinite_at != engine.state.iteration:
                self.nonfinite_at = None  # a run that begins anew reaches the same iteration again
        else:
            if self._backend is not None and self._backend is current():
                self.flush(engine)
            self._wait_all(engine)

    def after_run(self, engine: Engine) -> None:
        """Wait for background work, and end the program if a handler asked for an exit code."""
        self._wait_all(engine)
        if self._monitor is not None and not get_enclosing_engines(engine):
            self._monitor.leave_run()
        if self.exit_code:
            code, self.exit_code = self.exit_code, 0
            _logger.log(log_level(current().rank, {0}), "The run was preempted: the program ends, exit code %d", code)
            sys.exit(code)

    def is_uncaught(self, engine: Engine) -> bool:
        """Return True if an exception leaves the run although no handler of EXCEPTION_RAISED has raised."""
        is_uncaught, self.has_uncaught_error = self.has_uncaught_error, False
        return is_uncaught

    def on_exception(self, engine: Engine, error: BaseException) -> BaseException:
        """Report the error to the other ranks, or find the lost rank that caused it; abort background work."""
        self.has_uncaught_error = False
        if isinstance(error, GeneratorExit):
            return error  # an interrupted run is discarded after `run` has returned: nothing is open
        leaving = self._report_error(engine, error)
        for poller in tuple(self.pollers):
            poller.abort(leaving)
        return leaving

    def _report_error(self, engine: Engine, error: BaseException) -> BaseException:
        self._forget_open_votes()
        backend = current()
        monitor = self._find_monitor(backend)
        if monitor is None:
            return error
        if vars(error).get(_REPORTED) and not monitor.in_run:
            return error  # ignite handles it twice: where it is raised, and around the run
        if any(get_hooks(one) is not None for one in get_enclosing_engines(engine)):
            return error  # the engine around this one may catch the error; otherwise that engine reports it
        monitor.step = engine.state.iteration
        vars(error)[_REPORTED] = True
        try:
            if isinstance(error, RemoteRankError | DesyncError):
                return error  # every rank raises it
            if not isinstance(error, CollectiveError) and _is_peer_error(error, backend):
                failure = monitor.find_lost_ranks()
                if failure is not None:
                    return failure
            monitor.report_error(error, "".join(traceback.format_exception(error)))
        finally:
            if not get_enclosing_engines(engine):
                monitor.leave_run()
        return error

    def _find_monitor(self, backend: Backend) -> HeartbeatMonitor | None:
        """Return the job's monitor; without a vote, start it for an error that is to be announced."""
        monitor = self._monitor if self._backend is backend else None
        if monitor is None and self.announces_errors:
            with contextlib.suppress(CollectiveError):  # the store is lost: no rank would learn of it
                monitor = ensure_heartbeat(backend, self._timeout_s)
        return monitor


def _is_peer_error(error: BaseException, backend: Backend) -> bool:
    """Return True if a runtime may raise this exception because a peer is gone."""
    if isinstance(error, (*backend.passthrough_errors, dist.DistError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _PEER_ERROR_WORDS)
