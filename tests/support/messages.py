"""What a test's process and its ranks say to each other over a pipe.

Plain data; knows neither side. Values that tests own (arguments, results, told payloads) travel as
bytes pickled by `pack`, so that a side can read a message without importing the test's modules.

A rank's life: it sends `Ready`; then per task it receives `Task`, sends any number of `Told` and one
`Outcome`, receives `Release` once every rank has an outcome, tears its process group down and sends
`Idle`. A rank whose outcome is a failure exits right after sending it, as a failing program would, so
that its neighbours' collectives break; a fresh rank exits instead of becoming idle.
"""

import pickle
from dataclasses import dataclass
from typing import Literal

OutcomeKind = Literal["returned", "raised", "skipped", "xfailed", "exited"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionRef:
    """Where a rank finds the function: by module name, or by file when the name cannot be imported."""

    module: str
    file: str
    qualname: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One function for one rank."""

    function: FunctionRef
    arguments: bytes
    """`pack((args, kwargs))`."""
    environment: dict[str, str]
    number: int
    """Of the call: names its part of the store."""
    backend: str | None
    """Backend of the default process group; None leaves it uninitialised."""
    collective_timeout_s: float
    warning_filters: tuple[bytes, ...]
    """`pack` of each entry of the parent's `warnings.filters`, in order."""
    fresh: bool
    """The rank lives for this task only and ends as a program does, with an exit code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The rank has imported torch and waits for a task."""

    pid: int
    """The rank's own; the process that was started may be a wrapper around it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """The task called `tell_parent`."""

    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How the function ended on this rank."""

    kind: OutcomeKind
    value: bytes = b""
    """`pack` of what it returned."""
    reason: str = ""
    """One line: the exception, or why it was skipped."""
    traceback: str = ""
    exit_code: int = 0
    """For `exited`: what it called `sys.exit` with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Every rank has an outcome: tear down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Idle:
    """The rank is clean again, or says what the task left behind."""

    leftovers: tuple[str, ...]


def pack(value: object) -> bytes:
    """Pickle a value that a test owns.

    Plain pickle on purpose: torch registers reducers with `multiprocessing` that pass tensors as file
    descriptors, and those die with the rank.
    """
    return pickle.dumps(value, protocol=5)


def unpack(data: bytes) -> object:
    """Undo `pack`."""
    return pickle.loads(data)  # noqa: S301 - both ends are ours
