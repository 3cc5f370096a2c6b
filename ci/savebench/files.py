"""Checkpoints as files: synced, dropped from the page cache, counted.

Owns what the operating system knows of files and of what was read. Must not know who wrote them.
"""

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "children_of",
    "drop_from_cache",
    "file_system_of",
    "files_of",
    "num_bytes",
    "read_from_storage",
    "read_through_cache",
    "sync",
]

_READ_BYTES = 8 << 20


def files_of(path: Path) -> list[Path]:
    """Return the files of a checkpoint, which is a file or a folder, in a fixed order."""
    return sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]


def num_bytes(path: Path) -> int:
    """Return how many bytes a checkpoint's files have."""
    return sum(one.stat().st_size for one in files_of(path))


def sync(path: Path, *, share: int = 0, num_shares: int = 1) -> None:
    """Make a checkpoint durable that others wrote: this share of its files; share 0 also metadata and directories."""
    data = [one for one in files_of(path) if not one.name.startswith(".")]
    mine = data[share::num_shares]
    if share == 0:
        mine += [one for one in files_of(path) if one.name.startswith(".")]
        mine += [one for one in path.rglob("*") if one.is_dir()] if path.is_dir() else []
        mine += [path, path.parent]
    for one in mine:
        descriptor = os.open(one, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def drop_from_cache(path: Path) -> None:
    """Let the next read of a checkpoint come from storage."""
    for one in files_of(path):
        descriptor = os.open(one, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # dirty pages stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_through_cache(path: Path) -> None:
    """Read a checkpoint through the page cache, to the last byte."""
    memory = bytearray(_READ_BYTES)
    for one in files_of(path):
        with one.open("rb", buffering=0) as file:
            while file.readinto(memory):
                pass


def children_of(pid: int) -> Iterator[int]:
    """Yield the process and all its descendants that live."""
    yield pid
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text(encoding="ascii").split():
                yield from children_of(int(child))
    except OSError:
        return  # it has ended


def read_from_storage(pid: int) -> int:
    """Return how many bytes a process and its descendants had read from storage by now."""
    total = 0
    for one in children_of(pid):
        try:
            lines = Path(f"/proc/{one}/io").read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))
    return total


def file_system_of(path: Path) -> str:
    """Return the type of the file system that a path lies on."""
    best, found = "", "?"
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, where, kind, *_ = line.split()
        if path.resolve().is_relative_to(where) and len(where) >= len(best):
            best, found = where, kind
    return found
