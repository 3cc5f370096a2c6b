"""``data.pkl`` -> the state, its tensors in memory that nothing was read into yet.

Owns which pickles are read so, and where in the file each storage stands. Must not know who fills it, nor how.

Memory that is never touched costs nothing. So a tensor whose bytes go elsewhere, straight into a live one, needs no
memory of its own; the others are filled where they are, and the tree around them stays as it was unpickled.

The unpickler is torch's own for ``weights_only``: it executes nothing. What it builds by looking at a tensor's values
(sparse, quantised, those of a device), and what anybody has added to its list, is left to ``torch.load``.

Source: ``torch.serialization._load`` of torch 2.9 to 2.13, with what it asks of a file.
"""

import contextlib
import io
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from distckpt._messages import ignore_warnings
from distckpt.ptformat.gc_pause import collector_paused
from distckpt.ptformat.layout import FOLDER, Slot
from distckpt.ptformat.numpy_arrays import NAMES, is_left_to_us, numpy_allowed
from distckpt.ptformat.verify import Archive, record_bytes
from distckpt.storage.base import Readable

__all__ = ["Hollow", "NotPlain", "read_hollow"]

_PICKLE, _VERSION, _BYTEORDER = "data.pkl", "version", "byteorder"
_VERSIONS = (b"2\n", b"3\n")
_KNOWN = frozenset(
    {
        "_codecs.encode",
        "builtins.bytearray",
        "builtins.complex",
        "builtins.set",
        "__builtin__.bytearray",
        "__builtin__.complex",
        "__builtin__.set",
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
"""What may be called by name: none of them looks at what a storage holds."""


class NotPlain(Exception):  # noqa: N818 - a reason, always caught
    """The file is to be read by ``torch.load``."""


@dataclass(frozen=True, slots=True)
class Hollow:
    """A state, and where its bytes are to be found.

    Attributes:
        state: what was saved; its tensors are on the CPU, and hold nothing yet.
        slots: where each storage's bytes stand in the file, by torch's identity of the storage.
        storages: all of them, by the same; they live as long as this.
    """

    state: Any
    slots: Mapping[int, Slot]
    storages: Mapping[int, torch.UntypedStorage]


@collector_paused()
def read_hollow(archive: Archive, file: Readable) -> Hollow:
    """Read the pickle of a file, and nothing of its tensors. Any thread.

    Args:
        archive: what the file's directory says.
        file: open for reading.

    Raises:
        NotPlain: the file is to be read in torch's own way; or it is damaged, and that way will say how.
        OSError: it cannot be read.
    """
    try:
        records = _records(archive, file)
        return _unpickled(record_bytes(file, records[_PICKLE]), records)
    except (NotPlain, OSError, MemoryError):
        raise
    except Exception as error:
        raise NotPlain(str(error)) from error


def _records(archive: Archive, file: Readable) -> dict[str, Slot]:
    """Return the records by their names in the folder that all of them are in.

    Raises:
        NotPlain: they are in several, or the file is another machine's, or a program, or deflated.
    """
    if archive.inflated:
        raise NotPlain
    folders = {FOLDER} if archive.is_own else {slot.name.partition("/")[0] for slot in archive.slots}
    names = [slot.name if archive.is_own else slot.name.partition("/")[2] for slot in archive.slots]
    if len(folders) != 1 or len(set(names)) != len(names) or "constants.pkl" in names:
        raise NotPlain
    records = dict(zip(names, archive.slots, strict=True))
    order = record_bytes(file, records[_BYTEORDER]) if _BYTEORDER in records else sys.byteorder.encode()
    if record_bytes(file, records[_VERSION]) not in _VERSIONS or order != sys.byteorder.encode():
        raise NotPlain
    return records


def _unpickled(data: bytes, records: Mapping[str, Slot]) -> Hollow:
    unpickling: Any = torch._weights_only_unpickler  # noqa: SLF001 - torch.load's own, without its reading of storages
    made: dict[str, Any] = {}
    has_arrays = (b"numpy" in data or b"bytes\n" in data) and is_left_to_us()
    with ignore_warnings(), contextlib.ExitStack() as stack:
        restored = stack.enter_context(numpy_allowed()) if has_arrays else None
        unpickler = unpickling.Unpickler(_Pickle(data, NAMES if has_arrays else frozenset()), encoding="utf-8")
        unpickler.persistent_load = _storages_from(records, made)
        state = unpickler.load()
        if restored is not None:
            state = restored(state)
    slots, storages = {}, {}
    for key, typed in made.items():
        storage, slot = typed._untyped_storage, records[f"data/{key}"]  # noqa: SLF001 - its own accessor warns
        if storage.nbytes() != slot.num_bytes:  # a tensor reached beyond its end
            raise NotPlain
        slots[storage._cdata], storages[storage._cdata] = slot, storage  # noqa: SLF001 - torch's identity of it
    return Hollow(state, slots, storages)


class _Pickle(io.BytesIO):
    """A pickle that ends where something is called by name that is not known.

    The unpickler reads lines for such names alone: a module, then what is in it.
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
            raise NotPlain(name)
        self._module = None
        return line


def _is_known(name: str) -> bool:
    if name in _KNOWN:
        return True
    module, _, last = name.rpartition(".")
    found = getattr(torch, last, None) if module == "torch" else None
    return isinstance(found, torch.dtype) or (isinstance(found, type) and last.endswith("Storage"))


def _storages_from(records: Mapping[str, Slot], made: dict[str, Any]) -> Callable[[Any], Any]:
    """Return what gives the unpickler a storage for what stands in its place in the pickle."""

    def make(pid: Any) -> Any:
        kind, storage_type, key, _location, numel = pid
        if kind not in ("storage", b"storage"):
            raise NotPlain
        if key not in made:
            dtype = torch.uint8 if storage_type is torch.UntypedStorage else storage_type.dtype
            num_bytes = numel * dtype.itemsize
            if records[f"data/{key}"].num_bytes != num_bytes:
                raise NotPlain
            storages: Any = torch.storage  # its constructors have no types
            untyped = storages.UntypedStorage(num_bytes)
            made[key] = storages.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)
        return made[key]

    return make
