"""The results of a process that makes saves fail."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tests.crash.subject import whole_steps

__all__ = ["Tally", "others_in", "place_of"]


@dataclass(kw_only=True)
class Tally:
    """The results of one process.

    Attributes:
        trials: number of trials.
        acknowledged: number of saves that a rank took for done.
        cut_writing: number of trials that left a temporary file.
        cut_before_removal: number of trials that ended between a rename and the removal of the older checkpoint.
        findings: what was wrong, each with the number of its trial.
    """

    trials: int = 0
    acknowledged: int = 0
    cut_writing: int = 0
    cut_before_removal: int = 0
    findings: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        """The number of trials in which an acknowledged save was lost."""
        return sum("lost:" in finding for finding in self.findings)

    def take(self, *findings: str) -> None:
        """Add findings of the present trial."""
        self.findings += [f"trial {self.trials}: {finding}" for finding in findings]

    def look(self, directory: Path, acknowledged: int) -> int:
        """Add findings of files that do not load, and of a lost step; return the newest step that loads, or 0."""
        whole, problems = whole_steps(directory)
        found = max(whole, default=0)
        self.take(*problems)
        if found < acknowledged:
            self.take(f"lost: step {acknowledged} was acknowledged, the newest that loads is {found or None}")
        return found

    @classmethod
    def sums(cls, tallies: Sequence[Mapping[str, Self]]) -> dict[str, Self]:
        """Return the sums of all processes' results, for each saver."""
        return {saver: cls.sum([of_one[saver] for of_one in tallies]) for saver in tallies[0]}

    @classmethod
    def sum(cls, tallies: Sequence[Self]) -> Self:
        """Return the sum of all processes' results."""
        total = cls()
        for tally in tallies:
            for name, value in vars(tally).items():
                setattr(total, name, getattr(total, name) + value)
        return total


def others_in(directory: Path) -> set[str]:
    """Return the names of the files in a directory that are no checkpoints."""
    return {path.name for path in directory.iterdir() if path.suffix != ".pt"} if directory.exists() else set()


def place_of(root: str | Path, saver: str) -> Path:
    """Return the folder of a saver's trials."""
    return Path(root) / saver.replace(" ", "-")
