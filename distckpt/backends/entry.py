"""Entry points like those of ignite's ``idist``: joining and leaving a job, and the collectives for user code.

They use the live runtime, so they work together with ignite's ``idist.Parallel``, and with any process group.
"""

import functools
import os
import socket
import subprocess
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, get_args, overload

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from distckpt.backends.base import Backend, TensorOp
from distckpt.backends.detect import OTHER_RUNTIMES, current, import_runtime, installed_runtimes

T = TypeVar("T")

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def available_backends() -> tuple[str, ...]:
    """Return the names that :func:`initialize` accepts: torch.distributed's, those a build has registered, and others.

    ``horovod`` and ``xla`` are included if they are installed. That alone makes neither of them the job's backend.
    """
    if not dist.is_available():
        return installed_runtimes()
    built_in = [
        name for name, is_built in (("nccl", dist.is_nccl_available()), ("gloo", dist.is_gloo_available())) if is_built
    ]
    known = {dist.Backend.UNDEFINED, "nccl", "gloo", *OTHER_RUNTIMES}
    return (*built_in, *[name for name in dist.Backend.backend_list if name not in known], *installed_runtimes())


def initialize(
    backend: str,
    *,
    init_method: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    timeout: timedelta | float | None = None,
) -> None:
    """All ranks. Join the launcher's job; without a launcher, a job of one rank.

    Reads ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT`` (torchrun), or SLURM's variables
    of a plain ``srun``. ``horovod`` calls ``hvd.init()``; ``xla`` makes this process, or this replica's thread, part of
    a torch_xla job. Neither takes the other arguments. Over Gloo it returns once all ranks have joined.

    Args:
        backend: one of :func:`available_backends`.
        init_method: as for ``torch.distributed.init_process_group``; needs `rank` and `world_size`, unless ``env://``.
        rank: this process's rank; None to read it from the environment.
        world_size: number of processes; None to read it from the environment.
        timeout: time limit of the job's process group, seconds or a timedelta; None for torch's default.

    Raises:
        ValueError: there is no such backend, or only one of `rank` and `world_size` is given.
        RuntimeError: a process group exists already, the launcher's variables are incomplete, or NCCL finds no GPU.

    Example:
        >>> initialize("gloo")
        >>> get_rank(), get_world_size()
        (0, 1)
        >>> finalize()
    """
    check_backend(backend)
    if backend in OTHER_RUNTIMES:
        _initialize_other(backend, init_method=init_method, rank=rank, world_size=world_size, timeout=timeout)
    else:
        _initialize_torch(backend, init_method, rank, world_size, timeout)
    if backend == "gloo":
        # Gloo has connected the ranks. One that is done first and then ends at once, by an error of its own, would
        # break the connections that others still make, and their errors would hide its own.
        dist.barrier()


def _initialize_torch(
    backend: str,
    init_method: str | None,
    rank: int | None,
    world_size: int | None,
    timeout: timedelta | float | None,
) -> None:
    if dist.is_initialized():
        raise RuntimeError("Can not create new distributed process group if default one is already initialized")
    if (rank is None) != (world_size is None):
        raise ValueError(f"Both rank and world_size should be provided, but given {rank} and {world_size}")
    if backend == "nccl" and not torch.cuda.is_available():
        raise RuntimeError("Nccl backend is required but no cuda capable devices")
    options: dict[str, Any] = {}
    if timeout is not None:
        options["timeout"] = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
    _prepare_environment()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if init_method is not None and init_method != "env://":
        options.update(init_method=init_method, rank=rank, world_size=world_size)
    elif "RANK" not in os.environ:
        if world_size not in (None, 1):
            msg = f"Argument world_size is {world_size}, but neither a launcher nor init_method gives their addresses"
            raise ValueError(msg)
        options.update(store=dist.HashStore(), rank=0, world_size=1)
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The launcher's store outlives a job: keys of an earlier job of this program must not be read.
        limit = options.get("timeout", default_pg_timeout)
        root, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
        number = root.add(f"distckpt/joined/{rank}", 1)
        options.update(store=dist.PrefixStore(f"distckpt/job{number}", root), rank=rank, world_size=world_size)
    dist.init_process_group(backend, **options)


