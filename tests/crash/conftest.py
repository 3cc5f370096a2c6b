"""What the crash tests share: how many trials, which random numbers, and a way to say what was counted.

A quick selection is the default. The whole, which takes most of an hour, is `ci/test.sh --crash`, or

    DISTCKPT_CRASH=whole pytest tests/crash -o faulthandler_timeout=0

`DISTCKPT_CRASH_KILLS`, `..._RANK_KILLS`, `..._CUTS`, `..._STATES`, `..._EXITS` and `..._PROGRAMS` set single counts, of
each way of saving.
`DISTCKPT_CRASH_SEED` repeats a round whose seed was printed (the moments of the kills are repeated, what the
machine makes of them is not).
"""

import os
import secrets
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.crash.lost_jobs import Jobs, Table

_VARIABLE = "DISTCKPT_CRASH"
_KINDS = ("quick", "whole")
_COUNTS = {
    "KILLS": (25, 1000),
    "RANK_KILLS": (12, 1000),
    "CUTS": (8, 200),
    "STATES": (14, 500),
    "EXITS": (8, 200),
    "PROGRAMS": (32, 500),
}
"""How many of each way of saving, in the quick selection and in the whole."""
_LIMITS_S = (170.0, 3000.0)


def _which() -> int:
    kind = os.environ.get(_VARIABLE, _KINDS[0])
    if kind not in _KINDS:
        pytest.fail(f"{_VARIABLE} should be one of {_KINDS}, but is {kind!r}")
    return _KINDS.index(kind)


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < 1:
        pytest.fail(f"{name} should be a positive whole number, but is {text!r}")
    return int(text)


def _count(name: str) -> int:
    return _from_environment(f"{_VARIABLE}_{name}", _COUNTS[name][_which()])


@pytest.fixture
def is_whole() -> bool:
    """Tell whether the whole is run, and not the quick selection."""
    return bool(_which())


@pytest.fixture
def limit_s() -> float:
    """Return how long the trials of one test may take, in seconds."""
    return _LIMITS_S[_which()]


@pytest.fixture
def kills() -> int:
    """Return at how many random moments a saver is killed."""
    return _count("KILLS")


@pytest.fixture
def rank_kills() -> int:
    """Return at how many random moments of a job a rank is killed, or all are."""
    return _count("RANK_KILLS")


@pytest.fixture
def cuts() -> int:
    """Return how often the power is cut."""
    return _count("CUTS")


@pytest.fixture
def states() -> int:
    """Return how many states of a disk with reordered blocks are looked at."""
    return _count("STATES")


@pytest.fixture
def exits() -> int:
    """Return how many jobs end well, of each kind."""
    return _count("EXITS")


@pytest.fixture
def programs() -> int:
    """Return how many programs are killed and resumed."""
    return _count("PROGRAMS")


@pytest.fixture
def seed() -> int:
    """Return the seed of this round's random moments."""
    return _from_environment("DISTCKPT_CRASH_SEED", 1 + secrets.randbelow(2**31))


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Return a function that prints a line past pytest's capture, also from a worker of pytest-xdist."""

    def say(text: str) -> None:
        with capsys.disabled():
            print(f"\n[crash] {text}", file=sys.stderr, flush=True)  # noqa: T201 - counts belong into CI's log

    return say


@pytest.fixture(scope="module")
def tell_in_the_end(request: pytest.FixtureRequest) -> Iterator[Callable[[object], None]]:
    """Return a function that keeps something, whose text is printed past pytest's capture when the module is over."""
    kept: list[object] = []
    yield kept.append
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        for one in kept:
            print(f"\n{one}", file=sys.stderr, flush=True)  # noqa: T201 - as above


@pytest.fixture(scope="module")
def table(tell_in_the_end: Callable[[object], None]) -> Table:
    """Return a table of how long the others took, which is printed in the end."""
    times = Table()
    tell_in_the_end(times)
    return times


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    """Return the server that starts jobs of which a rank is lost."""
    with Jobs() as started:
        yield started
