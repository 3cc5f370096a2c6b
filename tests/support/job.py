"""From a rank: the job as its runtime reports it, and the runtime's own collectives.

Tests compare distckpt's answers with these, so this module must not import distckpt.
"""

import importlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store

from tests.support.channel import call_store, next_sequence_number
from tests.support.limits import PROGRAM_LIMIT_S
from tests.support.messages import pack, unpack
from tests.support.runtime import OWN, RUNTIME

_LIMIT = timedelta(seconds=PROGRAM_LIMIT_S)


def name() -> str:
    """Return distckpt's name for the runtime of this rank's job."""
    if RUNTIME != OWN:
        return RUNTIME
    return str(dist.get_backend()) if dist.is_initialized() else "serial"


def rank() -> int:
    """Return this rank's number."""
    return _rank_and_size()[0]


def world_size() -> int:
    """Return the number of ranks."""
    return _rank_and_size()[1]


def _rank_and_size() -> tuple[int, int]:
    if RUNTIME == "horovod":
        hvd = _module("horovod.torch")
        return int(hvd.rank()), int(hvd.size())
    if RUNTIME == "xla":
        xr = _module("torch_xla.runtime")
        return int(xr.global_ordinal()), int(xr.world_size())
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def device() -> torch.device:
    """Return the device of this rank's program."""
    if RUNTIME == "xla":
        chosen: torch.device = _module("torch_xla").device()
        return chosen
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over the ranks, by the runtime's own collective, as gradients are summed."""
    summed: torch.Tensor
    if RUNTIME == "horovod":
        hvd = _module("horovod.torch")
        summed = hvd.allreduce(tensor, op=hvd.Sum, name="the test's own")
    elif RUNTIME == "xla":
        summed = _module("torch_xla.core.xla_model").all_reduce("sum", tensor)
        _module("torch_xla").sync()
    else:
        summed = tensor.clone()
        dist.all_reduce(summed)
    return summed


def start_all_reduce(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start an asynchronous :func:`all_reduce`; return a function that waits for its result. Not on XLA."""
    if RUNTIME == "horovod":
        hvd = _module("horovod.torch")
        handle = hvd.allreduce_async(tensor, op=hvd.Sum, name="the test's own")
        return lambda: hvd.synchronize(handle)
    summed = tensor.clone()
    work = dist.all_reduce(summed, async_op=True)

    def finish() -> torch.Tensor:
        work.wait()
        return summed

    return finish


def data_parallel(
    model: torch.nn.Module, make_optimizer: Callable[[Any], torch.optim.Optimizer]
) -> tuple[torch.nn.Module, torch.optim.Optimizer, Callable[[], object]]:
    """Return the model and optimizer wrapped as this runtime's programs do, and a function that makes a step."""
    if RUNTIME == "xla":
        model = model.to(device())
        optimizer = make_optimizer(model.parameters())
        return model, optimizer, lambda: _module("torch_xla.core.xla_model").optimizer_step(optimizer, barrier=True)
    if RUNTIME == "horovod" and _module("horovod.torch").is_initialized():
        optimizer = make_optimizer(model.parameters())
        optimizer = _module("horovod.torch").DistributedOptimizer(optimizer, model.named_parameters())
        return model, optimizer, lambda: optimizer.step()  # noqa: PLW0108 - as below
    if dist.is_initialized():
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = make_optimizer(model.parameters())
    return model, optimizer, lambda: optimizer.step()  # noqa: PLW0108 - a scheduler replaces the method


def leave() -> None:
    """Leave the job by the runtime's own call, where it has one."""
    if RUNTIME == "horovod":
        _module("horovod.torch").shutdown()
    elif RUNTIME != "xla":
        dist.destroy_process_group()


def store() -> Store:
    """Return this call's store, through which ranks synchronise without a collective."""
    return call_store()


def barrier() -> None:
    """Block until all ranks arrive, by the runtime's barrier; on XLA, whose barrier has no timeout, by the store."""
    if RUNTIME == "horovod":
        _module("horovod.torch").barrier()
    elif RUNTIME != "xla":
        dist.barrier()
    else:
        store_barrier()


def store_barrier() -> None:
    """Block until all ranks arrive, through the store: no collective is issued."""
    shared, number = store(), next_sequence_number()
    if shared.add(f"arrived/{number}", 1) == world_size():
        shared.set(f"complete/{number}", "1")
    shared.wait([f"complete/{number}"], _LIMIT)


def gather(value: object) -> list[Any]:
    """Return every rank's value, in rank order, by the runtime's own collective; on XLA through the store."""
    if RUNTIME == "horovod":
        return list(_module("horovod.torch").allgather_object(value))
    if RUNTIME != "xla":
        values: list[Any] = [None] * world_size()
        dist.all_gather_object(values, value)
        return values
    shared, number = store(), next_sequence_number()
    shared.set(f"value/{number}/{rank()}", pack(value).hex())
    keys = [f"value/{number}/{other}" for other in range(world_size())]
    shared.wait(keys, _LIMIT)
    return [unpack(bytes.fromhex(shared.get(key).decode())) for key in keys]


def _module(name: str) -> Any:
    return importlib.import_module(name)  # Horovod and torch_xla exist only in their own environments
