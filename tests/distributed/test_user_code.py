"""User code that raises on one rank: one error on every rank, of its type, with its traceback, and nobody hangs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Engine

from distckpt import BaseSaveHandler, Checkpoint, DiskSaver, EarlyStopping, RemoteRankError, TerminateOnNan
from tests.distributed.programs import fire, gather, idle_engine, kinds, logged, model_of, raised
from tests.support import job, run_distributed


class CustomError(Exception):
    """A program's own."""


class CustomValueError(ValueError):
    """A program's own, of a common type."""


ERRORS: list[tuple[Exception, type[Exception]]] = [
    (ValueError("bad value"), ValueError),
    (KeyError("accuracy"), KeyError),
    (RuntimeError("bad time"), RuntimeError),
    (ZeroDivisionError("by zero"), ArithmeticError),
    (FileNotFoundError(2, "No such file", "a.txt"), FileNotFoundError),
    (NotImplementedError("later"), NotImplementedError),
    (CustomValueError("bad value of ours"), ValueError),
    (CustomError("ours, ß 大"), Exception),
]


def one_error(call: Callable[[], object], culprit: int) -> RemoteRankError:
    """Return what `call` raises, after a look at that it is the same on every rank."""
    error = raised(call)
    assert isinstance(error, RemoteRankError), error
    told = (kinds(error), str(error), error.tracebacks(), [failure.rank for failure in error.failures])
    assert gather(told) == [told] * job.world_size()
    assert told[3] == [culprit]
    assert (error.__cause__ is not None) is (job.rank() == culprit), "its own exception where it was raised"
    return error


def failing(error: Exception, culprit: int, otherwise: Any = 0.5) -> Callable[..., Any]:
    """Return a function that raises on one rank."""

    def call_of_the_user(*_args: object) -> Any:
        if job.rank() == culprit:
            raise error
        return otherwise

    return call_of_the_user


@pytest.mark.parametrize(("error", "kind"), ERRORS, ids=[type(error).__name__ for error, _ in ERRORS])
@pytest.mark.parametrize("culprit", [0, 1])
@run_distributed(world_size=2)
def test_score_function_that_raises_on_one_rank(
    tmp_path: Path, error: Exception, kind: type[Exception], culprit: int
) -> None:
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path, score_function=failing(error, culprit))
    seen = one_error(lambda: fire(handler), culprit)
    assert isinstance(seen, kind)
    assert str(error) in str(seen)
    assert "Checkpoint#0, on EPOCH_COMPLETED, deciding what to save, step 1, of 2 ranks" in str(seen)
    assert f"--- rank {culprit} ---" in seen.tracebacks()
    assert "in call_of_the_user\n" in seen.tracebacks()
    if job.rank() == culprit:
        assert type(seen.__cause__) is type(error)
    assert list(tmp_path.iterdir()) == []


@run_distributed(world_size=3)
def test_score_function_that_raises_on_the_last_of_three(tmp_path: Path) -> None:
    score = failing(KeyError("accuracy"), 2)
    assert isinstance(
        one_error(lambda: fire(Checkpoint({"m": model_of(1.0)}, tmp_path, score_function=score)), 2), KeyError
    )
    assert isinstance(one_error(lambda: fire(EarlyStopping(1, score, idle_engine())), 2), KeyError)


@pytest.mark.parametrize("score", ["text", None, [1.0], 1j])
@run_distributed(world_size=2)
def test_a_score_that_is_no_number_on_one_rank(tmp_path: Path, score: object) -> None:
    value = score if job.rank() == 1 else 0.5
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path, score_function=lambda _: value)  # type: ignore[arg-type, return-value]
    error = one_error(lambda: fire(handler), 1)
    assert isinstance(error, ValueError)
    assert str(error).startswith(f"Output of score_function should be a number, but given {type(score)}")


@run_distributed(world_size=2)
def test_global_step_transform_that_raises_on_one_rank(tmp_path: Path) -> None:
    transform = failing(AttributeError("no epoch"), 1, otherwise=7)
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path, global_step_transform=transform)
    assert isinstance(one_error(lambda: fire(handler), 1), AttributeError)


@run_distributed(world_size=2)
def test_global_step_that_cannot_be_told_to_the_others(tmp_path: Path) -> None:
    step = object() if job.rank() == 1 else 7
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path, global_step_transform=lambda *_: step)  # type: ignore[arg-type]
    assert isinstance(one_error(lambda: fire(handler), 1), ValueError)


