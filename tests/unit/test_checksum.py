"""Bytes that are copied and checked: right to the last bit, from and to any address, with native code and without.

``test_native.py`` tests each kernel by itself. This file also runs on installed wheels: see ci/check_wheel.py.
"""

import ctypes
import mmap
import random
import subprocess
import sys
import threading
import types
import zlib
from collections.abc import Callable
from typing import Any

import pytest

from distckpt import _checksum

KIB, MIB = 1 << 10, 1 << 20
BYTES = random.Random(1).randbytes(3 * MIB)
BUILT: Any = vars(_checksum)["_native"]
WAYS = {"as built": BUILT, "no extension": None, "no kernel": types.SimpleNamespace(KERNELS=())}


@pytest.fixture(params=WAYS, autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run each test with the native code that is here, without any, and with code that has nothing for this machine."""
    monkeypatch.setattr(_checksum, "_native", WAYS[request.param])
    return str(request.param)


class Room:
    """Memory of a known content, which begins on a page's border."""

    def __init__(self, num_bytes: int) -> None:
        self.memory = mmap.mmap(-1, num_bytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        ctypes.memset(self.address, 0xA5, num_bytes)


def copied(num_bytes: int, *, to: int = 0, source: int = 0) -> None:
    """Copy and check, and compare all of the memory around the target."""
    room, origin = Room(num_bytes + to + 4096), ctypes.create_string_buffer(BYTES, len(BYTES))
    crc = _checksum.copy_with_crc32(room.address + to, ctypes.addressof(origin) + source, num_bytes)
    assert crc == zlib.crc32(BYTES[source : source + num_bytes])
    assert room.memory[:to] == b"\xa5" * to
    assert room.memory[to : to + num_bytes] == BYTES[source : source + num_bytes]
    assert room.memory[to + num_bytes :] == b"\xa5" * 4096
    assert origin.raw == BYTES


LENGTHS = [0, 1, 7, 8, 63, 64, 127, 128, 129, 256, 383, 4095, 16 * KIB - 1, 16 * KIB, 16 * KIB + 1, MIB + 17]


@pytest.mark.parametrize("num_bytes", LENGTHS)
def test_every_length_is_copied(num_bytes: int) -> None:
    copied(num_bytes)


@pytest.mark.parametrize("source", [0, 1, 15, 64, 4095])
@pytest.mark.parametrize("to", [0, 1, 16, 32, 63, 4080])
def test_every_place_is_copied_to_and_from(to: int, source: int) -> None:
    copied(MIB + 12345, to=to, source=source)


def test_any_lengths_and_places() -> None:
    dice = random.Random(7)
    for number in range(50):
        to = dice.randrange(5000) if number % 2 else 32 * dice.randrange(150)
        copied(dice.randrange(2 * MIB if number % 3 else 5 * KIB), to=to, source=dice.randrange(MIB))


@pytest.mark.parametrize("num_bytes", LENGTHS)
@pytest.mark.parametrize("before", [0, 1, 0xFFFFFFFF, zlib.crc32(b"what came before")])
def test_what_is_checked_where_it_lies_stays_as_it_is(num_bytes: int, before: int) -> None:
    data = memoryview(bytearray(BYTES))
    for begin in (0, 1, 77):
        assert _checksum.crc32(data[begin : begin + num_bytes], before) == zlib.crc32(
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
    assert _checksum.crc32(BUFFERS[kind]()) == zlib.crc32(BYTES)


def test_a_view_with_gaps_is_no_buffer() -> None:
    with pytest.raises(BufferError):
        _checksum.crc32(memoryview(bytearray(BYTES))[::2])


def test_every_single_bit_counts() -> None:
    data = bytearray(BYTES[: 16 * KIB + 300])
    right = zlib.crc32(data)
    dice = random.Random(3)
    for at in [*range(600), *(dice.randrange(len(data)) for _ in range(600)), len(data) - 1]:
        bit = 1 << dice.randrange(8)
        data[at] ^= bit
        assert _checksum.crc32(memoryview(data)) != right
        data[at] ^= bit
    assert _checksum.crc32(memoryview(data)) == right


def test_parts_checked_one_by_one_make_up_the_whole() -> None:
    dice, parts, at = random.Random(5), [], 0
    origin, room = ctypes.create_string_buffer(BYTES, len(BYTES)), Room(MIB)
    while at < len(BYTES):
        num_bytes = min(dice.choice([0, 1, 128, 70_000, MIB]), len(BYTES) - at)
        parts.append((_checksum.copy_with_crc32(room.address, ctypes.addressof(origin) + at, num_bytes), num_bytes))
        at += num_bytes
    assert _checksum.combine_crc32(parts) == zlib.crc32(BYTES)


@pytest.mark.parametrize("distance", [0, 1, 4095, -1, -4095])
def test_ranges_that_overlap_are_refused(distance: int) -> None:
    room = Room(3 * 4096)
    with pytest.raises(ValueError, match="the ranges overlap"):
        _checksum.copy_with_crc32(room.address + 4096 + distance, room.address + 4096, 4096)
    assert room.memory[:] == b"\xa5" * (3 * 4096)


@pytest.mark.parametrize("distance", [4096, -4096])
def test_ranges_may_touch(distance: int) -> None:
    room = Room(3 * 4096)
    room.memory[4096:8192] = BYTES[:4096]
    to = 4096 + distance
    crc = _checksum.copy_with_crc32(room.address + to, room.address + 4096, 4096)
    assert crc == zlib.crc32(BYTES[:4096])
    assert room.memory[to : to + 4096] == BYTES[:4096]


def test_nothing_may_be_copied_onto_itself() -> None:
    room = Room(4096)
    assert _checksum.copy_with_crc32(room.address, room.address, 0) == 0


def test_less_than_nothing_is_refused() -> None:
    room = Room(2 * 4096)
    with pytest.raises(ValueError, match="must be 0 or more"):
        _checksum.copy_with_crc32(room.address, room.address + 4096, -1)


def test_several_threads_copy_at_once() -> None:
    room, origin = Room(len(BYTES) * 4), ctypes.create_string_buffer(BYTES, len(BYTES))
    barrier, found = threading.Barrier(4), set[int]()

    def work(number: int) -> None:
        barrier.wait(timeout=30)
        to = room.address + number * len(BYTES)
        found.add(_checksum.copy_with_crc32(to, ctypes.addressof(origin), len(BYTES)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert room.memory[:] == BYTES * 4
    assert found == {zlib.crc32(BYTES)}


def test_copies_are_checked_in_passing_where_there_is_a_kernel(way: str) -> None:
    has_kernel = way == "as built" and BUILT is not None and bool(BUILT.KERNELS)
    assert (_checksum.kernel_name() is not None) == has_kernel


@pytest.mark.parametrize("error", ["ImportError('wrong ELF class: ELFCLASS32')", "ModuleNotFoundError(name)"])
@pytest.mark.parametrize("way", ["as built"], indirect=True)
def test_an_extension_that_cannot_be_loaded_is_left_out(error: str) -> None:
    script = f"""
import ctypes, sys, zlib

class Finder:
    @staticmethod
    def find_spec(name, *_):
        if name == "distckpt._native.copy_crc":
            raise {error}

sys.meta_path.insert(0, Finder)
from distckpt import _checksum as checksum
source, target = ctypes.create_string_buffer(b"x" * 99999, 99999), ctypes.create_string_buffer(99999)
crc = checksum.copy_with_crc32(ctypes.addressof(target), ctypes.addressof(source), 99999)
print(checksum.kernel_name(), target.raw == b"x" * 99999, crc == zlib.crc32(target.raw) == checksum.crc32(target.raw))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["None", "True", "True"]
