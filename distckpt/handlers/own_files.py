"""Which files in a directory are a Checkpoint's own, and what it has kept.

A file with a record says whose it is. One without is read by its name: the way back from a name to step and score is
here. Rank-local; issues no collectives.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ignite.engine import Engine

from distckpt.handlers.checkpoint_history import CheckpointHistory
from distckpt.policy.decision import SavePolicy
from distckpt.policy.retention import Entry
from distckpt.ptformat.records import Record

__all__ = ["History", "OwnFiles"]

_NUMBER = r"-?(?:\d+(?:\.\d+)?|inf)"


class _Marker(str):
    """A placeholder in a file name, whatever the format that a pattern asks for."""

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        return str(self)

    def __repr__(self) -> str:
        return str(self)


_STEP, _SCORE, _NAME = (_Marker(f"\0{what}\0") for what in ("step", "score", "name"))
_FIELDS: dict[str, tuple[str, str]] = {_STEP: ("step", _NUMBER), _SCORE: ("score", _NUMBER), _NAME: ("name", r"[^/]+?")}


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What a handler that goes on with a run has saved before.

    Attributes:
        kept: its history, lowest priority first.
        strays: what its last save was to remove, and is still there.
        iteration: the engine's, at its last save; None where that is unknown.
    """

    kept: tuple[Entry, ...]
    strays: tuple[str, ...]
    iteration: int | None


class OwnFiles:
    """The files of one handler.

    Args:
        handler: whose files they are.
        engines: where other handlers may be attached, beside those that this one is attached to.
        objects_name: what files of the objects that are loaded would be called, for a handler that was neither called
            nor attached, and does not know what it saves.

    Raises:
        KeyError: its pattern names an unknown field.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from distckpt import Checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     own = OwnFiles(Checkpoint({"model": nn.Linear(1, 1)}, folder, filename_prefix="last"))
        >>> own.is_named("last_model_12.pt"), own.is_named("best_model_12.pt"), own.is_named("last_model_x.pt")
        (True, False, False)
    """

    def __init__(
        self, handler: CheckpointHistory, engines: Iterable[Engine] = (), *, objects_name: str | None = None
    ) -> None:
        engines = list(engines)
        self._owner = handler._owner(engines)  # noqa: SLF001 - a friend's: what tells its files
        self._names = self._owner.names
        self._objects_name = objects_name
        self._is_scored = handler.score_function is not None
        self._has_transform = handler.global_step_transform is not None
        has_step = self._has_transform or not self._is_scored
        self._regexes = [
            _regex_of(handler._rules(), name, is_scored=self._is_scored, has_step=has_step)  # noqa: SLF001 - the same
            for name in self._names or [_NAME]
        ]
        self._others = [
            regex
            for one in handler._peers(engines)  # noqa: SLF001 - the same
            for name in one._names() or [_NAME]  # noqa: SLF001 - the same
            for regex in _regexes_of(one._rules(), name, is_scored=one.score_function is not None)  # noqa: SLF001 - the same
        ]
        self.is_nested = any("/" in regex.pattern.replace("[^/]", "") for regex in self._regexes)

    # -- whose they are ----------------------------------------------------------------------------

    def is_named(self, name: str) -> bool:
        """Return True if the handler could have given this name."""
        return any(regex.fullmatch(name) for regex in self._regexes)

    def is_recorded(self, record: Record) -> bool:
        """Return True if the record says that the file is this handler's."""
        return self._owner.has(record.handler)

    def candidates(self, files: Mapping[str, Record | None]) -> list[str]:
        """Return what a resume may load: files that say they are the handler's, or are named so and say nothing.

        Args:
            files: what is in the directory.
        """
        own = [
            name
            for name, record in files.items()
            if (self.is_recorded(record) if record is not None else self.is_named(name))
        ]
        if not self._names and self._objects_name is not None:
            alike = [name for name in own if _objects_name(files[name]) in (None, self._objects_name)]
            own = alike if any(files[name] is not None for name in alike) else own
        return own

    def is_own(self, name: str, files: Mapping[str, Record | None]) -> bool:
        """Return True if a file is provably the handler's, and may be removed.

        A file without a record is where its name is this handler's, and cannot be another's: of another handler that
        saves there now, or of one whose files are there.
        """
        if name not in files:
            return False
        record = files[name]
        if record is not None:
            return self.is_recorded(record)
        if not self.is_named(name) or any(regex.fullmatch(name) for regex in self._others):
            return False
        others = {tuple(sorted(one.handler.items(), key=str)): one for one in files.values() if one is not None}
        return not any(
            regex.fullmatch(name)
            for one in others.values()
            if not self.is_recorded(one)
            for regex in _regexes_of_record(one)
        )

    # -- what was kept -----------------------------------------------------------------------------

    def newest_of(self, files: Mapping[str, Record | None], root: str, passed_over: Collection[str] = ()) -> str | None:
        """Return the handler's newest file of the runs that went on from one another; None if there is none.

        A run that died may have saved files of this handler, and none of the one that is resumed from. So the files of
        all runs count that have the first one in common.

        Args:
            files: what is in the directory.
            root: the id of the first of the runs.
            passed_over: files that are damaged.
        """
        own = {
            name: record.order
            for name, record in files.items()
            if record is not None and record.run.root == root and name not in passed_over and self.is_recorded(record)
        }
        return max(own, key=lambda name: own[name], default=None)

    def recorded_history(self, name: str, files: Mapping[str, Record | None]) -> History | None:
        """Return what the handler had kept when it saved a file, as far as it is still there; None without a record.

        Args:
            name: the file's.
            files: what is in the directory.
        """
        record = files.get(name)
        if record is None:
            return None
        kept = tuple(entry for entry in record.kept if entry[1] == name or self.is_own(entry[1], files))
        held = {name for _, name in kept}
        strays = tuple(one for one in record.evicted if one not in held and self.is_own(one, files))
        return History(kept=kept, strays=strays, iteration=record.iteration)

    def priority_of(self, name: str, *, is_mid_epoch: bool) -> int | float | None:
        """Return the priority of a file of the handler's, as far as its name tells it; None if it does not.

        Args:
            name: the file's.
            is_mid_epoch: whether it was saved in the middle of an epoch. Where steps are counted in epochs, half of
                one is taken off then, as a save does: the end of that epoch replaces it.
        """
        found = next(filter(None, (regex.fullmatch(name) for regex in self._regexes)), None)
        told = None if found is None else found.groupdict().get("score" if self._is_scored else "step")
        if told is None:
            return None
        value = int(told) if re.fullmatch(r"-?\d+", told) else float(told)
        return value - 0.5 if is_mid_epoch and self._has_transform and not self._is_scored else value

    def named_history(
        self, resumed: str, others: Sequence[str], *, n_saved: int | None, is_mid_epoch: bool
    ) -> list[Entry] | None:
        """Return what a handler that resumes from a file without a record has saved, as far as the names tell it.

        Args:
            resumed: the file that it resumes from; always part of it.
            others: its other files that are whole, as far as is known.
            n_saved: how many are kept. Files beyond that are left alone.
            is_mid_epoch: whether `resumed` was saved in the middle of an epoch.

        Returns:
            Priorities and names, lowest first; None where the name of `resumed` does not tell its own.
        """
        priority = self.priority_of(resumed, is_mid_epoch=is_mid_epoch)
        if priority is None:
            return None
        known = [(self.priority_of(name, is_mid_epoch=False), name) for name in others if name != resumed]
        entries = [
            (value, name) for value, name in known if value is not None and (self._is_scored or value < priority)
        ]
        entries.sort()
        if n_saved is not None:
            entries = entries[len(entries) - n_saved + 1 :] if n_saved <= len(entries) else entries
        return sorted([*entries, (priority, resumed)])


