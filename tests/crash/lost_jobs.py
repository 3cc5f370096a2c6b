"""Jobs of `tests.crash.lost_ranks`, seen from their test: the server, the jobs' logs, and a table of times.

No process of a job outlives its test. Each is identified by its id and its start time.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.crash.lost_programs import Plan
from tests.crash.lost_ranks import start_time_of
from tests.support.limits import PROGRAM_LIMIT_S

__all__ = ["EXIT_BLOCKED", "End", "Job", "Jobs", "Table"]

EXIT_BLOCKED = 70
_ROOT = Path(__file__).resolve().parents[2]
_TRY_S = 15.0  # after which an agent's job is started again
_POLL_S = 0.02
_TORCH_SAYS = "The hostname of the client socket cannot be retrieved"
"""Where the name of 127.0.0.1 is not found in time, as on a busy machine."""
_NOISE = ("frame #", "Exception raised from", "<omitting python frames>")  # of torch's C++ stacks
_ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "RES_OPTIONS": "timeout:1 attempts:2",
    "PYTHONUNBUFFERED": "1",
    "PYTHONPATH": str(_ROOT),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The end of one rank.

    Attributes:
        rank: its number.
        after_s: seconds from the fault to the end of the run, or of the process.
        gone_s: seconds from the fault to the end of the process; None while it lives.
        kinds: names of the error's type and of its bases; empty without an error.
        text: the error's message, or the output of a process that ended itself.
        cause: the error's ``__cause__``.
        named: the ranks that the error names.
        iteration: the engine's iteration.
        is_own: whether the error is the object that the rank raised.
        was_blocked: whether distckpt ended the process, because its training thread was blocked.
    """

    rank: int
    after_s: float
    gone_s: float | None
    kinds: tuple[str, ...] = ()
    text: str = ""
    cause: str = ""
    named: tuple[int, ...] = ()
    iteration: int = 0
    is_own: bool = False
    was_blocked: bool = False


class Job:
    """A running job. :class:`Jobs` makes it."""

    def __init__(self, plan: Plan, pid: int) -> None:
        self.plan, self.pid = plan, pid
        self.folder = Path(plan.folder)
        self.fault_s: float | None = None
        self._gone_s: dict[int, float] = {}
        self._lines: list[dict[str, Any]] = []
        self._num_read = 0

    def events(self, what: str, rank: int | None = None) -> list[dict[str, Any]]:
        """Return the log lines of one kind so far, of one rank or of all."""
        self._look()
        return [line for line in self._lines if line["what"] == what and rank in (None, line["rank"])]

    def wait_for(self, condition: Callable[[], object], what: str, limit_s: float = 20.0) -> None:
        """Wait until `condition` holds.

        Raises:
            AssertionError: it does not within `limit_s`.
        """
        deadline = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {limit_s:g} s\n{self.describe()}")
            time.sleep(_POLL_S)

    def form(self, limit_s: float = PROGRAM_LIMIT_S) -> None:
        """Wait until the ranks have formed their group."""
        self.wait_for(lambda: len(self.events("formed")) == self.plan.world_size, "forming", limit_s)

    def say(self, word: str) -> None:
        """Say a word to the ranks, which may wait for it."""
        (self.folder / word).touch()

    def pid_of(self, rank: int) -> int:
        """Return a rank's process id."""
        return int(self.events("started", rank)[0]["pid"])

    def is_alive(self, rank: int) -> bool:
        """Return True if the rank's process exists, running or stopped."""
        started = self.events("started", rank)
        return bool(started) and start_time_of(started[0]["pid"]) == started[0]["start"]

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank, if its process exists."""
        if self.is_alive(rank):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid_of(rank), number)

    def output(self, rank: int) -> str:
        """Return what a rank wrote on stdout and stderr, without what torch says of the machine's names."""
        path = self.folder / f"output_{rank}"
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        return "".join(line for line in text.splitlines(keepends=True) if _TORCH_SAYS not in line)

    def end(self, rank: int) -> End | None:
        """Return the end of a rank's run or process; None while it runs."""
        ended = self.events("ended", rank)
        gone_s = self._gone_s.get(rank)
        begin_s = self.fault_s or 0.0
        after_s = None if gone_s is None else gone_s - begin_s
        if ended:
            last = ended[-1]
            named = tuple(last["missing"] or last["failed"])
            fields = {name: last[name] for name in ("text", "cause", "iteration", "is_own")}
            kinds = tuple(last["kinds"])
            return End(rank=rank, after_s=last["at_s"] - begin_s, gone_s=after_s, kinds=kinds, named=named, **fields)
        if after_s is None:
            return None
        exited = self.events("exited", rank)
        text = self.output(rank)
        is_blocked = f"the process ends, exit code {EXIT_BLOCKED}" in text
        if exited and is_blocked:
            assert exited[0]["code"] == EXIT_BLOCKED, self.describe()
        return End(rank=rank, after_s=after_s, gone_s=after_s, text=text, was_blocked=is_blocked)

    def is_over(self, rank: int) -> bool:
        """Return True if a rank's process has ended, or lingers as planned."""
        self._look()
        return rank in self._gone_s or (rank in self.plan.lingers and bool(self.events("lingers", rank)))

    def describe(self) -> str:
        """Return the plan, the log and the output, for the message of a failing test."""
        lines = [f"{self.plan}"]
        for line in self._lines:
            at_s = line["at_s"] - (self.fault_s or self._lines[0]["at_s"])
            lines.append(f"{at_s:+.2f} s  " + json.dumps({name: line[name] for name in line if name != "at_s"}))
        lines += [f"rank {rank} gone at {at_s - (self.fault_s or 0.0):+.2f} s" for rank, at_s in self._gone_s.items()]
        for path in sorted(self.folder.glob("output_*")):
            text = path.read_text(encoding="utf-8", errors="replace").splitlines()
            text = [line for line in text if not line.startswith(_NOISE)]
            lines += [f"--- {path.name}", *text[-60:]]
        return "\n".join(lines)

    def kill_launcher(self) -> None:
        """Kill the launcher. It has not been reaped, so that no other process has its id."""
        self.fault_s = time.monotonic()
        os.kill(self.pid, signal.SIGKILL)

    def kill(self) -> None:
        """Kill the ranks whose processes exist."""
        for rank in range(self.plan.world_size):
            self.send(rank, signal.SIGKILL)

    def _look(self) -> None:
        log = self.folder / "log"
        if log.exists():
            lines = log.read_bytes().split(b"\n")[:-1]
            self._lines += [json.loads(line) for line in lines[self._num_read :]]
            self._num_read = len(lines)
        if self.fault_s is None:
            self.fault_s = next((line["at_s"] for line in self._lines if line["what"] == "fault"), None)
        now_s = time.monotonic()
        for line in self._lines:
            if line["what"] == "started" and start_time_of(line["pid"]) != line["start"]:
                self._gone_s.setdefault(line["rank"], now_s)
        for line in self._lines:
            if line["what"] == "exited":  # a parent's time is more exact
                self._gone_s[line["rank"]] = line["at_s"]


