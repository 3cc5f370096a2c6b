"""Compute the horizontal axis of a timeline. Long pauses between sessions are cut out."""

import bisect
import time
from collections.abc import Iterable
from dataclasses import dataclass

from distckpt.cli.svg import linear_ticks

_LONG_PART = 0.03
_LONG_S = 1.0
"""A pause is long if it takes more than 3% of the running time, and more than a second."""
_PAUSE_WIDTH = 15.0
_PAUSES_PART = 0.2
_UNITS = (
    (2 * 86400.0, 86400.0, "days"),
    (2 * 3600.0, 3600.0, "hours"),
    (120.0, 60.0, "minutes"),
    (0.0, 1.0, "seconds"),
)
_MOST_TICKS = 8


@dataclass(frozen=True, slots=True)
class Pause:
    """A pause that is cut out: its place on the axis and its duration."""

    left: float
    width: float
    length_s: float


class TimeAxis:
    """Maps times to places between `left` and `left + width`.

    Args:
        spans: the begin and the end of each session, in seconds since 1970, in any order; at least one.
        left: left end of the axis, in pixels.
        width: width of the axis, in pixels.

    Attributes:
        pauses: the pauses that are cut out.
    """

    def __init__(self, spans: Iterable[tuple[float, float]], left: float, width: float) -> None:
        pieces = _united(sorted(spans))
        running_s = sum(end - begin for begin, end in pieces)
        shortest_s = max(_LONG_PART * running_s, _LONG_S)
        joined = [list(pieces[0])]
        for begin, end in pieces[1:]:
            if begin - joined[-1][1] > shortest_s:
                joined.append([begin, end])
            else:
                joined[-1][1] = end
        num_pauses = len(joined) - 1
        pause_width = min(_PAUSE_WIDTH, _PAUSES_PART * width / max(num_pauses, 1))
        total_s = sum(end - begin for begin, end in joined)
        self._scale = (width - num_pauses * pause_width) / max(total_s, 1e-3)
        self._total_s = total_s
        self._begins = [begin for begin, _ in joined]
        self._pieces: list[tuple[float, float, float, float]] = []  # begin, end, running time before, left
        self.pauses: list[Pause] = []
        before_s, x = 0.0, left
        for at, (begin, end) in enumerate(joined):
            if at:
                self.pauses.append(Pause(x, pause_width, begin - joined[at - 1][1]))
                x += pause_width
            self._pieces.append((begin, end, before_s, x))
            before_s, x = before_s + end - begin, x + self._scale * (end - begin)
        unit_s, self._unit = next((unit_s, name) for least_s, unit_s, name in _UNITS if total_s >= least_s)
        self._unit_s = unit_s

    def x(self, at_s: float) -> float:
        """Return the place of a time, in pixels."""
        begin, end, _, left = self._pieces[max(bisect.bisect_right(self._begins, at_s) - 1, 0)]
        return left + self._scale * (min(max(at_s, begin), end) - begin)

    @property
    def label(self) -> str:
        """The axis label."""
        began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self._begins[0]))
        cut = ", long pauses cut out" if self.pauses else ""
        return f"running time in {self._unit}, from {began}{cut}"

    def ticks(self) -> list[tuple[float, str]]:
        """Return the places and labels of round times."""
        found = []
        for tick in linear_ticks(0.0, self._total_s / self._unit_s, _MOST_TICKS):
            running_s = tick * self._unit_s
            piece = max((one for one in self._pieces if one[2] <= running_s + 1e-9), key=lambda one: one[2])
            found.append((piece[3] + self._scale * (running_s - piece[2]), f"{tick:g}"))
        return found


def _united(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Merge overlapping spans; return them in order."""
    found: list[tuple[float, float]] = []
    for begin, end in spans:
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found
