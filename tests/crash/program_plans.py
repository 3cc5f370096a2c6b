"""Random programs of handlers, and how often each is started and killed: `program_of` draws them from a seed."""

import random
from dataclasses import dataclass, field, replace
from typing import Any

from distckpt.policy.policies import BestN, EveryNSteps, LastN, Policy

__all__ = ["FOREIGN", "Program", "Result", "Spec", "Start", "program_of"]

FOREIGN = ("notes.pt", "other_7.pt")
"""Files of another program: without a record, and with names that no handler of the programs uses."""
KILLS = ("iteration", "before commit", "after commit", "before removal", "after removal")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One handler.

    Attributes:
        folder: the name of its directory.
        prefix: its ``filename_prefix``.
        is_whole: whether it saves all objects, or one.
        is_scored: whether it has a ``score_function``.
        score_name: its score's name; None for none.
        pattern: its ``filename_pattern``.
        has_step: whether a name with a score has a step too.
        is_text: whether that step is text.
        n_saved: number of files that it keeps; None for all.
        event: when it saves: ``epoch``, ``end`` for epochs and the end of the run, or a number of iterations.
        is_called: whether it is a ModelCheckpoint.
        on_evaluator: whether it is attached to an evaluator, which runs in an event of the trainer.
        include_self: whether its own history is saved too.
    """

    folder: str
    prefix: str
    is_whole: bool
    is_scored: bool
    score_name: str | None
    pattern: str | None
    has_step: bool
    is_text: bool
    n_saved: int | None
    event: str | int
    is_called: bool
    on_evaluator: bool
    include_self: bool

    @property
    def naming(self) -> tuple[Any, ...]:
        """The arguments that must differ between two handlers."""
        return (self.folder, self.prefix, self.is_whole, self.pattern)


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a program.

    Attributes:
        kill: the moment of its kill, one of `KILLS`; None for none.
        at: number of such moments until the kill.
        clock_s: seconds added to the wall time.
        is_copied: whether the directories are copied first, with other modification times.
        steps: the unit of the steps: ``iteration``, ``epoch``, or ``small`` fractions.
        n_saved: number of kept files, for each handler.
        keep: its policies, for each handler; None for `n_saved`.
    """

    kill: str | None
    at: int
    clock_s: float
    is_copied: bool
    steps: str
    n_saved: tuple[int | None, ...]
    keep: tuple[tuple[Policy, ...] | None, ...]


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program and its starts.

    Attributes:
        specs: its handlers. The program resumes from the first one.
        starts: its starts.
        epoch_length: iterations of an epoch.
        max_epochs: number of epochs of the first start; each later start trains one more.
        by_directory: whether it resumes from the directory, and not from the handler.
        begins_anew: whether the trainer is not saved, so that each start begins at iteration 0.
        seed: the seed of its scores.
    """

    specs: tuple[Spec, ...]
    starts: tuple[Start, ...]
    epoch_length: int
    max_epochs: int
    by_directory: bool
    begins_anew: bool
    seed: str


@dataclass(kw_only=True)
class Result:
    """The results of a program.

    Attributes:
        findings: what was wrong.
        num_starts: number of starts.
        num_kills: number of kills.
        num_resumes: number of resumes from a file.
        num_saves: number of committed files.
        num_removals: number of removed files.
        num_decisions: number of decisions about a score.
    """

    findings: list[str] = field(default_factory=list)
    num_starts: int = 0
    num_kills: int = 0
    num_resumes: int = 0
    num_saves: int = 0
    num_removals: int = 0
    num_decisions: int = 0


def program_of(seed: str) -> Program:
    """Return the program of a seed."""
    chance = random.Random(seed)
    specs: list[Spec] = []
    num_specs = chance.choice((1, 2, 2, 3, 3))
    while len(specs) < num_specs:
        spec = _spec(chance, is_first=not specs)
        if spec.naming not in [one.naming for one in specs]:
            specs.append(spec)
    num_starts = chance.randint(2, 6)
    by_directory = chance.random() < 0.2 and all(spec.is_whole for spec in specs)
    policies = random.Random(f"{seed}/keep")
    has_keep = [policies.random() < 0.4 for _ in specs]
    starts = [
        replace(
            _start(chance, specs, is_last=number == num_starts - 1),
            keep=tuple(_keep(policies, spec) if is_on else None for spec, is_on in zip(specs, has_keep, strict=True)),
        )
        for number in range(num_starts)
    ]
    return Program(
        specs=tuple(specs),
        starts=tuple(starts),
        epoch_length=chance.randint(2, 4),
        max_epochs=chance.randint(4, 8),
        by_directory=by_directory,
        begins_anew=not by_directory and not specs[0].on_evaluator and chance.random() < 0.2,
        seed=seed,
    )


def _spec(chance: random.Random, *, is_first: bool) -> Spec:
    is_scored = chance.random() < (0.2 if is_first else 0.7)
    pattern = chance.choice((None, None, None, "{name}-{global_step}.{ext}", "sub/{name}_{global_step}.{ext}"))
    if is_scored and pattern is not None:
        pattern = pattern.replace("{global_step}", "{global_step}_{score}")
    has_step = is_scored and (pattern is not None or chance.random() < 0.5)
    return Spec(
        folder=chance.choice(("a", "a", "b")),
        prefix=chance.choice(("", "", "best", "x")),
        is_whole=is_first or chance.random() < 0.6,
        is_scored=is_scored,
        score_name=chance.choice((None, "acc")) if is_scored else None,
        pattern=pattern,
        has_step=has_step,
        is_text=has_step and chance.random() < 0.3,
        n_saved=chance.choice((1, 1, 2, 3, None)),
        event=chance.choice(("epoch", "epoch", "end", 1, 2, 3)),
        is_called=pattern is None and chance.random() < 0.2,
        on_evaluator=is_scored and chance.random() < 0.3,
        include_self=chance.random() < 0.2,
    )


def _start(chance: random.Random, specs: list[Spec], *, is_last: bool) -> Start:
    return Start(
        kill=None if is_last else chance.choice(KILLS),
        at=chance.randint(1, 8),
        clock_s=chance.choice((0.0, 0.0, -1e6, 1e6, -3.0)),
        is_copied=chance.random() < 0.2,
        steps=chance.choice(("iteration", "iteration", "epoch", "small")),
        n_saved=tuple(chance.choice((spec.n_saved, spec.n_saved, spec.n_saved, 1, 2)) for spec in specs),
        keep=(),
    )


def _keep(chance: random.Random, spec: Spec) -> tuple[Policy, ...] | None:
    """Return a handler's policies of one start; each start may have others."""
    if chance.random() < 0.2:
        return None
    makes: list[type[LastN | BestN | EveryNSteps]] = [LastN, EveryNSteps, EveryNSteps, *([BestN] * spec.is_scored)]
    return tuple(make(chance.randint(1, 4)) for make in chance.sample(makes, k=chance.randint(1, 3)))
