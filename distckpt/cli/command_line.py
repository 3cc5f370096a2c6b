"""Parse the arguments of the command ``distckpt``, and print its errors.

A command's module is imported when the command is called. torch is imported only by commands that need it.
"""

import argparse
import contextlib
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from distckpt.cli.output import CommandError, ExitCode, Output, printable
from distckpt.errors import CorruptCheckpointError, DistckptError
from distckpt.policy.policies import EveryHours

if TYPE_CHECKING:
    from types import FrameType

_EPILOG = """exit codes: 0 all is well; 1 a checkpoint is damaged, two differ, or there is none; 2 the command could not
be carried out; 130 interrupted"""


class _Terminated(BaseException):
    """SIGTERM arrived."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code.

    Args:
        arguments: the command line without the program's name; None for that of this process.

    Example:
        >>> main(["ls", "/dev/null"])  # prints "distckpt: /dev/null is no directory: ..."
        2
    """
    parsed = build_parser().parse_args(arguments)
    stream: TextIO = sys.stdout or io.StringIO()  # None if it was closed
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    output = Output.to(stream, is_json=parsed.json)
    before = _raise_on_sigterm()
    try:
        run: Callable[[argparse.Namespace, Output], int] = importlib.import_module(parsed.module).run
        code = int(run(parsed, output))
        stream.flush()
    except (KeyboardInterrupt, _Terminated, CommandError, DistckptError, OSError, MemoryError) as error:
        return int(_fail(error))
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return code


def _fail(error: BaseException) -> int:
    """Print one line that says why the command failed; return the exit code."""
    if isinstance(error, BrokenPipeError):
        with contextlib.suppress(OSError, ValueError):  # the interpreter flushes standard output at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.PIPE_CLOSED
    code, message = ExitCode.FAILED, str(error)
    if isinstance(error, KeyboardInterrupt | _Terminated):
        is_signal = isinstance(error, _Terminated)
        message, code = ("terminated", ExitCode.TERMINATED) if is_signal else ("interrupted", ExitCode.INTERRUPTED)
    elif isinstance(error, CommandError):
        code = error.code
    elif isinstance(error, CorruptCheckpointError):
        code = ExitCode.FOUND
    elif isinstance(error, MemoryError):
        message = "there is not enough memory"
    elif isinstance(error, OSError) and not isinstance(error, DistckptError):
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        message = f"{where}{error.strerror or error}"
    with contextlib.suppress(OSError):  # standard error may be closed too
        sys.stderr.write(f"distckpt: {printable(' '.join(message.split()))}\n")
    return code


def _raise_on_sigterm() -> Callable[[int, "FrameType | None"], object] | int | None:
    """Let SIGTERM end a command as Ctrl-C does, with its clean-up. Return the previous signal handler."""

    def end(_signal: int, _frame: "FrameType | None") -> None:
        raise _Terminated

    try:
        return signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread
        return None


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="distckpt", description="Look at checkpoints.", epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"distckpt {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, module: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=_EPILOG)
        command.add_argument("--json", action="store_true", help="print JSON for programs")
        command.set_defaults(module=f"distckpt.cli.{module}")
        return command

    command = add("ls", "listing", "list the checkpoints of a directory, and why each is kept")
    command.add_argument("directory", type=Path, metavar="DIR")
    command.add_argument("-r", "--recursive", action="store_true", help="search sub-folders too")
    command.add_argument("--verify", action="store_true", help="read every byte, as the command verify does")

    command = add("inspect", "inspection", "show a checkpoint's manifest and its tensors")
    command.add_argument("file", type=Path, metavar="FILE")
    command.add_argument("--key", metavar="NAME", help="show what is below this key, with values, such as model.weight")
    command.add_argument("--no-norms", dest="norms", action="store_false", help="do not read the tensors' data")

    command = add("verify", "verification", "compare every byte of checkpoints with their checksums")
    command.add_argument("path", type=Path, metavar="FILE|DIR")
    command.add_argument("-r", "--recursive", action="store_true", help="search sub-folders too")

    command = add("diff", "comparison", "compare two checkpoints key by key")
    command.add_argument("first", type=Path, metavar="A")
    command.add_argument("second", type=Path, metavar="B")

    command = add("convert", "conversion", "write a checkpoint in another format")
    command.add_argument("file", type=Path, metavar="FILE")
    command.add_argument(
        "out", type=Path, metavar="OUT", help="NAME.pt, NAME.safetensors, or NAME for a directory of DCP"
    )
    command.add_argument("--only", metavar="NAME", help="only what is below this key, such as model")
    command.add_argument(
        "--to", choices=("pt", "safetensors", "dcp"), help="the format, if OUT's name does not tell it"
    )
    command.add_argument("--force", action="store_true", help="replace an existing file")

    command = add("prune", "pruning", "delete the checkpoints that no rule keeps; without --yes only tell which")
    command.add_argument("directory", type=Path, metavar="DIR")
    command.add_argument("--keep-last", type=_number, metavar="N", help="keep the N newest of each handler")
    command.add_argument("--keep-best", type=_number, metavar="K", help="keep the K of highest score of each handler")
    command.add_argument(
        "--keep-every", type=_number, metavar="M", help="keep the first at or after each multiple of M steps"
    )
    command.add_argument("--keep-hours", type=_hours, metavar="H", help="keep the first of each period of H hours")
    command.add_argument("-r", "--recursive", action="store_true", help="search sub-folders too")
    command.add_argument("--yes", action="store_true", help="delete")

    command = add("plot", "plotting", "draw the timeline of a directory's runs: saves, scores, stops, lost work")
    command.add_argument("directory", type=Path, metavar="DIR")
    command.add_argument("-o", "--out", type=Path, metavar="FILE.svg", help="the picture; replaced if it is there")
    return parser


def _number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _hours(text: str) -> float:
    try:
        return EveryHours(float(text)).hours
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _version() -> str:
    try:
        return metadata.version("distckpt")
    except metadata.PackageNotFoundError:  # run from a source folder
        return "(not installed)"
