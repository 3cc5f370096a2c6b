"""What users call on Checkpoint's class, without an instance.

Owns ignite's helpers around a Checkpoint: patterns, score functions, loading.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine

from distckpt.loading import api
from distckpt.loading.api import LoadReport
from distckpt.policy.naming import default_pattern

__all__ = ["CheckpointHelpers"]


class CheckpointHelpers:
    """Static helpers of :class:`~distckpt.Checkpoint`."""

    @staticmethod
    def setup_filename_pattern(
        with_prefix: bool = True,
        with_score: bool = True,
        with_score_name: bool = True,
        with_global_step: bool = True,
    ) -> str:
        """Return the pattern a checkpoint's name is made from when none is given.

        Raises:
            ValueError: neither score nor global step is asked for, or a score's name without a score.

        Example:
            >>> CheckpointHelpers.setup_filename_pattern()
            '{filename_prefix}_{name}_{global_step}_{score_name}={score}.{ext}'
        """
        return default_pattern(with_prefix, with_score, with_score_name, with_global_step)

    @staticmethod
    def get_default_score_fn(metric_name: str, score_sign: float = 1.0) -> Callable[[Engine], float]:
        """Return a score function that reads a metric of the engine.

        Args:
            metric_name: in ``engine.state.metrics``.
            score_sign: 1.0, or -1.0 for metrics of which the smaller is better.

        Raises:
            ValueError: `score_sign` is neither.

        Example:
            >>> engine = Engine(lambda engine, batch: None)
            >>> engine.state.metrics["loss"] = 0.25
            >>> CheckpointHelpers.get_default_score_fn("loss", -1.0)(engine)
            -0.25
        """
        if score_sign not in (1.0, -1.0):
            msg = "Argument score_sign should be 1 or -1"
            raise ValueError(msg)
        return lambda engine: score_sign * engine.state.metrics[metric_name]

    @staticmethod
    def load_objects(
        to_load: Mapping[str, Any], checkpoint: str | Path | Mapping[str, Any], *, verify: bool = True, **kwargs: Any
    ) -> LoadReport:
        """Load a checkpoint into objects: all of them, or none. Never executes code. Rank-local.

        A file's bytes go straight into the tensors of modules and optimizers where shape and dtype allow, once all of
        it has been verified. Ranks of one machine that load it at once have each byte read from storage once.

        Args:
            to_load: objects with ``load_state_dict``, in mappings and lists nested at will.
            checkpoint: a path, or what was saved, as a mapping. A single object's bare state dict will do.
            verify: compare a file with its checksums before any object is touched.
            kwargs: for ``nn.Module.load_state_dict``, e.g. ``strict=False``; modules only.

        Returns:
            The keys that a load with ``strict=False`` has passed over: ``missing``, ``unexpected``, ``mismatched``.

        Raises:
            TypeError: `checkpoint` is neither, or an object cannot be loaded into.
            LoadError: the file is no checkpoint, is damaged, or would have to execute code.
            ValueError: the checkpoint lacks an object, or an optimizer's groups differ.
            RuntimeError: a module's keys or shapes differ.
            StateMismatchError: either of the last two; it lists the keys of all objects.

        Example:
            >>> from torch import nn
            >>> model, twin = nn.Linear(2, 2), nn.Linear(2, 2)
            >>> CheckpointHelpers.load_objects({"model": twin}, {"model": model.state_dict()})
            LoadReport(missing=(), unexpected=(), mismatched=())
            >>> bool((model.weight == twin.weight).all())
            True
        """
        return api.load_objects(to_load, checkpoint, verify=verify, **kwargs)
