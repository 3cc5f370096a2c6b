"""TerminateOnNan, TimeLimit, Timer and global_step_from_engine in one process."""

import logging
import time
import types
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events

from distckpt import TerminateOnNan, TimeLimit, Timer, global_step_from_engine
from distckpt.handlers import time_limit, timer
from tests.unit.toys import idle_engine

NAN, INF = float("nan"), float("inf")

FINITE = [
    0,
    1.0,
    True,
    10**400,
    1e300,  # above float32's range
    -1e300,
    2**1023 * 1.5,
    Fraction(10**400),
    1 + 2j,
    None,
    "nan",
    b"nan",
    [],
    {},
    (),
    np.float64(1e300),
    np.ones(3),
    np.array([1, 2]),
    np.array(["text"]),
    np.zeros(0),
    np.ones(2, dtype=complex),
    torch.ones(2),
    torch.tensor(1e300, dtype=torch.float64),
    torch.zeros(0),
    torch.tensor([1, 2]),
    torch.tensor([True]),
    torch.tensor([1 + 2j]),
    torch.eye(3).to_sparse(),
    torch.ones(4).to(torch.float8_e4m3fn),
    torch.tensor([1.0], dtype=torch.bfloat16),
    {"loss": [1.0, (torch.ones(1), {"deep": np.ones(1), "none": None})]},
    range(3),
]
NOT_FINITE = [
    NAN,
    INF,
    -INF,
    complex(0, NAN),
    complex(INF, 0),
    np.float32(NAN),
    np.float64(INF),
    np.array([1.0, NAN]),
    np.array([1, complex(0, NAN)]),
    torch.tensor(NAN),
    torch.tensor([1.0, INF]),
    torch.tensor([complex(0, NAN)]),
    torch.tensor([complex(0, NAN), 1]),
    torch.tensor([0.0, NAN]).to_sparse(),
    torch.tensor([1.0, NAN]).to(torch.float8_e4m3fn),
    torch.tensor([NAN], dtype=torch.float8_e5m2),
    torch.tensor([1.0, INF], dtype=torch.float16),
    torch.tensor(NAN, requires_grad=True),
    {"loss": [1.0, (torch.ones(1), {"deep": np.array([NAN])})]},
    [None, "text", {"a": {"b": INF}}],
]


def _stops(output: Any, **options: Any) -> bool:
    engine = Engine(lambda _engine, _batch: output)
    engine.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(**options))
    return engine.run([0, 0, 0]).iteration == 1


@pytest.mark.parametrize("output", FINITE, ids=lambda output: type(output).__name__)
def test_a_run_goes_on_while_all_is_finite(output: Any) -> None:
    assert not _stops(output)


@pytest.mark.parametrize("output", NOT_FINITE, ids=lambda output: type(output).__name__)
def test_a_run_stops_at_nan_or_infinity(output: Any) -> None:
    assert _stops(output)


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support is in beta state")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_sparse_tensors_of_every_layout_are_looked_at(layout: torch.layout) -> None:
    assert not _stops(torch.eye(3).to_sparse(layout=layout))
    assert _stops(torch.tensor([[0.0, NAN], [0.0, 1.0]]).to_sparse(layout=layout))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128])
def test_complex_tensors_of_every_width_are_looked_at(dtype: torch.dtype) -> None:
    assert not _stops(torch.tensor([1 + 1j, 2]).to(dtype))
    assert _stops(torch.tensor([complex(0, NAN), 2]).to(dtype))


@pytest.mark.parametrize("output", [object(), {1.0}, [object()], {"a": {1.0}}])
def test_anything_else_is_a_type_error_that_names_the_type(output: Any) -> None:
    engine = idle_engine()
    engine.state.output = output
    with pytest.raises(TypeError, match=r"object|set"):
        TerminateOnNan()(engine)
    assert not engine.should_terminate


def test_the_transform_chooses_what_is_looked_at() -> None:
    output = {"loss": 1.0, "other": NAN}
    assert _stops(output)
    assert not _stops(output, output_transform=lambda output: output["loss"])


def test_a_transform_that_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^Argument output_transform should be a function"):
        TerminateOnNan(output_transform=1)  # type: ignore[arg-type]  # that is what is tested


def test_the_log_names_output_and_iteration(caplog: pytest.LogCaptureFixture) -> None:
    assert _stops([1.0, NAN])
    (record,) = [record for record in caplog.records if record.name.startswith("distckpt")]
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("TerminateOnNan: Output '[1.0, nan]' contains NaN or Inf. Stop training")
    assert "iteration 1" in record.getMessage()


