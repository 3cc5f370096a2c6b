"""The files of one Checkpoint among those of other handlers in the same directory.

A file with a record (:mod:`distckpt.ptformat.records`) names its handler. Without a record the file's name decides.
"""

import contextlib
import functools
import logging
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distckpt.policy.decision import SavePolicy
from distckpt.policy.history import Entry, History
from distckpt.policy.naming import check_name, printable
from distckpt.policy.policies import SavedFile
from distckpt.policy.retention import below_epoch_end
from distckpt.ptformat.records import Record, read_record, read_records

_logger = logging.getLogger(__name__)
_NUMBER = r"-?(?:\d+(?:\.\d+)?|inf)"


class _Marker(str):
    """A placeholder in a file name, in whatever format a pattern asks for."""

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        return str(self)

    def __repr__(self) -> str:
        return str(self)


_STEP, _SCORE, _NAME = (_Marker(f"\0{field}\0") for field in ("step", "score", "name"))
_GROUPS: dict[str, tuple[str, str]] = {_STEP: ("step", _NUMBER), _SCORE: ("score", _NUMBER), _NAME: ("name", r"[^/]+?")}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileNaming:
    """How one Checkpoint names its files.

    Attributes:
        policy: the prefix, pattern, and other parts of the name.
        names: the keys of the objects in its files; empty if they are not known yet.
        is_scored: whether it has a score function.
        has_transform: whether it has a ``global_step_transform``.
        serial: the number of Checkpoints that this process made before.
        kept: its history.
    """

    policy: SavePolicy
    names: frozenset[str]
    is_scored: bool
    has_transform: bool
    serial: int
    kept: History

    @property
    def identity(self) -> dict[str, Any]:
        """The values that users do not change from one run to the next."""
        policy = self.policy
        return {
            "prefix": policy.prefix,
            "name": policy.name,
            "ext": policy.ext,
            "pattern": policy.pattern,
            "score_name": policy.score_name,
            "is_scored": self.is_scored,
        }

    def is_alike(self, other: "FileNaming") -> bool:
        """Return True if the names of both handlers' files may be the same."""
        return {**self.identity, "name": None} == {**other.identity, "name": None} and bool(self.names & other.names)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedHistory:
    """The history in a file's record: kept checkpoints, files still to remove, and the engine's iteration."""

    entries: tuple[Entry, ...]
    orphans: tuple[str, ...]
    iteration: int | None


