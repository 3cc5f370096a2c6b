"""torch's own writer and reader, for the formats and options that distckpt does not handle itself. No code is executed.

Also describes files that torch cannot read, for error messages.
"""

import errno
import functools
import inspect
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from distckpt._messages import ignore_warnings
from distckpt.errors import CorruptCheckpointError, UnsafeCheckpoint
from distckpt.ptformat.archive import Archive, read_record_bytes
from distckpt.ptformat.loadable import find_unreadable
from distckpt.ptformat.numpy_arrays import NumpyRefused, allow_numpy, may_allow_numpy
from distckpt.ptformat.pickler import name_sharded_tensor
from distckpt.ptformat.sharded import as_whole, may_be_sharded
from distckpt.storage.base import Readable
from distckpt.storage.direct_io import BufferedWriter

_NEWEST_PROTOCOL = 3
_NUMPY_MARKS = ("GLOBAL numpy.", "GLOBAL bytes ")
"""In torch's error about a pickle with NumPy arrays."""
_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)[2:]
"""In the first pickle of a file that torch.save wrote before it wrote zip archives."""
_LENGTH = struct.Struct("<Q")
_SIGNATURES = (
    (0, b"\x93NUMPY", "a NumPy array: numpy.load reads it"),
    (0, b"\x89HDF\r\n", "an HDF5 file: h5py reads it"),
    (257, b"ustar", "a tar archive"),
)
_BEGIN_BYTES = 512


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
            raise TypeError(f"save() got an unexpected keyword argument '{name}'; torch.save takes: {known}")


def uses_default_format(options: Mapping[str, Any]) -> bool:
    """Return True if ``torch.save`` with these keyword arguments writes the format that distckpt writes itself."""
    return (
        options.get("pickle_module", pickle) is pickle
        and options.get("_use_new_zipfile_serialization", True) is True
        and options.get("_disable_byteorder_record", False) is False
    )


def write_pt(state: Any, writer: BufferedWriter, options: Mapping[str, Any]) -> None:
    """Write `state` by ``torch.save`` with keyword arguments; the caller flushes the writer.

    Raises:
        ShardedStateError: the state holds a tensor of which this rank has a shard.
        OSError: a write failed; the file is incomplete.
    """
    chosen = {**options, "pickle_module": _WholeTensors(options.get("pickle_module", pickle))}
    try:
        with name_sharded_tensor(state):
            torch.save(state, writer, **chosen)  # type: ignore[arg-type]  # it needs write() and flush() alone
    except Exception as error:
        if writer.error is not None and error is not writer.error:
            raise writer.error from error
        raise


class _WholeTensors:
    """A pickle module whose pickler refuses shards and writes replicated DTensors as plain tensors."""

    def __init__(self, module: Any) -> None:
        self._module = module
        base: Any = module.Pickler

        class Pickler(base):  # type: ignore[misc]  # torch subclasses it in turn
            def reducer_override(self, obj: Any) -> Any:
                if may_be_sharded(type(obj)):
                    plain: Any = as_whole(obj)
                    if plain is not obj:
                        return plain.__reduce_ex__(2)
                inherited = getattr(super(), "reducer_override", None)
                return NotImplemented if inherited is None else inherited(obj)

        self.Pickler = Pickler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def load_by_torch(file: IO[bytes], path: Path) -> Any:
    """Read a checkpoint onto the CPU by ``torch.load(weights_only=True)``; `path` is for messages.

    Raises:
        OSError: the file cannot be read.
        UnsafeCheckpoint: it holds objects that loading would have to execute.
        CorruptCheckpointError: it is no checkpoint, is truncated or damaged.
    """
    try:
        try:
            return _load(file)
        except pickle.UnpicklingError as error:
            if not any(mark in str(error) for mark in _NUMPY_MARKS) or not may_allow_numpy():
                raise
            with allow_numpy() as restored:
                return restored(_load(file))
    except NumpyRefused as error:
        raise _unsafe(path, f"{error}.") from error
    except pickle.UnpicklingError as error:
        reason = _reason_in(str(error))
        if "global" in reason.lower() or "class" in reason.lower():
            raise _unsafe(path, reason) from error
        raise CorruptCheckpointError(f"{path} is no checkpoint, or is damaged: {reason}") from error
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # EINVAL: a damaged directory has led to an invalid seek
            raise
        raise CorruptCheckpointError(f"{path} is no checkpoint, or is truncated: {error}") from error
    except MemoryError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {_reason_in(str(error))}"
        raise CorruptCheckpointError(f"{path} is no checkpoint, or is truncated or damaged: {what}") from error


