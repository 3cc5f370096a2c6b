"""How a command ends: exit codes, and the error that is one line of text."""

from enum import IntEnum


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
    """A command cannot be carried out.

    Args:
        message: one line that says what is wrong and what to do.
        code: the exit code.
    """

    def __init__(self, message: str, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.code = code
