"""The key-value store through which ranks find each other: one server in the pytest process, as in torchrun's agent.

Each call gets its own namespace, so that every test has an empty store while ranks keep their connections. A new
TCPStore connection costs two reverse look-ups of 127.0.0.1, five seconds each where a name server drops the packet.
"""

import functools
import itertools
import os
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

ADDRESS = "127.0.0.1"
RESOLVER = {"RES_OPTIONS": "timeout:1 attempts:2"}
"""Environment that shortens those look-ups."""
_TIMEOUT = timedelta(seconds=60)


def shorten_lookups() -> None:
    """Set `RESOLVER` for this process and the processes it starts, unless the variable is set."""
    for name, value in RESOLVER.items():
        os.environ.setdefault(name, value)


class JobStore:
    """The store's server."""

    def __init__(self) -> None:
        shorten_lookups()
        self._server = TCPStore(ADDRESS, 0, is_master=True, wait_for_workers=False, timeout=_TIMEOUT)
        self._numbers = itertools.count()

    @property
    def port(self) -> int:
        """The server's port."""
        return self._server.port

    def next_number(self) -> int:
        """Return the next call's number, which names its namespace."""
        return next(self._numbers)


@functools.cache
def shared_store() -> JobStore:
    """Return this process's store, started at the first call."""
    return JobStore()


def connect(port: int) -> Store:
    """From a rank: connect to the server."""
    return TCPStore(ADDRESS, port, is_master=False, timeout=_TIMEOUT)


def job_namespace(store: Store, number: int) -> Store:
    """Return the namespace of the call's process group. Its name is not torchrun's, which `env://` uses."""
    return PrefixStore(f"/tests/job_{number}", store)


def call_namespace(store: Store, number: int) -> Store:
    """Return the namespace through which a call's ranks synchronise outside the job."""
    return PrefixStore(f"/tests/call_{number}", store)
