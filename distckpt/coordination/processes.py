"""The processes of a job's ranks, as far as they are on this machine; and the thread that trains in this one.

Owns what the operating system knows of them: that a process has ended it tells at once, and beyond doubt, where a
heartbeat that does not come says little; and of a thread, whether it stands still and where. Must not know what
follows from it.
"""

import contextlib
import os
import select
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["Processes", "TrainingThread", "place_of_this_process"]

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = Path("/proc/self/ns/pid")


def place_of_this_process() -> str:
    """Return this process's number, and what has to be equal for another process to find it by that."""
    try:
        return f"{os.getpid()} {_BOOT.read_text(encoding='ascii').strip()} {_NAMESPACE.readlink()}"
    except OSError:  # not Linux
        return f"{os.getpid()} nowhere"


class Processes:
    """Watches the ranks' processes that are on this machine.

    Args:
        places: for each rank to watch, what :func:`place_of_this_process` returned there.
    """

    def __init__(self, places: dict[int, str]) -> None:
        self._ended: set[int] = set()
        self._fds: dict[int, int] = {}
        _, _, here = place_of_this_process().partition(" ")
        for rank, place in places.items():
            number, _, where = place.partition(" ")
            if where != here or where == "nowhere":
                continue
            try:
                self._fds[rank] = os.pidfd_open(int(number))
            except ProcessLookupError:
                self._ended.add(rank)
            except (OSError, AttributeError):  # no such call here: heartbeats have to do
                return

    def ended(self) -> set[int]:
        """Return the ranks whose processes have ended. Waits for nothing."""
        poll = select.poll()
        for fd in self._fds.values():
            poll.register(fd, select.POLLIN)
        readable = {fd for fd, _ in poll.poll(0)}
        self._ended |= {rank for rank, fd in self._fds.items() if fd in readable}
        return self._ended

    def close(self) -> None:
        """Let go of the file descriptors."""
        while self._fds:
            with contextlib.suppress(OSError):
                os.close(self._fds.popitem()[1])


class TrainingThread:
    """The thread that trains, seen from beside it. Made on it."""

    def __init__(self) -> None:
        self._thread = threading.current_thread()
        self._ident = threading.get_ident()
        self._stat = Path(f"/proc/self/task/{threading.get_native_id()}/stat")
        self._place: tuple[Any, ...] = ()
        self._since_s = time.monotonic()

    def is_alive(self) -> bool:
        """Tell whether the thread has not ended."""
        return self._thread.is_alive()

    def stands_still_s(self) -> float:
        """Return for how long the thread has used no CPU and has been in one place, in seconds. Call it repeatedly."""
        frame = sys._current_frames().get(self._ident)  # noqa: SLF001 - the documented way to another thread's stack
        place = (self._cpu_ticks(), None if frame is None else (id(frame), frame.f_lasti))
        if place != self._place:
            self._place, self._since_s = place, time.monotonic()
        return time.monotonic() - self._since_s

    def is_in(self, folders: Sequence[str]) -> bool:
        """Tell whether the innermost Python function is defined in one of `folders`."""
        frame = sys._current_frames().get(self._ident)  # noqa: SLF001 - as above
        return frame is not None and any(folder in frame.f_code.co_filename for folder in folders)

    def _cpu_ticks(self) -> int:
        try:
            fields = self._stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:  # not Linux: the place in the program has to do
            return 0
        return int(fields[11]) + int(fields[12])
