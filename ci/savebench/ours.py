"""distckpt's contestants: the handler as a user attaches it, in the foreground and in the background."""

import inspect
from pathlib import Path
from typing import Any, ClassVar

from ignite.engine import Engine, Events

import distckpt
from ci.savebench.arrivals import Arrivals
from ci.savebench.contestant import Contestant, MissingError, Waiter
from ci.savebench.job import Job
from distckpt.saving.staging import thread_memory


class Foreground(Contestant):
    """Checkpoint with a DiskSaver that keeps the latest file."""

    name = "distckpt"
    is_ours = True
    writes_one_file = True
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, job: Job) -> None:
        known = inspect.signature(distckpt.DiskSaver).parameters
        missing = [name for name in self.options if name not in known]
        if missing:
            msg = f"DiskSaver has no argument {' and no '.join(missing)}"
            raise MissingError(msg)
        super().__init__(job)
        saver = distckpt.DiskSaver(self.folder, require_empty=False, **self.options)
        self._checkpoint: Any = distckpt.Checkpoint(
            job.wrapped(), saver, n_saved=1, global_step_transform=lambda *_: job.num_steps
        )

    def attach(self, engine: Engine, *, at: int, path: Path) -> None:
        """Attach the handler, and wait for the file on a thread."""
        del path
        arrivals = Arrivals(self.folder)
        self._waiter = Waiter(lambda: _wait(arrivals))
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=at), self._checkpoint)

    def saved(self, path: Path) -> None:
        """Do nothing: `attach` has started the wait."""

    def where(self, path: Path) -> Path:
        """Return the newest file."""
        del path
        return Path(self._checkpoint.last_checkpoint)

    def load(self, where: Path) -> None:
        """Load on every rank: all together if each has a shard, as DCP does; else each by itself, as ignite does."""
        if self.job.is_sharded:
            distckpt.load(self.job.wrapped(), where)
        else:
            distckpt.Checkpoint.load_objects(self.job.wrapped(), where)

    def remove(self, path: Path) -> None:
        """Do nothing: the next save removes the file."""

    def close(self) -> None:
        """Free the memory that all saves of a process share."""
        thread_memory().free()


class Shared(Foreground):
    """The same, written by all ranks of the node."""

    name = "distckpt shared"
    options: ClassVar[dict[str, Any]] = {"share_write": "node"}


class Background(Foreground):
    """The same, written while training continues."""

    name = "distckpt background"
    is_background = True
    options: ClassVar[dict[str, Any]] = {"background": True}

    def __init__(self, job: Job) -> None:
        for needed in ("has_pending_save", "wait_until_finished"):
            if not hasattr(distckpt.Checkpoint, needed):
                msg = f"Checkpoint has no {needed}"
                raise MissingError(msg)
        super().__init__(job)

    def close(self) -> None:
        """Wait for a pending save."""
        self._checkpoint.wait_until_finished()
        super().close()


class BackgroundShared(Background):
    """The same, written by all ranks of the node."""

    name = "distckpt background shared"
    options: ClassVar[dict[str, Any]] = {"background": True, "share_write": "node"}


def _wait(arrivals: Arrivals) -> None:
    """Block until the new file has its name and the older one is removed, which comes after the sync."""
    with arrivals:
        arrivals.wait_for_another(".pt")
