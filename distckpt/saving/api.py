"""Saving without an engine: :func:`save` and :func:`async_save`.

They run the protocol of :mod:`distckpt.saving.protocol`, as :class:`~distckpt.Checkpoint` does, and write the same
files. Neither imports ignite.
"""

import functools
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from distckpt._threads import get_num_threads
from distckpt._values import check_timeout, valid_timeout
from distckpt.backends.base import Backend
from distckpt.backends.detect import current
from distckpt.coordination import phases
from distckpt.coordination.phases import SyncPoint
from distckpt.errors import CommitNotDurable, SaveError, save_error
from distckpt.ptformat.loadable import RefusedObject
from distckpt.ptformat.manifest import Manifest
from distckpt.saving.capture import (
    capture,
    check_objects,
    consolidate,
    find_optimizer_storages,
    find_replicas,
    needs_consolidation,
)
from distckpt.saving.object_forms import captured_objects
from distckpt.saving.pending_save import WRITE_TIMEOUT_S, PendingSave
from distckpt.saving.protocol import start_save
from distckpt.saving.rank_writer import RankWriter
from distckpt.saving.shards import Shards
from distckpt.saving.staging import thread_memory
from distckpt.saving.writer_group import WriterGroup, WriterSearch
from distckpt.storage.local import LocalStorage

ShareWrite = Literal["node", "world"] | None
_RUNTIMES = {"horovod": "horovod", "xla": "torch_xla"}
_PENDING: dict[Path, tuple[int, PendingSave]] = {}
"""The pending saves that this process coordinates, by path, each with a number that is unique among them."""


def save(
    objects: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    save_on_rank: int = 0,
    step: int | None = None,
    share_write: ShareWrite = None,
    check_replicas: bool = False,
    timeout_s: float | None = None,
) -> Path:
    """Collective. Save the state of objects as one file, and return when it is durable. Call it on all ranks.

    1. (all ranks) check the arguments, and that they are equal on all ranks.
    2. (all ranks) consolidate sharded optimizer states, and call ``state_dict()`` on every object.
    3. (writers) write and sync the file under a temporary name: rank `save_on_rank`, or several ranks.
    4. (coordinator) give the file its name, and sync the directory. A file of that name is replaced atomically.
    5. (all ranks) return, or raise the same error.

    The file is a ``.pt`` with a manifest and checksums. ``torch.load(path, weights_only=True)`` opens it.

    Args:
        objects: objects with ``state_dict``, in nested mappings and lists. The file holds a mapping of the same shape;
            of a single object it holds the bare state.
        path: path of the file, in a directory that exists; a path that ends in a slash is refused. The file name must
            be equal on all ranks. Only the directory on `save_on_rank` counts, with `share_write` or sharded tensors
            those on all writers.
        save_on_rank: the coordinator; it creates and commits the file.
        step: number of training steps, for the manifest and for errors.
        share_write: ``"node"`` or ``"world"``: the ranks of the coordinator's node, or all ranks, write the file
            together if they see its directory. Each writes a range of what is equal on all of them, such as the
            parameters of a DistributedDataParallel module and their optimizer states. None: the coordinator writes.
        check_replicas: before writing, compare checksums of what should be equal on all ranks.
        timeout_s: seconds to wait for the other ranks; None for the default. Writing may take half an hour.

    Returns:
        `path`, with ``~`` expanded.

    Raises:
        TypeError: an object has no ``state_dict``, or an argument has a wrong type; on every rank.
        ValueError: an argument has a wrong value, or differs between ranks; on every rank.
        ShardedStateError: a state is sharded in a way that cannot be saved, or not alike on all ranks; or the ranks
            have different modules or optimizers under one key; on every rank.
        ReplicasDiffer: replicas differ; on every rank.
        SaveError: the file could not be written; on every rank. A file that `path` named before is unchanged.
        CommitNotDurable: the file has its name, but may not survive a power cut; on every rank.
        RemoteRankError: base class of what is raised for an error on another rank.

    Example:
        >>> import tempfile, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save({"model": model, "optimizer": optimizer}, f"{folder}/last.pt", step=100)
        ...     sorted(torch.load(path, weights_only=True))
        ['model', 'optimizer']
    """
    pending = _start(
        objects, path, save_on_rank, step, share_write, timeout_s, check_replicas=check_replicas, in_background=False
    )
    return pending.result()


