"""Silence for what one thread does, and for no other: replicas may be threads of one process.

``warnings.catch_warnings`` changes what the whole process warns of, and where two threads are in it at once the older
state may be put back last, for good.
"""

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import Any

__all__ = ["quiet"]


class _Quiet(threading.local):
    """How many silent blocks this thread is in. Stands in a warning filter for the pattern of the message."""

    depth = 0

    def match(self, _text: str) -> bool:
        """Tell whether this thread's warnings are to be ignored."""
        return self.depth > 0


_QUIET = _Quiet()
_FILTER: Any = ("ignore", _QUIET, Warning, None, 0)
_LOCK = threading.Lock()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Ignore the warnings of this thread.

    Example:
        >>> import warnings
        >>> with quiet():
        ...     warnings.warn("not said")
    """
    with _LOCK:
        if not warnings.filters or warnings.filters[0] is not _FILTER:
            if _FILTER in warnings.filters:
                warnings.filters.remove(_FILTER)  # type: ignore[attr-defined]  # a list
            warnings.filters.insert(0, _FILTER)  # type: ignore[attr-defined]
    _QUIET.depth += 1
    try:
        yield
    finally:
        _QUIET.depth -= 1
