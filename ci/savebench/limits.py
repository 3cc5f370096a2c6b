"""The machine's limits: a copy of the state, a raw write, and a raw read. Results are shown relative to them."""

import ctypes
import mmap
import os
import time
from pathlib import Path

from ci.savebench.device_limits import measure_device_copies
from ci.savebench.files import files_of
from ci.savebench.job import Job

LIMITS = "limits"
CHUNK_BYTES = 256 * 2**20  # faster than the usual 8 MiB
BLOCK_BYTES = 4096


def measure_limits(job: Job) -> dict[str, float]:
    """Collective. Return the seconds of each limit, on the slowest rank."""
    size = -(-job.size()[1] // (BLOCK_BYTES * job.world_size)) * BLOCK_BYTES * job.world_size
    share = size // job.world_size
    path = job.folder / "raw"
    with mmap.mmap(-1, size) as source, mmap.mmap(-1, size) as target:
        for memory in (source, target):
            ctypes.memset(_address_of(memory), 1, size)  # no page faults below
        first, num_bytes = (0, size) if job.is_sharded else (job.rank * share, share)
        if job.device.type == "cuda":
            taken = measure_device_copies(job, size, first, num_bytes)
        else:
            taken = {
                "memcpy_s": _copy(job, source, target, size),
                "memcpy_share_s": _copy(job, source, target, share),
                "tensors_s": _copy_tensors(job, target, 0, size),
                "tensors_share_s": _copy_tensors(job, target, first, num_bytes),
            }
        if job.rank == 0:
            path.unlink(missing_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        taken["write_s"] = _write(job, path, source, share)
        taken["read_s"] = read_raw(job, path)
    job.meeting.barrier()
    if job.rank == 0:
        path.unlink()
    return {name: max(values) for name, values in _by_name(job.meeting.gather(taken)).items()}


def _by_name(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _address_of(memory: mmap.mmap) -> int:
    view = ctypes.c_char.from_buffer(memory)
    return ctypes.addressof(view)  # without the view, which would keep the memory from being closed


def _copy(job: Job, source: mmap.mmap, target: mmap.mmap, size: int) -> float:
    job.meeting.barrier()
    begin = time.monotonic()
    ctypes.memmove(_address_of(target), _address_of(source), size)
    return time.monotonic() - begin


def _copy_tensors(job: Job, target: mmap.mmap, begin: int, num_bytes: int) -> float:
    """Copy a range of the concatenated live tensors, one memcpy per tensor."""
    copies, at = [], 0
    for tensor in job.local_tensors():
        first, last = max(begin - at, 0), min(begin + num_bytes - at, tensor.nbytes)
        if first < last:
            copies.append((at + first - begin, tensor.data_ptr() + first, last - first))
        at += tensor.nbytes
    address, copy = _address_of(target), ctypes.memmove
    job.meeting.barrier()
    begin_s = time.monotonic()
    for offset, source, length in copies:
        copy(address + offset, source, length)
    return time.monotonic() - begin_s


def read_raw(job: Job, path: Path) -> float:
    """Collective. Read a checkpoint's files by O_DIRECT, a range on each rank; return the slowest rank's seconds."""
    with mmap.mmap(-1, CHUNK_BYTES) as memory, memoryview(memory) as view:
        ctypes.memset(_address_of(memory), 1, CHUNK_BYTES)  # no page faults below
        job.meeting.barrier()
        begin = time.monotonic()
        for one in files_of(path):
            share = -(-one.stat().st_size // (BLOCK_BYTES * job.world_size)) * BLOCK_BYTES
            descriptor = os.open(one, os.O_RDONLY | os.O_DIRECT)
            try:
                for offset in range(job.rank * share, (job.rank + 1) * share, CHUNK_BYTES):
                    length = min(CHUNK_BYTES, (job.rank + 1) * share - offset)
                    os.preadv(descriptor, [view[:length]], offset)
            finally:
                os.close(descriptor)
        taken = time.monotonic() - begin
    slowest: list[float] = job.meeting.gather(taken)
    return max(slowest)


def _write(job: Job, path: Path, source: mmap.mmap, share: int) -> float:
    first = job.rank * share
    job.meeting.barrier()
    begin = time.monotonic()
    descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT)
    try:
        os.posix_fallocate(descriptor, first, share)
        with memoryview(source) as view:
            for offset in range(first, first + share, CHUNK_BYTES):
                end = min(offset + CHUNK_BYTES, first + share)
                os.pwrite(descriptor, view[offset:end], offset)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return time.monotonic() - begin
