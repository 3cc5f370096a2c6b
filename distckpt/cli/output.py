"""Print tables and lines for people, or JSON for programs; define the exit codes.

Text from files and file names is printed without control characters, which could change a terminal's state. In a
terminal, a table is at most as wide as the terminal: the least important columns are left out first, then long texts
are wrapped, then the longest names are cut. In a pipe, each row is one whole line. If rich is installed, it adds styles
in a terminal.
"""

import json
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple, TextIO

from distckpt._values import to_json_value

_GAP = 2
_LEAST_SHRUNK = 12
_LEAST_WRAPPED = 24
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_UNIT = 1024
_AGES = ((60.0, 1.0, "s"), (3600.0, 60.0, "min"), (48 * 3600.0, 3600.0, "h"))
_STYLES = {
    "complete": "green",
    "whole": "green",
    "damaged": "bold red",
    "unreadable": "bold red",
    "left over": "yellow",
    "being written": "yellow",
    "delete": "bold red",
    "keep": "green",
}


class ExitCode(IntEnum):
    """The exit codes of all commands."""

    OK = 0
    FOUND = 1
    """Something is wrong with a checkpoint, two checkpoints differ, or there is none."""
    FAILED = 2
    """The command could not be carried out. argparse uses the same code for wrong arguments."""
    INTERRUPTED = 130
    PIPE_CLOSED = 141
    TERMINATED = 143


