"""CRC-32 of bytes in memory, as zip archives have it: alone, or of bytes that are copied.

A save copies the state and checks it. Checked separately, that costs as much CPU time as the copy again. Done in one
pass it costs no more than the copy: a copy waits for memory, and a CRC by carry-less multiplication fits into that
wait. The copy also bypasses the caches, so that the model stays in them.

Neither Python nor torch has such a function, so it is in C: ``_native/copy_crc.c`` says how it works. It needs
VPCLMULQDQ (x86-64: Intel since 2019, AMD since 2020) or PMULL (aarch64). Without these, or where the package was built
without a C compiler, ``memmove`` and ``isal`` do the work.
"""

import ctypes
from collections.abc import Iterable

from isal import isal_zlib

try:
    from distckpt._native import copy_crc as _native
except ImportError:  # built without a compiler, or for another machine
    _native = None  # type: ignore[assignment]  # a module that may be absent has no type of its own

__all__ = ["combined", "copy_and_check", "crc32", "is_checked_in_passing", "kernel"]


def crc32(data: bytes | bytearray | memoryview, before: int = 0) -> int:
    """Return the CRC-32 of `data`, as zip and zlib define it. Any thread. Releases the GIL for large buffers.

    Args:
        data: contiguous bytes.
        before: CRC-32 of the bytes that precede `data`.

    Raises:
        BufferError: `data` is not contiguous.

    Example:
        >>> hex(crc32(b"123456789"))
        '0xcbf43926'
        >>> crc32(b"6789", crc32(b"12345")) == crc32(b"123456789")
        True
    """
    if kernel() is None:
        return int(isal_zlib.crc32(data, before))
    return _native.check(data, before)


def copy_and_check(to: int, source: int, num_bytes: int) -> int:
    """Copy bytes from one address to another, and return their CRC-32. Any thread. Releases the GIL for large copies.

    With a kernel (see :func:`kernel`) each byte is read once: the CRC-32 is that of the copy even if another thread
    changes the source meanwhile. Without one the copy is read again.

    Args:
        to: address of the copy.
        source: address of the bytes.
        num_bytes: how many.

    Raises:
        ValueError: the two ranges overlap, or `num_bytes` is negative.

    Example:
        >>> source, target = ctypes.create_string_buffer(b"123456789", 9), ctypes.create_string_buffer(9)
        >>> hex(copy_and_check(ctypes.addressof(target), ctypes.addressof(source), 9)), target.raw
        ('0xcbf43926', b'123456789')
    """
    if num_bytes < 0:
        raise ValueError(f"cannot copy {num_bytes} bytes: num_bytes must be 0 or more")
    if abs(to - source) < num_bytes:
        raise ValueError(f"cannot copy {num_bytes} bytes from {source:#x} to {to:#x}: the ranges overlap")
    if kernel() is None:
        ctypes.memmove(to, source, num_bytes)
        return int(isal_zlib.crc32((ctypes.c_char * num_bytes).from_address(to)))
    return _native.copy(to, source, num_bytes)


def kernel() -> str | None:
    """Return the name of the native loop that is used here; None if there is none.

    Example:
        >>> kernel() in ("avx512", "avx2", "pmull", None)
        True
    """
    return _native.KERNELS[0] if _native is not None and _native.KERNELS else None


def is_checked_in_passing() -> bool:
    """Return True if :func:`copy_and_check` takes no longer than a copy."""
    return kernel() is not None


def combined(parts: Iterable[tuple[int, int]]) -> int:
    """Return the CRC-32 of bytes of which the parts were checked one by one. Any thread.

    Args:
        parts: the CRC-32 and the length in bytes of each, in their order.

    Example:
        >>> combined([(crc32(b"12345"), 5), (crc32(b""), 0), (crc32(b"6789"), 4)]) == crc32(b"123456789")
        True
    """
    total = 0
    for crc, num_bytes in parts:
        total = int(isal_zlib.crc32_combine(total, crc, num_bytes))
    return total
