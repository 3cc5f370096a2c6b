"""Receipts of the ranks that write one file together, on the job's board: the saving rank need not wait for a vote.

Owns how a receipt is left and looked for. It is a note beside the collectives, from a thread that enters none; where
the job has no board, or it does not answer, the ranks hear of each other in the next vote. Layer L4, below
:mod:`distckpt.flight`.
"""

import json
import threading
import time
from collections.abc import Sequence

from distckpt.backends.base import Board
from distckpt.snapshot import Checked

__all__ = ["Receipts"]

_LIMIT_S = 10.0
_LOOK_S = 0.005
_PATIENCE_S = 60.0


class Receipts:
    """The receipts of one handler's saves, one after the other.

    Args:
        board: the job's.
        who: the handler, by the same name on all ranks.
        token: of the save; the same on all ranks, and no other save's.
    """

    def __init__(self, board: Board, who: str, token: str) -> None:
        self._board = board
        self._who = who
        self._token = token
        self._is_off = threading.Event()

    def leave(self, rank: int, checked: Checked | None) -> None:
        """Leave a rank's: what it has checked; None where it failed. Any thread. Does nothing if nobody can take it."""
        try:
            self._board.put(self._key(rank), json.dumps([self._token, checked]), limit_s=_LIMIT_S)
        except (OSError, TimeoutError):
            self._is_off.set()

    def wait_for(self, ranks: Sequence[int]) -> list[Checked] | None:
        """Wait for those of other ranks, for a minute. Any thread.

        Returns:
            Theirs; None where one of them failed, there is no hearing of them, or :meth:`call_off` was called: then the
            votes tell.
        """
        keys, deadline = [self._key(rank) for rank in ranks], time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline and not self._is_off.is_set():
            try:
                notes = self._board.look(keys, limit_s=_LIMIT_S)
            except (OSError, TimeoutError):
                return None
            found = [json.loads(note) for note in notes if note is not None]
            ours = [checked for token, checked in found if token == self._token]
            if None in ours:
                return None
            if len(ours) == len(keys):
                return ours
            self._is_off.wait(timeout=_LOOK_S)
        return None

    def call_off(self) -> None:
        """Wait no more."""
        self._is_off.set()

    def _key(self, rank: int) -> str:
        return f"distckpt/receipt/{self._who}/{rank}"
