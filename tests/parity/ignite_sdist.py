"""Run ignite's own tests, from the source archive on the package index, on distckpt's handlers.

Nothing of ignite's is kept in this repository: pip fetches the pinned archive once into the user's cache, its
hash is checked, and each run unpacks a copy and rewrites the imports in it.
"""

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

import distckpt
from tests.support.limits import PROGRAM_LIMIT_S

VERSION = "0.5.5"
SHA256 = "2c14de75c939a3cc06d2e7de00b1e0a261917ef9bd874dac2e69d789dfa9cc64"

OUR_NAMES = frozenset(
    {
        "BaseSaveHandler",
        "Checkpoint",
        "CheckpointEvents",
        "DiskSaver",
        "EarlyStopping",
        "ModelCheckpoint",
        "TerminateOnNan",
        "TimeLimit",
        "Timer",
        "global_step_from_engine",
    }
)
_IMPORT = re.compile(r"^([ \t]*)from (ignite\.handlers(?:\.\w+)*) import ([^(\n]+)$", re.MULTILINE)


def rewrite_imports(source: str) -> str:
    """Import distckpt's names from distckpt; leave all other imports as they are."""

    def rewritten(match: re.Match[str]) -> str:
        indent, module, listed = match.groups()
        names = [name.strip() for name in listed.split(",")]
        lines = []
        for origin, chosen in (
            ("distckpt", [name for name in names if name in OUR_NAMES]),
            (module, [name for name in names if name not in OUR_NAMES]),
        ):
            if chosen:
                lines.append(f"{indent}from {origin} import {', '.join(chosen)}")
        return "\n".join(lines)

    return _IMPORT.sub(rewritten, source)


def cached_archive() -> Path:
    """Return the archive; pip fetches it if it is not in the cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "distckpt"
    cache = Path(os.environ.get("DISTCKPT_CACHE") or default).expanduser()
    archive = cache / f"pytorch_ignite-{VERSION}.tar.gz"
    if not (archive.exists() and _hash_of(archive) == SHA256):
        cache.mkdir(parents=True, exist_ok=True)
        # Two test processes may fetch at the same time: each has its own folder, and the rename is atomic.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _download(Path(folder)).replace(archive)
    assert _hash_of(archive) == SHA256
    return archive


def _download(folder: Path) -> Path:
    wanted = folder / "requirement.txt"
    wanted.write_text(f"pytorch-ignite=={VERSION} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-input"]
    # --no-binary asks for the archive: wheels hold no tests. (pip asks its build backend for metadata, in an
    # environment of its own.)
    command += ["--no-deps", "--no-binary", "pytorch-ignite", "--require-hashes", "--requirement", str(wanted)]
    subprocess.run([*command, "--dest", str(folder)], check=True, timeout=600)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def _hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def unpack(folder: Path) -> Path:
    """Unpack the archive's tests and settings into `folder`; return its root."""
    root = folder / f"pytorch_ignite-{VERSION}"
    with tarfile.open(cached_archive()) as archive:
        wanted = [m for m in archive.getmembers() if m.name.startswith((f"{root.name}/tests/", f"{root.name}/py"))]
        archive.extractall(folder, members=wanted, filter="data")
    # Its processes exchange a port through a file of fixed name, which other runs on this machine would share.
    conftest = root / "tests/ignite/conftest.py"
    conftest.write_text(conftest.read_text().replace("/tmp/free_port", str(folder / "free_port")))  # noqa: S108
    return root


_CLOCK = '''
"""Replaces the module `time`: only sleep() lets time pass, and it returns at once."""

import sys

from distckpt.handlers import time_limit, timer

_now = 0.0


def time():
    return _now


def sleep(seconds):
    global _now
    _now += seconds


monotonic = perf_counter = time
timer.time = time_limit.time = sys.modules[__name__]
'''


def replace_clock(root: Path, file: str) -> None:
    """Give the tests in `file` and distckpt's timers a clock that a busy machine does not disturb."""
    (root / "stand_in_clock.py").write_text(_CLOCK)
    source = (root / file).read_text()
    assert source.count("import time\n") == 1, file
    (root / file).write_text(source.replace("import time\n", "import stand_in_clock as time\n"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of a run.

    Attributes:
        passed: ids of the tests that passed on every rank.
        failed: ids of those that failed on some.
        skipped: ids of those that were skipped.
        output: pytest's, for the message of a failure here.
    """

    passed: frozenset[str]
    failed: frozenset[str]
    skipped: frozenset[str]
    output: str


def run_pytest(root: Path, files: tuple[str, ...], options: tuple[str, ...], environment: Mapping[str, str]) -> Outcome:
    """Run `files` below `root` with pytest, in a new process."""
    report = root / "report.xml"
    inherited = {key: value for key, value in os.environ.items() if key not in _NOT_FOR_CHILDREN}
    paths = [str(Path(distckpt.__file__).parents[1]), inherited.get("PYTHONPATH", "")]
    inherited["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"--junitxml={report}", *options, *files],
        cwd=root,
        env={**inherited, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=PROGRAM_LIMIT_S,
        check=False,
    )
    assert report.exists(), done.stdout + done.stderr
    verdicts: dict[str, set[str]] = {"passed": set(), "failed": set(), "skipped": set()}
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 - written by the pytest above
        name = f"{case.get('classname', '').rpartition('.')[2]}.py::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            verdicts["failed"].add(name)
        else:
            verdicts["passed" if case.find("skipped") is None else "skipped"].add(name)
    verdicts["passed"] -= verdicts["failed"]
    return Outcome(output=done.stdout, **{key: frozenset(found) for key, found in verdicts.items()})


_NOT_FOR_CHILDREN = frozenset(
    {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    | {"PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_TESTRUNUID", "PYTEST_XDIST_WORKER_COUNT"}
)
