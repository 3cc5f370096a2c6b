"""From a rank: the job as its own runtime sees it, to hold distckpt's answers against, and the runtime's own reduction.

Owns what differs between torch.distributed, Horovod and torch_xla there. Must not import distckpt.
"""

import importlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store

from tests.support.channel import next_meeting, store_of_call
from tests.support.messages import pack, unpack
from tests.support.runtime import OWN, RUNTIME

_LIMIT = timedelta(seconds=20)


def name() -> str:
    """Return what distckpt calls the runtime of this rank's job."""
    if RUNTIME != OWN:
        return RUNTIME
    return str(dist.get_backend()) if dist.is_initialized() else "serial"


def rank() -> int:
    """Return this rank's number, as the runtime says."""
    return _place()[0]


def world_size() -> int:
    """Return the number of ranks, as the runtime says."""
    return _place()[1]


def _place() -> tuple[int, int]:
    if RUNTIME == "horovod":
        hvd = _module("horovod.torch")
        return int(hvd.rank()), int(hvd.size())
    if RUNTIME == "xla":
        xr = _module("torch_xla.runtime")
        return int(xr.global_ordinal()), int(xr.world_size())
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def device() -> torch.device:
    """Return the device that this rank's program computes on."""
    if RUNTIME == "xla":
        chosen: torch.device = _module("torch_xla").device()
        return chosen
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def total(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the ranks by the runtime's own collective, as the training step does with gradients."""
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


def start_total(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin :func:`total`, and return what waits for it. XLA has no such thing."""
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
    """Return a model and its optimizer as a program of this runtime has them, and what makes a step."""
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
    """End the job by the runtime's own means, where it has any."""
    if RUNTIME == "horovod":
        _module("horovod.torch").shutdown()
    elif RUNTIME != "xla":
        dist.destroy_process_group()


def store() -> Store:
    """Return a store of this call, for ranks that have to wait for each other beside all collectives."""
    return store_of_call()


def barrier() -> None:
    """Wait for all ranks, by the runtime's own means where its waiting has an end."""
    if RUNTIME == "horovod":
        _module("horovod.torch").barrier()
    elif RUNTIME != "xla":
        dist.barrier()
    else:
        meet()


def meet() -> None:
    """Wait for all ranks, beside all collectives."""
    corner, number = store(), next_meeting()
    if corner.add(f"meeting/{number}", 1) == world_size():
        corner.set(f"met/{number}", "1")
    corner.wait([f"met/{number}"], _LIMIT)


def gathered(value: object) -> list[Any]:
    """Return every rank's value, in rank order; from a collective of the runtime's own where it has such a one."""
    if RUNTIME == "horovod":
        return list(_module("horovod.torch").allgather_object(value))
    if RUNTIME != "xla":
        values: list[Any] = [None] * world_size()
        dist.all_gather_object(values, value)
        return values
    corner, number = store(), next_meeting()
    corner.set(f"given/{number}/{rank()}", pack(value).hex())
    keys = [f"given/{number}/{other}" for other in range(world_size())]
    corner.wait(keys, _LIMIT)
    return [unpack(bytes.fromhex(corner.get(key).decode())) for key in keys]


def _module(name: str) -> Any:
    return importlib.import_module(name)  # only in ranks of the runtime's
