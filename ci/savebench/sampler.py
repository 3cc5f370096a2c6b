"""A process that watches how much memory others hold.

Owns the sampling; run as ``python -m ci.savebench.sampler PID...``. A line on standard input is answered with the peak
since the one before, in bytes; the end of the input ends it. It counts anonymous memory, and shared memory in
proportion to who shares it, so that what two processes map is not counted twice; mapped files are not counted. The
proportion is asked for only where shared memory grew or shrank: the kernel walks all pages, and holds the process up.
"""

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ci.savebench.files import children_of

__all__ = ["Sampler", "watching"]

INTERVAL_S = 0.005
NOTED_BYTES = 2**20
PATIENCE_S = 10


class Sampler:
    """The watching process, seen from the one that started it.

    Args:
        pids: whom to watch, with their descendants.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        command = [sys.executable, "-m", "ci.savebench.sampler", *map(str, pids)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.peak()  # it watches now

    def peak(self) -> int:
        """Return the peak since the last call, in bytes, summed over all that is watched."""
        if self._process.stdin is None or self._process.stdout is None:
            return 0
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE_S)
        self._process.kill()


@contextlib.contextmanager
def watching(pids: Sequence[int]) -> Iterator[Sampler]:
    """Watch processes while the block runs."""
    sampler = Sampler(pids)
    try:
        yield sampler
    finally:
        sampler.close()


class Memory:
    """What some processes and their descendants hold; this process apart.

    Args:
        pids: see above.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._mapped = self._proportional = 0

    def held(self) -> int:
        """Return the bytes that they hold now."""
        everyone = {one for pid in self._pids for one in children_of(pid)} - {os.getpid()}
        anonymous = sum(_field(one, "status", "RssAnon:") for one in everyone)
        mapped = sum(_field(one, "status", "RssShmem:") for one in everyone)
        if abs(mapped - self._mapped) > NOTED_BYTES:
            self._mapped = mapped
            self._proportional = sum(_field(one, "smaps_rollup", "Pss_Shmem:") for one in everyone)
        return anonymous + self._proportional


def _field(pid: int, file: str, name: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/{file}").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return 0  # it has ended


def main() -> None:
    """Answer with peaks until the input ends."""
    memory = Memory([int(text) for text in sys.argv[1:]])
    peak = 0
    while True:
        peak = max(peak, memory.held())
        if select.select([sys.stdin], [], [], INTERVAL_S)[0]:
            if not sys.stdin.readline():
                return
            print(peak, flush=True)
            peak = 0


if __name__ == "__main__":
    main()
