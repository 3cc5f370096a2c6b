"""The programs that a rank of `tests.crash.lost_ranks` runs: training, saving, evaluating, and the fault.

A rank writes each event, with its time, as one line into the job's log. The test's words to the ranks, and theirs to
each other, are files in the job's folder.
"""

import atexit
import contextlib
import json
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events

from distckpt import Checkpoint, DiskSaver, RemoteRankError, TerminateOnNan, TimeLimit
from distckpt.backends import key_value_store
from distckpt.backends.detect import current
from distckpt.coordination.heartbeat import HeartbeatMonitor
from distckpt.storage.direct_io import DirectFile
from tests.crash.hosts import address_of

__all__ = ["PROGRAMS", "Plan", "Rank", "form_group"]


_LINGER_S = 60.0  # longer than any trial; the test ends it
_LOOPBACK = "127.0.0.1"
_STEP_S = 0.02
_UNDER_WAY = 5
_MANY = 2000  # iterations that take longer than any trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The plan of a job.

    Attributes:
        folder: the job's folder, for its log, its ranks' output, and the test's words.
        program: a key of `PROGRAMS`.
        world_size: number of ranks.
        launcher: "nobody": each rank is a separate program, and rank 0 hosts the store; "parent": a process spawns
            them, and rank 0 hosts the store; "agent": torchrun's agent, which hosts the store; "torchrun": the real
            program, which takes seconds to start.
        hosts: the namespaces of hosts (see `tests.crash.hosts`). An equal number of ranks runs on each, in order, and
            an agent where there are agents. Empty for the server's namespace.
        port: the port on the first host where the agents of several hosts meet.
        victim: the rank that is lost.
        fault: "SIGKILL", "SIGSTOP", "exception", "exception like a lost peer's", "sys.exit",
            "os._exit", "sleeps", or, of a program that ends well, "nothing waits".
        at: the iteration of the fault.
        step: "vote": the step has no collective; "ddp": a backward pass of DistributedDataParallel on Gloo. Some
            programs have other kinds.
        step_s: seconds that a step takes.
        lingers: ranks that catch the error and stay.
        lag: the votes' lag.
        timeout_s: the time limit.
        seed: the seed of random moments.
    """

    folder: str
    program: str = "train"
    world_size: int = 4
    launcher: str = "nobody"
    hosts: tuple[str, ...] = ()
    port: int = 0
    victim: int = 0
    fault: str = "none"
    at: int = 30
    step: str = "vote"
    step_s: float = 0.02
    lingers: tuple[int, ...] = ()
    lag: int | None = None
    timeout_s: float = 3.0
    seed: int = 0

    def encode(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: str) -> "Plan":
        """Rebuild it from :meth:`encode`."""
        fields = json.loads(text)
        return Plan(**{**fields, "lingers": tuple(fields["lingers"]), "hosts": tuple(fields["hosts"])})

    def host_of(self, rank: int) -> int:
        """Return the number of the host that a rank is on."""
        return rank * len(self.hosts) // self.world_size


class Rank:
    """One rank of a job: it writes the job's log.

    Args:
        plan: the job's plan.
        rank: its number.
    """

    def __init__(self, plan: Plan, rank: int) -> None:
        self.plan, self.rank = plan, rank
        self.folder = Path(plan.folder)
        self.is_victim = rank == plan.victim
        self._log = os.open(self.folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def report(self, what: str, **fields: object) -> None:
        """Write a line into the job's log."""
        line = {"rank": self.rank, "what": what, "at_s": time.monotonic(), **fields}
        os.write(self._log, (json.dumps(line) + "\n").encode())  # short, so that it is written whole or not at all

    def has_heard(self, word: str) -> bool:
        """Return True if the test has said `word`."""
        return (self.folder / word).exists()

    def await_word(self, word: str, limit_s: float = _LINGER_S) -> None:
        """Wait until the test has said `word`."""
        deadline = time.monotonic() + limit_s
        while not self.has_heard(word) and time.monotonic() < deadline:
            time.sleep(0.01)

    def say(self, word: str) -> None:
        """Say `word` to the other ranks, as the test can."""
        (self.folder / word).touch()

    def ended(self, error: BaseException | None, engine: Engine, raised: BaseException | None = None) -> None:
        """Report how a run ended."""
        cause = None if error is None else error.__cause__
        self.report(
            "ended",
            iteration=engine.state.iteration,
            kinds=[] if error is None else [kind.__name__ for kind in type(error).__mro__],
            text="" if error is None else str(error),
            missing=list(getattr(error, "missing", ())),
            failed=[failure.rank for failure in error.failures] if isinstance(error, RemoteRankError) else [],
            cause="" if cause is None else f"{type(cause).__name__}: {cause}"[-1500:],
            is_own=error is not None and error is raised,
        )

    def linger(self) -> None:
        """Stay until the test ends the rank, if the plan says so."""
        if self.rank in self.plan.lingers:
            self.report("lingers")
            self.await_word("enough")


# -- what a rank runs --------------------------------------------------------------------------------


