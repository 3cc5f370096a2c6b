"""The handlers: what users attach to ignite engines. The only place that imports ignite."""

from distckpt.handlers import ignite_hooks
from distckpt.handlers.checkpoint import Checkpoint
from distckpt.handlers.disk_saver import DiskSaver
from distckpt.handlers.early_stopping import EarlyStopping
from distckpt.handlers.engine_votes import stop_reason
from distckpt.handlers.global_step import global_step_from_engine
from distckpt.handlers.idist_bridge import register_xla_model, wrap_metric_state
from distckpt.handlers.ignite_hooks import CheckpointEvents
from distckpt.handlers.loop import Loop
from distckpt.handlers.model_checkpoint import ModelCheckpoint
from distckpt.handlers.preemption import Preemption
from distckpt.handlers.progress import count_event, progress_of
from distckpt.handlers.resume import resume
from distckpt.handlers.rng_state import RngState
from distckpt.handlers.save_handler import BaseSaveHandler
from distckpt.handlers.terminate_on_nan import TerminateOnNan
from distckpt.handlers.time_limit import TimeLimit
from distckpt.handlers.timer import Timer

ignite_hooks.install(progress_of, count_event)
register_xla_model()
wrap_metric_state()

__all__ = [
    "BaseSaveHandler",
    "Checkpoint",
    "CheckpointEvents",
    "DiskSaver",
    "EarlyStopping",
    "Loop",
    "ModelCheckpoint",
    "Preemption",
    "RngState",
    "TerminateOnNan",
    "TimeLimit",
    "Timer",
    "global_step_from_engine",
    "resume",
    "stop_reason",
]
