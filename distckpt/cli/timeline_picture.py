"""Draw a timeline: progress, timings of the saves and scores over the running time.

Up to 250 saves have a mark each. With more saves, a line shows the median of every few pixels and a band their range,
which keeps the picture legible and small. The colours are those of Okabe and Ito, distinct for colour-blind people.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distckpt.cli.output import count, format_age, printable, shorten
from distckpt.cli.svg import MARKS, Drawing, Point, linear_ticks, text_width
from distckpt.cli.time_axis import TimeAxis
from distckpt.cli.timeline import COMPLETE, ENDED, KILLED, NO_END, Save, Session, Timeline, iteration_time

BLUE, ORANGE, GREEN, RED, PURPLE, BLACK = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#222222"
_GREY, _PALE, _GRID = "#777777", "#f1f1f1", "#e2e2e2"
_STOPS = ("nan", "early_stop", "time_limit", "preempted")
_SCORE_COLORS = (PURPLE, GREEN, ORANGE, BLUE)
_WIDTH, _LEFT, _RIGHT = 960.0, 84.0, 20.0
_PROGRESS_HEIGHT, _TIMINGS_HEIGHT, _SCORES_HEIGHT, _GAP = 210.0, 150.0, 130.0, 34.0
_LABEL_ROWS, _LABEL_HEIGHT, _LEGEND_HEIGHT = 3, 15.0, 18.0
_MOST_MARKS = 250
_MOST_POINTS = 400
_BIN = 3.0
_LABEL_CHARS = 40
_SMALL = 11
_MOST_LINES = 25
_HIGHEST_SCORE = 1e100
"""Higher scores are not drawn, and neither are scores that are not finite."""
_SIZES = {"circle": 4.5, "square": 3.2, "diamond": 2.4, "triangle": 2.0}
"""Different sizes, so that marks of several handlers at one place stay visible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Panel:
    """A part of the picture with its own vertical axis.

    Attributes:
        top: upper edge, in pixels.
        height: height in pixels.
        low: value at the bottom.
        high: value at the top.
    """

    top: float
    height: float
    low: float
    high: float

    def y(self, value: float) -> float:
        return self.top + self.height * (1.0 - (value - self.low) / (self.high - self.low))

    def draw(self, drawing: Drawing, label: str, ticks: Sequence[tuple[float, str]]) -> None:
        for value, text in ticks:
            y = self.y(value)
            drawing.line([(_LEFT, y), (_WIDTH - _RIGHT, y)], _GRID)
            drawing.text((_LEFT - 7, y + 4), text, anchor="end", size=_SMALL)
        drawing.line([(_LEFT, self.top), (_LEFT, self.top + self.height)], _GREY)
        drawing.line([(_LEFT, self.top + self.height), (_WIDTH - _RIGHT, self.top + self.height)], _GREY)
        drawing.text((17, self.top + self.height / 2), label, anchor="middle", is_upright=True)


def name_of(save: Save) -> str:
    """Return the name of a save's handler."""
    return save.handler or "no handler"


def draw_timeline(timeline: Timeline, title: str) -> bytes:
    """Return the picture as an SVG file.

    Args:
        timeline: a timeline with at least one session or save.
        title: the picture's title.
    """
    saves = timeline.saves
    handlers = sorted({name_of(save) for save in saves})
    shapes = {handler: MARKS[at % len(MARKS)] for at, handler in enumerate(handlers)}
    scored = [save for save in saves if save.score is not None and abs(save.score) < _HIGHEST_SCORE]
    legend = _legend_of(timeline, shapes)
    legend_rows = _rows_of(legend)
    spans = [(session.begin_s, session.end_s) for session in timeline.sessions]
    axis = TimeAxis([*spans, *((save.at_s, save.at_s) for save in timeline.others)], _LEFT, _WIDTH - _LEFT - _RIGHT)
    labels = _place_labels(axis, timeline.sessions)
    label_rows = 1 + max((label.row for label in labels), default=-1)
    top = 68 + _LEGEND_HEIGHT * len(legend_rows) + _LABEL_HEIGHT * label_rows + 14
    timings_top = top + _PROGRESS_HEIGHT + _GAP
    scores_top = timings_top + _TIMINGS_HEIGHT + _GAP
    bottom = scores_top + _SCORES_HEIGHT if scored else timings_top + _TIMINGS_HEIGHT
    drawing = Drawing(_WIDTH, bottom + 52, f"{title}: {_summary(timeline)}")
    drawing.text((16, 26), shorten(printable(title), 100), size=16, is_bold=True, color=BLACK)
    drawing.text((16, 44), _summary(timeline), color=_GREY)
    _draw_legend(drawing, legend_rows)

    for pause in axis.pauses:
        drawing.box(pause.left, top, pause.width, bottom - top, _PALE)
        if pause.width > 10:  # noqa: PLR2004 - the height of the text
            middle = (pause.left + pause.width / 2 + 3, top + _PROGRESS_HEIGHT / 2)
            text = f"pause of {format_age(pause.length_s)}"
            drawing.text(middle, text, color=_GREY, size=10, anchor="middle", is_upright=True)
    _draw_progress(drawing, axis, timeline, shapes, top)
    _draw_ends(drawing, axis, timeline.sessions, top, bottom)
    for label in labels:
        at = label.left, top - 18 - label.row * _LABEL_HEIGHT
        drawing.text(at, label.text, color=label.color, size=_SMALL)
    _draw_timings(drawing, axis, saves, shapes, timings_top)
    if scored:
        _draw_scores(drawing, axis, scored, shapes, scores_top)
    for x, text in axis.ticks():
        drawing.line([(x, bottom), (x, bottom + 5)], _GREY)
        drawing.text((x, bottom + 18), text, anchor="middle", size=_SMALL)
    drawing.text(((_LEFT + _WIDTH - _RIGHT) / 2, bottom + 38), axis.label, anchor="middle")
    return drawing.to_bytes()


