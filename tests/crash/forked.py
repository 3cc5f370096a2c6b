"""Processes that run until they are killed, forked from one that has imported torch.

A fork takes some ten milliseconds; a new Python with torch takes seconds. The forking process runs one thread, so that
its children start without locks that another thread holds.
"""

import contextlib
import ctypes
import faulthandler
import os
import select
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

__all__ = ["Body", "Child", "Job", "forked"]

Body = Callable[[Callable[[int], None]], int | None]
"""Runs in a child with a function that sends a step; returns the exit code, or None for 0."""

_ACK = struct.Struct("<q")
_PR_SET_PDEATHSIG = 1
_LIBRARY = ctypes.CDLL(None)
_LIMIT_S = 60.0
_TELL_STACKS = signal.SIGUSR2
_STACKS_S, _STACKS_BYTES = 1.0, 1 << 16


class Child:
    """A forked process that sends the steps that it has saved through a pipe.

    Args:
        body: runs in the child.

    Attributes:
        acknowledged: the steps that it has sent.
        pid: 0 once it is reaped.
        stood_at: the stacks of its threads, if it did not end in time; else empty.
    """

    def __init__(self, body: Body) -> None:
        self._pipe, theirs = os.pipe()
        self._stacks = os.memfd_create("stacks")
        self.acknowledged: list[int] = []
        self.stood_at = ""
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._pipe)
            faulthandler.register(_TELL_STACKS, file=self._stacks, all_threads=True)
            _run_and_leave(body, lambda step: _send(theirs, step))
        os.close(theirs)

    def wait_for(self, num_acks: int) -> None:
        """Wait until the child has sent `num_acks` steps. The first one means that it is ready."""
        deadline = time.monotonic() + _LIMIT_S
        while len(self.acknowledged) < num_acks:
            if not self._take(deadline - time.monotonic()):
                self.kill()
                raise RuntimeError(f"a saving child sent {self.acknowledged} and then no more")

    def take_in(self) -> None:
        """Receive what it has sent so far."""
        while self._take(0.0):
            pass

    def signal(self) -> None:
        """Send SIGKILL without waiting for its end. Does nothing once the child is reaped."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)

    def kill(self) -> None:
        """Kill and reap it, and receive what it sent before. Does nothing the second time."""
        if self.pid:
            self.signal()
            self.finish()

    def finish(self, limit_s: float = _LIMIT_S) -> int | None:
        """Wait for its end and receive what it has sent.

        Returns:
            The exit code, minus the signal's number if killed; None if it did not end in time and was killed here.
        """
        deadline = time.monotonic() + limit_s
        while self._take(deadline - time.monotonic()):
            pass
        is_late = not self._is_over(max(deadline, time.monotonic() + 1.0))
        if is_late:
            self.stood_at = self._ask_where_it_stands()
            self.signal()
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        if is_late:
            self.take_in()
        os.close(self._pipe)
        os.close(self._stacks)
        return None if is_late else os.waitstatus_to_exitcode(status)

    def _ask_where_it_stands(self) -> str:
        os.kill(self.pid, _TELL_STACKS)
        time.sleep(_STACKS_S)
        return os.pread(self._stacks, _STACKS_BYTES, 0).decode()

    def _is_over(self, deadline: float) -> bool:
        while os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def _take(self, patience_s: float) -> bool:
        ready, _, _ = select.select([self._pipe], [], [], max(0.0, patience_s))
        data = os.read(self._pipe, _ACK.size) if ready else b""
        if data:
            self.acknowledged.append(_ACK.unpack(data)[0])
        return bool(data)


class Job:
    """The ranks of one job, each a :class:`Child`.

    Args:
        bodies: the function of each rank.
    """

    def __init__(self, bodies: Sequence[Body]) -> None:
        self.ranks: list[Child] = []
        try:
            for body in bodies:
                self.ranks.append(Child(body))
        except BaseException:
            self.kill()
            raise

    @property
    def acknowledged(self) -> list[int]:
        """The steps that any rank has saved, in order, without the one that it began with."""
        return sorted({step for rank in self.ranks for step in rank.acknowledged[1:]})

    def wait_for(self, num_acks: int) -> None:
        """Wait for each rank as :meth:`Child.wait_for` does."""
        try:
            for rank in self.ranks:
                rank.wait_for(num_acks)
        except RuntimeError:
            self.kill()
            raise

    def take_in(self) -> None:
        """Receive what the ranks have sent so far."""
        for rank in self.ranks:
            rank.take_in()

    def kill(self) -> None:
        """Kill all ranks at once. Does nothing the second time."""
        for rank in self.ranks:
            rank.signal()
        for rank in self.ranks:
            rank.kill()

    def finish(self, limit_s: float = _LIMIT_S) -> list[int | None]:
        """Finish each rank that has not been reaped, as :meth:`Child.finish` does."""
        return [rank.finish(limit_s) for rank in self.ranks if rank.pid]


@contextlib.contextmanager
def forked(body: Body) -> Iterator[Child]:
    """Fork a :class:`Child`, wait until it is ready, and kill it at the end of the body."""
    child = Child(body)
    try:
        child.wait_for(1)
        yield child
    finally:
        child.kill()


def _send(pipe: int, step: int) -> None:
    os.write(pipe, _ACK.pack(step))  # eight bytes go through a pipe whole or not at all


def _run_and_leave(body: Body, send: Callable[[int], None]) -> NoReturn:
    code = 1
    try:
        _LIBRARY.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # none outlives the process that forked it
        code = body(send) or 0
    except BaseException:  # noqa: BLE001 - nothing may reach the forking process's own code
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)
