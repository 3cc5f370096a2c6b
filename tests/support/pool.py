"""The rank processes that the tests of one pytest process share.

Owns starting, growing, reusing and discarding them. Ranks of a test are the first N of the pool.
"""

import atexit
import shutil
import tempfile
from pathlib import Path

from tests.support.handle import RankHandle
from tests.support.runtime import RUNTIME
from tests.support.start import start


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
        if len(self._handles) < world_size:
            self._handles += start(world_size, self._directory, first=len(self._handles))
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


_POOLS: dict[int | None, RankPool] = {}


def pool_for(world_size: int) -> RankPool:
    """Return this process's pool from which ranks of a world of this size come; it ends with the process at the latest.

    Where ranks are replicas of one process, which has as many as it was started with, each world size has a pool. A
    process that was in a Horovod job of one rank is not used in a larger one: Horovod 0.28 returns from its `init`
    before the other ranks have come then, and leaves them waiting.
    """
    key = world_size if RUNTIME == "xla" or (RUNTIME == "horovod" and world_size == 1) else None
    if key not in _POOLS:
        _POOLS[key] = RankPool()
        atexit.register(_POOLS[key].discard)
    return _POOLS[key]


def discard_pools() -> None:
    """Kill the ranks of all pools."""
    for pool in _POOLS.values():
        pool.discard()
