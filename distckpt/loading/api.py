"""One load: the order of its hops.

Owns the way from a path or a mapping to live objects. Must not know about engines.

1. the file is opened once: what is verified is what is read.
2. while it comes from storage its pickle is read, and tried on the objects; then all of it is compared with its
   checksums. Nothing live is touched.
3. what does not go straight into live tensors, and is still referred to, is read into memory of its own.
4. the objects are loaded, and the rest is read into the live tensors' memory.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distckpt._threads import get_num_threads
from distckpt.backends.detect import current
from distckpt.loading.report import LoadReport
from distckpt.loading.restore import Prepared, prepare
from distckpt.ptformat.reader import OpenCheckpoint
from distckpt.saving.capture import check_objects, refuse_sharded

__all__ = ["LoadReport", "check_to_load", "load_objects"]


def load_objects(
    to_load: Mapping[str, Any], checkpoint: str | Path | Mapping[str, Any], *, verify: bool = True, **kwargs: Any
) -> LoadReport:
    """Load a checkpoint into live objects: all of them, or none. Rank-local; issues no collectives.

    Args:
        to_load: objects with ``load_state_dict``, in mappings and lists nested at will. DistributedDataParallel,
            DataParallel and torch.compile are seen through.
        checkpoint: a path, or the mapping that was saved.
        verify: compare a file with its checksums first.
        kwargs: for ``nn.Module.load_state_dict``; modules only.

    Returns:
        The keys that were left as they were; none, if the load is strict.

    Raises:
        TypeError: `checkpoint` is neither, or an object has no ``load_state_dict``.
        ShardedStateError: an object holds sharded tensors, or the checkpoint does.
        OSError: the file cannot be read.
        CorruptCheckpointError: the file is no checkpoint, is truncated or damaged.
        UnsafeCheckpoint: the file holds objects that only execution could restore.
        StateMismatchError: the checkpoint lacks an object, or an optimizer's groups differ (a ValueError too); a
            module's keys or shapes differ (a RuntimeError too). It lists them all.
        PartialLoadError: storage failed in the midst of reading into live tensors, or an object refused its state and
            another one could not be put back.
    """
    if not isinstance(checkpoint, Mapping | str | Path):
        msg = f"Argument checkpoint should be a string or a dictionary, but given {type(checkpoint)}"
        raise TypeError(msg)
    check_to_load(to_load)
    if isinstance(checkpoint, Mapping):
        return prepare(to_load, checkpoint, kwargs).load()
    with OpenCheckpoint(Path(checkpoint), num_threads=get_num_threads(current().world_size)) as file:
        prepared = _prepared_and_verified(file, to_load, kwargs) if verify else None
        if prepared is None:
            prepared = prepare(to_load, file.state(), kwargs, file if file.look() else None)
        return prepared.load()


def _prepared_and_verified(
    file: OpenCheckpoint, to_load: Mapping[str, Any], options: Mapping[str, Any]
) -> Prepared | None:
    """Verify a file, and prepare its load while it comes from storage; None where the load has to wait for the check.

    What is wrong with the file is told before what does not fit. Each rank of a machine begins at places of its own,
    so that ranks that load at once read different bytes from storage, and find the others' in the page cache.
    """
    prepared = None
    with file.readahead_staggered(_fraction_of(current().local_rank)) as ahead:
        try:
            if file.look():
                prepared = prepare(to_load, file.state(), options, file)
        except Exception:
            file.verify(ahead)
            raise
        file.verify(ahead)
    return prepared


def _fraction_of(number: int) -> float:
    """Return a place between 0 and 1, such that those of the first n numbers are spread evenly, whatever n is.

    Example:
        >>> [_fraction_of(number) for number in range(5)]
        [0.0, 0.5, 0.25, 0.75, 0.125]
    """
    fraction, step = 0.0, 0.5
    while number:
        fraction, number, step = fraction + step * (number & 1), number >> 1, step / 2
    return fraction


def check_to_load(to_load: object) -> None:
    """Check the argument ``to_load``.

    Raises:
        TypeError: it is no mapping, or an object has no ``load_state_dict``.
        ShardedStateError: an object holds sharded tensors.
    """
    if not isinstance(to_load, Mapping):
        msg = f"Argument to_load should be a dictionary, but given {type(to_load)}"
        raise TypeError(msg)
    check_objects(dict(to_load), "load_state_dict")
    refuse_sharded(to_load)
