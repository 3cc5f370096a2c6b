"""torchsnapshot's contestants; the environment `bench` has it installed.

It syncs nothing, so a thread syncs its files while training continues.
"""

import importlib
from pathlib import Path
from typing import Any

from ci.savebench.contestant import Contestant
from ci.savebench.job import Job


class SnapshotTake(Contestant):
    """Snapshot.take of replicated state, written by all ranks."""

    name = "torchsnapshot take"

    def __init__(self, job: Job) -> None:
        self._snapshot: Any = importlib.import_module("torchsnapshot").Snapshot
        super().__init__(job)
        self._pending: Any = None

    def save(self, path: Path) -> None:
        """Save on all ranks."""
        self._snapshot.take(path=str(path), app_state=self.job.objects(), replicated=["**"])

    def load(self, where: Path) -> None:
        """Restore on all ranks."""
        self._snapshot(path=str(where)).restore(app_state=self.job.objects())


class SnapshotAsyncTake(SnapshotTake):
    """Snapshot.async_take: a copy within its memory budget, then a thread."""

    name = "torchsnapshot async_take"
    is_background = True

    def save(self, path: Path) -> None:
        """Copy the state, and start the write."""
        self._pending = self._snapshot.async_take(path=str(path), app_state=self.job.objects(), replicated=["**"])

    def complete(self, path: Path) -> None:
        """Wait for the thread."""
        del path
        if self._pending is not None:
            self._pending.wait()
