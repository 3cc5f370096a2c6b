"""``distckpt verify``: check every byte of checkpoints against their checksums, on several threads.

Each thread reads a range of a file in order, with readahead. Files by other programs are checked against the zip
checksums if these were computed; safetensors files have no checksums.
"""

import argparse
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from distckpt.cli.output import Column, CommandError, ExitCode, Output, Table, count, format_bytes
from distckpt.cli.progress import Progress
from distckpt.cli.survey import FileEntry, State, look_at, survey
from distckpt.errors import CorruptCheckpointError, LoadError
from distckpt.ptformat.reader import OpenCheckpoint
from distckpt.ptformat.verify import Checksum, Fault
from distckpt.storage.readahead import is_cached

_MOST_THREADS = 4
_STEP_BYTES = 64 << 20
"""Number of bytes after which a thread checks whether the command was interrupted."""
_LEAST_BYTES = 16 << 20
"""Least number of bytes per thread."""
_COLUMNS = (Column("NAME", can_shrink=True), Column("SIZE", is_number=True), Column("STATE"))
_MOST_SHOWN = 10
NO_CHECKSUMS = "no checksums"


class Verified(NamedTuple):
    """The result for one file.

    Attributes:
        state: ``whole``, ``damaged``, ``unreadable`` or ``no checksums``.
        faults: a phrase for each damaged place.
        tensors: the names of the damaged tensors.
        num_bytes: length of the file.
    """

    state: str
    faults: tuple[str, ...]
    tensors: tuple[str, ...]
    num_bytes: int


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Run the command; return its exit code."""
    path: Path = arguments.path
    is_directory = path.is_dir()
    if is_directory and (path / ".metadata").is_file():
        raise CommandError(f"{path} is of torch.distributed.checkpoint, which keeps no checksums to compare with")
    begin_s = time.monotonic()
    if is_directory:
        verified = verify_entries(survey(path, recursive=arguments.recursive))
    else:
        found = None if path.is_fifo() else look_at(path, str(path))
        verified = {str(path): _verify_alone(path, found)}
    took_s = time.monotonic() - begin_s
    num_bytes = sum(one.num_bytes for one in verified.values())
    files: list[dict[str, Any]] = [{"name": name, **one._asdict()} for name, one in verified.items()]
    output.json({"path": str(path), "files": files, "took_s": took_s})
    if not verified:
        output.line(f"{path} holds no checkpoints{'' if arguments.recursive else ' (--recursive: in sub-folders)'}")
        return ExitCode.FOUND
    rows = [(name, format_bytes(one.num_bytes), one.state) for name, one in verified.items()]
    output.table(Table(columns=_COLUMNS, rows=list(rows)))
    for name, one in verified.items():
        for fault in one.faults[:_MOST_SHOWN]:
            output.line(f"{name}: {fault}")
        if len(one.faults) > _MOST_SHOWN:
            output.line(f"{name}: and {count(len(one.faults) - _MOST_SHOWN, 'damaged place')} more, see --json")
    rate = f"{format_bytes(num_bytes / max(took_s, 1e-9))}/s"
    output.line(f"{count(len(verified), 'file')}, {format_bytes(num_bytes)} in {took_s:.2f} s, {rate}")
    return ExitCode.FOUND if any(one.faults for one in verified.values()) else ExitCode.OK


def _verify_alone(path: Path, entry: FileEntry | None) -> Verified:
    if entry is None and not path.exists():
        raise CommandError(f"{path} does not exist: give a checkpoint, or a directory of checkpoints")
    if entry is not None and entry.state is State.UNREADABLE:
        raise CommandError(f"{path} cannot be read: {entry.detail}")
    if entry is not None and entry.state is State.BEING_WRITTEN:
        raise CommandError(f"{path} is being written: verify the file that it becomes")
    with Progress("verifying", path.stat().st_size) as progress:
        return _verify(path, progress)


def verify_entries(entries: Sequence[FileEntry]) -> Mapping[str, Verified]:
    """Verify all files except temporary ones; return the results by name."""
    found: dict[str, Verified] = {}
    todo = [entry for entry in entries if entry.state not in (State.LEFT_OVER, State.BEING_WRITTEN)]
    with Progress("verifying", sum(entry.num_bytes for entry in todo)) as progress:
        for entry in todo:
            if entry.state is State.UNREADABLE:
                found[entry.name] = Verified("unreadable", (str(entry.detail),), (), entry.num_bytes)
            else:
                found[entry.name] = _verify(entry.path, progress)
    return found


def _verify(path: Path, progress: Progress) -> Verified:
    try:
        if path.name.endswith(".safetensors"):
            return _verify_safetensors(path)
        with OpenCheckpoint(path) as file:
            checksums = check_file(file, progress)
            faults = file.faults(checksums)
            if not faults and not file.has_checksums(checksums):
                file.state()  # raises if the state cannot be read
                return Verified(NO_CHECKSUMS, (), (), file.num_bytes)
            tensors = dict.fromkeys(name for fault in faults for name in fault.tensors)
            state = "damaged" if faults else "whole"
            return Verified(state, tuple(map(str, faults)), tuple(tensors), file.num_bytes)
    except (LoadError, OSError) as error:
        state = "damaged" if isinstance(error, CorruptCheckpointError) else "unreadable"
        text = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        return Verified(state, (text,), (), path.stat().st_size if path.exists() else 0)


def _verify_safetensors(path: Path) -> Verified:
    entry = look_at(path, path.name)  # compares the file's length with its header
    num_bytes = 0 if entry is None else entry.num_bytes
    if entry is not None and entry.detail is not None:
        return Verified("damaged", (str(Fault(entry.detail)),), (), num_bytes)
    return Verified(NO_CHECKSUMS, (), (), num_bytes)


def check_file(file: OpenCheckpoint, progress: Progress) -> list[list[Checksum]]:
    """Return the checksums of all ranges of a file, in order."""
    num_threads = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)), file.num_bytes // _LEAST_BYTES))
    stop, has_all = threading.Event(), is_cached(file.path)

    def work(number: int) -> list[list[Checksum]]:
        found = list[list[Checksum]]()
        ranges = file.range_for(number, num_threads)
        with file.readahead([] if has_all else ranges) as source:
            for begin, end in ranges:
                for at in range(begin, end, _STEP_BYTES):
                    if stop.is_set():
                        return found
                    until = min(at + _STEP_BYTES, end)
                    found.append(file.check([(at, until)], source))
                    progress.advance(until - at)
        return found

    with ThreadPoolExecutor(num_threads - 1 or 1, thread_name_prefix="distckpt-verify") as pool:
        others = [pool.submit(work, number) for number in range(1, num_threads)]
        try:
            first = work(0)
            return [*first, *(one for other in others for one in other.result())]
        finally:
            stop.set()
