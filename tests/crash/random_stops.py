"""Short runs that something stops at a random moment on a random rank: what a rank of such a job does.

Owns the plan of a run, which each rank and the test compute from the same seed; how its trainer and handlers are made;
and how a signal, a time-out or a NaN comes into it. Signals are real ones, sent by another thread or another process
at a moment of the clock, wherever the run is; a time-out is the real clock running out. What has to come of a run is
said in `tests.crash.test_random_stops`.
"""

import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import ignite.handlers
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events

from distckpt import Checkpoint, Preemption, TerminateOnNan, TimeLimit, stop_reason
from tests.distributed.programs import HUNG, unless_hung
from tests.distributed.voters import Weights
from tests.support import run_ranks

__all__ = ["KINDS", "LIMIT_S", "Cause", "End", "Plan", "plan_of", "run_job"]

Kind = Literal["nan", "time_limit", "preempted"]
KINDS: tuple[Kind, ...] = ("nan", "time_limit", "preempted")
"""What can stop a run, by the stop reason."""
LIMIT_S = 20.0
"""How long a rank waits for another one, and the most that a run may take."""

_HOURS_S = 3600
_STEP_S = 0.003
_HANDLERS = ("nan", "time", "preemption", "checkpoint", "best", "evaluator")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Something that stops a run.

    Attributes:
        kind: what.
        rank: on which rank.
        share: when, as a share of the time that the run takes without it, counted from its first step.
        is_early: counted from before the run instead, while the ranks are being connected.
        iteration: of a NaN: in which iteration.
        place: of a NaN: where in the output.
        value: of a NaN: what is there.
        sender: of a signal: the rank that sends it, from a thread; of a time-out: unequal to `rank` if a thread moves
            the clock, else it runs out by itself.
        number: of a signal: which.
    """

    kind: Kind
    rank: int
    share: float
    is_early: bool
    iteration: int
    place: int
    value: float
    sender: int
    number: signal.Signals


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run, the same on all ranks.

    Attributes:
        seed: what it was made from.
        world_size: number of ranks.
        num_epochs: how many.
        epoch_length: iterations in each.
        order: in which order the handlers are attached, by name.
        causes: what happens.
        pace: lag and interval.
        paced: the handlers to which these are given.
        save_every: the Checkpoint saves each so-many-th iteration; 0 for each epoch.
        n_saved: how many it keeps.
        is_coupled: whether a step reduces a gradient over the ranks.
        evaluator_every: an evaluator runs each so-many-th iteration; 0 for each epoch.
    """

    seed: str
    world_size: int
    num_epochs: int
    epoch_length: int
    order: tuple[str, ...]
    causes: tuple[Cause, ...]
    pace: dict[str, Any]
    paced: tuple[str, ...]
    save_every: int
    n_saved: int | None
    is_coupled: bool
    evaluator_every: int

    @property
    def num_iterations(self) -> int:
        """Its full length."""
        return self.num_epochs * self.epoch_length

    @property
    def breaks_at(self) -> float:
        """From which iteration on the weights hold NaN."""
        return min((cause.iteration for cause in self.causes if cause.kind == "nan"), default=math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a run ended on one rank.

    Attributes:
        iteration: the last one.
        reason: the stop reason; `HUNG` where a collective of the job's was not answered.
        history: names of the files that the Checkpoint believes in.
        best: of the one that keeps the best.
        preempted: what Preemption says.
        took_s: seconds.
    """

    iteration: int
    reason: str | None
    history: tuple[str, ...] = ()
    best: tuple[str, ...] = ()
    preempted: bool = False
    took_s: float = 0.0


def plan_of(seed: str, world_size: int, kinds: tuple[Kind, ...] | None = None, **given: Any) -> Plan:
    """Return the run that a seed stands for.

    Args:
        seed: any text.
        world_size: number of ranks.
        kinds: what happens; None to let the seed say it.
        **given: attributes of the plan that are not left to the seed.
    """
    draw = random.Random(seed)
    num_epochs, epoch_length = draw.randint(1, 3), draw.randint(3, 9)
    if kinds is None:
        kinds = tuple(draw.sample(KINDS, draw.choice((0, 1, 1, 1, 1, 1, 1, 2))))
    causes = tuple(
        Cause(
            kind=kind,
            rank=draw.randrange(world_size),
            share=draw.uniform(0.0, 1.1),
            is_early=draw.random() < 0.1,
            iteration=draw.randint(1, num_epochs * epoch_length),
            place=draw.randrange(len(_PLACES)),
            value=draw.choice((math.nan, math.inf, -math.inf)),
            sender=draw.randrange(world_size),
            number=draw.choice((signal.SIGTERM, signal.SIGUSR1)),
        )
        for kind in kinds
        for _ in range(draw.choice((1, 1, 1, 2)))
    )
    choices: dict[str, Any] = {
        "order": tuple(draw.sample(_HANDLERS, len(_HANDLERS))),
        "pace": {
            name: value
            for name, value in (("lag", draw.choice((None, 0, 1, 1))), ("every", draw.choice((None, None, 1, 2, 3))))
            if value is not None
        },
        "paced": tuple(draw.sample(_HANDLERS[:3], draw.randint(1, 3))),
        "save_every": draw.choice((0, 0, 1, 2, 3)),
        "n_saved": draw.choice((None, None, 1, 2)),
        "is_coupled": draw.random() < 0.3,
        "evaluator_every": draw.choice((0, 4)),
    }
    return Plan(
        seed=seed,
        world_size=world_size,
        num_epochs=num_epochs,
        epoch_length=epoch_length,
        causes=causes,
        **{**choices, **given},
    )


def run_job(
    folder: Path, plans: list[Plan], *, library: str = "distckpt", hang_limit_s: float | None = None
) -> list[list[End]]:
    """Run the plans one after the other, on the ranks of one job; return each run's ends, in rank order.

    Args:
        folder: run n saves in its subfolder `n`.
        plans: of equal world size.
        library: "ignite" for the control: handlers that each rank obeys by itself.
        hang_limit_s: timeout of the job's own collectives; a run in which one is not answered is the job's last.
    """
    __tracebackhide__ = True
    ends = run_ranks(
        _be_a_rank,
        plans[0].world_size,
        str(folder),
        plans,
        library,
        collective_timeout_s=hang_limit_s,
        timeout_s=4 * LIMIT_S,
    )
    return [list(of_run) for of_run in zip(*ends, strict=False)]


def _be_a_rank(folder: str, plans: list[Plan], library: str) -> list[End]:
    ends: list[End] = []
    for number, plan in enumerate(plans):
        run = _Run(plan, f"{folder}/{number}") if library == "distckpt" else _RunOfControl(plan)
        end = unless_hung(run.run)
        if not isinstance(end, End):
            ends.append(End(iteration=run.trainer.state.iteration, reason=HUNG))
            break
        ends.append(end)
    return ends


# -- a run -------------------------------------------------------------------------------------------

_PLACES: tuple[Callable[[float], Any], ...] = (
    lambda value: {"loss": value, "logits": [torch.zeros(3), (0.5, torch.zeros(2, 2))]},
    lambda value: {"loss": 0.5, "logits": [torch.tensor([0.0, value, 0.0]), (0.5, torch.zeros(2, 2))]},
    lambda value: {"loss": 0.5, "logits": [torch.zeros(3), (value, torch.zeros(2, 2))]},
    lambda value: {"loss": 0.5, "logits": [torch.zeros(3), (0.5, torch.tensor([[0.0, 0.0], [0.0, value]]))]},
    torch.tensor,
    lambda value: value,
)
"""Outputs that a number can break."""


class _Run:
    """A run on one rank.

    Args:
        plan: which.
        folder: where it saves.
    """

    def __init__(self, plan: Plan, folder: str) -> None:
        self.plan = plan
        self.rank = dist.get_rank()
        self.trainer = Engine(self._step)
        self._weights = Weights(breaks_at=plan.breaks_at)
        self._pauses = random.Random(f"{plan.seed}/{self.rank}")
        self._make_handlers(folder)

    def _make_handlers(self, folder: str) -> None:
        plan, trainer = self.plan, self.trainer
        to_save = {"weights": self._weights}
        self.checkpoint = Checkpoint(to_save, f"{folder}/latest", n_saved=plan.n_saved, timeout_s=LIMIT_S)
        # Another score on each rank: their mean decides, and where no rank's own calls for a save none is asked for.
        self.best = Checkpoint(
            to_save,
            f"{folder}/best",
            score_function=lambda _: self._pauses.random(),
            timeout_s=LIMIT_S,
        )
        pace = {name: plan.pace if name in plan.paced else {} for name in _HANDLERS}
        iteration, epoch = Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED
        for name in plan.order:
            if name == "nan":
                trainer.add_event_handler(iteration, TerminateOnNan(timeout_s=LIMIT_S, **pace[name]))
            elif name == "time":
                self.limit: Any = TimeLimit(_HOURS_S, timeout_s=LIMIT_S, **pace[name])
                trainer.add_event_handler(iteration, self.limit)
            elif name == "preemption":
                self.preemption = Preemption(trainer, self.checkpoint, timeout_s=LIMIT_S, **pace[name])
            elif name == "checkpoint":
                every = plan.save_every
                trainer.add_event_handler(iteration(every=every) if every else epoch, self.checkpoint)
            elif name == "best":
                trainer.add_event_handler(iteration(every=2), self.best)
            else:
                every = plan.evaluator_every
                trainer.add_event_handler(iteration(every=every) if every else epoch, self._evaluate)

    def _evaluate(self) -> None:
        evaluator = Engine(lambda _engine, _batch: self._pause())
        evaluator.run([0, 0])

    def _pause(self) -> None:
        time.sleep(self._pauses.uniform(0.0, _STEP_S))

    def _step(self, engine: Engine, _batch: object) -> Any:
        iteration = self._weights.step = engine.state.iteration
        self._pause()
        if self.plan.is_coupled:
            dist.all_reduce(torch.ones(1))
        place, value = iteration % len(_PLACES), 0.25
        for cause in self.plan.causes:
            if cause.kind == "nan" and cause.rank == self.rank and cause.iteration == iteration:
                place, value = cause.place, cause.value
        return _PLACES[place](value)

    def run(self) -> End:
        """Run, let happen what happens, and return how it ended."""
        pids: list[Any] = [None] * self.plan.world_size
        dist.all_gather_object(pids, os.getpid())
        try:
            with _Happening() as happening:
                for cause in self.plan.causes:
                    for after_s, act in self._arranged(cause, pids):
                        happening.arrange(after_s, act, is_early=cause.is_early)
                self.trainer.add_event_handler(Events.ITERATION_STARTED(once=1), happening.begin)
                begin_s = time.monotonic()
                self.trainer.run([0] * self.plan.epoch_length, max_epochs=self.plan.num_epochs)
                took_s = time.monotonic() - begin_s
            dist.barrier()  # no signal is under way any more
        finally:
            self._close()
        return self._end(took_s)

    def _close(self) -> None:
        self.preemption.close()

    def _end(self, took_s: float) -> End:
        return End(
            iteration=self.trainer.state.iteration,
            reason=stop_reason(self.trainer),
            history=tuple(name for _, name in self.checkpoint.state_dict()["_saved"]),
            best=tuple(name for _, name in self.best.state_dict()["_saved"]),
            preempted=self.preemption.preempted,
            took_s=took_s,
        )

    def _arranged(self, cause: Cause, pids: list[int]) -> Iterator[tuple[float, Callable[[], None]]]:
        """Yield what this rank has to do at which time of the run, in seconds, for a cause."""
        # About what a run takes: the longest pause of any rank, the vote, and a save now and then.
        after_s = cause.share * self.plan.num_iterations * 2 * _STEP_S
        if cause.kind == "preempted" and self.rank == cause.sender:
            yield after_s, lambda: os.kill(pids[cause.rank], cause.number)
        elif cause.kind == "time_limit" and self.rank == cause.rank:
            if cause.sender == cause.rank:
                self.limit.start_time += after_s - self.limit.limit_sec  # it runs out by itself
            else:
                yield after_s, self._let_hours_pass

    def _let_hours_pass(self) -> None:
        self.limit.start_time -= _HOURS_S + 1


class _RunOfControl(_Run):
    """The same run with handlers that stop the rank on which they stand: ignite's, and a flag that a signal sets."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, "")

    def _make_handlers(self, folder: str) -> None:
        del folder
        self.limit = ignite.handlers.TimeLimit(_HOURS_S)
        self._received = False
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGUSR1)}
        for handler in (ignite.handlers.TerminateOnNan(), self.limit, self._stop_if_told):
            self.trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)

    def _receive(self, _number: int, _frame: object) -> None:
        self._received = True

    def _stop_if_told(self) -> None:
        if self._received:
            self.trainer.terminate()

    def _close(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _end(self, took_s: float) -> End:
        return End(iteration=self.trainer.state.iteration, reason=None, took_s=took_s)


class _Happening:
    """What happens beside a run, on threads; a context that ends when all that has begun is done."""

    def __init__(self) -> None:
        self._later: list[threading.Timer] = []
        self._begun: list[threading.Timer] = []

    def arrange(self, after_s: float, act: Callable[[], None], *, is_early: bool) -> None:
        """Let `act` be done: so long after the beginning of the run, or of its first step; an early one begins now."""
        timer = threading.Timer(after_s, act)
        if is_early:
            timer.start()
            self._begun.append(timer)
        else:
            self._later.append(timer)

    def begin(self) -> None:
        """Let time pass for what is not early."""
        for timer in self._later:
            timer.start()
        self._begun += self._later

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Wait for all that has begun."""
        for timer in self._begun:
            timer.join(LIMIT_S)
