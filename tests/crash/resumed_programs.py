"""Random programs of handlers, killed and resumed: what they do, and what has to come of it.

A program has up to three Checkpoints, in up to two directories. It is started up to six times. Each start but the last
is killed by SIGKILL: in an iteration, before a commit, between a commit and a removal, or after a removal. Between two
starts the directory may be copied, its modification times shuffled and the clock set back, and the program may change
what users change: ``n_saved`` and the function that gives the step.

Each start is a forked process. It writes what it does, line by line, into a file that outlives it. The same is done
here with lists in place of files, and compared: which file is resumed from, what each handler keeps, and what is
removed.

    python -m tests.crash.resumed_programs SEED FIRST NUM [BREAKAGE]

runs some of the programs of a round and prints what came of them as JSON; with a breakage (see :data:`BREAKAGES`) the
code under test is broken before.
"""

import json
import logging
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

from distckpt import Checkpoint, DiskSaver, ModelCheckpoint, resume
from distckpt.handlers.own_files import OwnFiles
from distckpt.policy.retention import admit, wants
from distckpt.ptformat.records import Record
from distckpt.storage.local import LocalStorage
from distckpt.storage.new_file import LocalNewFile

__all__ = ["BREAKAGES", "Program", "Result", "Spec", "program_of", "run_program"]

FOREIGN = ("notes.pt", "other_7.pt")
"""Files of another program: without a record, and named as no handler of ours names its files."""
SCORES = (0.1, 0.12341, 0.12342, 0.12343, 0.5, 0.5, 0.9, 3e-05, 1e-05, 2e-05, math.nan, -0.25, math.inf, -math.inf)
_MEMORY = Path("/dev/shm")  # noqa: S108 - a process is killed, and no machine: nothing has to reach a disk
KILLS = ("iteration", "before commit", "after commit", "before removal", "after removal")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One handler.

    Attributes:
        folder: of its directory.
        prefix: its ``filename_prefix``.
        is_whole: whether it saves all objects, or one.
        is_scored: whether it has a ``score_function``.
        score_name: its score's name.
        pattern: its ``filename_pattern``.
        has_step: whether the name has a step, where it has a score.
        is_text: whether that step is text.
        n_saved: how many it keeps.
        event: on which it saves: ``epoch``, ``end`` for epochs and the end of the run, or a number of iterations.
        is_called: whether it is a ModelCheckpoint.
        on_evaluator: whether it is attached to an evaluator that runs in the trainer's event.
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
        """What may not be equal for two handlers."""
        return (self.folder, self.prefix, self.is_whole, self.pattern)


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a program.

    Attributes:
        kill: how it is killed; None for not at all.
        at: after how many such moments.
        clock_s: what is added to the wall time.
        is_copied: whether the directories were copied before, with other modification times.
        steps: what the steps are counted in: ``iteration``, ``epoch``, or ``small`` fractions.
        n_saved: by handler.
    """

    kill: str | None
    at: int
    clock_s: float
    is_copied: bool
    steps: str
    n_saved: tuple[int | None, ...]


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program and its starts.

    Attributes:
        specs: its handlers; the first is the one that is resumed from.
        starts: see there.
        epoch_length: in iterations.
        max_epochs: of the last start, if it is not killed.
        by_directory: whether the directory is resumed from, not the handler.
        begins_anew: whether the trainer is not saved, so that each start begins at iteration 0.
        seed: of its scores.
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
    """What came of a program.

    Attributes:
        findings: what was wrong.
        num_starts: how often it was started.
        num_kills: how often it was killed.
        num_resumes: how often something was resumed from.
        num_saves: how many files were committed.
        num_removals: how many were removed.
        num_decisions: how often a score was wanted or not.
    """

    findings: list[str] = field(default_factory=list)
    num_starts: int = 0
    num_kills: int = 0
    num_resumes: int = 0
    num_saves: int = 0
    num_removals: int = 0
    num_decisions: int = 0


# -- which programs there are ----------------------------------------------------------------------


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
    starts = [_start(chance, specs, is_last=number == num_starts - 1) for number in range(num_starts)]
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
    )


# -- one start -------------------------------------------------------------------------------------


class Stamp:
    """An object whose state says who saved it, and when."""

    def __init__(self, trainer: Engine, start: int) -> None:
        self.trainer = trainer
        self.start = start
        self.handler = -1

    def state_dict(self) -> dict[str, Any]:
        """Return the stamp."""
        return {"handler": self.handler, "iteration": self.trainer.state.iteration, "start": self.start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take nothing over."""


