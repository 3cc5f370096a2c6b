"""One vote per step: what all handlers of an engine have to say in one event, agreed on by one reduction.

Owns the ballot and how it is counted. Must not know about engines, nor what a handler does with the result.

The protocol:

1. (all ranks) during an event each handler puts a fact on the ballot: whether it is so on this rank. Nothing is
   waited for; an error of the handler's is kept.
2. (all ranks) when the last handler has run, or a save needs the result, reduce one header
   (:meth:`~distckpt.backends.base.Backend.meet`): event and iteration, each with its negative, whether some handler
   failed, and a number for each kind of fact. Ranks that are at different iterations, or whose handlers differ, get
   :class:`~distckpt.errors.DesyncError`.
3. (all ranks) only when something is so somewhere, or failed: gather which ranks say so, and what they tell of it. Of
   a quiet fact nobody tells more than that it is so somewhere.
4. (all ranks) every rank holds the same result.

Step 2 can be left to run beside the next iteration: :meth:`Ballot.start` begins it, and what it returns waits for it.
In a world of one nothing is reduced.
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
from distckpt.coordination.phases import raise_own
from distckpt.errors import CollectiveError, CollectiveTimeout, DesyncError, RankFailure, remote_rank_error

__all__ = ["Answer", "Ballot", "Detail", "Fact", "Later", "Motion", "Pending", "Result", "Scope"]

_POLL_S = 0.0002


class Fact(IntEnum):
    """What a rank can say, in the order in which it is acted on."""

    NAN = 0
    """The output holds NaN or infinity."""
    SAVE_WANTED = 1
    """A checkpoint is due."""
    PARTS_PENDING = 2
    """Not all that was saved in the background is durable on this rank. A quiet one: what counts is where it is so no
    more."""
    SIGNAL = 3
    """The process was told to stop."""
    TIME_OVER = 4
    """The time limit is reached."""


_QUIET = frozenset({Fact.PARTS_PENDING})


class Later(Protocol):
    """An answer that is on its way from an accelerator."""

    def is_here(self) -> bool:
        """Tell whether it has come. Waits for nothing."""

    def value(self) -> bool:
        """Return it, once it is here."""

    def number(self) -> Any:
        """Return it as a tensor, bool (), on the accelerator, or None if it is not one. Waits for nothing."""


Detail = Callable[[], Any]
"""What to tell the other ranks of a yes; called when it is counted."""


@dataclass(slots=True)
class Pending:
    """An answer that is not known yet, and what to tell if it is a yes."""

    answer: Later
    detail: Detail


Answer = Detail | Pending | None
"""A rank's: None for no, for yes what to tell of it."""


@dataclass(frozen=True, slots=True, eq=False)
class Motion:
    """What one handler asks in a vote, event after event.

    Attributes:
        who: the handler, by the same name on all ranks.
        fact: of which kind.
    """

    who: str
    fact: Fact


