"""Fixtures of the crash tests: numbers of trials, random seeds, and printing of counts.

A quick selection is the default. `ci/test.sh --crash` runs all trials, in most of an hour, and so does

    pytest --full tests/crash -o faulthandler_timeout=0

`DISTCKPT_CRASH_KILLS`, `..._RANK_KILLS`, `..._CUTS`, `..._STATES`, `..._EXITS` and `..._PROGRAMS` set single
counts, for each way of saving. `DISTCKPT_CRASH_SEED` repeats a round whose seed was printed: the kills come at the same
moments, but their effects may differ.
"""

import os
import secrets
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.crash.lost_jobs import Jobs, Table
from tests.support.limits import PROGRAM_LIMIT_S
from tests.support.selection import is_full

_COUNTS = {
    "KILLS": (10, 1000),
    "RANK_KILLS": (4, 1000),
    "CUTS": (3, 200),
    "STATES": (6, 500),
    "EXITS": (4, 200),
    "PROGRAMS": (8, 500),
}
"""Number of trials for each way of saving, in the quick selection and in all."""
_LIMITS_S = (PROGRAM_LIMIT_S, 3000.0)


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < 1:
        pytest.fail(f"{name} should be a positive whole number, but is {text!r}")
    return int(text)


def _count(name: str, config: pytest.Config) -> int:
    return _from_environment(f"DISTCKPT_CRASH_{name}", _COUNTS[name][is_full(config)])


@pytest.fixture
def is_whole(pytestconfig: pytest.Config) -> bool:
    """Return True if all trials run, not a quick selection."""
    return is_full(pytestconfig)


@pytest.fixture
def limit_s(pytestconfig: pytest.Config) -> float:
    """Return the time limit for the trials of one test, in seconds."""
    return _LIMITS_S[is_full(pytestconfig)]


@pytest.fixture
def kills(pytestconfig: pytest.Config) -> int:
    """Return the number of random moments at which a saver is killed."""
    return _count("KILLS", pytestconfig)


@pytest.fixture
def rank_kills(pytestconfig: pytest.Config) -> int:
    """Return the number of random moments at which a job's rank, or all its ranks, are killed."""
    return _count("RANK_KILLS", pytestconfig)


@pytest.fixture
def cuts(pytestconfig: pytest.Config) -> int:
    """Return the number of power cuts."""
    return _count("CUTS", pytestconfig)


@pytest.fixture
def states(pytestconfig: pytest.Config) -> int:
    """Return the number of examined states of a disk with reordered blocks."""
    return _count("STATES", pytestconfig)


@pytest.fixture
def exits(pytestconfig: pytest.Config) -> int:
    """Return the number of jobs of each kind that end without a failure."""
    return _count("EXITS", pytestconfig)


@pytest.fixture
def programs(pytestconfig: pytest.Config) -> int:
    """Return the number of programs that are killed and resumed."""
    return _count("PROGRAMS", pytestconfig)


@pytest.fixture
def seed() -> int:
    """Return the random seed of this round."""
    return _from_environment("DISTCKPT_CRASH_SEED", 1 + secrets.randbelow(2**31))


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Return a function that prints a line past pytest's capture, in pytest-xdist's workers too."""

    def say(text: str) -> None:
        with capsys.disabled():
            print(f"\n[crash] {text}", file=sys.stderr, flush=True)  # noqa: T201 - the counts belong in CI's log

    return say


@pytest.fixture(scope="module")
def report_at_end(request: pytest.FixtureRequest) -> Iterator[Callable[[object], None]]:
    """Return a function that stores an object, whose text is printed past pytest's capture at the end of the module."""
    kept: list[object] = []
    yield kept.append
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        for one in kept:
            print(f"\n{one}", file=sys.stderr, flush=True)  # noqa: T201 - as above


@pytest.fixture(scope="module")
def table(report_at_end: Callable[[object], None]) -> Table:
    """Return a table of the survivors' times, which is printed at the end of the module."""
    times = Table()
    report_at_end(times)
    return times


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    """Return the server that starts jobs whose ranks are lost."""
    with Jobs() as started:
        yield started
