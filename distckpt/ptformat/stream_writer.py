"""Write a ``.pt`` file of distckpt's layout while its bytes are read: only one chunk of them is in memory at a time."""

import mmap
from collections.abc import Callable
from dataclasses import replace

import torch

from distckpt._checksum import crc32
from distckpt.ptformat.image import build_tail, head_bytes, plan_image
from distckpt.ptformat.layout import local_header
from distckpt.ptformat.manifest import Manifest, TensorEntry, to_json
from distckpt.ptformat.pickler import PickledState
from distckpt.storage.base import Chunk, NewFile

_CHUNK_BYTES = 8 << 20


def write_streamed(
    file: NewFile,
    pickled: PickledState,
    read: Callable[[torch.UntypedStorage, int, memoryview], None],
    manifest: Manifest,
) -> int:
    """Write a checkpoint, and return its length in bytes. The caller commits the file. Rank-local.

    Args:
        file: the new file.
        pickled: the state; its storages need not hold anything.
        read: reads bytes of a storage, from an offset on, into memory.
        manifest: without tensors.

    Raises:
        SaveError: the storage failed.
        Exception: what `read` raises.
    """
    plan = plan_image([storage.nbytes() for storage in pickled.storages])
    file.write([Chunk(0, head_bytes())])
    crcs = []
    with mmap.mmap(-1, _CHUNK_BYTES) as buffer, memoryview(buffer) as memory:  # aligned, for O_DIRECT
        for number, record in zip(plan.storage_numbers, plan.records, strict=True):
            crc = 0
            for begin in range(0, record.num_bytes, _CHUNK_BYTES):
                with memory[: min(_CHUNK_BYTES, record.num_bytes - begin)] as part:
                    read(pickled.storages[number], begin, part)
                    crc = crc32(part, crc)
                    file.write([Chunk(record.offset + begin, part)])
            file.write([Chunk(record.header, local_header(record, crc))])
            crcs.append(crc)
    by_storage = {
        number: (record.name, record.offset, crc)
        for number, record, crc in zip(plan.storage_numbers, plan.records, crcs, strict=True)
    }
    entries = []
    for name, dtype, shape, number, begin_bytes, num_bytes in pickled.tensors():
        record_name, offset, crc = by_storage[number]
        entries.append(TensorEntry(name, dtype, shape, record_name, offset + begin_bytes, num_bytes, crc))
    tail = build_tail(plan, crcs, pickled.data, to_json(replace(manifest, tensors=tuple(entries))))
    file.write([Chunk(plan.end, tail)])
    return plan.end + len(tail)