def async_save(
    objects: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    save_on_rank: int = 0,
    step: int | None = None,
    share_write: ShareWrite = None,
    check_replicas: bool = False,
    overlap_copy: bool = True,
    timeout_s: float | None = None,
) -> PendingSave:
    """Collective. Copy the state of objects to host memory, and write it while training continues.

    Call it on all ranks. It saves as :func:`save` does, but returns when training may change the objects again. Until
    the commit `path` names the earlier file, or none: call :meth:`PendingSave.wait` before you load it.

    The file becomes durable without further calls: the coordinator's thread commits it. With `share_write` that thread
    learns of the other writers through the job's key-value store; in a job without one (Horovod, XLA in several
    processes) :meth:`PendingSave.wait` commits. No thread issues collectives, so errors of other ranks, and the commit,
    are known on all ranks only after :meth:`PendingSave.wait` or :meth:`PendingSave.result`. Both are collective.

    An error is also logged on the rank where it occurs. An exiting process waits for its own part of the save, and
    warns if the file was not saved. A save to the path of a pending save waits for its commit.

    Args:
        objects: see :func:`save`.
        path: see :func:`save`.
        save_on_rank: see :func:`save`.
        step: see :func:`save`.
        share_write: see :func:`save`.
        check_replicas: see :func:`save`.
        overlap_copy: copy parameters and optimizer states that are on an accelerator while the next step computes; the
            optimizer's step waits for the copy. False if something else changes parameters in place before that step.
        timeout_s: see :func:`save`.

    Returns:
        The pending save.

    Raises:
        Exception: what :func:`save` raises for steps 1 and 2. Errors of the later steps are raised by the pending save.

    Example:
        >>> import tempfile, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pending = async_save({"model": model}, f"{folder}/model.pt")
        ...     _ = torch.nn.init.zeros_(model.weight)  # the file holds the older weights
        ...     bool(torch.load(pending.result(), weights_only=True)["weight"].any())
        True
    """
    return _start(
        objects,
        path,
        save_on_rank,
        step,
        share_write,
        timeout_s,
        check_replicas=check_replicas,
        in_background=True,
        overlap_copy=overlap_copy,
    )


def _start(
    objects: Mapping[str, Any],
    path: str | os.PathLike[str],
    save_on_rank: int,
    step: int | None,
    share_write: ShareWrite,
    timeout_s: float | None,
    *,
    check_replicas: bool,
    in_background: bool,
    overlap_copy: bool = False,
) -> PendingSave:
    backend = current()

    name = "distckpt.save"

    def sync_point(phase: str) -> SyncPoint:
        return SyncPoint(handler=name, phase=phase, step=step if isinstance(step, int) else 0)

    def check() -> dict[str, Any]:
        _check_arguments(objects, path, step, share_write, timeout_s)
        backend.check_rank(save_on_rank, "save_on_rank")
        target = Path(path).expanduser()
        # Another rank may not be allowed to look there. Mostly its answer is the same, which saves a collective.
        number, exists = _begin(target) if backend.rank == save_on_rank else (0, os.path.exists(target))  # noqa: PTH110 - see above
        same = {
            "the name in path": target.name,
            "save_on_rank": save_on_rank,
            "share_write": share_write,
            "check_replicas": bool(check_replicas),
            "async": in_background,
        }
        is_sharded = needs_consolidation(objects)
        return {"same": same, "is_sharded": is_sharded, "exists": exists, "number": number}

    answers = phases.run(backend, sync_point("checking the arguments"), check, timeout_s=valid_timeout(timeout_s))
    _check_same([answer["same"] for answer in answers])
    number, target = answers[save_on_rank]["number"], Path(path).expanduser()
    if number is None:  # an earlier save to this path is being written
        wait = functools.partial(_wait_for_pending, target.absolute())
        number = phases.run(backend, sync_point("waiting for it"), wait, timeout_s=WRITE_TIMEOUT_S)[save_on_rank]
    name = f"distckpt.save#{number}"
    storage = LocalStorage(target.parent)
    ranks: tuple[int, ...] = (save_on_rank,)
    if share_write is not None:
        same_node = share_write == "node"
        ranks = WriterSearch(backend, storage, save_on_rank, same_node=same_node, timeout_s=timeout_s).find(sync_point)
    group = WriterGroup(ranks=ranks, check_replicas=bool(check_replicas))
    gathered: dict[int, Any] = {}
    shards = Shards(backend.rank, backend.world_size)

    captured = captured_objects(backend.world_size)

    def capture_state() -> Any:
        state = capture(
            objects,
            rank=backend.rank,
            save_on_rank=save_on_rank,
            gathered=gathered,
            has_shards=True,
            objects=captured,
        )
        return next(iter(state.values())) if len(state) == 1 else state

    def make_writer() -> RankWriter:
        key = str(next(iter(objects))) if len(objects) == 1 else None
        return RankWriter(
            storage,
            target.name,
            manifest=Manifest(**describe_job(backend), iteration=step, key=key),
            memory=thread_memory(),
            write_range=group.range_of(backend.rank),
            is_coordinator=backend.rank == save_on_rank,
            in_background=in_background,
            deferred_devices=("cuda",) if overlap_copy else (),
            num_threads=get_num_threads(backend.world_size),
            check_replicas=group.check_replicas,
            on_refused=functools.partial(warn_of_refused, target, key or ""),
        )

    pending = start_save(
        backend,
        sync_point,
        filename=target.name,
        coordinator=save_on_rank,
        consolidate=(lambda: gathered.update(consolidate(objects, save_on_rank=save_on_rank)))
        if any(answer["is_sharded"] for answer in answers)
        else None,
        capture=capture_state,
        objects=captured,
        replicas=lambda: find_replicas(objects, world_size=backend.world_size),
        optimizer_storages=lambda: find_optimizer_storages(objects),
        make_writer=make_writer,
        group=group,
        remove_replaced=None,
        shards=shards,
        shard_writers=WriterSearch(backend, storage, save_on_rank, timeout_s=timeout_s),
        annotate=functools.partial(_annotate, backend.rank, step, target, answers[save_on_rank]["exists"]),
        in_background=in_background,
        timeout_s=timeout_s,
        path=target,
        reports_errors=in_background,
    )
    if in_background and backend.rank == save_on_rank:
        _PENDING[target.absolute()] = number, pending
    if pending.layout_difference is not None:
        text = f"the ranks cannot write {target} together: {pending.layout_difference}. Rank {save_on_rank} writes it."
        warnings.warn(text, stacklevel=3)
    return pending


