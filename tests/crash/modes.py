"""The ways of saving that the crash tests run, and the arguments of `DiskSaver` for each.

A new way of saving is one more entry; every kind of trial then runs it.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from distckpt import DiskSaver

__all__ = ["MODES", "disk_saver", "is_background", "is_sharded", "is_shared", "world_size_of"]

_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "foreground": {},
    "background": {"background": True},
    "shared": {"share_write": "node"},
    "background shared": {"background": True, "share_write": "node"},
    "sharded": {},
    "background sharded": {"background": True},
}

MODES: Sequence[str] = tuple(_ARGUMENTS)


def disk_saver(directory: str | os.PathLike[str], mode: str, kind: type[DiskSaver] = DiskSaver, **kwargs: Any) -> Any:
    """Return a `kind` of DiskSaver that saves in this way, in a directory that may hold checkpoints."""
    return kind(directory, require_empty=False, **_ARGUMENTS[mode], **kwargs)


def is_background(saver: str) -> bool:
    """Return True if training continues while a file is written. False for the broken savers."""
    return bool(_ARGUMENTS.get(saver, {}).get("background"))


def is_shared(saver: str) -> bool:
    """Return True if several ranks write one file."""
    return "share_write" in _ARGUMENTS.get(saver, {}) or is_sharded(saver)


def is_sharded(saver: str) -> bool:
    """Return True if each rank holds and writes a shard of the tensors."""
    return saver.endswith("sharded")


def world_size_of(saver: str) -> int:
    """Return the number of ranks of a job that saves so."""
    return 2 if is_shared(saver) else 1
