"""A rank process, seen from the test that started it: the process, its pipe, its log and its file of stacks."""

import contextlib
import os
import signal
import subprocess
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.limits import PROGRAM_LIMIT_S
from tests.support.messages import STACK_SIGNAL, Ready, pack, unpack

if TYPE_CHECKING:
    from tests.support.fork_server import ForkedProcess

_MAX_OUTPUT_BYTES = 20_000


class RankHandle:
    """A started rank process. Call `wait_ready` before the first task, and `kill` in the end.

    Args:
        rank: the rank's number.
        process: the rank's process; all ranks' where ranks are threads.
        connection: pipe to the rank.
        log: file with the process's output.
        stacks: file that the process writes its stacks to.
    """

    def __init__(
        self,
        rank: int,
        process: "subprocess.Popen[bytes] | ForkedProcess",
        connection: Connection,
        log: Path,
        stacks: Path,
    ) -> None:
        self.rank = rank
        self.pid = 0
        self.connection = connection
        self._process, self._log, self._stacks = process, log, stacks

    def wait_ready(self) -> None:
        """Wait until the rank can take a task.

        Raises:
            RuntimeError: the rank did not start; the message contains its output.
        """
        if self.pid:
            return
        try:
            if not self.connection.poll(PROGRAM_LIMIT_S):
                limit = f"{PROGRAM_LIMIT_S:.0f} s"
                raise RuntimeError(f"rank {self.rank} did not start in {limit}:\n{self.output()}")
            message = self.receive()
        except (EOFError, ConnectionError) as error:
            raise RuntimeError(
                f"rank {self.rank} exited with {self.wait_exit(5.0)} while starting:\n{self.output()}"
            ) from error
        if not isinstance(message, Ready):
            raise TypeError(f"rank {self.rank} should have sent Ready, got {message!r}")
        self.pid = message.pid

    def send(self, message: object) -> None:
        """Send one message."""
        self.connection.send_bytes(pack(message))

    def receive(self) -> object:
        """Return the next message; raise `EOFError` or `ConnectionError` if the rank is dead."""
        return unpack(self.connection.recv_bytes())

    def is_alive(self) -> bool:
        """Return True if the process runs."""
        return self._process.poll() is None

    def wait_exit(self, timeout_s: float) -> int | None:
        """Return the exit code, minus the signal's number if killed; None if the process still runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout_s)
        return None

    def kill(self) -> None:
        """Kill the rank and the processes in its session. Does nothing the second time."""
        # Only before the leader is reaped: later its id, and so the group's, may belong to another process.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(PROGRAM_LIMIT_S)
        if not self.connection.closed:
            self.connection.close()

    def clear_output(self) -> None:
        """Empty the log."""
        os.truncate(self._log, 0)

    def output(self) -> str:
        """Return the last part of what the rank has printed since the task began."""
        data = self._log.read_bytes()
        cut = b"[...]\n" if len(data) > _MAX_OUTPUT_BYTES else b""
        return (cut + data[-_MAX_OUTPUT_BYTES:]).decode(errors="replace").rstrip()

    def crash_stacks(self) -> str:
        """Return the stacks that a crashed rank's fault handler wrote."""
        return _without_harness_frames(self._stacks.read_text(encoding="utf-8", errors="replace"))

    def stacks(self, *, limit_s: float = 3.0) -> str:
        """Return the Python stacks of all threads of the running rank."""
        if _is_stopped(self.pid):
            return "(no stack: the process is stopped, SIGSTOP or the like)"
        before = self._stacks.stat().st_size
        try:
            os.kill(self.pid, STACK_SIGNAL)
        except ProcessLookupError:
            return "(no stack: the process has just ended)"
        # The fault handler writes no end mark: the dump is complete when the file has stopped growing.
        size, unchanged, deadline = before, 0, time.monotonic() + limit_s
        while unchanged < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
            grown = self._stacks.stat().st_size
            unchanged = unchanged + 1 if grown == size > before else 0
            size = grown
        if size == before:
            return f"(no stack within {limit_s:.0f} s)"
        return _without_harness_frames(self._stacks.read_bytes()[before:].decode(errors="replace"))


def _is_stopped(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] in {"T", "t"}


def _without_harness_frames(dump: str) -> str:
    ours = str(Path(__file__).parent) + os.sep
    kept = [line for line in dump.splitlines() if ours not in line and "<frozen runpy>" not in line]
    return "\n".join(kept).strip()
