"""Selection of tests: what a run leaves out, and what the summary says of it."""

from itertools import product
from pathlib import Path

import pytest

from tests.support.selection import cover

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parents[3]
TESTS = """
    import pytest
    from tests.support.selection import full_only, only_on, quick

    @pytest.mark.parametrize("letter", "abc")
    @pytest.mark.parametrize("number", range(5))
    def test_grid(letter, number):
        pass

    @quick(2)
    @pytest.mark.parametrize("number", range(5))
    def test_two_of_many(number):
        pass

    @full_only
    def test_long():
        pass

    @only_on("horovod", why="about Horovod")
    def test_of_another_runtime():
        pass

    def test_plain():
        pass
"""
NUM_IN_FULL_RUN = 15 + 5 + 1 + 1
NUM_IN_QUICK_RUN = 5 + 2 + 0 + 1


@pytest.fixture
def run_pytest(pytester: pytest.Pytester) -> pytest.Pytester:
    """Return a pytester whose directory holds this project's settings, and tests of each kind."""
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))
    pytester.makepyprojecttoml((ROOT / "pyproject.toml").read_text(encoding="utf-8").replace('["tests"]', '["."]'))
    pytester.makepyfile(test_kinds=TESTS)
    return pytester


def test_a_quick_run_says_how_many_tests_it_left_out_even_under_xdist(run_pytest: pytest.Pytester) -> None:
    result = run_pytest.runpytest_subprocess("-n1")
    result.assert_outcomes(passed=NUM_IN_QUICK_RUN)
    left_out = NUM_IN_FULL_RUN - NUM_IN_QUICK_RUN
    result.stdout.fnmatch_lines(
        ["gloo: 1 tests left out: about Horovod", f"gloo: {left_out} tests left out: only with --full"]
    )


def test_a_full_run_takes_all_tests_of_its_runtime(run_pytest: pytest.Pytester) -> None:
    result = run_pytest.runpytest_subprocess("--full")
    assert result.parseoutcomes()["passed"] == NUM_IN_FULL_RUN
    result.stdout.no_fnmatch_line("*only with --full*")


def test_a_test_named_on_the_command_line_runs_on_all_its_cases(run_pytest: pytest.Pytester) -> None:
    result = run_pytest.runpytest_subprocess("test_kinds.py::test_two_of_many")
    assert result.parseoutcomes()["passed"] == 5


def test_picked_cases_contain_every_value() -> None:
    cases = [{("a", a), ("b", b), ("c", c)} for a, b, c in product(range(4), range(7), range(2))]
    picked = cover(cases)
    assert set.union(*(cases[index] for index in picked)) == set.union(*cases)
    assert len(picked) == 7


def test_equal_cases_are_picked_once() -> None:
    assert cover([{1}, {1}, {1, 2}]) == [2]
    assert cover([]) == []
