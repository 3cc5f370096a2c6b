"""One rank of a benchmark's world.

Owns the order of the measurements: memory first, while nobody holds any; then rounds, in each of which every contestant
and the limits have their turn. What is measured goes to a journal, line by line, so that a contestant that breaks the
job costs its own numbers only.
"""

import contextlib
import ctypes
import json
import logging
import os
import resource
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import distckpt
from ci.savebench.contestant import Contestant, MissingError, folder_name
from ci.savebench.field import FIELD
from ci.savebench.job import Job
from ci.savebench.limits import LIMITS, measure_limits
from ci.savebench.measure import save_and_load
from ci.savebench.meeting import Meeting
from ci.savebench.memory import Memory
from ci.savebench.sampler import watching

__all__ = ["MEMORY_ROUND", "Plan", "be_rank"]

GROUP_LIMIT = timedelta(seconds=120)
PR_SET_PDEATHSIG = 1
MEMORY_ROUND = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a world does.

    Attributes:
        world_size: how many ranks it has.
        state_bytes: of the model and its optimizer, about.
        names: who takes part.
        first_round: `MEMORY_ROUND`, or where a world before this one broke. Round 0 warms up.
        num_rounds: that are timed.
        folder: for checkpoints.
        journal: the file that rank 0 writes to.
        port: of the parent's store.
    """

    world_size: int
    state_bytes: int
    names: tuple[str, ...]
    first_round: int
    num_rounds: int
    folder: Path
    journal: Path
    port: int

    def log_of(self, rank: int) -> Path:
        """Return the file that a rank's standard error goes to."""
        return self.journal.with_name(f"{self.journal.name}-{rank}.log")


def be_rank(rank: int, plan: Plan) -> None:
    """Be one rank, until all is measured. Exit status 1 where something failed; the journal says what."""
    os.setsid()  # the parent ends the rank and its children together, and nobody else
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # tensors in shared memory have a descriptor each
    with plan.log_of(rank).open("ab") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())  # what contestants and their processes log is no part of the output
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    store = dist.TCPStore("127.0.0.1", plan.port, is_master=False, timeout=GROUP_LIMIT)
    group_store = dist.PrefixStore("group", store)
    dist.init_process_group("gloo", store=group_store, rank=rank, world_size=plan.world_size, timeout=GROUP_LIMIT)
    meeting = Meeting(dist.PrefixStore("bench", store), rank, plan.world_size)
    journal = Journal(plan.journal if rank == 0 else None)
    try:
        Rounds(Job(meeting, plan.state_bytes, plan.folder), journal, plan).run()
        distckpt.finalize()
    except Exception:  # noqa: BLE001 - told in the journal; other ranks may hang in a collective, and are ended
        Journal(plan.journal).tell(kind="error", rank=rank, text=traceback.format_exc())
        os._exit(1)
    os._exit(0)  # without waiting for threads of contestants


class Journal:
    """Lines of JSON for the parent.

    Args:
        path: None on ranks that have nothing to say.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def tell(self, **line: Any) -> None:
        """Append a line."""
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


class Rounds:
    """The measurements in their order.

    Args:
        job: to measure with.
        journal: to tell of them.
        plan: see there.
    """

    def __init__(self, job: Job, journal: Journal, plan: Plan) -> None:
        self._job, self._journal, self._plan = job, journal, plan
        self._contestants: dict[str, Contestant] = {}
        self._number = 0

    def run(self) -> None:
        """Collective. Do them all."""
        num_tensors, num_bytes = self._job.size()
        self._journal.tell(kind="state", num_tensors=num_tensors, num_bytes=num_bytes)
        if self._plan.first_round == MEMORY_ROUND:
            self._measure_memory()
        for name in self._plan.names:
            self._set_up(name)
        for number in range(max(0, self._plan.first_round), self._plan.num_rounds + 1):
            names = [LIMITS, *self._contestants]
            for name in names[number % len(names) :] + names[: number % len(names)]:
                with self._turn(name, number):
                    self._measure(name, number)

    def _measure_memory(self) -> None:
        with self._watching() as sampler:
            memory = Memory(self._job, sampler)
            for name in self._plan.names:
                with self._turn(name, MEMORY_ROUND), contextlib.suppress(MissingError, ImportError):  # told below
                    num_bytes = memory.extra_bytes(FIELD[name], ("first", "second"))
                    self._journal.tell(kind="memory", name=name, extra_bytes=num_bytes)
                self._clear(name)

    def _clear(self, name: str) -> None:
        self._job.meeting.barrier()
        if self._job.rank == 0:
            shutil.rmtree(self._job.folder / folder_name(name), ignore_errors=True)
        self._job.meeting.barrier()

    def _set_up(self, name: str) -> None:
        with self._turn(name, self._plan.first_round):
            self._clear(name)  # of a world before this one
            try:
                self._contestants[name] = FIELD[name](self._job)
            except (MissingError, ImportError) as error:
                self._journal.tell(kind="missing", name=name, why=str(error))

    def _measure(self, name: str, number: int) -> None:
        if name == LIMITS:
            measured = measure_limits(self._job)
        else:
            measured = save_and_load(self._job, self._contestants[name], self._path(name))
        self._journal.tell(kind="measured", name=name, round=number, **measured)

    def _path(self, name: str) -> Path:
        self._number += 1
        folder = self._contestants[name].folder
        return folder / f"{self._plan.first_round}-{self._number}"

    @contextlib.contextmanager
    def _turn(self, name: str, number: int) -> Iterator[None]:
        self._journal.tell(kind="begin", name=name, round=number)
        self._job.meeting.barrier()
        yield
        self._job.meeting.barrier()

    @contextlib.contextmanager
    def _watching(self) -> Iterator[Any]:
        pids = self._job.meeting.gather(os.getpid())
        if self._job.rank == 0:
            with watching(pids) as sampler:
                yield sampler
        else:
            yield None
