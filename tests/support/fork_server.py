"""Start rank processes by forking one that has imported torch: some 20 ms a rank, where a new Python takes 2 s.

The server runs one thread and computes nothing, so that its children start without locks that another thread holds. It
ends with the process that started it, and its children end with it.

A request is a pickled `Request` with descriptors: first a status pipe, then the rank's own. On the status pipe the
server writes the child's process id, and its exit code when it has ended.
"""

import contextlib
import ctypes
import functools
import gc
import importlib
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.limits import PROGRAM_LIMIT_S

_ROOT = Path(__file__).resolve().parents[2]
_PRELOAD = {
    "gloo": ("torch._dynamo", "distckpt.handlers", "tests.support.rank_main"),
    "horovod": ("horovod.torch", "torch._dynamo", "distckpt.handlers", "tests.support.rank_main"),
    "xla": ("torch_xla.core.xla_model", "torch._dynamo", "distckpt.handlers", "tests.support.xla_main"),
}
"""Modules that the server imports, by runtime. The first optimizer or DistributedDataParallel of a process imports
torch._dynamo, which would take half a second in each rank."""
_NOT_INHERITED = ("LD_", "PYTHON", "OMP_", "MKL_", "OPENBLAS_", "GLIBC_", "MALLOC_", "TORCH_")
"""Prefixes of variables that take effect only when a process starts or imports torch."""
# A child's program is called at the bottom of the stack, so that it ends as any program does.
_PROGRAM = f"""
import sys
sys.path[0] = {str(_ROOT)!r}
from tests.support.fork_server import serve
sys.exit(serve(sys.argv[1], int(sys.argv[2]))())
"""
_NUMBER = struct.Struct("<q")
_PR_SET_PDEATHSIG = 1
_MAX_DESCRIPTORS = 64


@dataclass(frozen=True, slots=True)
class Request:
    """A process to start.

    Attributes:
        module: its ``main(arguments, descriptors)`` runs in the process and returns the exit code.
        arguments: for `main`.
        environment: the whole environment.
        log: file that standard output and standard error are appended to.
    """

    module: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    log: str


def can_fork(environment: Mapping[str, str]) -> bool:
    """Return True if a forked process with these additional variables behaves as a newly started one."""
    return not any(name.startswith(_NOT_INHERITED) for name in environment)


class ForkedProcess:
    """A child of the server, with the part of `subprocess.Popen` that the harness uses.

    Attributes:
        pid: the process id.
        returncode: exit code, minus the signal's number if killed; None while the process runs.
    """

    def __init__(self, status: int) -> None:
        self._status = status
        self.returncode: int | None = None
        self.pid = self._read()

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        return self._poll(0.0)

    def wait(self, timeout: float) -> int:
        """Return the exit code.

        Raises:
            subprocess.TimeoutExpired: the process still runs after `timeout` seconds.
        """
        code = self._poll(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"forked process {self.pid}", timeout)
        return code

    def _poll(self, timeout_s: float) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout_s)[0]:
            self.returncode = self._read()
            os.close(self._status)
        return self.returncode

    def _read(self) -> int:
        data = os.read(self._status, _NUMBER.size)
        return int(_NUMBER.unpack(data)[0]) if data else -signal.SIGKILL  # the server has ended, and the child with it


class ForkServer:
    """The server, seen from the pytest process.

    Args:
        runtime: decides what the server imports.
    """

    def __init__(self, runtime: str) -> None:
        self._socket, theirs = socket.socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        if runtime == "xla":
            environment["PJRT_DEVICE"] = "CPU"
        self._process = subprocess.Popen(
            # Not with -m: multiprocessing would import the main module again in each process that a rank starts.
            [sys.executable, "-c", _PROGRAM, runtime, str(theirs.fileno())],
            cwd=_ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()

    def is_alive(self) -> bool:
        """Return True if the server runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the server and its children."""
        self._socket.close()
        self._process.kill()
        self._process.wait(PROGRAM_LIMIT_S)

    def start(self, request: Request, descriptors: Sequence[int]) -> ForkedProcess:
        """Fork a process that inherits `descriptors`."""
        mine, theirs = os.pipe()
        socket.send_fds(self._socket, [_encode(request)], [theirs, *descriptors])
        os.close(theirs)
        return ForkedProcess(mine)


_servers: dict[tuple[str, int], ForkServer] = {}


def server_for(runtime: str) -> ForkServer:
    """Return this process's server, started at the first call."""
    key = runtime, os.getpid()
    if key not in _servers or not _servers[key].is_alive():
        _servers[key] = ForkServer(runtime)
    return _servers[key]


def close_servers() -> None:
    """End all servers of this process."""
    while _servers:
        _servers.popitem()[1].close()


def _encode(request: Request) -> bytes:
    data = pickle.dumps(request)
    return _NUMBER.pack(len(data)) + data


def _receive(connection: socket.socket) -> tuple[Request, list[int]] | None:
    """Return the next request and its descriptors; None when the parent has closed the connection."""
    data, descriptors, _, _ = socket.recv_fds(connection, _NUMBER.size, _MAX_DESCRIPTORS)
    if not data:
        return None
    rest = connection.recv(_NUMBER.unpack(data)[0], socket.MSG_WAITALL)
    request: Request = pickle.loads(rest)  # noqa: S301 - from the process that started this one
    return request, list(descriptors)


def _reap(children: dict[int, int]) -> None:
    """Report the exit codes of children that have ended."""
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with contextlib.suppress(BrokenPipeError):  # nobody waits for the code
            os.write(children[pid], _NUMBER.pack(os.waitstatus_to_exitcode(status)))
        os.close(children.pop(pid))


def _become(request: Request, descriptors: list[int]) -> Callable[[], int]:
    """In a child: take on the requested environment; return the function that runs the program."""
    os.setsid()
    with open(request.log, "ab") as log:  # noqa: PTH123 - opened once, by descriptor
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.clear()
    os.environ.update(request.environment)
    return functools.partial(sys.modules[request.module].main, request.arguments, descriptors)


def serve(runtime: str, descriptor: int) -> Callable[[], int]:
    """Fork children on request until the parent hangs up.

    Returns:
        In a child, the program to run; in the server, a function that returns 0.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _PRELOAD[runtime]:
            importlib.import_module(name)
    gc.freeze()  # or the last collection of each child copies all of torch's pages
    connection = socket.socket(fileno=descriptor)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    children: dict[int, int] = {}
    sources: list[socket.socket | int] = [connection, wake_read]
    while True:
        ready, _, _ = select.select(sources, [], [])
        if wake_read in ready:
            os.read(wake_read, 4096)
            _reap(children)
        if connection not in ready:
            continue
        received = _receive(connection)
        if received is None:
            return lambda: 0
        request, (status, *descriptors) = received
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            connection.close()
            for other in (wake_read, wake_write, status, *children.values()):
                os.close(other)
            return _become(request, descriptors)
        for passed in descriptors:
            os.close(passed)
        children[pid] = status
        os.write(status, _NUMBER.pack(pid))
