"""One load: the order of its hops.

Owns the way from a path or a mapping to live objects. Must not know about engines. Layer L4.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distckpt.state.collect import check_objects
from distckpt.state.restore import restore
from distckpt.state.undo import undo_object
from distckpt.storage.ptfile import read_pt

__all__ = ["check_to_load", "load_objects", "load_with"]


def load_objects(to_load: Mapping[str, Any], checkpoint: str | Path | Mapping[str, Any], **kwargs: Any) -> None:
    """Load a checkpoint into live objects: all of them, or none. Rank-local; issues no collectives.

    Args:
        to_load: objects with ``load_state_dict``, in mappings and lists nested at will. DistributedDataParallel,
            DataParallel and torch.compile are seen through.
        checkpoint: a path, or the mapping that was saved.
        kwargs: for ``nn.Module.load_state_dict``; modules only.

    Raises:
        TypeError: `checkpoint` is neither, or an object has no ``load_state_dict``.
        OSError: the file cannot be read.
        DamagedCheckpoint: the file is no checkpoint, is truncated or damaged.
        UnsafeCheckpoint: the file holds objects that only execution could restore.
        ValueError: the checkpoint lacks an object, or an optimizer's groups differ.
        RuntimeError: a module's keys or shapes differ.
    """
    if not isinstance(checkpoint, Mapping | str | Path):
        msg = f"Argument checkpoint should be a string or a dictionary, but given {type(checkpoint)}"
        raise TypeError(msg)
    check_to_load(to_load)
    state = checkpoint if isinstance(checkpoint, Mapping) else read_pt(Path(checkpoint))
    restore(to_load, state, kwargs)


def check_to_load(to_load: object) -> None:
    """Check the argument ``to_load``.

    Raises:
        TypeError: it is no mapping, or an object has no ``load_state_dict``.
    """
    if not isinstance(to_load, Mapping):
        msg = f"Argument to_load should be a dictionary, but given {type(to_load)}"
        raise TypeError(msg)
    check_objects(dict(to_load), "load_state_dict")


def load_with(
    others: Sequence[tuple[Any, Any]], to_load: Mapping[str, Any], state: Any, options: Mapping[str, Any]
) -> None:
    """Load a state that has been read, and a few objects beside it: all of them, or none. Rank-local.

    Args:
        others: objects that are not among `to_load`, each with its state; no modules or optimizers.
        to_load: see :func:`load_objects`.
        state: the checkpoint.
        options: for ``nn.Module.load_state_dict``.

    Raises:
        Exception: what :func:`load_objects` raises of what was read, or one of the others.
    """
    with contextlib.ExitStack() as undo:
        for obj, its_state in others:
            undo.callback(undo_object(obj))
            obj.load_state_dict(its_state)
        restore(to_load, state, options)
        undo.pop_all()
