"""Runtimes beside torch.distributed: Horovod and torch_xla, by name.

Owns how their backends' modules, which import them, are reached: only when a program asks for one.
"""

import importlib
import importlib.metadata
import importlib.util
from typing import Any

__all__ = ["OTHERS", "installed", "module_of"]

OTHERS = {"horovod": "horovod", "xla": "torch_xla"}
"""Each with the package that it comes in."""


def installed() -> tuple[str, ...]:
    """Return the names of those that are installed. Imports none of them."""
    return tuple(name for name, package in OTHERS.items() if importlib.util.find_spec(package) is not None)


def module_of(name: str) -> Any:
    """Return the module of a runtime's backend; imports the runtime.

    Raises:
        RuntimeError: it does not import, as a torch_xla that was built for another torch does not; it names the command
            that mends that.
    """
    _check_versions(name)
    try:
        return importlib.import_module(f"distckpt.backends.{name}")
    except ImportError as error:
        package = OTHERS[name]
        msg = f"{package} {_version(package)} does not import beside torch {_version('torch')}: {error}"
        raise RuntimeError(msg) from error


def _check_versions(name: str) -> None:
    """Refuse a torch_xla that was built for another torch: its metadata does not say for which."""
    if name != "xla":
        return
    theirs, torchs = _version("torch_xla"), _version("torch")
    ours = ".".join(theirs.split(".")[:2])
    if torchs.split(".")[:2] != theirs.split(".")[:2]:
        msg = (
            f"torch_xla {theirs} was built for torch {ours}, but torch is {torchs}. Install the two that belong "
            f"together: pip install 'torch=={ours}.*' 'torch_xla=={ours}.*'"
        )
        raise RuntimeError(msg)


def _version(package: str) -> str:
    return importlib.metadata.version(package)
