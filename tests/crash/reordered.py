"""A disk that records its writes, and the states in which a power cut can leave it.

A disk may write unflushed blocks in any order, and half of a block. Here each write and each flush between a file
system and its disk is recorded (nbdkit, behind nbdfuse and a loop device), with the moments at which a save was
acknowledged. A state contains all flushed writes before some moment, and a random part of the unflushed ones. Call
`tests.crash.loop_disk.unshare_mounts` first.
"""

import contextlib
import os
import random
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.crash.loop_disk import LoopDisk, must, try_mounts
from tests.support.limits import PROGRAM_LIMIT_S

__all__ = ["RecordedDisk", "State", "why_no_recorder"]

_HEADER = struct.Struct("<cqq")
_WRITE, _FLUSH, _ACKNOWLEDGED = b"W", b"F", b"A"
_PLUGIN = Path(__file__).with_name("recorder.py")
_BLOCK, _SECTOR = 4096, 512
# Shares of the unflushed blocks that are lost, and of the rest that are half-written.
_LOST = (0.1, 0.5, 0.9)
_TORN = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A state of the disk after a power cut.

    Attributes:
        moment: number of writes and flushes before the power cut.
        acknowledged: the last step that had been acknowledged by then; 0 for none.
        num_blocks: number of blocks that were written and not flushed.
        num_lost: number of these that are lost.
        num_torn: number of these that are half-written.
        is_repaired: whether e2fsck had to repair the file system, because ext4 refused it.
    """

    moment: int
    acknowledged: int
    num_blocks: int
    num_lost: int
    num_torn: int
    is_repaired: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Event:
    kind: bytes
    number: int
    """The offset of a write, the step of an acknowledgement."""
    data: bytes


class RecordedDisk:
    """An ext4 whose writes are recorded.

    Args:
        directory: exists; holds images and mount points.
    """

    def __init__(self, directory: Path) -> None:
        self._disk = LoopDisk(directory)
        self._server, self._log = directory / "served", directory / "log"
        self._server.mkdir()
        self._log.touch()
        self._log_fd = os.open(self._log, os.O_WRONLY | os.O_APPEND)
        self._before = self._disk.image.read_bytes()
        self.root = self._disk.root

    def acknowledge(self, step: int) -> None:
        """Record that a step is acknowledged. Any process may call it."""
        os.write(self._log_fd, _HEADER.pack(_ACKNOWLEDGED, step, 0))

    @contextlib.contextmanager
    def recording(self) -> Iterator[Path]:
        """Mount it at the yielded path and record its writes during the body."""
        served = self._server / "disk"
        nbdkit = ["nbdkit", "--single", "python", str(_PLUGIN), f"image={self._disk.image}", f"log={self._log}"]
        server = subprocess.Popen(
            # It ends with this process, even if that is killed; nbdkit ends with nbdfuse.
            ["setpriv", "--pdeathsig", "KILL", "nbdfuse", str(served), "--command", *nbdkit],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            _await_file(served, server)
            with self._disk.powered(served):
                yield self.root
        finally:
            if server.poll() is None:
                must("umount", str(self._server))  # nbdfuse ends by it
            try:
                server.communicate(timeout=PROGRAM_LIMIT_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.communicate()

    def states(self, num: int, draw: random.Random) -> Iterator[State]:
        """Yield random states in the order of their moments; during the body the disk is mounted in that state."""
        events = list(_events_in(self._log))
        moments = sorted(draw.randint(1, len(events)) for _ in range(num))
        durable, pending, acknowledged, done = bytearray(self._before), list[_Event](), 0, 0
        for number, moment in enumerate(moments):
            for event in events[done:moment]:
                if event.kind == _WRITE:
                    pending.append(event)
                elif event.kind == _ACKNOWLEDGED:
                    acknowledged = event.number
                else:
                    for write in pending:
                        durable[write.number : write.number + len(write.data)] = write.data
                    pending.clear()
            done = moment
            left = bytearray(durable)
            lost, torn, blocks = _write_some(left, pending, draw)
            # A new file: a loop device that is still being removed would show the content of the last one.
            image = self._disk.image.with_name(f"state{number}")
            image.write_bytes(left)
            is_repaired = self._disk.power_on_repaired(image)
            try:
                yield State(
                    moment=moment,
                    acknowledged=acknowledged,
                    num_blocks=blocks,
                    num_lost=lost,
                    num_torn=torn,
                    is_repaired=is_repaired,
                )
            finally:
                self._disk.power_off()
            image.unlink()


def _write_some(image: bytearray, writes: list[_Event], draw: random.Random) -> tuple[int, int, int]:
    """Write a random part of some writes; return the numbers of lost, of torn and of all blocks."""
    share_lost = draw.choice(_LOST)
    lost = torn = blocks = 0
    for write in writes:
        for at in range(0, len(write.data), _BLOCK):
            block = write.data[at : at + _BLOCK]
            begin = write.number + at
            blocks += 1
            if draw.random() < share_lost:
                lost += 1
            elif draw.random() < _TORN:
                torn += 1
                for sector in range(0, len(block), _SECTOR):
                    if draw.random() < 0.5:
                        image[begin + sector : begin + sector + _SECTOR] = block[sector : sector + _SECTOR]
            else:
                image[begin : begin + len(block)] = block
    return lost, torn, blocks


def _events_in(log: Path) -> Iterator[_Event]:
    content = memoryview(log.read_bytes())
    at = 0
    while at < len(content):
        kind, number, length = _HEADER.unpack_from(content, at)
        at += _HEADER.size
        yield _Event(kind=kind, number=number, data=bytes(content[at : at + length]))
        at += length


def _await_file(path: Path, server: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + PROGRAM_LIMIT_S
    while not path.exists():
        if server.poll() is not None or time.monotonic() > deadline:
            server.kill()
            said = server.communicate()[1].decode(errors="replace").strip()
            raise RuntimeError(f"no disk can be recorded here: {said or 'nbdfuse does not answer'}")
        time.sleep(0.01)


def why_no_recorder(directory: Path) -> str | None:
    """Try to record; return the machine's error if it does not allow it, else None."""
    return try_mounts(directory, "recorder", _TRY, str(_PLUGIN))


_TRY = """
truncate -s 1M "$1.image" && touch "$1.log" || exit
setpriv --pdeathsig KILL nbdfuse "$1/disk" --command nbdkit --single python "$2" image="$1.image" log="$1.log" &
for _ in $(seq 100); do [ -e "$1/disk" ] && break; kill -0 $! || exit; sleep 0.05; done
loop="$(losetup --find --show "$1/disk")" && losetup --detach "$loop"
code=$?
umount "$1" && wait
exit $code
"""
