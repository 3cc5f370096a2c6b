"""Bytes copied and checked in one go: right to the last bit, from and to any place, and where there is no loop too."""

import ctypes
import errno
import mmap
import os
import platform
import random
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distckpt import checksum

KIB, MIB = 1 << 10, 1 << 20
IS_X86 = sys.platform == "linux" and platform.machine() == "x86_64"
BYTES = random.Random(1).randbytes(3 * MIB)
TURN = 128
LEAST = 16 * KIB


@pytest.fixture
def anew() -> Iterator[Callable[[], None]]:
    """Return a function that lets the loop be looked for anew; it is again at the end."""
    yield checksum._folding.cache_clear
    checksum._folding.cache_clear()


class Room:
    """Memory of a known content, with an address on a page's border."""

    def __init__(self, num_bytes: int, content: int = 0xA5) -> None:
        self.memory = mmap.mmap(-1, num_bytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        ctypes.memset(self.address, content, num_bytes)


def copied(num_bytes: int, *, to: int = 0, source: int = 0) -> None:
    """Copy and check, and compare all of the memory around the target."""
    room, origin = Room(num_bytes + to + 4096), ctypes.create_string_buffer(BYTES, len(BYTES))
    crc = checksum.copy_and_check(room.address + to, ctypes.addressof(origin) + source, num_bytes)
    assert crc == zlib.crc32(BYTES[source : source + num_bytes])
    assert room.memory[:to] == b"\xa5" * to
    assert room.memory[to : to + num_bytes] == BYTES[source : source + num_bytes]
    assert room.memory[to + num_bytes :] == b"\xa5" * 4096
    assert origin.raw == BYTES


def loop(*, is_copying: bool = True) -> Any:
    """Return the loop; a machine whose processor has what it takes, and that may run code made at run time, has it."""
    found = checksum._folding(is_copying=is_copying)
    if found is None:
        assert "vpclmulqdq" not in what_the_system_tells() or not may_execute(), "this machine could have it"
        pytest.skip("this processor has no VPCLMULQDQ, or the machine executes no memory that was written")
    return found


def what_the_system_tells() -> str:
    return Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace") if sys.platform == "linux" else ""


def may_execute() -> bool:
    try:
        mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()
    except OSError:
        return False
    return True


LENGTHS = [0, 1, TURN - 1, TURN, TURN + 1, 2 * TURN, 3 * TURN - 1, 4095, LEAST - 1, LEAST, LEAST + 1, MIB + 17]


@pytest.mark.parametrize("num_bytes", LENGTHS)
def test_every_length_is_copied(num_bytes: int) -> None:
    copied(num_bytes)


@pytest.mark.parametrize("source", [0, 1, 8, 15, 64, 4095])
@pytest.mark.parametrize("to", [0, 1, 15, 16, 32, 64, 4080])
def test_every_place_is_copied_to_and_from(to: int, source: int) -> None:
    copied(MIB + 12345, to=to, source=source)


def test_any_lengths_and_places() -> None:
    dice = random.Random(7)
    for number in range(100):
        to = dice.randrange(5000) if number % 2 else 32 * dice.randrange(150)
        copied(dice.randrange(2 * MIB if number % 3 else 5 * KIB), to=to, source=dice.randrange(MIB))


@pytest.mark.parametrize("num_bytes", LENGTHS)
@pytest.mark.parametrize("before", [0, 1, 0xFFFFFFFF, zlib.crc32(b"what came before")])
def test_what_is_checked_where_it_lies_stays_as_it_is(num_bytes: int, before: int) -> None:
    data = memoryview(bytearray(BYTES))
    for begin in (0, 1, 77):
        assert checksum.crc32(data[begin : begin + num_bytes], before) == zlib.crc32(
            BYTES[begin : begin + num_bytes], before
        )
    assert data == BYTES


BUFFERS: dict[str, Callable[[], Any]] = {
    "bytes": lambda: BYTES,
    "bytearray": lambda: bytearray(BYTES),
    "read-only view": lambda: memoryview(BYTES),
    "view": lambda: memoryview(bytearray(BYTES)),
    "view of numbers": lambda: memoryview(bytearray(BYTES)).cast("I"),
    "view of rows": lambda: memoryview(bytearray(BYTES)).cast("B", (MIB, 3)),
}


@pytest.mark.parametrize("kind", BUFFERS)
def test_all_kinds_of_buffers_are_checked(kind: str) -> None:
    assert checksum.crc32(BUFFERS[kind]()) == zlib.crc32(BYTES)


def test_a_view_with_gaps_is_no_buffer() -> None:
    with pytest.raises(BufferError):
        checksum.crc32(memoryview(bytearray(BYTES))[::2])


def test_every_single_bit_counts() -> None:
    data = bytearray(BYTES[: LEAST + 300])
    right = zlib.crc32(data)
    dice = random.Random(3)
    for at in [*range(600), *(dice.randrange(len(data)) for _ in range(600)), len(data) - 1]:
        bit = 1 << dice.randrange(8)
        data[at] ^= bit
        assert checksum.crc32(memoryview(data)) != right
        data[at] ^= bit
    assert checksum.crc32(memoryview(data)) == right


def test_parts_checked_one_by_one_make_up_the_whole() -> None:
    dice, parts, at = random.Random(5), [], 0
    origin, room = ctypes.create_string_buffer(BYTES, len(BYTES)), Room(MIB)
    while at < len(BYTES):
        num_bytes = min(dice.choice([0, 1, TURN, 70_000, MIB]), len(BYTES) - at)
        parts.append((checksum.copy_and_check(room.address, ctypes.addressof(origin) + at, num_bytes), num_bytes))
        at += num_bytes
    assert checksum.combined(parts) == zlib.crc32(BYTES)


@pytest.mark.parametrize(
    ("num_bytes", "to", "num_turns"),
    [(TURN, 0, 1), (MIB + 1, 32, 8192), (MIB - 1, 4096, 8191), (TURN - 1, 0, None), (MIB, 1, None), (MIB, 16, None)],
)
def test_copies_onto_borders_go_through_the_loop(
    monkeypatch: pytest.MonkeyPatch, num_bytes: int, to: int, num_turns: int | None
) -> None:
    real, calls = loop(), []

    def record(target: int, source: int, turns: int, before: int, left: Any) -> None:
        calls.append(turns)
        real(target, source, turns, before, left)

    monkeypatch.setattr(checksum, "_folding", lambda **_: record)
    copied(num_bytes, to=to)
    assert calls == ([] if num_turns is None else [num_turns])


def test_several_threads_copy_at_once(anew: Callable[[], None]) -> None:
    anew()  # they look for the loop at once too
    room, origin = Room(len(BYTES) * 4), ctypes.create_string_buffer(BYTES, len(BYTES))
    barrier, found = threading.Barrier(4), set[int]()

    def work(number: int) -> None:
        barrier.wait(timeout=30)
        to = room.address + number * len(BYTES)
        found.add(checksum.copy_and_check(to, ctypes.addressof(origin), len(BYTES)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert room.memory[:] == BYTES * 4
    assert found == {zlib.crc32(BYTES)}


def test_what_is_checked_is_what_was_copied_whoever_writes_meanwhile() -> None:
    if not checksum.is_checked_in_passing():
        loop()
    source, room, is_over = bytearray(4 * MIB), Room(4 * MIB), threading.Event()

    def write() -> None:
        number = 0
        while not is_over.is_set():
            number = (number + 1) % 256
            ctypes.memset(address, number, len(source))

    address = ctypes.addressof(ctypes.c_char.from_buffer(source))
    thread = threading.Thread(target=write)
    thread.start()
    try:
        mixed = 0
        for _ in range(60):
            crc = checksum.copy_and_check(room.address, address, len(source))
            assert crc == zlib.crc32(room.memory)
            mixed += len(set(room.memory[::4096])) > 1
    finally:
        is_over.set()
        thread.join()
    assert mixed, "nobody wrote while it was copied"


@pytest.mark.parametrize("is_copying", [True, False])
def test_the_loop_lets_go_of_pythons_lock(*, is_copying: bool) -> None:
    keeps_lock = ctypes.PYFUNCTYPE(None)._flags_  # _ctypes' own mark of it
    lets_go = ctypes.CFUNCTYPE(None)._flags_
    assert lets_go != keeps_lock
    assert type(loop(is_copying=is_copying))._flags_ == lets_go


def all_is_well_without_the_loop() -> None:
    assert not checksum.is_checked_in_passing()
    copied(2 * MIB + 5)
    assert checksum.crc32(memoryview(bytearray(BYTES)), 7) == zlib.crc32(BYTES, 7)


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (platform, "machine", lambda: "aarch64"),
        (sys, "platform", "darwin"),
        (sys, "maxsize", 2**31 - 1),
        (checksum, "_processor_flags", lambda: {"avx2", "pclmulqdq"}),
        (checksum, "_processor_flags", lambda: {"vpclmulqdq"}),
    ],
)
def test_another_machine_works_the_usual_way(
    monkeypatch: pytest.MonkeyPatch, anew: Callable[[], None], module: Any, name: str, value: Any
) -> None:
    monkeypatch.setattr(module, name, value)
    anew()
    all_is_well_without_the_loop()


def test_what_the_processor_can_do_is_what_the_system_tells() -> None:
    told = what_the_system_tells()
    found = checksum._processor_flags()
    assert not found or all(f" {flag}" in told for flag in found)
    assert ("sse2" in found) >= IS_X86


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("c4c36544d811", "c4c36544d801"),  # one product of the wrong halves
        ("72f38ee8", "72f38ee9"),  # one bit of a constant
        ("c57de74f60", "c5fde74f60"),  # ymm1 is stored in ymm9's place
        ("c5796ec9", "c5796ec8"),  # what came before is left out
    ],
)
def test_code_that_is_wrong_is_not_used(
    monkeypatch: pytest.MonkeyPatch, anew: Callable[[], None], right: str, wrong: str
) -> None:
    loop()
    code = checksum._CODE.replace(bytes.fromhex(right), bytes.fromhex(wrong))
    assert code != checksum._CODE
    monkeypatch.setattr(checksum, "_CODE", code)
    anew()
    all_is_well_without_the_loop()


