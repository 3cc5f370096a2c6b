"""Trace a rank with strace, and read from the trace what it did to one directory."""

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.limits import PROGRAM_LIMIT_S

__all__ = ["Call", "calls_in", "changes", "traced", "why_no_strace"]

_PR_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)  # linux/prctl.h
_LINE = re.compile(r"^(?P<pid>\d+) +(?P<name>\w+)\((?P<arguments>.*)\) += (?P<result>-?\d+|\?)")
_UNFINISHED = re.compile(r"^(?P<pid>\d+) +(?P<start>.*) <unfinished \.\.\.>$")
_RESUMED = re.compile(r"^(?P<pid>\d+) +<\.\.\. \w+ resumed>(?P<rest>.*)$")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_DESCRIPTOR = re.compile(r"\b(?:\d+|AT_FDCWD)<([^>]*)>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One system call.

    Attributes:
        name: e.g. `renameat`.
        paths: what its arguments name, absolute; a descriptor counts as the path that it is open on.
        arguments: as strace shows them.
    """

    name: str
    paths: tuple[str, ...]
    arguments: str


def why_no_strace() -> str | None:
    """Try strace once; returns why it cannot be used here."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    done = subprocess.run(
        ["strace", "-o", "/dev/null", "true"], capture_output=True, text=True, timeout=30, check=False
    )
    return None if done.returncode == 0 else f"strace does not work here: {done.stderr.strip()}"


@contextlib.contextmanager
def traced(output: Path) -> Iterator[None]:
    """Trace this process in the body: all threads, descriptors with their paths.

    Raises:
        RuntimeError: strace did not attach; the message contains what it printed.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANY)  # else only its ancestors may trace a process (Yama)
    command = ["strace", "-f", "-y", "-s", "0", "-e", "trace=%file,%desc", "-o", str(output), "-p", str(os.getpid())]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        if "attached" not in first:
            raise RuntimeError(f"strace does not trace this process: {first}{process.stderr.read()}")
        try:
            yield
        finally:
            process.send_signal(signal.SIGINT)  # it lets go of this process
            process.communicate(timeout=PROGRAM_LIMIT_S)


def calls_in(trace: Path, directory: Path, *, failed: bool = False) -> list[Call]:
    """Return the calls that touched `directory` or anything below it, in order; those that failed if asked for."""
    root = str(directory)
    calls = []
    for line in _whole_lines(trace):
        match = _LINE.match(line)
        if match is None or root not in line or (match["result"].startswith("-") and not failed):
            continue
        paths = tuple(_paths(match["arguments"]))
        if any(path == root or path.startswith(f"{root}/") for path in paths):
            calls.append(Call(name=match["name"], paths=paths, arguments=match["arguments"]))
    return calls


def _whole_lines(trace: Path) -> Iterator[str]:
    """Join the halves of calls during which another thread made one; such a call stands where it ended."""
    begun: dict[str, str] = {}
    with trace.open(encoding="utf-8", errors="replace") as lines:
        for raw in lines:
            line = raw.rstrip("\n")
            if unfinished := _UNFINISHED.match(line):
                begun[unfinished["pid"]] = unfinished["start"]
            elif resumed := _RESUMED.match(line):
                yield f"{resumed['pid']} {begun.pop(resumed['pid'], '')}{resumed['rest']}"
            else:
                yield line


def _paths(arguments: str) -> Iterator[str]:
    """Return what the arguments name: a quoted path is relative to the descriptor in front of it."""
    base = ""
    for match in re.finditer(f"{_DESCRIPTOR.pattern}|{_QUOTED.pattern}", arguments):
        descriptor, quoted = match.groups()
        if descriptor is not None:
            base = descriptor
            yield base
        elif quoted:
            yield quoted if quoted.startswith("/") else f"{base}/{quoted}"


_CHANGING = re.compile(
    r"write|pwrite|sendfile|copy_file_range|splice|truncate|fallocate|sync|rename|unlink|link|mkdir|rmdir|mknod|chmod|chown"
    r"|utime|setxattr|removexattr"
)


def changes(calls: Sequence[Call]) -> list[Call]:
    """Return the calls that change something or make it durable, opening for writing among them."""
    return [call for call in calls if _CHANGING.search(call.name) or _opens_to_write(call)]


def _opens_to_write(call: Call) -> bool:
    return call.name in {"open", "openat", "openat2", "creat"} and bool(
        re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC", call.arguments) or call.name == "creat"
    )
