"""Start the ranks, for each launcher.

The module contains everything that differs between launchers: which backend is active, how ``main`` starts on each
rank, and how gradients are averaged. A new launcher needs a branch in this module only.
"""

import os
import threading
from collections.abc import Callable

import torch
import xla_on_cpu
from options import Config
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distckpt import Parallel, backend, broadcast, device, get_world_size, spawn

_INITIAL = threading.Lock()


def run(main: Callable[[int, Config], None], config: Config) -> None:
    """Call ``main(local_rank, config)`` on every rank of this process's job.

    torchrun, srun, horovodrun: the process is a rank already, its environment says which. ``--nproc-per-node``: the
    ranks are spawned here. ``--backend xla``: torch_xla starts a replica on each device of this machine. Plain
    ``python``: a world of one.
    """
    if config.backend == "xla":
        spawn("xla", _replica, (main, config))
        return
    with Parallel(backend=live_backend(config), nproc_per_node=config.nproc_per_node) as parallel:
        parallel.run(main, config)


def live_backend(config: Config) -> str | None:
    """Return the backend asked for, else the one that fits this process; ``None`` for a world of one."""
    if config.backend == "none":
        return None
    if config.backend != "auto":
        return config.backend
    if "HOROVOD_RANK" in os.environ and config.nproc_per_node is None:
        return "horovod"
    if "WORLD_SIZE" not in os.environ and config.nproc_per_node is None:
        return None
    return "nccl" if torch.cuda.is_available() else "gloo"


def initial(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return the model that `make` returns where random numbers begin with `seed`: the same on every rank.

    Replicas of torch_xla's may be threads of one process, which has one generator: one makes its model at a time.
    """
    with _INITIAL:
        torch.manual_seed(seed)
        return make()


def seed_step(seed: int) -> None:
    """Let the random numbers of the steps that follow begin with `seed`, on the host and on this rank's device."""
    torch.manual_seed(seed)
    if backend() == "xla":
        import torch_xla.core.xla_model as xm  # noqa: PLC0415 - only where it is what runs

        xm.set_rng_state(seed % 2**31, str(device()))


def metrics_device() -> torch.device:
    """Return where ignite's metrics keep their numbers: this rank's device; ignite refuses XLA's."""
    here = device()
    return torch.device("cpu") if here.type == "xla" else here


def parallelize(model: nn.Module) -> nn.Module:
    """Return `model` on this rank's device, with rank 0's parameters. Collective where there are several ranks.

    torch.distributed's averages its gradients by itself; with others :func:`distribute` is needed.
    """
    here = device()
    model = model.to(here)
    if get_world_size() == 1:
        return model
    if backend() in ("horovod", "xla"):
        for tensor in model.state_dict().values():
            tensor.copy_(broadcast(tensor, src=0))
        return model
    return DistributedDataParallel(model, device_ids=[here.index] if here.type == "cuda" else None)


def distribute(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer whose :func:`step` averages the gradients over all ranks."""
    if backend() != "horovod":
        return optimizer
    import horovod.torch as hvd  # noqa: PLC0415 - only where it is what runs

    wrapped: torch.optim.Optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    return wrapped


def step(optimizer: torch.optim.Optimizer) -> None:
    """Take the optimizer's step, with the gradients of all ranks. Collective where there are several."""
    if backend() == "xla":
        import torch_xla  # noqa: PLC0415 - only where it is what runs
        import torch_xla.core.xla_model as xm  # noqa: PLC0415 - as above

        xm.optimizer_step(optimizer)
        torch_xla.sync()
    else:
        optimizer.step()


def _replica(local_rank: int, main: Callable[[int, Config], None], config: Config) -> None:
    """Enter `main` on one replica of torch_xla's."""
    if os.environ.get("PJRT_DEVICE") == "CPU":
        xla_on_cpu.take_turns()
    main(local_rank, config)
