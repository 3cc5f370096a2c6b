"""Checkpoints as files: sync them, drop them from the page cache, count their bytes."""

import os
from collections.abc import Iterator
from pathlib import Path

_READ_BYTES = 8 << 20


def files_of(path: Path) -> list[Path]:
    """Return the files of a checkpoint (a file or a folder), sorted."""
    return sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]


def num_bytes(path: Path) -> int:
    """Return the total size of a checkpoint's files."""
    return sum(one.stat().st_size for one in files_of(path))


def sync(path: Path, *, rank: int = 0, num_ranks: int = 1) -> None:
    """Sync every `num_ranks`-th file of a checkpoint, from `rank` on; rank 0 also syncs metadata and directories."""
    data = [one for one in files_of(path) if not one.name.startswith(".")]
    mine = data[rank::num_ranks]
    if rank == 0:
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
    """Drop a checkpoint from the page cache, so that the next read comes from storage."""
    for one in files_of(path):
        descriptor = os.open(one, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # dirty pages would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_through_cache(path: Path) -> None:
    """Read a whole checkpoint through the page cache."""
    memory = bytearray(_READ_BYTES)
    for one in files_of(path):
        with one.open("rb", buffering=0) as file:
            while file.readinto(memory):
                pass


def children_of(pid: int) -> Iterator[int]:
    """Yield a process and its living descendants."""
    yield pid
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text(encoding="ascii").split():
                yield from children_of(int(child))
    except OSError:
        return  # the process has ended


def read_from_storage(pid: int) -> int:
    """Return the bytes that a process and its descendants have read from storage."""
    return _counted(pid, "read_bytes:")


def written_to_storage(pid: int) -> int:
    """Return the bytes that a process and its descendants have written, or will write, to storage."""
    return _counted(pid, "write_bytes:")


def _counted(pid: int, name: str) -> int:
    total = 0
    for one in children_of(pid):
        try:
            lines = Path(f"/proc/{one}/io").read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith(name))
    return total


def file_system_of(path: Path) -> str:
    """Return the type of a path's file system."""
    best, found = "", "?"
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, where, kind, *_ = line.split()
        if path.resolve().is_relative_to(where) and len(where) >= len(best):
            best, found = where, kind
    return found