# -- the legend ----------------------------------------------------------------------------------------

_Sample = Callable[[Drawing, Point], None]


def _legend_of(timeline: Timeline, shapes: dict[str, str]) -> list[tuple[_Sample, str]]:
    def line(color: str, dash: str = "") -> _Sample:
        return lambda drawing, at: drawing.line([(at[0] - 8, at[1]), (at[0] + 8, at[1])], color, width=2.5, dash=dash)

    def mark(kind: str, color: str, *, is_filled: bool = True) -> _Sample:
        return lambda drawing, at: drawing.mark(at, kind, color, size=4.0, is_filled=is_filled)

    saves = timeline.saves
    found = [(line(BLUE), "trained iterations")]
    if timeline.lost:
        found.append((line(RED), "lost: trained again after a resume"))
    if any(session.resumed is not None for session in timeline.sessions):
        found.append((mark("bar", BLACK), "resume"))
    is_marked = len(saves) <= _MOST_MARKS
    for handler, shape in shapes.items():
        name = shorten(printable(handler), _LABEL_CHARS)
        found.append((mark(shape, BLUE, is_filled=False), f"save: {name}"))
    if any(save.is_there for save in saves):
        found.append((mark("circle", BLUE), "filled: the file is there"))
    if any(save.stall_s is not None for save in saves):
        found.append((mark("circle", BLUE) if is_marked else line(BLUE), "stall: training stands still"))
        found.append((mark("circle", ORANGE) if is_marked else line(ORANGE), "until durable"))
        if not is_marked:
            found.append((line(_GREY), f"lines: medians, bands: ranges ({len(saves):,} saves)"))
    seen: dict[tuple[str, str], str] = {}
    for session in timeline.sessions:
        style = _style_of(session)
        texts = {
            "cross": KILLED,
            "triangle": "error",
            "square": "stop",
            "circle": COMPLETE,
            "diamond": "ended, or runs",
        }
        seen[style] = texts[style[0]]
    return [*found, *((mark(*style), text) for style, text in sorted(seen.items()))]


def _rows_of(legend: Sequence[tuple[_Sample, str]]) -> list[list[tuple[float, _Sample, str]]]:
    rows: list[list[tuple[float, _Sample, str]]] = [[]]
    x = 16.0
    for sample, text in legend:
        width = 24 + text_width(text) + 14
        if rows[-1] and x + width > _WIDTH - 8:
            rows.append([])
            x = 16.0
        rows[-1].append((x, sample, text))
        x += width
    return rows


def _draw_legend(drawing: Drawing, rows: Sequence[Sequence[tuple[float, _Sample, str]]]) -> None:
    for number, row in enumerate(rows):
        y = 64 + _LEGEND_HEIGHT * number
        for x, sample, text in row:
            sample(drawing, (x + 8, y - 4))
            drawing.text((x + 22, y), text)


