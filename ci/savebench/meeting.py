"""Exchange values between the ranks over the parent's store.

The process group is under test: a contestant that breaks it must still be reported.
"""

import json
from datetime import timedelta
from typing import Any

from torch.distributed import Store

TIMEOUT = timedelta(seconds=150)  # longer than the process group's: a rank may still be in a save


class Meeting:
    """Exchanges plain values between the ranks.

    Args:
        store: a store that all ranks are connected to.
        rank: this rank.
        world_size: number of ranks.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self._number = 0

    def gather(self, value: Any) -> list[Any]:
        """Collective. Return the values of all ranks, in rank order. Each must be serializable as JSON."""
        self._number += 1
        self._store.set(self._key(self.rank), json.dumps(value))
        keys = [self._key(rank) for rank in range(self.world_size)]
        self._store.wait(keys, TIMEOUT)
        return [json.loads(self._store.get(key)) for key in keys]

    def barrier(self) -> None:
        """Collective. Block until all ranks have arrived."""
        self.gather(None)

    def _key(self, rank: int) -> str:
        return f"meeting/{self._number}/{rank}"
