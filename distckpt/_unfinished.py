"""What a process should bring to its end before it is ended by force.

Owns the list of it. Must not know what it is.
"""

import threading
import time

__all__ = ["Unfinished", "wait_for_unfinished"]

_LOCK = threading.Lock()
_UNDER_WAY: "dict[int, Unfinished]" = {}


class Unfinished:
    """Something that is on the list until :meth:`end` is called. Any thread.

    Example:
        >>> one = Unfinished()
        >>> wait_for_unfinished(0.01)
        False
        >>> one.end()
        >>> wait_for_unfinished(0.01)
        True
    """

    def __init__(self) -> None:
        self.has_ended = threading.Event()
        with _LOCK:
            _UNDER_WAY[id(self)] = self

    def end(self) -> None:
        """Take it off the list."""
        with _LOCK:
            _UNDER_WAY.pop(id(self), None)
        self.has_ended.set()


def wait_for_unfinished(limit_s: float) -> bool:
    """Wait until what is on the list now has ended. Any thread.

    Args:
        limit_s: how long at most, in seconds.

    Returns:
        Whether it has.
    """
    deadline = time.monotonic() + limit_s
    with _LOCK:
        found = list(_UNDER_WAY.values())
    return all(one.has_ended.wait(max(deadline - time.monotonic(), 0.0)) for one in found)