class OwnFiles:
    """Identifies the files of one Checkpoint. Rank-local; issues no collectives.

    Args:
        directory: the directory that the Checkpoint saves into; None if there is none.
        naming: how it names its files.
        others: how the other handlers that save there name theirs.
        saved_in: the ids of the runs in which this process saved the handler's files, by name.
        loaded_name: the name of the loaded objects in file names, for a handler that has not been called yet.

    Attributes:
        identity: the handler's identity in records, the same in the next run.
    """

    def __init__(
        self,
        directory: Path | None,
        naming: FileNaming,
        others: Sequence[FileNaming],
        *,
        saved_in: Mapping[str, str] | None = None,
        loaded_name: str | None = None,
    ) -> None:
        self._directory = directory
        self._naming = naming
        self._others = others
        self._saved_in = {} if saved_in is None else saved_in
        self._loaded_name = loaded_name
        order = sum(one.serial < naming.serial for one in others if one.is_alike(naming))
        self.identity = {**naming.identity, "order": order}

    @functools.cached_property
    def _regexes(self) -> list[re.Pattern[str]]:
        is_scored = self._naming.is_scored
        has_step = self._naming.has_transform or not is_scored
        names = self._naming.names or [_NAME]
        return [_regex_of(self._naming.policy, name, is_scored=is_scored, has_step=has_step) for name in names]

    @functools.cached_property
    def _other_regexes(self) -> list[re.Pattern[str]]:
        return [
            regex
            for one in self._others
            for name in one.names or [_NAME]
            for regex in _regexes_of(one.policy, name, is_scored=one.is_scored)
        ]

    @property
    def is_nested(self) -> bool:
        """Whether the names contain folders."""
        return any("/" in regex.pattern.replace("[^/]", "") for regex in self._regexes)

    def survey(self) -> dict[str, Record | None]:
        """Return the files in the directory, and their records. Log a warning if it cannot be listed."""
        if self._directory is None:
            return {}
        try:
            return read_records(self._directory, self._naming.policy.ext, is_nested=self.is_nested)
        except NotADirectoryError:  # the write raises it, with rank, step and path
            return {}
        except OSError as error:  # no reason to lose a save
            message = "Checkpoint: the files in %s cannot be listed, and older ones stay: %s"
            _logger.warning(message, self._directory, error)
            return {}

    def has_record(self, record: Record) -> bool:
        """Return True if the record names this handler."""
        recorded, own = dict(record.handler), dict(self.identity)
        own.pop("name", None)
        name = recorded.pop("name", None)
        return recorded == own and (not self._naming.names or name in self._naming.names)

    def has_name(self, name: str) -> bool:
        """Return True if this handler may have given a file this name."""
        return any(regex.fullmatch(name) for regex in self._regexes)

    def candidates(self, files: Mapping[str, Record | None]) -> list[str]:
        """Return the files to resume from: those whose record, or without a record whose name, is the handler's."""
        own = [
            name
            for name, record in files.items()
            if (self.has_record(record) if record is not None else self.has_name(name))
        ]
        if not self._naming.names and self._loaded_name is not None:
            names = {name: None if record is None else record.handler.get("name") for name, record in files.items()}
            alike = [name for name in own if names[name] in (None, self._loaded_name)]
            own = alike if any(files[name] is not None for name in alike) else own
        return own

    def is_own(self, name: str, files: Mapping[str, Record | None]) -> bool:
        """Return True if a file is certainly the handler's, and may be removed.

        A file without a record is, if its name fits this handler and no other handler that saves or has saved there.
        """
        if name not in files:
            return False
        record = files[name]
        if record is not None:
            return self.has_record(record)
        if not self.has_name(name) or any(regex.fullmatch(name) for regex in self._other_regexes):
            return False
        others = {tuple(sorted(one.handler.items(), key=str)): one for one in files.values() if one is not None}
        return not any(
            regex.fullmatch(name)
            for one in others.values()
            if not self.has_record(one)
            for regex in _regexes_of_record(one)
        )

    def refuse_removal(self, filename: str, record: Record | None) -> None:
        """Raise ValueError if a file to remove belongs to another handler, or to another run. Any thread."""
        if any(one.kept.has_name(filename) for one in self._others):
            raise ValueError("another handler of this program keeps it")
        if record is not None and not self.has_record(record):
            values = [f"{key}={value!r}" for key, value in record.handler.items() if value not in (None, "", False, 0)]
            raise ValueError(f"its manifest says that another handler saved it ({printable(', '.join(values))})")
        if record is not None and self._saved_in.get(filename, record.run.id) != record.run.id:
            raise ValueError(f"its manifest says that another run has saved it since ({record.run.id})")

    def find_newest(self, files: Mapping[str, Record | None], root: str, damaged: Collection[str] = ()) -> str | None:
        """Return the handler's newest intact file of all runs that go back to the run `root`; None if there is none.

        The run to resume may have died before it saved a file of this handler: so the files of all these runs count.
        """
        own = {
            name: record.order
            for name, record in files.items()
            if record is not None and record.run.root == root and name not in damaged and self.has_record(record)
        }
        return max(own, key=lambda name: own[name], default=None)

    def recorded_history(self, name: str, files: Mapping[str, Record | None]) -> RecordedHistory | None:
        """Return the history that a file records, without files that are gone; None if it has no record."""
        record = files.get(name)
        if record is None:
            return None

        def is_newer(other: Record | None) -> bool:  # a later run has used the name again
            return other is not None and other.order > record.order

        recorded = record.kept if len(record.kept) >= record.num_kept else self._found_entries(record, files)
        entries = tuple(entry for entry in recorded if entry[1] == name or self.is_own(entry[1], files))
        kept = {name for _, name in entries}
        orphans = tuple(
            one for one in record.evicted if one not in kept and self.is_own(one, files) and not is_newer(files[one])
        )
        return RecordedHistory(entries=entries, orphans=orphans, iteration=record.iteration)

    def _found_entries(self, last: Record, files: Mapping[str, Record | None]) -> list[Entry]:
        """Return a history too long for one record, from the files up to the one with the record `last`.

        If there are more files than the history had, the oldest ones are not part of it: the handler left them alone.
        """
        own = {
            name: record
            for name, record in files.items()
            if record is not None
            and record.run.root == last.run.root
            and record.order <= last.order
            and name not in last.evicted
            and self.has_record(record)
        }
        newest = sorted(own, key=lambda name: own[name].order)[-last.num_kept :]
        found = [entry for name in newest for entry in own[name].kept if entry[1] == name]
        return sorted(found, key=lambda entry: entry[0])

    def look_at(self, files: Sequence[SavedFile]) -> list[SavedFile]:
        """Return kept files in the order of their saves, with steps and times from their records, if they have one."""
        records = {file.name: self._record_of(file.name) for file in files}
        order = {name: record.order for name, record in records.items() if record is not None}
        oldest = (-math.inf, "", 0)
        ordered = sorted(files, key=lambda file: order.get(file.name, oldest))
        is_scored = self._naming.is_scored
        return [
            record.describe(file.name, file.priority)
            if (record := records[file.name]) is not None
            else file._replace(step=None if is_scored else file.priority)
            for file in ordered
        ]

    def _record_of(self, name: str) -> Record | None:
        with contextlib.suppress(OSError, ValueError):  # a removal raises the same error
            check_name(name)
            return None if self._directory is None else read_record(self._directory / name)
        return None

    def named_history(self, resumed: str, others: Iterable[str], *, unfinished_epoch: int | None) -> list[Entry] | None:
        """Return the history that follows from names of files without records; None if `resumed` holds no priority.

        Args:
            resumed: the file that the handler resumes from. The history holds it.
            others: the handler's other files that are intact. Those beyond ``n_saved`` are left alone. With other
                policies all of them are part of the history, and the next save evicts what no policy keeps.
            unfinished_epoch: the number of the epoch in whose middle `resumed` was saved; None if it was at an end.
        """
        priority = self._priority_of(resumed)
        if priority is None:
            return None
        is_scored = self._naming.is_scored
        if priority == unfinished_epoch and self._naming.has_transform and not is_scored:
            priority = below_epoch_end(priority)
        known = [(self._priority_of(name), name) for name in others if name != resumed]
        entries = [(value, name) for value, name in known if value is not None and (is_scored or value < priority)]
        entries.sort()
        policy = self._naming.policy
        n_saved = policy.n_saved if policy.keep is None else None
        if n_saved is not None:
            entries = entries[max(0, len(entries) - n_saved + 1) :]
        return sorted([*entries, (priority, resumed)])

    def _priority_of(self, name: str) -> int | float | None:
        match = next(filter(None, (regex.fullmatch(name) for regex in self._regexes)), None)
        text = None if match is None else match.groupdict().get("score" if self._naming.is_scored else "step")
        if text is None:
            return None
        return int(text) if re.fullmatch(r"-?\d+", text) else float(text)


