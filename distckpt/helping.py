"""Threads that help while a block of code runs, and have ended when it is left, whatever interrupts that.

Owns that promise. Must not know what they do. Layer L1.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator

__all__ = ["helping"]


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
        for _ in range(num_threads):
            has_ended = threading.Event()
            threading.Thread(target=_run, args=(work, has_ended), name="distckpt-helper", daemon=True).start()
            events.append(has_ended)
        yield
    finally:
        _wait_for_all(events)


def _run(work: Callable[[], None], has_ended: threading.Event) -> None:
    try:
        work()
    finally:
        has_ended.set()


def _wait_for_all(events: list[threading.Event]) -> None:
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
