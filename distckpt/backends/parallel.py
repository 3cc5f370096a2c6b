"""Starting the ranks of a job from a script: :func:`spawn` and :class:`Parallel`, like those of ignite's ``idist``."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Self

import torch.distributed as dist
import torch.multiprocessing as mp

from distckpt._messages import log_level
from distckpt.backends.detect import OTHER_RUNTIMES, import_runtime
from distckpt.backends.entry import check_backend, finalize, get_local_rank, get_rank, get_world_size, initialize

_STORE_TIMEOUT_S = 300.0


def spawn(
    backend: str,
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs_dict: Mapping[str, Any] | None = None,
    nproc_per_node: int | None = None,
    *,
    nnodes: int = 1,
    node_rank: int = 0,
    master_addr: str | None = None,
    master_port: int | None = None,
    init_method: str | None = None,
    timeout: timedelta | float | None = None,
    join: bool = True,
    daemon: bool = False,
    start_method: str = "spawn",
) -> Any:
    """Run ``fn(local_rank, *args, **kwargs_dict)`` in new processes that form one job.

    Horovod and torch_xla start their own ranks, on this node, and wait for them; of the arguments below only
    `nproc_per_node` counts. Otherwise, with one node, this process hosts the job's store at a free port, so that the
    store outlives the ranks.

    Args:
        backend: one of :func:`~distckpt.backends.entry.available_backends`.
        fn: a function at the top level of a module.
        args: its arguments after the local rank.
        kwargs_dict: its keyword arguments.
        nproc_per_node: number of processes to start here; None for one, or with ``xla`` for one on each device.
        nnodes: number of nodes; more than one need `master_addr` and `master_port`, or `init_method`.
        node_rank: rank of this node.
        master_addr: address of the first node.
        master_port: a free port there.
        init_method: as for ``torch.distributed.init_process_group``.
        timeout: time limit of the job's process group, seconds or a timedelta; None for torch's default.
        join: wait for the processes; otherwise return their context.
        daemon: as for ``torch.multiprocessing.start_processes``.
        start_method: as for ``torch.multiprocessing.start_processes``.

    Raises:
        ValueError: an argument has a wrong value.
        torch.multiprocessing.ProcessRaisedException: `fn` raised in some process.
    """
    check_backend(backend)
    if backend in OTHER_RUNTIMES:
        if nnodes != 1:
            msg = f"spawn starts ranks of {backend!r} on one node, but nnodes is {nnodes}: use its own launcher"
            raise ValueError(msg)
        import_runtime(backend).launch(fn, args, kwargs_dict or {}, nproc_per_node, start_method)
        return None
    nproc_per_node = 1 if nproc_per_node is None else nproc_per_node
    check_nodes(nproc_per_node, nnodes, node_rank, master_addr, master_port, init_method)
    environment = {
        "WORLD_SIZE": str(nproc_per_node * nnodes),
        "LOCAL_WORLD_SIZE": str(nproc_per_node),
        "GROUP_RANK": str(node_rank),
    }
    store = None
    if init_method in (None, "env://"):
        init_method = None
        if nnodes == 1 and master_port is None:
            host = master_addr or "127.0.0.1"
            store = dist.TCPStore(
                host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=_STORE_TIMEOUT_S)
            )
            master_addr, master_port = host, store.port
            environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # rank 0 joins this store instead of hosting one
        environment.update(MASTER_ADDR=master_addr or "127.0.0.1", MASTER_PORT=str(master_port))
    first_rank = node_rank * nproc_per_node
    context = mp.start_processes(  # type: ignore[no-untyped-call]  # torch has no types for it
        _worker,
        (backend, fn, tuple(args), dict(kwargs_dict or {}), environment, first_rank, init_method, timeout),
        nprocs=nproc_per_node,
        join=join,
        daemon=daemon,
        start_method=start_method,
    )
    if context is not None:
        context.distckpt_store = store  # lives as long as the context does
    return context


def _worker(
    local_rank: int,
    backend: str,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    environment: dict[str, str],
    first_rank: int,
    init_method: str | None,
    timeout: timedelta | float | None,
) -> None:
    rank = first_rank + local_rank
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(local_rank))
    if init_method is None:
        initialize(backend, timeout=timeout)
    else:
        size = int(environment["WORLD_SIZE"])
        initialize(backend, init_method=init_method, rank=rank, world_size=size, timeout=timeout)
    try:
        fn(local_rank, *args, **kwargs)
    finally:
        finalize()


def check_nodes(
    nproc_per_node: int,
    nnodes: int,
    node_rank: int,
    master_addr: str | None,
    master_port: int | None,
    init_method: str | None,
) -> None:
    """Raise ValueError if the numbers of processes and nodes do not fit together; it names the argument."""
    if nproc_per_node < 1:
        raise ValueError(f"Argument nproc_per_node should positive, but given {nproc_per_node}")
    if nnodes < 1:
        raise ValueError(f"Argument nnodes should positive, but given {nnodes}")
    if not 0 <= node_rank < nnodes:
        raise ValueError(f"Argument node_rank should be between 0 and {nnodes - 1}, but given {node_rank}")
    if nnodes > 1 and (master_addr is None or master_port is None) and init_method is None:
        raise ValueError(
            "If number of nodes larger than one, arguments master_addr and master_port or init_method should be "
            f"specified, but given master_addr={master_addr}, master_port={master_port} and init_method={init_method}."
        )


class Parallel:
    """Context manager that runs a function on all ranks of a job.

    With a launcher, such as torchrun, it joins the job on entry and leaves it on exit. With `nproc_per_node`,
    :meth:`run` starts the processes. Without `backend` it uses the live job, or one rank.

    Args:
        backend: one of :func:`~distckpt.backends.entry.available_backends`, or None.
        nproc_per_node: number of processes to start on this node; None with a launcher.
        nnodes: number of nodes; None for one.
        node_rank: rank of this node; needed with several nodes.
        master_addr: address of the first node.
        master_port: a free port there.
        init_method: as for ``torch.distributed.init_process_group``.
        spawn_kwargs: further arguments of :func:`spawn`.

    Raises:
        ValueError: there is no such backend, or the other arguments do not fit together.

    Example:
        >>> with Parallel() as parallel:
        ...     parallel.run(lambda local_rank, text: print(local_rank, text), "hello")
        0 hello
    """

    def __init__(
        self,
        backend: str | None = None,
        nproc_per_node: int | None = None,
        nnodes: int | None = None,
        node_rank: int | None = None,
        master_addr: str | None = None,
        master_port: int | None = None,
        init_method: str | None = None,
        **spawn_kwargs: Any,
    ) -> None:
        given = {
            "nproc_per_node": nproc_per_node,
            "nnodes": nnodes,
            "node_rank": node_rank,
            "master_addr": master_addr,
            "master_port": master_port,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if backend is None:
            for name, value in given.items():
                raise ValueError(f"If backend is None, argument '{name}' should be also None, but given {value}")
        else:
            check_backend(backend)
        self._spawn_options: dict[str, Any] | None = None
        if backend is not None and nproc_per_node is not None:
            if (nnodes or 1) > 1 and node_rank is None:
                raise ValueError("If number of nodes larger than one, arguments node_rank should be given")
            check_nodes(
                nproc_per_node, 1 if nnodes is None else nnodes, node_rank or 0, master_addr, master_port, init_method
            )
            self._spawn_options = {**given, "init_method": init_method, **spawn_kwargs}
        self.backend = backend
        self.init_method = init_method
        self._logger = logging.getLogger(f"{__name__}.{type(self).__name__}")
        self._rank = 0

    def __enter__(self) -> Self:
        """Join the launcher's job, if there is one."""
        if self.backend is not None and self._spawn_options is None:
            initialize(self.backend, init_method=self.init_method)
            self._rank = get_rank()
            self._log("Initialized processing group with backend: '%s'", self.backend)
        return self

    def run(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Run ``func(local_rank, *args, **kwargs)`` on every rank."""
        if self._spawn_options is not None and self.backend is not None:
            self._log("Spawn function '%s' in %s processes", func, self._spawn_options["nproc_per_node"])
            spawn(self.backend, func, args=args, kwargs_dict=kwargs, **self._spawn_options)
        else:
            self._rank = get_rank()
            self._log("- Run '%s' in %s processes", func, get_world_size())
            func(get_local_rank(), *args, **kwargs)
        self._log("End of run")

    def __exit__(self, *_exception: object) -> None:
        """Leave the job."""
        if self.backend is not None and self._spawn_options is None:
            finalize()
            self._log("Finalized processing group with backend: '%s'", self.backend)

    def _log(self, message: str, *args: object) -> None:
        self._logger.log(log_level(self._rank, {0}, logging.INFO), message, *args)