def _summary(timeline: Timeline) -> str:
    saves = timeline.saves
    num_there = sum(save.is_there for save in saves)
    size = f"{len(saves):,} save{'' if len(saves) == 1 else 's'}, {num_there:,} still there"
    clauses = [count(len(timeline.sessions), "session"), size]
    num_killed = sum(session.outcome == KILLED for session in timeline.sessions)
    if num_killed:
        clauses.append(f"{num_killed} killed")
    if timeline.lost:
        clauses.append(f"{timeline.lost:,} iteration{'' if timeline.lost == 1 else 's'} lost")
    stalls = [save.stall_s for save in saves if save.stall_s is not None]
    if stalls:
        clauses.append(f"all saves together delayed training by {_seconds(sum(stalls))}")
    if timeline.num_dropped:
        clauses.append(f"{count(timeline.num_dropped, 'line')} of the record dropped")
    return "; ".join(clauses)


# -- the panels ----------------------------------------------------------------------------------------


def _draw_progress(drawing: Drawing, axis: TimeAxis, timeline: Timeline, shapes: dict[str, str], top: float) -> None:
    sessions, saves = timeline.sessions, timeline.saves
    values = [iteration for session in sessions for _, iteration in session.points]
    values += [save.iteration for save in saves if save.iteration is not None]
    low, high = min(values, default=0), max(values, default=1)
    low = 0 if low < high / 2 else low
    panel = _Panel(top=top, height=_PROGRESS_HEIGHT, low=low, high=max(high, low + 1))
    ticks = [tick for tick in linear_ticks(panel.low, panel.high, 5) if tick == int(tick)]
    panel.draw(drawing, "iterations", [(tick, f"{int(tick):,}") for tick in ticks])
    for session in sessions:
        points = [(axis.x(at_s), panel.y(iteration)) for at_s, iteration in _thinned(session.points)]
        drawing.line(points, BLUE, width=2.0)
        if session.lost:
            _draw_lost(drawing, axis, panel, session)
        if session.resumed is not None and session.start_iteration is not None:
            size = 7.0 if len(sessions) <= _MOST_LINES else 3.5
            drawing.mark((axis.x(session.begin_s), panel.y(session.start_iteration)), "bar", BLACK, size=size)
    marked = saves if len(saves) <= _MOST_MARKS else [save for save in saves if save.is_there]
    if len(marked) > _MOST_MARKS:
        return
    for save in sorted(marked, key=lambda save: list(shapes).index(name_of(save))):
        if save.iteration is not None:
            shape, at = shapes[name_of(save)], (axis.x(save.at_s), panel.y(save.iteration))
            size = _SIZES[shape] if len(shapes) > 1 else 3.5
            drawing.mark(at, shape, BLUE, size=size, is_filled=save.is_there)


def _draw_lost(drawing: Drawing, axis: TimeAxis, panel: _Panel, session: Session) -> None:
    reached = session.reached or 0
    kept = reached - session.lost
    points = [(iteration_time(session, kept), kept)]
    points += [(at_s, iteration) for at_s, iteration in session.points if iteration > kept]
    line = [(axis.x(at_s), panel.y(iteration)) for at_s, iteration in _thinned(points)]
    drawing.area([*line, (line[-1][0], panel.y(kept))], RED, opacity=0.25)
    drawing.line(line, RED, width=2.5)


def _style_of(session: Session) -> tuple[str, str]:
    if session.outcome == KILLED:
        return "cross", RED
    if session.outcome == COMPLETE:
        return "circle", GREEN
    if session.outcome in (ENDED, NO_END):
        return "diamond", _GREY
    return ("square", BLACK) if session.outcome in _STOPS else ("triangle", RED)


