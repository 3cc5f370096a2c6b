"""One checkpoint that might be resumed from, as all ranks look at it.

Owns how it is verified by all ranks together, and what is said of one that is refused. Must not know which others there
are.

The protocol:

1. (all ranks) open it, and tell which file it is. Ranks of one machine that see one file have one page cache before it:
   they are a group.
2. (all ranks) check a share of the bytes, one of as many as the group has ranks: each byte is read from storage once a
   machine. The pickle is read beside that.
3. (all ranks) put together what the group has found in all shares, and look for what is to be loaded.

After each step all ranks hear what is wrong, and where; it is refused on all alike.
"""

import contextlib
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distckpt._threads import get_num_threads
from distckpt.backends.base import Backend
from distckpt.coordination import phases
from distckpt.errors import LoadError
from distckpt.ptformat.reader import OpenCheckpoint

__all__ = ["Candidate"]

_LONGEST_REASON = 400
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Candidate:
    """A checkpoint that all ranks look at.

    Args:
        backend: the job's.
        path: where it lies, the same on every rank.
        name: what it is called in messages; the same on every rank.
        timeout_s: seconds to wait for the other ranks; None for the default.

    Attributes:
        path: see above.
        state: what it holds, once :meth:`look` has found nothing wrong.
    """

    def __init__(self, backend: Backend, path: Path, name: str, *, timeout_s: float | None) -> None:
        self.path = path
        self.state: Any = None
        self._backend = backend
        self._name = name
        self._timeout_s = timeout_s
        self._opened: list[OpenCheckpoint] = []

    @property
    def file(self) -> OpenCheckpoint:
        """The open file."""
        return self._opened[0]

    def close(self) -> None:
        """Let go of the file, if it was opened."""
        for file in self._opened:
            file.close()

    def look(self, check: Callable[[Any], None], *, coordinator: int, verify: bool) -> str | None:
        """Collective. Walk the protocol.

        Args:
            check: raises ValueError if a state lacks what is to be loaded.
            coordinator: the rank that listed it.
            verify: compare it with its checksums.

        Returns:
            What is wrong with it, the same on every rank; None for nothing.

        Raises:
            LoadError: some ranks do not see it, and the coordinator does; on every rank.
        """
        opened = self._ask("opening", self._open)
        self._refuse_if_unseen(opened, coordinator)
        problem = _problem_of(self.path, opened)
        if problem is not None:
            return problem
        seen = [answer["value"] for answer in opened]
        group = [rank for rank, one in enumerate(seen) if one == seen[self._backend.rank]]
        share = (group.index(self._backend.rank), len(group)) if verify else None
        checked = self._ask("reading", lambda: self._check(share))
        problem = _problem_of(self.path, checked)
        if problem is not None:
            return problem
        shares = [checked[rank]["value"] for rank in group] if verify else None
        judged = self._ask("looking into", lambda: self._judge(shares, check))
        problem = _problem_of(self.path, judged)
        return problem or _difference_of(self.path, [one["file"] for one in seen], coordinator)

    def _ask(self, doing: str, work: Callable[[], Any]) -> list[dict[str, Any]]:
        """Collective. Do a step on all ranks; an error that the file is the reason of becomes part of the answer."""

        def attempt() -> dict[str, Any]:
            try:
                return {"value": work(), "unseen": False, "problem": None}
            except (FileNotFoundError, NotADirectoryError):
                return {"value": None, "unseen": True, "problem": "it is not there"}
            except LoadError as error:
                return {"value": None, "unseen": False, "problem": str(error)}
            except OSError as error:
                return {"value": None, "unseen": False, "problem": f"it cannot be read: {error}"}

        place = phases.SyncPoint(handler="resume", phase=f"{doing} {self._name}", step=0)
        return phases.run(self._backend, place, attempt, timeout_s=self._timeout_s)

    def _open(self) -> dict[str, Any]:
        file = OpenCheckpoint(self.path, num_threads=get_num_threads(self._backend.world_size))
        self._opened.append(file)
        return {"file": file.fingerprint(), "inode": file.inode(), "machine": _this_machine()}

    def _check(self, share: tuple[int, int] | None) -> list[list[int]]:
        ranges = [] if share is None else self.file.share(*share)
        with self.file.readahead(ranges) as ahead:
            self.file.look()
            return [list(one) for one in self.file.check(ranges, ahead)]

    def _judge(self, shares: Sequence[Sequence[Sequence[int]]] | None, check: Callable[[Any], None]) -> None:
        if shares is not None:
            checked = [[(number, crc, num_bytes) for number, crc, num_bytes in share] for share in shares]
            self.file.refuse(self.file.faults(checked))
        self.state = self.file.state()
        try:
            check(self.state)
        except ValueError as error:
            msg = f"it lacks what is to be loaded: {error}"
            raise LoadError(msg) from error

    def _refuse_if_unseen(self, answers: Sequence[Mapping[str, Any]], coordinator: int) -> None:
        unseen = [rank for rank, answer in enumerate(answers) if answer["unseen"]]
        if unseen and coordinator not in unseen:
            msg = (
                f"{self.path} is there for rank {coordinator}, which lists the checkpoints, but not for rank "
                f"{', '.join(map(str, unseen))}. All ranks have to see the same directory, on a shared file system. "
                "Nothing was loaded."
            )
            raise LoadError(msg)


def _this_machine() -> str:
    """Return what is equal for processes that have one page cache."""
    with contextlib.suppress(OSError):
        return _BOOT.read_text(encoding="ascii").strip()
    return socket.gethostname()


def _problem_of(path: Path, answers: Sequence[Mapping[str, Any]]) -> str | None:
    """Say what is wrong with a candidate, from all ranks' answers. Pure: the same on every rank."""
    problems = {rank: _short(answer["problem"]) for rank, answer in enumerate(answers) if answer["problem"] is not None}
    if not problems:
        return None
    if len(problems) == len(answers) and len(set(problems.values())) == 1:
        told = problems[0] if len(answers) == 1 else f"on every rank: {problems[0]}"
    else:
        told = "; ".join(f"on rank {rank}: {problem}" for rank, problem in problems.items())
    return f"{path} cannot be resumed from: {told.rstrip('.')}."


def _difference_of(path: Path, files: Sequence[Sequence[int]], coordinator: int) -> str | None:
    """Say which ranks see another file than the coordinator. Pure: the same on every rank."""
    others = [rank for rank, file in enumerate(files) if file != files[coordinator]]
    if not others:
        return None
    sizes = ", ".join(f"rank {rank}: {file[0]} bytes" for rank, file in enumerate(files))
    ranks = ", ".join(map(str, others))
    return f"{path} is not the same file on all ranks: rank {ranks} sees another than rank {coordinator} ({sizes})."


def _short(problem: str) -> str:
    return problem if len(problem) <= _LONGEST_REASON else f"{problem[:_LONGEST_REASON]}..."
