"""The exception tree: what each error is, says, and is after a journey between processes."""

import copy
import errno
import pickle
from collections.abc import Callable
from typing import Any

import pytest

import distckpt
from distckpt import errors
from distckpt.errors import (
    CollectiveError,
    CollectiveTimeout,
    CommitNotDurable,
    CorruptCheckpointError,
    DesyncError,
    DistckptError,
    LoadError,
    PartialLoadError,
    RankFailure,
    RemoteRankError,
    ReplicasDiffer,
    SaveError,
    StateMismatchError,
    UnsafeCheckpoint,
    UnsupportedCheckpoint,
    partial_load_error,
    remote_rank_error,
    save_error,
    state_mismatch_error,
)

FULL = OSError(errno.ENOSPC, "No space left on device")
ABSENT = FileNotFoundError(errno.ENOENT, "No such file or directory", "a.pt")


class OwnError(KeyError):
    pass


def failed(error: BaseException, rank: int = 1) -> RankFailure:
    return RankFailure.from_exception(rank, error, f"Traceback of rank {rank}\n")


def of_phase(*raised: BaseException) -> RemoteRankError:
    return remote_rank_error("save a.pt, step 3", [failed(error, rank) for rank, error in enumerate(raised, start=1)])


PRODUCTS: dict[str, Exception] = {
    "DistckptError": DistckptError("gone"),
    "CollectiveError": CollectiveError("gone", [1, 2]),
    "CollectiveTimeout": CollectiveTimeout("late", [3]),
    "DesyncError": DesyncError("apart"),
    "SaveError": SaveError("full", FULL),
    "SaveError without cause": SaveError("full"),
    "SaveError without errno": save_error("full", OSError("no number")),
    "CommitNotDurable": CommitNotDurable("unsynced", FULL),
    "LoadError": LoadError("unfit"),
    "CorruptCheckpointError": CorruptCheckpointError("damaged"),
    "UnsafeCheckpoint": UnsafeCheckpoint("unsafe"),
    "StateMismatchError": StateMismatchError("unfit", ["m.a"], ["m.b"], ["m.c"]),
    "partial_load_error, of a kind": partial_load_error("half", ["KeyError"]),
    "state_mismatch_error, of two kinds": state_mismatch_error("unfit", ["ValueError", "RuntimeError"], ["m.a"]),
    "PartialLoadError": PartialLoadError("partly"),
    "save_error": save_error("full", FULL),
    "save_error, mixed": save_error("absent", ABSENT),
    "save_error, renamed": save_error("unsynced", PermissionError(errno.EACCES, "denied"), renamed=True),
    "remote_rank_error": of_phase(OwnError("k")),
    "remote_rank_error, plain": of_phase(StopIteration()),
    "remote_rank_error, of two": of_phase(ValueError("a"), TypeError("b")),
    "remote_rank_error, of a full disk": of_phase(FULL),
    "remote_rank_error, of a save": of_phase(save_error("absent", ABSENT)),
    "remote_rank_error, not durable": of_phase(save_error("unsynced", FULL, renamed=True)),
    "remote_rank_error, damaged": of_phase(CorruptCheckpointError("damaged")),
    "remote_rank_error, unsafe": of_phase(UnsafeCheckpoint("unsafe")),
    "remote_rank_error, timeout": of_phase(CollectiveTimeout("late", [3])),
    "remote_rank_error, of a phase": of_phase(of_phase(FULL)),
}


def pickled(protocol: int) -> Callable[[Any], Any]:
    return lambda value: pickle.loads(pickle.dumps(value, protocol))  # noqa: S301 - our own bytes


