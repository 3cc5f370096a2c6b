"""One checkpoint as one ordinary ``.pt``: writing its bytes, and reading them without executing anything.

Owns the file's content. Must not know where the file lies or how it becomes durable.
"""

import functools
import inspect
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distckpt.errors import LoadError, UnsafeCheckpoint
from distckpt.ptformat.loadable import names_refused
from distckpt.ptformat.pickler import naming_what_is_sharded
from distckpt.ptformat.reader import OpenCheckpoint
from distckpt.ptformat.sharded import needs_a_look, whole
from distckpt.storage.base import StoredFile
from distckpt.storage.direct_io import BufferedWriter

__all__ = ["check_save_options", "is_loadable", "is_ordinary", "read_pt", "verify", "what_loading_refuses", "write_pt"]


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


def write_pt(state: Any, sink: BufferedWriter, options: Mapping[str, Any]) -> None:
    """Serialise `state` into `sink`; the caller flushes it.

    Args:
        state: what ``torch.save`` takes.
        sink: where to.
        options: keyword arguments for ``torch.save``.

    Raises:
        ShardedStateError: the state holds a tensor of which this rank has a part.
        OSError: the operating system refused a write; the file is to be thrown away.
    """
    chosen = {**options, "pickle_module": _WholeTensors(options.get("pickle_module", pickle))}
    try:
        with naming_what_is_sharded(state):
            torch.save(state, sink, **chosen)  # type: ignore[arg-type]  # it needs write() and flush() alone
    except Exception as error:
        if sink.error is not None and error is not sink.error:
            raise sink.error from error
        raise


class _WholeTensors:
    """A pickle module whose pickler writes whole tensors alone, as distckpt's own does.

    Args:
        module: what it is in place of; another one's classes and functions are its own.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        base: Any = module.Pickler

        class Pickler(base):  # type: ignore[misc]  # torch subclasses it in turn
            def reducer_override(self, obj: Any) -> Any:
                if needs_a_look(type(obj)):
                    plain: Any = whole(obj)
                    if plain is not obj:
                        return plain.__reduce_ex__(2)
                inherited = getattr(super(), "reducer_override", None)
                return NotImplemented if inherited is None else inherited(obj)

        self.Pickler = Pickler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def verify(path: Path) -> None:
    """Compare a file with its own checksums; see :mod:`distckpt.ptformat.verify`. Files that are no archives pass.

    Raises:
        OSError: it cannot be read.
        CorruptCheckpointError: it is not as it was written.
    """
    with OpenCheckpoint(path) as file:
        file.verify()


def read_pt(file: Path | StoredFile, *, verified: bool = True) -> Any:
    """Read a checkpoint onto the CPU. Never executes code: there is no fallback to an unsafe way.

    Args:
        file: the path of a file that ``torch.save`` or distckpt wrote, or such a file, which is closed.
        verified: compare it with its checksums first.

    Raises:
        OSError: it cannot be opened or read.
        UnsafeCheckpoint: it holds objects that only execution could restore.
        CorruptCheckpointError: it is no checkpoint, is truncated or damaged.
    """
    with OpenCheckpoint(file) as opened:
        if verified:
            opened.verify()
        state = opened.state()
        opened.fill()
        return state


def what_loading_refuses(file: StoredFile) -> list[str]:
    """Return the names of what keeps a checkpoint from being loaded without executing code.

    Args:
        file: written whole; of the pickle inside, only the names are looked at.
    """
    try:
        return names_refused(torch.serialization.get_unsafe_globals_in_checkpoint(file.stream()))
    except pickle.UnpicklingError as error:  # a newer pickle protocol
        return str(error).splitlines()[:1]
    except Exception:  # noqa: BLE001 - it reads the usual format alone
        try:
            read_pt(file, verified=False)
        except UnsafeCheckpoint as error:
            return re.findall(r"GLOBAL (\S+)", str(error)) or [str(error)]
        except (OSError, LoadError):  # another fault, which is told where it is loaded
            return []
        return []


def is_loadable(path: Path) -> bool:
    """Return True if a file is a checkpoint that can be loaded without executing code.

    The data of a file whose state is plain are not read.
    """
    try:
        with OpenCheckpoint(path) as file:
            if not file.look():
                read_pt(path, verified=False)
    except (OSError, LoadError):
        return False
    return True
