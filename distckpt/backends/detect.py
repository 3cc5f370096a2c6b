"""Which backend this process belongs to, from the live runtime.

Owns the one question "who am I among the ranks?". The answer never depends on what is importable: a GPU job
on a machine that has another runtime installed stays a GPU job. Issues no collectives, and may be asked by
a constructor.
"""

import importlib
import sys
import threading
import weakref
from typing import Any

import torch.distributed as dist

from distckpt.backends.base import Backend
from distckpt.backends.serial import SerialBackend
from distckpt.backends.torch_dist import TorchDistBackend

__all__ = ["current"]

_ALONE = SerialBackend()
# One backend for each live process group, forgotten with it: a group destroyed and made anew is a new key.
_BY_GROUP: "weakref.WeakKeyDictionary[dist.ProcessGroup, TorchDistBackend]" = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()
_MODULES = sys.modules


def current() -> Backend:
    """Return the backend of the live job, or that of a world of one. Rank-local; issues no collectives.

    The first of: torch.distributed with a process group; Horovod, once initialised; torch_xla, once it is in use.

    Example:
        >>> current().world_size
        1
    """
    group = _group_of_the_job()
    if group is None:
        return _of_another_runtime() or _ALONE
    # Without the lock, and mostly right: every handler asks in every iteration.
    backend = _BY_GROUP.get(group)
    if backend is None:
        if dist.get_backend(group) == "xla":  # torch_xla's own process group: its replicas are the ranks
            return _of_another_runtime() or _ALONE
        with _LOCK:
            backend = _BY_GROUP.get(group)
            if backend is None:
                backend = _BY_GROUP[group] = TorchDistBackend(group)
    return backend


def _group_of_the_job() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_available() else None


def _of_another_runtime() -> Backend | None:
    """Return the backend of Horovod or torch_xla, if one of them is live.

    Neither is imported to find out, nor is our module that imports it: a program that uses one has imported it.
    """
    horovod: Any = _MODULES.get("horovod.torch")
    if horovod is not None and _is_so(horovod, "is_initialized"):
        return _ask("horovod")
    torch_xla: Any = _MODULES.get("torch_xla")
    if torch_xla is not None and _is_so(getattr(torch_xla, "_XLAC", None), "_xla_runtime_is_initialized"):
        return _ask("xla")
    return None


def _ask(name: str) -> Backend:
    found: Backend = importlib.import_module(f"distckpt.backends.{name}").current()
    return found


def _is_so(module: Any, question: str) -> bool:
    """Ask a module that may be half imported, by another thread."""
    ask = getattr(module, question, None)
    return ask is not None and bool(ask())
