"""Which checkpoint to go on from: the newest that is whole, the same one on all ranks.

Owns the order of candidates, and what is said when none will do. How one is looked at lies in
:mod:`distckpt.loading.verify_on_ranks`. Must not know about engines (but for the keys of their states) or handlers.

The protocol, after the coordinator has listed the candidates:

1. (coordinator) :func:`newest_first` orders them. Those whose manifests have a record come in the order in which they
   were saved; names, iterations and modification times have no part in it. After them come those without a record, the
   highest iteration recorded inside first; modification times decide between equals only, since copies (``cp``,
   ``rsync``, a restored backup) change them. What cannot be looked into comes before all others, so that a damaged
   newest one is never passed over without a word.
2. (all ranks) :func:`first_whole`: all ranks look at each one in turn, and hear what is wrong with it, and where; it is
   refused, or taken, on all of them alike.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from distckpt._messages import ignore_warnings, log_level
from distckpt.backends.base import Backend
from distckpt.errors import LoadError
from distckpt.loading.verify_on_ranks import Candidate
from distckpt.ptformat.reader import OpenCheckpoint
from distckpt.ptformat.torch_format import read_pt

__all__ = ["Chosen", "engine_states", "first_whole", "iteration_of", "newest_first"]

_logger = logging.getLogger(__name__)
_LEVELS = 4


@dataclass(slots=True, kw_only=True)
class Chosen:
    """The checkpoint to go on from.

    Attributes:
        path: where it lies.
        name: the path in the directory that was searched.
        file: the same, held open: what was verified is what is read. To be closed by who takes it.
        state: what it holds, on the CPU; its tensors may be unread. None once the objects have been paired with it:
            what is still referred to is read.
        iteration: how far the run was; -1 where that is unknown.
        refused: the names of the newer ones that are not whole, each with the reason.
    """

    path: Path
    name: str
    file: OpenCheckpoint
    state: Any
    iteration: int
    refused: Mapping[str, str]


def engine_states(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """Find what looks like the state of an engine: a mapping with ``iteration`` and ``epoch_length``.

    Yields:
        Where in the checkpoint it lies, and the mapping.

    Example:
        >>> [path for path, _ in engine_states({"model": {}, "trainer": {"iteration": 7, "epoch_length": 5}})]
        [('trainer',)]
    """
    if isinstance(state, Mapping):
        if "epoch_length" in state and type(state.get("iteration")) is int:
            yield path, state
            return
        items: Sequence[tuple[Any, Any]] = list(state.items())
    elif isinstance(state, list | tuple):
        items = list(enumerate(state))
    else:
        return
    if len(path) < _LEVELS:
        for key, item in items:
            yield from engine_states(item, (*path, key))


def iteration_of(state: Any, path: tuple[Any, ...] | None = None) -> int:
    """Return how far the run was that a checkpoint is of; -1 where that is unknown.

    Args:
        state: the checkpoint.
        path: where the state of the engine that counts is to be found; else the one that is furthest counts.
    """
    found = {where: int(one["iteration"]) for where, one in engine_states(state)}
    if path is not None and path in found:
        return found[path]
    return max(found.values(), default=-1)


def newest_first(
    paths: Sequence[Path],
    progress: Callable[[Any], int],
    recorded: Mapping[Path, tuple[float, str, int]] = MappingProxyType({}),
) -> list[Path]:
    """Order checkpoints, newest first. Rank-local; issues no collectives.

    Args:
        paths: the candidates.
        progress: takes what a file holds (its tensors not read), returns the iteration.
        recorded: of the files that have a record, by what they are ordered: the highest is the newest.
    """
    mtimes_ns: dict[Path, int] = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # removed since it was listed
            mtimes_ns[path] = path.stat().st_mtime_ns
    if len(mtimes_ns) < 2:  # noqa: PLR2004 - nothing to order
        return list(mtimes_ns)
    others = {path: (_peek(path, progress), at, path.name) for path, at in mtimes_ns.items() if path not in recorded}
    unread = [path for path, key in others.items() if key[0] == math.inf]
    known = sorted(recorded.keys() & mtimes_ns.keys(), key=lambda path: recorded[path], reverse=True)
    return [
        *sorted(unread, key=lambda path: others[path], reverse=True),
        *known,
        *sorted(others.keys() - set(unread), key=lambda path: others[path], reverse=True),
    ]


def _peek(path: Path, progress: Callable[[Any], int]) -> float:
    """Return the iteration that a file tells of; infinity where it cannot be read."""
    try:
        with OpenCheckpoint(path) as file:
            if file.has_damaged_head():
                return math.inf
            if file.look():  # its tensors are not read
                return progress(file.state())
        with ignore_warnings():  # reading it will say so again
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # noqa: BLE001 - it is read in the sure way, then; the older format cannot be mapped
        try:
            state = read_pt(path)
        except (LoadError, OSError):
            return math.inf
    return progress(state)


def first_whole(
    backend: Backend,
    directory: Path,
    names: Sequence[str],
    *,
    coordinator: int,
    check: Callable[[Any], None],
    timeout_s: float | None,
    verify: bool = True,
) -> Chosen:
    """Collective. Step 2 of the protocol.

    Args:
        backend: the job's.
        directory: where the candidates lie; the same on every rank.
        names: the candidates, newest first; the same on every rank.
        coordinator: the rank that listed them.
        check: raises ValueError if a checkpoint lacks what is to be loaded.
        timeout_s: seconds to wait for the other ranks; None for the default.
        verify: compare the files with their checksums.

    Returns:
        The first that is whole, has everything, and is the same file on all ranks. Its file is open.

    Raises:
        LoadError: there is none, or a rank does not see what the coordinator sees; on every rank.
    """
    reasons: list[str] = []
    for name in names:
        with contextlib.ExitStack() as closing:
            candidate = Candidate(backend, directory / name, name, timeout_s=timeout_s)
            closing.callback(candidate.close)
            problem = candidate.look(check, coordinator=coordinator, verify=verify)
            if problem is None:
                closing.pop_all()
                return Chosen(
                    path=candidate.path,
                    name=name,
                    file=candidate.file,
                    state=candidate.state,
                    iteration=iteration_of(candidate.state),
                    refused=dict(zip(names, reasons, strict=False)),
                )
        reasons.append(problem)
        _logger.log(log_level(backend.rank, {coordinator}), "resume: %s It is passed over.", problem)
    told = "".join(f"\n- {reason}" for reason in reasons)
    msg = (
        f"None of the {len(names)} checkpoints in {directory} can be resumed from. To start afresh, move them away or "
        f"use another directory.{told}"
    )
    raise LoadError(msg)
