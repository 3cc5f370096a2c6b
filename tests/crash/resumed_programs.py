"""Run random programs of handlers, which are killed and resumed, and compare what they leave with what they should.

A program has up to three Checkpoints in up to two directories. It is started up to six times. Each start but the last
is killed by SIGKILL: in an iteration, before a commit, between a commit and a removal, or after a removal. Between two
starts the directory may be copied, its modification times shuffled and the clock set back, and the program may change
``n_saved``, the policies and the function that gives the step, as users do.

Each start is a forked process, which writes each of its actions as a line into a journal.
`tests.crash.expected_histories` follows the journal: which file is resumed from, which files each handler keeps, and
which are removed.

    python -m tests.crash.resumed_programs SEED FIRST NUM [BREAKAGE]

runs some of the programs of a round and prints their results as JSON. With a breakage (see :data:`BREAKAGES`) it breaks
the code under test first.
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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

from distckpt import Checkpoint, DiskSaver, ModelCheckpoint, resume
from distckpt.handlers import resume_histories
from distckpt.handlers.own_files import OwnFiles
from distckpt.ptformat.records import Record
from distckpt.storage.local import LocalStorage
from distckpt.storage.new_file import LocalNewFile
from tests.crash.expected_histories import Expected
from tests.crash.program_plans import FOREIGN, Program, Result, Spec, Start, program_of

__all__ = ["BREAKAGES", "run_program"]

SCORES = (0.1, 0.12341, 0.12342, 0.12343, 0.5, 0.5, 0.9, 3e-05, 1e-05, 2e-05, math.nan, -0.25, math.inf, -math.inf)
_MEMORY = Path("/dev/shm")  # noqa: S108 - a kill of a process loses nothing in memory files


class Stamp:
    """An object whose state contains the handler, the iteration and the start of the save."""

    def __init__(self, trainer: Engine, start: int) -> None:
        self.trainer = trainer
        self.start = start
        self.handler = -1

    def state_dict(self) -> dict[str, Any]:
        """Return the stamp."""
        return {"handler": self.handler, "iteration": self.trainer.state.iteration, "start": self.start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Ignore the state."""


class Journal:
    """The journal of a start, a file of one line per action. It kills the process at the planned moment.

    Args:
        path: the file.
        start: the start's plan.
    """

    def __init__(self, path: Path, start: Start) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._start = start
        self._num_left = start.at

    def note(self, what: str, **facts: Any) -> None:
        """Write a line."""
        os.write(self._fd, (json.dumps({"what": what, **facts}) + "\n").encode())

    def reach(self, moment: str) -> None:
        """Kill this process, if this is the planned moment."""
        if moment == self._start.kill:
            self._num_left -= 1
            if self._num_left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def stamp_in(path: Path) -> dict[str, Any]:
    """Return the stamp in a file; empty for a file of another program."""
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
        "n_saved": start.n_saved[at] if start.keep[at] is None else 1,
        "keep": start.keep[at],
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
    """Write each commit and each removal into the journal, with the handler."""
    save, commit, remove = Checkpoint._save, LocalNewFile.commit, LocalStorage.remove
    remove_orphans = resume_histories._remove_orphans_here

    def save_and_stamp(self: Any, *args: Any) -> None:
        stamp.handler = next(at for at, one in enumerate(handlers) if one is self)
        save(self, *args)

    def stamp_and_remove_orphans(handler: Any, *args: Any) -> Any:
        stamp.handler = handlers.index(handler)
        return remove_orphans(handler, *args)

    def commit_and_note(self: LocalNewFile, *args: Any, **kwargs: Any) -> Any:
        journal.reach("before commit")
        done = commit(self, *args, **kwargs)
        trainer = stamp.trainer
        event = getattr(trainer.last_event_name, "name", "")
        directory = handlers[stamp.handler].save_handler.dirname
        name = self.path.relative_to(directory).as_posix()
        iteration, epoch = trainer.state.iteration, trainer.state.epoch
        journal.note("saved", handler=stamp.handler, name=name, iteration=iteration, epoch=epoch, event=event)
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

    Checkpoint._save = save_and_stamp  # type: ignore[method-assign,assignment]
    LocalNewFile.commit = commit_and_note  # type: ignore[method-assign]
    LocalStorage.remove = note_and_remove  # type: ignore[method-assign]
    resume_histories._remove_orphans_here = stamp_and_remove_orphans  # type: ignore[assignment]


def run_program(program: Program, root: Path) -> Result:
    """Run a program, start after start, in a folder; return the result."""
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
        except BaseException:  # noqa: BLE001 - a forked child must not return
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


def _forget_steps() -> None:
    OwnFiles.look_at = lambda _self, files: list(files)  # type: ignore[method-assign,assignment]


BREAKAGES: dict[str, Callable[[], None]] = {
    "handlers forget what they kept": _forget_histories,
    "every file is taken for the handler's own": _mistake_others,
    "files are ordered by their iteration": _order_by_clock,
    "what a killed save had still to remove is forgotten": _forget_orphans,
    "the steps of files are forgotten": _forget_steps,
}
"""Ways to break the code. The programs have to find each of them."""


def main() -> None:
    """Run some programs, and print their results."""
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
