"""The limits of copies from a device: into pinned host memory that was touched before."""

import time
from collections.abc import Sequence

import torch

from ci.savebench.job import Job


def measure_device_copies(job: Job, size: int, first: int, num_bytes: int) -> dict[str, float]:
    """Collective. Return the seconds of copies from the device, named as those of :mod:`ci.savebench.limits`.

    Args:
        job: the training job, on a CUDA device.
        size: bytes of the state.
        first: offset of the rank's range in the concatenated tensors that it holds.
        num_bytes: length of the range.
    """
    share = size // job.world_size
    source = torch.ones(size, dtype=torch.uint8, device=job.device)
    target = torch.ones(size, dtype=torch.uint8).pin_memory()
    flat = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in job.local_tensors() if tensor.is_cuda]
    return {
        "memcpy_s": _copy(job, [source], target),
        "memcpy_share_s": _copy(job, [source[:share]], target),
        "tensors_s": _copy(job, flat, target),
        "tensors_share_s": _copy(job, _cut(flat, first, num_bytes), target),
    }


def _cut(flat: Sequence[torch.Tensor], first: int, num_bytes: int) -> list[torch.Tensor]:
    """Return the parts of tensors that lie in a range of their concatenation."""
    parts, at = [], 0
    for tensor in flat:
        begin, end = max(first - at, 0), min(first + num_bytes - at, len(tensor))
        if begin < end:
            parts.append(tensor[begin:end])
        at += len(tensor)
    return parts


def _copy(job: Job, sources: Sequence[torch.Tensor], target: torch.Tensor) -> float:
    at, pairs = 0, []
    for source in sources:
        pairs.append((target[at : at + len(source)], source))
        at += len(source)
    torch.cuda.synchronize()
    job.meeting.barrier()
    begin = time.monotonic()
    for part, source in pairs:
        part.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return time.monotonic() - begin
