"""Write the outcome of each contract test to a file, for `ci/contract_report.py`.

The file of `--outcomes` holds for each test its backend, its outcome, and the reason if it runs on some runtimes only.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.runtime import RUNTIME

_OPTION = "--outcomes"
_REASON = "some runtimes only"
_IMPLEMENTATION = re.compile(r"\[(serial|gloo|ours|nccl|horovod|xla)\b")
_SUITE = "tests/contracts/"


def add_option(parser: pytest.Parser) -> None:
    """Add the option that names the file."""
    parser.addoption(_OPTION, metavar="FILE", help="write the outcome of each contract test to FILE")


class Outcomes:
    """A pytest plugin that collects outcomes.

    Args:
        path: the file to write.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the outcome of a test's call, or of its setup or teardown if that did not pass."""
        if not report.nodeid.startswith(_SUITE):
            return
        if report.when == "call" or report.outcome != "passed":
            found = _IMPLEMENTATION.search(report.nodeid)
            self._outcomes[report.nodeid] = {
                "test": report.nodeid.partition("[")[0].removeprefix(_SUITE),
                "backend": found[1] if found else RUNTIME,
                "is_clause": found is not None,
                "outcome": report.outcome,
                "reason": dict(report.user_properties).get(_REASON),
            }

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        document = {"runtime": RUNTIME, "outcomes": list(self._outcomes.values())}
        self._path.write_text(json.dumps(document, indent=1), encoding="utf-8")


def register(config: pytest.Config) -> None:
    """Register the plugin if the option is given, in the process that reports: not in xdist's workers."""
    path = config.getoption(_OPTION)
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(Path(str(path))), "distckpt-outcomes")


def record_reason(item: pytest.Item) -> None:
    """Store in a test's properties why it runs on some runtimes only."""
    mark = item.get_closest_marker("only_on")
    if mark is not None:
        item.user_properties.append((_REASON, mark.kwargs["why"]))
