"""The code in C, compiled anew from its source: every kernel that this processor can run, and what a build does."""

import ctypes
import importlib.machinery
import importlib.util
import mmap
import os
import platform
import random
import sys
import sysconfig
import threading
import zlib
from array import array
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from ci import build_native

KIB, MIB = 1 << 10, 1 << 20
BYTES = random.Random(1).randbytes(2 * MIB)
BLOCKS = {"avx512": 256, "avx2": 128, "pmull": 64}
FLAGS = {"avx512": {"avx512f", "avx512vl", "vpclmulqdq"}, "avx2": {"avx2", "vpclmulqdq"}, "pmull": {"pmull"}}


def flags_of_the_processor() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    return set(next(line for line in lines if line.lower().startswith(("flags", "features"))).split())


KERNELS = [name for name, flags in FLAGS.items() if flags <= flags_of_the_processor()]


def loaded(path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader("copy_crc", str(path))
    spec = importlib.util.spec_from_file_location("copy_crc", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def copy_crc(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return the module, of which the compiler has no complaints."""
    result = tmp_path_factory.mktemp("native") / "copy_crc.abi3.so"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CFLAGS", "-Werror")
        assert build_native.compile_to(result) is None
        assert [path.name for path in result.parent.iterdir()] == [result.name]
        for name in build_native.NAMES[1:]:
            assert build_native.compile_to(result.with_name(f"{name}.abi3.so")) is None
    return loaded(result)


class Room:
    """Memory of a known content, which begins on a page's border."""

    def __init__(self, num_bytes: int) -> None:
        self.memory = mmap.mmap(-1, num_bytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        ctypes.memset(self.address, 0xA5, num_bytes)


ORIGIN = ctypes.create_string_buffer(BYTES, len(BYTES))


def copy(copy_crc: ModuleType, room: Room, to: int, source: int, num_bytes: int, kernel: str | None = None) -> int:
    """Copy bytes from an address, and return their CRC-32."""
    rows, crcs = array("q", [0, 0, to, num_bytes]), array("q", [-1])
    copy_crc.copy_rows(room.memory, 0, array("Q", [source]), rows, 0, 1, crcs, kernel)
    return crcs[0]


def copied(copy_crc: ModuleType, kernel: str, num_bytes: int, *, to: int, source: int) -> None:
    """Copy and check; compare the CRC-32, the copy, and the memory around it."""
    room = Room(to + num_bytes + 512)
    crc = copy(copy_crc, room, to, ctypes.addressof(ORIGIN) + source, num_bytes, kernel)
    assert crc == zlib.crc32(BYTES[source : source + num_bytes])
    assert room.memory[:] == b"\xa5" * to + BYTES[source : source + num_bytes] + b"\xa5" * 512


def test_the_kernels_are_those_of_this_processor(copy_crc: ModuleType) -> None:
    assert list(copy_crc.KERNELS) == KERNELS


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_length_is_copied_and_checked(copy_crc: ModuleType, kernel: str) -> None:
    dice = random.Random(2)
    for num_bytes in range(5 * BLOCKS[kernel] + 2):
        to, source, before = dice.randrange(300), dice.randrange(4096), dice.randrange(1 << 32)
        copied(copy_crc, kernel, num_bytes, to=to, source=source)
        data = BYTES[source : source + num_bytes]
        assert copy_crc.check(data, before, kernel) == zlib.crc32(data, before)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_alignment_is_copied_and_checked(copy_crc: ModuleType, kernel: str) -> None:
    for at in range(130):
        for num_bytes in (BLOCKS[kernel], 3 * BLOCKS[kernel] + 1, 5000 + at):
            copied(copy_crc, kernel, num_bytes, to=at, source=0)
            copied(copy_crc, kernel, num_bytes, to=0, source=at)
            copied(copy_crc, kernel, num_bytes, to=at, source=at)


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_ranges_are_copied_and_checked(copy_crc: ModuleType, kernel: str) -> None:
    dice = random.Random(3)
    for _ in range(40):
        num_bytes, to, source = dice.randrange(MIB), dice.randrange(5000), dice.randrange(MIB)
        copied(copy_crc, kernel, num_bytes, to=to, source=source)
        view = memoryview(BYTES)[source : source + num_bytes]
        assert copy_crc.check(view, 7, kernel) == zlib.crc32(view, 7)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_single_bit_counts(copy_crc: ModuleType, kernel: str) -> None:
    data = bytearray(BYTES[: 3 * BLOCKS[kernel] + 5])
    seen = {copy_crc.check(data, 0, kernel)}
    for at in range(8 * len(data)):
        data[at // 8] ^= 1 << at % 8
        seen.add(copy_crc.check(data, 0, kernel))
        data[at // 8] ^= 1 << at % 8
    assert len(seen) == 8 * len(data) + 1  # CRC-32 tells all single bits apart at this length


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_crc_is_of_the_copy_even_if_a_thread_changes_the_source(copy_crc: ModuleType, kernel: str) -> None:
    source, room, is_over = bytearray(MIB + 77), Room(MIB + 77), threading.Event()
    address = ctypes.addressof(ctypes.c_char.from_buffer(source))

    def change() -> None:
        number = 0
        while not is_over.is_set():
            number = (number + 1) % 256
            ctypes.memset(address, number, len(source))

    thread = threading.Thread(target=change)
    thread.start()
    try:
        num_mixed = 0
        for _ in range(2000):
            crc = copy(copy_crc, room, 5, address, len(source) - 5, kernel)
            assert crc == zlib.crc32(room.memory[5:])
            num_mixed += len(set(room.memory[5::4096])) > 1
            if num_mixed > 20:
                break
    finally:
        is_over.set()
        thread.join()
    assert num_mixed, "no copy met a change"


def _is_met(work: Callable[[], object]) -> bool:
    """Return True if another thread ran while `work` did, though no thread is asked to yield."""
    begun, met = threading.Event(), list[bool]()
    is_done = False

    def run() -> None:
        begun.wait(timeout=30)
        met.append(not is_done)

    thread = threading.Thread(target=run)
    thread.start()
    begun.set()  # it can only go on once this thread releases the GIL
    work()
    is_done = True
    thread.join()
    return met[0]


@pytest.mark.parametrize(("num_bytes", "is_released"), [(len(BYTES), True), (KIB, False)])
def test_the_gil_is_released_to_copy_and_to_check_much(
    copy_crc: ModuleType, num_bytes: int, *, is_released: bool
) -> None:
    room, view = Room(len(BYTES)), memoryview(BYTES)[:num_bytes]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        assert any(_is_met(lambda: copy_crc.check(view)) for _ in range(200)) == is_released
        assert any(_is_met(lambda: copy(copy_crc, room, 0, ctypes.addressof(ORIGIN), len(BYTES))) for _ in range(200))
    finally:
        sys.setswitchinterval(interval)


def test_a_kernel_that_is_not_there_is_an_error(copy_crc: ModuleType) -> None:
    with pytest.raises(LookupError, match="no kernel avx1024"):
        copy_crc.check(b"", 0, "avx1024")


TABLE = (bytearray(8), 0, array("Q", [0]), array("q", [0, 0, 0, 0]), 0, 1, array("q", [0]))


@pytest.mark.parametrize(
    ("at", "value"),
    [(0, "a"), (0, b"read-only"), (1, "b"), (2, 5), (3, None), (4, 1 << 70), (5, 0.5), (6, b"12345678")],
)
def test_arguments_that_are_none_are_errors(copy_crc: ModuleType, at: int, value: object) -> None:
    copy_crc.copy_rows(*TABLE)
    with pytest.raises((TypeError, OverflowError, BufferError)):
        copy_crc.copy_rows(*TABLE[:at], value, *TABLE[at + 1 :])
    with pytest.raises(TypeError):
        copy_crc.copy_rows(*TABLE[:at])
    TABLE[0].append(0)  # no error leaves a buffer in use
    TABLE[0].pop()


def test_a_table_without_room_for_checksums_is_an_error(copy_crc: ModuleType) -> None:
    with pytest.raises(ValueError, match="not as many rows"):
        copy_crc.copy_rows(*TABLE[:-1], array("q"))


def test_what_has_no_bytes_in_a_row_is_an_error(copy_crc: ModuleType) -> None:
    with pytest.raises(TypeError):
        copy_crc.check("text")
    with pytest.raises(BufferError):
        copy_crc.check(memoryview(BYTES)[::2])


def test_nothing_but_the_stable_abi_is_used() -> None:
    sources = sorted(build_native.FOLDER.glob("*.c"))
    assert [path.stem for path in sources] == sorted(build_native.NAMES)
    assert all("#define Py_LIMITED_API 0x030B0000" in path.read_text(encoding="ascii") for path in sources)
    assert build_native.TAG == "cp311-abi3"


# --- the build ---


def headers_missing(_: str) -> str:
    return "/nonexistent"


@pytest.mark.parametrize(
    ("module", "name", "value", "why"),
    [
        (sys, "platform", "darwin", "has no kernel"),
        (platform, "machine", lambda: "riscv64", "has no kernel"),
        (sys, "maxsize", 2**31 - 1, "has no kernel"),
        (sysconfig, "get_config_var", lambda name: int(name == "Py_GIL_DISABLED"), "without GIL"),
        (sysconfig, "get_path", headers_missing, "exit code"),
    ],
)
def test_where_it_cannot_be_compiled_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: ModuleType, name: str, value: object, why: str
) -> None:
    monkeypatch.setattr(module, name, value)
    reason = build_native.compile_to(tmp_path / "copy_crc.abi3.so")
    assert reason is not None
    assert why in reason
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("compiler", ["false", "/nonexistent/cc", "sh -c 'exit 3'"])
def test_without_a_compiler_what_was_there_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    result = tmp_path / "copy_crc.abi3.so"
    result.write_bytes(b"older")
    assert build_native.compile_to(result) is not None
    assert result.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [result]


def test_the_compiler_that_made_python_may_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sysconfig, "get_config_var", lambda _: "/build/clang-17 -pthread")
    assert build_native.find_compiler() == ["cc"]


def test_a_checkout_is_compiled_again_only_after_a_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = list[str]()
    for name in build_native.NAMES:
        (tmp_path / f"{name}.c").touch()
    monkeypatch.setattr(build_native, "FOLDER", tmp_path)

    def make(path: Path) -> None:
        made.append(path.name)
        path.touch()

    monkeypatch.setattr(build_native, "compile_to", make)
    for _ in range(2):
        assert build_native.build_in_place() is None
    assert made == ["copy_crc.abi3.so", "compare.abi3.so", "chunks.abi3.so"]
    later = (tmp_path / made[1]).stat().st_mtime + 1
    os.utime(tmp_path / "compare.c", (later, later))
    build_native.build_in_place()
    assert made[3:] == ["compare.abi3.so"]


def test_the_extension_that_cannot_be_compiled_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in build_native.NAMES:
        (tmp_path / f"{name}.c").touch()
    monkeypatch.setattr(build_native, "FOLDER", tmp_path)
    monkeypatch.setattr(build_native, "compile_to", lambda path: "no cc" if "compare" in path.name else None)
    assert build_native.build_in_place() == "compare.c: no cc"
