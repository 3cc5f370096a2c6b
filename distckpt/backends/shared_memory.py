"""Small reductions and gathers through memory that ranks of one machine share.

Gloo wakes three threads for a reduction, which takes longer than the reduction. Here a rank writes its values and reads
those of the others; if they are there already, nothing waits. Time limits and failures are handled by
:mod:`distckpt.backends.control_group`.

The memory has no name (``memfd_create``), so nothing is left behind, however a job ends. The ranks find out whether all
of them can map it.
"""

import contextlib
import json
import mmap
import os
import select
import struct
import time
import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

NUM_WORDS = 12
"""Number of int64 that a reduction takes."""

ROOM_BYTES = 4096
"""Largest number of bytes of one rank in a gather."""

_WORDS = struct.Struct(f"<q{NUM_WORDS}q")  # the operation's number, and the values
_CHECK = struct.Struct("<q")
_LINE_BYTES = 128  # two cache lines: no two ranks write to the same one
_ENTRY_BYTES = _LINE_BYTES + ROOM_BYTES
# A rank's values of the last operations are kept: it may start the next one before a slower rank has read the last.
_NUM_KEPT = 4
_RANK_BYTES = _ENTRY_BYTES * _NUM_KEPT + _LINE_BYTES  # the last byte tells that the rank has left
_YIELD_S = 0.001  # how long a waiting rank yields; then it sleeps, longer and longer
_FIRST_SLEEP_S = 0.0001
_LAST_SLEEP_S = 0.002
_CHECK_S = 0.05  # how often it checks that the other ranks still exist


