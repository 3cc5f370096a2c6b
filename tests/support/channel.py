"""Connections of a rank process: the pipe to the test that started it, and the call's store.

Thread-safe: a background thread of the task may send messages too. Where ranks are threads (torch_xla), each thread has
a channel and a store of its own.
"""

import threading
from multiprocessing.connection import Connection

from torch.distributed import Store

from tests.support.messages import UserMessage, pack, unpack


class Channel:
    """A pipe that carries whole messages of `tests.support.messages`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: object) -> None:
        """Send one message."""
        data = pack(message)
        with self._lock:
            self._connection.send_bytes(data)

    def receive(self) -> object:
        """Return the next message; raise `EOFError` when the parent is gone."""
        return unpack(self._connection.recv_bytes())


_process_channels: list[Channel] = []
_process_stores: list[Store] = []


class _ThreadState(threading.local):
    """Connections of a rank that is a thread."""

    channel: Channel | None = None
    store: Store | None = None
    num_operations: int = 0


_thread_state = _ThreadState()


def open_channel(descriptor: int) -> Channel:
    """Return the channel on an inherited descriptor, and make it this rank's."""
    channel = _thread_state.channel = Channel(Connection(descriptor))
    _process_channels.append(channel)
    return channel


def send_to_parent(payload: object) -> None:
    """From a rank: send a picklable payload, which `FreshRanks.receive` returns in the test.

    Raises:
        RuntimeError: this process is not a rank.
    """
    if not _process_channels:
        raise RuntimeError("send_to_parent() works only on a rank that fresh_ranks started")
    (_thread_state.channel or _process_channels[0]).send(UserMessage(payload=pack(payload)))


def set_call_store(store: Store) -> None:
    """Set the store that `call_store` returns on this rank."""
    _process_stores[:] = [store]
    _thread_state.store = store
    _thread_state.num_operations = 0


def call_store() -> Store:
    """From a rank: return the call's namespace in the tests' store.

    Raises:
        RuntimeError: this process is not a rank.
    """
    if not _process_stores:
        raise RuntimeError("call_store() works only on a rank that runs a test")
    return _thread_state.store or _process_stores[-1]


def next_sequence_number() -> int:
    """Return the number of this rank's next operation on `call_store`, counted by thread."""
    _thread_state.num_operations += 1
    return _thread_state.num_operations
