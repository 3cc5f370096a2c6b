"""Start a job's heartbeat monitor with the first handler that votes. It ends with the process."""

import atexit
import multiprocessing
import multiprocessing.util
import os
import weakref

from distckpt.backends.base import Backend, default_timeout_s
from distckpt.coordination.heartbeat import HeartbeatMonitor


def ensure_heartbeat(backend: Backend, timeout_s: float | None) -> HeartbeatMonitor | None:
    """Return the job's monitor, and start its heartbeats if they have not started. Rank-local; the training thread.

    Args:
        backend: the job's backend.
        timeout_s: the handler's time limit; the shortest of all handlers counts. None for the default.

    Returns:
        None with one rank, and if the job has no key-value store.
    """
    if backend.world_size == 1:
        return None
    limit_s = default_timeout_s() if timeout_s is None else timeout_s
    monitor = ensure_monitor(backend, limit_s)
    if monitor is None:
        return None
    monitor.shorten_limit(limit_s)
    if monitor.is_passive:
        # Both: a process that multiprocessing forked runs no functions of atexit's (Python 3.11).
        atexit.register(_close_if_alive, weakref.ref(monitor))
        multiprocessing.util.Finalize(None, _close_if_alive, args=(weakref.ref(monitor),), exitpriority=0)
        monitor.start(backend)
    return monitor


def ensure_monitor(backend: Backend, timeout_s: float | None) -> HeartbeatMonitor | None:
    """Return the job's monitor. A new one is passive: it sends no heartbeats and only reads the job's failure.

    Rank-local; the training thread. The arguments and the result are those of :func:`ensure_heartbeat`.
    """
    if isinstance(backend.monitor, HeartbeatMonitor):
        return backend.monitor
    limit_s = default_timeout_s() if timeout_s is None else timeout_s
    store = None if backend.world_size == 1 else backend.key_value_store(timeout_s=limit_s)
    if store is None:
        return None
    # The end of torchrun, or of the process that spawned this one, leaves this rank an orphan.
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ or multiprocessing.parent_process() is not None
    launcher = os.getppid() if is_launched else None
    monitor = HeartbeatMonitor(
        store, backend.rank, backend.world_size, limit_s=limit_s, launcher=launcher, is_passive=True
    )
    backend.monitor = monitor
    return monitor


def _close_if_alive(monitor: "weakref.ref[HeartbeatMonitor]") -> None:
    alive = monitor()
    if alive is not None:
        alive.close()
