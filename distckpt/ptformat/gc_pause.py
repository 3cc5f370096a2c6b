"""Python's garbage collector, told to wait while many objects are made that are all kept.

Owns the pause. Must not know what is made.

The collector looks through all objects that there are each time their number has grown by a quarter. Reading a file of
50,000 tensors made that a third of its time, and nothing was ever found.
"""

import contextlib
import gc
import threading
from collections.abc import Iterator

__all__ = ["collector_paused"]

_LOCK = threading.Lock()
_PAUSES: list[bool] = []
"""For each body that runs, whether its beginning stopped the collector."""


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the garbage collector from running by itself while the body runs. Any thread.

    Example:
        >>> with collector_paused():
        ...     gc.isenabled()
        False
        >>> gc.isenabled()
        True
    """
    with _LOCK:
        _PAUSES.append(gc.isenabled())
        gc.disable()
    try:
        yield
    finally:
        with _LOCK:
            was_enabled = _PAUSES.pop()
            if _PAUSES:
                _PAUSES[0] |= was_enabled  # the last body that ends lets it run again
            elif was_enabled:
                gc.enable()