def create_offer(world_size: int) -> "tuple[SharedMemory | None, bytes]":
    """Create memory for all ranks. Rank-local; every rank creates memory, and all ranks use that of rank 0.

    Returns:
        The memory, and text for :meth:`SharedMemory.join` on the other ranks. None if the system has no such memory.
    """
    offer: dict[str, str | int] = {"pid": os.getpid()}
    try:
        offer["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        offer["pids"] = str(Path("/proc/self/ns/pid").readlink())
        memory = SharedMemory(os.memfd_create("distckpt"), world_size, is_new=True)
    except (OSError, AttributeError):  # not Linux, or forbidden
        return None, b"{}"
    return memory, json.dumps({**offer, "fd": memory.fileno()}).encode()


class SharedMemory:
    """Memory that all ranks of a job on one machine can read and write.

    Args:
        fd: the memory's file descriptor; this object closes it.
        world_size: number of ranks.
        is_new: whether the memory has no size yet.
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
        """Map rank 0's memory if all ranks are on one machine. Rank-local.

        `own` is this rank's memory from :func:`create_offer`, closed unless it is used. `offers` are the texts of all
        ranks. Returns None if rank 0's memory cannot be mapped.
        """
        fields = [json.loads(offer) for offer in offers]
        memory = None
        if own is not None and all(
            one and one["boot"] == fields[0]["boot"] and one["pids"] == fields[0]["pids"] for one in fields
        ):
            with contextlib.suppress(OSError, ValueError):
                if rank == 0:
                    memory = own
                else:
                    path = f"/proc/{fields[0]['pid']}/fd/{fields[0]['fd']}"
                    memory = SharedMemory(os.open(path, os.O_RDWR | os.O_CLOEXEC), len(fields), is_new=False)
                memory.attach(rank, [one["pid"] for one in fields])
                return memory
        for unused in (memory, own):
            if unused is not None:
                unused.close()
        return None

    def attach(self, rank: int, pids: Sequence[int]) -> None:
        """Set this rank, and watch the processes of the others; raise OSError if they cannot be watched."""
        self._rank = rank
        self._others = [other for other in range(self._world_size) if other != rank]
        for other in self._others:
            self._pidfds[other] = os.pidfd_open(pids[other])
            self._fds.append(self._pidfds[other])

    def fileno(self) -> int:
        """Return the memory's file descriptor."""
        return self._fds[0]

    def close(self) -> None:
        """Tell the others that this rank has left. Its values stay. A second call does nothing.

        A forked process only closes its file descriptors: it is not the rank.
        """
        if self._others and os.getpid() == self._pid:
            self._memory[self._rank * _RANK_BYTES + _NUM_KEPT * _ENTRY_BYTES] = 1
        self._close_fds()
        self._pidfds = {}

    def start_max(self, number: int, values: Sequence[int]) -> "MaxOperation":
        """Start a MAX reduction: write this rank's `NUM_WORDS` int64.

        `number` is the operation's number, from 1; the same on all ranks, and used once.
        """
        self._write(number, values)
        operation = MaxOperation(self, number, self._others)
        operation.values = list(values)
        return operation

    def start_gather(self, number: int, data: bytes) -> "GatherOperation":
        """Start a gather: write this rank's bytes, at most `ROOM_BYTES`. The number is as in :meth:`start_max`."""
        if len(data) > ROOM_BYTES:
            raise ValueError(f"{len(data)} bytes, but there is room for {ROOM_BYTES}")
        at = self._offset(self._rank, number) + _LINE_BYTES
        self._memory[at : at + len(data)] = data
        self._write(number, [len(data), zlib.crc32(data), *[0] * (NUM_WORDS - 2)])
        operation = GatherOperation(self, number, self._others)
        operation.by_rank = {self._rank: data}
        return operation

    def _write(self, number: int, values: Sequence[int]) -> None:
        words = _WORDS.pack(number, *values)
        at = self._offset(self._rank, number)
        # The checksum last: a rank that reads in between, or on a processor that reorders, finds that it does not fit.
        self._memory[at : at + len(words)] = words
        _CHECK.pack_into(self._memory, at + len(words), zlib.crc32(words))

    def read(self, rank: int, number: int) -> tuple[int, ...] | None:
        """Return the values that a rank wrote for an operation; None if it has not yet."""
        at = self._offset(rank, number)
        words = self._memory[at : at + _WORDS.size]
        found = _WORDS.unpack(words)
        if found[0] != number or _CHECK.unpack_from(self._memory, at + _WORDS.size)[0] != zlib.crc32(words):
            return None
        return found[1:]

    def read_bytes(self, rank: int, number: int) -> bytes | None:
        """Return the bytes that a rank wrote for an operation; None if it has not yet."""
        words = self.read(rank, number)
        if words is None:
            return None
        at = self._offset(rank, number) + _LINE_BYTES
        data = self._memory[at : at + words[0]]
        return data if zlib.crc32(data) == words[1] else None

    def find_lost(self, ranks: Sequence[int]) -> list[int]:
        """Return those of `ranks` that have left, or whose processes have ended."""
        left = [rank for rank in ranks if self._memory[rank * _RANK_BYTES + _NUM_KEPT * _ENTRY_BYTES]]
        poll = select.poll()
        for rank in ranks:
            if rank in self._pidfds:
                poll.register(self._pidfds[rank], select.POLLIN)
        ended = {fd for fd, _ in poll.poll(0)}
        return sorted({*left, *(rank for rank in ranks if self._pidfds.get(rank) in ended)})

    def _offset(self, rank: int, number: int) -> int:
        return rank * _RANK_BYTES + (number % _NUM_KEPT) * _ENTRY_BYTES


class SharedOperation(ABC):
    """An operation in progress, with the methods of torch.distributed's works."""

    __slots__ = ("_lost", "_memory", "_missing", "_number")

    def __init__(self, memory: SharedMemory, number: int, others: Sequence[int]) -> None:
        self._memory = memory
        self._number = number
        self._missing = list(others)
        self._lost: list[int] = []

    @abstractmethod
    def _read(self, rank: int) -> bool:
        """Read a rank's contribution; return True if it is there."""

    def is_completed(self) -> bool:
        return self.is_done() or bool(self._lost)

    def wait(self, timeout: timedelta = timedelta(0)) -> None:
        """Wait for the other ranks; raise RuntimeError if some did not arrive in time, or have left."""
        if self.is_done():
            return
        begin_s = now_s = time.monotonic()
        deadline_s = begin_s + timeout.total_seconds()
        next_check_s = begin_s + _CHECK_S
        sleep_s = _FIRST_SLEEP_S
        while not self.is_done():
            now_s = time.monotonic()
            if now_s >= next_check_s or self._lost:
                self._check_lost()
                next_check_s = now_s + _CHECK_S
            if now_s >= deadline_s:
                msg = f"ranks {self._missing} did not come within {timeout.total_seconds():g} s (timed out)"
                raise RuntimeError(msg)
            if now_s - begin_s < _YIELD_S:
                os.sched_yield()
            else:
                time.sleep(min(sleep_s, max(deadline_s - now_s, 0.0)))
                sleep_s = min(sleep_s * 1.5, _LAST_SLEEP_S)

    def is_done(self) -> bool:
        """Return True if all ranks have arrived. Does not wait."""
        missing = self._missing
        for rank in missing[:]:
            if self._read(rank):
                missing.remove(rank)
        return not missing

    def _check_lost(self) -> None:
        self._lost = self._lost or self._memory.find_lost(self._missing)
        # They may have written before they left.
        if self._lost and not self.is_done() and set(self._lost) & set(self._missing):
            msg = f"connection closed by peer: ranks {self._lost} have left, or their processes have ended"
            raise RuntimeError(msg)


class MaxOperation(SharedOperation):
    """A MAX reduction in progress."""

    __slots__ = ("values",)
    values: list[int]
    """This rank's values; the largest of all ranks when it is done."""

    def _read(self, rank: int) -> bool:
        theirs = self._memory.read(rank, self._number)
        if theirs is not None:
            self.values = list(map(max, self.values, theirs))
        return theirs is not None


class GatherOperation(SharedOperation):
    """A gather in progress."""

    __slots__ = ("by_rank",)
    by_rank: dict[int, bytes]
    """This rank's bytes; those of all ranks when it is done."""

    def _read(self, rank: int) -> bool:
        data = self._memory.read_bytes(rank, self._number)
        if data is not None:
            self.by_rank[rank] = data
        return data is not None


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
