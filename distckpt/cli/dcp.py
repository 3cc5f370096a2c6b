"""Read and write the directories of ``torch.distributed.checkpoint`` (DCP), without executing code.

DCP's own reader unpickles any class that ``.metadata`` and the values name. Here the metadata may name only DCP's own
dataclasses, and values are read by torch's ``weights_only`` unpickler. A tensor is assembled from its shards when it is
read; one tensor is held at a time.

Source: ``torch/distributed/checkpoint/metadata.py`` and ``filesystem.py`` of torch 2.9 to 2.13.
"""

import contextlib
import fcntl
import io
import math
import os
import pickle
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Self

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException

from distckpt._checksum import memory_at
from distckpt._messages import ignore_warnings
from distckpt.cli.output import CommandError
from distckpt.cli.sources import Source, load
from distckpt.cli.structure import MANIFEST, STRUCTURE, is_plain_tensor, unflatten
from distckpt.cli.survey import DCP_METADATA
from distckpt.errors import CorruptCheckpointError, UnsafeCheckpoint
from distckpt.ptformat.manifest import Manifest, from_json
from distckpt.ptformat.torch_format import load_by_torch
from distckpt.storage.new_file import new_temp_name, sync_directory_at

_PLAIN = {
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    },
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,  # noqa: SLF001 - the entry of each value in the metadata
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,  # noqa: SLF001 - how a layout is pickled
    ("collections", "OrderedDict"): dict,
    ("builtins", "set"): set,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _PLAIN.get((module, name))
        if found is None and module == "torch":
            candidate = getattr(torch, name, None)
            found = candidate if isinstance(candidate, torch.dtype) else None
        if found is None:
            raise UnsafeCheckpoint(
                f"the metadata names {module}.{name}, which it has no need of. Nothing was executed."
            )
        return found


class DcpSource:
    """A checkpoint by DCP; see :class:`~distckpt.cli.sources.Source`.

    Args:
        path: the directory.

    Raises:
        UnsafeCheckpoint: it holds objects that only executing code could load.
        CorruptCheckpointError: it is damaged.
        OSError: it cannot be read.
    """

    kind = "a directory of torch.distributed.checkpoint"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: Manifest | None = None
        with os.scandir(path) as entries:
            self.num_bytes = sum(entry.stat().st_size for entry in entries if entry.is_file())
        self._tensors: dict[int, tuple[str, Any]] = {}
        self._last: tuple[int, torch.Tensor] | None = None
        self._lock = threading.Lock()
        try:
            with (path / DCP_METADATA).open("rb") as file:
                self._metadata: Any = _MetadataUnpickler(file).load()
            items = self._metadata.state_dict_metadata.items()
            flat = {name: self._item(name, form) for name, form in items}
            self.state = self._build(flat)
        except (pickle.UnpicklingError, AttributeError, EOFError, ValueError, TypeError, KeyError, IndexError) as error:
            if isinstance(error, UnsafeCheckpoint | CorruptCheckpointError):
                raise
            raise CorruptCheckpointError(f"{path} is damaged: its metadata cannot be read ({error})") from error

    def _item(self, name: str, form: Any) -> Any:
        if isinstance(form, metadata.TensorStorageMetadata):
            tensor = torch.empty(form.size, dtype=form.properties.dtype)
            self._tensors[tensor.untyped_storage()._cdata] = name, form  # noqa: SLF001 - torch's identity of a storage
            return tensor
        return self._load(metadata.MetadataIndex(name))

    def _load(self, index: Any) -> Any:
        """Return the value of a range of a file."""
        info = self._metadata.storage_data[index]
        name = str(info.relative_path)
        if "/" in name or getattr(info, "transform_descriptors", None):
            raise CorruptCheckpointError(f"{self.path}: {index.fqn} is compressed, or outside of the directory")
        path = self.path / name
        with path.open("rb") as file:
            data = os.pread(file.fileno(), info.length, info.offset)
        if len(data) != info.length:
            raise CorruptCheckpointError(f"{path} is truncated: it lacks bytes of {index.fqn}")
        return load_by_torch(io.BytesIO(data), path)

    def _build(self, flat: dict[str, Any]) -> Any:
        structure, manifest = flat.pop(STRUCTURE, None), flat.pop(MANIFEST, None)
        if isinstance(manifest, str):
            with contextlib.suppress(ValueError):
                self.manifest = from_json(manifest.encode())
        if isinstance(structure, str):
            return unflatten(structure, {name: one for name, one in flat.items() if is_plain_tensor(one)})
        paths = self._metadata.planner_data
        state: dict[str, Any] = {}
        for name, value in flat.items():
            path = paths.get(name, (name,)) if isinstance(paths, Mapping) else (name,)
            dcp._nested_dict.set_element(state, path, value)  # noqa: SLF001 - DCP's own rule for lists
        return state

    def __enter__(self) -> Self:
        """Return the source."""
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: no file is open."""

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Return a context for reading the whole checkpoint."""
        yield

    def read(self, tensor: torch.Tensor, begin: int, memory: memoryview) -> None:
        """Read bytes of a tensor's storage from offset `begin` on. Any thread."""
        identity = tensor.untyped_storage()._cdata  # noqa: SLF001 - as above
        with self._lock:
            if self._last is None or self._last[0] != identity:
                self._last = None
                self._last = identity, self._assemble(*self._tensors[identity])
            memory[:] = memory_at(self._last[1].data_ptr() + begin, len(memory))

    def _assemble(self, name: str, form: Any) -> torch.Tensor:
        """Return a tensor from its shards."""
        whole = torch.empty(form.size, dtype=form.properties.dtype)
        if sum(math.prod(chunk.sizes) for chunk in form.chunks) != whole.numel():
            raise CorruptCheckpointError(f"{self.path}: the shards of {name} do not cover it")
        for chunk in form.chunks:
            part = self._load(metadata.MetadataIndex(name, chunk.offsets))
            target = whole
            for dimension, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                target = target.narrow(dimension, offset, size)
            if not is_plain_tensor(part) or part.shape != target.shape or part.dtype != target.dtype:
                raise CorruptCheckpointError(f"{self.path}: a shard of {name} has another form than its metadata says")
            target.copy_(part)
        return whole