def _initialize_other(backend: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            msg = f"Argument {name} is for torch.distributed; backend {backend!r} does not take it, but given {value!r}"
            raise ValueError(msg)
    if current().name not in ("serial", "xla"):  # a replica belongs to its job from its start
        msg = f"Can not join a job by {backend!r}: this process is part of a {current().name!r} job already"
        raise RuntimeError(msg)
    import_runtime(backend).join()


def check_backend(backend: str) -> None:
    """Raise ValueError if this build does not have `backend`."""
    if backend not in available_backends():
        raise ValueError(f"Backend should be one of '{available_backends()}', but given {backend!r}")


def _prepare_environment() -> None:
    """Set the launcher's variables from SLURM's, in a task of a plain ``srun``; raise if only some are set."""
    slurm = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}
    if "RANK" in os.environ or any(name not in os.environ for name in slurm.values()):
        are_set = [name in os.environ for name in _LAUNCHER_VARIABLES]
        if any(are_set) and not all(are_set):
            msg = f"PyTorch distributed configuration should define env variables '{list(_LAUNCHER_VARIABLES)}'"
            raise RuntimeError(msg)
        return
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_JOB_NODELIST", "")
        try:
            shown = subprocess.run(  # noqa: S603 - SLURM's own tool, and no shell
                ["scontrol", "show", "hostnames", nodes],  # noqa: S607 - found where SLURM is installed
                check=True,
                capture_output=True,
                text=True,
                timeout=30,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise RuntimeError(
                f"MASTER_ADDR is not set, and scontrol cannot name the first of {nodes!r}: set MASTER_ADDR to its name"
            ) from error
        os.environ["MASTER_ADDR"] = shown.stdout.split()[0]
    # The same on every node, and rarely the same for two jobs.
    os.environ.setdefault("MASTER_PORT", str(15000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 10000))
    os.environ.update({name: os.environ[source] for name, source in slurm.items()})


def finalize() -> None:
    """All ranks. Leave the job. Does nothing without one."""
    live = current()
    live.close()
    if live.name in OTHER_RUNTIMES:
        import_runtime(live.name).leave()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def backend() -> str | None:
    """Return the name of the live job's backend; None without a job."""
    live = current()
    return None if live.name == "serial" else live.name


def get_rank() -> int:
    """Return this process's rank; 0 without a job."""
    return current().rank


def get_world_size() -> int:
    """Return the number of ranks; 1 without a job."""
    return current().world_size


def get_local_rank() -> int:
    """Return this process's rank on its node; 0 without a job."""
    return current().local_rank


def get_node_rank() -> int:
    """Return the number of this process's node; 0 without a job."""
    return current().node


def hostname() -> str:
    """Return this node's name."""
    return socket.gethostname()


def device() -> torch.device:
    """Return the device this rank computes on: the current CUDA device, else the CPU."""
    return current().device()


@overload
def all_reduce(tensor: torch.Tensor, op: TensorOp = "SUM") -> torch.Tensor: ...
@overload
def all_reduce(tensor: float, op: TensorOp = "SUM") -> int | float: ...
def all_reduce(tensor: torch.Tensor | float, op: TensorOp = "SUM") -> torch.Tensor | float:
    """Collective. Reduce a tensor or a number over all ranks.

    Args:
        tensor: of any shape and dtype, the same on all ranks; or an int or float, reduced as int64 or float64.
        op: SUM, PRODUCT, MIN, MAX, AND or OR.

    Returns:
        A new tensor on the same device, or a number.

    Raises:
        TypeError: the value has another type, or a dtype without such an operation.
        ValueError: there is no such operation.
    """
    if op not in get_args(TensorOp):
        raise ValueError(f"Unsupported reduction operation: '{op}'")
    if not isinstance(tensor, torch.Tensor | int | float):
        raise TypeError(f"Unhandled input type {type(tensor)}")
    kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor)
    is_real = tensor.is_floating_point() or tensor.is_complex() if isinstance(tensor, torch.Tensor) else kind is float
    if op in ("AND", "OR") and is_real:
        raise TypeError(f"{op} takes integers or booleans, but given {kind}")
    current().check_in_sync(f"all_reduce {op}", timeout_s=None)
    if isinstance(tensor, torch.Tensor):
        return current().reduce_tensor(tensor, op)
    dtype = torch.float64 if isinstance(tensor, float) else torch.int64
    result: int | float = current().reduce_tensor(torch.tensor([tensor], dtype=dtype), op).item()
    return result


