"""Verify one checkpoint on all ranks, with each byte read from storage once per machine.

1. (all ranks) open the file, and say which file it is. Ranks of one machine that have the same file share its page
   cache: they form a group.
2. (all ranks) compare this rank's range of the file with its checksums; a group has one range per rank. Read the pickle
   meanwhile, and let the caller try its state.
3. (all ranks) combine the group's results. Then apply the caller's check to the state.

After each step all ranks know what failed on which rank, and refuse the file alike.
"""

import contextlib
import socket
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distckpt._threads import get_num_threads
from distckpt.backends.base import Backend, default_timeout_s
from distckpt.coordination import phases
from distckpt.errors import LoadError, RankFailure, remote_rank_error
from distckpt.ptformat.reader import OpenCheckpoint

_MAX_REASON_CHARS = 400
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_READ_TIMEOUT_S = 1800.0  # one rank's storage may be slow


class RefusedCheckpoint(Exception):  # noqa: N818 - not raised to users: `error` is
    """A checkpoint was refused, alike on all ranks. Its text says why.

    Attributes:
        error: the error for a caller that has no other checkpoint.
    """

    def __init__(self, reason: str, error: Exception) -> None:
        super().__init__(reason)
        self.error = error


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadContext:
    """A collective operation that reads checkpoints.

    Attributes:
        backend: the job's.
        name: the operation's name in messages, such as ``resume``.
        coordinator: the rank that lists the checkpoints.
        timeout_s: seconds to wait for the other ranks; None for the default, but at least 1800.
    """

    backend: Backend
    name: str
    coordinator: int = 0
    timeout_s: float | None = None

    def run_phase(self, phase: str, work: Callable[[], Any]) -> list[Any]:
        """Collective. Run `work` on all ranks; see :func:`distckpt.coordination.phases.run`."""
        return phases.run(self.backend, self._sync_point(phase), work, timeout_s=self.limit_s)

    @property
    def limit_s(self) -> float:
        """Seconds to wait for the other ranks."""
        return max(_READ_TIMEOUT_S, default_timeout_s()) if self.timeout_s is None else self.timeout_s

    def _sync_point(self, phase: str) -> phases.SyncPoint:
        return phases.SyncPoint(handler=self.name, phase=phase, step=0)

    def collect(self, path: Path, phase: str, work: Callable[[], Any]) -> list[Any]:
        """Collective. Run `work` on all ranks; refuse the checkpoint if the file made it fail on some rank.

        Raises:
            RefusedCheckpoint: a LoadError or OSError on some rank; on every rank.
            LoadError: the coordinator has the file, and some other rank has not; on every rank.
        """
        phase = f"{phase} {path.name}"
        own: list[Exception] = []

        def attempt() -> dict[str, Any]:
            try:
                return {"value": work(), "failure": None}
            except (LoadError, OSError) as error:
                own.append(error)
                failure = RankFailure.from_exception(self.backend.rank, error, traceback.format_exc())
                return {"value": None, "failure": asdict(failure)}

        answers = self.run_phase(phase, attempt)
        failures = [RankFailure(**answer["failure"]) for answer in answers if answer["failure"] is not None]
        if not failures:
            return [answer["value"] for answer in answers]
        absent = [one.rank for one in failures if _is_absent(one)]
        if absent and self.coordinator not in absent:
            raise LoadError(
                f"{path} exists for rank {self.coordinator}, which lists the checkpoints, but not for rank "
                f"{', '.join(map(str, absent))}. All ranks must have the same directory, on a shared file system. "
                "Nothing was loaded."
            )
        if len(answers) == 1:
            error = own[0]
        else:
            error = remote_rank_error(f"{self._sync_point(phase)}, of {len(answers)} ranks", failures)
            error.__cause__ = own[0] if own else None
        raise RefusedCheckpoint(_describe(path, failures, len(answers)), error)


