"""Select the newest checkpoint that is whole, the same one on all ranks.

1. (coordinator) :func:`sort_newest_first` orders the files. Unreadable files come first, so that a damaged newest file
   is never skipped silently. Then come files whose manifests have a record, the last save first; names, iterations and
   modification times do not count. Then come files without a record, the highest iteration first: an
   engine's, else the manifest's. Ties are broken by the time of the save, as the manifest has it. A file without a
   manifest has its modification time instead, which copies (``cp``, ``rsync``) change.
2. (all ranks) :func:`select_checkpoint` verifies one file after another on all ranks, until one is whole on all.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distckpt._messages import ignore_warnings, log_level
from distckpt.errors import LoadError
from distckpt.loading.verify_on_ranks import LoadContext, RefusedCheckpoint, verify_on_all_ranks
from distckpt.ptformat.reader import OpenCheckpoint, read_pt
from distckpt.ptformat.records import Record

_logger = logging.getLogger(__name__)
_MAX_DEPTH = 4


@dataclass(slots=True, kw_only=True)
class SelectedCheckpoint:
    """The checkpoint to load.

    Attributes:
        path: the file's path.
        name: the path within the directory that was searched.
        file: the open file, which the caller has to close: the bytes that were verified are the bytes that are read.
        state: the state, on the CPU; its tensors may have no data yet. None once the objects are paired with it.
        iteration: the engine's iteration; -1 if it is unknown.
        refused: the newer files that are not whole, by name, each with the reason.
    """

    path: Path
    name: str
    file: OpenCheckpoint
    state: Any
    iteration: int
    refused: Mapping[str, str]


def find_engine_states(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """Yield the path and the mapping of each engine's state: a mapping with ``iteration`` and ``epoch_length``.

    Example:
        >>> [path for path, _ in find_engine_states({"model": {}, "trainer": {"iteration": 7, "epoch_length": 5}})]
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
    if len(path) < _MAX_DEPTH:
        for key, item in items:
            yield from find_engine_states(item, (*path, key))


def get_iteration(state: Any, path: tuple[Any, ...] | None = None) -> int:
    """Return a checkpoint's iteration: the engine's at `path`, else the highest of all engines; -1 if there is none."""
    found = {where: int(engine["iteration"]) for where, engine in find_engine_states(state)}
    if path is not None and path in found:
        return found[path]
    return max(found.values(), default=-1)


def sort_newest_first(
    directory: Path, files: Mapping[str, Record | None], engine_path: tuple[Any, ...] | None = None
) -> list[str]:
    """Return the names of `files` in `directory`, newest first; see step 1 above. Rank-local; issues no collectives.

    Args:
        directory: the checkpoints' directory.
        files: the names, each with the file's record.
        engine_path: the keys of the trainer's state; None if they are unknown.
    """
    mtimes_ns: dict[str, int] = {}
    for name in files:
        with contextlib.suppress(FileNotFoundError):  # removed since it was listed
            mtimes_ns[name] = (directory / name).stat().st_mtime_ns
    if len(mtimes_ns) <= 1:
        return list(mtimes_ns)
    orders = {name: record.order for name, record in files.items() if record is not None and name in mtimes_ns}
    keys = {
        name: (*_read_iteration_and_time(directory / name, engine_path, mtime_ns / 1e9), mtime_ns, Path(name).name)
        for name, mtime_ns in mtimes_ns.items()
        if name not in orders
    }
    unrecorded = sorted(keys, key=lambda name: keys[name], reverse=True)
    num_unreadable = sum(iteration == math.inf for iteration, *_ in keys.values())
    recorded = sorted(orders, key=lambda name: orders[name], reverse=True)
    return [*unrecorded[:num_unreadable], *recorded, *unrecorded[num_unreadable:]]


def _read_iteration_and_time(path: Path, engine_path: tuple[Any, ...] | None, mtime_s: float) -> tuple[float, float]:
    """Return a file's iteration, infinity if the file cannot be read, and the time of its save in seconds since 1970.

    The iteration is an engine's, else the manifest's; the time is the manifest's, else `mtime_s`.
    """
    try:
        with OpenCheckpoint(path) as file:
            if file.has_damaged_head():
                return math.inf, mtime_s
            if file.read_structure():  # without the tensors
                iteration, head = get_iteration(file.state(), engine_path), file.head()
                if head is None:
                    return iteration, mtime_s
                if iteration < 0 and head.iteration is not None:
                    iteration = head.iteration
                return iteration, mtime_s if head.wall_time_s is None else head.wall_time_s
        with ignore_warnings():  # reading it repeats them
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # noqa: BLE001 - torch cannot map its older format
        try:
            state = read_pt(path)
        except (LoadError, OSError):
            return math.inf, mtime_s
    return get_iteration(state, engine_path), mtime_s


def select_checkpoint(
    context: LoadContext,
    directory: Path,
    names: Sequence[str],
    *,
    check: Callable[[Any, OpenCheckpoint], None] | None = None,
    verify: bool = True,
) -> SelectedCheckpoint:
    """Collective. Return the first file that is whole, complete and the same on all ranks. Step 2 of this module.

    Args:
        context: the operation that needs a checkpoint.
        directory: the checkpoints' directory; the same on every rank.
        names: at least one, newest first; the same on every rank.
        check: raises ValueError if the state of a file lacks objects.
        verify: compare the files with their checksums.

    Raises:
        LoadError: no file can be loaded, or a rank does not have a file that the coordinator has; on every rank.
    """
    refused: dict[str, str] = {}
    for name in names:
        try:
            file, state = verify_on_all_ranks(context, directory / name, check=check, verify=verify)
        except RefusedCheckpoint as refusal:
            refused[name] = str(refusal)
            level = log_level(context.backend.rank, {context.coordinator})
            _logger.log(level, "%s: %s It is passed over.", context.name, refusal)
        else:
            return SelectedCheckpoint(
                path=directory / name,
                name=name,
                file=file,
                state=state,
                iteration=get_iteration(state),
                refused=refused,
            )
    reasons = "".join(f"\n- {reason}" for reason in refused.values())
    raise LoadError(
        f"None of the {len(names)} checkpoints in {directory} can be loaded. To start afresh, move them away or "
        f"use another directory.{reasons}"
    )
