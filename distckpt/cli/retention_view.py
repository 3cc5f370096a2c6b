"""Find out which checkpoints of a directory their handlers keep, and why, from the newest record of each handler.

Names and scores of files are not used. Two files belong to one handler if its identity in their records is the same and
their runs descend from one run. The newest of a handler's files has the handler's history.
"""

import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from distckpt.cli.survey import FileEntry
from distckpt.policy.history import Entry
from distckpt.policy.policies import Policy, explain, ordinal, policies_of
from distckpt.ptformat.records import Record

HandlerKey = tuple[str, str]
"""A handler's identity as JSON, and the id of the first run of the lineage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The place of a file in its handler's history.

    Attributes:
        place: 1 for the file of highest priority.
        num_kept: number of files that the handler keeps.
        is_scored: True if the priority is a score, False if it is a step.
        policies: the policies that keep the file, each with a reason in words; None if the record names no policies.
    """

    place: int
    num_kept: int
    is_scored: bool
    policies: tuple[tuple[Policy, str], ...] | None

    def __str__(self) -> str:
        """Return the reasons in words, or the place if there are none."""
        if self.policies is None:
            return f"{ordinal(self.place)} of {self.num_kept}"
        return ", ".join(dict.fromkeys(reason for _, reason in self.policies)) or "until the next save"


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionView:
    """The files that the handlers of a directory keep.

    Attributes:
        kept: the place of each kept file, by name.
        evicted: names of files that a handler is about to remove, or could not remove.
        missing: names of files that a handler keeps but the directory lacks.
    """

    kept: Mapping[str, Kept]
    evicted: frozenset[str]
    missing: tuple[str, ...]


def key_of(record: Record) -> HandlerKey:
    """Return the key that all records of one handler share."""
    return json.dumps(record.handler, sort_keys=True, default=str), record.run.root


def view_retention(entries: Sequence[FileEntry]) -> RetentionView:
    """Return the files that the handlers of `entries` keep."""
    kept: dict[str, Kept] = {}
    evicted, missing = set[str](), list[str]()
    found = {entry.name: entry.record for entry in entries}
    names = set(found)
    for key, record in newest_records(entries).items():
        history = _history_of(record, key, entries)
        is_scored = bool(record.handler.get("is_scored"))
        reasons = _reasons(record, history, found, is_scored=is_scored)
        for place, (_, name) in enumerate(reversed(history), start=1):
            if name in names:
                policies = None if reasons is None else tuple(reasons.get(name, ()))
                kept[name] = Kept(place=place, num_kept=record.num_kept, is_scored=is_scored, policies=policies)
            else:
                missing.append(name)
        evicted.update(record.evicted)
    return RetentionView(kept=kept, evicted=frozenset(evicted & names - set(kept)), missing=tuple(sorted(missing)))


def _reasons(
    record: Record, history: Sequence[Entry], found: Mapping[str, Record | None], *, is_scored: bool
) -> Mapping[str, Sequence[tuple[Policy, str]]] | None:
    """Return the policies that keep each file of a history, by name; None if the record does not name policies."""
    if record.keep is None:
        return None
    known = [(one, name, priority) for priority, name in history if (one := found.get(name)) is not None]
    files = [one.describe(name, priority) for one, name, priority in sorted(known, key=lambda one: one[0].order)]
    return explain(files, policies_of(record.keep, None, is_scored=is_scored), is_scored=is_scored)


def _history_of(record: Record, key: HandlerKey, entries: Sequence[FileEntry]) -> Sequence[Entry]:
    """Return the files that a handler keeps, lowest priority first.

    A record does not hold a long history. The handler's newest files are then its history, as for a resume.
    """
    if len(record.kept) >= record.num_kept:
        return record.kept
    found = {
        entry.name: entry.record
        for entry in entries
        if entry.record is not None and key_of(entry.record) == key and entry.name not in record.evicted
    }
    newest = sorted(found, key=lambda name: found[name].order)[-record.num_kept :]
    own = [one for name in newest for one in found[name].kept if one[1] == name]
    return sorted(own, key=operator.itemgetter(0))


def newest_records(entries: Iterable[FileEntry]) -> dict[HandlerKey, Record]:
    """Return the newest record of each handler."""
    found: dict[HandlerKey, Record] = {}
    for entry in entries:
        if entry.record is not None:
            key = key_of(entry.record)
            if key not in found or entry.record.order > found[key].order:
                found[key] = entry.record
    return found
