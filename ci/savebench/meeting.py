"""Where the ranks of a benchmark meet, apart from the process group under test.

Owns the small values that ranks exchange between measurements: over the parent's store, so that a contestant that broke
the group is still told of. Must not know what is measured.
"""

import json
from datetime import timedelta
from typing import Any

from torch.distributed import Store

__all__ = ["Meeting"]

LIMIT = timedelta(seconds=150)  # a rank may still be in a save, under the group's own limit


class Meeting:
    """The ranks' exchange of plain values.

    Args:
        store: one that all ranks are connected to.
        rank: this rank.
        world_size: how many ranks there are.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self._number = 0

    def gather(self, value: Any) -> list[Any]:
        """Collective. Return the value of every rank, in their order. Values are what JSON knows."""
        self._number += 1
        self._store.set(self._key(self.rank), json.dumps(value))
        keys = [self._key(rank) for rank in range(self.world_size)]
        self._store.wait(keys, LIMIT)
        return [json.loads(self._store.get(key)) for key in keys]

    def barrier(self) -> None:
        """Collective. Return when every rank has come."""
        self.gather(None)

    def _key(self, rank: int) -> str:
        return f"meeting/{self._number}/{rank}"
