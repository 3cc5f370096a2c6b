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
from typing import Any

import pytest

from distckpt import copying

KIB, MIB = 1 << 10, 1 << 20
IS_X86 = sys.platform == "linux" and platform.machine() == "x86_64"
BYTES = random.Random(1).randbytes(3 * MIB)
LEAST = 256 * KIB
GROUP = 16 * KIB


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


def loop() -> Any:
    """Return the loop; a machine that may run code made at run time has it."""
    found = copying._streaming()
    if found is None:
        assert not IS_X86 or not may_execute(), "this machine could have it"
        pytest.skip("this machine executes no memory that was written, or is no x86-64")
    return found


def may_execute() -> bool:
    try:
        mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "num_bytes", [0, 1, 4095, LEAST - 1, LEAST, LEAST + 1, MIB + GROUP - 1, MIB + GROUP, 2 * MIB + GROUP + 1]
)
def test_every_length(num_bytes: int) -> None:
    copied(num_bytes)


@pytest.mark.parametrize("source", [0, 1, 8, 15, 64, 4095])
@pytest.mark.parametrize("to", [0, 1, 15, 16, 64, 4080])
def test_every_place(to: int, source: int) -> None:
    copied(MIB + 12345, to=to, source=source)


def test_any_lengths_and_places() -> None:
    dice = random.Random(7)
    for number in range(60):
        to = dice.randrange(5000) if number % 2 else 16 * dice.randrange(300)
        copied(dice.randrange(2 * MIB), to=to, source=dice.randrange(MIB))


@pytest.mark.parametrize(
    ("num_bytes", "to", "num_groups"),
    [
        (LEAST, 0, 16),
        (MIB + 1, 16, 64),
        (2 * MIB + GROUP - 1, 4096, 128),
        (LEAST - 1, 0, None),
        (MIB, 1, None),
        (MIB, 8, None),
        (MIB, 15, None),
    ],
)
def test_large_copies_onto_borders_go_through_the_loop(
    monkeypatch: pytest.MonkeyPatch, num_bytes: int, to: int, num_groups: int | None
) -> None:
    real, calls = loop(), []

    def record(target: int, source: int, groups: int) -> None:
        calls.append(groups)
        real(target, source, groups)

    monkeypatch.setattr(copying, "_streaming", lambda: record)
    copied(num_bytes, to=to)
    assert calls == ([] if num_groups is None else [num_groups])


def test_several_threads_copy_at_once(anew: Callable[[], None]) -> None:
    anew()  # they look for the loop at once too
    room, origin = Room(len(BYTES) * 4), ctypes.create_string_buffer(BYTES, len(BYTES))
    barrier = threading.Barrier(4)

    def work(number: int) -> None:
        barrier.wait(timeout=30)
        copying.copy(room.address + number * len(BYTES), ctypes.addressof(origin), len(BYTES))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert room.memory[:] == BYTES * 4


def test_the_loop_lets_go_of_pythons_lock() -> None:
    keeps_lock = ctypes.PYFUNCTYPE(None)._flags_  # _ctypes' own mark of it
    lets_go = ctypes.CFUNCTYPE(None)._flags_
    assert lets_go != keeps_lock
    assert type(loop())._flags_ == lets_go


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (platform, "machine", lambda: "aarch64"),
        (sys, "platform", "darwin"),
        (sys, "maxsize", 2**31 - 1),
    ],
)
def test_another_machine_copies_the_usual_way(
    monkeypatch: pytest.MonkeyPatch, anew: Callable[[], None], module: Any, name: str, value: Any
) -> None:
    monkeypatch.setattr(module, name, value)
    anew()
    assert copying._streaming() is None
    copied(2 * MIB + 5)


def test_code_that_copies_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch, anew: Callable[[], None]) -> None:
    loop()
    wrong = copying._CODE.replace(bytes.fromhex("660fe75c0f30"), bytes.fromhex("660fe7540f30"))  # xmm2 in xmm3's place
    assert wrong != copying._CODE
    monkeypatch.setattr(copying, "_CODE", wrong)
    anew()
    assert copying._streaming() is None
    copied(2 * MIB + 5)


def test_a_system_that_forbids_it_copies_the_usual_way() -> None:
    """As SELinux may: here a process that has given up the right to make memory executable."""
    script = """
import ctypes
from distckpt import copying
PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
if ctypes.CDLL(None).prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) != 0:
    print("unknown")
else:
    source, target = ctypes.create_string_buffer(b"x" * (2 << 20)), ctypes.create_string_buffer(2 << 20)
    copying.copy(ctypes.addressof(target), ctypes.addressof(source), 2 << 20)
    print(copying._streaming() is None, target.raw == b"x" * (2 << 20))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() == "unknown":
        pytest.skip("Linux before 6.3 has no such right to give up")
    assert done.stdout.strip() == "True True"


@pytest.mark.parametrize("where", ["_loaded", "_copies_right"])
@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), AttributeError("mprotect")])
def test_whatever_is_missing_it_copies_the_usual_way(
    monkeypatch: pytest.MonkeyPatch, anew: Callable[[], None], where: str, error: Exception
) -> None:
    loop()

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(copying, where, refuse)
    anew()
    assert copying._streaming() is None
    copied(2 * MIB + 5)