def _draw_ends(drawing: Drawing, axis: TimeAxis, sessions: Sequence[Session], top: float, bottom: float) -> None:
    """Mark the ends of the sessions above the panels."""
    for session in sessions:
        x, style = axis.x(session.end_s), _style_of(session)
        if len(sessions) <= _MOST_LINES:
            drawing.line([(x, top), (x, bottom)], style[1], dash="2 3")
        drawing.mark((x, top - 8), *style, size=4.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Label:
    """A label at a session's end. Labels of one row do not overlap; row 0 is the lowest."""

    text: str
    color: str
    left: float
    row: int


def _place_labels(axis: TimeAxis, sessions: Sequence[Session]) -> list[_Label]:
    """Return the labels at the sessions' ends, as many as fit."""
    found, row_ends = list[_Label](), [0.0] * _LABEL_ROWS
    for session in sessions:
        text = session.outcome if not session.signals else f"{session.outcome} ({', '.join(session.signals)})"
        text = shorten(printable(text), _LABEL_CHARS)
        if session.lost:
            text += f", {'at least ' if session.outcome == KILLED else ''}{session.lost:,} lost"
        width = text_width(text, _SMALL)
        left = min(max(axis.x(session.end_s) - width / 2, 4.0), _WIDTH - 4 - width)
        row = next((number for number, end in enumerate(row_ends) if end < left), None)
        if row is not None:
            row_ends[row] = left + width + 8
            found.append(_Label(text=text, color=_style_of(session)[1], left=left, row=row))
    return found


def _draw_timings(drawing: Drawing, axis: TimeAxis, saves: Sequence[Save], shapes: dict[str, str], top: float) -> None:
    series = [
        (ORANGE, [(axis.x(save.at_s), save.durable_s, shapes[name_of(save)]) for save in saves if save.durable_s]),
        (BLUE, [(axis.x(save.at_s), save.stall_s, shapes[name_of(save)]) for save in saves if save.stall_s]),
    ]
    values = [value for _, points in series for _, value, _ in points if 0.0 < value < math.inf]
    low = math.floor(math.log10(min(values, default=0.001)))
    high = max(math.ceil(math.log10(max(values, default=1.0))), low + 1)
    panel = _Panel(top=top, height=_TIMINGS_HEIGHT, low=low, high=high)
    step = math.ceil((high - low) / 6)
    panel.draw(drawing, "seconds a save", [(power, _seconds(10.0**power)) for power in range(low, high + 1, step)])
    if not values:
        drawing.text(
            ((_LEFT + _WIDTH - _RIGHT) / 2, top + _TIMINGS_HEIGHT / 2),
            "no timings recorded",
            anchor="middle",
            color=_GREY,
        )
    for color, points in series:
        marks = [_Mark(x, math.log10(value), shape) for x, value, shape in points if 0.0 < value < math.inf]
        _draw_series(drawing, panel, marks, color)


def _draw_scores(drawing: Drawing, axis: TimeAxis, scored: Sequence[Save], shapes: dict[str, str], top: float) -> None:
    values = [save.score for save in scored if save.score is not None]
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    panel = _Panel(top=top, height=_SCORES_HEIGHT, low=low - margin, high=high + margin)
    panel.draw(drawing, "score", [(tick, f"{tick:g}") for tick in linear_ticks(panel.low, panel.high, 4)])
    handlers = sorted({name_of(save) for save in scored})
    for number, handler in enumerate(handlers):
        color = _SCORE_COLORS[number % len(_SCORE_COLORS)]
        own = [save for save in scored if name_of(save) == handler]
        marks = [_Mark(axis.x(save.at_s), save.score or 0.0, shapes[handler], save.is_there) for save in own]
        if len(marks) <= _MOST_MARKS:
            drawing.line([(mark.x, panel.y(mark.value)) for mark in marks], color)
        _draw_series(drawing, panel, marks, color)


class _Mark(NamedTuple):
    x: float
    value: float
    shape: str
    is_filled: bool = True


def _draw_series(drawing: Drawing, panel: _Panel, marks: Sequence[_Mark], color: str) -> None:
    """Draw the marks; if there are many, the median and the range of every few pixels instead."""
    if len(marks) <= _MOST_MARKS:
        for mark in marks:
            drawing.mark((mark.x, panel.y(mark.value)), mark.shape, color, is_filled=mark.is_filled)
        return
    bins: dict[int, list[float]] = {}
    for mark in marks:
        bins.setdefault(int(mark.x / _BIN), []).append(mark.value)
    columns = [((column + 0.5) * _BIN, bins[column]) for column in sorted(bins)]
    upper = [(x, panel.y(max(values))) for x, values in columns]
    lower = [(x, panel.y(min(values))) for x, values in columns]
    drawing.area([*upper, *reversed(lower)], color, opacity=0.25)
    drawing.line([(x, panel.y(statistics.median(values))) for x, values in columns], color, width=1.6)


def _thinned(points: Sequence[tuple[float, int]]) -> Sequence[tuple[float, int]]:
    """Return about :data:`_MOST_POINTS` of the points or fewer, including the last one."""
    stride = -(-len(points) // _MOST_POINTS)
    return points if stride <= 1 else [*points[::stride], points[-1]]


def _seconds(value: float) -> str:
    if value < 1e-3:  # noqa: PLR2004 - a millisecond
        return f"{value * 1e6:.3g} us"
    if value < 1.0:
        return f"{value * 1e3:.3g} ms"
    return f"{value:.3g} s" if value < 120 else format_age(value)  # noqa: PLR2004 - two minutes