class Jobs:
    """The server and its jobs: a context manager, at whose end all processes end."""

    def __enter__(self) -> Self:
        """Start the server."""
        self._folder = Path(tempfile.mkdtemp(prefix="distckpt-lost-"))
        self._jobs: list[Job] = []
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.lost_ranks", "serve"],
            cwd=_ROOT,
            env={**os.environ, **_ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        return self

    def __exit__(self, *_error: object) -> None:
        """End everything."""
        self.end(self._jobs)
        with contextlib.suppress(OSError):
            self._server.communicate(timeout=PROGRAM_LIMIT_S)
        if self._server.poll() is None:
            self._server.kill()
            self._server.wait(PROGRAM_LIMIT_S)
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self, **what: Any) -> Job:
        """Start a job; the arguments are those of :class:`~tests.crash.lost_programs.Plan`."""
        plan = Plan(folder=tempfile.mkdtemp(dir=self._folder), **what)
        job = Job(plan, self._order({"start": plan.encode()}))
        self._jobs.append(job)
        return job

    def start_all(self, plans: Sequence[dict[str, Any]]) -> list[Job]:
        """Start several jobs, whose ranks then begin together."""
        jobs = [self.start(**what) for what in plans]
        for number, what in enumerate(plans):
            jobs[number] = self._formed(jobs[number], what)
        for job in jobs:
            job.say("go")
        return jobs

    def _formed(self, job: Job, what: dict[str, Any]) -> Job:
        """Wait until a job's ranks have formed their group; start the job again if they do not.

        torchrun's agent has threads when it forks the ranks. One time in hundreds all ranks hang in
        ``init_process_group``, before they use distckpt.
        """
        try:
            job.form(_TRY_S)
        except AssertionError:
            if job.plan.launcher != "agent":
                job.form()
                return job
        else:
            return job
        self.end([job])
        again = self.start(**what)
        again.form()
        return again

    def end(self, jobs: Sequence[Job]) -> None:
        """Kill the remaining processes of some jobs."""
        for job in jobs:
            if job in self._jobs:
                self._jobs.remove(job)
                job.kill()
                self._order({"end": job.pid})

    def _order(self, order: dict[str, Any]) -> Any:
        if self._server.stdin is None or self._server.stdout is None:
            raise AssertionError("the server was started with pipes")
        self._server.stdin.write(f"{json.dumps(order)}\n".encode())
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if answer == b'"ready"\n':
            answer = self._server.stdout.readline()
        return json.loads(answer)


class Table:
    """The survivors' times, one line per trial."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, ...], dict[str, float]] = {}

    def add(self, job: Job, ends: Sequence[End], lost: str | None = None) -> None:
        """Add the last survivor's time.

        Args:
            job: the job.
            ends: the survivors' ends.
            lost: the lost part; None for the plan's victim.
        """
        plan = job.plan
        how = "some linger" if plan.lingers else "all leave"
        row = self._rows.setdefault((plan.fault, plan.program, plan.step, plan.launcher, how), {})
        key = str(plan.victim) if lost is None else lost
        row[key] = max([row.get(key, 0.0), *(end.after_s for end in ends)])

    def __str__(self) -> str:
        """Return it as text."""
        head = (
            "fault",
            "program",
            "step",
            "launcher",
            "others",
            "last survivor's end, s after the fault, by what is lost",
        )
        rows: list[tuple[str, ...]] = [head]
        for key, times in sorted(self._rows.items()):
            rows.append((*key, "  ".join(f"{lost}: {after_s:.2f}" for lost, after_s in sorted(times.items()))))
        widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
        )
