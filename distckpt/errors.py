"""The exceptions distckpt raises, and how one rank's error becomes everybody's.

Owns the exception tree and nothing else; must not know about backends, files or handlers.

The tree::

    DistckptError(Exception)
    ├── CollectiveError                 a collective could not be completed; the group is unusable now
    │   ├── CollectiveTimeout           ... because some ranks did not come in time (``missing`` names them)
    │   └── RankLost                    ... because a rank died, froze, left or cannot be reached
    ├── DesyncError               ranks came to the same collective from different places
    ├── RemoteRankError                      one or more ranks failed in a phase that all ranks walk together;
    │   └── (RemoteRankError, <cause>)       raised alike on every rank, and caught as the cause's type too
    ├── SaveError(OSError)              a checkpoint could not be written; what was there before stands
    │   └── CommitNotDurable            it was renamed into place, but may not survive a power cut
    ├── ReplicasDiffer                  what has to be equal on all ranks is not (``check_replicas``)
    ├── ShardedStateError(NotImplementedError)
    │                                   a state or object is sharded over ranks; nothing was written or loaded
    └── LoadError
        ├── CorruptCheckpointError(RuntimeError, pickle.UnpicklingError, EOFError)
        │                               the file is no checkpoint, or is truncated or damaged
        ├── UnsafeCheckpoint(pickle.UnpicklingError)
        │                               it holds objects that loading would have to execute; nothing was
        ├── UnsupportedCheckpoint(RuntimeError, pickle.UnpicklingError)
        │                               the file is sound, and of a kind that is not read here: newer, encrypted, ...
        ├── StateMismatchError                  keys or shapes are missing, unexpected or mismatched
        │   └── (StateMismatchError, <kind>)    of the types that each object's own error is of
        └── PartialLoadError                some objects hold neither the old state nor the new
            └── (PartialLoadError, <kind>)  of the type of what went wrong, e.g. OSError where storage failed

A mistake of the caller (a wrong type, a name that leaves the directory) is a plain ``TypeError`` or
``ValueError``. A failure inside a phase that all ranks walk together reaches all of them as one
:class:`RemoteRankError` which is *also* of the failing rank's type where that is a common one
(``except OSError`` goes on catching a full disk, on every rank).
"""

import functools
import pickle
from collections.abc import Sequence
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
    """Base of every error of distckpt's own."""

    def __str__(self) -> str:
        """Return the message as it was given (``KeyError`` and ``OSError`` would dress it up)."""
        return str(self.args[0]) if self.args else ""


