"""Votes: one reduction per event, in which the ranks agree on what all handlers of an engine report.

The protocol:

1. (all ranks) during an event each handler adds its answer to the round. Nothing is waited for; an exception is kept.
2. (all ranks) after the last handler, or when a save needs the result, reduce one header
   (:meth:`~distckpt.backends.base.Backend.check_in_sync`): digest of event and handlers, and iteration, each with its
   negative; whether a handler failed; one number for each :class:`VoteKind`. If the ranks are at different iterations,
   or have different handlers, all raise :class:`~distckpt.errors.DesyncError`.
3. (all ranks) only if a number is not 0: gather the reports. A level-triggered kind has no reports: its handler acts
   once the kind is set on no rank.
4. (all ranks) return the same result.

Step 2 can run during the next iteration: :meth:`VoteRound.start` starts it and returns a function that waits for it.
With one rank nothing is reduced.
"""

import functools
import operator
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any, NoReturn, Protocol

from distckpt.backends import wire
from distckpt.backends.base import Backend, default_timeout_s
from distckpt.coordination.phases import raise_unreported
from distckpt.errors import (
    CollectiveError,
    CollectiveTimeout,
    DesyncError,
    RankFailure,
    RemoteRankError,
    remote_rank_error,
)

_POLL_S = 0.0002


class VoteKind(IntEnum):
    """What a handler can report. Results are handled in this order.

    A round reduces one number per kind, after one for failures. :meth:`~distckpt.backends.base.Backend.check_in_sync`
    takes at most eight numbers, so there can be at most seven kinds.
    """

    NAN = 0
    """The output holds NaN or infinity."""
    SAVE_WANTED = 1
    """A checkpoint is due."""
    SAVE_PENDING = 2
    """A background save is not durable on this rank yet. Level-triggered: handled once no rank has it set."""
    SIGNAL = 3
    """The process received a stop signal."""
    TIME_OVER = 4
    """The time limit is reached."""


_LEVEL_TRIGGERED = frozenset({VoteKind.SAVE_PENDING})


class DeviceFlag(Protocol):
    """A bool that an accelerator has not computed yet. No method waits."""

    def is_ready(self) -> bool:
        """Return True if the value has arrived on the host."""

    def value(self) -> bool:
        """Return the value, once it is ready."""

    def as_tensor(self) -> Any:
        """Return the value as a tensor on the accelerator, bool (); None if it is not one."""


Detail = Callable[[], Any]
"""Returns the report of a yes, for the other ranks; called in step 3."""


@dataclass(slots=True)
class DeferredAnswer:
    """An answer that is not known yet, and its detail if it is a yes."""

    answer: DeviceFlag
    detail: Detail


Answer = Detail | DeferredAnswer | None
"""One rank's answer: None for no, the detail for yes."""


@dataclass(frozen=True, slots=True, eq=False)
class VoteEntry:
    """One handler's entry, the same object in every round. The handler's name is equal on all ranks."""

    handler: str
    kind: VoteKind


@dataclass(slots=True)
class VoteScope:
    """Where a vote takes place.

    Attributes:
        name: the vote's name, equal on all ranks.
        event: name of the engine's event.
        step: the engine's iteration.
        sequence: a number that has to be equal on all ranks: the iteration, or the count of votes on events that do
            not count iterations.
        schedule: the vote's lag and interval as text that begins with a comma; empty for the defaults. It has to be
            equal on all ranks, or they would act in different iterations.
    """

    name: str
    event: str
    step: int
    sequence: int
    schedule: str = ""

    def __str__(self) -> str:
        """Return the scope as text for messages."""
        return f"{self.name} on {self.event}, step {self.step}"


@dataclass(frozen=True, slots=True)
class VoteResult:
    """The result of a vote, the same on every rank.

    Attributes:
        scope: where it took place.
        reports: for each entry with a yes on some rank, in the order of the round: the detail of each such rank.
        cleared: level-triggered entries that are set on no rank.
    """

    scope: VoteScope
    reports: Mapping[VoteEntry, Mapping[int, Any]] = field(default_factory=dict)
    cleared: tuple[VoteEntry, ...] = ()


