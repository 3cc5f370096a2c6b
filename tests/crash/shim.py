"""Compile, load and steer `shim.c`, which makes a chosen system call fail.

The library is loaded into a rank with LD_PRELOAD when it starts; the rank then steers it by itself, so that one
long-lived job goes through every failure.
"""

import ctypes
import errno
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from tests.support.limits import PROGRAM_LIMIT_S

__all__ = ["Called", "Fault", "How", "Shim", "build", "why_no_compiler"]

_SOURCE = Path(__file__).with_name("shim.c")
_COMPILERS = ("cc", "gcc", "clang")


class How(IntEnum):
    """How the chosen call fails; the numbers are those of `shim.c`."""

    REFUSED = 1
    """The call is not made, and fails."""
    SHORT = 2
    """A write writes half of the bytes, and returns that number."""
    ZERO = 3
    """A write writes nothing, and returns 0."""
    TORN = 4
    """A write writes half of the bytes, and returns the number of all."""
    SHORT_THEN_REFUSED = 5
    """A write writes half of the bytes, and returns that number; the next one fails, as on a full disk."""
    DONE_BUT_REPORTED_AS_FAILED = 6
    """The call is made, and fails, as if the answer of a file server was lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """The call that fails, and how.

    Attributes:
        call: one of the shim's names; `*` for any.
        nth: its number among the calls of that name on the watched directory, from 1.
        how: see :class:`How`.
        errno: the error of a failing call.
        for_ever: all later calls fail likewise: the disk is broken.
    """

    call: str
    nth: int
    how: How = How.REFUSED
    errno: int = errno.EIO
    for_ever: bool = False

    def __str__(self) -> str:
        """Return it as a phrase."""
        code = errno.errorcode[self.errno]
        return f"{self.call} #{self.nth}{' and all after' if self.for_ever else ''}: {self.how.name} {code}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Called:
    """A call on the watched directory: its name, and its path relative to the directory."""

    name: str
    path: str


def why_no_compiler() -> str | None:
    """Return why the shim cannot be built here."""
    return None if any(map(shutil.which, _COMPILERS)) else f"no C compiler is installed ({', '.join(_COMPILERS)})"


def build(directory: Path) -> Path:
    """Compile the shim into `directory` and return the library's path."""
    library = directory / "shim.so"
    compiler = next(name for name in _COMPILERS if shutil.which(name))
    options = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    done = subprocess.run(
        [compiler, *options, "-o", library, _SOURCE, "-ldl"],
        capture_output=True,
        text=True,
        timeout=PROGRAM_LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return library


class Shim:
    """The shim in this process."""

    def __init__(self) -> None:
        self._library, self._watched = ctypes.CDLL(None), ""
        try:
            self._library.shim_log.restype = ctypes.c_char_p
        except AttributeError as error:
            raise RuntimeError("this process was started without the shim in LD_PRELOAD") from error

    @contextmanager
    def watching(self, directory: Path, fault: Fault | None = None) -> Iterator[None]:
        """Record the calls on `directory` in the body, and make one of them fail."""
        self._watched = str(directory.resolve())
        self._library.shim_watch(self._watched.encode())
        if fault is not None:
            self._library.shim_fail(fault.call.encode(), fault.nth, int(fault.how), fault.errno, int(fault.for_ever))
        try:
            yield
        finally:
            self._library.shim_watch_end()

    def log(self) -> Sequence[Called]:
        """Return the calls that the last :meth:`watching` recorded."""
        lines = self._library.shim_log().decode(errors="surrogateescape").splitlines()
        called = [line.partition(" ")[::2] for line in lines]
        return [Called(name=name, path=path.removeprefix(self._watched).lstrip("/")) for name, path in called]