class CollectiveError(DistckptError):
    """A collective could not be completed: a peer is gone, or the group was given up before.

    Args:
        message: what was attempted, on which rank, and what is known of the others.
        missing: the ranks that did not come, as far as known.
    """

    def __init__(self, message: str, missing: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.missing = tuple(missing)

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep ``missing`` when the error travels between processes."""
        return (type(self), (str(self), self.missing))


class CollectiveTimeout(CollectiveError):  # noqa: N818 - the name is the sentence; it is public API
    """Some ranks did not come to a collective in time; ``missing`` names them."""


class RankLost(CollectiveError):  # noqa: N818 - the name is the sentence; it is public API
    """A rank died, froze, left the job or cannot be reached; ``missing`` names it. Raised on all that are left."""


class RemoteTraceback(Exception):  # noqa: N818 - it is no error of this rank's, only its story
    """What another rank's exception looked like there; the cause of the error that this rank raises."""

    def __str__(self) -> str:
        """Return the traceback, as text."""
        return f"\n{self.args[0]}" if self.args else ""


class DesyncError(DistckptError):
    """Ranks came to one collective from different handlers, events or steps."""


class SaveError(DistckptError, OSError):
    """A checkpoint could not be written. What was committed before is untouched.

    Args:
        message: what happened, and what stands.
        cause: the operating system's error; its ``errno`` and ``strerror`` are taken over.
    """

    def __init__(self, message: str, cause: OSError | None = None) -> None:
        super().__init__(message)
        if cause is not None:
            self.errno, self.strerror = cause.errno, cause.strerror

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild through :func:`_rebuild_save_error`: the mixed-in types have no importable name."""
        kinds = tuple(base.__name__ for base in type(self).__mro__)
        return (_rebuild_save_error, (str(self), self.errno, self.strerror, kinds))


class CommitNotDurable(SaveError):  # noqa: N818 - the name is the sentence; it is public API
    """The checkpoint stands under its name, but the directory could not be synced.

    It loads now; after a power cut it may be gone. The older checkpoint has been kept for that reason.
    """


class ReplicasDiffer(DistckptError):  # noqa: N818 - the name is the sentence; it is public API
    """What has to be equal on all ranks is not: parameters of a DistributedDataParallel, or their optimizer's state."""


class ShardedStateError(DistckptError, NotImplementedError):
    """A state or an object is sharded: each rank holds a part of it. Nothing was written, and nothing was loaded."""


class LoadError(DistckptError):
    """A checkpoint could not be read or does not fit. No live object was changed, unless it is a PartialLoadError."""


class CorruptCheckpointError(LoadError, RuntimeError, pickle.UnpicklingError, EOFError):
    """The file is no checkpoint, or is truncated or damaged."""


class UnsafeCheckpoint(LoadError, pickle.UnpicklingError):  # noqa: N818 - public name
    """The checkpoint holds objects that can only be loaded by executing code. Nothing was executed."""


class UnsupportedCheckpoint(LoadError, RuntimeError, pickle.UnpicklingError):  # noqa: N818 - public name
    """The file is not damaged, but this distckpt cannot read it: of a newer schema, encrypted, another format."""


class StateMismatchError(LoadError):
    """A checkpoint and the objects it is for do not fit together. No live object was changed.

    Args:
        message: what each object lacks, or has too much.
        missing: keys that objects have and the checkpoint lacks, each behind its object's name.
        unexpected: keys that the checkpoint has for an object which lacks them.
        mismatched: keys whose shape or kind is another one.
    """

    def __init__(
        self,
        message: str,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        mismatched: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = tuple(mismatched)

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild through :func:`does_not_fit`: the mixed-in types have no importable name."""
        kinds = tuple(base.__name__ for base in type(self).__mro__)
        return (does_not_fit, (str(self), kinds, self.missing, self.unexpected, self.mismatched))


class PartialLoadError(LoadError):
    """A load failed, and some objects hold neither the old nor the new state; the message names them."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild through :func:`_rebuild_partly_loaded`: the mixed-in types have no importable name."""
        return (_rebuild_partly_loaded, (str(self), tuple(base.__name__ for base in type(self).__mro__)))


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailure:
    """What went wrong on one rank, in a form that travels between ranks.

    Attributes:
        rank: the rank that failed.
        kinds: names of the exception's type and of its bases, nearest first.
        message: ``str`` of the exception.
        errno: the operating system's error number, if it had one.
        traceback: the formatted traceback on that rank.
    """

    rank: int
    kinds: tuple[str, ...]
    message: str
    errno: int | None
    traceback: str

    @classmethod
    def of(cls, rank: int, error: BaseException, traceback_text: str) -> "RankFailure":
        """Describe `error` as it was caught on `rank`."""
        number = getattr(error, "errno", None)
        return cls(
            rank=rank,
            kinds=tuple(base.__name__ for base in type(error).__mro__),
            message=_text_of(error),
            errno=number if isinstance(number, int) else None,
            traceback=traceback_text,
        )


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as again:  # noqa: BLE001 - a user's __str__ may fail too; the other ranks wait for an answer
        return f"<its text could not be made: {type(again).__name__}>"


class RemoteRankError(DistckptError):
    """One or more ranks failed in a phase that all ranks walk together.

    Raised on every rank alike, with the same type, message and failures. On a rank that failed itself
    ``__cause__`` is its own exception.

    Args:
        phase: what the ranks were doing, with step and place.
        failures: one entry for each rank that failed, by rank.

    Attributes:
        phase: see above.
        failures: see above.
    """

    def __init__(self, phase: str, failures: Sequence[RankFailure]) -> None:
        self.phase = phase
        self.failures = tuple(failures)
        # Where the failures differ, the message of the lowest rank leads: programs match on leading words.
        first = self.failures[0]
        others = [f"rank {f.rank}: {f.kinds[0]}: {f.message}" for f in self.failures[1:] if f.message != first.message]
        ranks = ", ".join(str(f.rank) for f in self.failures)
        where = f"({first.kinds[0]} on rank {ranks}, while: {phase})"
        super().__init__("\n".join([f"{first.message} {where}".strip(), *others]))
        if isinstance(self, OSError):
            self.errno = first.errno

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild through :func:`phase_error`: the mixed-in types have no importable name."""
        return (phase_error, (self.phase, self.failures))

    def tracebacks(self) -> str:
        """Return the traceback of every failing rank, as text."""
        return "\n".join(f"--- rank {f.rank} ---\n{f.traceback}" for f in self.failures)


# Nearest first: of each list the first one found among the bases of what was raised is mixed in.
_OURS: tuple[type[Exception], ...] = (
    CommitNotDurable,
    SaveError,
    CorruptCheckpointError,
    UnsafeCheckpoint,
    StateMismatchError,
    PartialLoadError,
    LoadError,
    RankLost,
    CollectiveTimeout,
    CollectiveError,
    DesyncError,
    ShardedStateError,
)
_BUILTIN: tuple[type[Exception], ...] = (
    TimeoutError,
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    NotADirectoryError,
    IsADirectoryError,
    OSError,
    KeyError,
    IndexError,
    AttributeError,
    NotImplementedError,
    MemoryError,
    AssertionError,
    pickle.PicklingError,
    ArithmeticError,
    RuntimeError,
    TypeError,
    ValueError,
)


@functools.cache
def _mixed(bases: tuple[type[Exception], ...]) -> type[Any]:
    # A base that another one derives from already would break the order of resolution.
    needed = [base for base in bases if not any(other is not base and issubclass(other, base) for other in bases)]
    if len(needed) == 1:
        return needed[0]
    # Shown under the name that the documentation knows.
    return type(needed[0].__name__, tuple(needed), {"__doc__": needed[0].__doc__, "__module__": __name__})


def _named(known: Sequence[type[Exception]], kinds: Sequence[str]) -> tuple[type[Exception], ...]:
    return tuple(base for base in known if base.__name__ in kinds)[:1]


def phase_error(phase: str, failures: Sequence[RankFailure]) -> RemoteRankError:
    """Make the error that all ranks raise for `failures`.

    Args:
        phase: what the ranks were doing.
        failures: at least one, sorted by rank.

    Returns:
        A :class:`RemoteRankError` that is also of the type of the first failure, where that is a common one.

    Example:
        >>> error = phase_error("save a.pt", [RankFailure.of(1, OSError(28, "No space left"), "")])
        >>> isinstance(error, RemoteRankError), isinstance(error, OSError), error.errno
        (True, True, 28)
    """
    kinds = failures[0].kinds
    error: RemoteRankError = _mixed((RemoteRankError, *_named(_OURS, kinds), *_named(_BUILTIN, kinds)))(phase, failures)
    return error


def save_error(message: str, cause: OSError, *, renamed: bool = False) -> SaveError:
    """Make the error of a save that failed by `cause`; it is of the cause's type too.

    Args:
        message: what happened, and what stands.
        cause: the operating system's error.
        renamed: whether the checkpoint stands under its name already, but is not durable.

    Example:
        >>> isinstance(save_error("gone", FileNotFoundError(2, "No such file")), FileNotFoundError)
        True
    """
    kinds = [base.__name__ for base in type(cause).__mro__]
    ours = CommitNotDurable if renamed else SaveError
    error: SaveError = _mixed((ours, *_named(_BUILTIN, kinds)))(message, cause)
    return error


def does_not_fit(
    message: str,
    kinds: Sequence[str],
    missing: Sequence[str] = (),
    unexpected: Sequence[str] = (),
    mismatched: Sequence[str] = (),
) -> StateMismatchError:
    """Make the error of a checkpoint that does not fit.

    Args:
        message: see :class:`StateMismatchError`, as all that follow.
        kinds: names of the builtin types that it is to be of too.
        missing: keys.
        unexpected: keys.
        mismatched: keys.

    Example:
        >>> error = does_not_fit("no", ["ValueError", "RuntimeError"], missing=["model.bias"])
        >>> isinstance(error, ValueError), isinstance(error, RuntimeError), error.missing
        (True, True, ('model.bias',))
    """
    mixed_in = tuple(base for base in (ValueError, RuntimeError) if base.__name__ in kinds)
    error: StateMismatchError = _mixed((StateMismatchError, *mixed_in))(message, missing, unexpected, mismatched)
    return error


def _rebuild_save_error(message: str, number: int | None, text: str | None, kinds: tuple[str, ...]) -> SaveError:
    cause = OSError(number, text) if number is not None else OSError(text)
    return save_error(message, cause, renamed="CommitNotDurable" in kinds)


def partly_loaded(message: str, cause: BaseException) -> PartialLoadError:
    """Make the error of a load that left some objects changed; it is of the cause's type too, if that is a common one.

    Args:
        message: what happened, and which objects have to be loaded again.
        cause: what went wrong.

    Example:
        >>> isinstance(partly_loaded("gone", KeyError("weight")), KeyError)
        True
    """
    return _rebuild_partly_loaded(message, tuple(base.__name__ for base in type(cause).__mro__))


def _rebuild_partly_loaded(message: str, kinds: Sequence[str]) -> PartialLoadError:
    alike = (OSError, KeyError, RuntimeError, TypeError, ValueError)  # others cannot be mixed with each of them
    error: PartialLoadError = _mixed((PartialLoadError, *_named(alike, kinds)))(message)
    return error
