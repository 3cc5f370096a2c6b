"""Entry points in the manner of ignite's ``idist``: all that a script needs to be distributed.

Owns joining and leaving a job, and the collectives that user code calls. They answer from the live runtime, so they
work inside and beside ignite's ``idist.Parallel``, and whoever made the process group.
"""

import functools
import os
import socket
import subprocess
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, overload

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from distckpt.backends.base import Backend, TensorOp
from distckpt.backends.detect import current
from distckpt.backends.others import OTHERS, installed, module_of

__all__ = [
    "all_gather",
    "all_reduce",
    "available_backends",
    "backend",
    "barrier",
    "broadcast",
    "device",
    "finalize",
    "get_local_rank",
    "get_node_rank",
    "get_rank",
    "get_world_size",
    "hostname",
    "initialize",
    "one_rank_only",
]

T = TypeVar("T")

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_TENSOR_OPS = ("SUM", "PRODUCT", "MIN", "MAX", "AND", "OR")


def available_backends() -> tuple[str, ...]:
    """Return the names that :func:`initialize` takes: torch.distributed's, those a build has registered, and others.

    ``horovod`` and ``xla`` are named where they are installed. Being installed makes neither of them the job's.
    """
    if not dist.is_available():
        return installed()
    built_in = [
        name for name, there in (("nccl", dist.is_nccl_available()), ("gloo", dist.is_gloo_available())) if there
    ]
    known = {dist.Backend.UNDEFINED, "nccl", "gloo", *OTHERS}
    return (*built_in, *[name for name in dist.Backend.backend_list if name not in known], *installed())


def initialize(
    backend: str,
    *,
    init_method: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    timeout: timedelta | float | None = None,
) -> None:
    """Join the job that the launcher started, all ranks; a world of one where there is no launcher.

    Reads ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT`` (torchrun), or SLURM's variables
    of a plain ``srun``. ``horovod`` calls ``hvd.init()``, and ``xla`` says that this process, or this replica's thread,
    belongs to a job of torch_xla's; neither takes the other arguments.

    Args:
        backend: one of :func:`available_backends`.
        init_method: as for ``torch.distributed.init_process_group``; needs `rank` and `world_size`, unless ``env://``.
        rank: of this process.
        world_size: number of processes.
        timeout: of the job's process group; seconds, or a timedelta.

    Raises:
        ValueError: there is no such backend, or `rank` and `world_size` do not go together.
        RuntimeError: a process group exists already, the launcher's variables are incomplete, or NCCL finds no GPU.

    Example:
        >>> initialize("gloo")
        >>> get_rank(), get_world_size()
        (0, 1)
        >>> finalize()
    """
    check_backend(backend)
    if backend in OTHERS:
        _initialize_another(backend, init_method=init_method, rank=rank, world_size=world_size, timeout=timeout)
    else:
        _initialize_torch(backend, init_method, rank, world_size, timeout)


def _initialize_torch(
    backend: str,
    init_method: str | None,
    rank: int | None,
    world_size: int | None,
    timeout: timedelta | float | None,
) -> None:
    if dist.is_initialized():
        msg = "Can not create new distributed process group if default one is already initialized"
        raise RuntimeError(msg)
    if (rank is None) != (world_size is None):
        msg = f"Both rank and world_size should be provided, but given {rank} and {world_size}"
        raise ValueError(msg)
    if backend == "nccl" and not torch.cuda.is_available():
        msg = "Nccl backend is required but no cuda capable devices"
        raise RuntimeError(msg)
    options: dict[str, Any] = {}
    if timeout is not None:
        options["timeout"] = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
    _environment_from_slurm()
    _check_environment()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if init_method is not None and init_method != "env://":
        options.update(init_method=init_method, rank=rank, world_size=world_size)
    elif "RANK" not in os.environ:
        if world_size not in (None, 1):
            msg = f"Argument world_size is {world_size}, but no launcher or init_method says where the others are"
            raise ValueError(msg)
        options.update(store=dist.HashStore(), rank=0, world_size=1)
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The launcher's store outlives a job: what an earlier one of this program left there would be taken for ours.
        limit = options.get("timeout", default_pg_timeout)
        root, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
        number = root.add(f"distckpt/joined/{rank}", 1)
        options.update(store=dist.PrefixStore(f"distckpt/job{number}", root), rank=rank, world_size=world_size)
    dist.init_process_group(backend, **options)


def _initialize_another(backend: str, **arguments: Any) -> None:
    """Join a job of Horovod's or torch_xla's.

    Raises:
        ValueError: an argument that only torch.distributed takes.
        RuntimeError: there is a job already.
    """
    for name, value in arguments.items():
        if value is not None:
            msg = f"Argument {name} is for torch.distributed; backend {backend!r} does not take it, but given {value!r}"
            raise ValueError(msg)
    if current().name not in ("serial", "xla"):  # a replica is one as soon as it is started
        msg = f"Can not join a job by {backend!r}: this process is part of one by {current().name!r} already"
        raise RuntimeError(msg)
    module_of(backend).join()


def check_backend(backend: str) -> None:
    """Refuse a backend that this build does not have.

    Raises:
        ValueError: there is none of that name.
    """
    if backend not in available_backends():
        msg = f"Backend should be one of '{available_backends()}', but given {backend!r}"
        raise ValueError(msg)


