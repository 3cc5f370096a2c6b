"""The exceptions that distckpt raises.

The tree::

    DistckptError(Exception)
    ├── CollectiveError                 a collective failed; the process group is unusable now
    │   ├── CollectiveTimeout           some ranks did not reach it in time; ``missing`` names them
    │   └── RankLost                    a rank died, froze, left or is unreachable; ``missing`` names it
    ├── DesyncError                     ranks reached one collective from different handlers, events or steps
    ├── RemoteRankError                 some ranks failed in a phase of all ranks; raised alike on every rank
    │   └── (RemoteRankError, <cause>)  and of the cause's type where that is a common one
    ├── SaveError(OSError)              a checkpoint could not be written; older checkpoints are intact
    │   └── CommitNotDurable            it has its final name, but may not survive a power cut
    ├── ReplicasDiffer                  values that must be equal on all ranks differ (``check_replicas``)
    ├── ShardedStateError(NotImplementedError)
    │                                   a state or an object is sharded over ranks
    └── LoadError
        ├── CorruptCheckpointError(RuntimeError, pickle.UnpicklingError, EOFError)
        │                               the file is no checkpoint, or is truncated or damaged
        ├── UnsafeCheckpoint(pickle.UnpicklingError)
        │                               loading the file would execute code; no code was executed
        ├── UnsupportedCheckpoint(RuntimeError, pickle.UnpicklingError)
        │                               the file is intact, but newer, encrypted or of another format
        ├── StateMismatchError          keys or shapes are missing, unexpected or mismatched
        │   └── (StateMismatchError, <kind>)    and of each object's own error type
        └── PartialLoadError            some objects hold neither the old state nor the new
            └── (PartialLoadError, <kind>)      and of the cause's type, such as OSError

A caller's mistake, such as a wrong type or a name that leaves the directory, is a ``TypeError`` or ``ValueError``.
A failure in a phase of all ranks is a :class:`RemoteRankError` on every rank. It is also of the failing rank's type:
``except OSError`` still catches a full disk, on every rank.
"""

import builtins
import functools
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "CollectiveError",
    "CollectiveTimeout",
    "CommitNotDurable",
    "CorruptCheckpointError",
    "DesyncError",
    "DistckptError",
    "LoadError",
    "PartialLoadError",
    "RankFailure",
    "RankLost",
    "RemoteRankError",
    "RemoteTraceback",
    "ReplicasDiffer",
    "SaveError",
    "ShardedStateError",
    "StateMismatchError",
    "UnsafeCheckpoint",
    "UnsupportedCheckpoint",
]


class DistckptError(Exception):
    """Base class of distckpt's errors."""

    def __str__(self) -> str:
        """Return the message unchanged; ``KeyError`` and ``OSError`` would change it."""
        return str(self.args[0]) if self.args else ""


