"""Draw lines, marks and texts as SVG, and find round numbers for axes. All text is escaped."""

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape, quoteattr

from distckpt.cli.output import printable

Point = tuple[float, float]
FONT_SIZE = 12
_CHAR_WIDTH = 0.58
"""The mean width of a character of a sans-serif font, relative to the font size."""
MARKS = ("circle", "square", "diamond", "triangle")


class Drawing:
    """A picture of a fixed size, on a white background.

    Args:
        width: width in pixels.
        height: height in pixels.
        title: a title for screen readers.
    """

    def __init__(self, width: float, height: float, title: str) -> None:
        size = f'width="{_number(width)}" height="{_number(height)}" viewBox="0 0 {_number(width)} {_number(height)}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"'
        self._parts = [
            f'{head} font-family="Helvetica, Arial, sans-serif" font-size="{FONT_SIZE}">',
            f"<title>{_text(title)}</title>",
            f'<rect width="{_number(width)}" height="{_number(height)}" fill="#ffffff"/>',
        ]

    def line(self, points: Sequence[Point], color: str, *, width: float = 1.0, dash: str = "") -> None:
        """Draw a line through points."""
        if len(points) > 1:
            dashes = f' stroke-dasharray="{dash}"' if dash else ""
            self._parts.append(
                f'<path d="{_path(points)}" fill="none" stroke="{color}" stroke-width="{_number(width)}" '
                f'stroke-linejoin="round"{dashes}/>'
            )

    def area(self, points: Sequence[Point], color: str, *, opacity: float) -> None:
        """Fill the area between points."""
        if len(points) > 2:  # noqa: PLR2004 - a triangle
            self._parts.append(f'<path d="{_path(points)}Z" fill="{color}" fill-opacity="{_number(opacity)}"/>')

    def box(self, left: float, top: float, width: float, height: float, color: str) -> None:
        """Fill a rectangle."""
        self._parts.append(
            f'<rect x="{_number(left)}" y="{_number(top)}" width="{_number(width)}" height="{_number(height)}" '
            f'fill="{color}"/>'
        )

    def mark(self, at: Point, kind: str, color: str, *, size: float = 3.5, is_filled: bool = True) -> None:
        """Draw a mark: one of :data:`MARKS`, ``cross``, or ``bar``."""
        x, y = at
        style = f'fill="{color}"' if is_filled else f'fill="#ffffff" stroke="{color}" stroke-width="1.3"'
        if kind == "circle":
            self._parts.append(f'<circle cx="{_number(x)}" cy="{_number(y)}" r="{_number(size)}" {style}/>')
        elif kind == "cross":
            for sign in (1, -1):
                self.line([(x - size, y - sign * size), (x + size, y + sign * size)], color, width=2.0)
        elif kind == "bar":
            self.line([(x, y - size), (x, y + size)], color, width=2.5)
        else:
            corners = {
                "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
                "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
                "triangle": [(0, -1.2), (1.15, 0.9), (-1.15, 0.9)],
            }[kind]
            points = [(x + size * dx, y + size * dy) for dx, dy in corners]
            self._parts.append(f'<path d="{_path(points)}Z" {style}/>')

    def text(
        self,
        at: Point,
        text: str,
        *,
        color: str = "#333333",
        anchor: str = "start",
        size: float = FONT_SIZE,
        is_bold: bool = False,
        is_upright: bool = False,
    ) -> None:
        """Write a text; `is_upright` turns it by 90 degrees to the left."""
        x, y = _number(at[0]), _number(at[1])
        attributes = f' transform="rotate(-90 {x} {y})"' if is_upright else ""
        attributes += ' font-weight="bold"' if is_bold else ""
        attributes += "" if size == FONT_SIZE else f' font-size="{_number(size)}"'
        self._parts.append(
            f'<text x="{x}" y="{y}" fill="{color}" text-anchor={quoteattr(anchor)}{attributes}>{_text(text)}</text>'
        )

    def to_bytes(self) -> bytes:
        """Return the SVG file."""
        return "\n".join([*self._parts, "</svg>", ""]).encode("ascii", "xmlcharrefreplace")


def text_width(text: str, size: float = FONT_SIZE) -> float:
    """Return the approximate width of a text, in pixels."""
    return len(printable(text)) * size * _CHAR_WIDTH


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """Return about `most` round numbers or fewer, from `low` to `high`.

    Example:
        >>> linear_ticks(0.0, 47.0, 5)
        [0.0, 10.0, 20.0, 30.0, 40.0]
    """
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low] if math.isfinite(low) else []
    rough = (high - low) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [round((first + at) * step, 12) for at in range(max(count, 0))]


def _text(text: str) -> str:
    return escape(printable(text))


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{_number(x)} {_number(y)}" for x, y in points)
