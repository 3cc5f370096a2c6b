"""The largest of a few numbers over ranks of one machine, or what each says in a few bytes, through shared memory.

Owns the layout of that memory, how the ranks come to share it, and how one of them is waited for. Gloo wakes three
threads for a reduction, which costs more than the reduction; here a rank writes its numbers and reads those of the
others, and where they are there already nothing waits and no thread is woken. Must not know what the numbers mean. How
long is waited, and what a failure means, is :mod:`distckpt.backends.control_group`'s.

The memory has no name (``memfd_create``): nothing is left behind, however a job ends. Whether all ranks can have it is
found out, not assumed.
"""

import contextlib
import json
import mmap
import os
import select
import socket
import struct
import time
import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

__all__ = ["NUM_WORDS", "ROOM_BYTES", "Maximum", "Meeting", "Parts", "SharedMemory", "offer_of"]

NUM_WORDS = 12
"""How many int64 an operation reduces."""

ROOM_BYTES = 4096
"""How many bytes a rank can bring to an operation."""

_WORDS = struct.Struct(f"<q{NUM_WORDS}q")  # the operation's number, and the values
_CHECK = struct.Struct("<q")
_LINE_BYTES = 128  # two cache lines: no two ranks write to the same one
_SLOT_BYTES = _LINE_BYTES + ROOM_BYTES
# Operations of which a rank's numbers are kept: it may begin the next one before a slower rank has read the last.
_NUM_KEPT = 4
_RANK_BYTES = _SLOT_BYTES * _NUM_KEPT + _LINE_BYTES  # and whether it has left
# How long a rank gives way to others without sleeping; then it sleeps, longer and longer.
_YIELD_S = 0.001
_FIRST_SLEEP_S = 0.0001
_LAST_SLEEP_S = 0.002
# How often it looks whether the others are still there.
_LOOK_S = 0.05


def offer_of(world_size: int) -> "tuple[SharedMemory | None, bytes]":
    """Make memory for all ranks, and say how it can be had. Rank-local.

    Every rank does so; that of rank 0 is taken.

    Returns:
        None where the system has none; and a line for :meth:`SharedMemory.join`.
    """
    place = {"host": socket.gethostname(), "boot": _read("/proc/sys/kernel/random/boot_id"), "pid": os.getpid()}
    try:
        place["pids"] = str(Path("/proc/self/ns/pid").readlink())
        memory = SharedMemory(os.memfd_create("distckpt"), world_size, is_new=True)
    except (OSError, AttributeError):  # not Linux, or forbidden
        return None, b"{}"
    return memory, json.dumps({**place, "fd": memory.fileno()}).encode()


class SharedMemory:
    """Memory that all ranks of a job on one machine see.

    Args:
        fd: of the memory; it is this object's to close.
        world_size: number of ranks.
        is_new: whether it has to be given its size.
    """

    def __init__(self, fd: int, world_size: int, *, is_new: bool) -> None:
        self._world_size = world_size
        self._fds = [fd]
        self._close_fds = weakref.finalize(self, _close_all, self._fds)
        size = _RANK_BYTES * world_size
        if is_new:
            os.ftruncate(fd, size)
        self._memory = mmap.mmap(fd, size)
        self._pid = os.getpid()
        self._rank = 0
        self._others: list[int] = []
        self._pidfds: dict[int, int] = {}

    @staticmethod
    def join(own: "SharedMemory | None", offers: Sequence[bytes], rank: int) -> "SharedMemory | None":
        """Take rank 0's memory in place of this rank's own, if all ranks are on one machine. Rank-local.

        Args:
            own: what :func:`offer_of` returned here; closed if another one is taken.
            offers: what it said on each rank.
            rank: this one.

        Returns:
            None where it cannot be had.
        """
        places = [json.loads(offer) for offer in offers]
        memory = None
        if own is not None and all(
            place and place["boot"] == places[0]["boot"] and place["pids"] == places[0]["pids"] for place in places
        ):
            with contextlib.suppress(OSError, ValueError):
                if rank == 0:
                    memory = own
                else:
                    path = f"/proc/{places[0]['pid']}/fd/{places[0]['fd']}"
                    memory = SharedMemory(os.open(path, os.O_RDWR | os.O_CLOEXEC), len(places), is_new=False)
                memory.enter(rank, [place["pid"] for place in places])
                return memory
        for one in (memory, own):
            if one is not None:
                one.close()
        return None

    def enter(self, rank: int, pids: Sequence[int]) -> None:
        """Be this rank, and watch the processes of the others.

        Raises:
            OSError: they cannot be watched.
        """
        self._rank = rank
        self._others = [other for other in range(self._world_size) if other != rank]
        for other in self._others:
            self._pidfds[other] = os.pidfd_open(pids[other])
            self._fds.append(self._pidfds[other])

    def fileno(self) -> int:
        """Return the memory's file descriptor."""
        return self._fds[0]

    def close(self) -> None:
        """Tell the others that this rank has left. What it wrote stays. Does nothing the second time.

        A process that was forked lets go of what it has of it, and tells nobody: it is not the rank.
        """
        if self._others and os.getpid() == self._pid:
            self._memory[self._rank * _RANK_BYTES + _NUM_KEPT * _SLOT_BYTES] = 1
        self._close_fds()
        self._pidfds = {}

    def write(self, number: int, values: Sequence[int]) -> "Maximum":
        """Begin an operation: write this rank's numbers.

        Args:
            number: the operation's, from 1; the same on all ranks, and each is used once.
            values: `NUM_WORDS` of int64.
        """
        self._write(number, values)
        return Maximum(self, number, values, self._others)

    def bring(self, number: int, data: bytes) -> "Parts":
        """Begin an operation: write this rank's bytes.

        Args:
            number: the operation's, as in :meth:`write`.
            data: `ROOM_BYTES` at most.

        Raises:
            ValueError: it is more.
        """
        if len(data) > ROOM_BYTES:
            msg = f"{len(data)} bytes, but there is room for {ROOM_BYTES}"
            raise ValueError(msg)
        at = self._at(self._rank, number) + _LINE_BYTES
        self._memory[at : at + len(data)] = data
        self._write(number, [len(data), zlib.crc32(data), *[0] * (NUM_WORDS - 2)])
        return Parts(self, number, {self._rank: data}, self._others)

    def _write(self, number: int, values: Sequence[int]) -> None:
        words = _WORDS.pack(number, *values)
        at = self._at(self._rank, number)
        # Not in one go: whoever reads in between, or on a processor that reorders, finds that they do not fit.
        self._memory[at : at + len(words)] = words
        _CHECK.pack_into(self._memory, at + len(words), zlib.crc32(words))

    def read(self, rank: int, number: int) -> tuple[int, ...] | None:
        """Return what a rank wrote for an operation; None as long as it has not."""
        at = self._at(rank, number)
        words = self._memory[at : at + _WORDS.size]
        found = _WORDS.unpack(words)
        if found[0] != number or _CHECK.unpack_from(self._memory, at + _WORDS.size)[0] != zlib.crc32(words):
            return None
        return found[1:]

    def read_bytes(self, rank: int, number: int) -> bytes | None:
        """Return the bytes that a rank brought to an operation; None as long as it has not."""
        words = self.read(rank, number)
        if words is None:
            return None
        at = self._at(rank, number) + _LINE_BYTES
        data = self._memory[at : at + words[0]]
        return data if zlib.crc32(data) == words[1] else None

    def lost(self, ranks: Sequence[int]) -> list[int]:
        """Return which of `ranks` have left, or whose process has ended."""
        left = [rank for rank in ranks if self._memory[rank * _RANK_BYTES + _NUM_KEPT * _SLOT_BYTES]]
        poll = select.poll()
        for rank in ranks:
            if rank in self._pidfds:
                poll.register(self._pidfds[rank], select.POLLIN)
        ended = {fd for fd, _ in poll.poll(0)}
        return sorted({*left, *(rank for rank in ranks if self._pidfds.get(rank) in ended)})

    def _at(self, rank: int, number: int) -> int:
        return rank * _RANK_BYTES + (number % _NUM_KEPT) * _SLOT_BYTES


