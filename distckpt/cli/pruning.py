"""``distckpt prune``: delete the checkpoints that no rule keeps.

Rules apply to the files of each handler by themselves; files saved without a handler count as one more. A file is kept
if any rule keeps it. Only complete files with a manifest are ever deleted: never the newest of a handler, a symlink, or
a file that a symlink of the directory points to.

IMPORTANT: before anything is deleted, every byte of each handler's newest file is verified.
"""

import argparse
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from distckpt._values import is_nan
from distckpt.cli.errors import CommandError, ExitCode
from distckpt.cli.output import Column, Output, Table, count, format_bytes, format_number
from distckpt.cli.retention_view import ordinal
from distckpt.cli.survey import FileEntry, State, survey
from distckpt.storage.local import LocalStorage
from distckpt.storage.new_file import sync_directory_at

_COLUMNS = (
    Column("ACTION"),
    Column("NAME", can_shrink=True),
    Column("STEP", is_number=True, is_optional=True),
    Column("SCORE", is_number=True, is_optional=True, least_width=70),
    Column("SIZE", is_number=True, least_width=70),
    Column("WHY"),
)
KEEP, DELETE, LEAVE = "keep", "delete", "leave"
_FAILURE = "not deleted: "


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What to keep of each handler. None: the rule keeps nothing.

    Attributes:
        last: how many of the newest.
        best: how many of the highest score.
        every: files whose step is a multiple of this.
    """

    last: int | None = None
    best: int | None = None
    every: int | None = None

    def __str__(self) -> str:
        """Return what the rules keep, in words."""
        limits = {"the last": self.last, "the best": self.best, "every": self.every}
        return ", ".join(f"{name} {number}" for name, number in limits.items() if number is not None)


class Verdict(NamedTuple):
    """What becomes of a file: ``keep``, ``delete``, or ``leave`` for one that is none of the rules' business."""

    entry: FileEntry
    action: str
    reason: str


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Run the command; return its exit code."""
    rules = Rules(last=arguments.keep_last, best=arguments.keep_best, every=arguments.keep_every)
    if rules == Rules():
        raise CommandError("say what to keep: --keep-last N, --keep-best K, --keep-every M, or several of them")
    directory: Path = arguments.directory
    entries = survey(directory, recursive=arguments.recursive)
    verdicts = judge(entries, rules)
    if arguments.yes:
        _check_safe(directory, verdicts)
        verdicts = [_carry_out(directory, verdict) for verdict in verdicts]
        for folder in {verdict.entry.path.parent for verdict in verdicts if verdict.action == DELETE}:
            sync_directory_at(folder)
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


def judge(entries: Sequence[FileEntry], rules: Rules) -> list[Verdict]:
    """Return what becomes of each file, the oldest first. Pure."""
    links = {entry.identity: entry.name for entry in entries if entry.link is not None}
    groups: dict[str, list[FileEntry]] = {}
    verdicts = []
    for entry in entries:
        reason = _reason_to_leave(entry)
        if reason is None:
            groups.setdefault(_handler_of(entry), []).append(entry)
        else:
            verdicts.append(Verdict(entry, LEAVE, reason))
    for members in groups.values():
        members.sort(key=_age_key, reverse=True)
        reasons = _reasons_to_keep(members, rules)
        for entry in reversed(members):
            reason = reasons.get(entry.name)
            if reason is None and entry.identity in links:
                reason = f"{links[entry.identity]} links to it"
            verdicts.append(Verdict(entry, DELETE if reason is None else KEEP, reason or f"not of {rules}"))
    return verdicts


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


def _reasons_to_keep(members: Sequence[FileEntry], rules: Rules) -> Mapping[str, str]:
    """Return why files of one handler are kept, by name.

    Args:
        members: newest first.
        rules: what to keep.
    """
    reasons: dict[str, list[str]] = {}

    def keep(entry: FileEntry, reason: str) -> None:
        reasons.setdefault(entry.name, []).append(reason)

    for place, entry in enumerate(members[: rules.last or 0], start=1):
        keep(entry, f"{_place(place)}newest")
    scored = [(one.score, one) for one in members if one.score is not None and not is_nan(one.score)]
    scored.sort(key=operator.itemgetter(0), reverse=True)
    for place, (_, entry) in enumerate(scored[: rules.best or 0], start=1):
        keep(entry, f"{_place(place)}best")
    for entry in members:
        if rules.every is not None and entry.step is not None and entry.step % rules.every == 0:
            keep(entry, f"step {entry.step} is a multiple of {rules.every}")
    if members[0].name not in reasons:
        keep(members[0], "newest: a resume loads it")
    return {name: ", ".join(found) for name, found in reasons.items()}


def _place(place: int) -> str:
    return "" if place == 1 else f"{ordinal(place)} "


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
    """Delete a file if it is to be deleted and is the one that was judged; return what became of it."""
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
