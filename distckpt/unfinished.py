"""What a process should bring to its end before it is ended by force.

Owns the list of it. Must not know what it is. Layer L1.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["unfinished", "wait_for_unfinished"]

_LOCK = threading.Lock()
_UNDER_WAY: dict[int, threading.Event] = {}


@contextmanager
def unfinished() -> Iterator[None]:
    """Be on the list while the body runs. Any thread.

    Example:
        >>> with unfinished():
        ...     wait_for_unfinished(0.01)
        False
        >>> wait_for_unfinished(0.01)
        True
    """
    has_ended = threading.Event()
    with _LOCK:
        _UNDER_WAY[id(has_ended)] = has_ended
    try:
        yield
    finally:
        with _LOCK:
            del _UNDER_WAY[id(has_ended)]
        has_ended.set()


def wait_for_unfinished(limit_s: float) -> bool:
    """Wait until what is on the list now has ended. Any thread.

    Args:
        limit_s: how long at most, in seconds.

    Returns:
        Whether it has.
    """
    deadline = time.monotonic() + limit_s
    with _LOCK:
        events = list(_UNDER_WAY.values())
    return all(event.wait(max(deadline - time.monotonic(), 0.0)) for event in events)
