"""Threads: how many a rank may use, helpers that end with a block of code, and what a process waits for at its end.

IMPORTANT: no thread may be inside a torch call while the interpreter shuts down. Such a thread asks for the interpreter
when the call returns; CPython before 3.14 then ends the thread through C++ code that does not allow it, and the process
aborts (SIGABRT). So helper threads are not daemons, and :func:`join_at_exit` covers daemon threads.
"""

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence

EXIT_LIMIT_S = 10.0
"""How long a process waits at its end for a torch call that does not return, such as a call to a frozen store."""
_MAX_COPYING = 4
"""More threads do not copy memory faster."""
_LOCK = threading.Lock()
_PENDING_WRITES: "dict[int, PendingWrite]" = {}


def get_num_threads(world_size: int) -> int:
    """Return how many threads this rank may use for copying: torch's number or its part of the CPUs, 4 at most.

    Launchers limit torch to one thread per rank (``OMP_NUM_THREADS=1``), however many CPUs there are.

    Args:
        world_size: number of ranks; ``LOCAL_WORLD_SIZE`` says how many of them are on this machine.

    Example:
        >>> 1 <= get_num_threads(10_000) <= get_num_threads(1) <= 4
        True
    """
    import torch  # noqa: PLC0415 - the command line reads files without torch

    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    num_local = int(text) if text.isdecimal() and 0 < int(text) <= world_size else world_size
    num_cpus = len(os.sched_getaffinity(0)) // max(num_local, 1)
    return min(max(torch.get_num_threads(), num_cpus), _MAX_COPYING)


@contextlib.contextmanager
def helper_threads(work: Callable[[], None], *, num_threads: int = 1) -> Iterator[None]:
    """Run `work` in threads during the body, and wait for them at its end: their buffers may be reused afterwards.

    Args:
        work: must not raise, and must return once the body has ended.
        num_threads: how many threads run it.

    Example:
        >>> done = []
        >>> with helper_threads(lambda: done.append(1), num_threads=2):
        ...     pass
        >>> done
        [1, 1]
    """
    events: list[threading.Event] = []
    try:
        events.extend(start_thread(work) for _ in range(num_threads))
        yield
    finally:
        wait_all(events)


def start_thread(work: Callable[[], None]) -> threading.Event:
    """Run `work` in a thread; return the event that is set when the thread has ended."""
    has_ended = threading.Event()

    def run() -> None:
        try:
            work()
        finally:
            has_ended.set()

    threading.Thread(target=run, name="distckpt-helper", daemon=False).start()
    return has_ended


def wait_all(events: Sequence[threading.Event]) -> None:
    """Wait until all events are set; raise an interrupt only then."""
    # Thread.join takes a thread for ended if a signal interrupts it (CPython 3.11, threading.py).
    interrupt: BaseException | None = None
    for event in events:
        while not event.is_set():
            try:
                event.wait(timeout=1.0)
            except BaseException as error:  # noqa: BLE001 - KeyboardInterrupt, for one; raised below
                interrupt = error
    if interrupt is not None:
        raise interrupt


def join_at_exit(thread: threading.Thread) -> None:
    """Make the process join a daemon thread before the interpreter shuts down, for at most :data:`EXIT_LIMIT_S`."""
    atexit.register(_join_if_alive, weakref.ref(thread), os.getpid())


def _join_if_alive(reference: "weakref.ref[threading.Thread]", process_id: int) -> None:
    thread = reference()
    if thread is not None and os.getpid() == process_id:  # a forked child has no thread of its parent
        thread.join(EXIT_LIMIT_S)


class PendingWrite:
    """A write that the process should finish before it is killed; pending until :meth:`end`. Any thread.

    Example:
        >>> write = PendingWrite()
        >>> wait_for_pending_writes(0.01)
        False
        >>> write.end()
        >>> wait_for_pending_writes(0.01)
        True
    """

    def __init__(self) -> None:
        self.has_ended = threading.Event()
        with _LOCK:
            _PENDING_WRITES[id(self)] = self

    def end(self) -> None:
        """Mark the write as finished, or as given up."""
        with _LOCK:
            _PENDING_WRITES.pop(id(self), None)
        self.has_ended.set()


def wait_for_pending_writes(limit_s: float) -> bool:
    """Wait for the writes that are pending now. Any thread.

    Args:
        limit_s: how long to wait at most, in seconds.

    Returns:
        True if all of them have ended.
    """
    deadline = time.monotonic() + limit_s
    with _LOCK:
        writes = list(_PENDING_WRITES.values())
    return all(write.has_ended.wait(max(deadline - time.monotonic(), 0.0)) for write in writes)
