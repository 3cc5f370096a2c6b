"""One rank process, seen from the test that started it.

Owns the process, its pipe, the file with its output and the file with its stacks. Knows nothing of
process groups or of what the rank runs.
"""

import contextlib
import os
import signal
import subprocess
import time
from multiprocessing.connection import Connection
from pathlib import Path

from tests.support.messages import Ready, pack, unpack
from tests.support.signals import STACK_SIGNAL

_START_LIMIT_S = 120.0
_MAX_OUTPUT_BYTES = 20_000


class RankHandle:
    """A started rank process. `wait_ready` before the first task; `kill` in the end, always.

    Args:
        slot: which rank it is.
        process: the rank's, or that of all ranks where they are threads of one.
        connection: to the rank.
        log: what the process prints.
        stacks: where it writes its stacks.
    """

    def __init__(
        self, slot: int, process: "subprocess.Popen[bytes]", connection: Connection, log: Path, stacks: Path
    ) -> None:
        self.slot = slot
        self.pid = 0
        self.connection = connection
        self._process, self._log, self._stacks = process, log, stacks

    def wait_ready(self) -> None:
        """Wait until the rank has imported torch.

        Raises:
            RuntimeError: it did not start; the message holds its output.
        """
        if self.pid:
            return
        try:
            if not self.connection.poll(_START_LIMIT_S):
                limit = f"{_START_LIMIT_S:.0f} s"
                raise RuntimeError(f"rank {self.slot} did not start in {limit}:\n{self.output()}")
            message = self.receive()
        except (EOFError, ConnectionError) as error:
            raise RuntimeError(
                f"rank {self.slot} exited with {self.wait_exit(5.0)} while starting:\n{self.output()}"
            ) from error
        if not isinstance(message, Ready):
            raise TypeError(f"rank {self.slot} should have sent Ready, got {message!r}")
        self.pid = message.pid

    def send(self, message: object) -> None:
        """Send one message."""
        self.connection.send_bytes(pack(message))

    def receive(self) -> object:
        """Return the next message; `EOFError` or `ConnectionError` once the rank is dead."""
        return unpack(self.connection.recv_bytes())

    def is_alive(self) -> bool:
        """Say whether the process still runs."""
        return self._process.poll() is None

    def wait_exit(self, timeout_s: float) -> int | None:
        """Wait for the exit code (minus the signal's number when killed); None if it still runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout_s)
        return None

    def kill(self) -> None:
        """Kill the rank and every process it started in its session. Does nothing the second time."""
        # Before the leader is reaped its id, and so the group's, cannot have passed to another process.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10.0)
        if not self.connection.closed:
            self.connection.close()

    def forget_output(self) -> None:
        """Start the next task with an empty log."""
        os.truncate(self._log, 0)

    def output(self) -> str:
        """Return the end of what the rank has printed since the task began."""
        data = self._log.read_bytes()
        cut = b"[...]\n" if len(data) > _MAX_OUTPUT_BYTES else b""
        return (cut + data[-_MAX_OUTPUT_BYTES:]).decode(errors="replace").rstrip()

    def crash_stacks(self) -> str:
        """Return what a crashed rank's fault handler wrote."""
        return _without_machinery(self._stacks.read_text(encoding="utf-8", errors="replace"))

    def stacks(self, *, limit_s: float = 3.0) -> str:
        """Ask the running rank for the Python stacks of all its threads."""
        if _is_stopped(self.pid):
            return "(no stack: the process is stopped, SIGSTOP or the like)"
        before = self._stacks.stat().st_size
        try:
            os.kill(self.pid, STACK_SIGNAL)
        except ProcessLookupError:
            return "(no stack: the process has just ended)"
        # The fault handler marks no end: the dump is whole when the file has stopped growing.
        size, unchanged, deadline = before, 0, time.monotonic() + limit_s
        while unchanged < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
            grown = self._stacks.stat().st_size
            unchanged = unchanged + 1 if grown == size > before else 0
            size = grown
        if size == before:
            return f"(no stack within {limit_s:.0f} s)"
        return _without_machinery(self._stacks.read_bytes()[before:].decode(errors="replace"))


def _is_stopped(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] in {"T", "t"}


def _without_machinery(dump: str) -> str:
    ours = str(Path(__file__).parent) + os.sep
    kept = [line for line in dump.splitlines() if ours not in line and "<frozen runpy>" not in line]
    return "\n".join(kept).strip()
