"""One checkpoint as one ordinary ``.pt``: writing its bytes, and reading them without executing anything.

Owns the file's content. Must not know where the file lies or how it becomes durable. Layer L2.
"""

import errno
import functools
import inspect
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distckpt.errors import DamagedCheckpoint, UnsafeCheckpoint
from distckpt.quiet import quiet
from distckpt.storage.sink import Sink
from distckpt.storage.verify import begins_as_archive, check_whole

__all__ = ["check_save_options", "is_ordinary", "read_pt", "verify", "what_loading_refuses", "write_pt"]


_MOST_FAULTS = 3
"""What a message names of them."""


@functools.cache
def _save_options() -> frozenset[str]:
    return frozenset(inspect.signature(torch.save).parameters) - {"obj", "f"}


def check_save_options(options: Mapping[str, Any]) -> None:
    """Refuse keyword arguments that ``torch.save`` does not have.

    Raises:
        TypeError: there is an unknown one.
    """
    for name in options:
        if name not in _save_options():
            known = ", ".join(sorted(_save_options()))
            msg = f"save() got an unexpected keyword argument '{name}'; torch.save takes: {known}"
            raise TypeError(msg)


def is_ordinary(options: Mapping[str, Any]) -> bool:
    """Tell whether ``torch.save`` would write, with these keyword arguments, what distckpt writes itself."""
    return (
        options.get("pickle_module", pickle) is pickle
        and options.get("_use_new_zipfile_serialization", True) is True
        and options.get("_disable_byteorder_record", False) is False
    )


def write_pt(state: Any, sink: Sink, options: Mapping[str, Any]) -> None:
    """Serialise `state` into `sink`; the caller flushes it.

    Args:
        state: what ``torch.save`` takes.
        sink: where to.
        options: keyword arguments for ``torch.save``.

    Raises:
        OSError: the operating system refused a write; the file is to be thrown away.
    """
    try:
        torch.save(state, sink, **options)  # type: ignore[arg-type]  # it needs write() and flush() alone
    except Exception as error:
        if sink.error is not None and error is not sink.error:
            raise sink.error from error
        raise


def verify(path: Path) -> None:
    """Compare a file with its own checksums; see :mod:`distckpt.storage.verify`. Files that are no archives pass.

    Raises:
        OSError: it cannot be read.
        DamagedCheckpoint: it is not as it was written.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not begins_as_archive(fd):
            return  # the older format, or no checkpoint at all: who reads it will say so
        faults = check_whole(fd)
    finally:
        os.close(fd)
    if faults:
        more = f", and {len(faults) - _MOST_FAULTS} more" if len(faults) > _MOST_FAULTS else ""
        msg = f"{path} is no checkpoint, or is truncated or damaged: {'; '.join(faults[:_MOST_FAULTS])}{more}"
        raise DamagedCheckpoint(msg)


def read_pt(path: Path, *, verified: bool = True) -> Any:
    """Read a checkpoint onto the CPU. Never executes code: there is no fallback to an unsafe way.

    Args:
        path: of a file that ``torch.save`` or distckpt wrote.
        verified: compare it with its checksums first.

    Raises:
        OSError: it cannot be opened or read.
        UnsafeCheckpoint: it holds objects that only execution could restore.
        DamagedCheckpoint: it is no checkpoint, is truncated or damaged.
    """
    with path.open("rb") as file:  # a missing or forbidden file is the operating system's own error
        is_empty = not file.read(1)
    if is_empty:
        msg = f"{path} is no checkpoint: it is empty"
        raise DamagedCheckpoint(msg)
    if verified:
        verify(path)
    try:
        with quiet():  # of a pickle protocol that its own loader may not know: it will say so
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = _reason(str(error))
        if "global" in reason.lower() or "class" in reason.lower():
            msg = (
                f"{path} holds objects that can only be loaded by executing code, which distckpt never does: {reason} "
                "Nothing was executed. Save plain tensors, numbers, text and containers of them."
            )
            raise UnsafeCheckpoint(msg) from error
        msg = f"{path} is no checkpoint, or is damaged: {reason}"
        raise DamagedCheckpoint(msg) from error
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # EINVAL: a seek that the damaged directory asked for
            raise
        msg = f"{path} is no checkpoint, or is truncated: {error}"
        raise DamagedCheckpoint(msg) from error
    except MemoryError:
        raise
    except Exception as error:
        msg = f"{path} is no checkpoint, or is truncated or damaged: {type(error).__name__}: {_reason(str(error))}"
        raise DamagedCheckpoint(msg) from error


def what_loading_refuses(path: Path) -> list[str]:
    """Return the names of what keeps a checkpoint from being loaded without executing code.

    Args:
        path: of a file that was written whole; of the pickle inside, only the names are looked at.
    """
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception as error:  # noqa: BLE001 - it reads the usual format alone, and stops at a newer pickle protocol
        told = str(error)
        return [told.splitlines()[0]] if "Unsupported operand" in told else []


def _reason(text: str) -> str:
    """Pick what went wrong out of torch's long advice, which recommends the unsafe way."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("Check the documentation", "Please file an issue"))]
    told = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    line = (told or lines or ["no reason given"])[-1]
    if "weights_only" in line:  # torch's advice to load it unsafely
        return "its format can only be read by executing what it holds."
    line = line.removeprefix("WeightsUnpickler error: ").split(" Please use ", 1)[0].split(". In PyTorch 2.6", 1)[0]
    return line if line.endswith(".") else line + "."