@dataclass(slots=True)
class Scope:
    """Where a vote takes place.

    Attributes:
        name: the vote's, the same on all ranks.
        event: what it belongs to.
        step: the engine's iteration.
        turn: what has to be equal on all ranks: the iteration, or where events do not count iterations the number of
            the vote.
        pace: the vote's lag and interval, as a phrase that begins with a comma; empty for the usual ones. It has to be
            equal on all ranks: they would act in different iterations.
    """

    name: str
    event: str
    step: int
    turn: int
    pace: str = ""

    def __str__(self) -> str:
        """Return it as a phrase for messages."""
        return f"{self.name} on {self.event}, step {self.step}"


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a vote, the same on every rank.

    Attributes:
        scope: where it took place.
        said: for each motion with a yes somewhere, what each rank that said yes tells of it; in the ballot's order.
        over: the motions of quiet facts that are so nowhere.
    """

    scope: Scope
    said: Mapping[Motion, Mapping[int, Any]] = field(default_factory=dict)
    over: tuple[Motion, ...] = ()


class Ballot:
    """One engine's ballot on one rank: facts are put on it, and counted with those of the other ranks."""

    def __init__(self) -> None:
        self._motions: list[Motion] = []
        self._answers: dict[Motion, list[Detail | Pending]] = {}
        self._error: BaseException | None = None
        self._failure: RankFailure | None = None
        self._where: tuple[str, str, str, list[Motion], str] = ("", "", "", [], "")

    def __bool__(self) -> bool:
        """Tell whether something was put on it since the last count."""
        return bool(self._motions)

    def put(self, rank: int, motion: Motion, probe: Callable[[Any], Answer], engine: Any) -> None:
        """Rank-local. Put a fact on the ballot; an earlier answer to the same motion, not counted yet, is kept.

        Args:
            rank: this one.
            motion: the same object each time.
            probe: tells whether it is so; called now, with `engine`. What it raises is raised by the count, on all
                ranks.
            engine: for `probe`.
        """
        if motion not in self._motions:
            self._motions.append(motion)
        if self._error is not None:
            return
        try:
            answer = probe(engine)
        except BaseException as error:  # noqa: BLE001 - KeyboardInterrupt too: the others must hear of it first
            self._error = error
            self._failure = RankFailure.from_exception(rank, error, traceback.format_exc())
            return
        if answer is not None:
            self._answers.setdefault(motion, []).append(answer)

    def start(self, backend: Backend, scope: Scope, *, timeout_s: float | None) -> Callable[[], Result]:
        """Collective. Start to count, and return what waits for the result. The ballot is empty afterwards.

        Where an answer is still on its way from an accelerator, the reduction begins only when the result is asked for:
        nothing waits for the accelerator here. A backend that takes lazy numbers has them reduced where they are.

        Args:
            backend: the job's.
            scope: where this rank is.
            timeout_s: seconds to wait for the other ranks; None for the default.

        Returns:
            Waits, and returns the result or raises: RemoteRankError, on every rank, where a probe failed on some rank
            (in a world of one what it raised); DesyncError; CollectiveError.
        """
        count = _Count(backend, scope, self._motions, self._answers, self._error, self._failure, timeout_s)
        count.where = self._place(scope)
        # New ones: the count keeps these, and may be under way while the next event's facts are put.
        self._motions, self._answers, self._error, self._failure = [], {}, None, None
        if not count.waits():
            try:
                count.start()
            except CollectiveError as lost:
                count.raise_own(lost)
        return count.finish

    def _place(self, scope: Scope) -> str:
        """Return what has to be equal on all ranks, beside the turn. Mostly the same as before."""
        name, event, pace, motions, where = self._where
        if name != scope.name or event != scope.event or pace != scope.pace or motions != self._motions:
            where = "\0".join((scope.name, scope.event, scope.pace, *(motion.who for motion in self._motions)))
            self._where = scope.name, scope.event, scope.pace, self._motions, where
        return where