class Journal:
    """What a start does, line by line in a file, and the moment at which it is killed.

    Args:
        path: the file.
        start: see there.
    """

    def __init__(self, path: Path, start: Start) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._start = start
        self._num_left = start.at

    def note(self, what: str, **facts: Any) -> None:
        """Write a line."""
        os.write(self._fd, (json.dumps({"what": what, **facts}) + "\n").encode())

    def reach(self, moment: str) -> None:
        """Die here, if this is the moment."""
        if moment == self._start.kill:
            self._num_left -= 1
            if self._num_left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def stamp_in(path: Path) -> dict[str, Any]:
    """Return who saved a file; nothing for a file of another program."""
    state = torch.load(path, weights_only=True)
    found = state.get("stamp", state)
    return dict(found) if "handler" in found else {}


def _run_start(program: Program, number: int, folder: Path) -> None:
    start = program.starts[number]
    journal = Journal(folder / "journal", start)
    real_time = time.time
    time.time = lambda: real_time() + start.clock_s
    trainer = Engine(lambda _engine, _batch: journal.reach("iteration"))
    trainer.logger.disabled = True
    stamp = Stamp(trainer, number)
    objects: dict[str, Any] = {"stamp": stamp, "trainer": trainer}
    if program.begins_anew:
        objects["trainer"] = Stamp(trainer, number)
    handlers = [_attached(program, at, start, folder, trainer, objects, journal) for at in range(len(program.specs))]
    _watch(journal, handlers, stamp)
    source = handlers[0].save_handler.dirname if program.by_directory else handlers[0]
    found = resume(objects, source, engine=None if program.begins_anew else trainer)
    journal.note(
        "resumed",
        file=None if found is None else str(Path(os.fspath(found)).relative_to(folder)),
        history=[[repr(priority), name] for priority, name in handlers[0].state_dict()["_saved"]],
    )
    trainer.run(range(program.epoch_length), max_epochs=program.max_epochs + number)
    for at, handler in enumerate(handlers):
        journal.note("kept", handler=at, names=[name for _, name in handler.state_dict()["_saved"]])
    journal.note("ended")


def _attached(
    program: Program, at: int, start: Start, folder: Path, trainer: Engine, objects: dict[str, Any], journal: Journal
) -> Checkpoint:
    spec = program.specs[at]
    to_save = objects if spec.is_whole else {"stamp": objects["stamp"]}
    options: dict[str, Any] = {
        "filename_prefix": spec.prefix,
        "score_function": (lambda _: _score(program, at, trainer, journal)) if spec.is_scored else None,
        "score_name": spec.score_name,
        "n_saved": start.n_saved[at],
        "global_step_transform": _step_of(spec, start, trainer),
        "filename_pattern": spec.pattern,
        "include_self": spec.include_self,
    }
    where = folder / spec.folder
    handler = (
        ModelCheckpoint(where, require_empty=False, **options)
        if spec.is_called
        else Checkpoint(to_save, DiskSaver(where, require_empty=False), **options)
    )
    if isinstance(spec.event, int):
        event: Any = Events.ITERATION_COMPLETED(every=spec.event)
    else:
        event = Events.EPOCH_COMPLETED | Events.COMPLETED if spec.event == "end" else Events.EPOCH_COMPLETED
    args = (to_save,) if spec.is_called else ()
    if spec.on_evaluator:
        evaluator = Engine(lambda _engine, _batch: None)
        evaluator.logger.disabled = True
        evaluator.add_event_handler(Events.COMPLETED, handler, *args)
        trainer.add_event_handler(event, lambda: evaluator.run([0]))
    else:
        trainer.add_event_handler(event, handler, *args)
    return handler