class CommandError(Exception):
    """The command cannot be carried out.

    Args:
        message: one line that says what failed and what to do.
        code: the exit code.
    """

    def __init__(self, message: str, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.code = code


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        title: the heading.
        is_number: align the texts to the right.
        can_shrink: long texts may be cut in the middle.
        can_wrap: long texts may continue on further lines.
        is_optional: leave the column out in a terminal if all its texts are ``-``.
        least_width: leave the column out in a terminal of fewer characters; 0 to keep it always.
    """

    title: str
    is_number: bool = False
    can_shrink: bool = False
    can_wrap: bool = False
    is_optional: bool = False
    least_width: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of texts.

    Attributes:
        title: lines above the table; empty for none.
        columns: the columns.
        rows: the rows, each with one text per column.
    """

    title: str = ""
    columns: Sequence[Column]
    rows: list[Sequence[str]] = field(default_factory=list)

    def fitted(self, width: int | None) -> "Table":
        """Return the table fitted into `width` characters as far as possible; None for no limit."""
        texts = [[printable(text) for text in row] for row in self.rows]
        numbers = list(range(len(self.columns)))
        if width is not None:
            numbers = [
                number
                for number, column in enumerate(self.columns)
                if column.least_width <= width and not (column.is_optional and all(row[number] == "-" for row in texts))
            ]
        columns = [self.columns[number] for number in numbers]
        rows: list[Sequence[str]] = [[row[number] for number in numbers] for row in texts]
        for number, column in enumerate(columns):
            widths = _widths(columns, rows)
            excess = _excess(widths, width)
            if column.can_wrap and excess > 0:
                size = max(widths[number] - excess, _LEAST_WRAPPED)
                rows = [piece for row in rows for piece in _wrap_cell(row, number, size)]
        widths = _widths(columns, rows)
        for number, column in enumerate(columns):
            excess = _excess(widths, width)
            if column.can_shrink and excess > 0:
                widths[number] = max(widths[number] - excess, min(_LEAST_SHRUNK, widths[number]))
                rows = [
                    row if _is_wide(row) else [*row[:number], shorten(row[number], widths[number]), *row[number + 1 :]]
                    for row in rows
                ]
        if width is not None:
            rows = [[shorten(row[0], width), *row[1:]] if _is_wide(row) else row for row in rows]
        title = "\n".join(wrap(printable(self.title), width))
        return Table(title=title, columns=columns, rows=rows)

    def cells(self) -> list[list[str]]:
        """Return the texts of the heading and of all rows, padded to the widths of their columns."""
        widths = _widths(self.columns, self.rows)
        found = []
        for row in ([column.title for column in self.columns], *self.rows):
            if _is_wide(row):
                found.append([row[0]])
                continue
            found.append(
                [
                    text.rjust(size) if column.is_number else text.ljust(size)
                    for text, size, column in zip(row, widths, self.columns, strict=True)
                ]
            )
        return found

    def lines(self) -> list[str]:
        """Return the table as lines of plain text."""
        return [*self.title.splitlines(), *((" " * _GAP).join(cells).rstrip() for cells in self.cells())]


def _is_wide(row: Sequence[str]) -> bool:
    """Return True for a row whose first text extends over all columns."""
    return len(row) > 1 and not any(row[1:])


def _widths(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[int]:
    narrow = [row for row in rows if not _is_wide(row)]
    return [max([len(one.title), *(len(row[at]) for row in narrow)]) for at, one in enumerate(columns)]


def _excess(widths: Sequence[int], width: int | None) -> int:
    """Return the number of characters by which a table is too wide."""
    return 0 if width is None else sum(widths) + _GAP * (len(widths) - 1) - width


def _wrap_cell(row: Sequence[str], number: int, size: int) -> list[Sequence[str]]:
    """Return a row, and the rows in which text number `number` continues."""
    if _is_wide(row):
        return [row]
    first, *others = wrap(row[number], size)
    more = [["" if at != number else text for at in range(len(row))] for text in others]
    return [[*row[:number], first, *row[number + 1 :]], *more]


def wrap(text: str, width: int | None) -> list[str]:
    """Return the lines of a text, of at most `width` characters unless a word is longer; None for no limit."""
    if width is None:
        return [text]
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


class Output:
    """The output of a command.

    Args:
        stream: standard output.
        is_json: print only JSON.
        width: the terminal's width in characters; None if `stream` is not a terminal.

    Attributes:
        is_json: the argument.
    """

    def __init__(self, stream: TextIO, *, is_json: bool = False, width: int | None = None) -> None:
        self._stream = stream
        self._width = width
        self.is_json = is_json

    @classmethod
    def to(cls, stream: TextIO, *, is_json: bool) -> "Output":
        """Return an output that fits `stream`."""
        return cls(stream, is_json=is_json, width=shutil.get_terminal_size().columns if stream.isatty() else None)

    def line(self, text: str = "") -> None:
        """Print a line for people."""
        if self.is_json:
            return
        self._stream.writelines(f"{line}\n" for line in wrap(printable(text), self._width))

    def table(self, table: Table) -> None:
        """Print a table for people."""
        if self.is_json:
            return
        fitted = table.fitted(self._width)
        if self._width is None or not _print_by_rich(fitted, self._stream):
            self._stream.writelines(f"{line}\n" for line in fitted.lines())

    def json(self, value: Any) -> None:
        """Print JSON for programs."""
        if self.is_json:
            self._stream.write(json.dumps(to_json_value(value), indent=1, allow_nan=False, default=str) + "\n")


def _print_by_rich(table: Table, stream: TextIO) -> bool:
    """Print a fitted table with styles; return False if rich is not installed."""
    try:
        from rich.console import Console  # noqa: PLC0415 - optional, and slow to import
        from rich.text import Text  # noqa: PLC0415 - as above
    except ImportError:
        return False
    console = Console(file=stream, highlight=False)
    if table.title:
        console.print(Text(table.title, style="bold"), soft_wrap=True)
    for number, cells in enumerate(table.cells()):
        styles = ["bold" if number == 0 else _STYLES.get(cell.strip(), "") for cell in cells]
        line = Text(" " * _GAP).join(Text(cell, style) for cell, style in zip(cells, styles, strict=True))
        line.rstrip()
        console.print(line, soft_wrap=True)
    return True


def printable(text: str) -> str:
    r"""Return a text with escapes for characters that are not printable, such as control characters.

    Example:
        >>> printable("a\x1b[2Jb\udce9")
        'a\\x1b[2Jb\\udce9'
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def shorten(text: str, width: int) -> str:
    """Return a text of at most `width` characters, cut in the middle.

    Example:
        >>> shorten("checkpoint_1000.pt", 12)
        'checkp~00.pt'
    """
    if len(text) <= width:
        return text
    last = (width - 1) // 2
    return f"{text[: width - 1 - last]}~{text[len(text) - last :]}"


def format_bytes(num_bytes: float) -> str:
    """Return a number of bytes with a unit.

    Example:
        >>> format_bytes(17), format_bytes(1536), format_bytes(3 << 30)
        ('17 B', '1.5 KiB', '3.0 GiB')
    """
    amount = float(num_bytes)
    for unit in _UNITS:
        if amount < _UNIT or unit == _UNITS[-1]:
            break
        amount /= _UNIT
    return f"{num_bytes:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"


def format_age(age_s: float) -> str:
    """Return an age with a unit.

    Example:
        >>> format_age(5.2), format_age(130), format_age(86400), format_age(10 * 86400)
        ('5 s', '2 min', '24 h', '10 d')
    """
    age_s = max(age_s, 0.0)
    for limit_s, unit_s, unit in _AGES:
        if age_s < limit_s:
            return f"{int(age_s / unit_s)} {unit}"
    return f"{int(age_s / 86400)} d"


def format_number(value: float | None) -> str:
    """Return a number as tables show it.

    Example:
        >>> format_number(None), format_number(7), format_number(0.123456789), format_number(float("nan"))
        ('-', '7', '0.1235', 'nan')
    """
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def count(number: int, noun: str) -> str:
    """Return a number with its noun.

    Example:
        >>> count(1, "file"), count(2, "file")
        ('1 file', '2 files')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"
