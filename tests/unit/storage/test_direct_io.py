"""BufferedWriter gathers small writes, passes large ones on, and keeps the first error."""

import array
import errno
import os
from dataclasses import dataclass, field

import pytest

from distckpt.storage import direct_io
from distckpt.storage.direct_io import BufferedWriter

GATHERED_BYTES = direct_io._BUFFER_BYTES


@dataclass
class Target:
    """A file that notes the size of each write."""

    content: bytearray = field(default_factory=bytearray)
    sizes: list[int] = field(default_factory=list)

    def write(self, data: memoryview, offset: int) -> None:
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

    def refuse(_data: memoryview, offset: int) -> None:
        calls.append(offset)
        raise failure

    writer = BufferedWriter(refuse)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left") as caught:
            writer.write(bytes(GATHERED_BYTES + 1))
        assert caught.value is writer.error is failure
    assert calls == [0]