def _check_environment() -> None:
    there = [name in os.environ for name in _LAUNCHER_VARIABLES]
    if any(there) and not all(there):
        msg = f"PyTorch distributed configuration should define env variables '{list(_LAUNCHER_VARIABLES)}'"
        raise RuntimeError(msg)


def _environment_from_slurm() -> None:
    """Set the launcher's variables from SLURM's, in a task of a plain ``srun``."""
    slurm = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}
    if "RANK" in os.environ or any(name not in os.environ for name in slurm.values()):
        return
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_JOB_NODELIST", "")
        try:
            told = subprocess.run(  # noqa: S603 - SLURM's own tool, and no shell
                ["scontrol", "show", "hostnames", nodes],  # noqa: S607 - found where SLURM is installed
                check=True,
                capture_output=True,
                text=True,
                timeout=30,
            )
        except (OSError, subprocess.SubprocessError) as error:
            msg = (
                f"MASTER_ADDR is not set, and scontrol cannot tell the first of {nodes!r}: set MASTER_ADDR to its name"
            )
            raise RuntimeError(msg) from error
        os.environ["MASTER_ADDR"] = told.stdout.split()[0]
    # The same on every node, and seldom another job's.
    os.environ.setdefault("MASTER_PORT", str(15000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 10000))
    os.environ.update({name: os.environ[source] for name, source in slurm.items()})


def finalize() -> None:
    """Leave the job, all ranks. Does nothing in a world without one."""
    live = current()
    live.close()
    if live.name in OTHERS:
        module_of(live.name).leave()
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
        tensor: any shape and dtype, the same on all ranks; or an int or float, which is exact as int64 or float64.
        op: SUM, PRODUCT, MIN, MAX, AND or OR.

    Returns:
        A new tensor on the same device, or a number.

    Raises:
        TypeError: it is neither, or its dtype has no such operation.
        ValueError: there is no such operation.
    """
    if op not in _TENSOR_OPS:
        msg = f"Unsupported reduction operation: '{op}'"
        raise ValueError(msg)
    if not isinstance(tensor, torch.Tensor | int | float):
        msg = f"Unhandled input type {type(tensor)}"
        raise TypeError(msg)
    kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor)
    is_real = tensor.is_floating_point() or tensor.is_complex() if isinstance(tensor, torch.Tensor) else kind is float
    if op in ("AND", "OR") and is_real:
        msg = f"{op} takes integers or booleans, but given {kind}"
        raise TypeError(msg)
    if isinstance(tensor, torch.Tensor):
        current().check_in_sync(f"all_reduce {op}", timeout_s=None)
        return current().reduce_tensor(tensor, op)
    current().check_in_sync(f"all_reduce {op}", timeout_s=None)
    dtype = torch.float64 if isinstance(tensor, float) else torch.int64
    result: int | float = current().reduce_tensor(torch.tensor([tensor], dtype=dtype), op).item()
    return result


def all_gather(tensor: Any) -> Any:
    """Collective. Give every rank every rank's tensor or small object.

    Args:
        tensor: a tensor, of the same shape and dtype on all ranks; or a number, text, None, or dicts and lists of them.

    Returns:
        Tensors concatenated along the first dimension, in rank order (scalars become a vector); anything else as a
        list, in rank order.

    Raises:
        TypeError: an object of an unsupported type; on every rank.
    """
    if isinstance(tensor, torch.Tensor):
        current().check_in_sync("all_gather", timeout_s=None)
        return torch.cat(current().gather_tensor(tensor.reshape(1) if tensor.ndim == 0 else tensor))
    return current().gather_objects(tensor, what="all_gather")


def broadcast(tensor: Any, src: int = 0, safe_mode: bool = False) -> Any:  # noqa: FBT001, FBT002 - ignite's signature
    """Collective. Give every rank what rank `src` has.

    Args:
        tensor: a tensor, of the same shape and dtype on all ranks; or a number, text, path, None, or dicts and lists of
            them.
        src: whose value counts.
        safe_mode: the other ranks may pass anything, for tensors too, which then arrive on the CPU of ranks that
            passed none.

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
    described = [str(mine.dtype).removeprefix("torch."), list(mine.shape)] if isinstance(mine, torch.Tensor) else None
    shape = live.broadcast_object(described, src)
    if shape is None:
        return live.broadcast_object(mine, src)
    where = live.device()
    blank = torch.empty(shape[1], dtype=getattr(torch, shape[0]), device=where)
    sent = live.broadcast_tensor(blank if mine is None else mine.to(where), src)
    return sent.to(value.device) if isinstance(value, torch.Tensor) else sent


def barrier() -> None:
    """Collective. Return when every rank has come."""
    current().barrier()


def one_rank_only(rank: int = 0, with_barrier: bool = False) -> Callable[[Callable[..., T]], Callable[..., T | None]]:  # noqa: FBT001, FBT002
    """Return a decorator that runs a function on one rank; on the others it returns None.

    Args:
        rank: where it runs.
        with_barrier: let all ranks wait for it, also when it raises.

    Example:
        >>> @one_rank_only()
        ... def where():
        ...     return get_rank()
        >>> where()
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
