"""O_DIRECT and what it cannot write; many chunks in one call, in C or in Python; BufferedWriter."""

import array
import contextlib
import ctypes
import errno
import itertools
import mmap
import os
import random
import resource
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from distckpt.storage import direct_io
from distckpt.storage.base import BLOCK_BYTES, Chunk
from distckpt.storage.direct_io import BufferedWriter, DirectFile, find_difference, has_hole

BUILT: Any = vars(direct_io)["_native"]
WAYS = {"as built": BUILT, "no extension": None}
needs_extension = pytest.mark.skipif(BUILT is None, reason="built without the C extension")
MIB = 1 << 20
DATA = random.Random(4).randbytes(4 * MIB)
CONTENT = DATA[:MIB]
GATHERED_BYTES = direct_io._BUFFER_BYTES


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[int, DirectFile]]:
    parent = os.open(path.parent, os.O_RDONLY)
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    with contextlib.closing(DirectFile(fd, parent, path.name)) as direct:
        yield fd, direct
    os.close(fd)
    os.close(parent)


def aligned(num_bytes: int) -> memoryview:
    memory = memoryview(mmap.mmap(-1, num_bytes))
    memory[:] = DATA[:num_bytes]
    return memory


# -- many chunks -------------------------------------------------------------------------------------


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with the native code that is here, and without any."""
    monkeypatch.setattr(direct_io, "_native", WAYS[request.param])
    return str(request.param)


def blocks_of(memory: memoryview) -> list[Chunk]:
    """Every second block first, so that offsets neither ascend nor join."""
    begins = range(0, len(memory), BLOCK_BYTES)
    return [Chunk(at, memory[at : at + BLOCK_BYTES]) for at in (*begins[::2], *begins[1::2])]


@pytest.mark.usefixtures("way")
def test_chunks_of_every_alignment_are_written_checked_and_found_whole(tmp_path: Path) -> None:
    dice, memory = random.Random(5), aligned(MIB)
    cuts = sorted({0, MIB, *(BLOCK_BYTES * dice.randrange(256) for _ in range(60)), *dice.choices(range(MIB), k=60)})
    chunks = [Chunk(begin, memory[begin:end]) for begin, end in itertools.pairwise(cuts)]
    chunks = [one._replace(data=bytes(one.data)) if dice.random() < 0.3 else one for one in chunks]
    dice.shuffle(chunks)
    chunks.insert(7, Chunk(BLOCK_BYTES, memory[:0]))
    with opened(tmp_path / "a") as (fd, direct):
        direct.write_chunks(chunks)
        direct.write_chunks([])
        assert (tmp_path / "a").read_bytes() == CONTENT
        assert find_difference(fd, chunks) is None
        assert find_difference(fd, []) is None
        for wrong in (0, 40, len(chunks) - 1):
            offset, data = chunks[wrong]
            os.pwrite(fd, bytes([data[-1] ^ 1]), offset + len(data) - 1)
            assert find_difference(fd, chunks) is chunks[wrong]
            os.pwrite(fd, data[-1:], offset + len(data) - 1)
        longer = Chunk(MIB - 1, CONTENT[-1:] + b"!")
        assert find_difference(fd, [*chunks, longer]) is longer


@pytest.mark.usefixtures("way")
def test_a_large_chunk_is_compared_to_its_last_byte(tmp_path: Path) -> None:
    content = CONTENT * 9
    (tmp_path / "a").write_bytes(content)
    with opened(tmp_path / "a") as (fd, _):
        assert find_difference(fd, [Chunk(0, content)]) is None
        os.pwrite(fd, bytes([content[-1] ^ 1]), len(content) - 1)
        assert find_difference(fd, [Chunk(5, b""), Chunk(0, content)]) == Chunk(0, content)


@pytest.mark.usefixtures("way")
def test_a_hole_is_found_in_the_range_that_has_it(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as (fd, direct):
        os.ftruncate(fd, 40 * BLOCK_BYTES)
        written = [(begin * BLOCK_BYTES, (begin + 2) * BLOCK_BYTES) for begin in range(0, 40, 4)]
        direct.write_chunks([Chunk(begin, aligned(end - begin)) for begin, end in written])
        assert not has_hole(fd, written)
        assert not has_hole(fd, [])
        for number in range(10):
            begin, end = written[number]
            grown = [*written[:number], (begin, end + 1), *written[number + 1 :]]
            assert has_hole(fd, grown)
            assert has_hole(fd, [(begin, end), (end, end + 1)])
        end = 40 * BLOCK_BYTES
        for past in ([(end, end + 1)], [(2 * end, 3 * end)], [written[0], (end, end + 1)], [(end - 1, end + 1)]):
            assert has_hole(fd, past), "past the end nothing was written"
        assert not has_hole(fd, [(end, end), (2 * end, end)])
    read, other = os.pipe()
    assert not has_hole(read, [(0, 1)]), "a file system that cannot tell"
    os.close(read)
    os.close(other)


@pytest.mark.usefixtures("way")
def test_an_error_of_one_chunk_is_raised_and_later_ones_are_not_written(tmp_path: Path) -> None:
    memory = aligned(64 * BLOCK_BYTES)
    with opened(tmp_path / "a") as (fd, direct):
        chunks = [Chunk(at, memory[at : at + BLOCK_BYTES]) for at in range(0, len(memory), BLOCK_BYTES)]
        later = chunks.pop(3)
        chunks.append(later)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10 * BLOCK_BYTES + 1000, before[1]))  # Python ignores SIGXFSZ
        try:
            with pytest.raises(OSError, match="File too large"):
                direct.write_chunks(chunks)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        expected = bytearray(CONTENT[: 10 * BLOCK_BYTES])
        expected[later.offset : later.offset + BLOCK_BYTES] = bytes(BLOCK_BYTES)
        assert (tmp_path / "a").read_bytes()[: 10 * BLOCK_BYTES] == expected
        assert os.fstat(fd).st_size <= 10 * BLOCK_BYTES + 1000


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("path", "flags", "text"), [("/dev/full", os.O_RDWR, "No space"), ("/dev/null", 0, "Bad file")]
)
def test_a_file_that_takes_nothing_is_an_error(path: str, flags: int, text: str) -> None:
    fd = os.open(path, flags)
    with contextlib.closing(DirectFile(fd, -1, "none")) as direct, pytest.raises(OSError, match=text):
        direct.write_chunks(blocks_of(aligned(MIB)))
    os.close(fd)


@pytest.mark.usefixtures("way")
def test_where_o_direct_is_refused_after_all_the_page_cache_is_used(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as (_, direct):
        direct._direct = os.open("/proc/self/oom_score_adj", os.O_WRONLY)  # EINVAL for what is no number
        with pytest.raises(OSError, match="Invalid argument"):
            os.pwrite(direct._direct, CONTENT[:BLOCK_BYTES], 0)
        direct.write_chunks(blocks_of(aligned(MIB)))
    assert (tmp_path / "a").read_bytes() == CONTENT


@pytest.mark.usefixtures("way")
def test_aligned_memory_is_written_with_o_direct_and_bytes_never_are(tmp_path: Path) -> None:
    memory = aligned(MIB)
    chunks = blocks_of(memory)
    taken = [
        chunk._replace(data=bytes(chunk.data)) if number % 3 == 0 else chunk for number, chunk in enumerate(chunks)
    ]
    other = os.open(tmp_path / "direct", os.O_RDWR | os.O_CREAT)
    os.ftruncate(other, MIB)
    with opened(tmp_path / "a") as (fd, direct):
        os.ftruncate(fd, MIB)
        direct._direct = other  # another file, to tell the ways apart
        direct.write_chunks(taken)
    for chunk in taken:
        names = ["a", "direct"] if isinstance(chunk.data, bytes) else ["direct", "a"]
        written, left = ((tmp_path / name).read_bytes()[chunk.offset :][:BLOCK_BYTES] for name in names)
        assert written == chunk.data
        assert left == bytes(BLOCK_BYTES)


@needs_extension
def test_a_thread_that_writes_chunks_does_not_wait_for_the_gil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libc = ctypes.PyDLL(None)  # PyDLL keeps the GIL, as an optimizer's step does
    content = CONTENT[: MIB // 4]
    chunks = blocks_of(aligned(len(content)))

    def is_written_meanwhile(limit_s: float) -> bool:
        """Whether all chunks are written while this thread keeps the GIL, once the first one is."""
        found = ctypes.create_string_buffer(len(content))
        with opened(tmp_path / "a") as (fd, direct):
            os.ftruncate(fd, 0)
            thread = threading.Thread(target=direct.write_chunks, args=(chunks,))
            thread.start()
            while not os.fstat(fd).st_size:
                time.sleep(0.001)
            deadline = time.monotonic() + limit_s
            while found.raw != content and time.monotonic() < deadline:
                libc.usleep(1000)
                libc.pread(fd, found, ctypes.c_size_t(len(content)), ctypes.c_long(0))
            is_written = found.raw == content
            thread.join()
        assert (tmp_path / "a").read_bytes() == content
        return is_written

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(600.0)  # this thread has to offer the GIL, and is not asked for it
    try:
        assert is_written_meanwhile(limit_s=60.0)
        monkeypatch.setattr(direct_io, "_native", None)
        assert not is_written_meanwhile(limit_s=1.0)
    finally:
        sys.setswitchinterval(interval_s)


@needs_extension
@pytest.mark.parametrize("wrong", [(0,), [0, b"x"], (0, b"x", 1), ("0", b"x"), (0, "x"), (1 << 70, b"x"), (0, None)])
def test_what_is_no_chunk_is_refused(tmp_path: Path, wrong: object) -> None:
    with opened(tmp_path / "a") as (fd, _), pytest.raises((TypeError, OverflowError)):
        BUILT.write(fd, -1, [(0, b"first"), wrong])
    assert (tmp_path / "a").read_bytes() == b""


# -- O_DIRECT ----------------------------------------------------------------------------------------


def write_each(path: Path, pieces: list[tuple[int, memoryview]]) -> bytes:
    with opened(path) as (_, direct):
        for offset, data in pieces:
            direct.write(data, offset)
    return path.read_bytes()


def test_aligned_and_unaligned_ranges_are_written(tmp_path: Path) -> None:
    data = aligned(3 * MIB + 123)
    pieces = [(MIB, data[MIB:]), (0, data[:MIB])]
    assert write_each(tmp_path / "a", pieces) == bytes(data)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_file_system_without_o_direct_is_written_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real = os.open

    def refuse(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_DIRECT:
            raise OSError(code, os.strerror(code))
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refuse)
    data = aligned(10_000)
    assert write_each(tmp_path / "a", [(0, data)]) == bytes(data)


def test_file_system_with_another_alignment_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, refused = os.pwrite, list[int]()

    def refuse(fd: int, data: memoryview, offset: int) -> int:
        if not refused:
            refused.append(offset)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse)
    data = aligned(10_000)
    assert write_each(tmp_path / "a", [(0, data)]) == bytes(data)
    assert refused == [0]


@pytest.mark.parametrize("most", [1, 1000, 4096, 5000])
def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, bytes(data[:most]), offset))
    data = aligned(9_000)
    with opened(tmp_path / "a") as (fd, _), contextlib.closing(DirectFile(fd, -1, "missing")) as direct:
        direct.write(data, 0)
    assert (tmp_path / "a").read_bytes() == bytes(data)


def test_write_of_zero_bytes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OSError, match="took no bytes"):
        write_each(tmp_path / "a", [(0, aligned(8192))])


def test_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_each(tmp_path / "a", [(0, aligned(8192))])


# -- gathered writes ---------------------------------------------------------------------------------


@dataclass
class Target:
    """A file that notes the size of each write."""

    content: bytearray = field(default_factory=bytearray)
    sizes: list[int] = field(default_factory=list)

    def write(self, chunks: Sequence[Chunk]) -> None:
        for offset, data in chunks:
            assert offset == len(self.content)
            self.content += data
            self.sizes.append(len(data))


@pytest.fixture
def target() -> Target:
    return Target()


def test_small_writes_are_gathered_until_flushed(target: Target) -> None:
    writer = BufferedWriter(target.write)
    for _ in range(10):
        assert writer.write(b"abc") == 3
    assert target.sizes == []
    assert writer.num_bytes == 30
    writer.flush()
    assert target.sizes == [30]
    assert target.content == b"abc" * 10


def test_a_large_write_goes_through_after_what_was_gathered(target: Target) -> None:
    writer = BufferedWriter(target.write)
    writer.write(b"head")
    writer.write(bytes(GATHERED_BYTES))
    writer.write(b"tail")
    writer.flush()
    assert target.sizes == [4, GATHERED_BYTES, 4]
    assert target.content == b"head" + bytes(GATHERED_BYTES) + b"tail"
    assert writer.num_bytes == len(target.content)


def test_any_buffer_is_taken_by_its_bytes(target: Target) -> None:
    writer = BufferedWriter(target.write)
    assert writer.write(memoryview(array.array("d", [0.5, -2.0]))) == 16
    assert writer.write(bytearray(b"xy")) == 2
    writer.flush()
    assert target.content == array.array("d", [0.5, -2.0]).tobytes() + b"xy"


def test_flushing_nothing_writes_nothing(target: Target) -> None:
    BufferedWriter(target.write).flush()
    assert target.sizes == []


def test_nothing_is_written_after_a_failure() -> None:
    # torch's writer replaces the error by one of its own and goes on to write the file's end: it must not arrive.
    failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    calls: list[int] = []

    def refuse(chunks: Sequence[Chunk]) -> None:
        calls.append(chunks[0].offset)
        raise failure

    writer = BufferedWriter(refuse)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left") as caught:
            writer.write(bytes(GATHERED_BYTES + 1))
        assert caught.value is writer.error is failure
    assert calls == [0]