JOURNEYS: dict[str, Callable[[Any], Any]] = {
    **{f"pickle {protocol}": pickled(protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)},
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize(
    ("kind", "bases"),
    [
        (CollectiveError, (DistckptError,)),
        (CollectiveTimeout, (CollectiveError,)),
        (DesyncError, (DistckptError,)),
        (RemoteRankError, (DistckptError,)),
        (SaveError, (DistckptError, OSError)),
        (CommitNotDurable, (SaveError,)),
        (LoadError, (DistckptError,)),
        (CorruptCheckpointError, (LoadError, RuntimeError, pickle.UnpicklingError, EOFError)),
        (UnsafeCheckpoint, (LoadError, pickle.UnpicklingError)),
        (StateMismatchError, (LoadError,)),
        (PartialLoadError, (LoadError,)),
        (DistckptError, (Exception,)),
    ],
)
def test_tree_is_as_drawn(kind: type[Exception], bases: tuple[type[Exception], ...]) -> None:
    assert kind.__bases__ == bases
    assert kind.__name__ in str(errors.__doc__)
    assert getattr(distckpt, kind.__name__) is kind


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("journey", JOURNEYS)
def test_error_survives_a_journey(name: str, journey: str) -> None:
    error = PRODUCTS[name]
    twin = JOURNEYS[journey](error)
    assert type(twin) is type(error)
    assert str(twin) == str(error)
    for attribute in ("errno", "strerror", "missing", "unexpected", "mismatched", "phase", "failures"):
        assert getattr(twin, attribute, None) == getattr(error, attribute, None)


@pytest.mark.parametrize("name", PRODUCTS)
def test_error_can_be_shown_and_raised(name: str) -> None:
    error = PRODUCTS[name]
    assert str(error) in repr(error) or repr(str(error)) in repr(error) or error.args[0] in str(error)
    with pytest.raises(type(error)) as caught:
        raise error
    assert caught.value is error


@pytest.mark.parametrize("kind", [DistckptError, DesyncError, LoadError, CorruptCheckpointError, SaveError])
def test_text_is_the_message_as_given(kind: Callable[[str], Exception]) -> None:
    assert str(kind("it's \N{PARTY POPPER}\nand more")) == "it's \N{PARTY POPPER}\nand more"
    assert not str(DistckptError())


def test_missing_ranks_are_kept() -> None:
    assert CollectiveError("gone").missing == ()
    assert CollectiveTimeout("late", [3, 1]).missing == (3, 1)


@pytest.mark.parametrize(
    ("cause", "also"),
    [
        (FULL, OSError),
        (ABSENT, FileNotFoundError),
        (FileExistsError(errno.EEXIST, "x"), FileExistsError),
        (PermissionError(errno.EACCES, "x"), PermissionError),
        (NotADirectoryError(errno.ENOTDIR, "x"), NotADirectoryError),
        (IsADirectoryError(errno.EISDIR, "x"), IsADirectoryError),
        (TimeoutError(errno.ETIMEDOUT, "x"), OSError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
@pytest.mark.parametrize("renamed", [False, True])
def test_failed_save_is_of_its_causes_type_too(cause: OSError, also: type[OSError], *, renamed: bool) -> None:
    error = save_error("rank 0: a.pt", cause, renamed=renamed)
    assert isinstance(error, SaveError)
    assert isinstance(error, also)
    assert isinstance(error, CommitNotDurable) is renamed
    assert (error.errno, error.strerror, str(error)) == (cause.errno, cause.strerror, "rank 0: a.pt")


@pytest.mark.parametrize(
    ("raised", "also"),
    [
        (FULL, (OSError,)),
        (ABSENT, (FileNotFoundError,)),
        (TimeoutError("t"), (OSError,)),
        (KeyError("k"), (KeyError, LookupError)),
        (OwnError("k"), (KeyError,)),
        (IndexError("i"), (IndexError,)),
        (AttributeError("a"), (AttributeError,)),
        (NotImplementedError("n"), (NotImplementedError, RuntimeError)),
        (RecursionError("r"), (RuntimeError,)),
        (MemoryError("m"), (MemoryError,)),
        (ZeroDivisionError("z"), (ArithmeticError,)),
        (UnicodeDecodeError("utf-8", b"", 0, 1, "u"), (ValueError,)),
        (TypeError("t"), (TypeError,)),
        (StopIteration("s"), (RemoteRankError,)),
        (KeyboardInterrupt(), (RemoteRankError,)),
        (save_error("s", ABSENT), (SaveError, FileNotFoundError)),
        (save_error("s", FULL, renamed=True), (CommitNotDurable, SaveError, OSError)),
        (CorruptCheckpointError("d"), (CorruptCheckpointError, pickle.UnpicklingError, EOFError, RuntimeError)),
        (UnsafeCheckpoint("u"), (UnsafeCheckpoint, LoadError)),
        (UnsupportedCheckpoint("u"), (UnsupportedCheckpoint, LoadError, RuntimeError)),
        (ReplicasDiffer("r"), (ReplicasDiffer,)),
        (state_mismatch_error("d", ["RuntimeError"]), (StateMismatchError, LoadError, RuntimeError)),
        (partial_load_error("p", ["OSError"]), (PartialLoadError, LoadError, OSError)),
        (partial_load_error("p", ["KeyError"]), (PartialLoadError, LoadError, KeyError)),
        (CollectiveTimeout("c"), (CollectiveTimeout, CollectiveError)),
        (DesyncError("r"), (DesyncError,)),
        (of_phase(KeyError("k")), (RemoteRankError, KeyError)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_phases_error_is_of_the_failures_type_too(raised: BaseException, also: tuple[type, ...]) -> None:
    error = of_phase(raised)
    assert isinstance(error, RemoteRankError)
    assert all(isinstance(error, kind) for kind in also)
    assert type(error) is type(of_phase(raised))
    assert getattr(error, "errno", None) == getattr(raised, "errno", None)


def test_phases_error_says_what_on_which_rank_and_where() -> None:
    assert str(of_phase(KeyError("x"))) == "'x' (KeyError on rank 1, while: save a.pt, step 3)"
    assert str(of_phase(StopIteration())) == "(StopIteration on rank 1, while: save a.pt, step 3)"
    same = ValueError("bad")
    assert str(of_phase(same, same)) == "bad (ValueError on rank 1, 2, while: save a.pt, step 3)"
    text = str(of_phase(ValueError("bad"), TypeError("worse"), ValueError("bad")))
    assert text == "bad (ValueError on rank 1, 2, 3, while: save a.pt, step 3)\nrank 2: TypeError: worse"


def test_phases_error_is_not_of_a_namesakes_type() -> None:
    namesake = type("SaveError", (Exception,), {})
    assert not isinstance(of_phase(namesake("mine")), OSError)


def test_lowest_failing_rank_gives_the_type() -> None:
    error = of_phase(FULL, KeyError("k"))
    assert isinstance(error, OSError)
    assert not isinstance(error, KeyError)


def test_tracebacks_of_every_failing_rank_are_shown() -> None:
    text = of_phase(ValueError("a"), TypeError("b")).tracebacks()
    assert text == "--- rank 1 ---\nTraceback of rank 1\n\n--- rank 2 ---\nTraceback of rank 2\n"


def test_failure_takes_over_only_a_numeric_errno() -> None:
    odd = ValueError("x")
    odd.errno = "ENOSPC"  # type: ignore[attr-defined]  # a user's exception may hold anything
    assert failed(odd).errno is None
    assert failed(FULL).errno == errno.ENOSPC
    assert failed(OwnError("k")).kinds[:3] == ("OwnError", "KeyError", "LookupError")
