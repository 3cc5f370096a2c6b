"""The examples in the docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

import distckpt
from tests.support.selection import quick

MODULES = sorted({"distckpt", *(found.name for found in pkgutil.walk_packages(distckpt.__path__, prefix="distckpt."))})
OPTIONAL = {
    "distckpt.backends.horovod": "horovod",
    "distckpt.backends.xla": "torch_xla",
    "distckpt.backends.xla_transport": "torch_xla",
}
NUM_EXAMPLES_AT_LEAST = 60


def present() -> list[str]:
    """Return the modules whose runtime is installed."""
    return [name for name in MODULES if name not in OPTIONAL or importlib.util.find_spec(OPTIONAL[name])]


def examples_of(name: str) -> list[doctest.DocTest]:
    """Return the docstrings of a module that hold examples."""
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name))
    return [test for test in found if test.examples]


@quick(1000)
@pytest.mark.parametrize("name", present())
def test_examples_of_a_module_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for example in examples_of(name):
        runner.run(example)
    shown = capsys.readouterr().out
    assert runner.summarize(verbose=False).failed == 0, shown


def test_there_are_examples_to_run() -> None:
    num_examples = sum(len(test.examples) for name in present() for test in examples_of(name))
    assert num_examples >= NUM_EXAMPLES_AT_LEAST


def test_every_module_says_what_it_is_for() -> None:
    silent = [name for name in present() if not (importlib.import_module(name).__doc__ or "").strip()]
    assert not silent