def _step_of(spec: Spec, start: Start, trainer: Engine) -> Callable[..., Any] | None:
    if spec.is_scored:
        if not spec.has_step:
            return None
        return (lambda *_: f"it{trainer.state.iteration:03d}") if spec.is_text else (lambda *_: trainer.state.iteration)
    steps: dict[str, Callable[..., Any] | None] = {
        "iteration": None,
        "epoch": lambda *_: trainer.state.epoch,
        "small": lambda *_: trainer.state.iteration * 1e-6,
    }
    return steps[start.steps]


def _score(program: Program, at: int, trainer: Engine, journal: Journal) -> float:
    chance = random.Random(f"{program.seed}/{at}/{trainer.state.iteration}")
    score = chance.choice(SCORES)
    journal.note("scored", handler=at, score=repr(score), iteration=trainer.state.iteration)
    return score


def _watch(journal: Journal, handlers: list[Checkpoint], stamp: Stamp) -> None:
    """Note each commit and each removal, and who is about it."""
    save, commit, remove = Checkpoint._save, LocalNewFile.commit, LocalStorage.remove

    def save_and_say_who(self: Any, *args: Any) -> None:
        stamp.handler = next(at for at, one in enumerate(handlers) if one is self)
        save(self, *args)

    def commit_and_note(self: LocalNewFile, *args: Any, **kwargs: Any) -> Any:
        journal.reach("before commit")
        done = commit(self, *args, **kwargs)
        trainer = stamp.trainer
        event = getattr(trainer.last_event_name, "name", "")
        directory = handlers[stamp.handler].save_handler.dirname
        name = self.path.relative_to(directory).as_posix()
        journal.note("saved", handler=stamp.handler, name=name, iteration=trainer.state.iteration, event=event)
        journal.reach("after commit")
        return done

    def note_and_remove(self: LocalStorage, name: str) -> None:
        owner = stamp_in(self.directory / name) if (self.directory / name).exists() else {}
        journal.reach("before removal")
        journal.note(
            "removed", handler=stamp.handler, name=name, folder=self.directory.name, owner=owner.get("handler")
        )
        remove(self, name)
        journal.reach("after removal")

    Checkpoint._save = save_and_say_who  # type: ignore[method-assign,assignment]
    LocalNewFile.commit = commit_and_note  # type: ignore[method-assign]
    LocalStorage.remove = note_and_remove  # type: ignore[method-assign]


# -- what has to come of it ------------------------------------------------------------------------


@dataclass
class Kept:
    """What one handler has to keep.

    Attributes:
        entries: priorities and names, lowest first; a step counts as how many files were saved before.
        orphans: what may still be there, for it was killed before the removal.
        has_saved: whether it has saved in the present start: then nothing may be left to remove once that has ended.
    """

    entries: list[tuple[float, str]] = field(default_factory=list)
    orphans: set[str] = field(default_factory=set)
    has_saved: bool = False


