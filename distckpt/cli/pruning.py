"""``distckpt prune``: delete the checkpoints that no policy keeps.

Policies apply to the files of each handler separately; files saved without a handler form a group of their own. A file
is kept if any policy keeps it. Only complete files with a manifest are deleted, but never a handler's newest file, a
symlink, or a file that a symlink in the directory points to.

IMPORTANT: before anything is deleted, every byte of each handler's newest file is verified.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distckpt.cli.output import Column, CommandError, ExitCode, Output, Table, count, format_bytes, format_number
from distckpt.cli.survey import FileEntry, State, survey
from distckpt.policy.naming import EVENTS_NAME
from distckpt.policy.policies import (
    BestN,
    EveryHours,
    EveryNSteps,
    LastN,
    Policy,
    SavedFile,
    explain,
    whole_minutes,
)
from distckpt.storage.event_file import append_events
from distckpt.storage.local import LocalStorage
from distckpt.storage.new_file import sync_directory_at, text_of

_COLUMNS = (
    Column("ACTION"),
    Column("NAME", can_shrink=True),
    Column("STEP", is_number=True, is_optional=True),
    Column("SCORE", is_number=True, is_optional=True, least_width=70),
    Column("SIZE", is_number=True, least_width=70),
    Column("WHY", can_wrap=True),
)
KEEP, DELETE, LEAVE = "keep", "delete", "leave"
_FAILURE = "not deleted: "


class Verdict(NamedTuple):
    """The decision on a file: ``keep``, ``delete``, or ``leave`` for a file that policies do not apply to."""

    entry: FileEntry
    action: str
    reason: str


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Run the command; return its exit code."""
    policies = _policies_of(arguments)
    if not policies:
        options = "--keep-last N, --keep-best K, --keep-every M, --keep-hours H"
        raise CommandError(f"say what to keep: {options}, or several of them")
    directory: Path = arguments.directory
    entries = survey(directory, recursive=arguments.recursive)
    verdicts = judge(entries, policies)
    if arguments.yes:
        _check_safe(directory, verdicts)
        verdicts = [_carry_out(directory, verdict) for verdict in verdicts]
        for folder in {verdict.entry.path.parent for verdict in verdicts if verdict.action == DELETE}:
            sync_directory_at(folder)
        _record(directory, [verdict.entry.name for verdict in verdicts if verdict.action == DELETE], policies, output)
    deleted = [verdict.entry for verdict in verdicts if verdict.action == DELETE]
    files = [
        {"name": entry.name, "action": action, "reason": reason, "num_bytes": entry.num_bytes}
        for entry, action, reason in verdicts
    ]
    freed_bytes = sum(entry.num_bytes for entry in deleted)
    output.json({"directory": str(directory), "dry_run": not arguments.yes, "files": files, "freed_bytes": freed_bytes})
    if not entries:
        output.line(
            f"{directory} holds no checkpoints{'' if arguments.recursive else ' (--recursive: in sub-folders)'}"
        )
        return ExitCode.FOUND
    table = Table(columns=_COLUMNS)
    for entry, action, reason in verdicts:
        numbers = format_number(entry.step), format_number(entry.score), format_bytes(entry.num_bytes)
        table.rows.append((action, entry.name, *numbers, reason))
    output.table(table)
    what = f"{count(len(deleted), 'file')}, {format_bytes(freed_bytes)}"
    output.line(f"deleted {what}" if arguments.yes else f"a dry run: --yes deletes {what}")
    return ExitCode.FAILED if any(reason.startswith(_FAILURE) for _, _, reason in verdicts) else ExitCode.OK


def _policies_of(arguments: argparse.Namespace) -> list[Policy]:
    given: list[tuple[Callable[[Any], Policy], float | None]] = [
        (LastN, arguments.keep_last),
        (BestN, arguments.keep_best),
        (EveryNSteps, arguments.keep_every),
        (EveryHours, arguments.keep_hours),
    ]
    return [make(number) for make, number in given if number is not None]


