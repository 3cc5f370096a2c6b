"""Open a checkpoint of any format, and read its tensors on request.

The state's tensors are on the CPU and have no data (see :mod:`distckpt.ptformat.lazy_state`): memory that nobody writes
to takes no space. Their bytes are read in chunks, or one tensor at a time. Nothing from a file is executed.
"""

import contextlib
import difflib
import itertools
import math
import stat
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import torch

from distckpt._checksum import memory_at
from distckpt.cli.output import CommandError
from distckpt.cli.structure import MANIFEST, STRUCTURE, is_plain_tensor, unflatten
from distckpt.cli.survey import DCP_METADATA
from distckpt.errors import CorruptCheckpointError
from distckpt.ptformat.archive import NewerSchema, read_manifest
from distckpt.ptformat.manifest import Manifest, from_json
from distckpt.ptformat.reader import OpenCheckpoint
from distckpt.ptformat.safetensors_format import DTYPES, SafetensorsHeader, read_safetensors_header
from distckpt.ptformat.sharded import key_to_text
from distckpt.storage.local import LocalFile
from distckpt.storage.readahead import is_cached

CHUNK_BYTES = 1 << 20
_LEVELS = 64
_VALUE_CHARS = 60
_CLOSE = 3


class Source(Protocol):
    """An open checkpoint. As a context manager, it closes the checkpoint.

    Attributes:
        path: the file or directory.
        kind: the format, in words.
        manifest: the manifest; None if the checkpoint has none.
        state: the saved state; :func:`load` and :func:`chunks` read its tensors.
        num_bytes: total length of the files, in bytes.
    """

    path: Path
    kind: str
    manifest: Manifest | None
    state: Any
    num_bytes: int

    def read(self, tensor: torch.Tensor, begin: int, memory: memoryview) -> None:
        """Read bytes of a tensor's storage, from offset `begin` on. Thread-safe."""

    def reading(self) -> AbstractContextManager[None]:
        """Return a context for reading the whole checkpoint in order."""

    def __enter__(self) -> Self:
        """Return the source."""

    def __exit__(self, *_: object) -> None:
        """Close the checkpoint."""


class Leaf(NamedTuple):
    """A tensor or another value of a state, with the keys that lead to it, joined by dots."""

    name: str
    value: Any


class _FileSource:
    """Base class for formats of one file."""

    def __init__(self, file: LocalFile) -> None:
        self.path, self.num_bytes = file.path, file.num_bytes
        self.manifest: Manifest | None = None
        self._file = file
        self._read_into = file.read_into

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        with self._file.readahead([] if is_cached(self.path) else [(0, self.num_bytes)]) as source:
            self._read_into = source.read_into
            try:
                yield
            finally:
                self._read_into = self._file.read_into

    def _offset_of(self, tensor: torch.Tensor) -> int | None:
        raise NotImplementedError

    def read(self, tensor: torch.Tensor, begin: int, memory: memoryview) -> None:
        offset = self._offset_of(tensor)
        if offset is None:  # the state already holds the bytes
            memory[:] = memory_at(tensor.untyped_storage().data_ptr() + begin, len(memory))
            return
        done = 0
        while done < len(memory):
            num_bytes = self._read_into(memory[done:], offset + begin + done)
            if num_bytes == 0:
                raise CorruptCheckpointError(f"{self.path} is truncated: it became shorter while it was read")
            done += num_bytes


class PtSource(_FileSource):
    """A ``.pt`` file by distckpt or ``torch.save``.

    Attributes:
        opened: the file.
    """

    def __init__(self, path: Path) -> None:
        file = LocalFile(path)
        opened = OpenCheckpoint(file)  # closes the file if it raises
        super().__init__(file)
        self.opened = opened
        try:
            with contextlib.suppress(NewerSchema):  # OpenCheckpoint has raised it
                self.manifest = read_manifest(file)
            opened.read_structure()
            self.state = opened.state()
        except BaseException:
            file.close()
            raise
        schema = "" if self.manifest is None else f", schema {self.manifest.schema}"
        self.kind = f"a checkpoint of distckpt{schema}" if schema else "a file of torch.save"

    def _offset_of(self, tensor: torch.Tensor) -> int | None:
        return self.opened.offset_of(tensor)


