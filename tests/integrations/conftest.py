"""Jobs under the loops of other packages."""

from collections.abc import Callable, Iterator

import pytest

from tests.integrations.jobs import Jobs


@pytest.fixture(scope="session")
def jobs_of() -> Iterator[Callable[[str], Jobs]]:
    """Return a function that starts a program's forking process, once in a session."""
    started: dict[str, Jobs] = {}

    def start(program: str) -> Jobs:
        if program not in started:
            started[program] = Jobs(program)
        return started[program]

    yield start
    for one in started.values():
        one.__exit__()