@run_distributed(world_size=2)
def test_pattern_with_an_unknown_field_is_a_key_error_on_every_rank(tmp_path: Path) -> None:
    handler = Checkpoint({"model": model_of(1.0)}, tmp_path, filename_pattern="{name}_{colour}.{ext}")
    error = raised(lambda: fire(handler))
    assert isinstance(error, KeyError)
    assert gather(str(error)) == [str(error)] * 2
    assert "colour" in str(error)


@pytest.mark.parametrize("name", ["../up.pt", "/absolute.pt", "nul\0.pt", ""])
@run_distributed(world_size=2)
def test_name_that_leaves_the_directory_is_a_value_error_on_every_rank(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "inside"
    error = raised(lambda: fire(Checkpoint({"model": model_of(1.0)}, folder, filename_pattern=name or "{name:.0}")))
    assert isinstance(error, ValueError)
    assert "should name a file inside the checkpoint directory" in str(error)
    assert gather(str(error)) == [str(error)] * 2
    job.barrier()
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    assert list(folder.iterdir()) == []


@run_distributed(world_size=2)
def test_output_transform_that_raises_on_one_rank() -> None:
    handler = TerminateOnNan(failing(IndexError("no output"), 1, otherwise=1.0))
    error = one_error(lambda: fire(handler), 1)
    assert isinstance(error, IndexError)
    assert "TerminateOnNan#0" in str(error)


class Saver(BaseSaveHandler):
    """A save handler of a program's own, which is called on every rank and may fail on one."""

    def __init__(self, *, fail: str, culprit: int, error: Exception) -> None:
        self.kept: list[str] = []
        self._fail, self._culprit, self._error = fail, culprit, error

    def __call__(self, _checkpoint: object, filename: str, _metadata: object = None) -> None:
        """Keep the name."""
        self._maybe("save")
        self.kept.append(filename)

    def remove(self, filename: str) -> None:
        """Drop the name."""
        self._maybe("remove")
        self.kept.remove(filename)

    def _maybe(self, doing: str) -> None:
        if doing == self._fail and job.rank() == self._culprit:
            raise self._error


@pytest.mark.parametrize("culprit", [0, 1])
@run_distributed(world_size=2)
def test_custom_save_handler_that_raises_on_one_rank(culprit: int) -> None:
    handler = Checkpoint({"model": model_of(1.0)}, Saver(fail="save", culprit=culprit, error=CustomValueError("no")))
    error = one_error(lambda: fire(handler), culprit)
    assert isinstance(error, ValueError)
    assert "saving model_1.pt" in str(error)
    assert gather((handler.last_checkpoint, handler.state_dict()["_saved"])) == [(None, [])] * 2


@run_distributed(world_size=2)
def test_a_plain_function_that_raises_a_type_error_is_called_once() -> None:
    calls: list[int] = []

    def save(_checkpoint: object, _filename: str, _metadata: object) -> None:
        calls.append(1)
        if job.rank() == 1:
            raise TypeError("from inside")

    error = one_error(lambda: fire(Checkpoint({"model": model_of(1.0)}, save)), 1)
    assert isinstance(error, TypeError)
    assert gather(calls) == [[1]] * 2


@run_distributed(world_size=2)
def test_custom_removal_that_raises_on_one_rank_is_a_warning() -> None:
    saver = Saver(fail="remove", culprit=1, error=KeyError("not mine"))
    handler = Checkpoint({"model": model_of(1.0)}, saver)
    with logged("distckpt") as messages:
        fire(handler, times=2)
    (message,) = [one for one in messages if "removing" in one]
    assert "rank 1: model_1.pt could not be removed: KeyError: 'not mine'" in message
    assert gather(message) == [message] * 2
    assert gather(handler.last_checkpoint) == ["model_2.pt"] * 2, "it is saved"


@run_distributed(world_size=2)
def test_ranks_go_on_together_after_an_error_that_the_program_caught(tmp_path: Path) -> None:
    scores: Any = iter([0.1, "text" if job.rank() == 1 else 0.2, 0.3])
    handler = Checkpoint({"model": model_of(1.0)}, DiskSaver(tmp_path), score_function=lambda _: next(scores))
    engine = Engine(lambda _engine, _batch: None)
    errors = [raised(lambda: handler(engine)) for _ in range(3)]
    assert [error is None for error in errors] == [True, False, True]
    assert isinstance(errors[1], ValueError)
    job.barrier()
    assert [path.name for path in tmp_path.iterdir()] == ["model_0.3000.pt"]
