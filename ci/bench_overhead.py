"""Measure the cost per iteration of TerminateOnNan and TimeLimit in one process, distckpt's and ignite's in one run.

Rounds are interleaved, so that a busy machine slows both equally; the result is the ratio of medians. Then measures an
iteration of a Loop beside one of a bare ``for`` statement. Run it as ``PYTHONPATH=. python ci/bench_overhead.py
[--quick] [--rounds N] [--iterations N]``. Exit status 1 if distckpt's handlers cost more, or if a Loop costs more than
15 microseconds.
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

MAX_LOOP_US = 15.0
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


def seconds_in_for(num_iterations: int) -> float:
    """Run a bare ``for`` statement; return its CPU time per iteration, in seconds."""
    start = time.process_time()
    for batch in range(num_iterations):
        _output = batch
    return (time.process_time() - start) / num_iterations


def seconds_in_loop(num_iterations: int) -> float:
    """Run a Loop without handlers; return its CPU time per iteration, in seconds."""
    loop = distckpt.Loop(range(num_iterations))
    start = time.process_time()
    with loop:
        for _ in loop.epochs():
            for batch in loop.batches():
                loop.output = batch
    return (time.process_time() - start) / num_iterations


def measure_loop(num_rounds: int, num_iterations: int) -> float:
    """Return how much more an iteration of a Loop costs than one of a ``for`` statement: microseconds of CPU time.

    Of the fastest rounds: a busy machine makes any round slower, and none faster.
    """
    bare_s = min(seconds_in_for(num_iterations) for _ in range(num_rounds))
    return (min(seconds_in_loop(num_iterations) for _ in range(num_rounds)) - bare_s) * 1e6


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
    loop_us = measure_loop(arguments.rounds, arguments.iterations)
    is_loop_slow = loop_us > MAX_LOOP_US
    print(
        f"an iteration of a Loop without handlers costs {loop_us:.1f} us of CPU time more than one of a for statement "
        f"(at most {MAX_LOOP_US:.0f}): {'NO' if is_loop_slow else 'OK'}"
    )
    return int(is_slower or is_loop_slow)


if __name__ == "__main__":
    sys.exit(main())
