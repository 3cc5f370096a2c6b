"""The runtime of this pytest process's ranks: torch.distributed, Horovod or torch_xla.

`DISTCKPT_TEST_RUNTIME` selects it for the whole process; tests that ask for the default backend run on it. This module
gives ranks the variables of the runtime's launcher, and joins and leaves jobs. It imports Horovod and torch_xla only
where they are the runtime.
"""

import os
import sys
import threading
import warnings
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import Store

from tests.support.messages import Task
from tests.support.store import ADDRESS, job_namespace, shared_store

VARIABLE = "DISTCKPT_TEST_RUNTIME"
OWN = "gloo"
"""The backend name that selects the process's runtime."""
RUNTIMES = ("gloo", "horovod", "xla")
RUNTIME = os.environ.get(VARIABLE, OWN)

if RUNTIME not in RUNTIMES:
    raise ValueError(f"{VARIABLE} should be one of {RUNTIMES}, but is {RUNTIME!r}")


_PORTS: set[int] = set()


class JobEnvironment:
    """The servers and environment variables that a launcher gives to one job."""

    def __init__(self, world_size: int, number: int) -> None:
        self._world_size = world_size
        self._number = number
        self._server: Any = None
        if RUNTIME == "horovod":
            self._server, self._port = _rendezvous_server(world_size)

    def environment(self, rank: int) -> dict[str, str]:
        """Return the variables of a rank."""
        if RUNTIME == "horovod":
            return _environment_of_horovodrun(rank, self._world_size, self._port)
        if RUNTIME == "xla":  # ranks are threads of one process
            return {"OMP_NUM_THREADS": "1"}
        return _environment_of_torchrun(rank, self._world_size, self._number)

    def close(self) -> None:
        """Stop the servers, without waiting."""
        if self._server is not None:
            threading.Thread(target=_stop, args=(self._server,), name="rendezvous-end", daemon=True).start()
            self._server = None


def join(task: Task, store: Store) -> None:
    """From a rank: join the task's job."""
    if task.backend is None or (task.backend == OWN and RUNTIME == "xla"):
        return  # the replicas' job exists since their threads started
    if task.backend == OWN and RUNTIME == "horovod":
        _horovod().init()
        return
    dist.init_process_group(
        task.backend,
        store=job_namespace(store, task.number),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=task.collective_timeout_s),
    )


def leave() -> None:
    """From a rank: leave the job."""
    if dist.is_initialized():
        dist.destroy_process_group()
    horovod = sys.modules.get("horovod.torch")
    if horovod is not None and horovod.is_initialized():
        horovod.shutdown()
    if RUNTIME == "xla" and "distckpt" in sys.modules:
        # torch_xla's replicas stay in their job; only distckpt's view of it is reset.
        sys.modules["distckpt"].finalize()


def _horovod() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import horovod.torch as hvd  # noqa: PLC0415 - exists only in Horovod's environment

    return hvd


def _rendezvous_server(world_size: int) -> tuple[Any, int]:
    """Start the rendezvous server that `horovodrun` starts for a job; return it and its port."""
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts  # noqa: PLC0415 - as above
    from horovod.runner.http.http_server import RendezvousServer  # noqa: PLC0415 - as above

    server = RendezvousServer()
    port = server.start()
    while port in _PORTS:  # ranks of the pool number the stores of each address: it must not repeat
        again, server = server, RendezvousServer()
        port = server.start()
        _stop(again)
    _PORTS.add(port)
    server.init(get_host_assignments(parse_hosts(f"localhost:{world_size}"), world_size))
    return server, port


def _stop(server: Any) -> None:
    server.stop()
    server._httpd.server_close()  # server.stop() leaves the socket open


def _environment_of_horovodrun(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "HOROVOD_RANK": str(rank),
        "HOROVOD_SIZE": str(world_size),
        "HOROVOD_LOCAL_RANK": str(rank),
        "HOROVOD_LOCAL_SIZE": str(world_size),
        "HOROVOD_CROSS_RANK": "0",
        "HOROVOD_CROSS_SIZE": "1",
        "HOROVOD_HOSTNAME": "localhost",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": ADDRESS,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_IFACE": "lo",
        "HOROVOD_CYCLE_TIME": "0.2",
        "OMP_NUM_THREADS": "1",
    }


def _environment_of_torchrun(rank: int, world_size: int, number: int) -> dict[str, str]:
    """Return torchrun's variables on one node, which `init_process_group` reads by `env://`."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_RANK": str(rank),
        "ROLE_WORLD_SIZE": str(world_size),
        "ROLE_NAME": "default",
        "MASTER_ADDR": ADDRESS,
        "MASTER_PORT": str(shared_store().port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_RESTART_COUNT": str(number),  # names the job's namespace in the agent's store
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
