"""Bytes are brought by one thread and read by another, which gets them as they come, whoever brings them."""

import errno
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from distckpt.storage.ahead import ReadAhead, in_turns

SIZE = (70 << 20) + 5
DATA = random.Random(5).randbytes(1 << 20)


def expected() -> bytes:
    return (DATA * (SIZE // len(DATA) + 1))[:SIZE]


@pytest.fixture
def cold(tmp_path: Path) -> Iterator[int]:
    """Return a file of which nothing is in the page cache, where the file system can forget."""
    path = tmp_path / "a"
    path.write_bytes(expected())
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    yield fd
    os.close(fd)


def all_of(ahead: ReadAhead) -> bytes:
    memory, found, at = memoryview(bytearray(1 << 20)), [], 0
    while num_bytes := ahead.read(memory[: min(len(memory), SIZE + 9 - at)], at):
        found.append(bytes(memory[:num_bytes]))
        at += num_bytes
    return b"".join(found)


@pytest.mark.parametrize(
    "ranges",
    [
        [(0, SIZE)],
        in_turns(SIZE, 0.0),
        in_turns(SIZE, 0.5),
        [(SIZE // 2, SIZE), (0, SIZE // 2)],
        [(0, 20 << 20)],
        [(SIZE + 5, 2 * SIZE)],
        [],
    ],
    ids=["in order", "in turns, first", "in turns, second", "end first", "a part", "past the end", "nothing"],
)
def test_what_is_read_is_the_file_s_whatever_is_brought_and_when(cold: int, ranges: Sequence[tuple[int, int]]) -> None:
    with ReadAhead(cold, ranges) as ahead:
        assert all_of(ahead) == expected()
    memory = memoryview(bytearray(100))
    assert ahead.read(memory, 7) == 100, "after the end it reads by itself"
    assert bytes(memory) == expected()[7:107]


def test_the_reader_takes_what_another_has_brought(cold: int) -> None:
    """A thread that is stopped half-way, in the place of a process that does so."""
    with ReadAhead(cold, [(0, SIZE)]):
        assert len(os.pread(cold, SIZE, 0)) == SIZE
    with ReadAhead(cold, in_turns(SIZE, 0.5)) as ahead:
        assert all_of(ahead) == expected()


def test_a_file_system_that_cannot_tell_what_is_there_is_read_all_the_same(
    cold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, preadv = [], os.preadv

    def refuse(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags:
            asked.append(flags)
            raise OSError(errno.EOPNOTSUPP, "no such flag here")
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    with ReadAhead(cold, [(0, SIZE)]) as ahead:
        assert all_of(ahead) == expected()
    assert asked == [os.RWF_NOWAIT], "asked once"


def test_what_was_not_there_when_it_was_asked_for_is_read_when_it_came(
    cold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, preadv = [0], os.preadv

    def late(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        asked[0] += bool(flags)
        if flags and asked[0] % 3 == 0:
            raise BlockingIOError
        if flags and asked[0] % 3 == 1:
            return preadv(fd, [buffers[0][:100]], offset)  # a part of it is there
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", late)
    with ReadAhead(cold, [(0, SIZE)]) as ahead:
        assert all_of(ahead) == expected()


def test_where_the_system_does_not_open_it_twice_the_reader_reads(cold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Any, *_: Any) -> int:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "open", refuse)
    with ReadAhead(cold, [(0, SIZE)]) as ahead:
        assert all_of(ahead) == expected()


def test_reading_ahead_of_what_cannot_be_read_ends_and_the_reader_hears_of_it(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    with ReadAhead(fd, [(0, 1 << 30)]) as ahead, pytest.raises(IsADirectoryError):
        ahead.read(memoryview(bytearray(10)), 0)
    os.close(fd)


@pytest.mark.parametrize("part", [0.0, 0.125, 0.5, 0.75, 0.999])
@pytest.mark.parametrize(
    "num_bytes", [0, 1, 4096, (64 << 20) - 1, 64 << 20, (64 << 20) + 1, 1 << 30, (1 << 33) + 12345]
)
def test_turns_bring_each_byte_once(num_bytes: int, part: float) -> None:
    ranges = in_turns(num_bytes, part)
    at = 0
    for begin, end in sorted(ranges):
        assert begin == at < end
        at = end
    assert at == num_bytes
    lead = [abs(begin - done) for done, (begin, _) in zip(_sums(ranges), ranges, strict=True)]
    assert max(lead, default=0) <= 64 << 20, "the order is the file's, but for a window"


def _sums(ranges: Sequence[tuple[int, int]]) -> Iterator[int]:
    done = 0
    for begin, end in ranges:
        yield done
        done += end - begin
