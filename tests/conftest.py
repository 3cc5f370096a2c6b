"""What pytest has to know of the ranks and of the folders."""

import os

import pytest
import torch
from hypothesis import settings

from tests.contracts.implementations import not_run
from tests.support import outcomes
from tests.support.pool import discard_pools
from tests.support.selection import select, summary
from tests.support.store import bound_lookups

# Examples are the same in every run, and a busy machine is no failure. HYPOTHESIS_PROFILE=explore looks for new
# ones.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take the name of a file for outcomes."""
    outcomes.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Spare torchrun and its like, when tests start them, long waits for a name server."""
    bound_lookups()
    outcomes.collect(config)


def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    """Mark what lies in tests/crash/, which `ci/test.sh --fast` leaves out; leave out what is another runtime's."""
    select(items, config)
    for item in items:
        outcomes.keep_why(item)
        if "crash" in item.path.parts:
            item.add_marker(pytest.mark.crash)


def pytest_sessionfinish() -> None:
    """Kill the ranks of this process."""
    discard_pools()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which implementations of the backend contract had no part in the run."""
    for line in (*not_run(), *summary()):
        terminalreporter.write_line(line)
    if not torch.cuda.is_available():
        terminalreporter.write_line("tests/accel: not run, no GPU")
