"""Kill a rank with SIGKILL in the middle of a save.

A small process beside the saving rank waits until the save's temporary file grows, and then kills the rank. It imports
neither torch nor distckpt: all it knows of a save is that a file grows whose name does not end in ``.pt``.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

POLL_S = 0.0002


class DieInSave:
    """Kill this process while it writes its N-th checkpoint; when the moment was missed, the next one.

    Register :meth:`before` and :meth:`after` around the handler that saves. Where `nth` is ``None``, or on
    ranks that do not save, both only pass.

    Args:
        directory: where the checkpoints are written.
        nth: which save to die in, counted from 1; ``None`` for none.
        at_bytes: strike when so much of the checkpoint has been written.
        is_saving_rank: whether this rank writes.
    """

    def __init__(self, directory: Path, nth: int | None, *, at_bytes: int, is_saving_rank: bool) -> None:
        self._nth = nth
        self._saves = 0
        self._watcher: subprocess.Popen[bytes] | None = None
        if nth is not None and is_saving_rank:
            # The watcher inherits no sockets: this rank's peers see it die at once. It leaves with its stdin.
            leftovers = sorted(unfinished(directory))
            command = [
                sys.executable,
                "-I",
                __file__,
                str(os.getpid()),
                str(at_bytes),
                str(directory),
                *leftovers,
            ]
            self._watcher = subprocess.Popen(command, stdin=subprocess.PIPE)  # noqa: S603 - our own file

    def before(self) -> None:
        """Let the watcher strike from now on, if this is the N-th save or a later one."""
        self._saves += 1
        if self._nth is not None and self._saves >= self._nth:
            self._tell(b"1")

    def after(self) -> None:
        """Hold the watcher back: the save is over, and this process is still alive."""
        self._tell(b"0")

    def close(self) -> None:
        """Send the watcher away."""
        if self._watcher is not None and self._watcher.stdin is not None:
            self._watcher.stdin.close()
            self._watcher.wait(timeout=10)

    def _tell(self, word: bytes) -> None:
        if self._watcher is not None and self._watcher.stdin is not None:
            self._watcher.stdin.write(word)
            self._watcher.stdin.flush()


def unfinished(directory: Path) -> dict[str, int]:
    """Return name and size in bytes of the files in `directory` that hold the beginning of a checkpoint."""
    sizes = {}
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # renamed or removed while we looked
                if entry.is_file() and not entry.name.endswith((".pt", ".jsonl")):  # .jsonl: the record of events
                    sizes[entry.name] = entry.stat().st_size
    return sizes


def _watch(victim: int, at_bytes: int, directory: Path, leftovers: set[str]) -> None:
    """Kill `victim` once a save of its own is under way; stdin says when to look, and its end when to go."""
    armed = False
    while True:
        readable, _, _ = select.select([0], [], [], POLL_S if armed else None)
        if readable:
            words = os.read(0, 64)
            if not words:
                return
            armed = words.endswith(b"1")
        for name, num_bytes in unfinished(directory).items() if armed else ():
            if num_bytes >= at_bytes and name not in leftovers:
                os.kill(victim, signal.SIGKILL)
                print(f"SIGKILL for process {victim}, {num_bytes} bytes into {name}", file=sys.stderr)
                return


if __name__ == "__main__":
    _watch(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), set(sys.argv[4:]))
