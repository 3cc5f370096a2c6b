"""Host memory -> host memory, past the processor's caches.

Owns one function, :func:`copy`. Must not know what the bytes are. Layer L1.

An ordinary store first reads the line of memory that it is about to overwrite, and leaves it in the caches, where the
model was. Non-temporal stores do neither: 256 MiB of tensors a rank took 31 ms instead of 50 while training stood still
(2 CPUs with AMX and a last cache of 480 MiB; two ranks copied at once). Whoever reads the copy next fetches it from
memory: where it is read at once, as in a save in the foreground, an ordinary copy is better.

glibc has such stores for copies above a size that it derives from the last cache (181 MiB on that machine; ``ld.so
--list-tunables``), and tensors are smaller; nothing that Python or torch bring along has them for any size. So the loop
is here, in machine code, as a just-in-time compiler would make it: x86-64's base instructions, one function, no calls,
no stack. It goes through four pages at a time, for memory has several rows open at once (as glibc's large copies do,
``sysdeps/x86_64/multiarch/memmove-vec-unaligned-erms.S``).

Where it cannot be had (another processor, a system that lets no new memory be executed) or a trial of it copies
something wrong, :func:`ctypes.memmove` does the work.
"""

import ctypes
import functools
import mmap
import os
import platform
import sys
from collections.abc import Callable

__all__ = ["copy"]

_GROUP_BYTES = 4 * 4096
"""What one turn of the loop copies."""
_LEAST_BYTES = 1 << 18
"""Less is not worth it: a processor's own caches hold that much."""
_TARGET_BYTES = 16
"""On whose borders non-temporal stores go."""

# (to: rdi, source: rsi, number of groups: rdx), of System V's calling convention.
_CODE = bytes.fromhex(
    "f30f1efa"  #            endbr64
    "41b840000000"  #   group: mov r8d, 64              a page has 64 lines
    "31c9"  #           line:  xor ecx, ecx             a group has four pages
    "0f188c0e00020000"  # page: prefetcht0 [rsi+rcx+512]
    "f30f6f040e"  #            movdqu xmm0, [rsi+rcx]
    "f30f6f4c0e10"  #          movdqu xmm1, [rsi+rcx+16]
    "f30f6f540e20"  #          movdqu xmm2, [rsi+rcx+32]
    "f30f6f5c0e30"  #          movdqu xmm3, [rsi+rcx+48]
    "660fe7040f"  #            movntdq [rdi+rcx], xmm0
    "660fe74c0f10"  #          movntdq [rdi+rcx+16], xmm1
    "660fe7540f20"  #          movntdq [rdi+rcx+32], xmm2
    "660fe75c0f30"  #          movntdq [rdi+rcx+48], xmm3
    "81c100100000"  #          add ecx, 4096
    "81f900400000"  #          cmp ecx, 16384
    "75bc"  #                  jne page
    "4883c640"  #              add rsi, 64
    "4883c740"  #              add rdi, 64
    "41ffc8"  #                dec r8d
    "75ad"  #                  jnz line
    "4881c600300000"  #        add rsi, 12288
    "4881c700300000"  #        add rdi, 12288
    "48ffca"  #                dec rdx
    "7594"  #                  jnz group
    "0faef8"  #                sfence
    "c3"  #                    ret
)

_Function = Callable[[int, int, int], None]


def copy(to: int, source: int, num_bytes: int) -> None:
    """Copy bytes from one address to another; the two ranges do not overlap. Lets go of Python's lock.

    Args:
        to: where they go.
        source: where they come from.
        num_bytes: how many.

    Example:
        >>> source, target = ctypes.create_string_buffer(b"as it is", 8), ctypes.create_string_buffer(8)
        >>> copy(ctypes.addressof(target), ctypes.addressof(source), 8)
        >>> target.raw
        b'as it is'
    """
    if num_bytes >= _LEAST_BYTES and to % _TARGET_BYTES == 0:
        stream = _streaming()
        if stream is not None:
            num_groups = num_bytes // _GROUP_BYTES
            stream(to, source, num_groups)
            done = num_groups * _GROUP_BYTES
            to, source, num_bytes = to + done, source + done, num_bytes - done
    ctypes.memmove(to, source, num_bytes)


@functools.cache
def _streaming() -> _Function | None:
    """Return the loop; None where there is none that works."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or sys.maxsize < 2**32:
        return None
    try:
        function = _loaded()
        return function if _copies_right(function) else None
    except (OSError, AttributeError):
        return None


def _loaded() -> _Function:
    """Put the code into memory that is written first and executed afterwards, never both at once.

    Raises:
        OSError: the system does not let us.
        AttributeError: the C library has no ``mprotect``.
    """
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    page.write(_CODE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if protect(address, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(address)
    function.page = page  # type: ignore[attr-defined]  # it lives as long
    return function


def _copies_right(function: _Function) -> bool:
    """Try it on two groups of bytes, from an odd address, with bytes around them that have to stay."""
    length = 2 * _GROUP_BYTES
    pattern = os.urandom(length)
    source = ctypes.create_string_buffer(b"." + pattern, length + 1)
    target = ctypes.create_string_buffer(length + 4 * _TARGET_BYTES)
    skipped = _TARGET_BYTES + -ctypes.addressof(target) % _TARGET_BYTES
    function(ctypes.addressof(target) + skipped, ctypes.addressof(source) + 1, 2)
    return target.raw == bytes(skipped) + pattern + bytes(4 * _TARGET_BYTES - skipped)
