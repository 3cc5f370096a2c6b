"""Threads that help while a block of code runs, and have ended when it is left, whatever interrupts that.

Owns that promise. Must not know what they do. Layer L1.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

__all__ = ["helping", "start_helper", "wait_for_all"]


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
    threading.Thread(target=_run, args=(work, has_ended), name="distckpt-staging", daemon=True).start()
    return has_ended


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
