"""Ways in which a save can fail on one rank, real ones where they can be made without privileges."""

import contextlib
import resource
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

LARGE = 100_000
"""Parameters of a model that does not fit into what `full_disk` leaves."""


class Stateful:
    """An object to save whose state can be replaced by a failure."""

    def __init__(self, value: float = 1.0) -> None:
        self.state: Mapping[str, Any] = {"value": torch.full((LARGE,), value)}
        self.failure: BaseException | None = None

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state, or fail."""
        if self.failure is not None:
            raise self.failure
        return self.state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self.state = dict(state)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Let no file of this process grow beyond a page: writes fail as on a full disk, with EFBIG."""
    assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_IGN, "as Python starts"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def vanished_directory(folder: Path) -> Iterator[None]:
    """Move the directory away for a while."""
    aside = folder.with_name(f"{folder.name}.aside")
    folder.rename(aside)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)


@contextlib.contextmanager
def file_in_place(folder: Path) -> Iterator[None]:
    """Put a file where the directory was, for a while."""
    with vanished_directory(folder):
        folder.write_text("not a directory", encoding="utf-8")
        try:
            yield
        finally:
            folder.unlink()


@contextlib.contextmanager
def failing_object(obj: Stateful, failure: BaseException) -> Iterator[None]:
    """Let ``state_dict()`` raise."""
    obj.failure = failure
    try:
        yield
    finally:
        obj.failure = None


@contextlib.contextmanager
def unpicklable_object(obj: Stateful) -> Iterator[None]:
    """Let the state hold what cannot be serialised."""
    before, obj.state = obj.state, {"value": lambda: None}
    try:
        yield
    finally:
        obj.state = before


Failure = Callable[[Path, Stateful], contextlib.AbstractContextManager[None]]

FAILURES: dict[str, tuple[Failure, type[Exception], str]] = {
    "full disk": (lambda _folder, _obj: full_disk(), OSError, "EFBIG"),
    "vanished directory": (lambda folder, _obj: vanished_directory(folder), FileNotFoundError, "ENOENT"),
    "file in place of the directory": (lambda folder, _obj: file_in_place(folder), NotADirectoryError, "ENOTDIR"),
    "state that cannot be told": (
        lambda _folder, obj: failing_object(obj, ZeroDivisionError("no state")),
        ArithmeticError,
        "no state",
    ),
    "state that cannot be pickled": (lambda _folder, obj: unpicklable_object(obj), AttributeError, "Can't pickle"),
}
"""By name: how it is made, the type that every rank's error has, and what its message tells."""
