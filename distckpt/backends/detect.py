"""Which backend this process belongs to, from the live runtime.

Owns the one question "who am I among the ranks?". The answer never depends on what is importable: a GPU job
on a machine that has another runtime installed stays a GPU job. Issues no collectives, and may be asked by
a constructor. Layer L2.
"""

import threading
import weakref

import torch.distributed as dist

from distckpt.backends.base import Backend
from distckpt.backends.serial import SerialBackend
from distckpt.backends.torch_dist import TorchDistBackend

__all__ = ["current"]

_ALONE = SerialBackend()
# One backend for each live process group, forgotten with it: a group destroyed and made anew is a new key.
_BY_GROUP: "weakref.WeakKeyDictionary[dist.ProcessGroup, TorchDistBackend]" = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def current() -> Backend:
    """Return the backend of the live job, or that of a world of one. Rank-local; issues no collectives.

    Example:
        >>> current().world_size
        1
    """
    group = _group_of_the_job()
    if group is None:
        return _ALONE
    # Without the lock, and mostly right: every handler asks in every iteration.
    backend = _BY_GROUP.get(group)
    if backend is None:
        with _LOCK:
            backend = _BY_GROUP.get(group)
            if backend is None:
                backend = _BY_GROUP[group] = TorchDistBackend(group)
    return backend


def _group_of_the_job() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_available() else None
