"""pytest's settings for all tests: options, selection, and the rank processes' end."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests.contracts.implementations import not_run
from tests.support import outcomes, selection
from tests.support.isolate import forget_runs
from tests.support.pool import discard_pools
from tests.support.store import shorten_lookups

# The same examples in every run, and no deadline on a busy machine. HYPOTHESIS_PROFILE=explore tries new examples.
settings.register_profile("quick", deadline=None, derandomize=True, max_examples=40)
settings.register_profile("full", deadline=None, derandomize=True, max_examples=300)
settings.register_profile("explore", deadline=None, max_examples=2000)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the harness's options."""
    outcomes.add_option(parser)
    selection.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Prepare this process and its children."""
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "full" if selection.is_full(config) else "quick"))
    shorten_lookups()
    os.environ.pop("DISTCKPT_RECORD_EVENTS", None)  # most tests compare whole directories, also with ignite's
    outcomes.register(config)


def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    """Leave out tests that do not belong to this run, put slow files first, and mark the tests of tests/crash/."""
    selection.deselect(items, config)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)  # a long test that started last would run alone
    for item in items:
        outcomes.record_reason(item)
        if "crash" in item.path.parts:
            item.add_marker(pytest.mark.crash)


@pytest.fixture(autouse=True)
def ended_runs() -> Iterator[None]:
    """Fail a test that leaves an engine's run under way."""
    yield
    assert forget_runs() == []


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Kill this process's ranks, and send what was left out to pytest-xdist's controller."""
    discard_pools()
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(selection.num_left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Receive what was left out: the same on all workers, each of which collects all tests."""
    selection.num_left_out.update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was left out of the run."""
    for line in (*not_run(), *selection.summary()):
        terminalreporter.write_line(line)
    if not torch.cuda.is_available():
        terminalreporter.write_line("tests/accel: not run, no GPU")
