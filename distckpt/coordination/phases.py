"""Phases that all ranks walk together: errors travel, and one rank's value is everybody's.

Owns how a decision is reached from every rank's facts. Must not know what is decided, nor which runtime
carries it: it stands on the backend contract alone.

The protocol of a phase, the same for every kind of phase:

1. (all ranks) do the phase's own work and catch whatever it raises. Nothing is waited for here.
2. (all ranks) reduce one *header* of twelve int64 with MAX: place and turn, each with its negative, and the
   length of this rank's answer. Every collective of distckpt's begins with a header, so that ranks which came
   from different places meet in one and are told so.
3. (all ranks) if place or turn differ between ranks: gather the places, and raise
   :class:`~distckpt.errors.DesyncError`, which names them, on every rank.
4. (all ranks) gather the answers, padded to the longest.
5. (all ranks) if any rank failed: raise the same :class:`~distckpt.errors.RemoteRankError` on every rank.
6. (all ranks) every rank now holds every rank's answer, in rank order. What is computed from them by pure
   arithmetic is bit-identical everywhere; where one rank decides alone, its answer is picked from the list.

In a world of one no collective is made, and errors pass through as they were raised.
"""

import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, TypeVar

from distckpt.backends import wire
from distckpt.backends.base import Backend
from distckpt.errors import CollectiveError, DesyncError, RankFailure, RemoteRankError, remote_rank_error

