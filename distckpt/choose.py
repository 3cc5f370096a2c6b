"""Which checkpoint to go on from: the newest that is whole, the same one on all ranks.

Owns the order of candidates, how one is looked at, and what is said of those that are refused. Must not know about
engines (but for the keys of their states) or handlers. Layer L4.

The protocol, after the coordinator has listed the candidates:

1. (coordinator) :func:`newest_first` orders them. The highest iteration *recorded inside* comes first; modification
   times decide between equals only, since copies (``cp``, ``rsync``, a restored backup) change them. What cannot be
   looked into comes before all others, so that a damaged newest one is never passed over without a word.
2. (all ranks) :func:`first_whole`: each one in turn is read on every rank. All ranks hear what is wrong with it, and
   where; it is refused, or taken, on all of them alike.
"""

import functools
import math
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distckpt.backends.base import Backend
from distckpt.consensus import agree
from distckpt.errors import LoadError
from distckpt.quiet import quiet
from distckpt.storage.ptfile import read_pt

__all__ = ["Chosen", "engine_states", "first_whole", "iteration_of", "newest_first"]

_TAIL_BYTES = 64 * 1024
"""What is compared between the ranks: it holds the zip's directory, and there the checksums of all records."""
_LEVELS = 4
_LONGEST_REASON = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The checkpoint to go on from.

    Attributes:
        path: where it lies.
        name: the path in the directory that was searched.
        state: what it holds, on the CPU.
        refused: the names of the newer ones that are not whole.
    """

    path: Path
    name: str
    state: Any
    refused: tuple[str, ...]


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


def newest_first(paths: Sequence[Path], progress: Callable[[Any], int]) -> list[Path]:
    """Order checkpoints, newest first. Rank-local; issues no collectives.

    Args:
        paths: the candidates.
        progress: takes what a file holds (its tensors mapped, not read), returns the iteration.
    """
    keys: dict[Path, tuple[float, int, str]] = {}
    for path in paths:
        try:
            mtime_ns = path.stat().st_mtime_ns
        except FileNotFoundError:  # removed since it was listed
            continue
        keys[path] = (_peek(path, progress), mtime_ns, path.name)
    return sorted(keys, key=lambda path: keys[path], reverse=True)


def _peek(path: Path, progress: Callable[[Any], int]) -> float:
    """Return the iteration that a file tells of; infinity where it cannot be read."""
    try:
        with quiet():  # reading it will say so again
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
) -> Chosen:
    """Collective. Step 2 of the protocol.

    Args:
        backend: the job's.
        directory: where the candidates lie; the same on every rank.
        names: the candidates, newest first; the same on every rank.
        coordinator: the rank that listed them.
        check: raises ValueError if a checkpoint lacks what is to be loaded.
        timeout_s: seconds to wait for the other ranks; None for the default.

    Returns:
        The first that is read whole, has everything, and is the same file on all ranks.

    Raises:
        LoadError: there is none, or a rank does not see what the coordinator sees; on every rank.
    """
    reasons: list[str] = []
    for name in names:
        path = directory / name
        read: list[Any] = []
        place = agree.Place(who="resume", doing=f"reading {name}", step=0)
        answers = agree.run(backend, place, functools.partial(_look_at, path, check, read), timeout_s=timeout_s)
        problem = _problem_of(path, answers, coordinator)
        if problem is None:
            return Chosen(path=path, name=name, state=read[0], refused=tuple(names[: len(reasons)]))
        reasons.append(problem)
        warnings.warn(f"resume: {problem} It is passed over.", stacklevel=4)
    told = "".join(f"\n- {reason}" for reason in reasons)
    msg = (
        f"None of the {len(names)} checkpoints in {directory} can be resumed from. To start afresh, move them away or "
        f"use another directory.{told}"
    )
    raise LoadError(msg)


def _look_at(path: Path, check: Callable[[Any], None], read: list[Any]) -> dict[str, Any]:
    """Rank-local. Read one candidate into `read`, and tell what is wrong with it here."""
    try:
        size_bytes, crc = _fingerprint(path)
        read.append(read_pt(path))
    except (FileNotFoundError, NotADirectoryError):
        return {"unseen": True, "problem": "it is not there", "file": None}
    except LoadError as error:
        return {"unseen": False, "problem": str(error), "file": None}
    except OSError as error:
        return {"unseen": False, "problem": f"it cannot be read: {error}", "file": None}
    try:
        check(read[0])
    except ValueError as error:
        return {"unseen": False, "problem": f"it lacks what is to be loaded: {error}", "file": None}
    return {"unseen": False, "problem": None, "file": [size_bytes, crc]}


def _fingerprint(path: Path) -> tuple[int, int]:
    with path.open("rb") as file:
        size_bytes = file.seek(0, os.SEEK_END)
        file.seek(max(0, size_bytes - _TAIL_BYTES))
        return size_bytes, zlib.crc32(file.read())


def _problem_of(path: Path, answers: Sequence[Mapping[str, Any]], coordinator: int) -> str | None:
    """Say what is wrong with a candidate, from all ranks' answers. Pure: the same on every rank.

    Raises:
        LoadError: some ranks do not see it.
    """
    unseen = [rank for rank, answer in enumerate(answers) if answer["unseen"]]
    if unseen and coordinator not in unseen:
        msg = (
            f"{path} is there for rank {coordinator}, which lists the checkpoints, but not for rank "
            f"{', '.join(map(str, unseen))}. All ranks have to see the same directory, on a shared file system. "
            "Nothing was loaded."
        )
        raise LoadError(msg)
    problems = {rank: _short(answer["problem"]) for rank, answer in enumerate(answers) if answer["problem"] is not None}
    if problems:
        if len(problems) == len(answers) and len(set(problems.values())) == 1:
            told = problems[0] if len(answers) == 1 else f"on every rank: {problems[0]}"
        else:
            told = "; ".join(f"on rank {rank}: {problem}" for rank, problem in problems.items())
        return f"{path} cannot be resumed from: {told.rstrip('.')}."
    files = [answer["file"] for answer in answers]
    others = [rank for rank, file in enumerate(files) if file != files[coordinator]]
    if others:
        sizes = ", ".join(f"rank {rank}: {file[0]} bytes" for rank, file in enumerate(files))
        ranks = ", ".join(map(str, others))
        return f"{path} is not the same file on all ranks: rank {ranks} sees another than rank {coordinator} ({sizes})."
    return None


def _short(problem: str) -> str:
    return problem if len(problem) <= _LONGEST_REASON else f"{problem[:_LONGEST_REASON]}..."
