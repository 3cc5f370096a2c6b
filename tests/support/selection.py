"""Select the tests of a run: those of this process's runtime, and with `--full` all of them.

Without `--full`, a test marked `quick(num)` runs on `num` of its cases, spread evenly over them; a test marked
`full_only` does not run. On Horovod and torch_xla, which repeat the tests of `tests/distributed` and `tests/contracts`,
every test runs on `_MAX_CASES_ELSEWHERE` cases at most. A test named on the command line (`FILE::TEST`) runs whole.

Tests that are left out are no skips: nothing is missing. The summary counts them by reason.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Sequence

import pytest

from tests.support.locate import WORLD_SIZE
from tests.support.runtime import OWN, RUNTIME

_OPTION = "--full"
_MAX_RANKS_ELSEWHERE = 2
_MAX_CASES_ELSEWHERE = 2
num_left_out: dict[str, int] = {}
"""Number of tests left out of this run, by reason."""


def only_on(*runtimes: str, why: str) -> pytest.MarkDecorator:
    """Mark a test that runs on some runtimes only.

    Args:
        runtimes: names of runtimes.
        why: the reason, shown in the summary of the other runtimes' runs.
    """
    return pytest.mark.only_on(*runtimes, why=why)


torch_only = only_on("gloo", why="about torch.distributed's process groups and launchers")
"""Mark a test whose subject exists only with torch.distributed."""

process_ranks_only = only_on("gloo", "horovod", why="each rank is a process of its own")
"""Mark a test that does something to one rank's process, which elsewhere is all replicas' process."""


def quick(num_cases: int) -> pytest.MarkDecorator:
    """Mark a parametrised test of which a run without `--full` takes only some cases.

    Args:
        num_cases: how many, spread evenly over the cases in their order.
    """
    return pytest.mark.quick(num_cases)


full_only = quick(0)
"""Mark a test that only a run with `--full` takes."""


def add_option(parser: pytest.Parser) -> None:
    """Add the option `--full`."""
    parser.addoption(_OPTION, action="store_true", help="run all cases of all tests, and all trials of the crash tests")


def is_full(config: pytest.Config) -> bool:
    """Return True in a run with `--full`."""
    return bool(config.getoption(_OPTION))


def deselect(items: list[pytest.Item], config: pytest.Config) -> None:
    """Remove the tests from `items` that do not belong to this run."""
    left_out = {item: why for item in items if (why := _why_not_here(item))}
    if not is_full(config) and not any("::" in argument for argument in config.args):
        cases: dict[tuple[object, str], list[pytest.Item]] = defaultdict(list)
        for item in items:
            if item not in left_out:
                cases[item.parent, getattr(item, "originalname", item.name)].append(item)
        for group in cases.values():
            kept = spread(group, _max_cases(group[0]))
            left_out |= dict.fromkeys(set(group) - set(kept), f"only with {_OPTION}")
    num_left_out.update(Counter(left_out.values()))
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def summary() -> list[str]:
    """Return a line for each reason for which tests were left out."""
    return [f"{RUNTIME}: {num} tests left out: {why}" for why, num in sorted(num_left_out.items())]


def spread(cases: Sequence[pytest.Item], num: int | None) -> Sequence[pytest.Item]:
    """Return `num` of the cases, the first among them and the others evenly spread; all if None."""
    if num is None or num >= len(cases):
        return cases
    return [cases[number * len(cases) // num] for number in range(num)]


def _max_cases(item: pytest.Item) -> int | None:
    mark = item.get_closest_marker("quick")
    limits = [int(mark.args[0])] if mark is not None else []
    if RUNTIME != OWN:
        limits.append(_MAX_CASES_ELSEWHERE)
    return min(limits, default=None)


def _why_not_here(item: pytest.Item) -> str | None:
    mark = item.get_closest_marker("only_on")
    if mark is not None and RUNTIME not in mark.args:
        return str(mark.kwargs["why"])
    if "matrix" in item.path.parts and "DISTCKPT_PYTHONS" not in os.environ:
        return "the matrix of checkpoints needs three environments: ci/test.sh runs it"
    if RUNTIME != OWN and item.name.startswith("test_ignite"):
        return "shows a fault of ignite's"
    return _why_not_on_so_many_ranks(item)


def _why_not_on_so_many_ranks(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    world_size = 0 if callspec is None else callspec.params.get("world_size", 0)
    world_size = world_size or getattr(getattr(item, "function", None), WORLD_SIZE, 0)
    if RUNTIME == OWN or "distributed" not in item.path.parts or not isinstance(world_size, int):
        return None
    if world_size <= _MAX_RANKS_ELSEWHERE:
        return None
    return f"more than {_MAX_RANKS_ELSEWHERE} ranks, which the run on Gloo tests"