def _regexes_of_record(record: Record) -> list[re.Pattern[str]]:
    handler = record.handler
    try:
        policy = SavePolicy(
            prefix=str(handler["prefix"]),
            name=str(handler["name"]),
            ext=str(handler["ext"]),
            pattern=handler["pattern"],
            score_name=handler["score_name"],
            n_saved=None,
            greater_or_equal=False,
            score_rule="mean",
        )
        return _regexes_of(policy, policy.name, is_scored=bool(handler.get("is_scored")))
    except (KeyError, ValueError, AttributeError, TypeError, IndexError):  # another release's record, or made by hand
        return []


def _regexes_of(policy: SavePolicy, name: str, *, is_scored: bool) -> list[re.Pattern[str]]:
    """Return expressions for a handler's file names, where it is unknown whether names with a score hold a step too."""
    return [
        _regex_of(policy, name, is_scored=is_scored, has_step=has_step)
        for has_step in ([True, False] if is_scored else [True])
    ]


def _regex_of(policy: SavePolicy, name: str, *, is_scored: bool, has_step: bool) -> re.Pattern[str]:
    filename = replace(policy, name=name).filename(
        score=_SCORE if is_scored else None, global_step=_STEP if has_step else None
    )
    expression, groups = "", set[str]()
    for part in re.split("(\0[a-z]+\0)", filename):
        group, number = _GROUPS.get(part, (None, ""))
        if group is None:
            expression += re.escape(part)
        elif group in groups:
            expression += f"(?P={group})"  # the same value again
        else:
            groups.add(group)
            expression += f"(?P<{group}>{number})"
    return re.compile(expression)
