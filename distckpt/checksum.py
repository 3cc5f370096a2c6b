"""CRC-32 of bytes in memory, as zip archives have it: alone, or of what is being copied.

Owns how it is computed. Must not know what the bytes mean. Layer L1.

To check bytes costs a core as long as to copy them, and a save has to do both. Done in one go they cost less than an
ordinary copy alone: a copy waits for memory, and the check, by carry-less multiplication, has that time for itself.
256 MiB took 21 ms copied and checked; 30 to 37 by ``memmove``, and 23 more to check (2 CPUs of AMD's "Zen" with AVX2;
two processes at once the same). The copy goes past the caches, so that the model stays in them.

Nothing that Python or torch bring along does that, so the loop is here in machine code, as a just-in-time compiler
would make it: one function, no calls, no stack. It needs VPCLMULQDQ and AVX2 (Intel since 2019, AMD since 2020). Where
it cannot be had (another processor, a system that lets no new memory be executed), or a trial of it gets something
wrong, ``memmove`` and ``isal`` do the work, and :func:`is_checked_in_passing` tells so.

Source: V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel, 2009. The
constants are, reflected, x**1056 and x**992 modulo the CRC's polynomial: 128 bytes are folded at a time.
"""

import ctypes
import functools
import mmap
import os
import platform
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from isal import isal_zlib

__all__ = ["combined", "copy_and_check", "crc32", "is_checked_in_passing"]

_TURN_BYTES = 128
"""What one turn of the loop folds, and the length of what is left in the end."""
_BORDER_BYTES = 32
"""On whose borders the loop's stores go."""
_LEAST_BYTES = 1 << 14
"""Less is not worth the loop where nothing is copied."""
_FLAGS = {"avx2", "vpclmulqdq"}
_ALL_ONES = 0xFFFFFFFF

