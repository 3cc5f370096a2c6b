"""A process that samples the memory of other processes: ``python -m ci.savebench.sampler PID...``.

For each line on standard input it prints the peak since the last one, in bytes. It counts anonymous memory, and the
proportional share of shared memory (Pss), so that nothing counts twice. Mapped files do not count. Pss is read only
after the size of shared memory has changed: the kernel walks all pages for it, and blocks the process meanwhile.
"""

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ci.savebench.files import children_of

INTERVAL_S = 0.005
CHANGE_BYTES = 2**20
TIMEOUT_S = 10


class Sampler:
    """The sampling process, as its parent sees it.

    Args:
        pids: processes to sample, with their descendants.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        command = [sys.executable, "-m", "ci.savebench.sampler", *map(str, pids)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.peak()  # wait until it samples

    def peak(self) -> int:
        """Return the peak since the last call in bytes, summed over all processes."""
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
            self._process.wait(TIMEOUT_S)
        self._process.kill()


@contextlib.contextmanager
def sample(pids: Sequence[int]) -> Iterator[Sampler]:
    """Sample processes during the body of a ``with`` statement."""
    sampler = Sampler(pids)
    try:
        yield sampler
    finally:
        sampler.close()


class Memory:
    """Memory of processes and their descendants, except this process.

    Args:
        pids: the processes.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._mapped = self._proportional = 0

    def held(self) -> int:
        """Return their present memory in bytes."""
        processes = {one for pid in self._pids for one in children_of(pid)} - {os.getpid()}
        anonymous = sum(_field(one, "status", "RssAnon:") for one in processes)
        mapped = sum(_field(one, "status", "RssShmem:") for one in processes)
        if abs(mapped - self._mapped) > CHANGE_BYTES:
            self._mapped = mapped
            self._proportional = sum(_field(one, "smaps_rollup", "Pss_Shmem:") for one in processes)
        return anonymous + self._proportional


def _field(pid: int, file: str, name: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/{file}").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return 0  # the process has ended


def main() -> None:
    """Print peaks until the input ends."""
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
