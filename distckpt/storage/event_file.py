"""The record of events in a checkpoint directory: one JSON object a line.

A line is appended by one ``write`` with O_APPEND, so lines of several handlers and jobs do not mix on a local file
system. A process that is killed meanwhile leaves at most one torn line: readers drop what is no JSON object, and the
next writer begins a new line. Nothing is synced: after a power cut the last lines may be missing. Rank-local; any
thread.
"""

import errno
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distckpt._values import to_json_value
from distckpt.policy.naming import EVENTS_NAME
from distckpt.policy.policies import LATEST_S
from distckpt.storage.direct_io import close_quietly
from distckpt.storage.new_file import FILE_MODE

_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
MAX_BYTES = 64 << 20
"""A longer record is not continued: 200,000 saves fit in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRecord:
    """What a record holds.

    Attributes:
        events: the events in the order of their lines. Each has a text ``event`` and a time ``at_s``.
        num_dropped: the number of lines that are no events: torn, or made by something else.
        exists: whether there is a record.
    """

    events: tuple[Mapping[str, Any], ...] = ()
    num_dropped: int = 0
    exists: bool = True


def append_events(directory: Path, events: Iterable[Mapping[str, Any]]) -> None:
    """Append events to a directory's record, all by one write.

    Raises:
        OSError: the operating system refuses, the record is no regular file, or it is full.
    """
    text = "".join(f"{json.dumps(to_json_value(event), allow_nan=False, default=str)}\n" for event in events)
    path = directory / EVENTS_NAME
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | _FLAGS, FILE_MODE)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        if found.st_size > MAX_BYTES:
            raise OSError(errno.EFBIG, "it is full: move it away", str(path))
        is_torn = found.st_size > 0 and os.pread(fd, 1, found.st_size - 1) != b"\n"
        data = (b"\n" if is_torn else b"") + text.encode()
        written = os.write(fd, data)
        if written < len(data):
            raise OSError(errno.ENOSPC, f"{written} of {len(data)} bytes were written", str(path))
    finally:
        close_quietly(fd)


def read_events(directory: Path) -> EventRecord:
    """Return the events of a directory's record.

    Raises:
        OSError: the record cannot be read, or is no regular file.
    """
    path = directory / EVENTS_NAME
    try:
        fd = os.open(path, os.O_RDONLY | _FLAGS)
    except FileNotFoundError:
        return EventRecord(exists=False)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        lines = [line for line in file if line.strip()]
    events = [event for event in map(_parse, lines) if event is not None]
    return EventRecord(events=tuple(events), num_dropped=len(lines) - len(events))


def _parse(line: bytes) -> Mapping[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return None
    at_s = event.get("at_s")
    is_number = isinstance(at_s, int | float) and not isinstance(at_s, bool) and 0 <= at_s < LATEST_S
    return event if is_number else None
