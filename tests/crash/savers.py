"""The saver under test, and broken savers, whose faults the same trials have to find.

Each entry of `SAVERS` makes a handler that saves something in a directory; those under test are named by the mode in
which they save. It is called in a process that is about to be killed, so a broken saver may patch distckpt in place. A
trial that does not fail with the saver made to break it proves nothing about the one that is not.
"""

import os
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distckpt import BaseSaveHandler, DiskSaver
from distckpt.storage import local, new_file
from tests.crash.modes import MODES, disk_saver
from tests.crash.subject import Counted
from tests.crash.trained import Trained

__all__ = ["SAVERS", "SaverMaker"]

Subject = Counted | Trained
SaverMaker = Callable[[Subject, Path], Any]


class _UnsyncedSaver(BaseSaveHandler):
    """Writes a temporary file and renames it, as many programs do, and syncs nothing."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def __call__(self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Save."""
        del metadata
        temp = self.directory / f"{filename}.new"
        torch.save(checkpoint, temp)
        temp.rename(self.directory / filename)

    def remove(self, filename: str) -> None:
        """Remove."""
        (self.directory / filename).unlink()


class _HastySaver(BaseSaveHandler):
    """Saves in a thread while training changes the state, and reports success at once."""

    def __init__(self, saver: DiskSaver) -> None:
        self._saver, self.dirname = saver, saver.dirname

    def __call__(self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Begin to save."""
        threading.Thread(target=self._saver, args=(checkpoint, filename, metadata), daemon=True).start()

    def remove(self, filename: str) -> None:
        """Remove."""
        (self.dirname / filename).unlink(missing_ok=True)


def _distckpt(counted: Subject, directory: Path, mode: str = "foreground") -> Any:
    return counted.handler(disk_saver(directory, mode))


def _ignite(counted: Subject, directory: Path) -> Any:
    """Remove the older one first, sync nothing."""
    return counted.ignite_handler(directory)


def _in_place(counted: Subject, directory: Path) -> Any:
    """Write under the final name."""
    return counted.handler(disk_saver(directory, "foreground", atomic=False))


def _never_clears(counted: Subject, directory: Path) -> Any:
    """Leave the temporary files of dead processes."""
    vars(local)["remove_dead_temps"] = lambda _parent: None
    return _distckpt(counted, directory)


def _clears_the_living(counted: Subject, directory: Path) -> Any:
    """Remove every temporary file, also those of living processes."""
    vars(new_file)["_remove_if_dead"] = lambda parent, name: os.unlink(name, dir_fd=parent)
    return _distckpt(counted, directory)


def _removes_first(counted: Subject, directory: Path) -> Any:
    """Remove the older checkpoint, then write; the rest is right."""

    class RemovesFirst(DiskSaver):
        def __call__(
            self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None
        ) -> None:
            for older in self.dirname.glob("*.pt"):
                older.unlink(missing_ok=True)  # every rank does it
            super().__call__(checkpoint, filename, metadata)

        def remove(self, filename: str) -> None:
            """Nothing is left to remove."""

    return counted.handler(disk_saver(directory, "foreground", RemovesFirst))


def _hasty(counted: Subject, directory: Path) -> Any:
    """Save in the background without a snapshot."""
    return counted.handler(_HastySaver(disk_saver(directory, "foreground")))


def _syncs_nothing(counted: Subject, directory: Path) -> Any:
    """Leave out both fsyncs."""
    return counted.handler(_UnsyncedSaver(directory))


def _syncs_no_directory(counted: Subject, directory: Path) -> Any:
    """Leave out the fsync after the rename."""
    new_file.sync_directory = lambda fd: None  # noqa: ARG005 - the name is the original's
    return _distckpt(counted, directory)


SAVERS: Mapping[str, SaverMaker] = {
    **{mode: partial(_distckpt, mode=mode) for mode in MODES},
    "ignite": _ignite,
    "in place": _in_place,
    "never clears": _never_clears,
    "clears the living": _clears_the_living,
    "removes first": _removes_first,
    "hasty": _hasty,
    "syncs nothing": _syncs_nothing,
    "syncs no directory": _syncs_no_directory,
}
