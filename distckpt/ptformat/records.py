"""Whose a checkpoint is, from which run, and what its handler kept: the record in its manifest, read back.

Nothing here is taken for granted: a record that is not as :mod:`distckpt.handlers.build_manifest` writes it counts as
none. Rank-local; issues no collectives.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distckpt.policy.naming import is_temp
from distckpt.policy.retention import Entry
from distckpt.ptformat.manifest import number_from
from distckpt.ptformat.reader import read_head_at

__all__ = ["Record", "Run", "files_in", "parse_record", "read_record", "survey"]

_NUMBERS = (int, float, bool)
_NO_RUN = "the record names no run"
_LATEST_S = 1e11
"""No clock says more: a float holds no milliseconds of seconds far beyond, and nothing would be later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run, as a manifest's record has it.

    Attributes:
        id: hexadecimal text.
        started_s: wall time in seconds since 1970, raised above everything that the run goes on from.
        lineage: the ids of the runs that it went on from, oldest first.
    """

    id: str
    started_s: float
    lineage: tuple[str, ...] = ()

    @property
    def root(self) -> str:
        """The first run of the lineage: the same for all that went on from one another, by whatever ways."""
        return self.ids[0]

    @property
    def ids(self) -> tuple[str, ...]:
        """The lineage and the run itself."""
        return (*self.lineage, self.id)

    def as_json(self) -> dict[str, Any]:
        """Return it as a record has it."""
        return {"id": self.id, "started_s": self.started_s, "lineage": list(self.lineage)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Run":
        """Read what :meth:`as_json` returned.

        Raises:
            ValueError: it is something else.
        """
        name, lineage = found.get("id"), found.get("lineage")
        try:
            started_s = float(found["started_s"])
        except (KeyError, TypeError) as error:
            raise ValueError(_NO_RUN) from error
        if not isinstance(name, str) or not isinstance(lineage, list) or not 0.0 <= started_s < _LATEST_S:
            raise ValueError(_NO_RUN)
        return cls(id=name, started_s=started_s, lineage=tuple(map(str, lineage)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a file says of itself; see :mod:`distckpt.handlers.build_manifest`.

    Attributes:
        handler: what names its handler's files.
        run: the run that saved it.
        number: how many checkpoints that run had saved before.
        kept: its handler's history once it was committed, lowest priority first.
        evicted: the files that its save was to remove.
        engine: the counters of the engine that ran, and its place in the state.
        data: which data was trained: one mapping, or one a rank.
    """

    handler: Mapping[str, Any]
    run: Run
    number: int
    kept: tuple[Entry, ...]
    evicted: tuple[str, ...]
    engine: Mapping[str, Any]
    data: Mapping[str, Any] | Sequence[Mapping[str, Any]]

    @property
    def order(self) -> tuple[float, str, int]:
        """By which files are ordered: the highest is the newest."""
        return (self.run.started_s, self.run.id, self.number)

    @property
    def iteration(self) -> int | None:
        """The engine's iteration."""
        found = self.engine.get("iteration")
        return found if isinstance(found, int) else None


def read_record(path: Path) -> Record | None:
    """Return a file's record; None if it has none, or is no file.

    Raises:
        OSError: it cannot be read.
    """
    with contextlib.suppress(FileNotFoundError, IsADirectoryError, NotADirectoryError):
        head = read_head_at(path)
        return None if head is None else parse_record(head.record)
    return None


def survey(directory: Path, ext: str, *, is_nested: bool) -> dict[str, Record | None]:
    """Return the files with an extension, by name, and their records. None stands for a file without one.

    Args:
        directory: where to look; nothing is found where it is missing.
        ext: without its dot.
        is_nested: whether to look into folders in it too.

    Raises:
        NotADirectoryError: it is a file.
    """
    found: dict[str, Record | None] = {}
    for name in files_in(directory, ext, is_nested=is_nested):
        found[name] = None
        with contextlib.suppress(OSError):  # loading it raises the same error
            found[name] = read_record(directory / name)
    return found


def files_in(directory: Path, ext: str, *, is_nested: bool) -> list[str]:
    """List the files with an extension; none where the directory is missing.

    Args:
        directory: where to look.
        ext: without its dot.
        is_nested: whether to look into folders in it too.

    Raises:
        NotADirectoryError: it is a file.
    """
    if not directory.exists():
        return []
    found = directory.rglob("*") if is_nested else directory.iterdir()
    named = [path for path in found if path.name.endswith(f".{ext}") and not is_temp(path.name) and path.is_file()]
    return sorted(path.relative_to(directory).as_posix() for path in named)


def parse_record(found: Mapping[str, Any] | None) -> Record | None:
    """Return a record from a manifest's; None if there is none, or one that cannot be understood."""
    if not found:
        return None
    try:
        return Record(
            handler=dict(found["handler"]),
            run=Run.from_json(found["run"]),
            number=int(found["number"]),
            kept=tuple((_number(priority), str(name)) for priority, name in found["kept"]),
            evicted=tuple(map(str, found["evicted"])),
            engine=dict(found["engine"]),
            data=found["data"],
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _number(priority: Any) -> int | float:
    value = number_from(priority)
    if type(value) not in _NUMBERS:  # quicker than plain_score, for histories of hundreds of files in each of them
        msg = "a priority is no number"
        raise ValueError(msg)
    number: int | float = value
    return number