# (to: rdi, source: rsi, number of turns: rdx, the CRC's register before: ecx, 128 bytes of what is left: r8), of System
# V's calling convention.
_CODE = bytes.fromhex(
    "f30f1efa"  #            endbr64
    "c4627d5a05f5000000"  #  vbroadcasti128 ymm8, [constants]
    "c5fe6f06"  #            vmovdqu ymm0, [rsi]
    "c5fde707"  #            vmovntdq [rdi], ymm0
    "c5fe6f4e20"  #          vmovdqu ymm1, [rsi+32]
    "c5fde74f20"  #          vmovntdq [rdi+32], ymm1
    "c5fe6f5640"  #          vmovdqu ymm2, [rsi+64]
    "c5fde75740"  #          vmovntdq [rdi+64], ymm2
    "c5fe6f5e60"  #          vmovdqu ymm3, [rsi+96]
    "c5fde75f60"  #          vmovntdq [rdi+96], ymm3
    "c5796ec9"  #            vmovd xmm9, ecx
    "c4c17defc1"  #          vpxor ymm0, ymm0, ymm9
    "e98c000000"  #          jmp next
    "0f188e00080000"  # turn: prefetcht0 [rsi+2048]
    "0f188e40080000"  #      prefetcht0 [rsi+2112]
    "c57e6f0e"  #            vmovdqu ymm9, [rsi]
    "c57de70f"  #            vmovntdq [rdi], ymm9
    "c4437d44d000"  #        vpclmulqdq ymm10, ymm0, ymm8, 0x00
    "c4c37d44c011"  #        vpclmulqdq ymm0, ymm0, ymm8, 0x11
    "c4c17defc1"  #          vpxor ymm0, ymm0, ymm9
    "c4c17defc2"  #          vpxor ymm0, ymm0, ymm10
    "c57e6f4e20"  #          vmovdqu ymm9, [rsi+32]
    "c57de74f20"  #          vmovntdq [rdi+32], ymm9
    "c4437544d000"  #        vpclmulqdq ymm10, ymm1, ymm8, 0x00
    "c4c37544c811"  #        vpclmulqdq ymm1, ymm1, ymm8, 0x11
    "c4c175efc9"  #          vpxor ymm1, ymm1, ymm9
    "c4c175efca"  #          vpxor ymm1, ymm1, ymm10
    "c57e6f4e40"  #          vmovdqu ymm9, [rsi+64]
    "c57de74f40"  #          vmovntdq [rdi+64], ymm9
    "c4436d44d000"  #        vpclmulqdq ymm10, ymm2, ymm8, 0x00
    "c4c36d44d011"  #        vpclmulqdq ymm2, ymm2, ymm8, 0x11
    "c4c16defd1"  #          vpxor ymm2, ymm2, ymm9
    "c4c16defd2"  #          vpxor ymm2, ymm2, ymm10
    "c57e6f4e60"  #          vmovdqu ymm9, [rsi+96]
    "c57de74f60"  #          vmovntdq [rdi+96], ymm9
    "c4436544d000"  #        vpclmulqdq ymm10, ymm3, ymm8, 0x00
    "c4c36544d811"  #        vpclmulqdq ymm3, ymm3, ymm8, 0x11
    "c4c165efd9"  #          vpxor ymm3, ymm3, ymm9
    "c4c165efda"  #          vpxor ymm3, ymm3, ymm10
    "4881c680000000"  # next: add rsi, 128
    "4881c780000000"  #      add rdi, 128
    "48ffca"  #              dec rdx
    "0f855dffffff"  #        jnz turn
    "c4c17e7f00"  #          vmovdqu [r8], ymm0
    "c4c17e7f4820"  #        vmovdqu [r8+32], ymm1
    "c4c17e7f5040"  #        vmovdqu [r8+64], ymm2
    "c4c17e7f5860"  #        vmovdqu [r8+96], ymm3
    "c5f877"  #              vzeroupper
    "0faef8"  #              sfence
    "c3"  #                  ret
    "72f38ee801000000"  # constants: 0x1e88ef372
    "80e87f4a01000000"  #    0x14a7fe880
)
_STORES = tuple(
    map(
        bytes.fromhex,
        ("c5fde707", "c5fde74f20", "c5fde75740", "c5fde75f60", "c57de70f", "c57de74f20", "c57de74f40", "c57de74f60"),
    )
)
_NOTHING = {4: bytes.fromhex("0f1f4000"), 5: bytes.fromhex("0f1f440000")}
"""As many bytes as a store has: for what is checked where it lies."""
_Left = ctypes.c_char * _TURN_BYTES

_Function = Callable[[int, int, int, int, ctypes.Array[ctypes.c_char]], None]


def crc32(data: bytes | bytearray | memoryview, before: int = 0) -> int:
    """Return the CRC-32 of `data`, as zip and zlib define it. Any thread. Lets go of Python's lock over large buffers.

    Args:
        data: contiguous bytes.
        before: the CRC-32 of what stands before them.

    Example:
        >>> hex(crc32(b"123456789"))
        '0xcbf43926'
        >>> crc32(b"6789", crc32(b"12345")) == crc32(b"123456789")
        True
    """
    if len(data) >= _LEAST_BYTES and type(data) is memoryview and _is_plain(data):
        fold = _folding(is_copying=False)
        if fold is not None:
            num_bytes = len(data) // _TURN_BYTES * _TURN_BYTES
            before = _folded(fold, 0, ctypes.addressof(ctypes.c_char.from_buffer(data)), num_bytes, before)
            data = data[num_bytes:]
    return int(isal_zlib.crc32(data, before))


