"""Which tests belong to this process's runtime.

Owns the mark `only_on` and what becomes of tests that are another runtime's: they are no skips, since nothing is
missing; they are not of this run, and the summary counts them by the reason given.
"""

import os
from collections import Counter

import pytest

from tests.support.locate import WORLD_SIZE
from tests.support.runtime import OWN, RUNTIME

_MOST_RANKS = 2
_NUM_LEFT: Counter[str] = Counter()


def only_on(*runtimes: str, why: str) -> pytest.MarkDecorator:
    """Mark a test that is of some runtimes only.

    Args:
        runtimes: of which.
        why: said in the summary of the others' runs.
    """
    return pytest.mark.only_on(*runtimes, why=why)


of_torch = only_on("gloo", why="about torch.distributed's process groups and launchers")
"""Mark a test whose subject only torch.distributed has."""

of_processes = only_on("gloo", "horovod", why="each rank is a process of its own")
"""Mark a test that does to one rank what befalls all replicas of a process: kill it, or change its folder."""


def select(items: list[pytest.Item], config: pytest.Config) -> None:
    """Take those that are not of this runtime out of `items`."""
    left = {item: why for item in items if (why := _why_not(item))}
    _NUM_LEFT.update(left.values())
    if left:
        config.hook.pytest_deselected(items=list(left))
        items[:] = [item for item in items if item not in left]


def summary() -> list[str]:
    """Return a line for each reason."""
    return [f"{RUNTIME}: {num} not of this run: {why}" for why, num in sorted(_NUM_LEFT.items())]


def _why_not(item: pytest.Item) -> str | None:
    mark = item.get_closest_marker("only_on")
    if mark is not None and RUNTIME not in mark.args:
        return str(mark.kwargs["why"])
    if "matrix" in item.path.parts and "DISTCKPT_PYTHONS" not in os.environ:
        return "the matrix of checkpoints needs all three environments: ci/test.sh runs it"
    if RUNTIME != OWN and item.name.startswith("test_ignite"):
        return "shows a fault of ignite's"
    return _why_too_many_ranks(item)


def _why_too_many_ranks(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    world_size = 0 if callspec is None else callspec.params.get("world_size", 0)
    world_size = world_size or getattr(getattr(item, "function", None), WORLD_SIZE, 0)
    if RUNTIME == OWN or "distributed" not in item.path.parts or not isinstance(world_size, int):
        return None
    return f"the same with more than {_MOST_RANKS} ranks, which Gloo's run asks" if world_size > _MOST_RANKS else None
