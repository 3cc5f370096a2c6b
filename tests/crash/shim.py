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

__all__ = ["Called", "Fault", "How", "Shim", "build", "why_no_compiler"]

_SOURCE = Path(__file__).with_name("shim.c")
_COMPILERS = ("cc", "gcc", "clang")


class How(IntEnum):
    """What happens to the chosen call; the numbers are the shim's."""

    REFUSED = 1
    """It is not made, and fails."""
    SHORT = 2
    """A write takes half of the bytes and says so."""
    ZERO = 3
    """A write takes nothing and says so."""
    TORN = 4
    """A write takes half of the bytes and says that it took all."""
    SHORT_THEN_REFUSED = 5
    """A write takes half of the bytes and says so; the next one fails. A disk that is full."""
    DONE_BUT_REPORTED_AS_FAILED = 6
    """It is made, and fails: an answer lost on its way from a file server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Which call fails, and how.

    Attributes:
        call: one of the shim's names; `*` for any.
        nth: counted from 1 among the calls of that name that touch the watched directory.
        how: see :class:`How`.
        errno: what a failing call reports.
        for_ever: all that come after fail likewise: the disk has died.
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
    """A call that was made on the watched directory: its name, and the path it was about, relative to it."""

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
        [compiler, *options, "-o", library, _SOURCE, "-ldl"], capture_output=True, text=True, timeout=60, check=False
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
        """Note the calls that touch `directory`, and make one of them fail."""
        self._watched = str(directory.resolve())
        self._library.shim_watch(self._watched.encode())
        if fault is not None:
            self._library.shim_fail(fault.call.encode(), fault.nth, int(fault.how), fault.errno, int(fault.for_ever))
        try:
            yield
        finally:
            self._library.shim_watch_end()

    def log(self) -> Sequence[Called]:
        """Return the calls noted by the last :meth:`watching`."""
        lines = self._library.shim_log().decode(errors="surrogateescape").splitlines()
        called = [line.partition(" ")[::2] for line in lines]
        return [Called(name=name, path=path.removeprefix(self._watched).lstrip("/")) for name, path in called]
