"""List the checkpoints of a directory with their states, for ``ls`` and ``prune``.

Only the ends of the files are read, and torch is not imported. A file by distckpt is *complete* if its manifest matches
its checksum and the archive's directory is at the file's end; ``verify`` reads the rest. Symlinks to files are read;
symlinks to directories are not followed.
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
"""A file in every checkpoint directory of ``torch.distributed.checkpoint``."""
_OLD_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
"""The beginning of files in torch's format before archives: a pickled magic number."""


class State(StrEnum):
    """The state of a file, found without reading all of it."""

    COMPLETE = "complete"
    DAMAGED = "damaged"
    UNREADABLE = "unreadable"
    """The operating system refuses access, or the format is newer or unknown."""
    BEING_WRITTEN = "being written"
    LEFT_OVER = "left over"
    """A temporary file whose process is dead. The next save deletes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file of the directory.

    Attributes:
        name: path relative to the directory.
        path: the path.
        state: complete, damaged, and so on.
        detail: why the file is not complete; None if it is.
        num_bytes: the file's length.
        modified_s: time of the last change, in seconds since 1970.
        identity: device, inode, length and time of the last change: differs once the file is changed or replaced.
        link: the symlink's target; None if it is not a symlink.
        manifest: the manifest without the list of tensors; None for a file by another program.
        record: the handler's record; None if the file was saved without a handler.
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
        """Time of the save, in seconds since 1970; without a manifest, time of the last change."""
        return self.modified_s if self.manifest is None else self.manifest.wall_time_s

    @property
    def step(self) -> int | None:
        """The manifest's iteration; None if unknown."""
        return None if self.manifest is None else self.manifest.iteration

    @property
    def score(self) -> float | None:
        """The manifest's score; None if unknown."""
        return None if self.manifest is None else self.manifest.score


def survey(directory: Path, *, recursive: bool) -> list[FileEntry]:
    """Return the checkpoints and the temporary files of a directory, sorted by name.

    Args:
        directory: the directory.
        recursive: search sub-folders too.

    Raises:
        CommandError: `directory` is not a directory of checkpoints.
        OSError: the directory cannot be listed.
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
    """Return a file's entry; None if it is gone, not regular, or a checkpoint by neither content nor name."""
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
    """Return the damage at a file's beginning and end, in words; None if there is none."""
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
    return damage if read_archive(file).is_own else None  # other programs have other layouts
