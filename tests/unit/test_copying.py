"""Copies past the caches: right to the last byte, whatever their length and place, and with nothing to do it by."""

import ctypes
import errno
import mmap
import platform
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from distckpt import copying

MIB = 1 << 20
IS_X86 = sys.platform == "linux" and platform.machine() == "x86_64"
BYTES = random.Random(1).randbytes(3 * MIB)


@pytest.fixture
def anew() -> Iterator[Callable[[], None]]:
    """Return a function that lets the loop be looked for anew; it is again at the end."""
    yield copying._streaming.cache_clear
    copying._streaming.cache_clear()


class Room:
    """Memory of a known content, with an address on a page's border."""

    def __init__(self, num_bytes: int, content: int = 0xA5) -> None:
        self.memory = mmap.mmap(-1, num_bytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        ctypes.memset(self.address, content, num_bytes)


def copied(num_bytes: int, *, to: int = 0, source: int = 0) -> None:
    """Copy, and compare all of the memory around it."""
    room, origin = Room(num_bytes + to + 4096), ctypes.create_string_buffer(BYTES, len(BYTES))
    copying.copy(room.address + to, ctypes.addressof(origin) + source, num_bytes)
    assert room.memory[:to] == b"\xa5" * to
    assert room.memory[to : to + num_bytes] == BYTES[source : source + num_bytes]
    assert room.memory[to + num_bytes :] == b"\xa5" * 4096


def test_this_machine_has_it() -> None:
    assert copying.is_streaming() == IS_X86


@pytest.mark.parametrize(
    "num_bytes", [0, 1, 4095, MIB // 4 - 1, MIB // 4, MIB // 4 + 1, MIB + 16383, MIB + 16384, 2 * MIB + 16385]
)
def test_every_length(num_bytes: int) -> None:
    copied(num_bytes)


@pytest.mark.parametrize("source", [0, 1, 8, 15, 64, 4095])
@pytest.mark.parametrize("to", [0, 1, 15, 16, 64, 4080])
def test_every_place(to: int, source: int) -> None:
    copied(MIB + 12345, to=to, source=source)


def test_any_lengths_and_places() -> None:
    dice = random.Random(7)
    for _ in range(60):
        copied(dice.randrange(2 * MIB), to=dice.randrange(5000), source=dice.randrange(MIB))


def test_several_threads_copy_at_once() -> None:
    room, origin = Room(len(BYTES) * 4), ctypes.create_string_buffer(BYTES, len(BYTES))
    work = [
        threading.Thread(
            target=copying.copy, args=(room.address + number * len(BYTES), ctypes.addressof(origin), len(BYTES))
        )
        for number in range(4)
    ]
    for one in work:
        one.start()
    for one in work:
        one.join()
    assert room.memory[:] == BYTES * 4


def test_python_goes_on_meanwhile() -> None:
    """The lock is let go of: a thread that counts gets its turns while a long copy runs."""
    num_bytes = 256 * MIB
    room, origin = Room(num_bytes), Room(num_bytes, 0x5A)
    counted, is_over = [0], threading.Event()

    def count() -> None:
        while not is_over.is_set():
            counted[0] += 1

    other = threading.Thread(target=count)
    other.start()
    try:
        before = counted[0]
        copying.copy(room.address, origin.address, num_bytes)
        during = counted[0] - before
    finally:
        is_over.set()
        other.join()
    assert room.memory[:: 4096 * 7] == origin.memory[:: 4096 * 7]
    assert during > 100


@pytest.mark.parametrize(("what", "value"), [("machine", "aarch64"), ("machine", "i686")])
def test_another_processor_copies_the_usual_way(
    monkeypatch: pytest.MonkeyPatch, anew: Callable[[], None], what: str, value: str
) -> None:
    monkeypatch.setattr(platform, what, lambda: value)
    anew()
    assert not copying.is_streaming()
    copied(2 * MIB + 5)


@pytest.mark.skipif(not IS_X86, reason="the code is x86-64's")
def test_code_that_copies_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch, anew: Callable[[], None]) -> None:
    wrong = copying._CODE.replace(bytes.fromhex("660fe75c0f30"), bytes.fromhex("660fe7540f30"))  # xmm2 in xmm3's place
    assert wrong != copying._CODE
    monkeypatch.setattr(copying, "_CODE", wrong)
    anew()
    assert not copying.is_streaming()
    copied(2 * MIB + 5)


def test_a_system_that_forbids_it_copies_the_usual_way() -> None:
    """As SELinux may: here a process that has given up the right to make memory executable."""
    script = """
import ctypes, os
from distckpt import copying
PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
if ctypes.CDLL(None).prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) != 0:
    print("unknown")
else:
    source, target = ctypes.create_string_buffer(b"x" * (2 << 20)), ctypes.create_string_buffer(2 << 20)
    copying.copy(ctypes.addressof(target), ctypes.addressof(source), 2 << 20)
    print(copying.is_streaming(), target.raw == b"x" * (2 << 20))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("False True", "unknown")  # unknown: Linux before 6.3


def test_no_mprotect_copies_the_usual_way(monkeypatch: pytest.MonkeyPatch, anew: Callable[[], None]) -> None:
    def refuse() -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(copying, "_loaded", refuse)
    anew()
    assert not copying.is_streaming()
    copied(2 * MIB + 5)
