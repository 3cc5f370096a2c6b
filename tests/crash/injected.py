"""One failure in the middle of a save, on a real job: each rank's observations, and whether they are right.

`observe` runs on every rank and returns its observations; `judge` finds what is wrong in those of all ranks. The judge
is a pure function, so that it treats broken savers exactly as distckpt.
"""

import contextlib
import errno
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from distckpt.policy.naming import TEMP_PREFIX, TEMP_SUFFIX, is_temp
from distckpt.ptformat.verify import check_whole
from distckpt.storage import new_file
from distckpt.storage.local import LocalFile
from tests.crash.modes import MODES, is_background, is_sharded, is_shared
from tests.crash.savers import Subject
from tests.crash.shim import Called, Fault, How
from tests.crash.subject import Counted, idle_engine, name_of, steps_in, whole_steps
from tests.crash.trained import Trained
from tests.distributed.programs import logged

__all__ = ["Expected", "HandlerMaker", "Roles", "Seen", "Trouble", "expected_of", "judge", "observe"]

Expected = Literal["saved", "failed", "not durable"]
HandlerMaker = Callable[[Subject, Path, int], Any]
DEAD = f"{TEMP_PREFIX}{new_file._host_tag()}-1-of-the-dead{TEMP_SUFFIX}"
"""A temporary file that a dead process of this host has left behind."""
_NUM_FLOATS = 300_000
_FIRST, _SECOND, _THIRD = 1, 2, 3
# Calls that Python repeats after EINTR (PEP 475).
_MADE_AGAIN = {"openat", "write", "fsync", "flock", "fstat"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """The fault during the second of three saves.

    Attributes:
        what: its name in messages.
        start: returns a context in which the fault occurs; entered on the failing rank.
        expected: the outcome that every rank has to see.
        errno: the number that the error has to name.
        may_stay: whether the second file may stay for ever: its rename was done but reported as failed.
        may_harm_nothing: whether it may leave every byte right, and is no failure then. The missing bytes of a torn
            write may equal those that were there before, such as the zeros at the end of a record's header.
    """

    what: str
    start: Callable[[Path], AbstractContextManager[object]]
    expected: Expected
    errno: int
    may_stay: bool = False
    may_harm_nothing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One rank's observations. Of the last six, only `open_files` is set on other ranks than the saving one.

    Attributes:
        outcome: `saved`, or the type of the second save's error.
        message: the error's message; empty without one.
        kinds: the error's type and its bases.
        removal_warnings: log lines of the second save about removals.
        last: the name of the handler's last checkpoint after the second save.
        third: `saved`, or the error of the third save.
        whole: the steps that load after the second save.
        faults: what is wrong in the second file; empty if there is none.
        problems: files that do not load, after the second or the third save.
        open_files: descriptors into the directory that the second save left open.
        others: files after the third save that are no checkpoints.
        steps: steps of the checkpoints after the third save.
    """

    outcome: str
    message: str
    kinds: tuple[str, ...]
    removal_warnings: tuple[str, ...]
    last: str
    third: str
    whole: tuple[int, ...] = ()
    faults: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    open_files: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """The ranks' roles, and the way of saving.

    Attributes:
        rank: this rank.
        saving: the rank that saves; where several write, the one that commits.
        failing: the rank with the fault.
        mode: the way of saving, one of `MODES`.
    """

    rank: int
    saving: int
    failing: int
    mode: str = MODES[0]


def observe(directory: Path, roles: Roles, trouble: Trouble, make: HandlerMaker) -> Seen:
    """Collective. Save three times, with the fault in the second save.

    Args:
        directory: does not exist yet; is removed at the end.
        roles: see :class:`Roles`.
        trouble: used on the failing rank.
        make: makes the handler.
    """
    counted = Trained(is_sharded=is_sharded(roles.mode)) if is_shared(roles.mode) else Counted(_NUM_FLOATS)
    handler = make(counted, directory, roles.saving)
    here, fails_here = roles.rank == roles.saving, roles.rank == roles.failing
    save = partial(_save, handler, counted, roles.mode)
    save(_FIRST)
    if here:
        (directory / DEAD).write_bytes(b"half a checkpoint")
    error: Exception | None = None
    in_trouble = trouble.start(directory) if fails_here else contextlib.nullcontext()
    with logged("distckpt") as removal_warnings, in_trouble:
        try:
            save(_SECOND)
        except Exception as caught:  # noqa: BLE001 - any error is an observation
            error = caught
    seen: dict[str, Any] = {
        "outcome": "saved" if error is None else type(error).__name__,
        "message": str(error or ""),
        "kinds": tuple(base.__name__ for base in type(error).__mro__),
        "removal_warnings": tuple(one for one in removal_warnings if "while removing older checkpoints" in one),
        "last": Path(handler.last_checkpoint or "").name,
    }
    del error  # its frames may hold descriptors
    seen["open_files"] = _open_files(directory)
    if here:
        whole, problems = whole_steps(directory)
        seen |= {"whole": tuple(whole), "faults": _faults(directory / name_of(_SECOND)), "problems": tuple(problems)}
    seen["third"] = _third_save(save)
    if here:
        seen["problems"] += tuple(whole_steps(directory)[1])
        seen["others"] = tuple(path.name for path in directory.iterdir() if path.suffix != ".pt")
        seen["steps"] = tuple(steps_in(directory))
        shutil.rmtree(directory)
    return Seen(**seen)


def _save(handler: Any, counted: Subject, mode: str, step: int) -> None:
    while counted.step < step:
        counted.advance()
    engine = idle_engine()
    engine.state.iteration = step
    handler(engine)
    if is_background(mode):
        handler.wait_until_finished()


def _faults(path: Path) -> tuple[str, ...]:
    if not path.exists():
        return ()
    with LocalFile(path) as file:
        return tuple(check_whole(file))


def _third_save(save: Callable[[int], None]) -> str:
    try:
        save(_THIRD)
    except Exception as error:  # noqa: BLE001 - judged by its absence
        return f"{type(error).__name__}: {error}"
    return "saved"


def _open_files(directory: Path) -> tuple[str, ...]:
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own
            path = str(descriptor.readlink())
            found += [path] if path.startswith(str(directory.resolve())) else []
    return tuple(found)


def expected_of(fault: Fault, calls: Sequence[Called]) -> Expected:
    """Return the outcome that a fault has to have, given the calls of a save without a fault.

    A failure before the rename, or of it, fails the save. A failing fsync of the directory leaves the file not
    durable. A failure after it, or while temporary files are cleared, does not harm the checkpoint and is no error.
    """
    counts = 0
    for index, call in enumerate(calls):
        if fault.call not in ("*", call.name):
            continue
        counts += 1
        if counts == fault.nth or (fault.for_ever and counts > fault.nth):
            expected = _expected_of_call(fault, index, calls)
            if expected != "saved":
                return expected
    assert counts >= fault.nth, f"a save makes only {counts} calls of {fault.call}"
    return "saved"


def _expected_of_call(fault: Fault, index: int, calls: Sequence[Called]) -> Expected:
    call = calls[index]
    if fault.how is How.SHORT or (fault.errno == errno.EINTR and call.name in _MADE_AGAIN):
        return "saved"
    if call.name == "fsync" and call.path == "":
        return "saved" if fault.errno == errno.EINVAL else "not durable"
    of_new_file = is_temp(call.path) and call.path != DEAD
    if of_new_file and call.name == "openat" and call in calls[:index]:
        return "saved"  # opened again for O_DIRECT; if that fails, the bytes take the buffered way
    if of_new_file and call.name in {"openat", "write", "fsync", "fstat"}:
        return "failed"
    if call.name == "rename":
        return "failed"
    # The directory is opened twice, for writing and for removing. Files in it are opened to read their records.
    return "failed" if call.name == "openat" and call.path == "" and call not in calls[:index] else "saved"


def judge(directory: Path, roles: Roles, trouble: Trouble, seen: Sequence[Seen]) -> list[str]:
    """Return what is wrong in the ranks' observations."""
    here = seen[roles.saving]
    open_files = [path for one in seen for path in one.open_files]
    saved = here.outcome == "saved"
    outcome: Expected = "saved" if saved else "not durable" if "CommitNotDurable" in here.kinds else "failed"
    is_unharmed = trouble.may_harm_nothing and saved and _SECOND in here.whole and not here.faults
    acknowledged = _SECOND if all(one.outcome == "saved" for one in seen) else _FIRST
    named = f"rank {roles.failing}", f"step {_SECOND}", str(directory), errno.errorcode[trouble.errno]
    wrong = {
        f"the ranks saw different things: {[(one.outcome, one.message) for one in seen]}": (
            len({(one.outcome, one.message, one.kinds, one.removal_warnings) for one in seen}) > 1
        ),
        f"expected {trouble.expected}, saw {outcome}: {here.message}": (
            outcome != trouble.expected and not is_unharmed
        ),
        f"the message does not name all of {named}: {here.message}": (
            not saved and not all(text in here.message for text in named)
        ),
        f"lost: step {acknowledged} was acknowledged, {here.whole} load": acknowledged not in here.whole,
        "the older checkpoint stays and no warning says so": saved
        and _FIRST in here.whole
        and not here.removal_warnings,
        f"last_checkpoint is {[one.last for one in seen]}, not {name_of(acknowledged)}": any(
            one.last != name_of(acknowledged) for one in seen
        ),
        f"files do not load: {here.problems}": bool(here.problems),
        f"files are still open: {open_files}": bool(open_files),
        f"the next save failed: {[one.third for one in seen]}": any(one.third != "saved" for one in seen),
        f"left after the next save: {here.others}": bool(here.others),
        f"checkpoints after the next save: {here.steps}": (
            set(here.steps) - ({_SECOND} if trouble.may_stay else set()) != {_THIRD}
        ),
    }
    who = f"{trouble.what}, on rank {roles.failing}, rank {roles.saving} saves"
    return [f"{who}: {problem}" for problem, is_so in wrong.items() if is_so]
