"""The watch of a job: begun with the first handler that votes, ended with the process.

Owns when a watch begins and ends, and whose end leaves this process an orphan. What a watch does lies in
:mod:`distckpt.coordination.heartbeat`.
"""

import atexit
import multiprocessing
import multiprocessing.util
import os
import weakref

from distckpt.backends.base import Backend, default_timeout_s
from distckpt.coordination.heartbeat import Watch

__all__ = ["Watch", "ensure", "listen", "watch_of"]


def ensure(backend: Backend, timeout_s: float | None) -> Watch | None:
    """Return the watch of this job, begun now if it was not before. Rank-local; the training thread.

    Args:
        backend: the job's.
        timeout_s: of the handler that asks: the shortest one is the limit; None for the default.

    Returns:
        None in a world of one, and where the runtime has no board.
    """
    if backend.world_size == 1:
        return None
    limit_s = default_timeout_s() if timeout_s is None else timeout_s
    watch = listen(backend, limit_s)
    if watch is None:
        return None
    watch.tighten(limit_s)
    if not watch.is_passive:
        return watch
    # Before what was made earlier ends; and by the other one in a process that multiprocessing forked, which runs no
    # functions of atexit's (Python 3.11).
    atexit.register(_close_if_alive, weakref.ref(watch))
    multiprocessing.util.Finalize(None, _close_if_alive, args=(weakref.ref(watch),), exitpriority=0)
    watch.start(backend)
    return watch


def listen(backend: Backend, timeout_s: float | None) -> Watch | None:
    """Return the watch of this job; one that is made now does not beat, and only hears of faults where a rank waits.

    Rank-local; the training thread. The arguments and the result are those of :func:`ensure`.
    """
    watch = watch_of(backend)
    if watch is not None or backend.world_size == 1:
        return watch
    limit_s = default_timeout_s() if timeout_s is None else timeout_s
    board = backend.board(timeout_s=limit_s)
    if board is None:
        return None
    watch = Watch(board, backend.rank, backend.world_size, limit_s=limit_s, launcher=_launcher(), is_passive=True)
    backend.watcher = watch
    return watch


def watch_of(backend: Backend) -> Watch | None:
    """Return the watch of this job if it has begun."""
    return backend.watcher if isinstance(backend.watcher, Watch) else None


def _close_if_alive(watch: "weakref.ref[Watch]") -> None:
    alive = watch()
    if alive is not None:
        alive.close()


def _launcher() -> int | None:
    """Return the process whose end leaves this rank an orphan: torchrun, or the process that spawned it."""
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ or multiprocessing.parent_process() is not None
    return os.getppid() if is_launched else None
