"""One rank of a job as a world of its own, for a save that the other ranks may never come to.

An engine that handles an exception handles it on this rank. The other ranks may be in training, in a collective of the
job's, or gone: nothing can be agreed on with them, and nothing may be waited for.
"""

from typing import Any

from distckpt.backends.base import Backend
from distckpt.backends.serial import SerialBackend

__all__ = ["RankAlone"]


class RankAlone(SerialBackend):
    """A world of one that keeps its rank's number. No collective of the job's is issued.

    Args:
        live: the job's.
    """

    def __init__(self, live: Backend) -> None:
        self._live = live
        self.rank = live.rank

    def sync_device(self, tree: Any, *, to_host: bool) -> Any:
        """As the job's runtime does."""
        return self._live.sync_device(tree, to_host=to_host)
