"""The manifest of a checkpoint that a handler saves.

The manifest's ``record`` is what a later run resumes from:

* ``handler``: the handler's identity, the same in the next run (see ``OwnFiles.identity``);
* ``run``: ``id``, ``started_s`` and ``lineage`` of the run (see :class:`~distckpt.ptformat.records.Run`);
* ``number``: the number of checkpoints that all handlers had saved in the run before;
* ``kept``: the handler's history after this save, as pairs of priority and name, lowest first. If it has
  more than 100, only the new checkpoint's pair is here: each other file's own record has that file's pair;
* ``num_kept``: length of the history;
* ``keep``: the handler's policies, as pairs of name and number; missing if it has ``n_saved``;
* ``step``: the step that policies see: the global step in the name, or the iteration of the outermost engine;
* ``time_s``: when the ranks decided on the save, in whole minutes; missing unless a policy asks for it;
* ``evicted``: the names of the files that this save removes after the commit;
* ``engine``: of the outermost running engine that is in ``to_save``, else of the outermost one: ``key`` (its place in
  ``to_save`` as a list; null if it is not there), ``iteration``, ``epoch``, ``max_epochs``, ``max_iters`` and
  ``epoch_length``;
* ``data``: the position in the training data: one mapping if it is equal on all ranks, else a list by rank.
"""

import numbers
from collections.abc import Mapping
from typing import Any

from ignite.engine import Engine

from distckpt.backends.base import Backend
from distckpt.handlers.engine_events import get_running_engines
from distckpt.handlers.object_trees import find_path
from distckpt.handlers.save_intent import find_trainer
from distckpt.policy.decision import AgreedSave, SaveDecision
from distckpt.policy.policies import to_plain
from distckpt.ptformat.manifest import Manifest
from distckpt.saving.api import describe_job

_MAX_KEPT = 100
"""A longer history is not recorded: each file would hold the names of all others."""


def build_manifest(
    backend: Backend, engine: Engine, agreed: AgreedSave, to_save: Mapping[str, Any], key: str | None
) -> Manifest:
    """Return the manifest of a checkpoint that is being saved, without its tensors. Rank-local.

    Args:
        backend: the job's backend.
        engine: the engine on whose event the checkpoint is saved.
        agreed: what the ranks agreed on.
        to_save: the objects.
        key: that of the single object whose bare state the file holds; None if it holds a mapping.
    """
    decision, event = agreed.decision, engine.last_event_name
    return Manifest(
        epoch=engine.state.epoch,
        iteration=engine.state.iteration,
        score=agreed.score,
        priority=None if decision is None else decision.priority,
        reason=None if event is None else str(getattr(event, "name", event)),
        key=key,
        **describe_job(backend),
        record=_make_record(engine, agreed, to_save),
    )


def _make_record(engine: Engine, agreed: AgreedSave, to_save: Mapping[str, Any]) -> dict[str, Any] | None:
    decision = agreed.decision
    if decision is None or agreed.intent.handler is None or agreed.intent.run is None:
        return None
    trainer = find_trainer((*get_running_engines(), engine), to_save)
    path = find_path(trainer, to_save)
    is_plain = path is not None and all(isinstance(key, str | int) for key in path)
    counters = ("iteration", "epoch", "max_epochs", "max_iters", "epoch_length")
    is_equal = all(position == agreed.data[0] for position in agreed.data)
    keep, time_s = agreed.intent.policy.keep, agreed.intent.time_s
    policies = ({} if keep is None else {"keep": to_plain(keep)}) | ({} if time_s is None else {"time_s": time_s})
    return policies | {
        "handler": dict(agreed.intent.handler),
        "run": dict(agreed.intent.run),
        "number": agreed.intent.number,
        "kept": _kept_in_record(decision),
        "num_kept": len(decision.kept),
        "step": agreed.intent.step,
        "evicted": list(decision.evicted),
        "engine": {"key": list(path) if path is not None and is_plain else None}
        | {name: _as_int(getattr(trainer.state, name, None)) for name in counters},
        "data": dict(agreed.data[0]) if is_equal else [dict(position) for position in agreed.data],
    }


def _kept_in_record(decision: SaveDecision) -> list[list[Any]]:
    if len(decision.kept) > _MAX_KEPT:
        return [[decision.priority, decision.filename]]
    return [list(entry) for entry in decision.kept]


def _as_int(value: object) -> int | None:
    # A user may have assigned anything; a manifest that cannot be made would fail the save.
    return int(value) if isinstance(value, numbers.Integral) else None
