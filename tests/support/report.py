"""How a function ended on each rank, and the message of a failing test."""

import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.support.messages import OutcomeKind


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnd:
    """How one rank ended."""

    rank: int
    kind: OutcomeKind | Literal["died", "hung"]
    """`died`: ended without an outcome. `hung`: still running at the time limit, and killed."""
    value: Any = None
    """The function's return value."""
    reason: str = ""
    """One line: the exception, the reason for the skip, or how the rank died."""
    traceback: str = ""
    """The exception's traceback; for `hung` and `died`, the stacks of the rank's threads if known."""
    output: str = ""
    """The rank's output."""
    exit_code: int | None = None
    """The process's exit code, minus the signal's number if killed; None if it was not waited for."""
    at_s: float = field(default_factory=time.monotonic)
    """When it ended, on the machine's monotonic clock."""

    @property
    def failed(self) -> bool:
        """True if this end fails the test."""
        return self.kind in {"raised", "exited", "died", "hung"}


class RankFailedError(Exception):
    """A function failed on some rank. The message describes every rank that did not return.

    Attributes:
        ends: how each rank ended, in rank order.
    """

    def __init__(self, what: str, ends: Sequence[RankEnd], *, limit_s: float) -> None:
        super().__init__(_describe(what, ends, limit_s))
        self.ends = list(ends)


def _describe(what: str, ends: Sequence[RankEnd], limit_s: float) -> str:
    bad = sorted((end for end in ends if end.kind != "returned"), key=lambda end: end.at_s)
    names = ", ".join(f"rank {end.rank} {end.kind}" for end in bad)
    parts = [f"{what} on {len(ends)} ranks, limit {limit_s:g} s: {names}"]
    for position, end in enumerate(bad):
        first = " (the first to fail)" if position == 0 and len(bad) > 1 and end.failed else ""
        parts.append(f"--- rank {end.rank}{first} {end.kind}: {end.reason}")
        if end.traceback:
            parts.append(textwrap.indent(end.traceback.rstrip(), "    "))
    parts += [_describe_output(end) for end in ends if end.output]
    return "\n".join(parts)


def _describe_output(end: RankEnd) -> str:
    return f"--- rank {end.rank} printed:\n" + textwrap.indent(end.output, "    ")
