"""Threads that help while a block of code runs, and have ended when it is left, whatever interrupts that.

IMPORTANT: no thread may be inside a call of torch's when the interpreter is taken down. As such a call returns it asks
for the interpreter; CPython before 3.14 ends the thread there, through C++ that does not allow it, and the process is
aborted (SIGABRT), however well its program ended. So the helpers here are no daemons, and :func:`join_at_exit` is for
threads that must not hold a process for ever.
"""

import atexit
import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

__all__ = ["EXIT_LIMIT_S", "helping", "join_at_exit", "start_helper", "wait_for_all"]

EXIT_LIMIT_S = 10.0
"""How long a process that ends waits for a call of torch's that does not return, as one to a frozen store."""


@contextlib.contextmanager
def helping(work: Callable[[], None], *, num_threads: int = 1) -> Iterator[None]:
    """Let threads do `work` while the body runs, and wait for their end: they use memory that is another's afterwards.

    Args:
        work: what each of them does; must not raise, and must come to its end when the body is left.
        num_threads: how many.

    Example:
        >>> done = []
        >>> with helping(lambda: done.append(1), num_threads=2):
        ...     pass
        >>> done
        [1, 1]
    """
    events: list[threading.Event] = []
    try:
        events.extend(start_helper(work) for _ in range(num_threads))
        yield
    finally:
        wait_for_all(events)


def start_helper(work: Callable[[], None]) -> threading.Event:
    """Start a thread that does `work`, and return what tells of its end."""
    has_ended = threading.Event()
    threading.Thread(target=_run, args=(work, has_ended), name="distckpt-staging", daemon=False).start()
    return has_ended


def join_at_exit(thread: threading.Thread) -> None:
    """Let the process wait for a daemon thread before the interpreter is taken down, but for :data:`EXIT_LIMIT_S`."""
    atexit.register(_join_if_alive, weakref.ref(thread), os.getpid())


def _join_if_alive(thread: "weakref.ref[threading.Thread]", process: int) -> None:
    found = thread()
    if found is not None and os.getpid() == process:  # a forked child has none of its parent's threads
        found.join(EXIT_LIMIT_S)


def _run(work: Callable[[], None], has_ended: threading.Event) -> None:
    try:
        work()
    finally:
        has_ended.set()


def wait_for_all(events: Sequence[threading.Event]) -> None:
    """Wait for the end of threads, whatever interrupts that; an interrupt is raised when all have ended."""
    # Not by Thread.join: one that a signal interrupts takes the thread for ended (CPython 3.11, threading.py).
    interrupt: BaseException | None = None
    for event in events:
        while not event.is_set():
            try:
                event.wait(timeout=1.0)
            except BaseException as error:  # noqa: BLE001 - KeyboardInterrupt, for one; raised below
                interrupt = error
    if interrupt is not None:
        raise interrupt