class Expected:
    """What has to be on the disk, and in the handlers' histories.

    Args:
        program: see there.
        result: takes what is wrong.
    """

    def __init__(self, program: Program, result: Result) -> None:
        self.program = program
        self.result = result
        self.kept = [Kept() for _ in program.specs]
        self.owner: dict[str, int] = {}
        self.saved_at: dict[str, int] = {}
        self.scores: dict[int, float] = {}
        self.wanted: dict[int, bool] = {}
        self.num_saves = 0
        self.collided: set[int] = set()

    def path(self, at: int, name: str) -> str:
        """Return where a handler's file lies."""
        return f"{self.program.specs[at].folder}/{name}"

    def find(self, text: str) -> None:
        """Note what is wrong."""
        self.result.findings.append(text)

    def take(self, line: dict[str, Any], start: Start) -> None:
        """Follow what a start did."""
        getattr(self, f"_{line['what']}")(line, start)

    def _resumed(self, line: dict[str, Any], start: Start) -> None:
        del start
        self.scores.clear()
        self.wanted.clear()
        for kept in self.kept:
            kept.has_saved = False
        spec = self.program.specs[0]
        own = {
            path: at
            for path, at in self.saved_at.items()
            if (self.owner.get(path) == 0 or self.program.by_directory) and path.startswith(f"{spec.folder}/")
        }
        newest = max(own, key=lambda path: own[path], default=None)
        if line["file"] is None:  # it starts afresh: what is there is of a run that it does not continue
            self.kept = [Kept() for _ in self.program.specs]
            self.owner.clear()
        if self.program.by_directory and any("/" in path.partition("/")[2] for path in own):
            return  # a directory's folders are not looked into
        if line["file"] != newest:
            self.find(f"resumed from {line['file']}, and the newest is {newest}")
        self.result.num_resumes += line["file"] is not None
        if newest is not None and not self.program.by_directory and 0 not in self.collided:
            names, wanted = [name for _, name in line["history"]], [name for _, name in self.kept[0].entries]
            if names != wanted:
                self.find(f"the history is {names} after a resume, and not {wanted}")

    def _scored(self, line: dict[str, Any], start: Start) -> None:
        at, score = line["handler"], float(line["score"])
        self._settle(at)
        self.scores[at] = score
        self.result.num_decisions += 1
        self.wanted[at] = wants(self.kept[at].entries, score, n_saved=start.n_saved[at], greater_or_equal=False)

    def _settle(self, at: int) -> None:
        """See that the last decision of a handler was the right one."""
        if self.wanted.pop(at, False) and at not in self.collided:
            self.find(f"handler {at}: a score of {self.scores[at]!r} was not saved, with {self.kept[at].entries}")

    def _saved(self, line: dict[str, Any], start: Start) -> None:
        at, name = line["handler"], line["name"]
        spec, kept, path = self.program.specs[at], self.kept[at], self.path(at, name)
        self.num_saves += 1
        self.result.num_saves += 1
        if self.owner.get(path, at) != at:
            self.collided |= {at, self.owner[path]}
        self.owner[path], self.saved_at[path] = at, self.num_saves
        if spec.is_scored:
            if not self.wanted.pop(at, False) and at not in self.collided:
                self.find(f"handler {at}: {name} was saved for {self.scores.get(at)!r}, with {kept.entries}")
            priority = self.scores[at]
        else:
            priority = float(self.num_saves)
        retained = admit(kept.entries, (priority, name), n_saved=start.n_saved[at])
        kept.entries, kept.has_saved = list(retained.kept), True
        kept.orphans = {one for one in (*retained.evicted, *kept.orphans) if one != name}

    def _removed(self, line: dict[str, Any], start: Start) -> None:
        del start
        at, name = line["handler"], line["name"]
        self.result.num_removals += 1
        if line["owner"] not in (at, None):
            self.find(f"handler {at} removed {name}, which is handler {line['owner']}'s")
        if name not in self.kept[at].orphans and at not in self.collided:
            self.find(f"handler {at} removed {name}, and should have kept {self.kept[at].entries}")
        path = self.path(at, name)
        self.owner.pop(path, None)
        self.saved_at.pop(path, None)
        self.kept[at].orphans.discard(name)

    def _kept(self, line: dict[str, Any], start: Start) -> None:
        del start
        at = line["handler"]
        self._settle(at)
        wanted = [name for _, name in self.kept[at].entries]
        if at not in self.collided and line["names"] and line["names"] != wanted:
            self.find(f"handler {at} keeps {line['names']}, and should keep {wanted}")

    def _ended(self, line: dict[str, Any], start: Start) -> None:
        del line, start

    def look(self, folder: Path) -> None:
        """Compare with the disk: what is kept is there, and what is there is kept, or was about to be removed."""
        for at, kept in enumerate(self.kept):
            gone = [name for _, name in kept.entries if not (folder / self.path(at, name)).exists()]
            if gone and at not in self.collided:
                self.find(f"handler {at} keeps {gone}, which is not there")
        for where in ("a", "b"):
            for path in (folder / where).rglob("*.pt"):
                name = path.relative_to(folder).as_posix()
                owner = self.owner.get(name)
                if path.name in FOREIGN or owner is None or owner in self.collided:
                    continue
                kept = self.kept[owner]
                known = {entry[1] for entry in kept.entries} | (set() if kept.has_saved else kept.orphans)
                if name.partition("/")[2] not in known:
                    self.find(f"{name} is left of handler {owner}")
            for name in () if self.program.by_directory else FOREIGN:
                if not (folder / where / name).exists():
                    self.find(f"{where}/{name} of another program was removed")


