"""What became of each test of the contract, written down for the report over all backends (`ci/contract_report.py`).

Owns the file of `--outcomes`: for each test its backend, its outcome, and why it is of some runtimes only.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.runtime import RUNTIME

_OPTION = "--outcomes"
_WHY = "of some runtimes only"
_IMPLEMENTATION = re.compile(r"\[(serial|gloo|ours|nccl|horovod|xla)\b")
_SUITE = "tests/contracts/"


def add_option(parser: pytest.Parser) -> None:
    """Add the option that names the file."""
    parser.addoption(_OPTION, metavar="FILE", help="write down what became of each test of the contract")


class Outcomes:
    """A plugin of pytest's that collects outcomes in the process that reports them.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the outcome of a test, or of the part of it that went wrong."""
        if not report.nodeid.startswith(_SUITE):
            return
        if report.when == "call" or report.outcome != "passed":
            found = _IMPLEMENTATION.search(report.nodeid)
            self._outcomes[report.nodeid] = {
                "test": report.nodeid.partition("[")[0].removeprefix(_SUITE),
                "backend": found[1] if found else RUNTIME,
                "is_clause": found is not None,
                "outcome": report.outcome,
                "why": dict(report.user_properties).get(_WHY),
            }

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        document = {"runtime": RUNTIME, "outcomes": list(self._outcomes.values())}
        self._path.write_text(json.dumps(document, indent=1), encoding="utf-8")


def collect(config: pytest.Config) -> None:
    """Collect outcomes, if the option was given; in the process that reports, not in xdist's workers."""
    path = config.getoption(_OPTION)
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(Path(str(path))), "distckpt-outcomes")


def keep_why(item: pytest.Item) -> None:
    """Let the outcome of a test tell why it is of some runtimes only."""
    mark = item.get_closest_marker("only_on")
    if mark is not None:
        item.user_properties.append((_WHY, mark.kwargs["why"]))
