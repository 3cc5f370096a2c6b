"""The ways of saving that the crash tests go through, and what each asks of `DiskSaver`.

One place: a new way of saving is one more entry, and every kind of trial is done in it.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from distckpt import DiskSaver

__all__ = ["MODES", "disk_saver", "is_background", "is_shared", "world_size_of"]

_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "foreground": {},
    "background": {"background": True},
    "shared": {"share_write": "node"},
    "background shared": {"background": True, "share_write": "node"},
}

MODES: Sequence[str] = tuple(_ARGUMENTS)


def disk_saver(directory: str | os.PathLike[str], mode: str, kind: type[DiskSaver] = DiskSaver, **kwargs: Any) -> Any:
    """Return a `kind` of DiskSaver that saves in this way, in a directory that may hold checkpoints."""
    return kind(directory, require_empty=False, **_ARGUMENTS[mode], **kwargs)


def is_background(saver: str) -> bool:
    """Tell whether training goes on while a file is written. A broken saver does nothing of the kind."""
    return bool(_ARGUMENTS.get(saver, {}).get("background"))


def is_shared(saver: str) -> bool:
    """Tell whether several ranks write one file."""
    return "share_write" in _ARGUMENTS.get(saver, {})


def world_size_of(saver: str) -> int:
    """Return how many ranks it takes."""
    return 2 if is_shared(saver) else 1
