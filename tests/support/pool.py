"""The rank processes that the tests of one pytest process share.

Owns starting, growing, reusing and discarding them. Ranks of a test are the first N of the pool.
"""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from tests.support.handle import RankHandle


class RankPool:
    """Idle ranks, ready for a task. Discard it after any failure: the next test gets new processes."""

    def __init__(self) -> None:
        self._handles: list[RankHandle] = []
        self._directory: Path | None = None

    def ranks(self, world_size: int) -> list[RankHandle]:
        """Return `world_size` idle ranks, starting those that are missing."""
        if not all(handle.is_alive() for handle in self._handles):
            self.discard()
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="distckpt-ranks-"))
        while len(self._handles) < world_size:
            self._handles.append(RankHandle(len(self._handles), self._directory))
        try:
            for handle in self._handles[:world_size]:
                handle.wait_ready()
        except BaseException:
            self.discard()
            raise
        return self._handles[:world_size]

    def pids(self) -> list[int]:
        """Return the ids of the pool's processes that are ready or have been."""
        return [handle.pid for handle in self._handles if handle.pid]

    def discard(self) -> None:
        """Kill every rank; the next `ranks` starts anew."""
        for handle in self._handles:
            handle.kill()
        self._handles.clear()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None


@functools.cache
def shared_pool() -> RankPool:
    """Return this process's pool, which ends with the process at the latest."""
    pool = RankPool()
    atexit.register(pool.discard)
    return pool
