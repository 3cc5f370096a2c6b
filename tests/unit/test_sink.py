"""The way of a file's bytes to the operating system: gathered, whole, and with the first error kept."""

import array
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from distckpt.storage import buffered_writer as sink_module
from distckpt.storage.buffered_writer import Sink

GATHERED_BYTES = sink_module._BUFFER_BYTES


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


@pytest.fixture
def descriptor(path: Path) -> Iterator[int]:
    with path.open("wb") as file:
        yield file.fileno()


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the writes that reach the operating system."""
    seen: list[int] = []
    write = os.write

    def noting(fd: int, data: bytes) -> int:
        seen.append(len(data))
        return write(fd, data)

    monkeypatch.setattr(os, "write", noting)
    return seen


def test_small_writes_are_gathered_until_flushed(path: Path, descriptor: int, sizes: list[int]) -> None:
    sink = Sink(descriptor)
    for _ in range(10):
        assert sink.write(b"abc") == 3
    assert sizes == []
    assert sink.num_bytes == 30
    sink.flush()
    assert sizes == [30]
    assert path.read_bytes() == b"abc" * 10


def test_a_large_write_goes_through_after_what_was_gathered(path: Path, descriptor: int, sizes: list[int]) -> None:
    sink = Sink(descriptor)
    sink.write(b"head")
    sink.write(bytes(GATHERED_BYTES))
    sink.write(b"tail")
    sink.flush()
    assert sizes == [4, GATHERED_BYTES, 4]
    assert path.read_bytes() == b"head" + bytes(GATHERED_BYTES) + b"tail"
    assert sink.num_bytes == path.stat().st_size


def test_any_buffer_is_taken_by_its_bytes(path: Path, descriptor: int) -> None:
    sink = Sink(descriptor)
    assert sink.write(memoryview(array.array("d", [0.5, -2.0]))) == 16
    assert sink.write(bytearray(b"xy")) == 2
    sink.flush()
    assert path.read_bytes() == array.array("d", [0.5, -2.0]).tobytes() + b"xy"


def test_flushing_nothing_writes_nothing(descriptor: int, sizes: list[int]) -> None:
    Sink(descriptor).flush()
    assert sizes == []


def test_short_writes_are_continued(path: Path, descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    sink = Sink(descriptor)
    sink.write(b"0123456789")
    sink.flush()
    assert path.read_bytes() == b"0123456789"


def test_a_write_that_takes_nothing_is_an_error_and_no_endless_loop(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", lambda _fd, _data: 0)
    sink = Sink(descriptor)
    sink.write(b"content")
    with pytest.raises(OSError, match="took no bytes") as caught:
        sink.flush()
    assert caught.value.errno == errno.EIO


def test_nothing_is_written_after_a_failure(path: Path, descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's writer turns the error into one of its own and goes on to write the file's end: it must not arrive.
    failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(_fd: int, _data: bytes) -> int:
        raise failure

    sink = Sink(descriptor)
    with monkeypatch.context() as broken:
        broken.setattr(os, "write", refuse)
        with pytest.raises(OSError, match="No space left") as first:
            sink.write(bytes(GATHERED_BYTES + 1))
    with pytest.raises(OSError, match="No space left") as second:
        sink.write(bytes(GATHERED_BYTES + 1))
    assert first.value is second.value is sink.error is failure
    assert path.read_bytes() == b""