def copy_and_check(to: int, source: int, num_bytes: int) -> int:
    """Copy bytes from one address to another, and return their CRC-32. Any thread. Lets go of Python's lock.

    What is checked is what was read for the copy, whoever changes the source meanwhile. The ranges do not overlap.

    Args:
        to: where they go.
        source: where they come from.
        num_bytes: how many.

    Example:
        >>> source, target = ctypes.create_string_buffer(b"123456789", 9), ctypes.create_string_buffer(9)
        >>> hex(copy_and_check(ctypes.addressof(target), ctypes.addressof(source), 9)), target.raw
        ('0xcbf43926', b'123456789')
    """
    crc, done = 0, 0
    fold = _folding(is_copying=True)
    if fold is None:
        ctypes.memmove(to, source, num_bytes)
        return int(isal_zlib.crc32((ctypes.c_char * num_bytes).from_address(to)))
    if num_bytes >= _TURN_BYTES and to % _BORDER_BYTES == 0:
        done = num_bytes // _TURN_BYTES * _TURN_BYTES
        crc = _folded(fold, to, source, done, 0)
    if done < num_bytes:
        rest = ctypes.string_at(source + done, num_bytes - done)
        ctypes.memmove(to + done, rest, len(rest))
        crc = int(isal_zlib.crc32(rest, crc))
    return crc


def is_checked_in_passing() -> bool:
    """Tell whether :func:`copy_and_check` takes no longer than a copy."""
    return _folding(is_copying=True) is not None


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


def _is_plain(view: memoryview) -> bool:
    """Tell whether a view is of as many bytes as it is long, at an address that can be told."""
    return view.nbytes == len(view) and view.c_contiguous and not view.readonly


def _folded(fold: _Function, to: int, source: int, num_bytes: int, before: int) -> int:
    """Return the CRC-32 of some turns' bytes: that of what is left of them, which is congruent."""
    left = _Left()
    fold(to, source, num_bytes // _TURN_BYTES, before ^ _ALL_ONES, left)
    return int(isal_zlib.crc32(left, _ALL_ONES))


@functools.cache
def _folding(*, is_copying: bool) -> _Function | None:
    """Return the loop; None where there is none that works."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or sys.maxsize < 2**32:
        return None
    try:
        if not _processor_flags() >= _FLAGS:
            return None
        function = _loaded(_CODE if is_copying else _without_stores(_CODE))
        return function if _is_right(function, is_copying=is_copying) else None
    except (OSError, AttributeError):
        return None


def _processor_flags() -> set[str]:
    """Return what the processor can do, and the system lets it do.

    Raises:
        OSError: the system does not tell.
    """
    with Path("/proc/cpuinfo").open(encoding="ascii", errors="replace") as lines:  # a processor after the other
        flags = next((line for line in lines if line.startswith("flags")), "")
    return set(flags.partition(":")[2].split())


def _without_stores(code: bytes) -> bytes:
    for store in _STORES:
        code = code.replace(store, _NOTHING[len(store)])
    return code


def _loaded(code: bytes) -> _Function:
    """Put code into memory that is written first and executed afterwards, never both at once.

    Raises:
        OSError: the system does not let us.
        AttributeError: the C library has no ``mprotect``.
    """
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if protect(address, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    arguments = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_void_p)
    function = ctypes.CFUNCTYPE(None, *arguments)(address)
    function.page = page  # type: ignore[attr-defined]  # it lives as long
    return function


def _is_right(function: _Function, *, is_copying: bool) -> bool:
    """Try it on 1 to 34 turns, from an odd address, with bytes around the target that have to stay."""
    for num_turns in (1, 2, 34):
        length = num_turns * _TURN_BYTES
        pattern = os.urandom(length)
        source = ctypes.create_string_buffer(b"." + pattern, length + 1)
        target = ctypes.create_string_buffer(length + 4 * _BORDER_BYTES)
        skipped = _BORDER_BYTES + -ctypes.addressof(target) % _BORDER_BYTES
        before = isal_zlib.crc32(pattern[:9])
        crc = _folded(function, ctypes.addressof(target) + skipped, ctypes.addressof(source) + 1, length, before)
        written = pattern if is_copying else bytes(length)
        if target.raw != bytes(skipped) + written + bytes(4 * _BORDER_BYTES - skipped):
            return False
        if crc != isal_zlib.crc32(pattern, before):
            return False
    return True