class _Trainer:
    """An engine with handlers that vote. Its process function commits the fault.

    Args:
        me: the rank.
        fails_in_step: whether the process function commits the fault; if not, the program does.
    """

    def __init__(self, me: Rank, *, fails_in_step: bool = True) -> None:
        self.me = me
        self._fails_in_step = fails_in_step and me.is_victim
        # The first has the words of a broken collective, and is still the user's error.
        is_alike = me.plan.fault == "exception like a lost peer's"
        self._error = RuntimeError("connection to the data server timed out") if is_alike else KeyError("bad batch")
        model: torch.nn.Module = torch.nn.Linear(4, 4)
        self.model = torch.nn.parallel.DistributedDataParallel(model) if me.plan.step == "ddp" else model
        self.engine = Engine(self._step)
        self.engine.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(lag=me.plan.lag))
        self.engine.add_event_handler(Events.ITERATION_COMPLETED, TimeLimit(600))

    def _step(self, engine: Engine, _batch: Any) -> dict[str, Any]:
        if self._fails_in_step and engine.state.iteration == self.me.plan.at:
            self.fail()
        if engine.state.iteration == _UNDER_WAY:
            self.me.report("under way")
        time.sleep(self.me.plan.step_s)
        if self.me.plan.step == "ddp":
            self.model(torch.ones(2, 4)).sum().backward()
        is_over = self.me.rank == 0 and self.me.has_heard("stop")
        return {"loss": torch.full((2,), math.nan if is_over else 0.0)}  # all ranks stop together on a NaN

    def fail(self) -> None:
        """Commit the fault. Returns if the rank survives it."""
        fault = self.me.plan.fault
        self.me.report("fault")
        if fault in ("SIGKILL", "SIGSTOP"):
            os.kill(os.getpid(), getattr(signal, fault))
        elif fault.startswith("exception"):
            raise self._error
        elif fault == "sys.exit":
            sys.exit(0)
        elif fault == "os._exit":
            os._exit(0)
        elif fault == "sleeps":
            self.me.await_word("awake")
        self.me.report("after the fault")

    def run(self, num_iterations: int = _MANY) -> None:
        """Run, report how it ended, and linger if the plan says so."""
        try:
            self.engine.run(range(num_iterations), max_epochs=1)
        except Exception as error:  # noqa: BLE001 - any end is reported
            self.me.ended(error, self.engine, self._error)
        else:
            self.me.ended(None, self.engine)
        self.me.linger()


def train(me: Rank) -> None:
    """Train until the victim commits the fault in its step, or the test says "stop"."""
    _Trainer(me).run()


