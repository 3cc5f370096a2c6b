"""Checkpoints and stop decisions that every rank agrees on: ignite's handlers, for data-parallel training.

A module is imported when one of its names is used first: the command line starts without torch. The handlers' import
also imports ignite, and installs distckpt's hooks into it.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    from distckpt.handlers import (
        BaseSaveHandler,
        Checkpoint,
        CheckpointEvents,
        DiskSaver,
        EarlyStopping,
        Loop,
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
    from distckpt.loading.api import LoadReport, latest, load
    from distckpt.policy.policies import BestN, EveryHours, EveryNSteps, LastN
    from distckpt.samplers import ResumableSampler
    from distckpt.saving.api import async_save, save
    from distckpt.saving.pending_save import PendingSave
    from distckpt.saving.stage_state import StageState

__all__ = [
    "BaseSaveHandler",
    "BestN",
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
    "EveryHours",
    "EveryNSteps",
    "LastN",
    "LoadError",
    "LoadReport",
    "Loop",
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
    "StageState",
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

_MODULES = (
    "backends",
    "coordination",
    "errors",
    "handlers",
    "integrations",
    "loading",
    "policy",
    "ptformat",
    "samplers",
    "saving",
    "storage",
)
_HOMES = {
    "distckpt.backends.entry": (
        "all_gather",
        "all_reduce",
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
        "hostname",
        "initialize",
        "one_rank_only",
    ),
    "distckpt.backends.parallel": ("Parallel", "spawn"),
    "distckpt.errors": (
        "CollectiveError",
        "CollectiveTimeout",
        "CommitNotDurable",
        "CorruptCheckpointError",
        "DesyncError",
        "DistckptError",
        "LoadError",
        "PartialLoadError",
        "RankLost",
        "RemoteRankError",
        "ReplicasDiffer",
        "SaveError",
        "ShardedStateError",
        "StateMismatchError",
        "UnsafeCheckpoint",
        "UnsupportedCheckpoint",
    ),
    "distckpt.loading.api": ("LoadReport", "latest", "load"),
    "distckpt.policy.policies": ("BestN", "EveryHours", "EveryNSteps", "LastN"),
    "distckpt.samplers": ("ResumableSampler",),
    "distckpt.saving.api": ("async_save", "save"),
    "distckpt.saving.pending_save": ("PendingSave",),
    "distckpt.saving.stage_state": ("StageState",),
}
"""The modules of the public names. A name that is not here is a handler's."""

if not TYPE_CHECKING:  # type checkers would take any name for an existing one

    def __getattr__(name: str) -> object:
        """Return a public name or a module, and import it first."""
        if name in _MODULES:
            return importlib.import_module(f"distckpt.{name}")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = next((module for module, names in _HOMES.items() if name in names), "distckpt.handlers")
        value = globals()[name] = getattr(importlib.import_module(home), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