def _check_arguments(objects: object, path: object, step: object, share_write: object, timeout_s: object) -> None:
    if not isinstance(objects, Mapping):
        raise TypeError(f"Argument objects should be a dictionary, but given {type(objects)}")
    check_objects(dict(objects), "state_dict")
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"Argument path should be a string or Path object, but given {type(path)}")
    if str(os.fspath(path)).endswith((os.sep, f"{os.sep}.")):
        raise ValueError(f"Argument path should name a file, but given {path!r}, a directory")
    if step is not None and (not isinstance(step, int) or isinstance(step, bool)):
        raise TypeError(f"Argument step should be int | None, but given {type(step)}")
    if share_write not in (None, "node", "world"):
        raise ValueError(f"Argument share_write should be one of None, 'node', 'world', but given {share_write!r}")
    check_timeout(timeout_s)


def _check_same(arguments: Sequence[Mapping[str, Any]]) -> None:
    for name in arguments[0]:
        values = [one[name] for one in arguments]
        if any(value != values[0] for value in values):
            texts = ", ".join(f"{value!r} on rank {rank}" for rank, value in enumerate(values))
            raise ValueError(f"The ranks call distckpt.save or async_save with different arguments: {name} is {texts}")


def _begin(target: Path) -> tuple[int | None, bool]:
    """Rank-local. Check the target.

    Returns:
        A number that no pending save has, or None if a save to the target is pending; and whether the target exists.
    """
    exists = target.exists()
    if exists and not target.is_file():
        what = "a directory" if target.is_dir() else "no regular file"
        raise ValueError(f"Argument path should name a file, but {target} is {what}")
    path = target.absolute()
    is_pending = path in _PENDING and not _PENDING[path][1].done()
    return None if is_pending else _wait_for_pending(path), exists


def _wait_for_pending(path: Path) -> int:
    """Wait until no save to a path is pending. Rank-local; return a number that no pending save has."""
    if path in _PENDING:
        pending = _PENDING[path][1]
        pending.join()
        if not pending.done():
            raise ValueError(f"Argument path: a save to {path} is pending. Call its wait() on all ranks first")
    for other in [other for other, (_, pending) in _PENDING.items() if pending.done()]:
        del _PENDING[other]
    used = {number for number, _ in _PENDING.values()}
    return next(number for number in range(len(used) + 1) if number not in used)


def _annotate(rank: int, step: int | None, path: Path, existed: bool, error: SaveError) -> SaveError:  # noqa: FBT001 - bound by partial()
    where = f"rank {rank}" if step is None else f"rank {rank}, step {step}"
    is_renamed = isinstance(error, CommitNotDurable)
    intact = f" The earlier file {path} is intact." if existed and not is_renamed else ""
    return save_error(f"{where}: {error}.{intact}", error, renamed=is_renamed)


def warn_of_refused(path: Path, key: str, refused: Sequence[RefusedObject]) -> None:
    """Warn of objects in a file that loading will refuse.

    Args:
        path: path of the file.
        key: key of the single object whose bare state the file holds; empty if it holds a mapping.
        refused: the objects, with the paths to them.
    """
    where = [".".join(filter(None, (key, path))) for path, _ in refused]
    objects = ", ".join(f"{at!r} ({one.what})" if at else one.what for at, one in zip(where, refused, strict=True))
    warnings.warn(
        f"{path}: load_objects will refuse it, since it never executes code: {objects}. Save plain tensors, numbers, "
        "text and containers of them, or allow the class by torch.serialization.add_safe_globals wherever it is "
        "loaded.",
        stacklevel=2,
    )


def describe_job(backend: Backend) -> dict[str, Any]:
    """Return the fields that the manifest of every save has: the job, versions of libraries, and the time."""
    versions = {"distckpt": _version_of("distckpt"), "torch": str(torch.__version__)}
    if "ignite" in sys.modules:
        versions["pytorch-ignite"] = sys.modules["ignite"].__version__
    versions["python"] = ".".join(map(str, sys.version_info[:3]))
    if backend.name in _RUNTIMES:  # of the live runtime, not of what could be imported
        versions[_RUNTIMES[backend.name]] = _version_of(_RUNTIMES[backend.name])
    return {
        "world_size": backend.world_size,
        "backend": backend.name,
        "versions": versions,
        "wall_time_s": time.time(),
    }


@functools.cache
def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # it runs from its source folder
        return "unknown"
