"""The picture of the documentation: bars of stall and lost time, as SVG.

It needs no library. The same results give the same bytes.
"""

from collections.abc import Sequence
from xml.sax.saxutils import escape

from ci.savebench.field import FIELD
from ci.savebench.summary import Row

WIDTH, NAMES_WIDTH, VALUES_WIDTH = 880, 250, 60
BAR, GAP, TOP, BOTTOM = 13, 13, 76, 34
STALL, LOST, INK, FAINT, PAPER = "#1f6f8b", "#e0a458", "#24292f", "#d0d7de", "#ffffff"
NUM_TICKS = 5


def picture_of(rows: Sequence[Row], *, title: str, notes: str) -> str:
    """Return an SVG with two bars for each row.

    Args:
        rows: the contestants from top to bottom.
        title: first line of text.
        notes: last line of text.
    """
    highest = max([row.stall_s.median for row in rows] + [row.lost_s.median for row in rows] + [0.001])
    step = _step(highest)
    scale = (WIDTH - NAMES_WIDTH - VALUES_WIDTH) / (step * -(-highest // step))
    height = TOP + len(rows) * (2 * BAR + GAP) + BOTTOM
    size = f'width="{WIDTH}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {size} font-family="sans-serif">',
        f'<rect {size} fill="{PAPER}"/>',
        _text(16, 26, title, weight="bold", size=15),
        *_key(16, STALL, "stall: the call itself"),
        *_key(210, LOST, "lost: the call, and longer steps until the checkpoint is durable"),
    ]
    for number in range(int(highest // step) + 2):
        x = NAMES_WIDTH + number * step * scale
        if x <= WIDTH - VALUES_WIDTH + 1:
            parts += [
                f'<line x1="{x:.1f}" y1="{TOP - 8}" x2="{x:.1f}" y2="{height - BOTTOM}" stroke="{FAINT}"/>',
                _text(x, TOP - 13, f"{number * step:g} s", anchor="middle", size=11),
            ]
    for index, row in enumerate(rows):
        y = TOP + index * (2 * BAR + GAP)
        weight = "bold" if FIELD[row.name].is_ours else "normal"
        parts.append(_text(NAMES_WIDTH - 10, y + BAR + 4, row.name, anchor="end", weight=weight))
        for line, (value, colour) in enumerate(((row.stall_s.median, STALL), (row.lost_s.median, LOST))):
            length = max(value, 0) * scale
            top = y + line * BAR
            parts += [
                f'<rect x="{NAMES_WIDTH}" y="{top}" width="{length:.1f}" height="{BAR - 1}" fill="{colour}"/>',
                _text(NAMES_WIDTH + length + 5, top + BAR - 3, f"{value:.2f}", size=11),
            ]
    parts += [_text(16, height - 12, notes, size=11), "</svg>"]
    return "\n".join(parts) + "\n"


def _step(highest: float) -> float:
    """Return a round number that divides `highest` into at most five steps."""
    size = 10.0**-3
    while True:
        for factor in (1, 2, 5):
            if factor * size * NUM_TICKS >= highest:
                return factor * size
        size *= 10


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal", size: int = 13) -> str:
    return (
        f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" font-weight="{weight}" font-size="{size}" '
        f'fill="{INK}">{escape(text)}</text>'
    )


def _key(x: int, colour: str, text: str) -> list[str]:
    return [f'<rect x="{x}" y="37" width="12" height="12" fill="{colour}"/>', _text(x + 18, 47, text, size=12)]