def run_program(program: Program, root: Path) -> Result:
    """Run a program, start after start, in a folder; return what came of it."""
    result = Result()
    expected = Expected(program, result)
    folder = root / "0"
    for where in ("a", "b"):
        (folder / where / "sub").mkdir(parents=True)
        for name in () if program.by_directory else FOREIGN:
            torch.save({"made by": "others"}, folder / where / name)
    chance = random.Random(program.seed)
    for number, start in enumerate(program.starts):
        if start.is_copied and number:
            folder = _copied(folder, root / str(number), chance)
        (folder / "journal").unlink(missing_ok=True)
        code = _in_a_fork(lambda number=number, folder=folder: _run_start(program, number, folder), folder / "error")  # type: ignore[misc]
        result.num_starts += 1
        result.num_kills += code == -signal.SIGKILL
        if code not in (0, -signal.SIGKILL):
            result.findings.append(f"start {number} ended with {code}: {(folder / 'error').read_text()}")
            return result
        for line in _lines(folder / "journal"):
            expected.take(line, start)
        if code == 0:
            expected.look(folder)
    return result


def _copied(folder: Path, target: Path, chance: random.Random) -> Path:
    shutil.copytree(folder, target)
    for path in target.rglob("*.pt"):
        at_s = chance.randint(1, 10**9)
        os.utime(path, (at_s, at_s))
    return target


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())


def _in_a_fork(work: Callable[[], None], errors: Path) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - a child of a fork leaves in no other way
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def _forget_histories() -> None:
    OwnFiles.find_newest = lambda *_args, **_kwargs: None  # type: ignore[method-assign]


def _mistake_others() -> None:
    OwnFiles.has_record = lambda *_args: True  # type: ignore[method-assign]


def _order_by_clock() -> None:
    Record.order = property(lambda self: (0.0, "", int(self.engine["iteration"])))  # type: ignore[assignment,method-assign]


def _forget_orphans() -> None:
    found = OwnFiles.recorded_history

    def without_orphans(self: OwnFiles, *args: Any) -> Any:
        history = found(self, *args)
        return None if history is None else replace(history, orphans=())

    OwnFiles.recorded_history = without_orphans  # type: ignore[method-assign,assignment]


BREAKAGES: dict[str, Callable[[], None]] = {
    "handlers forget what they kept": _forget_histories,
    "every file is taken for the handler's own": _mistake_others,
    "files are ordered by their iteration": _order_by_clock,
    "what a killed save had still to remove is forgotten": _forget_orphans,
}
"""Ways to break the code: the programs have to find each."""


def main() -> None:
    """Run some programs, and print what came of them."""
    seed, first, num = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    if len(sys.argv) > 4:
        BREAKAGES[sys.argv[4]]()
    results = []
    for number in range(first, first + num):
        with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as root:
            results.append(asdict(run_program(program_of(f"{seed}/{number}"), Path(root))))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