def test_code_that_writes_where_it_should_only_check_is_not_used(
    monkeypatch: pytest.MonkeyPatch, anew: Callable[[], None]
) -> None:
    loop(is_copying=False)
    monkeypatch.setattr(checksum, "_without_stores", lambda code: code)
    anew()
    assert checksum._folding(is_copying=False) is None
    assert checksum.crc32(memoryview(bytearray(BYTES))) == zlib.crc32(BYTES)


def test_a_system_that_forbids_it_works_the_usual_way() -> None:
    """As SELinux may: here a process that has given up the right to make memory executable."""
    script = """
import ctypes, zlib
from distckpt import checksum
PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
if ctypes.CDLL(None).prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) != 0:
    print("unknown")
else:
    source, target = ctypes.create_string_buffer(b"x" * (2 << 20)), ctypes.create_string_buffer(2 << 20)
    crc = checksum.copy_and_check(ctypes.addressof(target), ctypes.addressof(source), 2 << 20)
    print(checksum.is_checked_in_passing(), target.raw == b"x" * (2 << 20), crc == zlib.crc32(target.raw))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() == "unknown":
        pytest.skip("Linux before 6.3 has no such right to give up")
    assert done.stdout.strip() == "False True True"


@pytest.mark.parametrize("where", ["_loaded", "_is_right", "_processor_flags"])
@pytest.mark.parametrize("error", [OSError(errno.EACCES, os.strerror(errno.EACCES)), AttributeError("mprotect")])
def test_whatever_is_missing_it_works_the_usual_way(
    monkeypatch: pytest.MonkeyPatch, anew: Callable[[], None], where: str, error: Exception
) -> None:
    loop()

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(checksum, where, refuse)
    anew()
    all_is_well_without_the_loop()