class CollectiveError(DistckptError):
    """A collective failed: a rank is gone, or the process group was given up before.

    Args:
        message: what was attempted, on which rank, and what is known of the other ranks.
        missing: the ranks that did not reach the collective, as far as known.
    """

    def __init__(self, message: str, missing: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.missing = tuple(missing)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle ``missing`` too."""
        return (type(self), (str(self), self.missing))


class CollectiveTimeout(CollectiveError):  # noqa: N818 - public name, without the suffix as RankLost
    """Some ranks did not reach a collective in time; ``missing`` names them."""


class RankLost(CollectiveError):  # noqa: N818 - public name
    """A rank died, froze, left the job or is unreachable; ``missing`` names it. Raised on the remaining ranks."""


class RemoteTraceback(Exception):  # noqa: N818 - not an error itself: it shows another rank's
    """Another rank's traceback, as the ``__cause__`` of the error that this rank raises."""

    def __str__(self) -> str:
        """Return the traceback as text."""
        return f"\n{self.args[0]}" if self.args else ""


class DesyncError(DistckptError):
    """Ranks reached one collective from different handlers, events or steps."""


class SaveError(DistckptError, OSError):
    """A checkpoint could not be written. Older checkpoints are intact.

    Args:
        message: what failed, and which checkpoint is intact.
        cause: the operating system's error, which gives ``errno`` and ``strerror``.
    """

    def __init__(self, message: str, cause: OSError | None = None) -> None:
        super().__init__(message)
        if cause is not None:
            self.errno, self.strerror = cause.errno, cause.strerror

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the names of the types: a mixed class cannot be imported."""
        return (_rebuild_save_error, (str(self), self.errno, self.strerror, type_names(self)))


class CommitNotDurable(SaveError):  # noqa: N818 - public name
    """The checkpoint has its final name, but its directory could not be synced.

    It loads now, but may be lost in a power cut. So the older checkpoint is kept.
    """


class ReplicasDiffer(DistckptError):  # noqa: N818 - public name
    """Values that must be equal on all ranks differ: a DDP module's parameters, or their optimizer's state."""


class ShardedStateError(DistckptError, NotImplementedError):
    """A state or an object is sharded: each rank holds a part of it. Nothing was written or loaded."""


class LoadError(DistckptError):
    """A checkpoint could not be read, or does not fit. Objects are unchanged, except for a PartialLoadError."""


class CorruptCheckpointError(LoadError, RuntimeError, pickle.UnpicklingError, EOFError):
    """The file is no checkpoint, or is truncated or damaged."""


class UnsafeCheckpoint(LoadError, pickle.UnpicklingError):  # noqa: N818 - public name
    """The checkpoint holds objects that only code execution could load. No code was executed."""


class UnsupportedCheckpoint(LoadError, RuntimeError, pickle.UnpicklingError):  # noqa: N818 - public name
    """The file is intact, but this distckpt cannot read it: it is newer, encrypted or of another format."""


class StateMismatchError(LoadError):
    """A checkpoint does not fit the objects. No object was changed.

    Args:
        message: which keys each object lacks or has in excess.
        missing: keys that an object has and the checkpoint lacks, such as ``model.bias``.
        unexpected: keys that the checkpoint has and the object lacks.
        mismatched: keys whose shape or type differs.
    """

    def __init__(
        self, message: str, missing: Sequence[str] = (), unexpected: Sequence[str] = (), mismatched: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = tuple(mismatched)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the names of the types: a mixed class cannot be imported."""
        keys = (self.missing, self.unexpected, self.mismatched)
        return (state_mismatch_error, (str(self), type_names(self), *keys))


class PartialLoadError(LoadError):
    """A load failed, and some objects hold neither the old state nor the new; the message names them."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the names of the types: a mixed class cannot be imported."""
        return (partial_load_error, (str(self), type_names(self)))


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailure:
    """One rank's exception, in a form that other ranks can receive.

    Attributes:
        rank: the rank that failed.
        kinds: names of the exception's type and of its bases, nearest first.
        message: ``str`` of the exception.
        errno: the operating system's error number; None if it has none.
        traceback: the formatted traceback.
    """

    rank: int
    kinds: tuple[str, ...]
    message: str
    errno: int | None
    traceback: str

    @classmethod
    def from_exception(cls, rank: int, error: BaseException, traceback_text: str) -> "RankFailure":
        """Describe `error` as it was caught on `rank`."""
        try:
            message = str(error)
        except Exception as failed:  # noqa: BLE001 - a user's __str__ may fail, and the other ranks wait
            message = f"<its text could not be made: {type(failed).__name__}>"
        number = getattr(error, "errno", None)
        return cls(
            rank=rank,
            kinds=type_names(error),
            message=message,
            errno=number if isinstance(number, int) else None,
            traceback=traceback_text,
        )


class RemoteRankError(DistckptError):
    """One or more ranks failed in a phase of all ranks.

    Every rank raises it with the same type, message and failures. On a rank that failed, ``__cause__`` is its own
    exception.

    Args:
        phase: what the ranks were doing, with step and place.
        failures: one for each rank that failed, by rank.
    """

    def __init__(self, phase: str, failures: Sequence[RankFailure]) -> None:
        self.phase = phase
        self.failures = tuple(failures)
        # The lowest rank's message leads, because programs match leading words.
        first = self.failures[0]
        others = [f"rank {f.rank}: {f.kinds[0]}: {f.message}" for f in self.failures[1:] if f.message != first.message]
        ranks = ", ".join(str(f.rank) for f in self.failures)
        where = f"({first.kinds[0]} on rank {ranks}, while: {phase})"
        super().__init__("\n".join([f"{first.message} {where}".strip(), *others]))
        if isinstance(self, OSError):
            self.errno = first.errno

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the failures: a mixed class cannot be imported."""
        return (remote_rank_error, (self.phase, self.failures))

    def tracebacks(self) -> str:
        """Return the traceback of every rank that failed, as text."""
        return "\n".join(f"--- rank {f.rank} ---\n{f.traceback}" for f in self.failures)


# Builtin types that can be mixed with each class of this module, and that programs catch.
_BUILTIN_NAMES = """
    ArithmeticError AssertionError AttributeError FileExistsError FileNotFoundError IndexError IsADirectoryError
    KeyError MemoryError NotADirectoryError NotImplementedError OSError PermissionError RuntimeError TimeoutError
    TypeError ValueError
"""
_BUILTIN: dict[str, type[Exception]] = {name: getattr(builtins, name) for name in _BUILTIN_NAMES.split()}
_BUILTIN["PicklingError"] = pickle.PicklingError
_OWN: dict[str, type[Exception]] = {
    name: kind
    for name, kind in list(globals().items())
    if isinstance(kind, type) and issubclass(kind, DistckptError) and kind not in (DistckptError, RemoteRankError)
}


def type_names(error: BaseException) -> tuple[str, ...]:
    """Return the names of an exception's type and of its bases, nearest first."""
    return tuple(base.__name__ for base in type(error).__mro__)


def remote_rank_error(phase: str, failures: Sequence[RankFailure]) -> RemoteRankError:
    """Return the error that all ranks raise for `failures`; it is of the first failure's type too.

    Args:
        phase: what the ranks were doing.
        failures: at least one, sorted by rank.

    Example:
        >>> error = remote_rank_error("save a.pt", [RankFailure.from_exception(1, OSError(28, "No space left"), "")])
        >>> isinstance(error, RemoteRankError), isinstance(error, OSError), error.errno
        (True, True, 28)
    """
    kinds = failures[0].kinds
    own = _nearest(_OWN, kinds) if DistckptError.__name__ in kinds else []  # a program's class may have the same name
    mixed = _mixed((RemoteRankError, *own, *_nearest(_BUILTIN, kinds)))
    error: RemoteRankError = mixed(phase, failures)
    return error


def save_error(message: str, cause: OSError, *, renamed: bool = False) -> SaveError:
    """Return the error of a failed save; it is of the cause's type too.

    Args:
        message: what failed, and which checkpoint is intact.
        cause: the operating system's error.
        renamed: True if the checkpoint has its final name, but is not durable.

    Example:
        >>> isinstance(save_error("gone", FileNotFoundError(2, "No such file")), FileNotFoundError)
        True
    """
    own = CommitNotDurable if renamed else SaveError
    error: SaveError = _mixed((own, *_nearest(_BUILTIN, type_names(cause))))(message, cause)
    return error


def _rebuild_save_error(message: str, number: int | None, text: str | None, kinds: tuple[str, ...]) -> SaveError:
    cause = OSError(number, text) if number is not None else OSError(text)
    return save_error(message, cause, renamed="CommitNotDurable" in kinds)


def state_mismatch_error(
    message: str,
    kinds: Sequence[str],
    missing: Sequence[str] = (),
    unexpected: Sequence[str] = (),
    mismatched: Sequence[str] = (),
) -> StateMismatchError:
    """Return a StateMismatchError that is a ValueError, a RuntimeError or both too, as `kinds` says by name.

    Example:
        >>> error = state_mismatch_error("no", ["ValueError", "RuntimeError"], missing=["model.bias"])
        >>> isinstance(error, ValueError), isinstance(error, RuntimeError), error.missing
        (True, True, ('model.bias',))
    """
    mixins = [base for base in (ValueError, RuntimeError) if base.__name__ in kinds]
    error: StateMismatchError = _mixed((StateMismatchError, *mixins))(message, missing, unexpected, mismatched)
    return error


def partial_load_error(message: str, kinds: Sequence[str]) -> PartialLoadError:
    """Return a PartialLoadError that is of the cause's type too, if that is a common one.

    Args:
        message: what failed, and which objects have to be loaded again.
        kinds: the cause's :func:`type_names`.

    Example:
        >>> isinstance(partial_load_error("gone", type_names(KeyError("weight"))), KeyError)
        True
    """
    common = {base.__name__: base for base in (OSError, KeyError, RuntimeError, TypeError, ValueError)}
    error: PartialLoadError = _mixed((PartialLoadError, *_nearest(common, kinds)))(message)
    return error


def _nearest(known: Mapping[str, type[Exception]], kinds: Sequence[str]) -> list[type[Exception]]:
    return [known[kind] for kind in kinds if kind in known][:1]


@functools.cache
def _mixed(bases: tuple[type[Exception], ...]) -> type[Any]:
    # A base that another one derives from already would break the method resolution order.
    needed = [base for base in bases if not any(other is not base and issubclass(other, base) for other in bases)]
    if len(needed) == 1:
        return needed[0]
    # The class has the documented name.
    return type(needed[0].__name__, tuple(needed), {"__doc__": needed[0].__doc__, "__module__": __name__})
