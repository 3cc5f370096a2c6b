"""What a resume loads beside the objects that it is given: the engine's state, and the handler's history.

Owns where in a checkpoint they are found, and what is said where they are not. Rank-local; issues no collectives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ignite.engine import Engine

from distckpt.handlers.checkpoint import Checkpoint
from distckpt.handlers.object_trees import leaves
from distckpt.handlers.own_files import OwnFiles
from distckpt.loading import select

__all__ = ["Beside", "find_beside"]

_HISTORY = "checkpointer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What is loaded beside `to_load`.

    Attributes:
        pairs: objects and their states.
        warnings: what is missing.
        is_engine_known: whether the engine gets a state, here or from `to_load`.
        history: a phrase about the handler's history; empty where there is no handler, or it is in `to_load`.
    """

    pairs: list[tuple[Any, Any]]
    warnings: list[str]
    is_engine_known: bool
    history: str


def find_beside(
    handler: Checkpoint | None,
    chosen: select.SelectedCheckpoint,
    names: Sequence[str],
    to_load: Mapping[str, Any],
    engine: Engine | None,
) -> Beside:
    """Rank-local. Find the states of the engine and of the handler. The same on every rank.

    Args:
        handler: whose history is looked for in the file and in the names of others; None where no handler is given, or
            the file has a record.
        chosen: the checkpoint.
        names: the files that may belong to the history, by their names.
        to_load: what is loaded.
        engine: the trainer, if it is given.

    Raises:
        ValueError: several could be the engine's.
    """
    pairs: list[tuple[Any, Any]] = []
    told: list[str] = []
    objects = dict(leaves(to_load))
    states = dict(select.find_engine_states(chosen.state))
    is_engine_known = engine is not None and any(one is engine for one in objects.values())
    its_state = None
    if engine is not None and not is_engine_known:
        free = {path: state for path, state in states.items() if path not in objects}
        if len(free) > 1:
            keys = ", ".join(".".join(map(str, path)) for path in free)
            msg = f"{chosen.path} holds several states of engines ({keys}): put the engine into to_load under its own"
            raise ValueError(msg)
        if free:
            (its_state,) = free.values()
            pairs.append((engine, its_state))
            is_engine_known = True
        else:
            told.append(f"{chosen.path} holds no state of an engine: the engine begins at iteration 0")
    elif engine is not None:
        its_state = next((states.get(path) for path, one in objects.items() if one is engine), None)
        its_state = states.get((), its_state)
    history = ""
    if handler is not None and not any(one is handler for one in objects.values()):
        entries, history = _history_of(handler, chosen, names, its_state)
        pairs.extend([] if entries is None else [(handler, entries)])
    return Beside(pairs=pairs, warnings=told, is_engine_known=is_engine_known, history=history)


def _history_of(
    handler: Checkpoint,
    chosen: select.SelectedCheckpoint,
    names: Sequence[str],
    engine_state: Mapping[str, Any] | None,
) -> tuple[Mapping[str, Any] | None, str]:
    """Return the handler's history as of the checkpoint, and a phrase about it."""
    saved = chosen.state.get(_HISTORY) if isinstance(chosen.state, Mapping) else None
    if isinstance(saved, Mapping) and ("_saved" in saved or "saved" in saved):
        return saved, "the handler's history is the checkpoint's"
    if engine_state is None:
        found = dict(select.find_engine_states(chosen.state))
        engine_state = next(iter(found.values())) if len(found) == 1 else {}
    length = engine_state.get("epoch_length")
    is_mid_epoch = bool(length and engine_state["iteration"] % length)
    others = [name for name in names if name not in chosen.refused]
    entries = None
    if chosen.name in names:
        own = OwnFiles(handler)
        entries = own.named_history(chosen.name, others, n_saved=handler.n_saved, is_mid_epoch=is_mid_epoch)
    if entries is None:
        return None, "the handler's history is unknown, and older files stay (include_self=True saves it)"
    return {"_saved": entries}, f"the handler's history is what the names of {len(entries)} files tell"
