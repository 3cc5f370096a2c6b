"""The base class of contestants: ways to save and load the job's state."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from ignite.engine import Engine, Events

from ci.savebench.files import sync
from ci.savebench.job import Job


class MissingError(Exception):
    """Raised if an installed version lacks what a contestant needs."""


def folder_name(name: str) -> str:
    """Return the name of a contestant's folder."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)


class Waiter(threading.Thread):
    """A thread that waits until a save is durable, and notes the time.

    Args:
        wait: blocks until this rank's files are durable.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        super().__init__(name="waiter", daemon=True)
        self._wait = wait
        self._at: float | None = None
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        """Wait for the save."""
        try:
            self._wait()
        except Exception as error:  # noqa: BLE001 - durable_at() raises it
            self._error = error
        self._at = time.monotonic()

    def durable_at(self) -> float | None:
        """Return the time, or None if the save is not durable yet; raise the error of the wait."""
        if self._at is not None and self._error is not None:
            raise self._error
        return self._at


class Contestant:
    """One way to save and load, on one rank. All ranks use the same contestants in the same order.

    A save takes four calls: `attach` to an engine before it runs; the engine's event; `saved` when training continues;
    `durable_at` until it returns a time. A subclass implements `save`, `complete` and `load`.

    Args:
        job: the training job.

    Attributes:
        name: name in the tables.
        folder: folder of its checkpoints.
        is_ours: whether it is distckpt's.
        is_background: whether training continues before the data are written.
        writes_one_file: whether only rank 0 writes. Otherwise all ranks sync files.
        reshards: whether ranks without a GPU load what another number of ranks saved.
        consolidates: whether it can make one file of its checkpoint, and is measured doing so.

    Raises:
        MissingError: the installed version lacks what is needed.
        ImportError: the library is not installed.
    """

    name: ClassVar[str]
    is_ours: ClassVar[bool] = False
    is_background: ClassVar[bool] = False
    writes_one_file: ClassVar[bool] = False
    reshards: ClassVar[bool] = True
    consolidates: ClassVar[bool] = False

    def __init__(self, job: Job) -> None:
        self.job = job
        self.folder = job.folder / folder_name(self.name)
        self._waiter: Waiter | None = None
        if job.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        job.meeting.barrier()  # the folder exists for all ranks

    def attach(self, engine: Engine, *, at: int, path: Path) -> None:
        """Make the engine save to `path` after iteration `at`."""
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=at), self.save, path)

    def save(self, path: Path) -> None:
        """Save on the training thread; its duration is the stall."""
        raise NotImplementedError

    def saved(self, path: Path) -> None:
        """Wait on a thread until the save is durable, now that training continues."""
        self._waiter = Waiter(lambda: self._become_durable(path))

    def _become_durable(self, path: Path) -> None:
        self.complete(path)
        if not self.writes_one_file:
            sync(self.where(path), rank=self.job.rank, num_ranks=self.job.world_size)
        elif self.job.rank == 0:
            sync(self.where(path))

    def complete(self, path: Path) -> None:
        """Block until a background save has written everything. Called on a thread."""

    def durable_at(self) -> float | None:
        """Return the time at which this rank's files became durable; None before. Called at each event."""
        return None if self._waiter is None else self._waiter.durable_at()

    def where(self, path: Path) -> Path:
        """Return the path of the checkpoint that a save to `path` wrote."""
        return path

    def load(self, where: Path) -> None:
        """Load the checkpoint at `where` into the live objects. All ranks."""
        raise NotImplementedError

    def consolidate(self, where: Path, target: Path) -> None:
        """Make one file, which plain torch.load opens, of the checkpoint at `where`. Rank 0 calls it."""
        raise NotImplementedError

    def remove(self, path: Path) -> None:
        """Remove the checkpoint saved to `path`, if the contestant does not remove it itself. Rank 0 calls it."""
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Release memory and processes. All ranks."""
