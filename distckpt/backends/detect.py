"""The backend of this process, found from the live runtime; and the runtimes other than torch.distributed.

The backend never depends on what is importable: a GPU job on a machine that has another runtime installed stays a GPU
job. Nothing here issues collectives, and a constructor may call it.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
import threading
import weakref
from typing import Any

import torch.distributed as dist

from distckpt.backends.base import Backend
from distckpt.backends.serial import SerialBackend
from distckpt.backends.torch_dist import TorchDistBackend

OTHER_RUNTIMES = {"horovod": "horovod", "xla": "torch_xla"}
"""The runtimes other than torch.distributed, and their packages."""

_SERIAL = SerialBackend()
# One backend for each live process group. A group that is destroyed and made again is a new key.
_BY_GROUP: "weakref.WeakKeyDictionary[dist.ProcessGroup, TorchDistBackend]" = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()
_MODULES = sys.modules


def current() -> Backend:
    """Return the backend of the live job, or a backend of one rank. Rank-local; issues no collectives.

    The first of: torch.distributed with a process group; Horovod, if initialised; torch_xla, as soon as a device is in
    use.

    Example:
        >>> current().world_size
        1
    """
    group = dist.group.WORLD if dist.is_available() else None
    if group is None:
        return _find_other() or _SERIAL
    # Without the lock: there mostly is a backend, and every handler calls this in every iteration.
    backend = _BY_GROUP.get(group)
    if backend is None:
        if dist.get_backend(group) == "xla":  # torch_xla's own process group: its replicas are the ranks
            return _find_other() or _SERIAL
        with _LOCK:
            backend = _BY_GROUP.get(group)
            if backend is None:
                backend = _BY_GROUP[group] = TorchDistBackend(group)
    return backend


def _find_other() -> Backend | None:
    """Return the backend of Horovod or torch_xla, if one of them is live.

    A program that uses one of them has imported it. It is not imported here, and neither is our module that imports it.
    """
    found: Backend | None = None
    # With defaults: another thread may be importing the module.
    if getattr(_MODULES.get("horovod.torch"), "is_initialized", _no)():
        found = importlib.import_module("distckpt.backends.horovod").current()
    elif getattr(getattr(_MODULES.get("torch_xla"), "_XLAC", None), "_xla_runtime_is_initialized", _no)():
        found = importlib.import_module("distckpt.backends.xla").current()
    return found


def _no() -> bool:
    return False


def installed_runtimes() -> tuple[str, ...]:
    """Return the installed ones of :data:`OTHER_RUNTIMES`. Imports none of them."""
    return tuple(name for name, package in OTHER_RUNTIMES.items() if importlib.util.find_spec(package) is not None)


def import_runtime(name: str) -> Any:
    """Return our module for one of :data:`OTHER_RUNTIMES`; this imports the runtime.

    Raises:
        RuntimeError: it cannot be imported, such as a torch_xla that was built for another torch. The error names the
            command that installs a matching one.
    """
    package, torch_version = OTHER_RUNTIMES[name], importlib.metadata.version("torch")
    if name == "xla":  # its metadata does not say for which torch it was built
        xla_version = importlib.metadata.version("torch_xla")
        built_for = ".".join(xla_version.split(".")[:2])
        if torch_version.split(".")[:2] != xla_version.split(".")[:2]:
            raise RuntimeError(
                f"torch_xla {xla_version} was built for torch {built_for}, but torch is {torch_version}. Install a "
                f"matching pair: pip install 'torch=={built_for}.*' 'torch_xla=={built_for}.*'"
            )
    try:
        return importlib.import_module(f"distckpt.backends.{name}")
    except ImportError as error:
        version = importlib.metadata.version(package)
        raise RuntimeError(f"{package} {version} cannot be imported with torch {torch_version}: {error}") from error
