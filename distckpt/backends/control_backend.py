"""A backend whose host values travel on a group of our own, beside the job's collectives.

Owns what such backends have in common, whatever carries the values: the group, the board, tickets and rolls.
"""

import functools
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch

from distckpt.backends.base import Backend, KeyValueStore, PeerMonitor, ReduceOp, default_timeout_s
from distckpt.backends.control_group import ControlGroup, store_barrier, store_lost_error
from distckpt.backends.transport import Transport
from distckpt.errors import CollectiveError, DesyncError

__all__ = ["FOLD", "ControlGroupBackend"]

FOLD: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "SUM": torch.add,
    "PRODUCT": torch.mul,
    "MIN": torch.minimum,
    "MAX": torch.maximum,
    "AND": torch.bitwise_and,
    "OR": torch.bitwise_or,
}
"""Two ranks' tensors to one, where a runtime does not reduce their dtype."""

_DRIFT_S = 1.0
# How long the board is asked for news in a roll, and how long the monitor for the reason why it is silent.
_NOTE_S = 1.0
_REASON_S = 5.0


class ControlGroupBackend(Backend):
    """One rank of a job, with a host group of its own.

    Args:
        rank: this rank.
        world_size: number of ranks.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._num_tickets: dict[str, int] = {}
        self._monitor: PeerMonitor | None = None
        self._finding = threading.Lock()  # notes are left by any thread
        self._board: KeyValueStore | None = None
        self._is_store_found = False
        self._lost_store: str | None = None  # during what it was not found

    @abstractmethod
    def _make_transport(self) -> Transport:
        """Return what carries the host values. Rank-local; called once, at the first use."""

    @abstractmethod
    def _make_store(self, what: object, timeout_s: float) -> KeyValueStore | None:
        """Return the job's board, or None where the runtime has none. Rank-local; called once, at the first use.

        Args:
            what: what the board is wanted for.
            timeout_s: seconds to wait for whoever keeps it.

        Raises:
            OSError: it cannot be reached.
            CollectiveTimeout: the rank that keeps it did not come.
        """

    @functools.cached_property
    def _control_group(self) -> ControlGroup:
        host = ControlGroup(self._make_transport(), self._find_store, self._rank, self._world_size)
        host.monitor = self._monitor
        return host

    def _find_store(self, what: object, timeout_s: float) -> KeyValueStore | None:
        """Return the job's board, which is made at the first call."""
        with self._finding:
            if self._lost_store is not None:
                msg = f"rank {self._rank}: {what} cannot run: the ranks were given up earlier ({self._lost_store})"
                raise CollectiveError(msg)
            if not self._is_store_found:
                try:
                    self._board = self._make_store(what, timeout_s)
                except OSError as error:
                    self._lost_store = str(what)
                    raise store_lost_error(self._rank, what, error) from error
                except CollectiveError:
                    self._lost_store = str(what)
                    raise
                self._is_store_found = True
            return self._board

    @property
    def monitor(self) -> PeerMonitor | None:  # the host group has to know it too
        """Asked while a collective waits, if there is one."""
        return self._monitor

    @monitor.setter
    def monitor(self, monitor: PeerMonitor | None) -> None:
        self._monitor = monitor
        if "_control_group" in vars(self):
            self._control_group.monitor = monitor

    def key_value_store(self, *, timeout_s: float | None = None) -> KeyValueStore | None:
        """Return the job's board, if it has one."""
        return self._find_store("the first use of the job's board", _limit(timeout_s))

    @property
    def rank(self) -> int:
        """Rank in the job."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of ranks in the job."""
        return self._world_size

    def reduce_host(self, values: torch.Tensor, op: ReduceOp, *, what: object, timeout_s: float | None) -> torch.Tensor:
        """Collective. Reduce over our own group."""
        limit_s = _limit(timeout_s)
        return self._control_group.reduce(values, op, what=what, timeout_s=limit_s)

    def start_max(self, values: Sequence[int], *, what: object, timeout_s: float | None) -> Callable[[], list[int]]:
        """Collective. Start to reduce over our own group, or through shared memory."""
        limit_s = _limit(timeout_s)
        return self._control_group.start_max(values, what=what, timeout_s=limit_s)

    def gather_host(self, data: bytes, num_bytes: int, *, what: object, timeout_s: float | None) -> list[bytes]:
        """Collective. Gather over our own group."""
        limit_s = _limit(timeout_s)
        return self._control_group.gather_bytes(data, num_bytes, what=what, timeout_s=limit_s)

    def close(self) -> None:
        """End the host group, if there is one."""
        if "_control_group" in vars(self):
            self._control_group.close()

    def next_object_id(self, kind: str) -> str | None:
        """Return ``kind#n``, counting from 0 in this job."""
        number = self._num_tickets.get(kind, 0)
        self._num_tickets[kind] = number + 1
        return f"{kind}#{number}"

    def post_note(self, ticket: str, text: str) -> None:
        """Leave a note on the job's board. Nothing where there is none."""
        board = self._find_store(f"a note of {ticket}", default_timeout_s())
        if board is not None:
            board.set(f"note/{ticket}", text, limit_s=default_timeout_s())

    def store_barrier(self, name: str, *, depends_on: str | None, timeout_s: float | None) -> str | None:
        """Wait until every rank has called `name`: on the job's board, or by a collective where there is none.

        Raises:
            DesyncError: every rank waits, at different names: none can ever come to the other.
            CollectiveError: a rank is lost, or the job's store.
        """
        limit_s = _limit(timeout_s)
        board = self._find_store(name, limit_s)
        if board is None:
            self.barrier(what=name, timeout_s=limit_s)
            return None
        self._control_group.find_store(name, limit_s)
        try:
            board.set(f"at/{self._rank}", name, limit_s=limit_s)
            note = self._call_the_roll(board, name, depends_on, limit_s)
            board.set(f"at/{self._rank}", "", limit_s=limit_s)
        except OSError as gone:
            self._raise_reason()
            raise store_lost_error(self._rank, name, gone) from gone
        except CollectiveError as error:
            if not error.missing:
                self._raise_reason()
            raise
        return note

    def _raise_reason(self) -> None:
        """Raise why the board cannot be reached, where the monitor knows."""
        reason = None if self._monitor is None else self._monitor.failure(_REASON_S)
        if reason is not None:
            raise reason

    def _call_the_roll(self, board: KeyValueStore, name: str, depends_on: str | None, timeout_s: float) -> str | None:
        drift = _Drift(board, self._world_size)

        def news() -> str | None:
            bad = None if self._monitor is None else self._monitor.failure()
            if bad is not None:
                raise bad
            self._control_group.refuse_if_given_up(name)
            drift.look(name)
            return None if depends_on is None else board.get_many([f"note/{depends_on}"], limit_s=_NOTE_S)[0]

        return store_barrier(
            board,
            f"roll/{name}",
            self._rank,
            self._world_size,
            what=name,
            timeout_s=timeout_s,
            watch=news,
        )


def _limit(timeout_s: float | None) -> float:
    return default_timeout_s() if timeout_s is None else timeout_s


class _Drift:
    """Finds out that all ranks wait, but not for each other.

    A rank that has just left a roll is written down there for a moment longer: only what lasts counts.
    """

    def __init__(self, board: KeyValueStore, world_size: int) -> None:
        self._board = board
        self._keys = [f"at/{rank}" for rank in range(world_size)]
        self._since_s: float | None = None
        self._seen: list[str] = []

    def look(self, mine: str) -> None:
        notes = self._board.get_many(self._keys, limit_s=_NOTE_S)
        places = [note for note in notes if note]
        if len(places) < len(notes) or all(place == mine for place in places) or places != self._seen:
            self._seen, self._since_s = places, time.monotonic()
        elif self._since_s is not None and time.monotonic() - self._since_s > _DRIFT_S:
            where = "; ".join(f"rank {rank} is at {place}" for rank, place in enumerate(places))
            msg = (
                f"The ranks wait at different places, and none can come to the other: {where}. Handlers have to be "
                "built and attached on all ranks, in the same order."
            )
            raise DesyncError(msg)
