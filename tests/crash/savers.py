"""The saver under test, and broken ones that the same trials have to find out.

Each entry of `SAVERS` makes a handler that saves a `Counted` in a directory. It is called in a process that is
about to be killed, so a broken saver may patch distckpt in place. A trial that does not fail with the saver
made to break it proves nothing about the one that is not.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from distckpt import BaseSaveHandler, DiskSaver
from distckpt.storage import disk
from tests.crash.subject import Counted

__all__ = ["SAVERS", "SaverMaker"]

SaverMaker = Callable[[Counted, Path], Any]


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


def _distckpt(counted: Counted, directory: Path) -> Any:
    return counted.handler(DiskSaver(directory, require_empty=False))


def _ignite(counted: Counted, directory: Path) -> Any:
    """Remove the older one first, sync nothing."""
    return counted.ignite_handler(directory)


def _in_place(counted: Counted, directory: Path) -> Any:
    """Write under the final name."""
    return counted.handler(DiskSaver(directory, require_empty=False, atomic=False))


def _never_clears(counted: Counted, directory: Path) -> Any:
    """Leave the temporary files of the dead."""
    disk.Directory._clear_leftovers = lambda *_: None  # type: ignore[method-assign]
    return _distckpt(counted, directory)


def _clears_the_living(counted: Counted, directory: Path) -> Any:
    """Remove every temporary file, whoever writes it."""
    vars(disk)["remove_if_dead"] = lambda parent, name: os.unlink(name, dir_fd=parent)
    return _distckpt(counted, directory)


def _removes_first(counted: Counted, directory: Path) -> Any:
    """Do everything right but the order: remove the older one, then write."""

    class RemovesFirst(DiskSaver):
        def __call__(
            self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None
        ) -> None:
            for older in self.dirname.glob("*.pt"):
                older.unlink()
            super().__call__(checkpoint, filename, metadata)

        def remove(self, filename: str) -> None:
            """Nothing is left to remove."""

    return counted.handler(RemovesFirst(directory, require_empty=False))


def _syncs_nothing(counted: Counted, directory: Path) -> Any:
    """Leave out both fsyncs."""
    return counted.handler(_UnsyncedSaver(directory))


def _syncs_no_directory(counted: Counted, directory: Path) -> Any:
    """Leave out the fsync after the rename."""
    disk._sync_directory = lambda fd: None  # noqa: ARG005 - the name is the original's
    return _distckpt(counted, directory)


SAVERS: Mapping[str, SaverMaker] = {
    "distckpt": _distckpt,
    "ignite": _ignite,
    "in place": _in_place,
    "never clears": _never_clears,
    "clears the living": _clears_the_living,
    "removes first": _removes_first,
    "syncs nothing": _syncs_nothing,
    "syncs no directory": _syncs_no_directory,
}
