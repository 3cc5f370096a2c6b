"""What a checkpoint's manifest says of the moment it was saved at.

Owns the translation from an engine and a decision to :class:`~distckpt.ptformat.manifest.Manifest`.

The manifest's ``record`` is what a later run goes on from:

* ``handler``: what names the handler's files, which is the same in the next run (see ``CheckpointHistory._identity``);
* ``run``: ``id``, ``started_s`` and ``lineage`` of the run (see :class:`~distckpt.ptformat.records.Run`);
* ``number``: how many checkpoints that run had saved before, of all handlers;
* ``kept``: the handler's history once this file is committed, as pairs of priority and name, lowest first;
* ``evicted``: the names of the files that this save removes once this file is committed;
* ``engine``: of the outermost engine that fires, ``key`` (where it is in ``to_save``, as a list; null if it is not),
  ``iteration``, ``epoch``, ``max_epochs``, ``max_iters`` and ``epoch_length``;
* ``data``: which data was trained: one mapping where it is equal on all ranks, else a list by rank.
"""

import numbers
from collections.abc import Mapping
from typing import Any

from ignite.engine import Engine

from distckpt.backends.base import Backend
from distckpt.handlers.engine_events import get_firing_engines
from distckpt.handlers.object_trees import find_path
from distckpt.policy.decision import AgreedSave
from distckpt.ptformat.manifest import Manifest
from distckpt.saving.api import describe_job

__all__ = ["about"]


def about(
    backend: Backend,
    engine: Engine | None = None,
    agreed: AgreedSave | None = None,
    to_save: Mapping[str, Any] | None = None,
) -> Manifest:
    """Return the manifest of a checkpoint that is saved now, but for its tensors. Rank-local; issues no collectives.

    Args:
        backend: the job's.
        engine: on whose event it is saved; None outside of a run.
        agreed: what was decided; None where a user calls a save handler.
        to_save: the objects that are saved.
    """
    decision = None if agreed is None else agreed.decision
    event = None if engine is None else engine.last_event_name
    return Manifest(
        epoch=None if engine is None else engine.state.epoch,
        iteration=None if engine is None else engine.state.iteration,
        score=None if agreed is None else agreed.score,
        priority=None if decision is None else decision.priority,
        reason=None if event is None else str(getattr(event, "name", event)),
        **describe_job(backend),
        record=None if engine is None or agreed is None else _record(engine, agreed, to_save or {}),
    )


def _record(engine: Engine, agreed: AgreedSave, to_save: Mapping[str, Any]) -> dict[str, Any] | None:
    decision = agreed.decision
    if decision is None or agreed.handler is None or agreed.run is None:
        return None
    outermost = next(iter(get_firing_engines()), engine)
    state, path = outermost.state, find_path(outermost, to_save)
    is_plain = path is not None and all(isinstance(key, str | int) for key in path)
    fields = ("iteration", "epoch", "max_epochs", "max_iters", "epoch_length")
    is_one = all(one == agreed.data[0] for one in agreed.data)
    return {
        "handler": dict(agreed.handler),
        "run": dict(agreed.run),
        "number": agreed.number,
        "kept": [list(entry) for entry in decision.kept],
        "evicted": list(decision.evicted),
        "engine": {"key": list(path) if path is not None and is_plain else None}
        | {name: _count(getattr(state, name, None)) for name in fields},
        "data": dict(agreed.data[0]) if is_one else [dict(one) for one in agreed.data],
    }


def _count(value: object) -> int | None:
    return int(value) if isinstance(value, numbers.Integral) else None  # a manifest that cannot be made fails a save