class _Count:
    """A count under way."""

    __slots__ = ("_answers", "_backend", "_error", "_failure", "_motions", "_scope", "_timeout_s", "_wait", "where")

    def __init__(
        self,
        backend: Backend,
        scope: Scope,
        motions: list[Motion],
        answers: dict[Motion, list[Detail | Pending]],
        error: BaseException | None,
        failure: RankFailure | None,
        timeout_s: float | None,
    ) -> None:
        self.where = ""
        self._motions = motions
        self._answers = answers
        self._backend = backend
        self._scope = scope
        self._error = error
        self._failure = failure
        self._timeout_s = timeout_s
        self._wait: Callable[[], list[int]] | None = None

    def waits(self) -> bool:
        """Tell whether some answer has to be known before step 2."""
        return bool(self._answers) and any(
            isinstance(answer, Pending)
            and not (self._backend.takes_lazy_numbers and answer.answer.number() is not None)
            for answers in self._answers.values()
            for answer in answers
        )

    def start(self) -> None:
        """Step 2."""
        if self._backend.world_size == 1:
            return
        numbers: list[Any] = [0] * (1 + len(Fact))
        if self._error is not None:
            numbers[0] = 1
        by_fact: dict[Fact, list[Detail | Pending]] = {}
        for motion, answers in self._answers.items():
            by_fact.setdefault(motion.fact, []).extend(answers)
        for fact, answers in by_fact.items():
            numbers[1 + fact] = _number(answers)
        self._wait = self._backend.start_meeting(
            self.where,
            numbers,
            turn=self._scope.turn,
            told=_Told(self._scope, self._motions),
            timeout_s=self._timeout_s,
        )

    def raise_own(self, lost: CollectiveError) -> NoReturn:
        """Raise what a probe raised here, where the other ranks cannot be told of it; without such an error `lost`."""
        if self._error is None or self._error is lost:
            raise lost
        raise_own(self._error, lost)

    def finish(self) -> Result:
        """Wait for step 2, and walk steps 3 and 4."""
        try:
            return self._finish()
        except CollectiveError as lost:
            self.raise_own(lost)

    def _finish(self) -> Result:
        if self._wait is None:
            self._settle_answers()
            self.start()
        if self._wait is None:  # a world of one
            if self._error is not None:
                raise self._error
            said = {motion: {0: detail()} for motion, detail in self._details().items()}
            return Result(self._scope, said, self._over([bool(self._answers.get(motion)) for motion in self._motions]))
        try:
            numbers = self._wait()
        except DesyncError as error:
            raise error from self._error
        over = self._over([bool(numbers[1 + motion.fact]) for motion in self._motions])
        if numbers[0] or any(number for fact, number in zip(Fact, numbers[1:], strict=True) if fact not in _QUIET):
            return self._gather(over)
        return Result(self._scope, over=over)

    def _over(self, are_so: Sequence[bool]) -> tuple[Motion, ...]:
        """Return the motions of quiet facts that are so nowhere."""
        pairs = zip(self._motions, are_so, strict=True)
        return tuple(motion for motion, is_so in pairs if motion.fact in _QUIET and not is_so)

    def _details(self) -> dict[Motion, Detail]:
        """Return what to tell of each yes: of the first one, where a handler said several; in the ballot's order."""
        found: dict[Motion, Detail] = {}
        for motion in self._motions:
            if motion.fact in _QUIET:
                continue
            for answer in self._answers.get(motion, ()):
                if not isinstance(answer, Pending):
                    found.setdefault(motion, answer)
        return found

    def _settle_answers(self) -> None:
        """Wait for the answers that are on their way from an accelerator, and keep those that are a yes."""
        limit_s = default_timeout_s() if self._timeout_s is None else self._timeout_s
        deadline = time.monotonic() + limit_s
        settled: dict[Motion, list[Detail | Pending]] = {}
        for motion, answers in self._answers.items():
            for answer in answers:
                if isinstance(answer, Pending):
                    self._await(answer.answer, deadline, limit_s)
                    if answer.answer.value():
                        settled.setdefault(motion, []).append(answer.detail)
                else:
                    settled.setdefault(motion, []).append(answer)
        self._answers = settled

    def _await(self, answer: Later, deadline: float, limit_s: float) -> None:
        while not answer.is_here():
            news = None if self._backend.watcher is None else self._backend.watcher.news()
            if news is not None:
                raise news
            if time.monotonic() > deadline:
                msg = (
                    f"rank {self._backend.rank}: waited {limit_s:g} s for this rank's own accelerator in "
                    f"{self._scope}: does a collective of the job's hang there?"
                )
                raise CollectiveTimeout(msg)
            time.sleep(_POLL_S)

    def _gather(self, over: tuple[Motion, ...]) -> Result:
        """Step 3: what each rank says, or the error of those that failed."""
        failure = self._failure
        mine: dict[str, Any] = {"said": {}, "failure": None}
        try:
            if failure is None:
                self._settle_answers()
                mine["said"] = {motion.who: detail() for motion, detail in self._details().items()}
        except Exception as error:  # noqa: BLE001 - as in a probe
            self._error, failure = error, RankFailure.from_exception(self._backend.rank, error, traceback.format_exc())
        mine["failure"] = None if failure is None else asdict(failure)
        what = f"counting {self._scope.name} on {self._scope.event}"  # its step may differ where turn is no iteration
        answers = self._backend.gather_objects(_plain(mine), what=what, timeout_s=self._timeout_s)
        failures = [RankFailure(**answer["failure"]) for answer in answers if answer["failure"] is not None]
        if self._error is not None and self._backend.passes(self._error):
            raise self._error  # the others get it as a RemoteRankError
        if failures:
            told = _Told(self._scope, self._motions)
            raise remote_rank_error(f"{told}, of {self._backend.world_size} ranks", failures) from self._error
        said: dict[Motion, dict[int, Any]] = {}
        for motion in self._motions:  # in the order of the ballot, which is the same on all ranks
            for rank, answer in enumerate(answers):
                if motion.who in answer["said"]:
                    said.setdefault(motion, {})[rank] = answer["said"][motion.who]
        return Result(self._scope, said, over)


def _number(answers: Sequence[Detail | Pending]) -> Any:
    """Return 1 where a yes is known, else whether one is on its way, as a tensor that is not computed yet."""
    pending = [answer.answer.number() for answer in answers if isinstance(answer, Pending)]
    return functools.reduce(operator.or_, pending) if len(pending) == len(answers) else 1


class _Told:
    """Where a rank is, for people; made into text only for an error."""

    __slots__ = ("_motions", "_scope")

    def __init__(self, scope: Scope, motions: Sequence[Motion]) -> None:
        self._scope = scope
        self._motions = motions

    def __str__(self) -> str:
        handlers = ", ".join(motion.who for motion in self._motions)
        scope = self._scope
        return f"{handlers}, on {scope.event}, voting ({scope.name}{scope.pace}), step {scope.step}"


def _plain(value: Any) -> Any:
    """Return `value` with what cannot be sent as text: a detail must not keep a rank from the gathering."""
    try:
        wire.encode(value)
    except (TypeError, ValueError):
        said = {who: str(detail) for who, detail in value["said"].items()}
        return {**value, "said": said}
    return value
