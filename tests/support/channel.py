"""A rank's ways to talk beside the job: its pipe to the test that started it, and the call's store.

Owns the connections inside a rank process; in any other process there is none. Thread-safe: a task's
background thread may tell the parent something too.
"""

import threading
from multiprocessing.connection import Connection

from torch.distributed import Store

from tests.support.messages import Told, pack, unpack


class Channel:
    """Messages of `tests.support.messages`, each sent whole."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: object) -> None:
        """Send one message."""
        data = pack(message)
        with self._lock:
            self._connection.send_bytes(data)

    def receive(self) -> object:
        """Wait for the next message; `EOFError` when the parent is gone."""
        return unpack(self._connection.recv_bytes())


_of_this_rank: list[Channel] = []
_stores: list[Store] = []


class _OfThread(threading.local):
    """What a rank that is a thread has of its own."""

    channel: Channel | None = None
    store: Store | None = None
    num_meetings: int = 0


_of_this_thread = _OfThread()


def open_channel(descriptor: int) -> Channel:
    """Adopt the inherited descriptor as this rank's channel, and keep it from the rank's own children."""
    channel = _of_this_thread.channel = Channel(Connection(descriptor))
    _of_this_rank.append(channel)
    return channel


def tell_parent(payload: object) -> None:
    """From a rank: hand a picklable payload to `FreshRanks.told` in the test that started it.

    Raises:
        RuntimeError: this process is not a rank.
    """
    if not _of_this_rank:
        raise RuntimeError("tell_parent() works on a rank that fresh_ranks started")
    (_of_this_thread.channel or _of_this_rank[0]).send(Told(payload=pack(payload)))


def keep_store(store: Store) -> None:
    """Keep the call's store for `store_of_call`, on this rank."""
    _stores[:] = [store]
    _of_this_thread.store = store
    _of_this_thread.num_meetings = 0


def store_of_call() -> Store:
    """From a rank: return the call's own corner of the tests' store.

    Raises:
        RuntimeError: this process is not a rank.
    """
    if not _stores:
        raise RuntimeError("store_of_call() works on a rank that runs a test")
    return _of_this_thread.store or _stores[-1]


def next_meeting() -> int:
    """Return the number of the next meeting of the ranks at `store_of_call`: the same on each, counted by thread."""
    _of_this_thread.num_meetings += 1
    return _of_this_thread.num_meetings
