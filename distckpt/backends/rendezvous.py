"""How the ranks of a Horovod job find a key-value store: through the rendezvous server of Horovod's launcher.

This module does not import Horovod: the server is asked over HTTP, whatever state Horovod is in.
"""

import contextlib
import http.client
import os
import socket
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from distckpt.backends.base import default_timeout_s
from distckpt.backends.store_notes import ABORT_KEY, encode_abort

Server = tuple[str, int]
"""Host and port of the launcher's server."""
_POLL_S = 0.02
_SCOPE = "distckpt"

# How many stores this process has looked for at each server; the same number on every rank.
_NUM_STORES: dict[Server, int] = {}


def rendezvous_server() -> Server | None:
    """Return the address of the launcher's server; None without a launcher of Horovod's own."""
    address, port = os.environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR"), os.environ.get("HOROVOD_GLOO_RENDEZVOUS_PORT", "")
    return (address, int(port)) if address and port.isdecimal() and int(port) > 0 else None


def clear_addresses(server: Server, number: int) -> None:
    """Collective, through the server. Delete the addresses that the ranks had in the job they have left.

    Horovod deletes them while the ranks connect: its server counts the ranks that asked for the deletion, in one list
    of addresses after the other. But when the server deletes one list, it forgets the counts of all others. Addresses
    remain, and a job that is joined again may call a rank at an old one (Horovod 0.28.1,
    ``RendezvousHandler.do_DELETE``).

    Args:
        server: the launcher's server.
        number: how often this process has left a job.
    """
    rank, num_ranks = int(os.environ.get("HOROVOD_RANK", "0")), int(os.environ.get("HOROVOD_SIZE", "1"))
    lists = f"local_{os.environ.get('HOROVOD_HOSTNAME', '')} cross_{os.environ.get('HOROVOD_LOCAL_RANK', '0')}"
    deadline = time.monotonic() + default_timeout_s()

    def wait_for(key: str) -> str:
        # If a rank stays away, Horovod itself reports it.
        while (text := _ask(server, "GET", f"{_SCOPE}/{key}")) is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return text or ""

    _ask(server, "PUT", f"{_SCOPE}/again{number}.{rank}", lists)
    if rank == 0:
        texts = [wait_for(f"again{number}.{peer}") for peer in range(num_ranks)]
        for name in sorted({"global", *" ".join(texts).split()}):
            for _ in range(num_ranks):  # the server counts to this number at most
                if all(_ask(server, "GET", f"{name}/{peer}") is None for peer in range(num_ranks)):
                    break
                _ask(server, "DELETE", f"{name}/0")
        _ask(server, "PUT", f"{_SCOPE}/again{number}", "cleared")
    wait_for(f"again{number}")


class StoreRendezvous:
    """Connects the ranks to one store: rank 0 hosts it and publishes its address on the launcher's server.

    If another rank stops waiting for rank 0, both ranks find that out, whichever acts first. That rank writes that it
    has stopped, and then looks for the store. Rank 0 publishes the store, and then looks whether a rank has stopped.

    Args:
        server: the launcher's server.
        what: what the store is needed for.
        timeout_s: seconds to wait.
    """

    def __init__(self, server: Server, what: str, timeout_s: float) -> None:
        number = _NUM_STORES[server] = _NUM_STORES.get(server, 0) + 1
        self._server = server
        self._address_key, self._abort_key = f"{_SCOPE}/store{number}", f"{_SCOPE}/store{number}.abort"
        self._what = what
        self._timeout_s = timeout_s

    def host_store(self) -> dist.Store:
        """Host the store. On rank 0."""
        with socket.create_connection(self._server, timeout=self._timeout_s) as probe:
            host = probe.getsockname()[0]  # the launcher's host, and so the other ranks', reach this rank by it
        limit = timedelta(seconds=default_timeout_s())
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=limit)
        _ask(self._server, "PUT", self._address_key, f"{host} {store.port}")
        note = _ask(self._server, "GET", self._abort_key)
        if note is not None:
            store.set(ABORT_KEY, note)
        return store

    def find_store(self) -> dist.Store | None:
        """Connect to the store; return None if rank 0 does not publish it in time. On the other ranks."""
        deadline = time.monotonic() + self._timeout_s
        while (store := self._connect()) is None:
            if time.monotonic() > deadline:
                note = encode_abort(self._what, (0,))
                _ask(self._server, "PUT", self._abort_key, note)
                if (store := self._connect()) is not None:
                    store.set(ABORT_KEY, note)
                return None
            time.sleep(_POLL_S)
        return store

    def _connect(self) -> dist.Store | None:
        answer = _ask(self._server, "GET", self._address_key)
        if answer is None:
            return None
        host, _, port = answer.partition(" ")
        return dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=default_timeout_s()))


def _ask(server: Server, method: str, path: str, text: str | None = None) -> str | None:
    """Write, read or delete a text on the launcher's server; return None if there is none of that name."""
    with contextlib.closing(http.client.HTTPConnection(*server, timeout=10.0)) as connection:
        connection.request(method, f"/{path}", body=None if text is None else text.encode())
        answer: Any = connection.getresponse()
        data = answer.read()
    return data.decode(errors="replace") if answer.status == http.client.OK else None
