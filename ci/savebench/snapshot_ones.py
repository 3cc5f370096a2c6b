"""torchsnapshot, where it is installed: the environment `bench` has it.

Owns its two contestants. It syncs nothing: an fsync of its files is done for it, beside the training.
"""

import importlib
from pathlib import Path
from typing import Any

from ci.savebench.contestant import Contestant
from ci.savebench.job import Job

__all__ = ["SnapshotAsyncTake", "SnapshotTake"]


class SnapshotTake(Contestant):
    """Snapshot.take of replicated state: the ranks share the writing."""

    name = "torchsnapshot take"

    def __init__(self, job: Job) -> None:
        self._snapshot: Any = importlib.import_module("torchsnapshot").Snapshot
        super().__init__(job)
        self._pending: Any = None

    def save(self, path: Path) -> None:
        """Save on all ranks."""
        self._snapshot.take(path=str(path), app_state=self.job.objects(), replicated=["**"])

    def load(self, path: Path) -> None:
        """Restore on all ranks."""
        self._snapshot(path=str(path)).restore(app_state=self.job.objects())


class SnapshotAsyncTake(SnapshotTake):
    """Snapshot.async_take: a copy within its memory budget, then a thread."""

    name = "torchsnapshot async_take"
    is_background = True

    def save(self, path: Path) -> None:
        """Copy the state, and begin."""
        self._pending = self._snapshot.async_take(path=str(path), app_state=self.job.objects(), replicated=["**"])

    def complete(self, path: Path) -> None:
        """Wait for the thread."""
        del path
        if self._pending is not None:
            self._pending.wait()