def all_gather(tensor: Any) -> Any:
    """Collective. Return every rank's tensors or small objects.

    Args:
        tensor: a tensor, of the same shape and dtype on all ranks; or a number, text, None, or dicts and lists of them.

    Returns:
        Tensors concatenated along the first dimension, in rank order (scalars become a vector); other values as a list,
        in rank order.

    Raises:
        TypeError: an object of an unsupported type; on every rank.
    """
    if isinstance(tensor, torch.Tensor):
        current().check_in_sync("all_gather", timeout_s=None)
        return torch.cat(current().gather_tensor(tensor.reshape(1) if tensor.ndim == 0 else tensor))
    return current().gather_objects(tensor, what="all_gather")


def broadcast(tensor: Any, src: int = 0, safe_mode: bool = False) -> Any:  # noqa: FBT001, FBT002 - ignite's signature
    """Collective. Return the value of rank `src`.

    Args:
        tensor: a tensor, of the same shape and dtype on all ranks; or a number, text, path, None, or dicts and lists of
            them.
        src: the rank whose value is returned.
        safe_mode: the other ranks may pass any value, for tensors too. Ranks that pass no tensor get one on their
            device.

    Raises:
        TypeError: an object of an unsupported type; on every rank.
        ValueError: there is no rank `src`.
    """
    live = current()
    live.check_rank(src, "src")
    if safe_mode:
        return _broadcast_anything(live, tensor, src)
    if isinstance(tensor, torch.Tensor):
        live.check_in_sync(f"broadcast from rank {src}", timeout_s=None)
        return live.broadcast_tensor(tensor, src)
    return live.broadcast_object(tensor, src)


def _broadcast_anything(live: Backend, value: Any, src: int) -> Any:
    mine = value if live.rank == src else None
    spec = [str(mine.dtype).removeprefix("torch."), list(mine.shape)] if isinstance(mine, torch.Tensor) else None
    spec = live.broadcast_object(spec, src)
    if spec is None:
        return live.broadcast_object(mine, src)
    blank = torch.empty(spec[1], dtype=getattr(torch, spec[0]), device=live.device())
    sent = live.broadcast_tensor(blank if mine is None else mine.to(live.device()), src)
    return sent.to(value.device) if isinstance(value, torch.Tensor) else sent


def barrier() -> None:
    """Collective. Block until every rank has arrived."""
    current().barrier()


def one_rank_only(rank: int = 0, with_barrier: bool = False) -> Callable[[Callable[..., T]], Callable[..., T | None]]:  # noqa: FBT001, FBT002
    """Return a decorator that runs a function on one rank; on the others it returns None.

    Args:
        rank: the rank on which it runs.
        with_barrier: make all ranks wait for its end, also if it raises.

    Example:
        >>> @one_rank_only()
        ... def my_rank():
        ...     return get_rank()
        >>> my_rank()
        0
    """

    def decorate(func: Callable[..., T]) -> Callable[..., T | None]:
        @functools.wraps(func)
        def wrapper(*args: Any, **kwargs: Any) -> T | None:
            try:
                return func(*args, **kwargs) if get_rank() == rank else None
            finally:
                if with_barrier:
                    barrier()

        return wrapper

    return decorate