def save(me: Rank) -> None:
    """Commit the fault in the middle of writing a checkpoint, on the rank that writes: rank 0."""
    trainer = _Trainer(me, fails_in_step=False)
    write = DirectFile.write

    def failing_write(self: DirectFile, data: memoryview, offset: int) -> None:
        write(self, data, offset)
        if trainer.engine.state.iteration == me.plan.at:
            trainer.fail()

    DirectFile.write = failing_write  # type: ignore[method-assign]  # in this process, which the test ends
    handler = Checkpoint({"model": trainer.model}, DiskSaver(me.folder / "checkpoints"), n_saved=None)
    trainer.engine.add_event_handler(Events.ITERATION_COMPLETED(every=me.plan.at // 2), handler)
    trainer.run()


def evaluate(me: Rank) -> None:
    """Commit the fault in the process function of an evaluator that runs in the trainer's events."""
    trainer = _Trainer(me, fails_in_step=False)

    def evaluate_step(engine: Engine, _batch: Any) -> torch.Tensor:
        if me.is_victim and engine.state.iteration == 3 and trainer.engine.state.iteration == me.plan.at:
            trainer.fail()
        return torch.zeros(2)

    evaluator = Engine(evaluate_step)
    if me.plan.step == "voting evaluator":
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    trainer.engine.add_event_handler(
        Events.ITERATION_COMPLETED(every=me.plan.at // 2), lambda: evaluator.run(range(6), max_epochs=1)
    )
    trainer.run()


def run_again(me: Rank) -> None:
    """Raise the same error on all ranks in the same iteration, catch it, and run again: quickly twice, then slowly."""
    engine = _engine_that_fails(me)
    for attempt in range(3):
        if attempt and me.plan.step == "new engine":
            engine = _engine_that_fails(me)
        engine.state.max_epochs = None  # begin anew
        vars(engine)["attempt"] = attempt
        error = ValueError(f"attempt {attempt}")
        vars(engine)["error"] = error
        try:
            engine.run(range(me.plan.at + 2 if attempt < 2 else 3), max_epochs=1)
        except ValueError as caught:
            me.ended(caught, engine, error)
        except Exception as caught:  # noqa: BLE001 - any end is reported
            me.ended(caught, engine)
            return
        else:
            me.ended(None, engine)


def _engine_that_fails(me: Rank) -> Engine:
    def step(engine: Engine, _batch: Any) -> torch.Tensor:
        attempt: int = vars(engine)["attempt"]
        if attempt < 2 and engine.state.iteration == me.plan.at:
            if me.plan.step == "one after the other":
                time.sleep(0.3 * me.rank)
            raise vars(engine)["error"]
        time.sleep((0.0, _STEP_S, 1.3)[attempt])  # 1.3 s: longer than a rank waits before it reads the store
        return torch.zeros(2)

    engine = Engine(step)
    engine.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    return engine


def end_early(me: Rank) -> None:
    """End the victim's run before the others': its data end first. It lingers or leaves."""
    trainer = _Trainer(me, fails_in_step=False)
    if me.is_victim:
        trainer.engine.add_event_handler(Events.COMPLETED, lambda: me.report("fault"))
    trainer.run(me.plan.at if me.is_victim else _MANY)


def end_well(me: Rank) -> None:
    """End a job without a fault; its ranks end at different moments."""
    _Trainer(me).run(me.plan.at)
    moments = random.Random(me.plan.seed)
    pauses_s = [moments.choice((0.0, 0.05, 0.4, 1.2)) for _ in range(me.plan.world_size)]
    if me.plan.seed % 2:
        dist.destroy_process_group()
    time.sleep(pauses_s[me.rank])


def end_slowly(me: Rank) -> None:
    """End a job without a fault, in every way in which one of distckpt's threads could still use the store.

    The store may be slow (`step`). Exit functions of other libraries, and the interpreter's end, take time. With the
    fault "nothing waits" the process waits for no thread of distckpt's, as a control.
    """
    moments = random.Random(me.plan.seed)
    slow_s, late_s = moments.choice(((0.2, 0.3), (0.5, 0.0)))
    leaves_group, saves = moments.random() < 0.25, moments.random() < 0.5
    trainer = _Trainer(me)
    if saves:
        saver = DiskSaver(me.folder / "checkpoints", background=moments.random() < 0.5)
        trainer.engine.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint({"model": trainer.model}, saver))
    trainer.run(me.plan.at)
    if me.plan.step == "slow store":
        # The control's call is still under way when the interpreter shuts down, however long the exit functions take.
        _leave_a_call_under_way(_LINGER_S if me.plan.fault == "nothing waits" else slow_s)
        atexit.register(time.sleep, late_s)  # an exit function of another library, which runs before distckpt's
    if me.plan.fault == "nothing waits":
        threading.Thread.join = _do_not_join  # type: ignore[method-assign]  # this process ends now
    elif leaves_group:
        dist.destroy_process_group()
    vars(sys.modules["__main__"])["slow"] = _SlowEnd()


def _leave_a_call_under_way(slow_s: float) -> None:
    """Make each read of the job's store take `slow_s` seconds, and start one without waiting for its end."""
    get_many = key_value_store._get_many

    def get_many_slowly(store: dist.Store, keys: list[str]) -> list[str | None]:
        deadline = time.monotonic() + slow_s
        while time.monotonic() < deadline:
            with contextlib.suppress(dist.DistStoreError):
                store.wait(["never"], timedelta(seconds=0.05))
        return get_many(store, keys)

    key_value_store._get_many = get_many_slowly
    monitor = current().monitor
    assert isinstance(monitor, HeartbeatMonitor)
    with contextlib.suppress(TimeoutError):
        monitor._store.get_many(["never"], limit_s=0.05)


class _SlowEnd:
    """Takes time while the interpreter shuts down."""

    def __del__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        sleep(0.5)


def _do_not_join(self: threading.Thread, timeout: float | None = None) -> None:
    del self, timeout


def two_jobs(me: Rank) -> None:
    """Use two process groups, one after the other, and report distckpt's threads during and after each."""
    for number in range(2):
        if number:
            form_group(me, number)
        _Trainer(me).run(4)
        me.report("threads in the job", names=_our_threads())
        dist.destroy_process_group()
        deadline = time.monotonic() + 5.0
        while _our_threads() and time.monotonic() < deadline:
            time.sleep(0.02)
        me.report("threads after the job", names=_our_threads())


def _our_threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("distckpt"))


PROGRAMS: dict[str, Callable[[Rank], None]] = {
    "train": train,
    "save": save,
    "evaluate": evaluate,
    "run again": run_again,
    "end early": end_early,
    "end well": end_well,
    "end slowly": end_slowly,
    "two jobs": two_jobs,
}


def form_group(me: Rank, number: int) -> None:
    """Form the rank's process group, the first one or a later one."""
    if me.plan.launcher in ("agent", "torchrun"):
        dist.init_process_group("gloo")
        return
    limit = timedelta(seconds=60)
    address = address_of(0) if me.plan.hosts else _LOOPBACK
    port = me.folder / f"port_{number}"
    if me.rank == 0:
        # What env:// does on rank 0, except that the system chooses the port.
        store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=limit)
        port.with_suffix(".new").write_text(str(store.port), encoding="ascii")
        port.with_suffix(".new").rename(port)
    else:
        me.await_word(port.name)
        number = int(port.read_text(encoding="ascii"))
        store = dist.TCPStore(address, number, is_master=False, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=me.rank, world_size=me.plan.world_size)
