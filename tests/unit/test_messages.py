"""Ignored warnings are one thread's, and levels of log messages follow the reporting ranks."""

import threading
import warnings

import pytest

from distckpt._messages import ignore_warnings


def test_a_thread_is_silent_alone() -> None:
    entered, warned = threading.Event(), threading.Event()

    def silent() -> None:
        with ignore_warnings():
            entered.set()
            assert warned.wait(10.0)
            warnings.warn("of the silent thread", stacklevel=1)

    thread = threading.Thread(target=silent)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        thread.start()
        assert entered.wait(10.0)
        warnings.warn("of the other thread", stacklevel=1)
        warned.set()
        thread.join()
        warnings.warn("after it", stacklevel=1)
    assert [str(one.message) for one in caught] == ["of the other thread", "after it"]


def test_threads_that_overlap_leave_the_filters_as_they_were() -> None:
    inside = threading.Barrier(2)

    def silent() -> None:
        for _ in range(50):
            inside.wait(10.0)
            with ignore_warnings():
                warnings.warn("silent", stacklevel=1)

    threads = [threading.Thread(target=silent) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)


def _warn_in_nested_blocks_and_fail() -> None:
    with ignore_warnings():
        with ignore_warnings():
            warnings.warn("silent", stacklevel=1)
        warnings.warn("still silent", stacklevel=1)
        raise ZeroDivisionError


def test_blocks_nest_and_an_error_ends_them() -> None:
    with pytest.raises(ZeroDivisionError):
        _warn_in_nested_blocks_and_fail()
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)


def test_it_holds_after_the_filters_were_reset() -> None:
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.simplefilter("error")
        with ignore_warnings():
            warnings.warn("silent", stacklevel=1)