def judge(entries: Sequence[FileEntry], policies: Sequence[Policy]) -> list[Verdict]:
    """Return the decision on each file, oldest first. Pure."""
    links = {entry.identity: entry.name for entry in entries if entry.link is not None}
    groups: dict[str, list[FileEntry]] = {}
    verdicts = []
    for entry in entries:
        reason = _reason_to_leave(entry)
        if reason is None:
            groups.setdefault(_handler_of(entry), []).append(entry)
        else:
            verdicts.append(Verdict(entry, LEAVE, reason))
    not_kept = f"not kept by {', '.join(map(str, policies))}"
    for members in groups.values():
        members.sort(key=_age_key)
        kept = explain([_describe(entry) for entry in members], policies, is_scored=True)
        reasons = {name: ", ".join(reason for _, reason in found) for name, found in kept.items()}
        reasons.setdefault(members[-1].name, "newest: a resume loads it")
        for entry in members:
            reason = reasons.get(entry.name)
            if reason is None and entry.identity in links:
                reason = f"{links[entry.identity]} links to it"
            verdicts.append(Verdict(entry, DELETE if reason is None else KEEP, reason or not_kept))
    return verdicts


def _describe(entry: FileEntry) -> SavedFile:
    """Return a file as policies see it. The step is the manifest's, even if the name has another one."""
    score = math.nan if entry.score is None else entry.score
    return SavedFile(entry.name, score, entry.step, whole_minutes(entry.saved_s))


def _reason_to_leave(entry: FileEntry) -> str | None:
    if entry.link is not None:
        return "a symlink"
    if entry.state is not State.COMPLETE:
        return str(entry.state)
    return "not a file of distckpt" if entry.manifest is None else None


def _handler_of(entry: FileEntry) -> str:
    return "" if entry.record is None else json.dumps(entry.record.handler, sort_keys=True, default=str)


def _age_key(entry: FileEntry) -> tuple[float, str, int, str]:
    record = entry.record
    return (entry.saved_s, "", entry.step or 0, entry.name) if record is None else (*record.order, entry.name)


def _check_safe(directory: Path, verdicts: Sequence[Verdict]) -> None:
    """Raise a CommandError if a save runs in the directory, or a newest file is damaged."""
    if any(verdict.entry.state is State.BEING_WRITTEN for verdict in verdicts):
        raise CommandError(f"a save writes into {directory} now: nothing was deleted. Try again when it has ended")
    if all(verdict.action != DELETE for verdict in verdicts):
        return
    from distckpt.cli.verification import verify_entries  # noqa: PLC0415 - imports torch

    groups: dict[str, FileEntry] = {}
    for verdict in verdicts:
        if verdict.action == KEEP:
            key = _handler_of(verdict.entry)
            groups[key] = max((verdict.entry, groups.get(key, verdict.entry)), key=_age_key)
    for name, verified in verify_entries(list(groups.values())).items():
        if verified.faults:
            what = f"{name} is the newest of its handler, and is damaged: {verified.faults[0]}"
            raise CommandError(f"{what}. Nothing was deleted. Move it away first", ExitCode.FOUND)


def _carry_out(directory: Path, verdict: Verdict) -> Verdict:
    """Delete a file if the verdict says so and the file has not changed since; return the verdict carried out."""
    entry = verdict.entry
    if verdict.action != DELETE:
        return verdict
    try:
        found = entry.path.lstat()
        if (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns) != entry.identity:
            return Verdict(entry, KEEP, "it was saved again meanwhile")
        LocalStorage(directory).remove(entry.name)
    except FileNotFoundError:
        return Verdict(entry, LEAVE, "it was deleted meanwhile")
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else str(error)
        return Verdict(entry, LEAVE, f"{_FAILURE}{what}")
    return verdict


def _record(directory: Path, names: Sequence[str], policies: Sequence[Policy], output: Output) -> None:
    """Record each deleted file in the event file of its nearest folder that has one."""
    removed: dict[Path, list[str]] = {}
    for name in names:
        folders = [directory / folder for folder in Path(name).parents]
        found = next((folder for folder in folders if (folder / EVENTS_NAME).exists()), None)
        if found is not None:
            removed.setdefault(found, []).append((directory / name).relative_to(found).as_posix())
    for folder, ones in removed.items():
        event = {"event": "prune", "at_s": time.time(), "session": None, "policies": list(map(str, policies))}
        try:
            append_events(folder, [event | {"removed": ones}])
        except OSError as error:
            output.line(f"the record of events {folder / EVENTS_NAME} cannot be written: {text_of(error)}")
