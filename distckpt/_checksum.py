"""CRC-32 of bytes in memory, as zip archives have it, and a copy that computes it in the same pass.

A save copies the state and computes its checksums. In one pass both cost no more than the copy: a copy waits for
memory, and a CRC by carry-less multiplication fits into that wait. The copy also bypasses the caches, so that the model
stays in them.

The pass is in C (``_native/copy_crc.c``). It needs VPCLMULQDQ (x86-64: Intel since 2019, AMD since 2020) or PMULL
(aarch64). Without these, or in a package built without a C compiler, ``memmove`` and ``isal`` do the work.
"""

import ctypes
from collections.abc import Iterable

from isal import isal_zlib

try:
    from distckpt._native import copy_crc as _native
except ImportError:  # built without a compiler, or for another machine
    _native = None  # type: ignore[assignment]  # a module that may be absent has no type of its own


def crc32(data: bytes | bytearray | memoryview, before: int = 0) -> int:
    """Return the CRC-32 of `data`, as zip and zlib define it. Any thread. Releases the GIL for large buffers.

    Args:
        data: contiguous bytes.
        before: CRC-32 of the bytes that precede `data`.

    Raises:
        BufferError: `data` is not contiguous.

    Example:
        >>> hex(crc32(b"123456789")), crc32(b"6789", crc32(b"12345")) == crc32(b"123456789")
        ('0xcbf43926', True)
    """
    if kernel_name() is None:
        return int(isal_zlib.crc32(data, before))
    return _native.check(data, before)


def copy_with_crc32(to: int, source: int, num_bytes: int) -> int:
    """Copy bytes between two addresses, and return their CRC-32. Any thread. Releases the GIL for large copies.

    A kernel (see :func:`kernel_name`) reads each byte once, so the CRC-32 is the copy's even if another thread changes
    the source meanwhile. Without a kernel the copy is read again.

    Args:
        to: address of the copy.
        source: address of the bytes.
        num_bytes: number of bytes.

    Raises:
        ValueError: the two ranges overlap, or `num_bytes` is negative.

    Example:
        >>> source, target = ctypes.create_string_buffer(b"123456789", 9), ctypes.create_string_buffer(9)
        >>> hex(copy_with_crc32(ctypes.addressof(target), ctypes.addressof(source), 9)), target.raw
        ('0xcbf43926', b'123456789')
    """
    if num_bytes < 0:
        raise ValueError(f"cannot copy {num_bytes} bytes: num_bytes must be 0 or more")
    if abs(to - source) < num_bytes:
        raise ValueError(f"cannot copy {num_bytes} bytes from {source:#x} to {to:#x}: the ranges overlap")
    if kernel_name() is None:
        ctypes.memmove(to, source, num_bytes)
        return int(isal_zlib.crc32((ctypes.c_char * num_bytes).from_address(to)))
    return _native.copy(to, source, num_bytes)


def kernel_name() -> str | None:
    """Return the name of the native kernel for this CPU; None if there is none.

    Example:
        >>> kernel_name() in ("avx512", "avx2", "pmull", None)
        True
    """
    return _native.KERNELS[0] if _native is not None and _native.KERNELS else None


def combine_crc32(parts: Iterable[tuple[int, int]]) -> int:
    """Return the CRC-32 of consecutive parts, from each part's CRC-32 and length in bytes. Any thread.

    Example:
        >>> combine_crc32([(crc32(b"12345"), 5), (crc32(b""), 0), (crc32(b"6789"), 4)]) == crc32(b"123456789")
        True
    """
    total = 0
    for crc, num_bytes in parts:
        total = int(isal_zlib.crc32_combine(total, crc, num_bytes))
    return total
