"""The rank processes that the tests of one pytest process share. A test of N ranks uses the pool's first N."""

import atexit
import shutil
import tempfile
from pathlib import Path

from tests.support.fork_server import close_servers
from tests.support.handle import RankHandle
from tests.support.runtime import RUNTIME
from tests.support.start import start


class RankPool:
    """Idle ranks. After a failure `discard` them, so that the next test gets new processes."""

    def __init__(self) -> None:
        self._handles: list[RankHandle] = []
        self._directory: Path | None = None

    def ranks(self, world_size: int) -> list[RankHandle]:
        """Return `world_size` idle ranks, starting missing ones."""
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
        """Return the process ids of the pool's ranks."""
        return [handle.pid for handle in self._handles if handle.pid]

    def discard(self) -> None:
        """Kill every rank; the next call of `ranks` starts new ones."""
        for handle in self._handles:
            handle.kill()
        self._handles.clear()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None


_POOLS: dict[int | None, RankPool] = {}


def pool_for(world_size: int) -> RankPool:
    """Return this process's pool for jobs of this size.

    On torch_xla each world size has a pool, because a process has a fixed number of replicas. On Horovod, jobs of one
    rank have a pool: a process that was in one returns too early from its next `init`, and the other ranks hang (0.28).
    """
    key = world_size if RUNTIME == "xla" or (RUNTIME == "horovod" and world_size == 1) else None
    if key not in _POOLS:
        _POOLS[key] = RankPool()
        atexit.register(_POOLS[key].discard)
    return _POOLS[key]


def discard_pools() -> None:
    """Kill the ranks of all pools, and the server that starts them."""
    for pool in _POOLS.values():
        pool.discard()
    close_servers()
