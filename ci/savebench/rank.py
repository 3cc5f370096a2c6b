"""One rank of a benchmark's world.

Memory is measured first, while no contestant holds any. Then come rounds: in each, every contestant and the machine's
limits are measured once. Results go to a journal line by line, so that a contestant that breaks the job loses only its
own results.
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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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
from ci.savebench.measure import load_cold, save_and_load
from ci.savebench.meeting import Meeting
from ci.savebench.memory import Memory
from ci.savebench.sampler import sample
from ci.savebench.sharded_job import ShardedJob

GROUP_LIMIT = timedelta(seconds=120)
PR_SET_PDEATHSIG = 1
MEMORY_ROUND = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The measurements of one world.

    Attributes:
        world_size: number of ranks.
        state_bytes: approximate size of the model and its optimizer's state.
        names: names of the contestants.
        first_round: `MEMORY_ROUND`, or the round in which an earlier world broke. Round 0 warms up.
        num_rounds: number of timed rounds.
        folder: folder for checkpoints.
        journal: file that rank 0 writes to.
        port: port of the parent's store.
        is_sharded: whether each rank has a shard of the state.
        device: type of the device that has the model.
        saved: path and fingerprint of a checkpoint by contestant, to load only; empty to save and load.
    """

    world_size: int
    state_bytes: int
    names: tuple[str, ...]
    first_round: int
    num_rounds: int
    folder: Path
    journal: Path
    port: int
    is_sharded: bool = False
    device: str = "cpu"
    saved: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    def log_of(self, rank: int) -> Path:
        """Return the file that takes a rank's standard error."""
        return self.journal.with_name(f"{self.journal.name}-{rank}.log")


def run_rank(rank: int, plan: Plan) -> None:
    """Run one rank to the end, and exit: with status 1 after a failure, which is in the journal."""
    os.setsid()  # the parent kills the rank and its children as a group
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _, maximum = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (maximum, maximum))  # each tensor in shared memory takes a descriptor
    with plan.log_of(rank).open("ab") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())  # logs of contestants are not part of the output
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    store = dist.TCPStore("127.0.0.1", plan.port, is_master=False, timeout=GROUP_LIMIT)
    group_store = dist.PrefixStore("group", store)
    device, backend = torch.device(plan.device), "gloo"
    if plan.device == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        if plan.world_size <= torch.cuda.device_count():  # NCCL refuses ranks that share a GPU
            backend = "nccl"
    dist.init_process_group(backend, store=group_store, rank=rank, world_size=plan.world_size, timeout=GROUP_LIMIT)
    meeting = Meeting(dist.PrefixStore("bench", store), rank, plan.world_size)
    journal = Journal(plan.journal if rank == 0 else None)
    try:
        kind = ShardedJob if plan.is_sharded else Job
        Rounds(kind(meeting, plan.state_bytes, plan.folder, device), journal, plan).run()
        distckpt.finalize()
    except Exception:  # noqa: BLE001 - it goes to the journal; the parent kills ranks that hang in a collective
        Journal(plan.journal).write(kind="error", rank=rank, text=traceback.format_exc())
        os._exit(1)
    os._exit(0)  # do not wait for contestants' threads


class Journal:
    """A file of JSON lines that the parent reads.

    Args:
        path: path of the file; None on ranks that write nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def write(self, **line: Any) -> None:
        """Append a line."""
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


class Rounds:
    """Runs the measurements in order.

    Args:
        job: the training job.
        journal: takes the results.
        plan: the measurements to run.
    """

    def __init__(self, job: Job, journal: Journal, plan: Plan) -> None:
        self._job, self._journal, self._plan = job, journal, plan
        self._contestants: dict[str, Contestant] = {}
        self._number = 0

    def run(self) -> None:
        """Collective. Run all measurements."""
        num_tensors, num_bytes = self._job.size()
        self._journal.write(kind="state", num_tensors=num_tensors, num_bytes=num_bytes)
        if self._plan.first_round == MEMORY_ROUND:
            self._measure_memory()
        for name in self._plan.names:
            self._set_up(name)
        for number in range(max(0, self._plan.first_round), self._plan.num_rounds + 1):
            names = [LIMITS, *self._contestants]
            for name in names[number % len(names) :] + names[: number % len(names)]:
                with self._measuring(name, number):
                    self._measure(name, number)

    def _measure_memory(self) -> None:
        with self._sampling() as sampler:
            memory = Memory(self._job, sampler)
            for name in self._plan.names:
                with (
                    self._measuring(name, MEMORY_ROUND),
                    contextlib.suppress(MissingError, ImportError),
                ):  # _set_up reports it
                    num_bytes = memory.extra_bytes(FIELD[name], ("first", "second"))
                    self._journal.write(kind="memory", name=name, extra_bytes=num_bytes)
                self._clear(name)

    def _clear(self, name: str) -> None:
        self._job.meeting.barrier()
        if self._job.rank == 0:
            shutil.rmtree(self._job.folder / folder_name(name), ignore_errors=True)
        self._job.meeting.barrier()

    def _set_up(self, name: str) -> None:
        with self._measuring(name, self._plan.first_round):
            if name not in self._plan.saved:
                self._clear(name)  # an earlier world may have left files
            try:
                self._contestants[name] = FIELD[name](self._job)
            except (MissingError, ImportError) as error:
                self._journal.write(kind="missing", name=name, why=str(error))

    def _measure(self, name: str, number: int) -> None:
        if name == LIMITS:
            measured: dict[str, Any] = measure_limits(self._job)
        elif name in self._plan.saved:
            where, fingerprint = self._plan.saved[name]
            measured = load_cold(self._job, self._contestants[name], Path(where))
            measured["is_snapshot"] = set(measured["restored"]) == {fingerprint}
        else:
            keeps = self._plan.is_sharded and number == self._plan.num_rounds  # for a world of another size
            measured = save_and_load(self._job, self._contestants[name], self._path(name), keeps=keeps)
        self._journal.write(kind="measured", name=name, round=number, **measured)

    def _path(self, name: str) -> Path:
        self._number += 1
        folder = self._contestants[name].folder
        return folder / f"{self._plan.first_round}-{self._number}"

    @contextlib.contextmanager
    def _measuring(self, name: str, number: int) -> Iterator[None]:
        self._journal.write(kind="begin", name=name, round=number)
        self._job.meeting.barrier()
        yield
        self._job.meeting.barrier()

    @contextlib.contextmanager
    def _sampling(self) -> Iterator[Any]:
        pids = self._job.meeting.gather(os.getpid())
        if self._job.rank == 0:
            with sample(pids) as sampler:
                yield sampler
        else:
            yield None
