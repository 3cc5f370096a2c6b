"""Bytes of an accelerator -> host memory, on a stream of their own.

Owns streams and pinned memory. Must not know what the bytes are.
"""

import contextlib
import threading
from collections.abc import Iterable

import torch

__all__ = ["Fetcher", "pin", "unpin"]


class Fetcher:
    """Copies what the present streams of this thread have computed by now, or are still computing. Any thread copies.

    Args:
        devices: what is copied from.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._computed = {}
        for device in set(devices):
            self._computed[device] = torch.cuda.current_stream(device).record_event()
        self._own = threading.local()

    def fetch(self, storage: torch.UntypedStorage, begin: int, target: torch.Tensor) -> None:
        """Copy bytes, and return when they are there.

        Args:
            storage: from where.
            begin: the first byte.
            target: uint8 (bytes,) of the host.
        """
        stream = self._stream(storage.device)
        with torch.cuda.stream(stream):
            source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            target.copy_(source[begin : begin + target.numel()], non_blocking=True)
        stream.synchronize()

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        """Return this thread's stream, which waits for what was being computed."""
        streams: dict[torch.device, torch.cuda.Stream] = self._own.__dict__.setdefault("streams", {})
        if device not in streams:
            streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch ships it without types
            streams[device].wait_event(self._computed[device])
        return streams[device]


def pin(address: int, num_bytes: int) -> bool:
    """Keep host memory where it is, for a device to write into. Returns whether that could be done."""
    with contextlib.suppress(RuntimeError):
        return int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0)) == 0  # type: ignore[no-untyped-call]  # as above
    return False


def unpin(address: int) -> None:
    """Take that back, before the memory is freed."""
    with contextlib.suppress(RuntimeError):
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]  # as above