class SafetensorsSource(_FileSource):
    """A safetensors file. Its state is a flat mapping, unless ``distckpt convert`` stored a structure.

    Attributes:
        header: the file's header.
    """

    kind = "a safetensors file"

    def __init__(self, file: LocalFile, header: SafetensorsHeader) -> None:
        super().__init__(file)
        self.header = header
        self._offsets: dict[int, int] = {}
        flat: dict[str, Any] = {}
        for name, kind, shape, offset, _ in header.entries:
            dtype = getattr(torch, DTYPES.get(kind, ""), None)
            if dtype is None:
                flat[name] = UnknownTensor(kind, shape)
                continue
            tensor = flat[name] = torch.empty(shape, dtype=dtype)
            self._offsets[tensor.untyped_storage()._cdata] = offset  # noqa: SLF001 - torch's identity of a storage
        self._flat = flat  # keeps tensors that the structure replaces by ties
        self.state: Any = flat
        structure, manifest = header.metadata.get(STRUCTURE), header.metadata.get(MANIFEST)
        try:
            if structure is not None:
                self.state = unflatten(structure, flat)
            if manifest is not None:
                self.manifest = from_json(manifest.encode())
        except ValueError as error:
            raise CorruptCheckpointError(f"{file.path} is damaged: {error}") from error

    def _offset_of(self, tensor: torch.Tensor) -> int | None:
        return self._offsets[tensor.untyped_storage()._cdata]  # noqa: SLF001 - as above


class UnknownTensor(NamedTuple):
    """A tensor of a dtype that this torch does not have."""

    dtype: str
    shape: tuple[int, ...]


def open_source(path: Path) -> Source:
    """Open a checkpoint of any known format.

    Raises:
        CommandError: `path` is not a checkpoint's path.
        LoadError: the checkpoint is damaged, unsafe or of another format.
        OSError: the file cannot be read.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise CommandError(f"{path} does not exist: give a checkpoint's path") from None
    if stat.S_ISDIR(found.st_mode):
        if (path / DCP_METADATA).is_file():
            from distckpt.cli.dcp import DcpSource  # noqa: PLC0415 - slow to import

            return DcpSource(path)
        raise CommandError(f"{path} is a directory: give a file in it (distckpt ls {path})")
    if not stat.S_ISREG(found.st_mode):
        raise CommandError(f"{path} is no regular file: give a checkpoint's path")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(LocalFile(path))
        try:
            header = read_safetensors_header(file)
        except ValueError as error:
            if path.name.endswith(".safetensors"):
                raise CorruptCheckpointError(f"{path} is no safetensors file, or is damaged: {error}") from error
        else:
            source = SafetensorsSource(file, header)
            stack.pop_all()
            return source
    return PtSource(path)


def leaves(state: Any) -> Iterator[Leaf]:
    """Yield the tensors and other values in a state's nested mappings, lists and tuples."""
    yield from _leaves(state, "", ())


def _leaves(item: Any, name: str, parents: tuple[int, ...]) -> Iterator[Leaf]:
    pairs = children_of(item)
    if pairs is None or not pairs or id(item) in parents or len(parents) >= _LEVELS:
        yield Leaf(name, item)
        return
    for key, value in pairs:
        yield from _leaves(value, f"{name}.{key}" if name else key, (*parents, id(item)))


def children_of(item: Any) -> list[tuple[str, Any]] | None:
    """Return the items of a container, with keys as text; None for objects that are not containers."""
    if isinstance(item, Mapping):
        return [(key_to_text(key), value) for key, value in item.items()]
    if isinstance(item, list | tuple) and not isinstance(item, torch.Size | UnknownTensor):
        return [(str(number), value) for number, value in enumerate(item)]
    return None


def num_bytes_of(tensor: torch.Tensor) -> int:
    """Return the size of a tensor's elements, in bytes."""
    return math.prod(tensor.shape) * tensor.element_size()


def load(source: Source, tensor: torch.Tensor) -> torch.Tensor:
    """Read a tensor; return a copy that holds its data."""
    span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    size = tensor.element_size()
    buffer = torch.empty(span * size if tensor.numel() else 0, dtype=torch.uint8)
    source.read(tensor, int(tensor.storage_offset()) * size, memory_of(buffer))
    found: Any = torch.empty(0, dtype=tensor.dtype)
    found = found.set_(buffer.untyped_storage(), 0, tensor.size(), tensor.stride())
    found = found.conj().resolve_conj() if tensor.is_conj() else found
    return found._neg_view().resolve_neg() if tensor.is_neg() else found  # type: ignore[no-any-return]  # noqa: SLF001 - torch's only way


