"""What the tests of directories share: contents to write, and what is there afterwards."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from distckpt.storage.buffered_writer import Sink


def holding(content: bytes) -> Callable[[Sink], None]:
    """Return what fills a file with `content`."""

    def fill(sink: Sink) -> None:
        sink.write(content)
        sink.flush()

    return fill


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
