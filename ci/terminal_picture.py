"""Draw what a command shows in a real terminal (tmux) as an SVG picture, for the documentation.

    python ci/terminal_picture.py docs/ls.svg --columns 100 -- distckpt ls run

The command runs in the present directory, in a terminal of its own. Needs tmux and rich.
"""

import argparse
import io
import re
import shlex
import subprocess
import sys
import uuid
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME
from rich.text import Text

LIMIT_S = 60
LINES = 50


def show_in_terminal(command: list[str], columns: int) -> str:
    """Run a command in a terminal of `columns` x `LINES`; return what stands there, with its colours."""
    name = f"picture-{uuid.uuid4().hex[:8]}"
    tmux = ["tmux", "-L", name, "-f", "/dev/null"]  # a server of its own
    shell = f"{shlex.join(command)}; tmux -L {name} wait-for -S done; exec cat"  # cat keeps the terminal open
    try:
        start = [*tmux, "new-session", "-d", "-s", name, "-x", str(columns), "-y", str(LINES), shell]
        subprocess.run(start, check=True, timeout=LIMIT_S)
        subprocess.run([*tmux, "wait-for", "done"], check=True, timeout=LIMIT_S)
        capture = [*tmux, "capture-pane", "-p", "-e", "-t", name]
        return subprocess.run(capture, check=True, timeout=LIMIT_S, capture_output=True, text=True).stdout.rstrip()
    finally:
        subprocess.run([*tmux, "kill-server"], check=False, timeout=LIMIT_S)


def main() -> int:
    """Draw the picture; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--columns", type=int, default=100)
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    shown = show_in_terminal(arguments.command, arguments.columns)
    console = Console(record=True, width=arguments.columns, file=io.StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "bold"), shlex.join(arguments.command)))
    console.print(Text.from_ansi(shown))
    svg = console.export_svg(title="", theme=DEFAULT_TERMINAL_THEME)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # a picture in a page loads no fonts
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    arguments.out.write_text(svg, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
