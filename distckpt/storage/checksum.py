"""CRC-32 of bytes in memory, as zip archives have it.

Owns which library computes it. Must not know what the bytes mean. Layer L2, below the other modules of storage.

``isal`` computes it many times faster than ``zlib`` and lets go of Python's lock over large buffers, so that a
background thread may check what training goes on beside.
"""

from collections.abc import Iterable

from isal import isal_zlib

__all__ = ["combined", "crc32"]


def crc32(data: bytes | bytearray | memoryview, before: int = 0) -> int:
    """Return the CRC-32 of `data`, as zip and zlib define it. Any thread.

    Args:
        data: contiguous bytes.
        before: the CRC-32 of what stands before them.

    Example:
        >>> hex(crc32(b"123456789"))
        '0xcbf43926'
        >>> crc32(b"6789", crc32(b"12345")) == crc32(b"123456789")
        True
    """
    return int(isal_zlib.crc32(data, before))


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
