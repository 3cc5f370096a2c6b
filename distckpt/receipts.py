"""Receipts of the ranks that write one file together, on the job's board: the saving rank need not wait for a vote.

Owns how a receipt is left and looked for, and, before it, word of the checksums: what comes after everybody's bytes can
be made while those are written. It is a note beside the collectives, from a thread that enters none; where
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
_EARLY_LOOK_S = 0.02
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
        self._put(self._key(rank), checked)

    def leave_word(self, rank: int, checked: Checked) -> None:
        """Tell what a rank has checked, and has not written yet. Any thread. Does nothing if nobody can take it."""
        self._put(self._key(rank, "checked"), checked)

    def _put(self, key: str, checked: Checked | None) -> None:
        try:
            self._board.put(key, json.dumps([self._token, checked]), limit_s=_LIMIT_S)
        except (OSError, TimeoutError):
            self._is_off.set()

    def word_of(self, ranks: Sequence[int], is_over: threading.Event) -> list[Checked] | None:
        """Wait for what other ranks have checked, while there is a use for it. Any thread.

        Args:
            ranks: which.
            is_over: set when there is none any more.

        Returns:
            Theirs; None where it did not come in time.
        """
        keys = [self._key(rank, "checked") for rank in ranks]
        while not is_over.wait(timeout=_EARLY_LOOK_S) and not self._is_off.is_set():
            try:
                found = self._look(keys)
            except (OSError, TimeoutError):
                self._is_off.set()  # nor will it be asked for receipts
                return None
            if None not in found and len(found) == len(keys):
                return [checked for checked in found if checked is not None]
        return None

    def _look(self, keys: Sequence[str]) -> list[Checked | None]:
        """Return what stands under some keys of this save; nothing of those that nothing stands under yet.

        Raises:
            OSError: the board does not answer.
            TimeoutError: the same.
        """
        notes = self._board.look(keys, limit_s=_LIMIT_S)
        found = [json.loads(note) for note in notes if note is not None]
        return [checked for token, checked in found if token == self._token]

    def wait_for(self, ranks: Sequence[int]) -> list[Checked] | None:
        """Wait for those of other ranks, for a minute. Any thread.

        Returns:
            Theirs; None where one of them failed, there is no hearing of them, or :meth:`call_off` was called: then the
            votes tell.
        """
        keys, deadline = [self._key(rank) for rank in ranks], time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline and not self._is_off.is_set():
            try:
                found = self._look(keys)
            except (OSError, TimeoutError):
                return None
            if None in found:
                return None
            if len(found) == len(keys):
                return [checked for checked in found if checked is not None]
            self._is_off.wait(timeout=_LOOK_S)
        return None

    def call_off(self) -> None:
        """Wait no more."""
        self._is_off.set()

    def _key(self, rank: int, what: str = "receipt") -> str:
        return f"distckpt/{what}/{self._who}/{rank}"
