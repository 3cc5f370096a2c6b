"""Messages between the pytest process and its ranks, sent over a pipe.

A rank sends `Ready` once. Then, for each task, it

1. receives `Task`,
2. sends any number of `UserMessage`, then one `Outcome`,
3. receives `Release`, which the parent sends when every rank has an outcome,
4. destroys its process group and sends `Idle`.

A rank whose outcome is a failure exits after step 2, as a failing program does, so that its peers' collectives break. A
fresh rank exits in place of step 4.

Arguments, results and payloads travel as bytes pickled by `pack`. The receiver can therefore read a message without
importing the test's modules.
"""

import pickle
import signal
import time
from dataclasses import dataclass, field
from typing import Literal

OutcomeKind = Literal["returned", "raised", "skipped", "xfailed", "exited"]

STACK_SIGNAL = signal.SIGRTMAX - 2
"""Makes a rank write its stacks. A real-time signal, because tests use USR1, USR2 and TERM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionRef:
    """Reference to a function: by module name, or by file when the module cannot be imported by name."""

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
    """The call's number, which names its namespace in the store."""
    backend: str | None
    """Backend of the default process group; None leaves torch.distributed uninitialised."""
    collective_timeout_s: float
    warning_filters: tuple[bytes, ...]
    """`pack` of each entry of the parent's `warnings.filters`, in order."""
    fresh: bool
    """True if the process runs this task only and then ends as a program does, with an exit code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The rank has started and waits for a task."""

    pid: int
    """The rank's process id. The process that was started may be a wrapper such as strace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UserMessage:
    """A payload that the task sent with `send_to_parent`."""

    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How the function ended on this rank."""

    kind: OutcomeKind
    value: bytes = b""
    """`pack` of what it returned."""
    reason: str = ""
    """One line: the exception, or the reason for the skip."""
    traceback: str = ""
    exit_code: int = 0
    """For `exited`: the argument of `sys.exit`."""
    at_s: float = field(default_factory=time.monotonic)
    """When it ended, on the machine's monotonic clock: messages may arrive in another order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Every rank has an outcome; the rank may destroy its process group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Idle:
    """The rank can take another task, unless the task left something behind."""

    leftovers: tuple[str, ...]


def pack(value: object) -> bytes:
    """Return a test's value as bytes.

    Plain pickle, not `multiprocessing`'s: torch's reducers for that one pass tensors as file descriptors, which the
    rank's end closes.
    """
    return pickle.dumps(value, protocol=5)


def unpack(data: bytes) -> object:
    """Return the value that `pack` was given."""
    return pickle.loads(data)  # noqa: S301 - both ends are ours
