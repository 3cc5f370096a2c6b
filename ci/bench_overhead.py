"""Measure the cost per iteration of TerminateOnNan and TimeLimit in one process, distckpt's and ignite's in one run.

Rounds are interleaved, so that a busy machine slows both equally; the result is the ratio of medians. Then measures an
iteration of a Loop beside one of a bare ``for`` statement and one of a bare Engine. Run it as ``PYTHONPATH=. python
ci/bench_overhead.py [--quick] [--rounds N] [--iterations N]``. Exit status 1 if distckpt's handlers cost more, or if a
Loop costs more than twice what an Engine costs.
"""

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import ignite.handlers
import torch
from ignite.engine import Engine, Events

import distckpt

MAX_LOOP_RATIO = 2.0
"""A Loop's cost relative to an Engine's. Not microseconds: of machines that run this, some are three times as slow."""
OUTPUTS: dict[str, Callable[[], Any]] = {
    "a float": lambda: 0.5,
    "a scalar tensor": lambda: torch.tensor(0.5),
    "a (32, 10) tensor": lambda: torch.full((32, 10), 0.5),
    "a dict of loss and tensor": lambda: {"loss": 0.5, "y": torch.full((32, 10), 0.5)},
}


def seconds_per_iteration(output: Any, handlers: Any | None, num_iterations: int) -> float:
    """Run an engine that does nothing else; return the seconds per iteration.

    Args:
        output: return value of the process function.
        handlers: the module of TerminateOnNan and TimeLimit; None for no handlers.
        num_iterations: number of iterations.
    """
    trainer = Engine(lambda _engine, _batch: output)
    if handlers is not None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED, handlers.TerminateOnNan())
        trainer.add_event_handler(Events.ITERATION_COMPLETED, handlers.TimeLimit(3600))
    data = range(num_iterations)
    start = time.perf_counter()
    trainer.run(data)
    return (time.perf_counter() - start) / num_iterations


def measure(make_output: Callable[[], Any], num_rounds: int, num_iterations: int) -> dict[str, float]:
    """Return medians over interleaved rounds, in microseconds per iteration: none, ignite, distckpt."""
    kinds = {"none": None, "ignite": ignite.handlers, "distckpt": distckpt}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    output = make_output()
    for round_number in range(num_rounds + 1):
        for name, handlers in kinds.items():
            taken = seconds_per_iteration(output, handlers, num_iterations)
            if round_number > 0:  # the first round warms up
                seconds[name].append(taken)
    return {name: statistics.median(values) * 1e6 for name, values in seconds.items()}


def cpu_seconds(run: Callable[[int], object], num_iterations: int) -> float:
    """Return the CPU time per iteration of ``run(num_iterations)``, in seconds."""
    start = time.process_time()
    run(num_iterations)
    return (time.process_time() - start) / num_iterations


def run_for(num_iterations: int) -> None:
    """Run a bare ``for`` statement."""
    for batch in range(num_iterations):
        _output = batch


def run_engine(num_iterations: int) -> None:
    """Run an Engine without handlers."""
    Engine(lambda _engine, batch: batch).run(range(num_iterations))


def run_loop(num_iterations: int) -> None:
    """Run a Loop without handlers."""
    loop = distckpt.Loop(range(num_iterations))
    with loop:
        for _ in loop.epochs():
            for batch in loop.batches():
                loop.output = batch


def measure_loop(num_rounds: int, num_iterations: int) -> tuple[float, float]:
    """Return how much more an iteration of an Engine and of a Loop cost than one of a ``for`` statement.

    In microseconds of CPU time, of the fastest rounds: a busy machine makes any round slower, and none faster.
    """
    seconds: dict[Callable[[int], None], list[float]] = {run_for: [], run_engine: [], run_loop: []}
    for _ in range(num_rounds):
        for run, values in seconds.items():
            values.append(cpu_seconds(run, num_iterations))
    bare_s = min(seconds[run_for])
    return (min(seconds[run_engine]) - bare_s) * 1e6, (min(seconds[run_loop]) - bare_s) * 1e6


def main() -> int:
    """Print the table; return 1 if distckpt's handlers cost more than ignite's, or a Loop more than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--quick", action="store_true", help="7 rounds of 1,000 iterations")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.iterations = 7, 1000
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    print("TerminateOnNan + TimeLimit on every iteration, one process; microseconds per iteration, medians")
    print(f"{'the output is':28} {'no handlers':>12} {'ignite':>10} {'distckpt':>10} {'ours/theirs':>12}")
    is_slower = False
    for label, make_output in OUTPUTS.items():
        medians = measure(make_output, arguments.rounds, arguments.iterations)
        ratio = medians["distckpt"] / medians["ignite"]
        is_slower = is_slower or ratio > 1.0
        print(f"{label:28} {medians['none']:12.1f} {medians['ignite']:10.1f} {medians['distckpt']:10.1f} {ratio:12.2f}")
    print("distckpt costs more than ignite" if is_slower else "distckpt costs no more than ignite: OK")
    engine_us, loop_us = measure_loop(3 * arguments.rounds, arguments.iterations)
    is_loop_slow = loop_us > MAX_LOOP_RATIO * engine_us
    print(
        f"an iteration without handlers costs more CPU time than one of a for statement: in a Loop {loop_us:.1f} us, "
        f"in an Engine {engine_us:.1f}, ratio {loop_us / engine_us:.2f} (at most {MAX_LOOP_RATIO}): "
        f"{'NO' if is_loop_slow else 'OK'}"
    )
    return int(is_slower or is_loop_slow)


if __name__ == "__main__":
    sys.exit(main())