class Meeting(ABC):
    """An operation under way, waited for as a work of torch.distributed's is."""

    __slots__ = ("_left", "_memory", "_missing", "_number")

    def __init__(self, memory: SharedMemory, number: int, others: Sequence[int]) -> None:
        self._memory = memory
        self._number = number
        self._missing = list(others)
        self._left: list[int] = []

    @abstractmethod
    def _take_from(self, rank: int) -> bool:
        """Take what a rank has brought; return whether it has."""

    def is_completed(self) -> bool:
        """Tell whether it has ended, well or not."""
        return self.is_done() or bool(self._left)

    def wait(self, timeout: timedelta = timedelta(0)) -> None:
        """Wait for the other ranks.

        Raises:
            RuntimeError: some did not come in time, or have left.
        """
        if self.is_done():
            return
        begin_s = now_s = time.monotonic()
        deadline_s = begin_s + timeout.total_seconds()
        next_look_s = begin_s + _LOOK_S
        sleep_s = _FIRST_SLEEP_S
        while not self.is_done():
            now_s = time.monotonic()
            if now_s >= next_look_s or self._left:
                self._look_for_the_lost()
                next_look_s = now_s + _LOOK_S
            if now_s >= deadline_s:
                msg = f"ranks {self._missing} did not come within {timeout.total_seconds():g} s (timed out)"
                raise RuntimeError(msg)
            if now_s - begin_s < _YIELD_S:
                os.sched_yield()
            else:
                time.sleep(min(sleep_s, max(deadline_s - now_s, 0.0)))
                sleep_s = min(sleep_s * 1.5, _LAST_SLEEP_S)

    def is_done(self) -> bool:
        """Tell whether all ranks have come. Waits for nothing."""
        missing = self._missing
        for rank in missing[:]:
            if self._take_from(rank):
                missing.remove(rank)
        return not missing

    def _look_for_the_lost(self) -> None:
        self._left = self._left or self._memory.lost(self._missing)
        # They may have written before they left.
        if self._left and not self.is_done() and set(self._left) & set(self._missing):
            msg = f"connection closed by peer: ranks {self._left} have left, or their processes ended"
            raise RuntimeError(msg)


class Maximum(Meeting):
    """A reduction under way.

    Attributes:
        values: this rank's, and once it is done the largest of all ranks.
    """

    __slots__ = ("values",)

    def __init__(self, memory: SharedMemory, number: int, values: Sequence[int], others: Sequence[int]) -> None:
        super().__init__(memory, number, others)
        self.values = list(values)

    def _take_from(self, rank: int) -> bool:
        theirs = self._memory.read(rank, self._number)
        if theirs is not None:
            self.values = list(map(max, self.values, theirs))
        return theirs is not None


class Parts(Meeting):
    """A gathering under way.

    Attributes:
        by_rank: what this rank brought, and once it is done what each has.
    """

    __slots__ = ("by_rank",)

    def __init__(self, memory: SharedMemory, number: int, by_rank: dict[int, bytes], others: Sequence[int]) -> None:
        super().__init__(memory, number, others)
        self.by_rank = by_rank

    def _take_from(self, rank: int) -> bool:
        data = self._memory.read_bytes(rank, self._number)
        if data is not None:
            self.by_rank[rank] = data
        return data is not None


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(encoding="ascii").strip()
    return ""
