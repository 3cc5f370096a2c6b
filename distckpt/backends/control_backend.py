"""A backend whose host values travel on a group of our own, beside the job's collectives.

Owns what such backends have in common, whatever carries the values: the group, the board, tickets and rolls.
"""

import functools
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch

from distckpt.backends.base import Backend, Board, ReduceOp, Watcher, default_timeout_s
from distckpt.backends.control_group import HostGroup, board_is_gone, call_the_roll
from distckpt.backends.transport import Channel
from distckpt.errors import CollectiveError, DesyncError

__all__ = ["FOLD", "HostedBackend"]

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
# How long the board is asked for news in a roll, and how long the watcher for the reason why it is silent.
_NOTE_S = 1.0
_REASON_S = 5.0


class HostedBackend(Backend):
    """One rank of a job, with a host group of its own.

    Args:
        rank: this rank.
        world_size: number of ranks.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._num_tickets: dict[str, int] = {}
        self._watcher: Watcher | None = None
        self._finding = threading.Lock()  # notes are left by any thread
        self._board: Board | None = None
        self._is_board_found = False
        self._lost_board: str | None = None  # during what it was not found

    @abstractmethod
    def _make_channel(self) -> Channel:
        """Return what carries the host values. Rank-local; called once, at the first use."""

    @abstractmethod
    def _make_board(self, what: object, timeout_s: float) -> Board | None:
        """Return the job's board, or None where the runtime has none. Rank-local; called once, at the first use.

        Args:
            what: what the board is wanted for.
            timeout_s: seconds to wait for whoever keeps it.

        Raises:
            OSError: it cannot be reached.
            CollectiveTimeout: the rank that keeps it did not come.
        """

    @functools.cached_property
    def _host(self) -> HostGroup:
        host = HostGroup(self._make_channel(), self._find_board, self._rank, self._world_size)
        host.watcher = self._watcher
        return host

    def _find_board(self, what: object, timeout_s: float) -> Board | None:
        """Return the job's board, which is made at the first call."""
        with self._finding:
            if self._lost_board is not None:
                msg = f"rank {self._rank}: {what} cannot run: the ranks were given up earlier ({self._lost_board})"
                raise CollectiveError(msg)
            if not self._is_board_found:
                try:
                    self._board = self._make_board(what, timeout_s)
                except OSError as error:
                    self._lost_board = str(what)
                    raise board_is_gone(self._rank, what, error) from error
                except CollectiveError:
                    self._lost_board = str(what)
                    raise
                self._is_board_found = True
            return self._board

    @property
    def watcher(self) -> Watcher | None:  # the host group has to know it too
        """Asked while a collective waits, if there is one."""
        return self._watcher

    @watcher.setter
    def watcher(self, watcher: Watcher | None) -> None:
        self._watcher = watcher
        if "_host" in vars(self):
            self._host.watcher = watcher

    def board(self, *, timeout_s: float | None = None) -> Board | None:
        """Return the job's board, if it has one."""
        return self._find_board("the first use of the job's board", _limit(timeout_s))

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
        return self._host.reduce(values, op, what=what, timeout_s=limit_s)

    def start_max(self, values: Sequence[int], *, what: object, timeout_s: float | None) -> Callable[[], list[int]]:
        """Collective. Start to reduce over our own group, or through shared memory."""
        limit_s = _limit(timeout_s)
        return self._host.start_max(values, what=what, timeout_s=limit_s)

    def gather_host(self, data: bytes, num_bytes: int, *, what: object, timeout_s: float | None) -> list[bytes]:
        """Collective. Gather over our own group."""
        limit_s = _limit(timeout_s)
        return self._host.gather_bytes(data, num_bytes, what=what, timeout_s=limit_s)

    def close(self) -> None:
        """End the host group, if there is one."""
        if "_host" in vars(self):
            self._host.close()

    def take_ticket(self, kind: str) -> str | None:
        """Return ``kind#n``, counting from 0 in this job."""
        number = self._num_tickets.get(kind, 0)
        self._num_tickets[kind] = number + 1
        return f"{kind}#{number}"

    def post_note(self, ticket: str, text: str) -> None:
        """Leave a note on the job's board. Nothing where there is none."""
        board = self._find_board(f"a note of {ticket}", default_timeout_s())
        if board is not None:
            board.put(f"note/{ticket}", text, limit_s=default_timeout_s())

    def roll_call(self, name: str, *, watch: str | None, timeout_s: float | None) -> str | None:
        """Wait until every rank has called `name`: on the job's board, or by a collective where there is none.

        Raises:
            DesyncError: every rank waits, at different names: none can ever come to the other.
            CollectiveError: a rank is lost, or the job's store.
        """
        limit_s = _limit(timeout_s)
        board = self._find_board(name, limit_s)
        if board is None:
            self.barrier(what=name, timeout_s=limit_s)
            return None
        self._host.find_board(name, limit_s)
        try:
            board.put(f"at/{self._rank}", name, limit_s=limit_s)
            note = self._call_the_roll(board, name, watch, limit_s)
            board.put(f"at/{self._rank}", "", limit_s=limit_s)
        except OSError as gone:
            self._raise_reason()
            raise board_is_gone(self._rank, name, gone) from gone
        except CollectiveError as error:
            if not error.missing:
                self._raise_reason()
            raise
        return note

    def _raise_reason(self) -> None:
        """Raise why the board cannot be reached, where the watcher knows."""
        reason = None if self._watcher is None else self._watcher.news(_REASON_S)
        if reason is not None:
            raise reason

    def _call_the_roll(self, board: Board, name: str, watch: str | None, timeout_s: float) -> str | None:
        drift = _Drift(board, self._world_size)

        def news() -> str | None:
            bad = None if self._watcher is None else self._watcher.news()
            if bad is not None:
                raise bad
            self._host.refuse_if_given_up(name)
            drift.look(name)
            return None if watch is None else board.look([f"note/{watch}"], limit_s=_NOTE_S)[0]

        return call_the_roll(
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

    def __init__(self, board: Board, world_size: int) -> None:
        self._board = board
        self._keys = [f"at/{rank}" for rank in range(world_size)]
        self._since_s: float | None = None
        self._seen: list[str] = []

    def look(self, mine: str) -> None:
        notes = self._board.look(self._keys, limit_s=_NOTE_S)
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
