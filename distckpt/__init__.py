"""Checkpoints and stop decisions that every rank agrees on: ignite's handlers, for data-parallel training.

The handlers, and ignite with them, are imported when a handler's name is used first. That import also installs
distckpt's hooks into ignite.
"""

import importlib
from typing import TYPE_CHECKING

from distckpt.backends.entry import (
    all_gather,
    all_reduce,
    available_backends,
    backend,
    barrier,
    broadcast,
    device,
    finalize,
    get_local_rank,
    get_node_rank,
    get_rank,
    get_world_size,
    hostname,
    initialize,
    one_rank_only,
)
from distckpt.backends.parallel import Parallel, spawn
from distckpt.errors import (
    CollectiveError,
    CollectiveTimeout,
    CommitNotDurable,
    CorruptCheckpointError,
    DesyncError,
    DistckptError,
    LoadError,
    PartialLoadError,
    RankLost,
    RemoteRankError,
    ReplicasDiffer,
    SaveError,
    ShardedStateError,
    StateMismatchError,
    UnsafeCheckpoint,
    UnsupportedCheckpoint,
)
from distckpt.loading.api import LoadReport, latest, load
from distckpt.samplers import ResumableSampler
from distckpt.saving.api import async_save, save
from distckpt.saving.pending_save import PendingSave

if TYPE_CHECKING:
    from distckpt.handlers import (
        BaseSaveHandler,
        Checkpoint,
        CheckpointEvents,
        DiskSaver,
        EarlyStopping,
        ModelCheckpoint,
        Preemption,
        RngState,
        TerminateOnNan,
        TimeLimit,
        Timer,
        global_step_from_engine,
        resume,
        stop_reason,
    )

__all__ = [
    "BaseSaveHandler",
    "Checkpoint",
    "CheckpointEvents",
    "CollectiveError",
    "CollectiveTimeout",
    "CommitNotDurable",
    "CorruptCheckpointError",
    "DesyncError",
    "DiskSaver",
    "DistckptError",
    "EarlyStopping",
    "LoadError",
    "LoadReport",
    "ModelCheckpoint",
    "Parallel",
    "PartialLoadError",
    "PendingSave",
    "Preemption",
    "RankLost",
    "RemoteRankError",
    "ReplicasDiffer",
    "ResumableSampler",
    "RngState",
    "SaveError",
    "ShardedStateError",
    "StateMismatchError",
    "TerminateOnNan",
    "TimeLimit",
    "Timer",
    "UnsafeCheckpoint",
    "UnsupportedCheckpoint",
    "all_gather",
    "all_reduce",
    "async_save",
    "available_backends",
    "backend",
    "barrier",
    "broadcast",
    "device",
    "finalize",
    "get_local_rank",
    "get_node_rank",
    "get_rank",
    "get_world_size",
    "global_step_from_engine",
    "hostname",
    "initialize",
    "latest",
    "load",
    "one_rank_only",
    "resume",
    "save",
    "spawn",
    "stop_reason",
]

if not TYPE_CHECKING:  # type checkers would take any name for an existing one

    def __getattr__(name: str) -> object:
        """Return a handler, or the package of handlers, and import it first."""
        if name != "handlers" and name not in __all__:
            msg = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(msg)
        handlers = importlib.import_module("distckpt.handlers")
        if name == "handlers":
            return handlers
        value = globals()[name] = getattr(handlers, name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
