"""What ranks tell each other in the job's key-value store: barriers, and the notes of a control group."""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from distckpt.backends.base import KeyValueStore
from distckpt.errors import CollectiveError, CollectiveTimeout, DesyncError

ABORT_KEY = "control/abort"
"""Key of the note that a rank has aborted the control group; see :func:`encode_abort`."""

ANSWER_LIMIT_S = 1.0
"""Seconds to wait for one answer of the store."""

T = TypeVar("T")
_DESYNC_S = 1.0
# The limit of one answer while the store is silent: a rank that has to end must not spend seconds on notes to a frozen
# or unreachable host.
_SILENT_LIMIT_S = 0.25


def store_barrier(
    store: KeyValueStore,
    prefix: str,
    rank: int,
    world_size: int,
    *,
    what: object,
    timeout_s: float,
    check: Callable[[], str | None] = lambda: None,
) -> str | None:
    """Note in the store that this rank has arrived, and block until all ranks have.

    The barrier's keys begin with `prefix`. `check` is called while waiting; a result other than None ends the waiting.

    Returns:
        None if all ranks have arrived, else the result of `check`.

    Raises:
        CollectiveTimeout: some ranks did not arrive; the error names them.
        CollectiveError: the store is gone, or does not answer.
    """
    deadline = time.monotonic() + timeout_s
    pause_s = 0.001
    try:
        # Each rank counts once, however often it calls.
        is_first = store.add(f"{prefix}/here/{rank}", 1, limit_s=timeout_s) == 1
        num_here = store.add(f"{prefix}/num_here", int(is_first), limit_s=timeout_s)
        while True:
            with contextlib.suppress(TimeoutError):  # a silent store is waited for below
                if (result := check()) is not None:
                    return result
            if num_here >= world_size:
                return None
            if (left_s := deadline - time.monotonic()) <= 0:
                break
            time.sleep(min(pause_s, left_s))
            pause_s = min(pause_s * 1.5, 0.05)
            num_here = store.add(f"{prefix}/num_here", 0, limit_s=max(left_s, ANSWER_LIMIT_S))
        missing = find_absent(store, f"{prefix}/here", world_size)
    except OSError as error:
        raise store_lost_error(rank, what, error) from error
    if not missing:
        return None
    msg = (
        f"rank {rank}: waited {timeout_s:g} s for {what}, but {format_ranks(missing)} did not come. Is it there on "
        "every rank, and is every rank still running? Handlers have to be built and attached on all ranks alike."
    )
    raise CollectiveTimeout(msg, missing)


class DesyncDetector:
    """Finds out that all ranks wait, but at different barriers.

    A rank that has just left a barrier is noted there for a moment longer. Only a lasting difference counts.
    """

    def __init__(self, store: KeyValueStore, world_size: int) -> None:
        self._store = store
        self._keys = [f"at/{rank}" for rank in range(world_size)]
        self._since_s: float | None = None
        self._last: list[str] = []

    def check(self, name: str) -> None:
        """Raise DesyncError if every rank waits, and not all at the barrier `name`."""
        notes = self._store.get_many(self._keys, limit_s=ANSWER_LIMIT_S)
        names = [note for note in notes if note]
        if len(names) < len(notes) or all(other == name for other in names) or names != self._last:
            self._last, self._since_s = names, time.monotonic()
        elif self._since_s is not None and time.monotonic() - self._since_s > _DESYNC_S:
            where = "; ".join(f"rank {rank} is at {other}" for rank, other in enumerate(names))
            raise DesyncError(
                f"The ranks wait at different barriers, and none can complete: {where}. Handlers have to be built and "
                "attached on all ranks, in the same order."
            )


class GroupNotes:
    """The notes of a control group in the job's key-value store.

    Attributes:
        store: the job's key-value store; None until it is found, and if the job has none. Nothing is noted then.
        is_silent: whether the store did not answer the last time.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.store: KeyValueStore | None = None
        self.is_silent = False
        self._rank = rank
        self._world_size = world_size

    def _ask(self, call: Callable[[KeyValueStore, float], T], default: T) -> T:
        """Call the store with a limit, a shorter one if it did not answer the last time."""
        if self.store is None:
            return default
        try:
            answer = call(self.store, _SILENT_LIMIT_S if self.is_silent else ANSWER_LIMIT_S)
        except TimeoutError:
            self.is_silent = True
            raise
        self.is_silent = False
        return answer

    def decide_outcome(self, number: int, mine: str) -> str:
        """Write the outcome of operation `number`, unless another rank has; return the one that holds."""
        key = f"control/outcome/{number}"
        if mine == "done":
            self.is_silent = False  # there is time: this rank does not have to end
        try:
            return self._ask(lambda store, limit_s: store.set_default(key, mine, limit_s=limit_s), mine)
        except OSError:  # the store's host has ended or is frozen: no rank can differ
            return mine

    def read_abort(self) -> str | None:
        """Return the note of the rank that aborted the group; None if there is none."""
        return self._ask(lambda store, limit_s: store.get_many([ABORT_KEY], limit_s=limit_s)[0], None)

    def write_abort(self, what: object, missing: Sequence[int]) -> None:
        """Tell the others that this rank aborts the group; see :func:`encode_abort`."""
        note = encode_abort(what, missing)
        with contextlib.suppress(OSError):  # the store may be gone too
            self._ask(lambda store, limit_s: store.set(ABORT_KEY, note, limit_s=limit_s), None)

    def write_arrival(self, number: int, what: object) -> None:
        """Note that this rank has arrived at operation `number`."""
        key = f"control/arrived/{number}/{self._rank}"
        self._ask(lambda store, limit_s: store.set(key, str(what), limit_s=limit_s), None)

    def find_absent(self, number: int) -> list[int]:
        """Return the ranks that have not noted their arrival at operation `number`."""
        prefix = f"control/arrived/{number}"
        return self._ask(lambda store, limit_s: find_absent(store, prefix, self._world_size, limit_s), [])


def find_absent(store: KeyValueStore, prefix: str, world_size: int, limit_s: float = ANSWER_LIMIT_S) -> list[int]:
    """Return the ranks without a key ``prefix/rank``."""
    notes = store.get_many([f"{prefix}/{rank}" for rank in range(world_size)], limit_s=limit_s)
    return [rank for rank, note in enumerate(notes) if note is None]


def format_ranks(ranks: Sequence[int]) -> str:
    """Return "rank 1", or "ranks 1, 2"."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(str(rank) for rank in ranks)}"


def encode_abort(what: object, missing: Sequence[int]) -> str:
    """Return the note of a rank that aborted the control group during `what`, because `missing` did not arrive."""
    return f"{','.join(str(rank) for rank in missing)} {what}"


def decode_abort(note: str) -> tuple[list[int], str]:
    """Return the ranks that did not arrive, and during what; see :func:`encode_abort`."""
    numbers, _, what = note.partition(" ")
    return [int(number) for number in numbers.split(",") if number], what


def store_lost_error(rank: int, what: object, error: OSError) -> CollectiveError:
    """Return the error for a store that is gone, or does not answer."""
    msg = (
        f"rank {rank}: lost the job's store during {what}; the process that hosts it (often rank 0, or the launcher) "
        f"has ended or cannot be reached: {error}"
    )
    return CollectiveError(msg)
