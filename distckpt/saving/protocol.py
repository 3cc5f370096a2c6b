"""One save: the order of its hops.

Owns the way from a handler's intent to a committed file and the removal of what it replaces. Must not know about
engines, nor how a decision travels between ranks.

The protocol of one save, in the foreground:

1. (all ranks) :class:`SaveIntent`: this rank's step, score and history. User code runs here.
2. (all ranks) from all intents, by pure functions: :class:`SaveDecision`, identical on every rank. The names and
   numbers to decide by are the coordinator's; so is the history.
3. (all ranks) consolidate what is sharded; then capture: call ``state_dict()``, which may be collective itself, and
   compute what is pending where the runtime computes late (XLA), once and on all ranks. For a save handler that may
   keep several names in one place, do 6 here.
4. (all ranks) write: the save handler is called. A DiskSaver writes on the coordinator alone, and returns when the
   file is durable under its name. This is the commit.
5. (all ranks) the handler takes over the new history.
6. (all ranks) remove what was evicted.

IMPORTANT: with a :class:`~distckpt.DiskSaver` or a subclass 6 never comes before 4 has succeeded on all ranks. An error
in 1, 3 or 4, on any rank, is raised on every rank, and what was committed before is untouched, but for what 6 removed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from distckpt.backends.base import Backend, default_timeout_s
from distckpt.coordination import phases
from distckpt.errors import CommitNotDurable, SaveError, save_error
from distckpt.policy.decision import AgreedSave, SaveIntent, SavePolicy, decide_from
from distckpt.policy.naming import printable
from distckpt.policy.retention import Entry

__all__ = [
    "WRITE_TIMEOUT_S",
    "Removal",
    "StillNeeded",
    "commit",
    "decide",
    "merge_removals",
    "remove",
    "remove_local",
    "with_context",
]

WRITE_TIMEOUT_S = 1800.0
"""Ranks that write nothing wait for the one that does; a disk may take its time over a large checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """What became of one evicted file.

    Attributes:
        filename: which.
        problem: None when it is removed.
        gone: whether it had been removed by somebody else; otherwise a later save tries again.
    """

    filename: str
    problem: str | None
    gone: bool


class StillNeeded(Exception):  # noqa: N818 - it is no error, but an answer
    """Raised in place of removing a file that is still needed; a later save tries again."""


def decide(
    backend: Backend, place: phases.SyncPoint, intend: Callable[[], SaveIntent], *, timeout_s: float | None
) -> AgreedSave:
    """Collective. Steps 1 and 2 of the protocol.

    Raises:
        RemoteRankError: user code failed on some rank; on every rank.
        ValueError: the ranks name different coordinators, or one that does not exist; on every rank.
        KeyError: the pattern names an unknown field; on every rank.
    """
    if backend.world_size == 1:
        intents = [intend()]
    else:
        intents = [
            _intent(fields) for fields in phases.run(backend, place, lambda: asdict(intend()), timeout_s=timeout_s)
        ]
    return decide_from(intents)


def _intent(fields: Mapping[str, Any]) -> SaveIntent:
    values = dict(fields)
    policy = SavePolicy(**values.pop("policy"))
    history = tuple((priority, name) for priority, name in values.pop("history"))
    return SaveIntent(policy=policy, history=history, **values)


