"""One load: the order of its hops.

Owns the way from a path or a mapping to live objects. Must not know about engines. Layer L4.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distckpt.state.collect import check_objects
from distckpt.state.restore import restore
from distckpt.storage.ptfile import read_pt

__all__ = ["load_objects"]


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
    if not isinstance(to_load, Mapping):
        msg = f"Argument to_load should be a dictionary, but given {type(to_load)}"
        raise TypeError(msg)
    check_objects(dict(to_load), "load_state_dict")
    state = checkpoint if isinstance(checkpoint, Mapping) else read_pt(Path(checkpoint))
    restore(to_load, state, kwargs)
