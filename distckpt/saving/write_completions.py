"""Completions of the ranks that write one file together, on the job's board.

Owns how a receipt is left and looked for, and, before it, word of the checksums: what comes after everybody's bytes can
be made while those are written. It is a note beside the collectives, from a thread that enters none; where
the job has no board, or it does not answer, the ranks hear of each other in the next vote.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence

from distckpt.backends.base import KeyValueStore
from distckpt.saving.snapshot import Checked

__all__ = ["WriteCompletions"]

_LIMIT_S = 10.0
_LOOK_S = 0.005
_EARLY_LOOK_S = 0.02
_PATIENCE_S = 60.0


class WriteCompletions:
    """The receipts of one handler's saves, one after the other.

    Args:
        board: the job's.
        who: the handler, by the same name on all ranks.
        token: of the save; the same on all ranks, and no other save's.
    """

    def __init__(self, board: KeyValueStore, who: str, token: str) -> None:
        self._board = board
        self._who = who
        self._token = token
        self._is_off = threading.Event()

    def leave(self, rank: int, checked: Checked | None) -> None:
        """Leave a rank's: what it has checked; None where it failed. Any thread. Does nothing if nobody can take it."""
        self._put(self._key(rank), checked)

    def publish_checksums(self, rank: int, checked: Checked) -> None:
        """Tell what a rank has checked, and has not written yet. Any thread. Does nothing if nobody can take it."""
        self._put(self._key(rank, "checked"), checked)

    def _put(self, key: str, checked: Checked | None) -> None:
        try:
            self._board.set(key, json.dumps([self._token, checked]), limit_s=_LIMIT_S)
        except (OSError, TimeoutError):
            self._is_off.set()

    def collect_checksums(self, ranks: Sequence[int], is_over: threading.Event) -> list[Checked] | None:
        """Wait for what other ranks have checked, while there is a use for it. Any thread.

        Args:
            ranks: which.
            is_over: set when there is none any more.

        Returns:
            Theirs; None where it did not come in time.
        """
        keys = [self._key(rank, "checked") for rank in ranks]
        return self._found(keys, lambda: is_over.wait(timeout=_EARLY_LOOK_S), pause_s=0.0)

    def wait_for(self, ranks: Sequence[int]) -> list[Checked] | None:
        """Wait for those of other ranks, for a minute. Any thread.

        Returns:
            Theirs; None where one of them failed, there is no hearing of them, or :meth:`call_off` was called: then the
            votes tell.
        """
        keys, deadline = [self._key(rank) for rank in ranks], time.monotonic() + _PATIENCE_S
        return self._found(keys, lambda: time.monotonic() >= deadline, pause_s=_LOOK_S)

    def _found(self, keys: Sequence[str], is_over: Callable[[], bool], *, pause_s: float) -> list[Checked] | None:
        """Look until something of this save stands under all keys; None where it tells of a failure, or never does.

        Args:
            keys: where to look.
            is_over: called before each look; tells whether it would be of no use any more.
            pause_s: between two looks, in seconds.
        """
        while not is_over() and not self._is_off.is_set():
            try:
                notes = self._board.get_many(keys, limit_s=_LIMIT_S)
            except (OSError, TimeoutError):
                self._is_off.set()  # it is asked no more
                return None
            read = [json.loads(note) for note in notes if note is not None]
            found: list[Checked | None] = [checked for token, checked in read if token == self._token]
            whole = [checked for checked in found if checked is not None]
            if len(whole) < len(found):
                return None
            if len(whole) == len(keys):
                return whole
            self._is_off.wait(timeout=pause_s)
        return None

    def call_off(self) -> None:
        """Wait no more."""
        self._is_off.set()

    def _key(self, rank: int, what: str = "receipt") -> str:
        return f"distckpt/{what}/{self._who}/{rank}"
