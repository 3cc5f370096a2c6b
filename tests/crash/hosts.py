"""Two hosts and a link between them that can be cut: network namespaces, joined by veth pairs and a bridge in a third.

Each host has a boot id of its own, as two machines have, so that distckpt does not use shared memory between them. A
namespace exists while a process is in it: here a *keeper*, which ends with the process that started it. So a test
leaves nothing behind, even if it is killed, and the tests of several pytest-xdist workers do not disturb each other.
Needs root, and `ip` (Debian's iproute2).
"""

import contextlib
import ctypes
import itertools
import os
import select
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self, get_args

from tests.support.limits import PROGRAM_LIMIT_S

__all__ = ["CUTS", "INTERFACE", "Cut", "Hosts", "address_of", "enter"]

Cut = Literal["interface down on host A", "cable out at host B", "silent loss"]
"""How the link is cut. Host A's kernel notices the first, host B's the second. No kernel notices the third: the switch
drops all packets."""
CUTS: tuple[Cut, ...] = get_args(Cut)

INTERFACE = "wire"
"""The name of the link's end on each host."""

_NAMES = ("a", "b")
# Of linux, include/uapi/linux/sched.h.
_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_FIRST_PORT = 20_000  # below those that the system chooses


def address_of(host: int) -> str:
    """Return a host's address."""
    return f"10.73.0.{host + 1}"


def enter(namespaces: str) -> None:
    """Move this process onto a host. Call it before the process starts other threads, which would stay behind.

    Args:
        namespaces: one of :attr:`Hosts.namespaces`.

    Raises:
        OSError: the kernel refuses.
    """
    folder = Path.cwd()
    kinds = {"net": _CLONE_NEWNET, "mnt": _CLONE_NEWNS}
    descriptors = {name: os.open(f"{namespaces}/{name}", os.O_RDONLY) for name in kinds}
    for name, descriptor in descriptors.items():
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, kinds[name]) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), f"{namespaces}/{name}")
        os.close(descriptor)
    os.chdir(folder)  # the kernel moved it to the root


class Hosts:
    """Two hosts, A and B, whose link works until it is cut. A context; the hosts end with it.

    Attributes:
        namespaces: the argument of :func:`enter` for each host.
    """

    def __enter__(self) -> Self:
        """Make the hosts, and join them."""
        with contextlib.ExitStack() as stack:
            keepers = [stack.enter_context(_keeper()) for _ in range(1 + len(_NAMES))]
            self._switch, *self._hosts = (f"/proc/{pid}/ns" for pid in keepers)
            self.namespaces = tuple(self._hosts)
            self._ports = itertools.count(_FIRST_PORT)
            self._cut: Cut | None = None
            _ip(self._switch, "link", "add", "bridge", "type", "bridge", "stp_state", "0")
            _ip(self._switch, "link", "set", "bridge", "up")
            for number, (name, pid) in enumerate(zip(_NAMES, keepers[1:], strict=True)):
                port, other_end = f"port_{name}", ("type", "veth", "peer", "name", INTERFACE, "netns", str(pid))
                _ip(self._switch, "link", "add", port, *other_end)
                _ip(self._switch, "link", "set", port, "master", "bridge", "up")
                _ip(self._hosts[number], "address", "add", f"{address_of(number)}/24", "dev", INTERFACE)
                _ip(self._hosts[number], "link", "set", INTERFACE, "up")
            # Between two isolated ports a bridge drops all packets. A cut isolates port_b too.
            _ip(self._switch, "link", "set", "port_a", "type", "bridge_slave", "isolated", "on")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        """End the keepers; the kernel then removes the namespaces."""
        self._stack.close()

    def free_port(self) -> int:
        """Return a port that is free on both hosts."""
        return next(self._ports)

    def cut(self, how: Cut) -> None:
        """Cut the link in both directions. No connection is reset."""
        self._cut = how
        self._set(how, is_cut=True)

    def mend(self) -> None:
        """Join the hosts again, if the link is cut."""
        if self._cut is not None:
            self._set(self._cut, is_cut=False)
            self._cut = None

    def _set(self, how: Cut, *, is_cut: bool) -> None:
        if how == "silent loss":
            _ip(self._switch, "link", "set", "port_b", "type", "bridge_slave", "isolated", "on" if is_cut else "off")
        elif how == "cable out at host B":
            _ip(self._switch, "link", "set", "port_b", "down" if is_cut else "up")
        else:
            _ip(self._hosts[0], "link", "set", INTERFACE, "down" if is_cut else "up")


@contextlib.contextmanager
def _keeper() -> Iterator[int]:
    """Start a process with a network, a loopback interface and a boot id of its own; yield its process id."""
    script = f'ip link set lo up && mount --bind "$1" {_BOOT_ID} && echo ready && exec cat'
    with tempfile.NamedTemporaryFile(prefix="distckpt-boot-") as boot:
        boot.write(f"{uuid.uuid4()}\n".encode())
        boot.flush()
        keeper = subprocess.Popen(
            ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-c", script, "sh", boot.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            _await_ready(keeper)
            yield keeper.pid
        finally:
            keeper.kill()
            keeper.communicate(timeout=PROGRAM_LIMIT_S)


def _await_ready(keeper: subprocess.Popen[bytes]) -> None:
    if keeper.stdout is None or not select.select([keeper.stdout], [], [], PROGRAM_LIMIT_S)[0]:
        raise AssertionError("a host was not made in time")
    if keeper.stdout.readline() != b"ready\n":
        _, said = keeper.communicate(timeout=PROGRAM_LIMIT_S)
        raise AssertionError(f"no host can be made here: {said.decode(errors='replace').strip()}")


def _ip(namespaces: str, *words: str) -> None:
    """Run `ip` on a host."""
    done = subprocess.run(
        ["nsenter", f"--net={namespaces}/net", "ip", *words],
        capture_output=True,
        text=True,
        timeout=PROGRAM_LIMIT_S,
        check=False,
    )
    if done.returncode != 0:
        raise AssertionError(f"ip {' '.join(words)} failed: {done.stderr.strip()}")
