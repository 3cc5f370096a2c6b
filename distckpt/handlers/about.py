"""What a checkpoint's manifest says of the moment it was saved at.

Owns the translation from an engine and a decision to :class:`~distckpt.manifest.Manifest`. Layer L5.
"""

import functools
import sys
import time
from collections.abc import Mapping
from importlib import metadata

import ignite
import torch
from ignite.engine import Engine

from distckpt.backends.base import Backend
from distckpt.consensus.decision import Agreed
from distckpt.manifest import Manifest

__all__ = ["about"]

_RUNTIMES = {"horovod": "horovod", "xla": "torch_xla"}


def about(backend: Backend, engine: Engine | None = None, agreed: Agreed | None = None) -> Manifest:
    """Return the manifest of a checkpoint that is saved now, but for its tensors. Rank-local; issues no collectives.

    Args:
        backend: the job's.
        engine: on whose event it is saved; None outside of a run.
        agreed: what was decided; None where a user calls a save handler.
    """
    decision = None if agreed is None else agreed.decision
    event = None if engine is None else engine.last_event_name
    return Manifest(
        epoch=None if engine is None else engine.state.epoch,
        iteration=None if engine is None else engine.state.iteration,
        score=None if agreed is None else agreed.score,
        priority=None if decision is None else decision.priority,
        reason=None if event is None else str(getattr(event, "name", event)),
        world_size=backend.world_size,
        backend=backend.name,
        versions=_versions(backend.name),
        wall_time_s=time.time(),
    )


def _versions(backend: str) -> Mapping[str, str]:
    found = {"distckpt": _version_of("distckpt"), "torch": str(torch.__version__), "pytorch-ignite": ignite.__version__}
    found["python"] = ".".join(map(str, sys.version_info[:3]))
    if backend in _RUNTIMES:  # the live one, not what could be imported
        found[_RUNTIMES[backend]] = _version_of(_RUNTIMES[backend])
    return found


@functools.cache
def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from its source folder
        return "unknown"
