"""Callables as save handlers: how many arguments they get, and what becomes of their errors. One process."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from distckpt import Checkpoint
from tests.unit.toys import idle_engine, run_epochs


def _two(checkpoint: Any, filename: str) -> None:
    _CALLS.append((checkpoint, filename))


def _three(checkpoint: Any, filename: str, metadata: Any) -> None:
    _CALLS.append((checkpoint, filename, metadata))


_CALLS: list[tuple[Any, ...]] = []


class _Method:
    def two(self, checkpoint: Any, filename: str) -> None:
        _two(checkpoint, filename)

    def __call__(self, checkpoint: Any, filename: str, metadata: Any = None) -> None:
        _three(checkpoint, filename, metadata)


@pytest.mark.parametrize(
    ("handler", "num_arguments"),
    [
        (_two, 2),
        (_three, 3),
        (_Method(), 3),
        (_Method().two, 2),
        (functools.partial(_Method.two, _Method()), 2),
        (lambda *args: _CALLS.append(args), 3),
        (lambda checkpoint, filename, **rest: _CALLS.append((checkpoint, filename, *rest)), 2),
        (lambda checkpoint, filename, *, metadata=1: _CALLS.append((checkpoint, filename)), 2),  # noqa: ARG005
    ],
)
def test_callables_get_as_many_arguments_as_they_take(handler: Callable[..., None], num_arguments: int) -> None:
    _CALLS.clear()
    run_epochs(Checkpoint({"model": nn.Identity()}, handler), 1)
    assert [len(call) for call in _CALLS] == [num_arguments]


def test_a_type_error_inside_a_handler_does_not_run_it_twice() -> None:
    num_calls = 0

    def handler(_checkpoint: Any, _filename: str, _metadata: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        raise TypeError("its own")

    with pytest.raises(TypeError, match=r"^its own$"):
        Checkpoint({"model": nn.Identity()}, handler)(idle_engine())
    assert num_calls == 1


@pytest.mark.parametrize(
    "error", [LookupError("own words"), OSError(28, "No space left on device"), KeyboardInterrupt()]
)
def test_in_a_world_of_one_errors_come_as_they_were_raised(error: BaseException) -> None:
    def handler(_checkpoint: Any, _filename: str) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        Checkpoint({"model": nn.Identity()}, handler)(idle_engine())
    assert caught.value is error
