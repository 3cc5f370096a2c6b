"""What :func:`~distckpt.resume` returns: the path of what was loaded, and what is known of it."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

__all__ = ["Facts", "Resumed"]

_Plain = type(Path())


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of the run that was resumed; see :class:`Resumed`."""

    iteration: int | None = None
    epoch: int | None = None
    has_ended: bool = False
    passed_over: tuple[tuple[str, str], ...] = ()
    world_size: int | None = None
    run_id: str | None = None


class Resumed(_Plain):  # type: ignore[valid-type, misc]  # the class of this platform's paths
    """The checkpoint that a run goes on from: its path, and what is known of it. What is made of it is a plain path.

    Attributes:
        path: the same, a plain path.
        iteration: iterations that were trained; None where there is no state of an engine.
        epoch: epochs that are over; None likewise.
        has_ended: whether the run had come to its end: ``engine.run()`` up to the same end returns at once.
        passed_over: names of newer checkpoints that were not taken, each with the reason.
        world_size: number of ranks of the job that saved it; None where the file does not say.
        run_id: names the run that saved it; None where the file does not say.

    Example:
        >>> found = Resumed("checkpoints/checkpoint_6.pt", Facts(iteration=6, epoch=3))
        >>> found.name, found.iteration, found == Path("checkpoints/checkpoint_6.pt")
        ('checkpoint_6.pt', 6, True)
    """

    _facts = Facts()

    def __new__(cls, path: Any, facts: Facts | None = None) -> Self:
        """Make one of a path and what is known."""
        del facts
        made: Self = super().__new__(cls, path)
        return made

    def __init__(self, path: Any, facts: Facts | None = None) -> None:
        if sys.version_info >= (3, 12):
            super().__init__(path)
        if facts is not None:
            self._facts = facts

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep what is known, in a copy and in another process."""
        return (Resumed, (self.path, self._facts))

    if sys.version_info >= (3, 12):

        def with_segments(self, *segments: Any) -> Path:
            """Return a plain path."""
            return Path(*segments)
    else:
        # How Python 3.11's pathlib makes one path of another: of `found / "x"` nothing is known.
        _from_parsed_parts = _Plain._from_parsed_parts  # type: ignore[attr-defined]  # noqa: SLF001 - there is no public way

    @property
    def path(self) -> Path:
        """The path, and nothing else."""
        return Path(str(self))

    @property
    def iteration(self) -> int | None:
        """Iterations that were trained."""
        return self._facts.iteration

    @property
    def epoch(self) -> int | None:
        """Epochs that are over."""
        return self._facts.epoch

    @property
    def has_ended(self) -> bool:
        """Whether the run had come to its end."""
        return self._facts.has_ended

    @property
    def passed_over(self) -> tuple[tuple[str, str], ...]:
        """Names of newer checkpoints that were not taken, and why."""
        return self._facts.passed_over

    @property
    def world_size(self) -> int | None:
        """Number of ranks of the job that saved it."""
        return self._facts.world_size

    @property
    def run_id(self) -> str | None:
        """The run that saved it."""
        return self._facts.run_id
