"""What the tests of directories share: contents to write, and what is there afterwards."""

import contextlib
from pathlib import Path

from distckpt.storage.base import Chunk, Storage


def write(storage: Storage, name: str, content: bytes) -> None:
    """Write a file that holds `content`."""
    with storage.create(name) as new:
        new.write([Chunk(0, content)])
        new.commit(len(content))


def names_in(directory: Path) -> list[str]:
    """Return the names in a directory, sorted."""
    return sorted(path.name for path in directory.iterdir())


def open_files_below(directory: Path) -> list[str]:
    """Return the files at or below `directory` that this process holds open."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own
            found.append(str(descriptor.readlink()))
    return [path for path in found if path.startswith(str(directory))]
