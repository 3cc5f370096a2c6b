"""How a function ended on each rank, and the text that a failing test shows.

Pure: it is given what happened and formats it.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tests.support.messages import OutcomeKind


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnd:
    """How one rank ended."""

    rank: int
    kind: OutcomeKind | Literal["died", "hung"]
    """`died`: without a word. `hung`: still running when the wait was over, and killed then."""
    value: Any = None
    """What the function returned."""
    reason: str = ""
    """One line: the exception, why it was skipped, how it died."""
    traceback: str = ""
    """Of the exception; for `hung` and `died`, the stacks of the rank's threads where known."""
    output: str = ""
    """What the rank printed."""
    exit_code: int | None = None
    """Of the process, where it was waited for: minus the signal's number when killed."""
    order: int = 0
    """Position in time among the ranks' ends."""

    @property
    def failed(self) -> bool:
        """Whether the test has to fail of it."""
        return self.kind in {"raised", "exited", "died", "hung"}


class RankFailedError(Exception):
    """A function failed on some rank. The message tells the story of every rank that did not return.

    Attributes:
        ends: how each rank ended, in rank order.
    """

    def __init__(self, what: str, ends: Sequence[RankEnd], *, limit_s: float) -> None:
        super().__init__(_story(what, ends, limit_s))
        self.ends = list(ends)


def _story(what: str, ends: Sequence[RankEnd], limit_s: float) -> str:
    bad = sorted((end for end in ends if end.kind != "returned"), key=lambda end: end.order)
    names = ", ".join(f"rank {end.rank} {end.kind}" for end in bad)
    parts = [f"{what} on {len(ends)} ranks, limit {limit_s:g} s: {names}"]
    for position, end in enumerate(bad):
        first = " (the first to fail)" if position == 0 and len(bad) > 1 and end.failed else ""
        parts.append(f"--- rank {end.rank}{first} {end.kind}: {end.reason}")
        if end.traceback:
            parts.append(textwrap.indent(end.traceback.rstrip(), "    "))
    parts += [_output_of(end) for end in ends if end.output]
    return "\n".join(parts)


def _output_of(end: RankEnd) -> str:
    return f"--- rank {end.rank} printed:\n" + textwrap.indent(end.output, "    ")
