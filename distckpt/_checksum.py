"""CRC-32 of bytes in memory, as zip archives have it, and a copy that computes it in the same pass.

A save copies the state and computes its checksums. In one pass both cost no more than the copy: a copy waits for
memory, and a CRC by carry-less multiplication fits into that wait. The copy also bypasses the caches, so that the model
stays in them.

The pass is in C (``_native/copy_crc.c``). It needs VPCLMULQDQ (x86-64: Intel since 2019, AMD since 2020) or PMULL
(aarch64). Without these, or in a package built without a C compiler, ``memmove`` and ``isal`` do the work.
"""

import ctypes
from array import array  # noqa: TC003 - the example uses it
from collections.abc import Iterable

from isal import isal_zlib

try:
    from distckpt._native import copy_crc as _native
except ImportError:  # built without a compiler, or for another machine
    _native = None  # type: ignore[assignment]  # a module that may be absent has no type of its own
if not hasattr(_native, "copy_rows"):  # built in this checkout from an older source
    _native = None  # type: ignore[assignment]  # as above


def memory_at(address: int, num_bytes: int) -> memoryview:
    """Return memory at an address, which the caller keeps alive."""
    return memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B") if num_bytes else memoryview(b"")


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


def copy_rows(
    target: memoryview,
    shift: int,
    sources: "array[int]",
    rows: "array[int]",
    first: int,
    last: int,
    crcs: "array[int]",
) -> None:
    """Copy many ranges of memory in one call. Any thread. Releases the GIL if there is a kernel.

    A kernel (see :func:`kernel_name`) reads each byte once, so the CRC-32 is the copy's even if another thread changes
    the source meanwhile.

    Args:
        target: contiguous bytes to copy into.
        shift: offset of `target` in the space of the rows' offsets.
        sources: addresses; an ``array("Q")``.
        rows: an ``array("q")`` with four numbers a row: number of the source, offset of the first byte in it, offset of
            the copy, and number of bytes. The sources have those bytes.
        first: number of the first row to copy.
        last: number of the last row plus 1.
        crcs: an ``array("q")`` with one number a row. A kernel stores each row's CRC-32; without one they stay.

    Raises:
        ValueError: a row names no source, leaves `target`, or overlaps it. Rows before it are copied.

    Example:
        >>> source, target = ctypes.create_string_buffer(b"123456789", 9), bytearray(4)
        >>> rows = array("q", [0, 3, 102, 2, 0, 7, 100, 2])
        >>> sources, crcs = array("Q", [ctypes.addressof(source)]), array("q", [-1, -1])
        >>> copy_rows(memoryview(target), 100, sources, rows, 0, 2, crcs)
        >>> bytes(target)
        b'8945'
    """
    if kernel_name() is not None:
        _native.copy_rows(target, shift, sources, rows, first, last, crcs)
        return
    if not 0 <= first <= last <= len(rows) // 4:
        raise ValueError("there are not as many rows")
    begin = ctypes.addressof(ctypes.c_char.from_buffer(target)) if len(target) else 0
    for number in range(first, last):
        source, offset, at, num_bytes = rows[4 * number : 4 * number + 4]
        at -= shift
        fits = source in range(len(sources)) and min(offset, num_bytes, at, len(target) - at - num_bytes) >= 0
        address = sources[source] + offset if fits else 0
        if not fits or (address < begin + len(target) and address + num_bytes > begin):
            raise ValueError(f"row {number} does not fit, or overlaps the target")
        ctypes.memmove(begin + at, address, num_bytes)


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