def chunk_ranges(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """Return the range of elements (first, last + 1) of each chunk. A tensor that is not contiguous is one chunk."""
    total = tensor.numel()
    if not total:
        return []
    step = max(CHUNK_BYTES // tensor.element_size(), 1) if _is_dense(tensor) else total
    return [(first, min(first + step, total)) for first in range(0, total, step)]


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def read_chunk(source: Source, tensor: torch.Tensor, first: int, last: int, buffer: torch.Tensor) -> torch.Tensor:
    """Read a range of a tensor's elements, in logical order; return them flat.

    Args:
        source: the checkpoint.
        tensor: a tensor of its state.
        first: index of the first element, from :func:`chunk_ranges`.
        last: index of the last element + 1.
        buffer: uint8 (n,): memory that the result may use.
    """
    size = tensor.element_size()
    if not _is_dense(tensor) or (last - first) * size > buffer.numel():
        return load(source, tensor).contiguous().view(-1)[first:last]
    part = buffer[: (last - first) * size]
    source.read(tensor, (int(tensor.storage_offset()) + first) * size, memory_of(part))
    return part.view(tensor.dtype)


def chunks(source: Source, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Read a tensor in chunks; yield flat tensors, each valid until the next."""
    buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
    for first, last in chunk_ranges(tensor):
        yield read_chunk(source, tensor, first, last, buffer)


def memory_of(buffer: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor of bytes."""
    return memory_at(buffer.data_ptr(), buffer.numel())


def find_ties(state: Any) -> dict[str, str]:
    """Return the tied tensors: the name of each, with that of an earlier tensor that views the same elements."""
    seen: dict[tuple[Any, ...], str] = {}
    ties: dict[str, str] = {}
    for name, value in leaves(state):
        if is_plain_tensor(value) and value.numel():
            storage = value.untyped_storage()._cdata  # noqa: SLF001 - torch's identity of a storage
            key = (storage, value.storage_offset(), tuple(value.shape), value.stride(), value.dtype)
            first = seen.setdefault(key, name)
            if first != name:
                ties[name] = first
    return ties


def unique_names(state: Any) -> Iterator[Leaf]:
    """Yield leaves as :func:`leaves` does; repeated names, such as of keys 1 and "1", get a number."""
    seen: set[str] = set()
    for name, value in leaves(state):
        found = name if name not in seen else next(n for i in itertools.count(2) if (n := f"{name}#{i}") not in seen)
        seen.add(found)
        yield Leaf(found, value)


def describe_value(value: Any) -> str:
    """Return a tensor's dtype and shape, or another value as one short text."""
    if is_plain_tensor(value):
        return f"{dtype_name(value)} ({', '.join(map(str, value.shape))})"
    if isinstance(value, torch.Tensor):
        return f"a tensor of layout {value.layout}, shape {tuple(value.shape)}".replace("torch.", "")
    try:
        text = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001 - a class's own method
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _VALUE_CHARS else f"{text[: _VALUE_CHARS - 3]}..."


def dtype_name(tensor: torch.Tensor) -> str:
    """Return the name of a tensor's dtype, such as ``float32``."""
    return str(tensor.dtype).removeprefix("torch.")


def find_key(state: Any, key: str) -> Any:
    """Return the item at a key. The parts of a key may contain dots.

    Raises:
        CommandError: there is no such key; the message names similar ones.
    """
    found = _search(state, key)
    if not found:
        names = [name for name, _ in leaves(state)]
        close = difflib.get_close_matches(key, names, n=_CLOSE, cutoff=0.4) or names[:_CLOSE]
        hint = f"; similar keys: {', '.join(close)}" if close else ""
        raise CommandError(f"there is no key {key!r}{hint}")
    return found[0]


def _search(item: Any, key: str) -> list[Any]:
    if not key:
        return [item]
    for name, value in children_of(item) or ():
        if name == key:
            return [value]
        if key.startswith(f"{name}."):
            found = _search(value, key[len(name) + 1 :])
            if found:
                return found
    return []
