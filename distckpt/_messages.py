"""Which log messages and warnings a rank emits."""

import contextlib
import logging
import threading
import warnings
from collections.abc import Collection, Iterator
from typing import Any


def log_level(rank: int, reporters: Collection[int], level: int = logging.WARNING) -> int:
    """Return the level at which a rank logs a message that all ranks have: `level` on reporters, else DEBUG.

    A job logs such a message once: on the coordinator, and on the ranks that caused it.

    Args:
        rank: this rank.
        reporters: the ranks that log at `level`.
        level: a level of :mod:`logging`.

    Example:
        >>> log_level(0, {0, 3}) == logging.WARNING, log_level(1, {0, 3}) == logging.DEBUG
        (True, True)
    """
    return level if rank in reporters else logging.DEBUG


class _IgnoredHere(threading.local):
    """Stands for the message pattern in a warning filter; matches in threads that are in :func:`ignore_warnings`."""

    depth = 0

    def match(self, _text: str) -> bool:
        return self.depth > 0


_IGNORED_HERE = _IgnoredHere()
_FILTER: Any = ("ignore", _IGNORED_HERE, Warning, None, 0)
_LOCK = threading.Lock()


@contextlib.contextmanager
def ignore_warnings() -> Iterator[None]:
    """Ignore the warnings of this thread, but not those of other threads: these may be other ranks.

    ``warnings.catch_warnings`` changes the filters of the whole process. When two threads use it at once, the later
    one may restore the wrong filters.

    Example:
        >>> import warnings
        >>> with ignore_warnings():
        ...     warnings.warn("ignored")
    """
    with _LOCK:
        if not warnings.filters or warnings.filters[0] is not _FILTER:
            if _FILTER in warnings.filters:
                warnings.filters.remove(_FILTER)  # type: ignore[attr-defined]  # a list
            warnings.filters.insert(0, _FILTER)  # type: ignore[attr-defined]
    _IGNORED_HERE.depth += 1
    try:
        yield
    finally:
        _IGNORED_HERE.depth -= 1