class _Planner(dcp.DefaultSavePlanner):
    """Reads a tensor when DCP writes it, and frees the previous one, which DCP would hold to the end."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source
        self._last: torch.Tensor | None = None

    def lookup_object(self, index: Any) -> Any:
        found = super().lookup_object(index)
        if not is_plain_tensor(found):
            return found
        if self._last is not None:
            self._last.untyped_storage().resize_(0)
        self._last = load(self._source, found).contiguous()
        return self._last


def write_dcp(source: Source, state: Mapping[str, Any], texts: Mapping[str, str], out: Path) -> None:
    """Write a state as a directory of DCP, under a temporary name first.

    Args:
        source: the checkpoint that the state's tensors are read from.
        state: a mapping.
        texts: additional values by name.
        out: the directory, which must not exist or must be empty.

    Raises:
        CommandError: DCP refuses the state.
        OSError: the operating system refused.
    """
    temp = out.parent / new_temp_name()
    temp.mkdir()
    lock = os.open(temp, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Without copies ahead, DCP writes a tensor before it asks for the next one.
        writer = dcp.FileSystemWriter(temp, single_file_per_rank=True, thread_count=1, per_thread_copy_ahead=0)
        try:
            with ignore_warnings():  # of a process without torch.distributed
                dcp.save({**state, **texts}, storage_writer=writer, planner=_Planner(source), no_dist=True)
        except CheckpointException as error:
            for failure in error.failures.values():
                if not isinstance(failure[0], Exception):  # an interrupt, which DCP takes for an error
                    raise failure[0] from None
            reasons = "; ".join(str(one[0] if isinstance(one, tuple) else one) for one in error.failures.values())
            raise CommandError(f"torch.distributed.checkpoint cannot write {out}: {reasons}") from error
        sync_directory_at(temp)
        temp.rename(out)
        sync_directory_at(out.parent)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    finally:
        os.close(lock)
