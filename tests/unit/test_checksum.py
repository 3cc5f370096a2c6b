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
from array import array
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


def copy_with_crc32(room: Room, to: int, source: int, num_bytes: int) -> int:
    """Copy bytes from an address, and return their CRC-32, if need be from the copy."""
    rows, crcs = array("q", [0, 0, to, num_bytes]), array("q", [-1])
    _checksum.copy_rows(memoryview(room.memory), 0, array("Q", [source]), rows, 0, 1, crcs)
    assert (crcs[0] < 0) == (_checksum.kernel_name() is None)
    return crcs[0] if crcs[0] >= 0 else zlib.crc32(room.memory[to : to + num_bytes])


def copied(num_bytes: int, *, to: int = 0, source: int = 0) -> None:
    """Copy and check, and compare all of the memory around the target."""
    room, origin = Room(num_bytes + to + 4096), ctypes.create_string_buffer(BYTES, len(BYTES))
    crc = copy_with_crc32(room, to, ctypes.addressof(origin) + source, num_bytes)
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
        parts.append((copy_with_crc32(room, 0, ctypes.addressof(origin) + at, num_bytes), num_bytes))
        at += num_bytes
    assert _checksum.combine_crc32(parts) == zlib.crc32(BYTES)


@pytest.mark.parametrize("distance", [0, 1, 4095, -1, -4095])
def test_ranges_that_overlap_are_refused(distance: int) -> None:
    room = Room(3 * 4096)
    rows, crcs = array("q", [0, 0, 0, 4096]), array("q", [-1])
    target, sources = memoryview(room.memory)[4096:8192], array("Q", [room.address + 4096 + distance])
    with pytest.raises(ValueError, match="row 0 does not fit, or overlaps the target"):
        _checksum.copy_rows(target, 0, sources, rows, 0, 1, crcs)
    assert room.memory[:] == b"\xa5" * (3 * 4096)


@pytest.mark.parametrize("distance", [4096, -4096])
def test_ranges_may_touch(distance: int) -> None:
    room = Room(3 * 4096)
    room.memory[4096:8192] = BYTES[:4096]
    to = 4096 + distance
    rows, crcs = array("q", [0, 4096, 100, 4096]), array("q", [-1])
    target = memoryview(room.memory)[to : to + 4096]
    _checksum.copy_rows(target, 100, array("Q", [room.address]), rows, 0, 1, crcs)
    assert room.memory[to : to + 4096] == BYTES[:4096]


def test_rows_are_copied_each_to_its_offset() -> None:
    dice, room = random.Random(11), Room(MIB)
    origins = [ctypes.create_string_buffer(dice.randbytes(size), size) for size in (1, 64, 5000, 64 * KIB, 70_000)]
    sources, rows, expected, at = array("Q", map(ctypes.addressof, origins)), array("q"), [], 1000
    while at < MIB - 80_000:
        source = dice.randrange(len(origins))
        begin = dice.randrange(len(origins[source]) + 1)
        num_bytes = dice.randrange(len(origins[source]) - begin + 1)
        rows.extend((source, begin, at, num_bytes))
        expected.append((at, origins[source].raw[begin : begin + num_bytes]))
        at += num_bytes + dice.randrange(70)
    crcs = array("q", [-1]) * len(expected)
    target = memoryview(room.memory)[1000:]
    _checksum.copy_rows(target, 1000, sources, rows, 1, len(expected) - 1, crcs)
    wanted = bytearray(b"\xa5" * MIB)
    for at, data in expected[1:-1]:
        wanted[at : at + len(data)] = data
    assert room.memory[:] == wanted
    known = [-1] * len(expected) if _checksum.kernel_name() is None else [zlib.crc32(data) for _, data in expected]
    assert list(crcs) == [-1, *known[1:-1], -1]


@pytest.mark.parametrize(
    "row",
    [(1, 0, 0, 8), (-1, 0, 0, 8), (0, -1, 0, 8), (0, 0, -1, 8), (0, 0, 4089, 8), (0, 0, 0, -1), (0, 0, 4097, 0)],
)
def test_a_row_that_does_not_fit_is_refused(row: tuple[int, int, int, int]) -> None:
    room, origin = Room(2 * 4096), ctypes.create_string_buffer(BYTES[:16], 16)
    rows, crcs = array("q", [0, 8, 8, 8, *row]), array("q", [-1, -1])
    with pytest.raises(ValueError, match="row 1 does not fit"):
        _checksum.copy_rows(memoryview(room.memory)[:4096], 0, array("Q", [ctypes.addressof(origin)]), rows, 0, 2, crcs)
    assert room.memory[:] == b"\xa5" * 8 + BYTES[8:16] + b"\xa5" * (2 * 4096 - 16)


@pytest.mark.parametrize(("first", "last"), [(-1, 1), (1, 0), (0, 2)])
def test_rows_that_are_not_there_are_refused(first: int, last: int) -> None:
    rows, crcs = array("q", [0, 0, 0, 0]), array("q", [-1])
    with pytest.raises(ValueError, match="there are not as many rows"):
        _checksum.copy_rows(memoryview(bytearray(8)), 0, array("Q", [0]), rows, first, last, crcs)


def test_several_threads_copy_at_once() -> None:
    room, origin = Room(len(BYTES) * 4), ctypes.create_string_buffer(BYTES, len(BYTES))
    barrier, found = threading.Barrier(4), set[int]()

    def work(number: int) -> None:
        barrier.wait(timeout=30)
        found.add(copy_with_crc32(room, number * len(BYTES), ctypes.addressof(origin), len(BYTES)))

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
from array import array

class Finder:
    @staticmethod
    def find_spec(name, *_):
        if name == "distckpt._native.copy_crc":
            raise {error}

sys.meta_path.insert(0, Finder)
from distckpt import _checksum as checksum
source, target, crcs = ctypes.create_string_buffer(b"x" * 99999, 99999), bytearray(99999), array("q", [-1])
sources, rows = array("Q", [ctypes.addressof(source)]), array("q", [0, 0, 0, 99999])
checksum.copy_rows(memoryview(target), 0, sources, rows, 0, 1, crcs)
print(checksum.kernel_name(), target == b"x" * 99999, crcs[0] == -1, zlib.crc32(target) == checksum.crc32(target))
"""
    # No import of the harness, and so of its limit: this file tests the installed wheel too, without the checkout.
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["None", "True", "True", "True"]