class VoteRound:
    """Collects one engine's answers on one rank, and starts a vote on them."""

    def __init__(self) -> None:
        self._entries: list[VoteEntry] = []
        self._answers: dict[VoteEntry, list[Detail | DeferredAnswer]] = {}
        self._error: BaseException | None = None
        self._failure: RankFailure | None = None
        self._last_key: tuple[str, str, str, list[VoteEntry], str] = ("", "", "", [], "")

    def __bool__(self) -> bool:
        """Return True if an answer was added since the last vote."""
        return bool(self._entries)

    def add(self, rank: int, entry: VoteEntry, probe: Callable[[Any], Answer], engine: Any) -> None:
        """Rank-local. Add an answer. An earlier yes of the same entry stays.

        `probe` is called now, with `engine`, and returns the answer. The vote raises its exception on all ranks.
        """
        if entry not in self._entries:
            self._entries.append(entry)
        if self._error is not None:
            return
        try:
            answer = probe(engine)
        except BaseException as error:  # noqa: BLE001 - KeyboardInterrupt too: the other ranks must learn of it first
            self._error = error
            self._failure = RankFailure.from_exception(rank, error, traceback.format_exc())
            return
        if answer is not None:
            self._answers.setdefault(entry, []).append(answer)

    def start(self, backend: Backend, scope: VoteScope, *, timeout_s: float | None) -> Callable[[], VoteResult]:
        """Collective. Start a vote on the answers, and empty the round.

        If an answer is not known yet, the reduction starts only when the result is asked for: this call never waits
        for the accelerator. A backend with ``can_reduce_lazily`` reduces such answers on the device.

        Returns:
            A function that waits, and returns the result or raises, on every rank: RemoteRankError if a probe failed on
            some rank (with one rank, the probe's exception), DesyncError or CollectiveError.
        """
        vote = _Vote(
            backend, scope, self._key(scope), self._entries, self._answers, self._error, self._failure, timeout_s
        )
        # New containers: the vote keeps these, and the next event may add answers while it runs.
        self._entries, self._answers, self._error, self._failure = [], {}, None, None
        if not vote.has_unknown_answers():
            try:
                vote.start()
            except CollectiveError as lost:
                vote.raise_local(lost)
        return vote.finish

    def _key(self, scope: VoteScope) -> str:
        """Return text that has to be equal on all ranks; mostly the same as for the last vote."""
        name, event, schedule, entries, key = self._last_key
        if name != scope.name or event != scope.event or schedule != scope.schedule or entries != self._entries:
            key = "\0".join((scope.name, scope.event, scope.schedule, *(entry.handler for entry in self._entries)))
            self._last_key = scope.name, scope.event, scope.schedule, self._entries, key
        return key


