"""A file system of our own whose power can be cut: ext4 or xfs in a file, behind a loop device.

The process that mounts it first calls `unshare_mounts`: no other process sees its mounts, and when the last process of
the namespace ends, even by a signal, the kernel unmounts them and frees the loop devices. So the tests of several
pytest-xdist workers do not disturb each other, and a kill leaves nothing behind.
"""

import contextlib
import ctypes
import fcntl
import os
import struct
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.support.limits import PROGRAM_LIMIT_S

__all__ = ["KINDS", "LoopDisk", "mounted_tmpfs", "must", "try_mounts", "unshare_mounts", "why_no_mounts"]

_CLONE_NEWNS = 0x20000  # linux/sched.h
_E2FSCK_REPAIRED = 3  # the bits of its exit code for errors that were repaired
# Less than 300 MiB is no xfs. Only what is written takes room.
_IMAGE_BYTES: Mapping[str, int] = {"ext4": 32 << 20, "xfs": 300 << 20}
KINDS: Sequence[str] = tuple(_IMAGE_BYTES)
"""File systems whose power can be cut."""
# EXT4_IOC_SHUTDOWN and EXT4_GOING_FLAGS_NOLOGFLUSH (linux: fs/ext4/ext4.h), the same for xfs (fs/xfs/xfs_fs.h): what
# has not reached the disk by now never will, the journal included.
_SHUTDOWN = 0x8004587D
_NO_LOG_FLUSH = struct.pack("I", 2)


def _command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=PROGRAM_LIMIT_S, check=False)


def unshare_mounts() -> None:
    """Move this thread, and the threads and processes that it starts from now on, into a mount namespace of its own.

    Raises:
        OSError: the kernel refuses.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    must("mount", "--make-rprivate", "/")


def why_no_mounts(directory: Path, *, kind: str = "ext4") -> str | None:
    """Try to mount; return the machine's error if it does not allow it, else None.

    Args:
        directory: where to try.
        kind: one of `KINDS`, in a file behind a loop device, or `tmpfs`.
    """
    script = 'mount -t tmpfs tmpfs "$1"'
    if kind in KINDS:
        make = f'truncate -s {_IMAGE_BYTES[kind]} "$1.image" && mkfs.{kind} -q "$1.image"'
        script = f'{make} && mount -o loop "$1.image" "$1"'
    return try_mounts(directory, kind, f'{script} && umount "$1"')


def try_mounts(directory: Path, what: str, script: str, *arguments: str) -> str | None:
    """Run a shell script that mounts and unmounts something; return the machine's error, or None if it worked.

    Args:
        directory: where to try.
        what: a new name in the directory.
        script: `$1` is an empty folder, and names that begin with its name are free.
        *arguments: `$2` and so on.
    """
    target = directory / f"probe-{what}"
    target.mkdir()
    try:
        done = _command(
            "unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", str(target), *arguments
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return None if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"


class LoopDisk:
    """A small file system.

    Args:
        directory: exists; holds the image and the mount point.
        kind: one of `KINDS`.

    Attributes:
        image: the file that contains it.
        root: the mount point.
    """

    def __init__(self, directory: Path, kind: str = "ext4") -> None:
        self.image, self.root = directory / "image", directory / "disk"
        self.root.mkdir()
        with self.image.open("wb") as image:
            image.truncate(_IMAGE_BYTES[kind])
        must(f"mkfs.{kind}", "-q", str(self.image))

    @contextlib.contextmanager
    def powered(self, image: Path | None = None) -> Iterator[Path]:
        """Mount it at the yielded path during the body, from `image` if one is given."""
        self.power_on(image)
        try:
            yield self.root
        finally:
            self.power_off()

    def power_on(self, image: Path | None = None) -> None:
        """Mount it, replaying its journal."""
        must("mount", "-o", "loop", str(image or self.image), str(self.root))

    def power_on_repaired(self, image: Path) -> bool:
        """Mount an image; repair it first with e2fsck if ext4 refuses it, and return True then.

        A half-written superblock of ext4 or of its journal says nothing about the checkpoints.
        """
        done = _command("mount", "-o", "loop", str(image), str(self.root))
        if done.returncode == 0:
            return False
        done = _command("e2fsck", "-fy", str(image))
        if done.returncode & ~_E2FSCK_REPAIRED:
            raise RuntimeError(f"e2fsck failed: {done.stdout.strip()} {done.stderr.strip()}")
        self.power_on(image)
        return True

    def power_off(self) -> None:
        """Unmount it."""
        must("umount", str(self.root))

    def cut(self) -> None:
        """Cut the power: later writes fail, and unwritten data are gone at the next `power_on`."""
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, _NO_LOG_FLUSH)
        finally:
            os.close(fd)


@contextlib.contextmanager
def mounted_tmpfs(directory: Path, size: str) -> Iterator[None]:
    """Mount a tmpfs of a limited size at `directory` during the body."""
    must("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory))
    try:
        yield
    finally:
        must("umount", str(directory))


def must(*words: str) -> None:
    """Run a command, and again while it reports a busy device: a process that still ends may use it."""
    deadline = time.monotonic() + PROGRAM_LIMIT_S
    while (done := _command(*words)).returncode != 0:
        if "busy" not in done.stderr or time.monotonic() > deadline:
            raise RuntimeError(f"{' '.join(words)} failed: {done.stderr.strip()}")
