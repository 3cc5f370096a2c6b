"""Bytes are brought by one thread and read by another, which gets them as they come, whoever brings them."""

import errno
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from distckpt.storage import readahead as module
from distckpt.storage.readahead import Readahead, is_cached
from distckpt.storage.readahead import staggered_ranges as ranges_of

SIZE = (20 << 20) + 5
LIMIT_S = 30.0
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


def all_of(ahead: Readahead) -> bytes:
    memory, found, at = memoryview(bytearray(1 << 20)), [], 0
    while num_bytes := ahead.read_into(memory[: min(len(memory), SIZE + 9 - at)], at):
        found.append(bytes(memory[:num_bytes]))
        at += num_bytes
    return b"".join(found)


@pytest.mark.parametrize(
    "ranges",
    [
        [(0, SIZE)],
        ranges_of(SIZE, 0.0),
        ranges_of(SIZE, 0.5),
        [(SIZE // 2, SIZE), (0, SIZE // 2)],
        [(0, 9 << 20)],
        [(SIZE + 5, 2 * SIZE)],
        [],
    ],
    ids=["in order", "in turns, first", "in turns, second", "end first", "a part", "past the end", "nothing"],
)
def test_what_is_read_is_the_file_s_whatever_is_brought_and_when(cold: int, ranges: Sequence[tuple[int, int]]) -> None:
    with Readahead(cold, ranges) as ahead:
        assert all_of(ahead) == expected()
    memory = memoryview(bytearray(100))
    assert ahead.read_into(memory, 7) == 100, "after the end it reads by itself"
    assert bytes(memory) == expected()[7:107]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Return what has to be set before anything is brought."""
    may_go_on, sendfile = threading.Event(), os.sendfile

    def late(out: int, fd: int, offset: int, count: int) -> int:
        may_go_on.wait(LIMIT_S)
        return sendfile(out, fd, offset, count)

    monkeypatch.setattr(os, "sendfile", late)
    yield may_go_on
    may_go_on.set()


def test_the_reader_takes_what_another_has_brought(cold: int, held: threading.Event) -> None:
    """Another thread, in the place of another process: the page cache is the machine's."""
    assert len(os.pread(cold, SIZE, 0)) == SIZE
    with Readahead(cold, ranges_of(SIZE, 0.5)) as ahead:
        assert all_of(ahead) == expected()
        assert not held.is_set(), "this one has brought nothing"
        held.set()


@pytest.mark.parametrize("error", [OSError(errno.EOPNOTSUPP, "not here"), NotImplementedError("preadv2")])
def test_what_cannot_tell_what_is_there_is_read_all_the_same(
    cold: int, held: threading.Event, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    asked, preadv = [], os.preadv

    def refuse(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags:
            asked.append(flags)
            held.set()
            raise error
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    with Readahead(cold, [(0, SIZE)]) as ahead:
        assert all_of(ahead) == expected()
    assert asked == [os.RWF_NOWAIT], "asked once"


def test_where_python_knows_no_such_flag_it_does_not_ask(cold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NO_WAIT", 0)
    with Readahead(cold, [(0, SIZE)]) as ahead:
        assert all_of(ahead) == expected()


@pytest.mark.parametrize("answer", ["nothing yet", "a part", "an end that is none"])
def test_what_was_not_there_when_it_was_asked_for_is_read_when_it_came(
    cold: int, held: threading.Event, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    asked, preadv = [0], os.preadv

    def late(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if not flags:
            return preadv(fd, buffers, offset)
        asked[0] += 1
        if asked[0] == 5:
            held.set()
        if asked[0] % 2:
            return preadv(fd, buffers, offset)
        if answer == "nothing yet":
            raise BlockingIOError
        return preadv(fd, [buffers[0][:100]], offset) if answer == "a part" else 0

    monkeypatch.setattr(os, "preadv", late)
    with Readahead(cold, [(0, SIZE)]) as ahead:
        assert all_of(ahead) == expected()
    assert asked[0] > 4


def test_a_thread_that_breaks_leaves_the_reading_to_the_reader(cold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda told_of: told.append(told_of.exc_type))

    def breaks(*_: Any) -> int:
        raise MemoryError

    monkeypatch.setattr(os, "sendfile", breaks)
    with Readahead(cold, [(0, SIZE)]) as ahead:
        assert all_of(ahead) == expected()
    assert told == [MemoryError]


def test_it_does_not_enlarge_the_kernel_s_own_windows(cold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    advice: set[int] = set()
    monkeypatch.setattr(os, "posix_fadvise", lambda _fd, _offset, _length, kind: advice.add(kind))
    with Readahead(cold, [(0, SIZE)]) as ahead:
        assert all_of(ahead) == expected()
    assert advice == {os.POSIX_FADV_RANDOM, os.POSIX_FADV_NORMAL}


@pytest.fixture
def brought(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return what becomes a list of what has been brought, in small steps and with a small lead."""
    monkeypatch.setattr(module, "_STEP_BYTES", 1 << 20)
    monkeypatch.setattr(module, "_LEAD_BYTES", 4 << 20)
    lengths, sendfile = [], os.sendfile

    def noting(out: int, fd: int, offset: int, count: int) -> int:
        num_bytes = sendfile(out, fd, offset, count)
        lengths.append(num_bytes)
        return num_bytes

    monkeypatch.setattr(os, "sendfile", noting)
    return lengths


@pytest.mark.parametrize("in_order", [True, False])
def test_it_goes_no_further_ahead_than_its_lead(cold: int, brought: list[int], *, in_order: bool) -> None:
    ranges = [(0, SIZE)] if in_order else ranges_of(SIZE, 0.5)
    memory = memoryview(bytearray(1 << 20))
    with Readahead(cold, ranges) as ahead:
        for at in (0, 5 << 20, 12 << 20):
            assert ahead.read_into(memory, at) == len(memory)
            deadline = time.monotonic() + 10
            while sum(brought) <= at + (4 << 20) and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)
            assert at + (4 << 20) < sum(brought) <= at + (6 << 20)
    assert sum(brought) <= 18 << 20, "it ends with its reader"


@pytest.mark.usefixtures("brought")
@pytest.mark.parametrize("order", [ranges_of(SIZE, 0.0), ranges_of(SIZE, 0.5), [(SIZE // 2, SIZE), (0, SIZE // 2)]])
def test_what_was_brought_and_had_to_give_way_is_read_again(
    cold: int, monkeypatch: pytest.MonkeyPatch, order: Sequence[tuple[int, int]]
) -> None:
    """As in a memory that is smaller than the file: nobody waits for what comes no more."""
    preadv = os.preadv

    def forgetful(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags and offset % (8 << 20) < 2 << 20:
            raise BlockingIOError
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", forgetful)
    with Readahead(cold, order) as ahead:
        assert all_of(ahead) == expected()


def test_where_the_system_does_not_open_it_twice_the_reader_reads(cold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Any, *_: Any) -> int:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "open", refuse)
    with Readahead(cold, [(0, SIZE)]) as ahead:
        assert all_of(ahead) == expected()


@pytest.mark.parametrize("missing", [None, 0, 12 << 20, 20 << 20])
def test_a_file_counts_as_cached_if_all_samples_are(
    tmp_path: Path, missing: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(expected())
    asked: list[int] = []

    def some(_fd: int, _buffers: Any, offset: int, flags: int) -> int:
        asked.append(offset)
        if offset == missing or not flags:
            raise BlockingIOError
        return 1

    monkeypatch.setattr(os, "preadv", some)
    monkeypatch.setattr(module, "_NO_WAIT", 8)
    assert is_cached(tmp_path / "a") == (missing is None)
    assert asked == list(range(0, SIZE if missing is None else missing + 1, 4 << 20))
    monkeypatch.setattr(module, "_NO_WAIT", 0)
    assert not is_cached(tmp_path / "a"), "the C library cannot tell"


def test_reading_ahead_of_what_cannot_be_read_ends_and_the_reader_hears_of_it(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    with Readahead(fd, [(0, 1 << 30)]) as ahead, pytest.raises(IsADirectoryError):
        ahead.read_into(memoryview(bytearray(10)), 0)
    os.close(fd)


@pytest.mark.parametrize("part", [0.0, 0.125, 0.5, 0.75, 0.999])
@pytest.mark.parametrize(
    "num_bytes", [0, 1, 4096, (64 << 20) - 1, 64 << 20, (64 << 20) + 1, 1 << 30, (1 << 33) + 12345]
)
def test_turns_bring_each_byte_once(num_bytes: int, part: float) -> None:
    ranges = ranges_of(num_bytes, part)
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
