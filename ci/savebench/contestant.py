"""What a contestant is: somebody who saves the job's state, and loads it.

Owns the contract, and how durability is waited for. Must not know who takes part.
"""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from ignite.engine import Engine, Events

from ci.savebench.files import sync
from ci.savebench.job import Job

__all__ = ["Contestant", "MissingError", "Waiter", "folder_name"]


class MissingError(Exception):
    """This version lacks what a contestant needs."""


def folder_name(name: str) -> str:
    """Return the name of a contestant's folder."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)


class Waiter(threading.Thread):
    """A thread that waits for durability beside the training, and notes the moment.

    Args:
        wait: returns when this rank's part is durable.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        super().__init__(name="waiter", daemon=True)
        self._wait = wait
        self._at: float | None = None
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        """Wait."""
        try:
            self._wait()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where it is asked for
            self._error = error
        self._at = time.monotonic()

    def durable_at(self) -> float | None:
        """Return the moment, None while there is none; raise what the waiting raised."""
        if self._at is not None and self._error is not None:
            raise self._error
        return self._at


class Contestant:
    """One way to save and load, on one rank. A world's ranks use the same ones in the same order.

    A save is four calls: `attach` to an engine before it runs; the engine's event; `saved` when the training goes on;
    then `durable_at` until it tells a moment. A subclass says how in `save`, `complete`, and `load`.

    Args:
        job: whose state it is.

    Attributes:
        name: in tables.
        folder: where its checkpoints lie.
        is_ours: whether it is distckpt's.
        is_background: whether training goes on before the data are written.
        writes_one_file: whether rank 0 alone writes; else all ranks have a share in syncing.

    Raises:
        MissingError: this version lacks what is needed.
        ImportError: it is not installed.
    """

    name: ClassVar[str]
    is_ours: ClassVar[bool] = False
    is_background: ClassVar[bool] = False
    writes_one_file: ClassVar[bool] = False

    def __init__(self, job: Job) -> None:
        self.job = job
        self.folder = job.folder / folder_name(self.name)
        self._waiter: Waiter | None = None
        if job.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        job.meeting.barrier()  # it is there for all

    def attach(self, engine: Engine, *, at: int, path: Path) -> None:
        """Let the engine save into `path` when its iteration `at` is completed."""
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=at), self.save, path)

    def save(self, path: Path) -> None:
        """Save, on the training thread; what it takes is the stall."""
        raise NotImplementedError

    def saved(self, path: Path) -> None:
        """Note that the training goes on."""
        self._waiter = Waiter(lambda: self._become_durable(path))

    def _become_durable(self, path: Path) -> None:
        self.complete(path)
        if not self.writes_one_file:
            sync(self.where(path), share=self.job.rank, num_shares=self.job.world_size)
        elif self.job.rank == 0:
            sync(self.where(path))

    def complete(self, path: Path) -> None:
        """Return when a save that goes on in the background has written everything; called in a thread."""

    def durable_at(self) -> float | None:
        """Return the moment at which this rank's part was durable, None while it is not. Asked on each event."""
        return None if self._waiter is None else self._waiter.durable_at()

    def where(self, path: Path) -> Path:
        """Return the checkpoint that a save into `path` made."""
        return path

    def load(self, path: Path) -> None:
        """Load what was saved into `path` into the live objects. All ranks."""
        raise NotImplementedError

    def remove(self, path: Path) -> None:
        """Remove what was saved into `path`; one rank calls it. Whoever does so by himself leaves it alone."""
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of memory and processes. All ranks."""
