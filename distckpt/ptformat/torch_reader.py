"""torch's own reader, which takes every format that torch has ever written. Never executes code.

Owns how it is called, and what is made of its errors. Must not know whether the file was verified.
"""

import errno
import pickle
from pathlib import Path
from typing import IO, Any

import torch

from distckpt._messages import ignore_warnings
from distckpt.errors import CorruptCheckpointError, UnsafeCheckpoint
from distckpt.ptformat.numpy_arrays import NumpyRefused, is_left_to_us, numpy_allowed

__all__ = ["load_by_torch"]

_OF_NUMPY = ("GLOBAL numpy.", "GLOBAL bytes ")
"""What its error says of pickles that may be of NumPy's arrays."""


def load_by_torch(file: IO[bytes], path: Path) -> Any:
    """Read a checkpoint onto the CPU, all of it: there is no fallback to an unsafe way.

    Args:
        file: open for reading.
        path: its name, for messages.

    Raises:
        OSError: it cannot be read.
        UnsafeCheckpoint: it holds objects that only execution could restore.
        CorruptCheckpointError: it is no checkpoint, is truncated or damaged.
    """
    try:
        try:
            return _load(file)
        except pickle.UnpicklingError as error:
            if not any(name in str(error) for name in _OF_NUMPY) or not is_left_to_us():
                raise
            with numpy_allowed() as restored:
                return restored(_load(file))
    except NumpyRefused as error:
        raise _unsafe(path, f"{error}.") from error
    except pickle.UnpicklingError as error:
        reason = _reason(str(error))
        if "global" in reason.lower() or "class" in reason.lower():
            raise _unsafe(path, reason) from error
        msg = f"{path} is no checkpoint, or is damaged: {reason}"
        raise CorruptCheckpointError(msg) from error
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # EINVAL: a seek that the damaged directory asked for
            raise
        msg = f"{path} is no checkpoint, or is truncated: {error}"
        raise CorruptCheckpointError(msg) from error
    except MemoryError:
        raise
    except Exception as error:
        msg = f"{path} is no checkpoint, or is truncated or damaged: {type(error).__name__}: {_reason(str(error))}"
        raise CorruptCheckpointError(msg) from error


def _unsafe(path: Path, reason: str) -> UnsafeCheckpoint:
    return UnsafeCheckpoint(
        f"{path} holds objects that can only be loaded by executing code, which distckpt never does: {reason} "
        "Nothing was executed. Save plain tensors, numbers, text, arrays of numbers, and containers of them."
    )


def _load(file: IO[bytes]) -> Any:
    file.seek(0)
    with ignore_warnings():  # of a pickle protocol that its own loader may not know: it will say so
        return torch.load(file, map_location="cpu", weights_only=True)


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