def _unsafe(path: Path, reason: str) -> UnsafeCheckpoint:
    return UnsafeCheckpoint(
        f"{path} holds objects that can only be loaded by executing code, which distckpt never does: {reason} "
        "Nothing was executed. Save plain tensors, numbers, text, arrays of numbers, and containers of them."
    )


def _load(file: IO[bytes]) -> Any:
    file.seek(0)
    with ignore_warnings():  # of an unknown pickle protocol, which is an error anyway
        return torch.load(file, map_location="cpu", weights_only=True)


def _reason_in(text: str) -> str:
    """Return the reason in torch's error, without its advice, which recommends to execute code."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("Check the documentation", "Please file an issue"))]
    named = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    line = (named or lines or ["no reason given"])[-1]
    if "weights_only" in line:
        return "its format can only be read by executing what it holds."
    line = line.removeprefix("WeightsUnpickler error: ").split(" Please use ", 1)[0].split(". In PyTorch 2.6", 1)[0]
    return line if line.endswith(".") else line + "."


def describe_format(file: Readable, archive: Archive | None) -> str | None:
    """Return a phrase for a sound file that is no checkpoint: its format, and what reads it; None if unknown."""
    if archive is not None:
        return _describe_archive(file, archive)
    begin = file.read(0, _BEGIN_BYTES)
    for at, signature, what in _SIGNATURES:
        if begin[at : at + len(signature)] == signature:
            return what
    if len(begin) > _LENGTH.size and begin[_LENGTH.size] == ord("{"):  # a length, then JSON of that length
        (length,) = _LENGTH.unpack_from(begin)
        if length + _LENGTH.size <= file.num_bytes and file.read(_LENGTH.size, length).rstrip()[-1:] == b"}":
            return "a safetensors file: safetensors.torch.load_file reads it"
    return _describe_pickle(file, begin)


def _describe_archive(file: Readable, archive: Archive) -> str | None:
    names = [record.name.rpartition("/")[2] for record in archive.records]
    if "constants.pkl" in names:
        return "a TorchScript program: torch.jit.load reads it, and executes code from the file"
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz): numpy.load reads it"
    if "data.pkl" in names:
        number = names.index("data.pkl")
        try:
            data = read_record_bytes(file, archive.records[number], archive.inflated.get(number))
        except ValueError:
            return None
        return _describe_protocol(data) or _describe_unknown(data)
    return None


def _describe_pickle(file: Readable, begin: bytes) -> str | None:
    if _MAGIC in begin:
        return _describe_protocol(begin)
    is_pickle = begin[:1] == pickle.PROTO and begin[1:2] <= bytes([pickle.HIGHEST_PROTOCOL])
    if is_pickle and file.read(file.num_bytes - 1, 1) == pickle.STOP:
        return "a pickle that torch.save has not written: pickle.load reads it, and executes code from the file"
    return None


def _describe_protocol(data: bytes) -> str | None:
    if data[:1] != pickle.PROTO or data[1:2] <= bytes([_NEWEST_PROTOCOL]):
        return None
    return (
        f"a checkpoint whose pickle has protocol {data[1]}: torch's reader that executes nothing knows "
        f"protocols up to {_NEWEST_PROTOCOL}. Save it with torch.save's default, pickle_protocol=2"
    )


def _describe_unknown(data: bytes) -> str | None:
    what = find_unreadable(data)
    return what and f"a checkpoint with {what}, which torch's reader that executes nothing does not know"
