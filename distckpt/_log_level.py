"""Which ranks log a message: what happened on all ranks is logged once in a job, not once a rank.

The coordinator logs it, and the ranks that caused it. The other ranks log it at DEBUG. A message about one rank is
logged by that rank.
"""

import logging
from collections.abc import Collection

__all__ = ["level_on"]


def level_on(rank: int, reporters: Collection[int], level: int = logging.WARNING) -> int:
    """Return the level at which a rank logs what every rank knows.

    Args:
        rank: this rank.
        reporters: the ranks that log it at `level`.
        level: of :mod:`logging`.

    Example:
        >>> level_on(0, {0, 3}) == logging.WARNING, level_on(1, {0, 3}) == logging.DEBUG
        (True, True)
    """
    return level if rank in reporters else logging.DEBUG
