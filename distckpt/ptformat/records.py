"""Read the record in a checkpoint's manifest: its handler, its run, and what the handler kept.

A record that :mod:`distckpt.handlers.build_manifest` cannot have written counts as none. Rank-local; issues no
collectives.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distckpt.policy.history import Entry
from distckpt.policy.naming import is_reserved
from distckpt.policy.policies import LATEST_S, Policy, SavedFile, from_plain, whole_minutes
from distckpt.ptformat.archive import read_head_at
from distckpt.ptformat.manifest import number_from

_NUMBERS = (int, float, bool)
_NO_RUN = "the record names no run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run.

    Attributes:
        id: hexadecimal text.
        started_s: wall time in seconds since 1970; later than that of all runs in its lineage.
        lineage: ids of the runs that it continues, oldest first.
    """

    id: str
    started_s: float
    lineage: tuple[str, ...] = ()

    @property
    def root(self) -> str:
        """Id of the first run of the lineage, which all runs that continue it share."""
        return self.ids[0]

    @property
    def ids(self) -> tuple[str, ...]:
        """The lineage, and the run's own id."""
        return (*self.lineage, self.id)

    def as_json(self) -> dict[str, Any]:
        """Return the run as plain JSON."""
        return {"id": self.id, "started_s": self.started_s, "lineage": list(self.lineage)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Run":
        """Return the run from the value of :meth:`as_json`.

        Raises:
            ValueError: it is something else.
        """
        name, lineage = found.get("id"), found.get("lineage")
        try:
            started_s = float(found["started_s"])
        except (KeyError, TypeError) as error:
            raise ValueError(_NO_RUN) from error
        if not isinstance(name, str) or not isinstance(lineage, list) or not 0.0 <= started_s < LATEST_S:
            raise ValueError(_NO_RUN)
        return cls(id=name, started_s=started_s, lineage=tuple(map(str, lineage)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A checkpoint's record; see :mod:`distckpt.handlers.build_manifest`.

    Attributes:
        handler: the arguments by which its handler names files.
        run: the run that saved it.
        number: how many checkpoints that run had saved before.
        kept: its handler's history after the save, lowest priority first; if it was long, the saved file alone.
        num_kept: length of that history.
        evicted: the files that the save removed.
        engine: the saving engine's counters, and its key in the state.
        data: position in the training data: one mapping, or one a rank.
        keep: the handler's policies; None if it was given ``n_saved``.
        step: the step in the file name, or the iteration; None in older files.
        time_s: when it was saved, in whole minutes and in seconds since 1970; None if unknown.
    """

    handler: Mapping[str, Any]
    run: Run
    number: int
    kept: tuple[Entry, ...]
    num_kept: int
    evicted: tuple[str, ...]
    engine: Mapping[str, Any]
    data: Mapping[str, Any] | Sequence[Mapping[str, Any]]
    keep: tuple[Policy, ...] | None = None
    step: int | float | None = None
    time_s: float | None = None

    @property
    def order(self) -> tuple[float, str, int]:
        """Sort key: the newest checkpoint has the highest."""
        return (self.run.started_s, self.run.id, self.number)

    @property
    def iteration(self) -> int | None:
        """The engine's iteration."""
        found = self.engine.get("iteration")
        return found if isinstance(found, int) else None

    def describe(self, name: str, priority: float) -> SavedFile:
        """Return what policies know of the record's file, which has this priority in its handler's history."""
        step = self.step
        if step is None:  # an older file
            is_step = not self.handler.get("is_scored") and math.isfinite(priority)
            step = priority if is_step else self.iteration
        return SavedFile(name, priority, step, self.time_s)


def read_record(path: Path) -> Record | None:
    """Return a file's record; None if it has none, or there is no such file.

    Raises:
        OSError: the file cannot be read.
    """
    with contextlib.suppress(FileNotFoundError, IsADirectoryError, NotADirectoryError):
        head = read_head_at(path)
        return None if head is None else parse_record(head.record, head.wall_time_s)
    return None


def read_records(directory: Path, ext: str, *, is_nested: bool) -> dict[str, Record | None]:
    """Return the records of a directory's files by name; None for a file without one. See :func:`list_files`."""
    found: dict[str, Record | None] = {}
    for name in list_files(directory, ext, is_nested=is_nested):
        found[name] = None
        with contextlib.suppress(OSError):  # loading it raises the same error
            found[name] = read_record(directory / name)
    return found


def list_files(directory: Path, ext: str, *, is_nested: bool) -> list[str]:
    """Return the sorted names of a directory's files; none if it is missing.

    Args:
        directory: to list.
        ext: the files' extension, without its dot.
        is_nested: include sub-folders.

    Raises:
        NotADirectoryError: `directory` is a file.
    """
    if not directory.exists():
        return []
    found = directory.rglob("*") if is_nested else directory.iterdir()
    named = [path for path in found if path.name.endswith(f".{ext}") and not is_reserved(path.name) and path.is_file()]
    return sorted(path.relative_to(directory).as_posix() for path in named)


def parse_record(found: Mapping[str, Any] | None, wall_time_s: float | None = None) -> Record | None:
    """Return the record from its JSON; None if there is none, or an invalid one.

    Args:
        found: the JSON.
        wall_time_s: when the file was saved, if the record does not say; None if unknown.
    """
    if not found:
        return None
    try:
        kept = tuple((_number(priority), str(name)) for priority, name in found["kept"])
        return Record(
            handler=dict(found["handler"]),
            run=Run.from_json(found["run"]),
            number=int(found["number"]),
            kept=kept,
            num_kept=int(found.get("num_kept", len(kept))),
            evicted=tuple(map(str, found["evicted"])),
            engine=dict(found["engine"]),
            data=found["data"],
            keep=_policies(found.get("keep")),
            step=None if found.get("step") is None else _number(found["step"]),
            time_s=_time(found.get("time_s"), wall_time_s),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _policies(found: Any) -> tuple[Policy, ...] | None:
    try:
        return None if found is None else from_plain(found)
    except (KeyError, TypeError, ValueError):  # a newer release's: what it keeps is known, and not why
        return None


def _time(recorded: Any, wall_time_s: float | None) -> float | None:
    found = recorded if type(recorded) in _NUMBERS else wall_time_s
    return whole_minutes(found) if isinstance(found, int | float) and 0.0 <= found < LATEST_S else None


def _number(priority: Any) -> int | float:
    value = number_from(priority)
    if type(value) not in _NUMBERS:  # faster than plain_score, for hundreds of files with hundreds of entries
        raise ValueError("a priority is no number")
    number: int | float = value
    return number
