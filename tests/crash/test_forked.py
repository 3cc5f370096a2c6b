"""A forked process that does not end is killed, and its stacks are kept."""

import time
from collections.abc import Callable

import pytest

from tests.crash.forked import Child

pytestmark = pytest.mark.crash


def _sleep_in_a_function_of_this_name(send: Callable[[int], None]) -> int:
    send(0)
    time.sleep(60.0)
    return 1


def test_where_a_child_stands_that_does_not_end_is_told() -> None:
    child = Child(_sleep_in_a_function_of_this_name)
    child.wait_for(1)
    assert child.finish(0.1) is None
    assert "in _sleep_in_a_function_of_this_name" in child.stood_at
    assert child.pid == 0


def test_one_that_ends_is_not_asked() -> None:
    child = Child(lambda _: 7)
    assert child.finish() == 7
    assert child.stood_at == ""
