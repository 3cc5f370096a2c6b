"""Select the tests of a run: those of this process's runtime, and with `--full` all of them.

Without `--full`, a parametrised test runs on a few cases, in which every value of every parameter occurs: `cover` picks
them. At most `_MAX_CASES` of a test are picked. Horovod and torch_xla repeat tests of torch.distributed's run: there a
test of the contract runs on `_MAX_CASES_ELSEWHERE`, another one on a single case. `quick(num)` sets another limit for a
test; a `full_only` test does not run. A test named on the command line (`FILE::TEST`) runs on all its cases.

A test that is left out is not reported as skipped. The summary counts such tests by reason.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Sequence

import pytest

from tests.support.locate import WORLD_SIZE
from tests.support.runtime import OWN, RUNTIME

_OPTION = "--full"
_MAX_RANKS_ELSEWHERE = 2
_MAX_CASES = 24
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
    """Mark a parametrised test with the number of cases that a run without `--full` takes.

    Args:
        num_cases: this many, even if fewer contain every value of every parameter.
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
            left_out |= dict.fromkeys(set(group) - set(_select_cases(group)), f"only with {_OPTION}")
    num_left_out.update(Counter(left_out.values()))
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def summary() -> list[str]:
    """Return a line for each reason for which tests were left out."""
    return [f"{RUNTIME}: {num} tests left out: {why}" for why, num in sorted(num_left_out.items())]


def cover(cases: Sequence[Collection[Hashable]]) -> list[int]:
    """Return the indices of a few cases that together contain every value that occurs in `cases`.

    Greedy: cases are passed over until one has as many values that no picked case contains as any can have, then until
    one has one fewer, and so on.
    """
    missing = {value for case in cases for value in case}
    picked: list[int] = []
    for num_new in range(max(map(len, cases), default=0), 0, -1):
        for index, case in enumerate(cases):
            if len(missing.intersection(case)) >= num_new:
                picked.append(index)
                missing.difference_update(case)
    return picked


def _select_cases(group: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Return the cases of one test that a run without `--full` takes."""
    mark = group[0].get_closest_marker("quick")
    limit = _MAX_CASES if mark is None else int(mark.args[0])
    if RUNTIME != OWN:
        limit = min(limit, _MAX_CASES_ELSEWHERE if "contracts" in group[0].path.parts else 1)
    # One id for each `parametrize` mark: a row of several parameters is one value.
    values = [set(enumerate(item.callspec._idlist)) if hasattr(item, "callspec") else {(0, "")} for item in group]
    picked = cover(values)
    if mark is not None and len(picked) < limit:
        picked += [index for index in range(len(group)) if index not in picked]
    elif len(picked) > limit:  # among many values, not the first ones only
        picked = [picked[number * len(picked) // limit] for number in range(limit)]
    return [group[index] for index in picked[:limit]]


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
