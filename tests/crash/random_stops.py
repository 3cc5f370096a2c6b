"""Short runs that are stopped at a random moment on a random rank: the program of a rank.

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
"""The causes of a stop, by stop reason."""
LIMIT_S = 20.0
"""Seconds that a rank waits for another one, and the limit of a run."""

_HOURS_S = 3600
_STEP_S = 0.003
_HANDLERS = ("nan", "time", "preemption", "checkpoint", "best", "evaluator")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """A cause of a stop.

    Attributes:
        kind: the stop reason.
        rank: the rank on which it occurs.
        share: its time, as a share of the run's usual length, from the run's first step.
        is_early: whether the time begins before the run instead, while the ranks connect.
        iteration: a NaN's iteration.
        place: a NaN's place in the output.
        value: the value at this place.
        sender: a signal's sending rank, which uses a thread; for a time-out, unequal to `rank` if a thread moves
            the clock, else it runs out by itself.
        number: a signal's number.
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
    """The plan of a run, the same on all ranks.

    Attributes:
        seed: the seed from which it was drawn.
        world_size: number of ranks.
        num_epochs: number of epochs.
        epoch_length: iterations of an epoch.
        order: the handlers' names, in the order in which they are attached.
        causes: the causes of a stop.
        pace: the votes' lag and interval.
        paced: the handlers that get this pace.
        save_every: iterations between two saves of the Checkpoint; 0 for each epoch.
        n_saved: number of files that it keeps.
        is_coupled: whether a step reduces a gradient over the ranks.
        evaluator_every: iterations between two runs of the evaluator; 0 for each epoch.
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
        """The iterations of a run that is not stopped."""
        return self.num_epochs * self.epoch_length

    @property
    def breaks_at(self) -> float:
        """The first iteration after which the weights contain NaN."""
        return min((cause.iteration for cause in self.causes if cause.kind == "nan"), default=math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The end of a run on one rank.

    Attributes:
        iteration: the last iteration.
        reason: the stop reason; `HUNG` if a collective of the job was not answered.
        history: names of the files in the Checkpoint's history.
        best: names of the files in the history of the Checkpoint with a score.
        preempted: `Preemption.preempted`.
        took_s: the run's seconds.
    """

    iteration: int
    reason: str | None
    history: tuple[str, ...] = ()
    best: tuple[str, ...] = ()
    preempted: bool = False
    took_s: float = 0.0


def plan_of(seed: str, world_size: int, kinds: tuple[Kind, ...] | None = None, **given: Any) -> Plan:
    """Return the plan of a seed.

    Args:
        seed: any text.
        world_size: number of ranks.
        kinds: the causes; None to draw them from the seed.
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
        library: "ignite" for the control, in which each rank stops by its own handlers.
        hang_limit_s: timeout of the job's own collectives. The job ends with a run in which one times out.
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
"""Outputs of a step that can contain a NaN."""


class _Run:
    """A run on one rank.

    Args:
        plan: its plan.
        folder: the folder of its checkpoints.
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
        # Each rank has another score. Their mean decides.
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
        """Run with the causes, and return how the run ended."""
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
            dist.barrier()  # all signals have arrived
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
        """Yield the times of a cause, in seconds of the run, and what this rank does then."""
        # The usual length of a run: the longest pause of any rank, the votes, and some saves.
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
    """The same run with handlers that stop their own rank only: ignite's, and a flag that a signal sets."""

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
    """Actions on threads beside a run: a context manager that waits for all of them at its end."""

    def __init__(self) -> None:
        self._later: list[threading.Timer] = []
        self._begun: list[threading.Timer] = []

    def arrange(self, after_s: float, act: Callable[[], None], *, is_early: bool) -> None:
        """Call `act` after some seconds: from now if it is early, else from the run's first step."""
        timer = threading.Timer(after_s, act)
        if is_early:
            timer.start()
            self._begun.append(timer)
        else:
            self._later.append(timer)

    def begin(self) -> None:
        """Start the time of the actions that are not early."""
        for timer in self._later:
            timer.start()
        self._begun += self._later

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Wait for all actions."""
        for timer in self._begun:
            timer.join(LIMIT_S)