@pytest.mark.parametrize(
    ("limit", "kind", "words"),
    [
        (None, TypeError, "Argument limit_sec should be an integer."),
        (1.5, TypeError, "Argument limit_sec should be an integer."),
        ("10", TypeError, "Argument limit_sec should be an integer."),
        (0, ValueError, "Argument limit_sec should be a positive integer."),
        (-5, ValueError, "Argument limit_sec should be a positive integer."),
        (True, ValueError, "Argument limit_sec should be a positive integer."),
        (False, ValueError, "Argument limit_sec should be a positive integer."),
    ],
)
def test_a_limit_is_a_positive_int(limit: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=f"^{words}"):
        TimeLimit(limit)


def test_the_default_limit_is_eight_hours() -> None:
    assert TimeLimit().limit_sec == 28800


class _Clock:
    """A monotonic clock that goes on by hand, beside a wall clock that jumps."""

    def __init__(self) -> None:
        self.now = 50.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        raise AssertionError("wall time may jump")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    stand_in = _Clock()
    monkeypatch.setattr(time_limit, "time", stand_in)
    return stand_in


def test_time_runs_from_construction_by_the_monotonic_clock(clock: _Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="distckpt")
    handler = TimeLimit(10)
    assert handler.start_time == 50.0
    engine = idle_engine()
    clock.now += 10
    handler(engine)
    assert not engine.should_terminate  # exactly the limit is not over it
    clock.now += 0.5
    handler(engine)
    assert engine.should_terminate
    assert "Reached the time limit: 10 sec. Stop training" in caplog.text


def test_the_real_clock_is_the_monotonic_one() -> None:
    before = time.monotonic()
    assert before <= TimeLimit(1).start_time <= time.monotonic()


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [0.0]
    monkeypatch.setattr(timer, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def pass_by(seconds: float) -> None:
        now[0] += seconds

    return pass_by


def test_a_timer_runs_from_construction_and_reset_returns_it(ticks: Callable[[float], None]) -> None:
    stopwatch = Timer()
    ticks(2.0)
    assert (stopwatch.value(), stopwatch.running, stopwatch.total, stopwatch.step_count) == (2.0, True, 0.0, 0)
    assert stopwatch.reset() is stopwatch
    assert stopwatch.value() == 0.0


def test_pausing_and_resuming_twice_changes_nothing(ticks: Callable[[float], None]) -> None:
    stopwatch = Timer()
    ticks(1.0)
    stopwatch.resume()  # runs already
    ticks(1.0)
    stopwatch.pause()
    ticks(5.0)
    stopwatch.pause()
    assert (stopwatch.value(), stopwatch.running) == (2.0, False)
    stopwatch.resume()
    ticks(1.0)
    assert stopwatch.value() == 3.0


def test_an_average_without_steps_is_the_total(ticks: Callable[[float], None]) -> None:
    stopwatch = Timer(average=True)
    ticks(6.0)
    assert stopwatch.value() == 6.0
    for _ in range(3):
        stopwatch.step()
    assert stopwatch.value() == 2.0


def test_an_engines_events_drive_the_timer(ticks: Callable[[float], None]) -> None:
    engine = Engine(lambda _engine, _batch: ticks(1.0))
    engine.add_event_handler(Events.ITERATION_STARTED, lambda: ticks(10.0))
    stopwatch = Timer(average=True)
    answer = stopwatch.attach(
        engine, Events.STARTED, Events.ITERATION_COMPLETED, Events.ITERATION_STARTED, Events.ITERATION_COMPLETED
    )
    assert answer is stopwatch
    engine.run([0] * 4)
    assert (stopwatch.total, stopwatch.step_count, stopwatch.value()) == (14.0, 4, 3.5)  # the first wait counts


@pytest.mark.parametrize(
    ("event", "custom", "step"),
    [
        (Events.EPOCH_COMPLETED, None, 2),
        (Events.ITERATION_COMPLETED, None, 6),
        (Events.ITERATION_COMPLETED(every=2), None, 6),
        (Events.COMPLETED, None, 2),
        (Events.EPOCH_COMPLETED, Events.ITERATION_STARTED, 6),
        (Events.EXCEPTION_RAISED, None, 2),
        ("some event of a user's", None, 2),
    ],
)
def test_global_step_is_the_other_engines(event: Any, custom: Any, step: int) -> None:
    trainer = idle_engine()
    trainer.run([0, 1, 2], max_epochs=2)
    assert global_step_from_engine(trainer, custom)(idle_engine(), event) == step


def test_global_step_of_no_engine_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^Argument engine should be an instance of Engine"):
        global_step_from_engine(None)  # type: ignore[arg-type]  # that is what is tested
