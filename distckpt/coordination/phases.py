"""Phases: steps that all ranks take together, in which an error on one rank is raised on all.

The protocol of a phase:

1. (all ranks) do the phase's own work, and catch any exception.
2. (all ranks) reduce a header of twelve int64 with MAX: the sync point's digest and sequence number, each with its
   negative, the length of this rank's answer, and the answer's digest with its negative. Every collective of distckpt
   begins with such a header.
3. (all ranks) if the sync point's digest or the sequence number differ between the ranks: gather the sync points, and
   raise :class:`~distckpt.errors.DesyncError`, which names them, on every rank.
4. (all ranks) if the digests of the answers differ: gather the answers, padded to the longest. Otherwise this rank's
   answer is that of all ranks.
5. (all ranks) if any rank failed: raise the same :class:`~distckpt.errors.RemoteRankError` on every rank.
6. (all ranks) return the answers of all ranks, in rank order. A pure function of them has the same result on every
   rank. Where one rank decides, the caller picks that rank's answer.

With one rank no collective is issued, and errors pass through unchanged.
"""

import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NoReturn, TypeVar

from distckpt.backends import wire
from distckpt.backends.base import Backend
from distckpt.errors import CollectiveError, DesyncError, RankFailure, RemoteRankError, remote_rank_error

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncPoint:
    """A point in the program that all ranks have to reach together.

    Attributes:
        handler: the handler's name and number, as in ``Checkpoint#0``.
        phase: the phase's description, and the event that led to it.
        step: the engine's iteration, for messages. It may differ between ranks: the shards of an evaluator's data can
            have unequal lengths.
        sequence: a number that has to be equal on all ranks: the count of the handler's calls, or an iteration.
    """

    handler: str
    phase: str
    step: int
    sequence: int = 0

    def __str__(self) -> str:
        """Return the sync point as text for messages."""
        return f"{self.handler}, {self.phase}, step {self.step}"

    @property
    def key(self) -> str:
        """Text that has to be equal on all ranks."""
        return f"{self.handler}\0{self.phase}"


def run(backend: Backend, point: SyncPoint, work: Callable[[], T], *, timeout_s: float | None = None) -> list[T]:
    """Collective. Call `work` on every rank, and return the results of all ranks.

    Runs steps 1 to 6 of the module's protocol.

    Args:
        backend: the job's backend.
        point: where this rank is; the same on all ranks.
        work: returns a small value (see :func:`distckpt.backends.wire.encode`). It may itself be collective, as a
            user's ``state_dict`` can be, if it is so on all ranks.
        timeout_s: seconds to wait for the other ranks after `work`; None for the default.

    Returns:
        One result per rank, in rank order; the same list on every rank. Equal results are one object.

    Raises:
        RemoteRankError: `work` failed on some rank; the same error on every rank.
        DesyncError: the ranks are at different sync points; on every rank.
        CollectiveError: some rank did not arrive, or died.
        BaseException: the exception of `work` on this rank, if the other ranks do not know of it; a note says why.

    Example:
        >>> from distckpt.backends.serial import SerialBackend
        >>> run(SerialBackend(), SyncPoint(handler="doc", phase="count", step=0), lambda: 7)
        [7]
    """
    if backend.world_size == 1:
        return [work()]
    own_error: BaseException | None = None
    try:
        data = wire.encode({"value": work()})
    except BaseException as error:  # noqa: BLE001 - KeyboardInterrupt too: the other ranks must learn of it first
        own_error = error
        data = wire.encode({"failure": asdict(RankFailure.from_exception(backend.rank, error, traceback.format_exc()))})
    try:
        parts = backend.gather_in_sync(point.key, data, sequence=point.sequence, description=point, timeout_s=timeout_s)
    except DesyncError as error:
        raise error from own_error
    except CollectiveError as lost:
        if own_error is not None:
            raise_unreported(own_error, lost)
        raise
    decoded = {chunk: wire.decode(chunk) for chunk in set(parts)}  # mostly the same of all ranks
    answers = [decoded[chunk] for chunk in parts]
    failures = [RankFailure(**answer["failure"]) for answer in answers if "failure" in answer]
    if own_error is not None and backend.is_passthrough(own_error):
        raise own_error  # the other ranks raise a RemoteRankError for it
    is_alike = len(failures) == backend.world_size and len({(one.kinds, one.message) for one in failures}) == 1
    if isinstance(own_error, RemoteRankError) and is_alike:
        raise own_error  # a nested phase has already raised it on every rank
    if failures:
        raise remote_rank_error(f"{point}, of {backend.world_size} ranks", failures) from own_error
    return [answer["value"] for answer in answers]


def raise_unreported(own: BaseException, lost: CollectiveError) -> NoReturn:
    """Raise this rank's own error, with a note that the other ranks do not know of it."""
    own.add_note(f"The other ranks do not know of it: {lost}")
    context = own.__context__ or lost
    try:
        raise own
    finally:
        own.__context__ = context  # `raise` replaces it while another error is handled


class HandlerId:
    """The name of one handler, equal on all ranks, and the count of its calls.

    Constructors issue no collectives, so the ranks compare their handlers at a handler's first event. If the process
    group is destroyed and created again, the handler gets a new name and a new count.

    Args:
        kind: the handler's class name.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._backend: Backend | None = None
        self._name = kind
        self._sequence = 0
        self._is_known = False

    def __getstate__(self) -> dict[str, str]:
        """Return the kind alone: a copy is another handler, and a backend cannot be copied."""
        return {"kind": self._kind}

    def __setstate__(self, state: dict[str, str]) -> None:
        """Restore the kind; the count starts at 0."""
        self.__init__(state["kind"])  # type: ignore[misc]  # the constructor sets every attribute

    def advance(
        self, backend: Backend, *, depends_on: str | None = None, timeout_s: float | None = None
    ) -> tuple[str, int]:
        """All ranks. Count a call; return the handler's name and the count. The first call waits for all ranks.

        `depends_on` is the id (:meth:`~distckpt.backends.base.Backend.next_object_id`) of an object that the handler
        needs, and whose construction may have failed on another rank.

        Raises:
            CollectiveTimeout: some ranks do not have the handler; the error names them.
            RemoteRankError: construction failed on another rank; it has the type of the error there.
        """
        if backend is not self._backend:
            object_id = backend.next_object_id(self._kind) if backend.world_size > 1 else None
            self._backend, self._name, self._sequence = backend, object_id or self._kind, 0
            self._is_known = backend.world_size == 1
        if not self._is_known:
            # The name is kept if this fails, so that a second attempt does not appear as a second handler.
            note = backend.store_barrier(f"the first event of {self._name}", depends_on=depends_on, timeout_s=timeout_s)
            if note is not None:
                failure = RankFailure(**wire.decode(note.encode("ascii")))
                raise remote_rank_error(f"constructing {self._name}", [failure])
            self._is_known = True
        self._sequence += 1
        return self._name, self._sequence


def post_failure(backend: Backend, object_id: str, error: Exception) -> None:
    """Rank-local. Publish that the construction of an object failed on this rank; see :meth:`HandlerId.advance`."""
    failure = RankFailure.from_exception(backend.rank, error, "")
    backend.post_note(object_id, wire.encode(asdict(failure)).decode("ascii"))
