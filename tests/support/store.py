"""The store through which ranks find each other: one server in the test's process, as in torchrun's agent.

Each call gets a namespace of its own in it, so that the store is fresh for every test while the ranks
keep their connections: a TCPStore connection costs two reverse look-ups of 127.0.0.1, and where a name
server drops a packet that is five seconds.
"""

import functools
import itertools
import os
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

ADDRESS = "127.0.0.1"
RESOLVER = {"RES_OPTIONS": "timeout:1 attempts:2"}
"""Environment that bounds those look-ups."""
_TIMEOUT = timedelta(seconds=60)


def bound_lookups() -> None:
    """Set `RESOLVER` for this process and what it starts, unless its user has decided otherwise."""
    for name, value in RESOLVER.items():
        os.environ.setdefault(name, value)


class JobStore:
    """The server's side."""

    def __init__(self) -> None:
        bound_lookups()
        self._server = TCPStore(ADDRESS, 0, is_master=True, wait_for_workers=False, timeout=_TIMEOUT)
        self._numbers = itertools.count()

    @property
    def port(self) -> int:
        """The port that the system gave."""
        return self._server.port

    def next_number(self) -> int:
        """Return the next call's number, from which `of_call` makes its namespace."""
        return next(self._numbers)


@functools.cache
def shared_store() -> JobStore:
    """Return this process's store, started at the first call."""
    return JobStore()


def connect(port: int) -> Store:
    """From a rank: connect to the server."""
    return TCPStore(ADDRESS, port, is_master=False, timeout=_TIMEOUT)


def of_call(store: Store, number: int) -> Store:
    """Return the call's own namespace. Not torchrun's name for it, which is left to `env://`."""
    return PrefixStore(f"/tests/call_{number}", store)


def beside(store: Store, number: int) -> Store:
    """Return a namespace of the call that no job uses, for the ranks to talk beside theirs."""
    return PrefixStore(f"/tests/beside_{number}", store)
