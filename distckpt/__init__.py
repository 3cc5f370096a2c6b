"""Checkpoints and stop decisions that every rank agrees on: ignite's handlers, for data-parallel training."""

import logging as _logging

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
    DamagedCheckpoint,
    DistckptError,
    LoadError,
    PhaseError,
    RanksDriftedApart,
    SaveError,
    UnsafeCheckpoint,
)
from distckpt.handlers import (
    BaseSaveHandler,
    Checkpoint,
    CheckpointEvents,
    DiskSaver,
    EarlyStopping,
    ModelCheckpoint,
    TerminateOnNan,
    TimeLimit,
    Timer,
    global_step_from_engine,
)

__all__ = [
    "BaseSaveHandler",
    "Checkpoint",
    "CheckpointEvents",
    "CollectiveError",
    "CollectiveTimeout",
    "CommitNotDurable",
    "DamagedCheckpoint",
    "DiskSaver",
    "DistckptError",
    "EarlyStopping",
    "LoadError",
    "ModelCheckpoint",
    "Parallel",
    "PhaseError",
    "RanksDriftedApart",
    "SaveError",
    "TerminateOnNan",
    "TimeLimit",
    "Timer",
    "UnsafeCheckpoint",
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
    "global_step_from_engine",
    "hostname",
    "initialize",
    "one_rank_only",
    "spawn",
]

# A library does not print by itself; the program that configures logging decides.
_logging.getLogger(__name__).addHandler(_logging.NullHandler())
