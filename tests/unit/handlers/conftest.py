"""Fixtures of the tests of handlers."""

import signal
from collections.abc import Iterator

import pytest

from tests.unit.preempted import TERM, URG, USR1, USR2


@pytest.fixture
def signals_as_before() -> Iterator[None]:
    """Put back the handlers of signals after a test."""
    before = {number: signal.getsignal(number) for number in (TERM, signal.SIGINT, USR1, USR2, URG)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