def verify_on_all_ranks(
    context: LoadContext,
    path: Path,
    *,
    check: Callable[[Any, OpenCheckpoint], None] | None = None,
    take: Callable[[OpenCheckpoint], bool] | None = None,
    verify: bool = True,
) -> tuple[OpenCheckpoint, Any]:
    """Collective. Open a file, verify it on all ranks, and read its state. Steps 1 to 3 of this module.

    Args:
        context: the operation that needs the file.
        path: the file; the same on every rank.
        check: raises ValueError if the state of the file lacks objects. Not called for a state that was taken.
        take: called while bytes are fetched, before any is verified. Returns True if it has taken the file's state.
        verify: compare the file with its checksums.

    Returns:
        The open file, which the caller has to close, and its state; None for the state if `take` has taken it. The
        state's tensors may have no data yet.

    Raises:
        RefusedCheckpoint: the file is missing, damaged, not the same on all ranks, or incomplete; on every rank.
        LoadError: some ranks do not have the file, but the coordinator has; on every rank.
    """
    rank = context.backend.rank
    with contextlib.ExitStack() as stack:
        opened: list[OpenCheckpoint] = []

        def open_file() -> dict[str, Any]:
            file = OpenCheckpoint(path, num_threads=get_num_threads(context.backend.world_size))
            opened.append(stack.enter_context(file))
            return {"file": file.fingerprint(), "inode": file.identity(), "machine": _machine_id()}

        identities = context.collect(path, "opening", open_file)
        file = opened[0]
        group = [other for other, identity in enumerate(identities) if identity == identities[rank]]

        def check_range() -> list[list[int]]:
            ranges = file.range_for(group.index(rank), len(group)) if verify else []
            with file.readahead(ranges) as source:
                if file.read_structure() and take is not None and take(file):
                    states.append(None)
                return [list(one) for one in file.check(ranges, source)]

        states: list[Any] = []
        results = context.collect(path, "reading", check_range)

        def read_state() -> None:
            if verify:
                file.raise_for_faults(
                    file.faults([[(number, crc, size) for number, crc, size in results[one]] for one in group])
                )
            if states:
                return
            states.append(file.state())
            try:
                if check is not None:
                    check(states[0], file)
            except ValueError as error:
                raise LoadError(f"it lacks what is to be loaded: {error}") from error

        context.collect(path, "checking", read_state)
        _refuse_different_files(path, [identity["file"] for identity in identities], context.coordinator)
        stack.pop_all()
        return file, states.pop()


def _machine_id() -> str:
    """Return a text that is equal for processes that share a page cache."""
    with contextlib.suppress(OSError):
        return _BOOT_ID.read_text(encoding="ascii").strip()
    return socket.gethostname()


def _is_absent(failure: RankFailure) -> bool:
    return not {"FileNotFoundError", "NotADirectoryError"}.isdisjoint(failure.kinds)


def _describe(path: Path, failures: Sequence[RankFailure], num_ranks: int) -> str:
    """Return why a checkpoint is refused, from all ranks' failures: the same text on every rank."""
    reasons = {failure.rank: _reason_of(failure) for failure in failures}
    if len(failures) == num_ranks and len(set(reasons.values())) == 1:
        text = reasons[0] if num_ranks == 1 else f"on every rank: {reasons[0]}"
    else:
        text = "; ".join(f"on rank {rank}: {reason}" for rank, reason in reasons.items())
    return f"{path} cannot be loaded: {text.rstrip('.')}."


def _reason_of(failure: RankFailure) -> str:
    if _is_absent(failure):
        return "the file does not exist"
    reason = failure.message if "LoadError" in failure.kinds else f"it cannot be read: {failure.message}"
    return reason if len(reason) <= _MAX_REASON_CHARS else f"{reason[:_MAX_REASON_CHARS]}..."


def _refuse_different_files(path: Path, files: Sequence[Sequence[int]], coordinator: int) -> None:
    """Raise RefusedCheckpoint if some ranks have another file than the coordinator; the same text on every rank."""
    others = [rank for rank, file in enumerate(files) if file != files[coordinator]]
    if others:
        sizes = ", ".join(f"rank {rank}: {file[0]} bytes" for rank, file in enumerate(files))
        ranks = ", ".join(map(str, others))
        msg = f"{path} is not the same file on all ranks: rank {ranks} has another than rank {coordinator} ({sizes})."
        raise RefusedCheckpoint(msg, LoadError(msg))
