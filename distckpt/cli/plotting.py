"""``distckpt plot``: draw the timeline of a directory's runs."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from distckpt.cli.output import CommandError, ExitCode, Output, count, format_bytes
from distckpt.cli.survey import survey
from distckpt.cli.timeline import Session, Timeline, make_timeline
from distckpt.cli.timeline_picture import draw_timeline
from distckpt.policy.naming import EVENTS_NAME
from distckpt.storage.base import Chunk
from distckpt.storage.event_file import read_events
from distckpt.storage.local import LocalStorage

_SUFFIX = ".svg"


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Run the command; return its exit code."""
    directory, out = arguments.directory, arguments.out
    _check_out(out, is_json=output.is_json)
    entries, record = survey(directory, recursive=False), read_events(directory)
    timeline = make_timeline(record.events, entries, num_dropped=record.num_dropped)
    if not timeline.sessions and not timeline.others:
        what = f"{directory} holds no checkpoints, and no events in {EVENTS_NAME}: there is nothing to plot"
        raise CommandError(what, ExitCode.FOUND)
    picture = draw_timeline(timeline, f"Timeline of {directory}")
    if out is not None:
        _write(out, picture)
        output.line(
            f"{out}: {count(len(timeline.sessions), 'session')}, {count(len(timeline.saves), 'save')}, "
            f"{format_bytes(len(picture))}"
        )
    output.json(_describe(directory, timeline, has_record=record.exists))
    if not record.exists:
        output.line(f"{directory} has no record of events ({EVENTS_NAME}): the picture shows what its files tell")
        output.line("DiskSaver(record_events=True) records events")
    return ExitCode.OK


def _check_out(out: Path | None, *, is_json: bool) -> None:
    if out is None:
        if not is_json:
            raise CommandError("give the picture's name: -o FILE.svg (or --json for the data alone)")
        return
    if out.suffix.lower() != _SUFFIX:
        raise CommandError(f"{out} is no name of a picture: give one that ends in {_SUFFIX}")
    if not out.parent.is_dir():
        raise CommandError(f"{out.parent} is no directory: create it first")
    if out.is_symlink() or (out.exists() and not out.is_file()):
        raise CommandError(f"{out} is no regular file: give another name")


def _write(out: Path, picture: bytes) -> None:
    with LocalStorage(out.parent).create(out.name) as new:
        new.write([Chunk(0, picture)])
        new.commit(len(picture))


def _describe(directory: Path, timeline: Timeline, *, has_record: bool) -> dict[str, Any]:
    """Return the picture's data for JSON."""
    return {
        "directory": str(directory),
        "has_record": has_record,
        "num_dropped": timeline.num_dropped,
        "lost": timeline.lost,
        "sessions": [_describe_session(session) for session in timeline.sessions],
        "other_saves": [dataclasses.asdict(save) for save in timeline.others],
    }


def _describe_session(session: Session) -> dict[str, Any]:
    found = dataclasses.asdict(session)
    del found["points"], found["stop"]
    return found | {"reached": session.reached, "points": [list(point) for point in session.points]}
