"""The program of a saving process that is killed or loses its power: resume, train, save, send each saved step.

The same program for each way of saving, on one rank or on several; and for the broken savers. A step is said to be
saved when the handler's `last_checkpoint` is of it: in the background that is some steps later.
"""

import contextlib
import importlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from ignite.engine import Engine, Events

import distckpt
from tests.crash.forked import Body, Job
from tests.crash.modes import MODES, is_background, is_sharded
from tests.crash.savers import SAVERS
from tests.crash.subject import Counted, name_of, step_of, steps_in
from tests.crash.trained import Trained
from tests.support.store import connect, job_namespace

__all__ = ["EXIT_LOST", "EXIT_OTHERWISE", "saving", "typical_save_s"]

EXIT_LOST, EXIT_OTHERWISE = 3, 4
"""Exit codes of a rank that distckpt's error ended, and of one that another error ended."""

# Its tensor is larger than the writer's buffer, so that a save is several writes.
_NUM_FLOATS = 300_000
_FOR_EVER = 10**6
# A rank's time limit, for waits that only a limit ends when another rank has died.
_TIMEOUT_S = 10
# Iterations from one save to the next in the background: training continues between them.
_EVERY = 3


@contextlib.contextmanager
def saving(
    directory: Path,
    saver: str,
    *,
    after: int,
    num_saves: int = _FOR_EVER,
    world_size: int = 1,
    on_saved: Callable[[int], None] = lambda _: None,
) -> Iterator[Job]:
    """Fork a job that resumes from a directory, wait until it is ready, and kill it at the end of the body.

    The first step that each rank sends says from which it goes on.

    Args:
        directory: the directory of its checkpoints.
        saver: a key of `SAVERS`.
        after: the step from which a single rank continues; several ranks find it by themselves.
        num_saves: number of saves, after which the job ends.
        world_size: number of ranks.
        on_saved: called on rank 0 with each saved step, before the step is sent to the test.
    """
    if world_size == 1:
        bodies: list[Body] = [lambda send: _one_rank(directory, saver, after, num_saves, on_saved, send)]
    else:
        # Once, before the forks: the first optimizer or DDP of a process imports it, which takes half a second.
        importlib.import_module("torch._dynamo")
        number = _next_number()
        bodies = [
            lambda send, rank=rank: _a_rank(directory, saver, num_saves, number, rank, world_size, on_saved, send)  # type: ignore[misc]
            for rank in range(world_size)
        ]
    job = Job(bodies)
    try:
        job.wait_for(1)
        yield job
    finally:
        job.kill()


_NUMBERS = iter(range(_FOR_EVER))


def _next_number() -> int:
    """Return a number that no job has had in the test's store."""
    return (os.getpid() << 20) + next(_NUMBERS)


def _one_rank(
    directory: Path,
    saver: str,
    after: int,
    num_saves: int,
    on_saved: Callable[[int], None],
    send: Callable[[int], None],
) -> int:
    counted = Counted(_NUM_FLOATS, step=after)
    handler = SAVERS[saver](counted, directory)
    _take_over(handler, directory)
    send(after)
    _train(counted, handler, saver, num_saves, on_saved, send)
    return 0


def _take_over(handler: Any, directory: Path) -> None:
    handler.load_state_dict({"_saved": [(step, name_of(step)) for step in steps_in(directory)]})


def _a_rank(
    directory: Path,
    saver: str,
    num_saves: int,
    number: int,
    rank: int,
    world_size: int,
    on_saved: Callable[[int], None],
    send: Callable[[int], None],
) -> int:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    os.environ["DISTCKPT_TIMEOUT_S"] = str(_TIMEOUT_S)
    store = job_namespace(connect(int(os.environ["MASTER_PORT"])), number)
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        trained = Trained(is_sharded=is_sharded(saver))
        handler = SAVERS[saver](trained, directory)
        distckpt.resume(trained.to_save, handler if saver in MODES else directory)
        trained.check()
        if saver not in MODES:
            _take_over(handler, directory)
        send(trained.step)
        _train(trained, handler, saver, num_saves, on_saved if rank == 0 else lambda _: None, send)
    except distckpt.DistckptError:
        return EXIT_LOST
    except (RuntimeError, OSError):  # of the job's own collectives
        return EXIT_OTHERWISE
    return 0


def _train(
    subject: Counted | Trained,
    handler: Any,
    saver: str,
    num_saves: int,
    on_saved: Callable[[int], None],
    send: Callable[[int], None],
) -> None:
    known = [handler.last_checkpoint]
    every = _EVERY if is_background(saver) else 1

    def report() -> None:
        if handler.last_checkpoint != known[0]:
            known[0] = handler.last_checkpoint
            step = step_of(Path(known[0]))
            on_saved(step)
            send(step)

    engine = Engine(lambda _engine, _batch: subject.advance())
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=every), handler)
    engine.add_event_handler(Events.ITERATION_COMPLETED, report)
    engine.run([0], max_epochs=num_saves * every)
    if every > 1:
        handler.wait_until_finished()
        report()


def typical_save_s(directory: Path, saver: str, world_size: int = 1) -> float:
    """Return the median seconds from one save to the next, measured in `directory`, which keeps the files."""
    seconds = []
    with saving(directory, saver, after=0, num_saves=8, world_size=world_size) as job:
        for count in range(2, 10):
            start = time.monotonic()
            job.wait_for(count)
            seconds.append(time.monotonic() - start)
    return statistics.median(seconds)