@dataclass(slots=True)
class _Vote:
    """One vote, from step 2 on."""

    backend: Backend
    scope: VoteScope
    key: str
    entries: list[VoteEntry]
    answers: dict[VoteEntry, list[Detail | DeferredAnswer]]
    error: BaseException | None
    failure: RankFailure | None
    timeout_s: float | None
    wait: Callable[[], list[int]] | None = None

    def __str__(self) -> str:
        """Return where this rank is, for messages."""
        handlers = ", ".join(entry.handler for entry in self.entries)
        scope = self.scope
        return f"{handlers}, on {scope.event}, voting ({scope.name}{scope.schedule}), step {scope.step}"

    def has_unknown_answers(self) -> bool:
        """Return True if some answer has to be known before step 2."""
        return bool(self.answers) and any(
            isinstance(answer, DeferredAnswer)
            and not (self.backend.can_reduce_lazily and answer.answer.as_tensor() is not None)
            for answers in self.answers.values()
            for answer in answers
        )

    def start(self) -> None:
        """Start step 2."""
        if self.backend.world_size == 1:
            return
        numbers: list[Any] = [0] * (1 + len(VoteKind))
        if self.error is not None:
            numbers[0] = 1
        by_kind: dict[VoteKind, list[Detail | DeferredAnswer]] = {}
        for entry, answers in self.answers.items():
            by_kind.setdefault(entry.kind, []).extend(answers)
        for kind, answers in by_kind.items():
            numbers[1 + kind] = _combine(answers)
        self.wait = self.backend.start_sync_check(
            self.key,
            numbers,
            sequence=self.scope.sequence,
            description=self,
            timeout_s=self.timeout_s,
        )

    def raise_local(self, lost: CollectiveError) -> NoReturn:
        """Raise the probe's exception, which the other ranks do not know of; `lost` if there is none."""
        if self.error is None or self.error is lost:
            raise lost
        raise_unreported(self.error, lost)

    def finish(self) -> VoteResult:
        """Wait for step 2, and take steps 3 and 4."""
        try:
            return self._finish()
        except RemoteRankError:  # all ranks know of the error, even of one that is a CollectiveError
            raise
        except CollectiveError as lost:
            self.raise_local(lost)

    def _finish(self) -> VoteResult:
        if self.wait is None:
            self._wait_answers()
            self.start()
        if self.wait is None:  # one rank
            if self.error is not None:
                raise self.error
            cleared = self._cleared([bool(self.answers.get(entry)) for entry in self.entries])
            return VoteResult(self.scope, {entry: {0: detail()} for entry, detail in self._details().items()}, cleared)
        try:
            numbers = self.wait()
        except DesyncError as error:
            raise error from self.error
        cleared = self._cleared([bool(numbers[1 + entry.kind]) for entry in self.entries])
        kinds = zip(VoteKind, numbers[1:], strict=True)
        if numbers[0] or any(number for kind, number in kinds if kind not in _LEVEL_TRIGGERED):
            return self._gather(cleared)
        return VoteResult(self.scope, cleared=cleared)

    def _cleared(self, are_set: Sequence[bool]) -> tuple[VoteEntry, ...]:
        pairs = zip(self.entries, are_set, strict=True)
        return tuple(entry for entry, is_set in pairs if entry.kind in _LEVEL_TRIGGERED and not is_set)

    def _details(self) -> dict[VoteEntry, Detail]:
        """Return the detail of each yes, in the order of the round: the first one if an entry has several."""
        found: dict[VoteEntry, Detail] = {}
        for entry in self.entries:
            if entry.kind not in _LEVEL_TRIGGERED:
                for answer in self.answers.get(entry, ()):
                    if not isinstance(answer, DeferredAnswer):
                        found.setdefault(entry, answer)
        return found

    def _wait_answers(self) -> None:
        """Wait for the answers that are not known yet, and keep the details of those that are a yes."""
        limit_s = default_timeout_s() if self.timeout_s is None else self.timeout_s
        deadline = time.monotonic() + limit_s
        known: dict[VoteEntry, list[Detail | DeferredAnswer]] = {}
        for entry, answers in self.answers.items():
            for answer in answers:
                if isinstance(answer, DeferredAnswer):
                    self._wait_ready(answer.answer, deadline, limit_s)
                    if answer.answer.value():
                        known.setdefault(entry, []).append(answer.detail)
                else:
                    known.setdefault(entry, []).append(answer)
        self.answers = known

    def _wait_ready(self, flag: DeviceFlag, deadline: float, limit_s: float) -> None:
        while not flag.is_ready():
            failure = None if self.backend.monitor is None else self.backend.monitor.failure()
            if failure is not None:
                raise failure
            if time.monotonic() > deadline:
                raise CollectiveTimeout(
                    f"rank {self.backend.rank}: waited {limit_s:g} s for this rank's own accelerator in "
                    f"{self.scope}: does a collective of the job's hang there?"
                )
            time.sleep(_POLL_S)

    def _gather(self, cleared: tuple[VoteEntry, ...]) -> VoteResult:
        """Collective. Take step 3: gather the reports, or raise the error of the ranks that failed."""
        failure = self.failure
        mine: dict[str, Any] = {"reports": {}, "failure": None}
        try:
            if failure is None:
                self._wait_answers()
                mine["reports"] = {entry.handler: detail() for entry, detail in self._details().items()}
        except Exception as error:  # noqa: BLE001 - all ranks raise it, as they do the exception of a probe
            self.error, failure = error, RankFailure.from_exception(self.backend.rank, error, traceback.format_exc())
        mine["failure"] = None if failure is None else asdict(failure)
        try:
            wire.encode(mine)
        except (TypeError, ValueError):  # a detail that cannot be sent must not keep this rank from the collective
            mine["reports"] = {handler: str(detail) for handler, detail in mine["reports"].items()}
        # Without the step: it may differ between ranks on events that do not count iterations.
        what = f"counting {self.scope.name} on {self.scope.event}"
        answers = self.backend.gather_objects(mine, what=what, timeout_s=self.timeout_s)
        failures = [RankFailure(**answer["failure"]) for answer in answers if answer["failure"] is not None]
        if self.error is not None and self.backend.is_passthrough(self.error):
            raise self.error  # the other ranks raise a RemoteRankError for it
        if failures:
            raise remote_rank_error(f"{self}, of {self.backend.world_size} ranks", failures) from self.error
        reports: dict[VoteEntry, dict[int, Any]] = {}
        for entry in self.entries:  # in the round's order, which is the same on all ranks
            for rank, answer in enumerate(answers):
                if entry.handler in answer["reports"]:
                    reports.setdefault(entry, {})[rank] = answer["reports"][entry.handler]
        return VoteResult(self.scope, reports, cleared)


def _combine(answers: Sequence[Detail | DeferredAnswer]) -> Any:
    """Return 1 if a yes is known, else the disjunction of the unknown answers, as a tensor on the device."""
    pending = [answer.answer.as_tensor() for answer in answers if isinstance(answer, DeferredAnswer)]
    return functools.reduce(operator.or_, pending) if len(pending) == len(answers) else 1
