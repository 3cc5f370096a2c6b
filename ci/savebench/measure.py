"""Measure one save and one load of one contestant."""

import itertools
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events

from ci.savebench.contestant import Contestant
from ci.savebench.files import (
    drop_from_cache,
    num_bytes,
    read_from_storage,
    read_through_cache,
    sync,
    written_to_storage,
)
from ci.savebench.job import Job
from ci.savebench.limits import read_raw
from ci.savebench.sockets import received_bytes

NUM_WARM = 2  # iterations: in the first, the handlers of a new engine agree on their order
NUM_BEFORE = 3  # iterations without a save, before it and after
MAX_AFTER = 8
LIMIT_S = 100  # for a save; shorter than the process group's timeout


@dataclass(slots=True)
class Run:
    """Times of a few iterations with one save among them, on one rank.

    A step lasts from its start to the start of the next one, with all handlers, but without the save's stall.
    """

    without_s: list[float] = field(default_factory=list)
    during_s: list[float] = field(default_factory=list)
    began: float = 0.0
    went_on: float = 0.0
    ended: float = 0.0
    durable: float = 0.0
    fingerprint: int = 0
    received_bytes: int = 0
    written_bytes: int = 0

    def lost_s(self) -> float:
        """Return the time until the save was durable, minus the time of as many steps without a save."""
        return self.ended - self.began - len(self.during_s) * statistics.median(self.without_s)


class Stopwatch:
    """Takes times at the events of an engine, and ends its run.

    Args:
        job: the job that the engine trains.
        contestant: saves at an event.
        path: path of the checkpoint.
        max_after: largest number of steps after the save.
    """

    def __init__(self, job: Job, contestant: Contestant, path: Path, *, max_after: int = MAX_AFTER) -> None:
        self.run = Run()
        self._job, self._contestant, self._path = job, contestant, path
        self._at, self._max_after = NUM_WARM + NUM_BEFORE, max_after
        self._started = 0.0
        self._is_durable = False
        self._num_left = -1
        engine = Engine(job.step)
        engine.add_event_handler(Events.ITERATION_STARTED, self._on_started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._on_completed)
        contestant.attach(engine, at=self._at, path=path)
        engine.run(itertools.repeat(0), epoch_length=10**6)

    def _on_started(self, engine: Engine) -> None:
        now = time.monotonic()
        run, number = self.run, engine.state.iteration - 1  # of the step that has ended
        if number == self._at:
            run.went_on = now
            self._contestant.saved(self._path)
        elif number > self._at and not run.ended:
            run.during_s.append(now - self._started)
        elif number > NUM_WARM:
            run.without_s.append(now - self._started)
        if number >= self._at and not run.ended:
            self._check_durable()
            if self._is_durable:
                run.ended = now
                self._count(1)
        self._started = now

    def _on_completed(self, engine: Engine) -> None:
        number = engine.state.iteration
        if number == self._at:
            self._start_save()
        elif number > self._at and not self._is_durable:
            # All ranks agree, so that the window and the run end with the same step on each.
            self._check_durable()
            waiting = torch.tensor([not self.run.durable], dtype=torch.int32, device=self._job.device)
            dist.all_reduce(waiting, op=dist.ReduceOp.MAX)
            self._is_durable = not waiting.item()
            self._num_left = min(self._max_after, max(NUM_BEFORE, number - self._at)) + 1
            if not self._is_durable and time.monotonic() - self.run.began > LIMIT_S:
                msg = f"rank {self._job.rank}: not durable {LIMIT_S} s after the call"
                raise TimeoutError(msg)
        elif number > self._at:
            self._num_left -= 1
            if not self._num_left:
                engine.terminate()

    def _start_save(self) -> None:
        """Take the fingerprint of the state to save, and start the clock once all ranks have arrived."""
        self.run.without_s.append(time.monotonic() - self._started)
        self.run.fingerprint = self._job.fingerprint()
        self._count(-1)
        self._job.meeting.barrier()
        self.run.began = time.monotonic()

    def _count(self, sign: int) -> None:
        """Add or subtract what this rank has received and written until now."""
        self.run.received_bytes += sign * received_bytes()
        self.run.written_bytes += sign * written_to_storage(os.getpid())

    def _check_durable(self) -> None:
        if not self.run.durable:
            self.run.durable = self._contestant.durable_at() or 0.0


