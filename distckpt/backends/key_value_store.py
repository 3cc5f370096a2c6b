"""Notes in the job's store, over a connection of their own, where no call waits for ever.

Owns the worker thread that speaks with the store. A store whose host is frozen, or beyond a broken link, holds a call
for as long as it likes, and with it the connection: so the calls run on a thread of their own, and whoever asks waits
no longer than it wants to. Must not know what the notes mean.

A call that was given up is still in the store. So the thread is ended before the interpreter is, after all else that
may ask a board at exit; see :mod:`distckpt._threads` for what happens otherwise.
"""

import atexit
import contextlib
import os
import queue
import socket
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from distckpt._threads import EXIT_LIMIT_S
from distckpt.backends.base import KeyValueStore

__all__ = ["TorchKeyValueStore"]

T = TypeVar("T")

# How often a worker without work looks whether its job is over.
_IDLE_S = 0.2


class TorchKeyValueStore(KeyValueStore):
    """A :class:`~distckpt.backends.base.KeyValueStore` in a torch.distributed store.

    Args:
        store: the job's, under a prefix that is the same on all ranks.
        is_open: tells whether the job is still this process's.
        is_guest: speak on the store's own connection. For a call or two: others that use it have to wait for them.
    """

    def __init__(self, store: dist.Store, is_open: Callable[[], bool], *, is_guest: bool = False) -> None:
        self._store = store
        self._is_open = is_open
        self._own: dist.Store | None = store if is_guest else None
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[dist.Store], Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._worker: threading.Thread | None = None
        self._is_closed = False
        # First of all that is registered for this job, so last of it at exit: the watch, for one, asks until then.
        atexit.register(_end_if_alive, weakref.ref(self), os.getpid())

    def set(self, key: str, text: str, *, limit_s: float) -> None:
        """Write a note, over an older one."""
        self._ask(lambda store: store.set(key, text), limit_s)

    def set_default(self, key: str, text: str, *, limit_s: float) -> str:
        """Write a note unless there is one; return what stands."""
        stands: bytes = self._ask(lambda store: store.compare_set(key, "", text), limit_s)
        return stands.decode("utf-8")

    def get_many(self, keys: Sequence[str], *, limit_s: float) -> list[str | None]:
        """Read several notes: in two exchanges where all are there, else in two for each."""
        return self._ask(lambda store: _look(store, list(keys)), limit_s)

    def add(self, key: str, amount: int, *, limit_s: float) -> int:
        """Add to a number that begins at 0; return what it is now."""
        return self._ask(lambda store: store.add(key, amount), limit_s)

    def is_open(self) -> bool:
        """Tell whether the job that it belongs to is still this process's."""
        return self._is_open()

    def close(self) -> None:
        """Let the worker end, after the calls that are under way. What is asked after is refused: the store is gone."""
        with self._lock:
            self._is_closed = True
            self._calls.put(None)

    def end(self, limit_s: float) -> None:
        """Close it, and wait for its worker, but no longer than `limit_s`: the store may be frozen."""
        self.close()
        worker = self._worker
        if worker is not None:
            worker.join(limit_s)

    def host(self) -> str:
        """Tell where the store is kept. Empty for a store without a host, as one in a file."""
        root: Any = self._store
        while isinstance(root, dist.PrefixStore):
            root = root.underlying_store
        if not isinstance(root, dist.TCPStore):
            return ""
        if _listens_here(root.port):
            return "this process"
        return "this machine" if _is_own_address(root.host) else "elsewhere"

    def _ask(self, call: Callable[[dist.Store], T], limit_s: float) -> T:
        answer: Future[T] = Future()
        with self._lock:
            if self._is_closed:
                msg = "the job's store is gone: this process has left the job"
                raise ConnectionError(msg)
            self._calls.put((answer, call))
            if self._worker is None:
                self._worker = threading.Thread(
                    target=_serve, args=(weakref.ref(self), self._calls), name="distckpt-board", daemon=True
                )
                self._worker.start()
        try:
            return answer.result(limit_s)
        except TimeoutError:
            answer.cancel()
            msg = f"the job's store did not answer within {limit_s:g} s"
            raise TimeoutError(msg) from None
        except RuntimeError as error:
            msg = f"the job's store is gone: {error}"
            raise ConnectionError(msg) from error

    def _connection(self) -> dist.Store:
        if self._own is None:
            self._own = self._store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
        return self._own

    def _retire(self) -> bool:
        """Let the worker end, unless a call came in just now."""
        with self._lock:
            if not self._calls.empty():
                return False
            self._worker = None
            return True


def _serve(owner: "weakref.ref[TorchKeyValueStore]", calls: "queue.SimpleQueue[Any]") -> None:
    """Make the calls, one after the other, on the board's worker thread."""
    while True:
        try:
            order = calls.get(timeout=_IDLE_S)
        except queue.Empty:
            board = owner()
            if board is None or (not board.is_open() and board._retire()):  # noqa: SLF001 - its worker
                return
            del board
            continue
        if order is None:
            return
        answer, call = order
        board = owner()
        if board is None or not answer.set_running_or_notify_cancel():
            continue
        try:
            result = call(board._connection())  # noqa: SLF001 - its worker
        except Exception as error:  # noqa: BLE001 - it is the asker's
            answer.set_exception(error)
        else:
            answer.set_result(result)
        del board, answer, call, order


def _end_if_alive(board: "weakref.ref[TorchKeyValueStore]", process: int) -> None:
    alive = board()
    if alive is not None and os.getpid() == process:  # a forked child has none of its parent's threads
        alive.end(EXIT_LIMIT_S)


def _look(store: dist.Store, keys: list[str]) -> list[str | None]:
    if not keys:
        return []
    if store.check(keys):
        if store.has_extended_api():  # type: ignore[attr-defined]  # torch's stubs lack it
            return [value.decode("utf-8") for value in store.multi_get(keys)]
        return [store.get(key).decode("utf-8") for key in keys]
    if len(keys) == 1:
        return [None]
    return [store.get(key).decode("utf-8") if store.check([key]) else None for key in keys]


def _is_own_address(host: str) -> bool:
    """Tell whether `host` is an address of this machine: only then a socket can be bound to it."""
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return True
    return False


def _listens_here(port: int) -> bool:
    """Tell whether this process listens on `port`. Linux; elsewhere nobody does."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    if not inodes:
        return False
    with contextlib.suppress(OSError):
        for descriptor in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                if str(descriptor.readlink()) in inodes:
                    return True
    return False