def _objects_name(record: Record | None) -> Any:
    return None if record is None else record.handler.get("name")


def _regexes_of_record(record: Record) -> list[re.Pattern[str]]:
    """Return what matches the names of a handler's files, from what one of them says of it."""
    found = record.handler
    is_scored = bool(found.get("is_scored"))
    try:
        rules = SavePolicy(
            prefix=str(found["prefix"]),
            name=str(found["name"]),
            ext=str(found["ext"]),
            pattern=found["pattern"],
            score_name=found["score_name"],
            n_saved=None,
            greater_or_equal=False,
            score_rule="mean",
        )
        return _regexes_of(rules, rules.name, is_scored=is_scored)
    except (KeyError, ValueError, AttributeError, TypeError, IndexError):  # another release's, or made by hand
        return []


def _regexes_of(rules: SavePolicy, objects_name: str, *, is_scored: bool) -> list[re.Pattern[str]]:
    """Return what matches the names of a handler's files, where it is not known whether these hold a step."""
    steps = [True, False] if is_scored else [True]
    return [_regex_of(rules, objects_name, is_scored=is_scored, has_step=has_step) for has_step in steps]


def _regex_of(rules: SavePolicy, objects_name: str, *, is_scored: bool, has_step: bool) -> re.Pattern[str]:
    name = replace(rules, name=objects_name).filename(
        score=_SCORE if is_scored else None,
        global_step=_STEP if has_step else None,
    )
    return re.compile(_expression_of(name))


def _expression_of(name: str) -> str:
    """Turn a name with markers into a regular expression; a field that comes again has to be the same again."""
    regex, seen = "", set[str]()
    for part in re.split("(\0[a-z]+\0)", name):
        field = _FIELDS.get(part)
        if field is None:
            regex += re.escape(part)
        elif field[0] in seen:
            regex += f"(?P={field[0]})"
        else:
            seen.add(field[0])
            regex += f"(?P<{field[0]}>{field[1]})"
    return regex