def save_and_load(job: Job, contestant: Contestant, path: Path, *, keeps: bool) -> dict[str, Any]:
    """Collective. Train, save in between, and load; return the numbers, each over all ranks.

    Args:
        job: the training job.
        contestant: saves and loads.
        path: path of the checkpoint.
        keeps: whether the checkpoint stays.
    """
    run = Stopwatch(job, contestant, path).run
    job.meeting.barrier()
    where = contestant.where(path)
    loaded = load_cold(job, contestant, where)
    rows = job.meeting.gather(
        {
            "began": run.began,
            "durable": run.durable,
            "stall_s": run.went_on - run.began,
            "lost_s": run.lost_s(),
            "received": run.received_bytes,
            "written": run.written_bytes,
            "saved": run.fingerprint,
        }
    )
    measured = {
        "stall_s": max(row["stall_s"] for row in rows),
        "durable_s": max(row["durable"] for row in rows) - min(row["began"] for row in rows),
        "lost_s": max(row["lost_s"] for row in rows),
        "received_bytes": sum(row["received"] for row in rows),
        "written_bytes": sum(row["written"] for row in rows),
        "is_snapshot": {row["saved"] for row in rows} == set(loaded["restored"]),
        "where": str(where),
        "saved": run.fingerprint,
        "steps_without_s": run.without_s,
        "steps_during_s": run.during_s,
        **loaded,
    }
    if contestant.consolidates and job.is_sharded:
        measured["consolidate_s"] = _consolidate(job, contestant, where)
    job.meeting.barrier()
    if job.rank == 0:
        if not keeps:
            contestant.remove(path)
        os.sync()  # so that no writeback falls into the next measurement
    job.meeting.barrier()
    return measured


def _consolidate(job: Job, contestant: Contestant, where: Path) -> float:
    """Return the seconds that rank 0 needs to make one file of a checkpoint, cold and synced; 0 on other ranks."""
    if job.rank:
        return 0.0
    target = job.folder / "consolidated.pt"
    drop_from_cache(where)
    begin = time.monotonic()
    contestant.consolidate(where, target)
    sync(target)
    taken = time.monotonic() - begin
    target.unlink()
    return taken


def load_cold(job: Job, contestant: Contestant, where: Path) -> dict[str, Any]:
    """Collective. Load a checkpoint that is not in the page cache; return the numbers, each over all ranks."""
    read_raw(job, where)  # a hypervisor may cache it: the second read and the load find the same cache
    raw_read_s = read_raw(job, where)
    if job.rank == 0:
        # A virtual machine may return free memory to its host, and getting it back costs more than the load (see
        # first_touch.py). After this the page cache most likely reuses pages.
        read_through_cache(where)
        drop_from_cache(where)
    read_before = read_from_storage(os.getpid())
    job.meeting.barrier()
    begin = time.monotonic()
    contestant.load(where)
    loaded = time.monotonic()
    read = read_from_storage(os.getpid()) - read_before
    rows = job.meeting.gather(
        {
            "load_began": begin,
            "loaded": loaded,
            "read": read,
            "restored": job.fingerprint(),
        }
    )
    return {
        "load_s": max(row["loaded"] for row in rows) - min(row["load_began"] for row in rows),
        "raw_read_s": raw_read_s,
        "read_bytes": sum(row["read"] for row in rows),
        "checkpoint_bytes": num_bytes(where),
        "restored": [row["restored"] for row in rows],
    }
