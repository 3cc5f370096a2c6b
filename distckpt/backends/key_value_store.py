"""Key-value stores on top of a torch.distributed store, with a time limit for every call.

A store whose host is frozen or unreachable blocks a call, and with it the connection, for as long as it likes. So the
calls run on a worker thread with a connection of its own, and the caller waits for its limit only.

A call that timed out may still block the worker. The worker is waited for before the interpreter ends, after everything
else that may use the store at exit; see :mod:`distckpt._threads` for what happens otherwise.
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

T = TypeVar("T")

_IDLE_S = 0.2  # how often an idle worker checks whether its job is over


class TorchKeyValueStore(KeyValueStore):
    """A :class:`~distckpt.backends.base.KeyValueStore` in a torch.distributed store.

    Args:
        store: the job's store, under a prefix that is the same on all ranks.
        is_open: returns True if this process still belongs to the job.
        is_guest: use the store's own connection. For a call or two: its other users have to wait meanwhile.
    """

    def __init__(self, store: dist.Store, is_open: Callable[[], bool], *, is_guest: bool = False) -> None:
        self._store = store
        self._is_open = is_open
        self._own: dist.Store | None = store if is_guest else None
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[dist.Store], Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._worker: threading.Thread | None = None
        self._is_closed = False
        # The first function that is registered for this job runs last at exit: the heartbeat monitor, for one, uses
        # the store until then.
        atexit.register(_end_if_alive, weakref.ref(self), os.getpid())

    def set(self, key: str, text: str, *, limit_s: float) -> None:
        self._ask(lambda store: store.set(key, text), limit_s)

    def set_default(self, key: str, text: str, *, limit_s: float) -> str:
        value: bytes = self._ask(lambda store: store.compare_set(key, "", text), limit_s)
        return value.decode("utf-8")

    def get_many(self, keys: Sequence[str], *, limit_s: float) -> list[str | None]:
        return self._ask(lambda store: _get_many(store, list(keys)), limit_s)

    def add(self, key: str, amount: int, *, limit_s: float) -> int:
        return self._ask(lambda store: store.add(key, amount), limit_s)

    def is_open(self) -> bool:
        return self._is_open()

    def close(self, wait_s: float = 0.0) -> None:
        """End the worker after the present calls, and wait for it for at most `wait_s`. Later calls raise."""
        with self._lock:
            self._is_closed = True
            self._calls.put(None)
        worker = self._worker
        if worker is not None and wait_s > 0:
            worker.join(wait_s)

    def host(self) -> str:
        """Return where the store is; empty for a store without a host, as one in a file."""
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
                raise ConnectionError("the job's store is gone: this process has left the job")
            self._calls.put((answer, call))
            if self._worker is None:
                self._worker = threading.Thread(
                    target=_serve, args=(weakref.ref(self), self._calls), name="distckpt-store", daemon=True
                )
                self._worker.start()
        try:
            return answer.result(limit_s)
        except TimeoutError:
            answer.cancel()
            raise TimeoutError(f"the job's store did not answer within {limit_s:g} s") from None
        except RuntimeError as error:
            raise ConnectionError(f"the job's store is gone: {error}") from error

    def _connection(self) -> dist.Store:
        if self._own is None:
            self._own = self._store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
        return self._own

    def _retire(self) -> bool:
        """Let the worker end, unless there is a new call."""
        with self._lock:
            if not self._calls.empty():
                return False
            self._worker = None
            return True


def _serve(owner: "weakref.ref[TorchKeyValueStore]", calls: "queue.SimpleQueue[Any]") -> None:
    """Run the calls, one after the other, on the worker thread."""
    while True:
        try:
            order = calls.get(timeout=_IDLE_S)
        except queue.Empty:
            store = owner()
            if store is None or (not store.is_open() and store._retire()):  # noqa: SLF001 - its worker
                return
            del store
            continue
        if order is None:
            return
        answer, call = order
        store = owner()
        if store is None or not answer.set_running_or_notify_cancel():
            continue
        try:
            result = call(store._connection())  # noqa: SLF001 - its worker
        except Exception as error:  # noqa: BLE001 - raised on the caller's thread
            answer.set_exception(error)
        else:
            answer.set_result(result)
        del store, answer, call, order


def _end_if_alive(store: "weakref.ref[TorchKeyValueStore]", process: int) -> None:
    alive = store()
    if alive is not None and os.getpid() == process:  # a forked child has none of its parent's threads
        alive.close(EXIT_LIMIT_S)


def _get_many(store: dist.Store, keys: list[str]) -> list[str | None]:
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
    """Return True if `host` is an address of this machine: a socket can be bound to no other."""
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return True
    return False


def _listens_here(port: int) -> bool:
    """Return True if this process listens on `port`. Linux; False elsewhere."""
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
