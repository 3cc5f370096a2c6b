"""How the ranks of a Horovod job come by a store of their own: through the launcher's rendezvous server.

Owns what is written there, and what is read. Imports no Horovod: the server is asked over HTTP, whatever state Horovod
is in.
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
from distckpt.backends.control_group import ABORTED, encode_abort

__all__ = ["Meeting", "Server", "clear_addresses", "rendezvous_server"]

Server = tuple[str, int]
"""Its host and port."""
_ASK_S = 0.02  # how often it is asked
_SCOPE = "distckpt"

# How many stores each server was asked about by this process; the same on every rank.
_NUM_STORES: dict[Server, int] = {}


def rendezvous_server() -> Server | None:
    """Return the address of the launcher's server; None where there is no launcher of Horovod's own."""
    address, port = os.environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR"), os.environ.get("HOROVOD_GLOO_RENDEZVOUS_PORT", "")
    return (address, int(port)) if address and port.isdecimal() and int(port) > 0 else None


def clear_addresses(server: Server, number: int) -> None:
    """Collective, by the server alone. Make it forget the addresses that the ranks had in the job they have left.

    Horovod asks for that as each rank comes to know the others, and its server counts those who asked. But whenever one
    list of addresses is done with, it forgets what it has counted of all others: addresses stay, and a job begun anew
    may call a rank where it is no more (Horovod 0.28.1, ``RendezvousHandler.do_DELETE``).

    Args:
        server: the launcher's.
        number: how often the job is begun anew with this.
    """
    rank, num_ranks = int(os.environ.get("HOROVOD_RANK", "0")), int(os.environ.get("HOROVOD_SIZE", "1"))
    lists = f"local_{os.environ.get('HOROVOD_HOSTNAME', '')} cross_{os.environ.get('HOROVOD_LOCAL_RANK', '0')}"
    deadline = time.monotonic() + default_timeout_s()

    def text_of(key: str) -> str:
        # Where somebody never comes, Horovod itself says so.
        while (text := _ask(server, "GET", f"{_SCOPE}/{key}")) is None and time.monotonic() < deadline:
            time.sleep(_ASK_S)
        return text or ""

    _ask(server, "PUT", f"{_SCOPE}/again{number}.{rank}", lists)
    if rank == 0:
        texts = [text_of(f"again{number}.{peer}") for peer in range(num_ranks)]
        for name in sorted({"global", *" ".join(texts).split()}):
            for _ in range(num_ranks):  # at most as often as it counts to
                if all(_ask(server, "GET", f"{name}/{peer}") is None for peer in range(num_ranks)):
                    break
                _ask(server, "DELETE", f"{name}/0")
        _ask(server, "PUT", f"{_SCOPE}/again{number}", "cleared")
    text_of(f"again{number}")


class Meeting:
    """How the ranks come by one store: rank 0 serves it and tells its address by the launcher's server.

    Where another rank has given up waiting for rank 0 before that, both find out, in whichever order they come: the
    one writes that it gives up and then looks for the store, the other tells where the store is and then looks whether
    somebody has given up.

    Args:
        server: the launcher's.
        what: what it is wanted for.
        timeout_s: seconds to wait.
    """

    def __init__(self, server: Server, what: str, timeout_s: float) -> None:
        number = _NUM_STORES[server] = _NUM_STORES.get(server, 0) + 1
        self._server = server
        self._address, self._given_up = f"{_SCOPE}/store{number}", f"{_SCOPE}/store{number}.given_up"
        self._what = what
        self._timeout_s = timeout_s

    def open(self) -> dist.Store:
        """On rank 0: serve the store."""
        with socket.create_connection(self._server, timeout=self._timeout_s) as probe:
            host = probe.getsockname()[0]  # by which the launcher's host, and so the others', reach this one
        limit = timedelta(seconds=default_timeout_s())
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=limit)
        _ask(self._server, "PUT", self._address, f"{host} {store.port}")
        given_up = _ask(self._server, "GET", self._given_up)
        if given_up is not None:
            store.set(ABORTED, given_up)
        return store

    def find(self) -> dist.Store | None:
        """On the others: connect to it; None where rank 0 does not tell in time where it is."""
        deadline = time.monotonic() + self._timeout_s
        while (store := self._connect()) is None:
            if time.monotonic() > deadline:
                text = encode_abort(self._what, (0,))
                _ask(self._server, "PUT", self._given_up, text)
                if (late := self._connect()) is not None:
                    late.set(ABORTED, text)
                return None
            time.sleep(_ASK_S)
        return store

    def _connect(self) -> dist.Store | None:
        answer = _ask(self._server, "GET", self._address)
        if answer is None:
            return None
        host, _, port = answer.partition(" ")
        return dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=default_timeout_s()))


def _ask(server: Server, method: str, path: str, text: str | None = None) -> str | None:
    """Write, read or delete a text that the launcher's server keeps; None where it has none of that name."""
    with contextlib.closing(http.client.HTTPConnection(*server, timeout=10.0)) as connection:
        connection.request(method, f"/{path}", body=None if text is None else text.encode())
        answer: Any = connection.getresponse()
        data = answer.read()
    return data.decode(errors="replace") if answer.status == http.client.OK else None