__all__ = ["Place", "Seat", "post_failure", "raise_own", "run"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where in the program a rank is.

    Attributes:
        who: the handler, numbered among its like: ``Checkpoint#0``.
        doing: the phase, and the event that led to it.
        step: the engine's iteration, for messages. It may differ between ranks where that is no fault: an
            evaluator's shards can be of unequal length.
        turn: what has to be equal on all ranks: how often the handler was called, or an iteration.
    """

    who: str
    doing: str
    step: int
    turn: int = 0

    def __str__(self) -> str:
        """Return it as a phrase for messages."""
        return f"{self.who}, {self.doing}, step {self.step}"

    @property
    def key(self) -> str:
        """What has to be equal on all ranks."""
        return f"{self.who}\0{self.doing}"


@dataclass(frozen=True, slots=True)
class _Answer:
    """What this rank brings: a value, or the error that kept it from having one."""

    value: Any
    error: BaseException | None
    data: bytes


def _attempt(backend: Backend, work: Callable[[], Any]) -> _Answer:
    try:
        value = work()
        return _Answer(value, None, wire.encode({"value": value}))
    except BaseException as error:  # noqa: BLE001 - KeyboardInterrupt too: the others must hear of it first
        failure = RankFailure.from_exception(backend.rank, error, traceback.format_exc())
        return _Answer(None, error, wire.encode({"failure": asdict(failure)}))


def run(backend: Backend, place: Place, work: Callable[[], T], *, timeout_s: float | None = None) -> list[T]:
    """Collective. Do `work` on every rank and give every rank all the results.

    Steps 1-6 of the module's protocol.

    Args:
        backend: the job's.
        place: where this rank is; must be the same on all.
        work: returns a small value (see :func:`distckpt.backends.wire.encode`). It may itself be collective, as
            a user's ``state_dict`` can be, provided that it is so on all ranks.
        timeout_s: seconds to wait for the other ranks once this one is done; None for the default.

    Returns:
        One result a rank, in rank order; the same list on every rank.

    Raises:
        RemoteRankError: `work` failed on some rank; alike on every rank.
        DesyncError: the ranks are not at the same place; on every rank.
        CollectiveError: some rank did not come, or died.
        BaseException: what `work` raised here, where the others could not be told of it; it has a note of why.

    Example:
        >>> from distckpt.backends.serial import SerialBackend
        >>> run(SerialBackend(), Place(who="doc", doing="count", step=0), lambda: 7)
        [7]
    """
    if backend.world_size == 1:
        return [work()]
    answer = _attempt(backend, work)
    try:
        num_bytes = _meet(backend, place, answer, timeout_s=timeout_s)
        parts = backend.gather_host(answer.data, num_bytes, what=str(place), timeout_s=timeout_s)
    except CollectiveError as lost:
        if answer.error is not None:
            raise_own(answer.error, lost)
        raise
    return _settle(backend, place, answer, parts)


def raise_own(own: BaseException, lost: CollectiveError) -> NoReturn:
    """Raise this rank's own error, with a note of why the other ranks were not told of it."""
    own.add_note(f"The other ranks were not told of it: {lost}")
    context = own.__context__ or lost
    try:
        raise own
    finally:
        own.__context__ = context  # which `raise` replaces where another error is being handled


def _meet(backend: Backend, place: Place, answer: _Answer, *, timeout_s: float | None) -> int:
    """Collective. Steps 2 and 3: reduce the header; return the length of the longest answer."""
    try:
        return backend.meet(place.key, [len(answer.data)], turn=place.turn, told=str(place), timeout_s=timeout_s)[0]
    except DesyncError as error:
        raise error from answer.error


def _settle(backend: Backend, place: Place, answer: _Answer, parts: list[bytes]) -> list[Any]:
    """Steps 5 and 6, without any collective: the values of all ranks, or the error of those that failed."""
    answers = [wire.decode(part) for part in parts]
    failures = [RankFailure(**said["failure"]) for said in answers if "failure" in said]
    if answer.error is not None and backend.passes(answer.error):
        raise answer.error  # the others get it as a RemoteRankError
    alike = {(one.kinds, one.message) for one in failures}
    if isinstance(answer.error, RemoteRankError) and len(failures) == backend.world_size and len(alike) == 1:
        raise answer.error  # of a phase inside this one: every rank has it as it was raised there
    if failures:
        raise remote_rank_error(f"{place}, of {backend.world_size} ranks", failures) from answer.error
    return [said["value"] for said in answers]


class Seat:
    """One handler's seat among its like on the other ranks.

    Constructors issue no collectives, so it is only at a handler's first event that the ranks can find out
    whether all of them have it. Taken anew when the process group is destroyed and made anew.

    Args:
        kind: the handler's class name.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._backend: Backend | None = None
        self._name = kind
        self._num_turns = 0
        self._has_met = False

    def __getstate__(self) -> dict[str, str]:
        """Keep the kind alone: a copy has a seat of its own, and a backend cannot be copied."""
        return {"kind": self._kind}

    def __setstate__(self, state: dict[str, str]) -> None:
        """Start anew."""
        self.__init__(state["kind"])  # type: ignore[misc]  # a seat has nothing else

    def take(self, backend: Backend, *, watch: str | None = None, timeout_s: float | None = None) -> tuple[str, int]:
        """All ranks. Return the handler's name and turn; the first time, wait for the other ranks to have it.

        Args:
            backend: the job's.
            watch: a ticket (:meth:`~distckpt.backends.base.Backend.take_ticket`) of something that the handler needs
                and whose construction may have failed on another rank.
            timeout_s: seconds to wait for the other ranks; None for the default.

        Raises:
            CollectiveTimeout: some ranks do not have the handler; it names them.
            RemoteRankError: construction failed on another rank; it is of the type that was raised there.
        """
        if backend is not self._backend:
            ticket = backend.take_ticket(self._kind) if backend.world_size > 1 else None
            self._backend, self._name, self._num_turns = backend, ticket or self._kind, 0
            self._has_met = backend.world_size == 1
        if not self._has_met:
            # The name is kept when this fails: a second try must not be taken for a second handler.
            note = backend.roll_call(f"the first event of {self._name}", watch=watch, timeout_s=timeout_s)
            if note is not None:
                fields = wire.decode(note.encode("ascii"))
                raise remote_rank_error(f"constructing {self._name}", [RankFailure(**fields)])
            self._has_met = True
        self._num_turns += 1
        return self._name, self._num_turns


def post_failure(backend: Backend, ticket: str, error: Exception) -> None:
    """Rank-local. Leave a note that what `ticket` stands for could not be made here; see :meth:`Seat.take`."""
    failure = RankFailure.from_exception(backend.rank, error, "")
    backend.post_note(ticket, wire.encode(asdict(failure)).decode("ascii"))
