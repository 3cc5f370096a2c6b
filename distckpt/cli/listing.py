"""``distckpt ls``: list the checkpoints of a directory by handler and run, oldest first."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distckpt.cli.output import Column, ExitCode, Output, Table, count, format_age, format_bytes, format_number
from distckpt.cli.retention_view import Kept, RetentionView, view_retention
from distckpt.cli.survey import FileEntry, State, survey
from distckpt.policy.naming import describe_handler

_COLUMNS = (
    Column("NAME", can_shrink=True),
    Column("STEP", is_number=True, is_optional=True),
    Column("EPOCH", is_number=True, is_optional=True, least_width=90),
    Column("AGE", is_number=True),
    Column("SIZE", is_number=True, least_width=70),
    Column("SCORE", is_number=True, is_optional=True),
    Column("KEPT", is_optional=True, can_wrap=True),
    Column("SAVED ON", is_optional=True, least_width=110),
    Column("STATE"),
)
_RUN_CHARS = 8
_TROUBLE = (State.DAMAGED, State.UNREADABLE)


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Run the command; return its exit code."""
    directory: Path = arguments.directory
    entries = survey(directory, recursive=arguments.recursive)
    faults = dict[str, str]()
    if arguments.verify:
        from distckpt.cli.verification import verify_entries  # noqa: PLC0415 - imports torch

        faults = {name: one.faults[0] for name, one in verify_entries(entries).items() if one.faults}
    view = view_retention(entries)
    rows = [_describe(entry, view, faults.get(entry.name), is_verified=arguments.verify) for entry in entries]
    output.json({"directory": str(directory), "files": rows, "missing": view.missing})
    if not entries:
        output.line(
            f"{directory} holds no checkpoints{'' if arguments.recursive else ' (--recursive: in sub-folders)'}"
        )
        return ExitCode.FOUND
    _print(directory, entries, rows, view, output)
    return ExitCode.FOUND if any(row["state"] in (*_TROUBLE, "damaged") for row in rows) else ExitCode.OK


def _describe(entry: FileEntry, view: RetentionView, fault: str | None, *, is_verified: bool) -> dict[str, Any]:
    """Return the JSON description of a file."""
    manifest, record, kept = entry.manifest, entry.record, view.kept.get(entry.name)
    state, detail = str(entry.state), entry.detail
    if fault is not None:
        state, detail = str(State.DAMAGED), fault
    elif is_verified and entry.state is State.COMPLETE:
        state = "whole"
    run = None
    if record is not None:
        parent = record.run.lineage[-1] if record.run.lineage else None
        run = {"id": record.run.id, "started_s": record.run.started_s, "went_on_from": parent, "root": record.run.root}
    return {
        "name": entry.name,
        "state": state,
        "detail": detail,
        "num_bytes": entry.num_bytes,
        "saved_s": entry.saved_s,
        "step": entry.step,
        "epoch": None if manifest is None else manifest.epoch,
        "score": None if manifest is None else manifest.score,
        "reason": None if manifest is None else manifest.reason,
        "world_size": None if manifest is None else manifest.world_size,
        "backend": None if manifest is None else manifest.backend,
        "versions": None if manifest is None else dict(manifest.versions),
        "handler": None if record is None else describe_handler(record.handler),
        "run": run,
        "kept": None if kept is None else _kept_in_json(kept),
        "kept_as": _kept_as(entry, view),
        "link": entry.link,
    }


def _kept_in_json(kept: Kept) -> dict[str, Any]:
    found = {"place": kept.place, "of": kept.num_kept, "by_score": kept.is_scored}
    return found if kept.policies is None else found | {"policies": [str(policy) for policy, _ in kept.policies]}


def _kept_as(entry: FileEntry, view: RetentionView) -> str:
    if entry.link is not None:
        return "a symlink"
    if entry.name in view.kept:
        return str(view.kept[entry.name])
    if entry.record is None:
        return "-"
    return "evicted" if entry.name in view.evicted else "not kept"


def _print(
    directory: Path, entries: Sequence[FileEntry], rows: Sequence[dict[str, Any]], view: RetentionView, output: Output
) -> None:
    now_s = time.time()
    groups: dict[str, list[tuple[FileEntry, dict[str, Any]]]] = {}
    order = sorted(zip(entries, rows, strict=True), key=lambda pair: _sort_key(pair[0]))
    for entry, row in order:
        groups.setdefault(_group_of(entry), []).append((entry, row))
    num_temps = sum(entry.state in (State.LEFT_OVER, State.BEING_WRITTEN) for entry in entries)
    size = format_bytes(sum(entry.num_bytes for entry in entries))
    temps = f" and {count(num_temps, 'temporary file')}" if num_temps else ""
    output.line(f"{directory}: {count(len(entries) - num_temps, 'checkpoint')}{temps}, {size}")
    for title, members in groups.items():
        output.line()
        table = Table(title=title, columns=_COLUMNS)
        for entry, row in members:
            table.rows.append(
                (
                    entry.name if entry.link is None else f"{entry.name} -> {entry.link}",
                    format_number(row["step"]),
                    format_number(row["epoch"]),
                    format_age(now_s - entry.saved_s),
                    format_bytes(entry.num_bytes),
                    format_number(row["score"]),
                    row["kept_as"],
                    row["reason"] or "-",
                    row["state"],
                )
            )
        output.table(table)
    notes = [f"{row['name']} is {row['state']}: {row['detail']}" for row in rows if row["detail"] is not None]
    notes += [f"{name} is kept by its handler, and is not there" for name in view.missing]
    if notes:
        output.line()
        for note in notes:
            output.line(note)


def _sort_key(entry: FileEntry) -> tuple[Any, ...]:
    """Return the sort key: files of runs in the order of their saves, after all other files."""
    record = entry.record
    if record is None:
        return (0, _group_of(entry), entry.saved_s, entry.name)
    return (1, record.run.started_s, record.run.id, describe_handler(record.handler), record.number, entry.name)


def _group_of(entry: FileEntry) -> str:
    """Return the title of the table that lists the file."""
    manifest, record = entry.manifest, entry.record
    if entry.state in (State.LEFT_OVER, State.BEING_WRITTEN):
        return "temporary files of saves"
    if manifest is None:
        return "files without a manifest"
    ranks = f"{count(manifest.world_size, 'rank')} ({manifest.backend})"
    if record is None:
        return f"saved without a handler, {ranks}"
    run = record.run
    origin = f", which went on from {run.lineage[-1][:_RUN_CHARS]}" if run.lineage else ""
    return f"{describe_handler(record.handler)}, run {run.id[:_RUN_CHARS]}{origin}, {ranks}"
