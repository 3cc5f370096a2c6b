"""The end of a preempted job, as its launcher sees it: exit codes, and torchrun's own signals.

torchrun ... -m tests.distributed.test_preempted_exits <folder>      # what the tests of torchrun start
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
from ignite.engine import Engine, Events

from distckpt import (
    Checkpoint,
    Parallel,
    Preemption,
    stop_reason,
)
from tests.distributed.programs import all_equal, training_step
from tests.distributed.test_launch import started
from tests.distributed.voters import Weights, stored
from tests.support import fresh_ranks, job, send_to_parent
from tests.support.selection import process_ranks_only, torch_only

pytestmark = process_ranks_only

TERM, USR1 = signal.SIGTERM, signal.SIGUSR1
UNTIL_TOLD = 1_000_000  # iterations: more than fit into a test
LIMIT_S = 60.0  # of each wait: none should come near it, on however busy a machine


def train_until_told(folder: str, exit_code: int) -> None:
    """Train until a signal comes."""
    weights = Weights()

    def step(engine: Engine, _batch: object) -> None:
        weights.step = engine.state.iteration
        training_step()
        if engine.state.iteration == 3:
            send_to_parent("trains")

    trainer = Engine(step)
    checkpoint = Checkpoint({"weights": weights}, folder, timeout_s=LIMIT_S)
    preemption = Preemption(trainer, checkpoint, grace_s=30, exit_code=exit_code, timeout_s=LIMIT_S)
    trainer.add_event_handler(Events.COMPLETED, lambda: _tell_the_end(trainer, preemption))
    send_to_parent(_exit_code_of_a_forked_child())
    trainer.run(epoch_length=UNTIL_TOLD)


def _tell_the_end(trainer: Engine, preemption: Preemption) -> None:
    send_to_parent((trainer.state.iteration, stop_reason(trainer), preemption.preempted, preemption.requested))


def _exit_code_of_a_forked_child() -> int | None:
    """Fork a child that waits, and terminate it."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child needs none
        child = context.Process(target=_wait_for_a_signal, args=(theirs,))
        child.start()
    assert ours.poll(LIMIT_S)  # Python forgets a signal that comes while it forks
    child.terminate()
    child.join(LIMIT_S)
    code = child.exitcode
    if code is None:
        child.kill()
        child.join(LIMIT_S)
    return code


def _wait_for_a_signal(ready: Connection) -> None:
    ready.send("ready")
    for _ in range(int(2 * LIMIT_S / 0.01)):  # one long wait would not notice a signal that came just before it
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("exit_code", "world_size", "signals"),
    [(0, 2, {1: TERM}), (75, 2, {0: USR1, 1: TERM})],
    ids=["0", "75"],
)
def test_the_launcher_sees_the_exit_code_that_was_asked_for_on_every_rank(
    tmp_path: Path,
    exit_code: int,
    world_size: int,
    signals: dict[int, signal.Signals],
) -> None:
    everyone = range(world_size)
    with fresh_ranks(train_until_told, world_size, str(tmp_path), exit_code) as ranks:
        children = [ranks.receive(rank, timeout_s=LIMIT_S) for rank in everyone]
        assert children == [-TERM] * world_size, "a forked child of a rank still ends by a signal"
        assert [ranks.receive(rank, timeout_s=LIMIT_S) for rank in everyone] == ["trains"] * world_size
        for rank, number in signals.items():
            os.kill(ranks.pid(rank), number)
        told: list[Any] = [ranks.receive(rank, timeout_s=LIMIT_S) for rank in everyone]
        ends = ranks.finish(timeout_s=LIMIT_S, may_fail=everyone if exit_code else ())
    assert [end.exit_code for end in ends] == [exit_code] * world_size, ends
    (iteration,) = {step for step, *_ in told}
    assert stored(tmp_path) == [iteration]
    assert [(reason, preempted) for _, reason, preempted, _ in told] == [("preempted", True)] * world_size
    requested = [rank for rank, (*_, requested) in enumerate(told) if requested]
    assert set(requested) <= set(signals)
    assert requested


def main(folder: Path) -> None:
    """Be a rank of torchrun's: train until told, and write down what became of it."""
    with Parallel(backend="gloo") as parallel:
        parallel.run(_train_under_torchrun, folder)


def _train_under_torchrun(_local_rank: int, folder: Path) -> None:
    rank, weights = job.rank(), Weights()

    def step(engine: Engine, _batch: object) -> None:
        weights.step = engine.state.iteration
        training_step()
        if engine.state.iteration == 3:
            _write(folder / f"trains_{rank}", os.getpid())

    trainer = Engine(step)
    checkpoint = Checkpoint({"weights": weights}, folder / "saved", timeout_s=LIMIT_S)
    preemption = Preemption(trainer, checkpoint, grace_s=30, timeout_s=LIMIT_S)
    trainer.run(epoch_length=UNTIL_TOLD)
    ended = [trainer.state.iteration, stop_reason(trainer), preemption.preempted, str(checkpoint.last_checkpoint)]
    _write(folder / f"ended_{rank}", ended)


def _write(path: Path, value: object) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(value), encoding="utf-8")
    unfinished.rename(path)


def _read(process: Popen[str], path: Path) -> Any:
    """Wait until a rank has written a file."""
    deadline = time.monotonic() + 2 * LIMIT_S  # torchrun starts two interpreters after its own
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.terminate()  # torchrun passes it on to its ranks
            raise AssertionError(f"{path.name} was not written:\n{process.communicate(timeout=LIMIT_S)}")
        time.sleep(0.02)
    return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def torchrun(folder: Path) -> Iterator[tuple[Popen[str], list[int]]]:
    """Start two ranks under torchrun; once they train, give its process and their process ids."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", "2", "-m", "tests.distributed.test_preempted_exits", str(folder)]
    with started(command, GLOO_SOCKET_IFNAME="lo") as process:
        yield process, [_read(process, folder / f"trains_{rank}") for rank in range(2)]


@torch_only
@pytest.mark.parametrize(("target", "exit_code"), [("torchrun", 1), ("a worker", 0)])
def test_sigterm_under_torchrun_ends_all_ranks_with_the_same_step_saved(
    tmp_path: Path, target: str, exit_code: int
) -> None:
    with torchrun(tmp_path) as (process, pids):
        os.kill(process.pid if target == "torchrun" else pids[1], TERM)
        stdout, stderr = process.communicate(timeout=LIMIT_S)
    ended = [json.loads((tmp_path / f"ended_{rank}").read_text(encoding="utf-8")) for rank in range(2)]
    assert all_equal(ended), stdout + stderr
    iteration, reason, preempted, path = ended[0]
    assert (reason, preempted) == ("preempted", True)
    assert stored(tmp_path / "saved") == [iteration]
    assert Path(path).name == f"weights_{iteration}.pt"
    assert process.returncode == exit_code, "torchrun's own, as it answers SIGTERM"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
