"""Find out what the files of a directory are, from their ends alone: what ``ls`` and ``prune`` start from.

Neither imports torch. A file that distckpt wrote is *complete* if its manifest has its checksum and its directory is at
its end; ``verify`` reads the rest. Symlinks to files are read; those to directories are not followed.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from distckpt.cli.output import CommandError
from distckpt.policy.naming import is_temp
from distckpt.ptformat.archive import NewerSchema, NotAnArchive, is_archive, read_archive, read_manifest
from distckpt.ptformat.layout import UnsupportedArchive, check_end
from distckpt.ptformat.manifest import Manifest
from distckpt.ptformat.records import Record, parse_record
from distckpt.ptformat.safetensors_format import read_safetensors_header
from distckpt.storage.local import LocalFile
from distckpt.storage.new_file import is_being_written

_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")
DCP_METADATA = ".metadata"
"""A file that each directory of ``torch.distributed.checkpoint`` has."""
_OLD_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
"""How torch's files begin that are no archives: a pickle of its magic number."""


class State(StrEnum):
    """What is known of a file without reading all of it."""

    COMPLETE = "complete"
    DAMAGED = "damaged"
    UNREADABLE = "unreadable"
    """The operating system refuses, or its format is newer or unknown."""
    BEING_WRITTEN = "being written"
    LEFT_OVER = "left over"
    """A temporary file whose process is dead. The next save deletes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file.

    Attributes:
        name: relative to the directory.
        path: its path.
        state: what is known of it.
        detail: why it is not complete; None if it is.
        num_bytes: its length.
        modified_s: when it was changed, in seconds since 1970.
        identity: device, inode, length and time of change: equal as long as it is the same file.
        link: what the symlink points to; None for a file.
        manifest: without tensors; None for a file of another program.
        record: its handler's record; None if a save without a handler wrote it.
    """

    name: str
    path: Path
    state: State
    detail: str | None
    num_bytes: int
    modified_s: float
    identity: tuple[int, int, int, int]
    link: str | None
    manifest: Manifest | None
    record: Record | None

    @property
    def saved_s(self) -> float:
        """When it was saved, in seconds since 1970; when it was changed if it does not say."""
        return self.modified_s if self.manifest is None else self.manifest.wall_time_s

    @property
    def step(self) -> int | None:
        """The iteration that the manifest has."""
        return None if self.manifest is None else self.manifest.iteration

    @property
    def score(self) -> float | None:
        """The score that the manifest has."""
        return None if self.manifest is None else self.manifest.score


def survey(directory: Path, *, recursive: bool) -> list[FileEntry]:
    """Return the checkpoints of a directory and what saves have left over, sorted by name.

    Args:
        directory: to list.
        recursive: search sub-folders too.

    Raises:
        CommandError: it is no directory.
        OSError: it cannot be listed.
    """
    if not directory.is_dir():
        if not os.path.lexists(directory):
            raise CommandError(f"{directory} does not exist: give the directory that checkpoints are saved in")
        raise CommandError(f"{directory} is no directory: give the directory that checkpoints are saved in")
    if (directory / DCP_METADATA).is_file():
        raise CommandError(
            f"{directory} is one checkpoint, of torch.distributed.checkpoint (distckpt inspect {directory})"
        )
    entries = (look_at(path, path.relative_to(directory).as_posix()) for path in _files(directory, recursive=recursive))
    return sorted((entry for entry in entries if entry is not None), key=lambda entry: entry.name)


def _files(directory: Path, *, recursive: bool) -> Iterator[Path]:
    with os.scandir(directory) as found:
        entries = list(found)
    for entry in entries:
        path = directory / entry.name
        if entry.is_dir(follow_symlinks=False):
            if is_temp(entry.name):  # an unfinished conversion
                yield path
            elif recursive:
                with contextlib.suppress(PermissionError):
                    yield from _files(path, recursive=True)
        elif entry.is_symlink() or entry.is_file():
            yield path


def look_at(path: Path, name: str) -> FileEntry | None:
    """Return what a file is; None if it is no checkpoint by content and by name, is no regular file, or is gone."""
    is_named = path.name.endswith(_SUFFIXES) or is_temp(path.name)
    manifest: Manifest | None = None
    detail: str | None
    try:
        found = path.lstat()
        link = str(path.readlink()) if stat.S_ISLNK(found.st_mode) else None
    except OSError:
        return None
    try:
        found = path.stat()
        if is_temp(path.name) and (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            state, detail = _state_of_temp(path)
        elif not stat.S_ISREG(found.st_mode):
            return None
        else:
            with LocalFile(path) as file:
                manifest = read_manifest(file, with_tensors=False)
                if manifest is None and not is_named:
                    return None
                detail = _find_damage(file, manifest)
                state = State.COMPLETE if detail is None else State.DAMAGED
    except NewerSchema as error:
        state = State.UNREADABLE
        detail = f"it has schema {error.head.schema}, of distckpt {error.head.writer}: upgrade distckpt"
    except UnsupportedArchive as error:
        state, detail = State.UNREADABLE, str(error)
    except OSError as error:
        if not is_named:
            return None
        is_broken_link = isinstance(error, FileNotFoundError) and link is not None
        state, detail = State.UNREADABLE, "its symlink is broken" if is_broken_link else error.strerror
    return FileEntry(
        name=name,
        path=path,
        state=state,
        detail=detail,
        num_bytes=found.st_size,
        modified_s=found.st_mtime,
        identity=(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns),
        link=link,
        manifest=manifest,
        record=None if manifest is None else parse_record(manifest.record, manifest.wall_time_s),
    )


def _state_of_temp(path: Path) -> tuple[State, str]:
    if is_being_written(path):
        return State.BEING_WRITTEN, "a process writes it"
    return State.LEFT_OVER, f"its process is dead{'. Delete it' if path.is_dir() else ', and the next save deletes it'}"


def _find_damage(file: LocalFile, manifest: Manifest | None) -> str | None:
    """Return what is wrong with a file, from its beginning and its end; None if nothing is."""
    if file.num_bytes == 0:
        return "it is empty"
    try:
        if is_archive(file):
            return _find_archive_damage(file, manifest)
        if file.path.name.endswith(".safetensors"):
            read_safetensors_header(file)
            return None
    except (NotAnArchive, ValueError) as error:
        return str(error)
    if file.read(0, len(_OLD_TORCH)) == _OLD_TORCH:
        return None
    return "it does not begin as a checkpoint does"


def _find_archive_damage(file: LocalFile, manifest: Manifest | None) -> str | None:
    damage = "its manifest is damaged"
    if manifest is not None:
        try:
            check_end(file.read, file.num_bytes)
        except ValueError as error:
            damage = str(error)
        else:
            return None
    return damage if read_archive(file).is_own else None  # other programs lay archives out in other ways
