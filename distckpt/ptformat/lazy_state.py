"""Read a state from ``data.pkl`` with its tensors in memory that nothing was read into yet.

Memory that is never touched costs nothing. So a tensor whose bytes are read straight into a live tensor needs no memory
of its own, and the others are filled where they are.

The pickle is read by torch's ``weights_only`` unpickler, which executes nothing. It calls functions by name; only those
in `_KNOWN` are let through, because none of them reads a tensor's values. Files with other names (sparse or quantised
tensors, or what the program has added to torch's list) are left to ``torch.load``.

Source: ``torch.serialization._load`` of torch 2.9 to 2.13.
"""

import contextlib
import io
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from distckpt._messages import ignore_warnings
from distckpt.ptformat.archive import Archive, read_record_bytes
from distckpt.ptformat.gc_pause import gc_paused
from distckpt.ptformat.layout import FOLDER, RecordLocation
from distckpt.ptformat.numpy_arrays import NAMES, allow_numpy, may_allow_numpy
from distckpt.storage.base import Readable

_PICKLE, _VERSION, _BYTEORDER = "data.pkl", "version", "byteorder"
_VERSIONS = (b"2\n", b"3\n")
_KNOWN = frozenset(
    {
        "_codecs.encode",
        *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("bytearray", "complex", "set")),
        "collections.Counter",
        "collections.OrderedDict",
        "torch.Size",
        "torch.device",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch.storage.UntypedStorage",
    }
)


class NeedsTorchLoad(Exception):  # noqa: N818 - a reason, always caught
    """The file has to be read by ``torch.load``."""


@dataclass(frozen=True, slots=True)
class LazyState:
    """A state whose tensors hold nothing yet.

    Attributes:
        state: what was saved; its tensors are on the CPU.
        storages: by torch's identity of a storage (``_cdata``), where its bytes are, and the storage.
    """

    state: Any
    storages: Mapping[int, tuple[RecordLocation, torch.UntypedStorage]]


@gc_paused()
def read_lazy_state(archive: Archive, file: Readable) -> LazyState:
    """Read the pickle of a file, and nothing of its tensors. Any thread.

    Raises:
        NeedsTorchLoad: ``torch.load`` has to read the file, or to report its damage.
        OSError: it cannot be read.
    """
    try:
        records = _records_by_name(archive, file)
        return _unpickle(read_record_bytes(file, records[_PICKLE]), records)
    except (NeedsTorchLoad, OSError, MemoryError):
        raise
    except Exception as error:
        raise NeedsTorchLoad(str(error)) from error


def _records_by_name(archive: Archive, file: Readable) -> dict[str, RecordLocation]:
    """Return the records by their names in the archive's folder.

    Raises:
        NeedsTorchLoad: the archive has several folders, another byte order or deflated records, or is a TorchScript
            program.
    """
    if archive.inflated:
        raise NeedsTorchLoad
    folders = {FOLDER} if archive.is_own else {record.name.partition("/")[0] for record in archive.records}
    names = [record.name if archive.is_own else record.name.partition("/")[2] for record in archive.records]
    if len(folders) != 1 or len(set(names)) != len(names) or "constants.pkl" in names:
        raise NeedsTorchLoad
    records = dict(zip(names, archive.records, strict=True))
    order = read_record_bytes(file, records[_BYTEORDER]) if _BYTEORDER in records else sys.byteorder.encode()
    if read_record_bytes(file, records[_VERSION]) not in _VERSIONS or order != sys.byteorder.encode():
        raise NeedsTorchLoad
    return records


def _unpickle(data: bytes, records: Mapping[str, RecordLocation]) -> LazyState:
    unpickling: Any = torch._weights_only_unpickler  # noqa: SLF001 - torch.load's own, without its reading of storages
    typed: dict[str, Any] = {}
    has_arrays = (b"numpy" in data or b"bytes\n" in data) and may_allow_numpy()
    with ignore_warnings(), contextlib.ExitStack() as stack:
        restored = stack.enter_context(allow_numpy()) if has_arrays else None
        unpickler = unpickling.Unpickler(_CheckedPickle(data, NAMES if has_arrays else frozenset()), encoding="utf-8")
        unpickler.persistent_load = _storage_maker(records, typed)
        state = unpickler.load()
        if restored is not None:
            state = restored(state)
    storages = {}
    for key, one in typed.items():
        storage, record = one._untyped_storage, records[f"data/{key}"]  # noqa: SLF001 - its own accessor warns
        if storage.nbytes() != record.num_bytes:  # a tensor has resized it
            raise NeedsTorchLoad
        storages[storage._cdata] = record, storage  # noqa: SLF001 - torch's identity of a storage
    return LazyState(state, storages)


class _CheckedPickle(io.BytesIO):
    """A pickle that raises where it calls an unknown name.

    The unpickler reads lines for names only: a module, then a name in it.
    """

    def __init__(self, data: bytes, also_known: Collection[str]) -> None:
        super().__init__(data)
        self._also_known = also_known
        self._module: str | None = None

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        text = line[:-1].decode()
        if self._module is None:
            self._module = text
            return line
        name = f"{self._module}.{text}"
        if not _is_known(name) and name not in self._also_known:
            raise NeedsTorchLoad(name)
        self._module = None
        return line


def _is_known(name: str) -> bool:
    if name in _KNOWN:
        return True
    module, _, last = name.rpartition(".")
    found = getattr(torch, last, None) if module == "torch" else None
    return isinstance(found, torch.dtype) or (isinstance(found, type) and last.endswith("Storage"))


def _storage_maker(records: Mapping[str, RecordLocation], typed: dict[str, Any]) -> Callable[[Any], Any]:
    """Return the unpickler's ``persistent_load``: it creates storages, and notes them in `typed` by key."""

    def make(pid: Any) -> Any:
        kind, storage_type, key, _location, numel = pid
        if kind not in ("storage", b"storage"):
            raise NeedsTorchLoad
        if key not in typed:
            dtype = torch.uint8 if storage_type is torch.UntypedStorage else storage_type.dtype
            num_bytes = numel * dtype.itemsize
            if records[f"data/{key}"].num_bytes != num_bytes:
                raise NeedsTorchLoad
            storages: Any = torch.storage  # its constructors have no types
            untyped = storages.UntypedStorage(num_bytes)
            typed[key] = storages.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)
        return typed[key]

    return make