def commit(
    backend: Backend,
    place: Callable[[str], phases.SyncPoint],
    agreed: AgreedSave,
    *,
    consolidate: Callable[[], None],
    capture: Callable[[], Any],
    remove_first: Callable[[], Sequence[str]],
    write: Callable[[Any], None],
    all_write: bool,
    timeout_s: float | None,
) -> None:
    """Collective. Steps 3 and 4 of the protocol.

    Args:
        backend: the job's.
        place: makes the place of a phase from what is done in it.
        agreed: what :func:`decide` returned; it holds a decision.
        consolidate: gathers what is sharded over the ranks; collective, and apart so that no user code can keep a
            rank from it.
        capture: returns the checkpoint on this rank.
        remove_first: removes what has to go before the write, and returns which files these were; collective.
        write: hands the checkpoint to the save handler on this rank.
        all_write: whether every rank may take long over it. Else the ranks that write nothing are patient, and
            the coordinator waits for them no longer than `timeout_s`.
        timeout_s: seconds to wait for the other ranks; None for the default.

    Raises:
        RemoteRankError: capture or write failed on some rank; on every rank. In a world of one: what they raised.
        CommitNotDurable: the file is in place, but may not survive a power cut.
    """
    if agreed.decision is None:
        return
    filename = agreed.decision.filename
    phases.run(backend, place(f"consolidating {filename}"), consolidate, timeout_s=timeout_s)
    captured: list[Any] = []
    to_host = all_write or backend.rank == agreed.coordinator

    def capture_here() -> None:
        captured.append(backend.sync_device(capture(), to_host=to_host))

    phases.run(backend, place(f"capturing {filename}"), capture_here, timeout_s=timeout_s)
    removed = remove_first()
    here = place(f"saving {filename}")

    def write_here() -> None:
        try:
            write(captured[0])
        except SaveError as error:
            history = [entry for entry in agreed.history if entry[1] not in removed]
            raise with_context(error, backend.rank, here.step, filename, history) from error

    patience_s = default_timeout_s() if timeout_s is None else timeout_s
    if all_write or backend.rank != agreed.coordinator:
        patience_s = max(patience_s, WRITE_TIMEOUT_S)
    phases.run(backend, here, write_here, timeout_s=patience_s)


def with_context(error: SaveError, rank: int, step: int, filename: str, history: Sequence[Entry]) -> SaveError:
    """Say on which rank and step it happened, and what stands. A file of the same name is not vouched for.

    Args:
        error: what went wrong.
        rank: where.
        step: the engine's iteration.
        filename: what was to be saved.
        history: what was kept before.
    """
    others = [name for _, name in history if name != filename]
    is_renamed = isinstance(error, CommitNotDurable)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        stands = ""  # with the directory gone nothing is vouched for
    elif others:
        stands = f" {others[-1]} {'was kept for that reason' if is_renamed else 'is intact'}."
    else:
        stands = "" if history else " There is no earlier checkpoint."
    return save_error(f"rank {rank}, step {step}: {error}.{stands}", error, renamed=is_renamed)


def remove(
    backend: Backend,
    place: phases.SyncPoint,
    filenames: Sequence[str],
    remove_one: Callable[[str], None],
    *,
    timeout_s: float | None,
) -> list[Removal]:
    """Collective. Step 6 of the protocol.

    Args:
        backend: the job's.
        place: where this rank is.
        filenames: what to remove, the same on every rank.
        remove_one: the save handler's ``remove``.
        timeout_s: seconds to wait for the other ranks; None for the default.

    Returns:
        One entry for each of `filenames`; the same on every rank. A file that is gone or cannot be removed is no
        error: the new checkpoint is committed.
    """
    if not filenames:
        return []
    answers = phases.run(backend, place, lambda: remove_local(filenames, remove_one), timeout_s=timeout_s)
    return merge_removals(filenames, answers)


def remove_local(filenames: Sequence[str], remove_one: Callable[[str], None]) -> dict[str, list[Any]]:
    """Remove files on this rank. Any thread; issues no collectives.

    Returns:
        For each that was not removed whether it is gone all the same, and why.
    """
    problems: dict[str, list[Any]] = {}
    for filename in filenames:
        try:
            remove_one(filename)
        except FileNotFoundError:
            gone, problem = True, f"{filename} was already gone"
        except StillNeeded as error:
            gone, problem = False, str(error)
        except ValueError as error:  # a name from a loaded history that would leave the directory
            gone, problem = True, f"{filename} is left alone: {error}"
        except Exception as error:  # noqa: BLE001 - a custom handler's; the new checkpoint is committed
            gone, problem = False, f"{filename} could not be removed: {type(error).__name__}: {error}"
        else:
            continue
        problems[filename] = [gone, printable(problem)]
    return problems


def merge_removals(filenames: Sequence[str], answers: Sequence[Mapping[str, Sequence[Any]]]) -> list[Removal]:
    """Return what became of each file, from what :func:`remove_local` told on each rank, in rank order. Pure."""
    removals = []
    for filename in filenames:
        told = [f"rank {rank}: {answer[filename][1]}" for rank, answer in enumerate(answers) if filename in answer]
        gone = all(answer[filename][0] for answer in answers if filename in answer)
        removals.append(Removal(filename=filename, problem="; ".join(told) or None, gone=gone))
    return removals
