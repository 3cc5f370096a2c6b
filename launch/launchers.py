"""How ranks come to be, launcher by launcher.

Owns everything that differs between launchers: which backend is live, how ``main`` is entered on each rank,
and how a model is made to average its gradients. Must not know what is trained. A new launcher is a branch
here and nowhere else.
"""

import os
from collections.abc import Callable

import torch
from options import Config
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distckpt import Parallel, device, get_world_size


def run(main: Callable[[int, Config], None], config: Config) -> None:
    """Call ``main(local_rank, config)`` on every rank of this process's job.

    torchrun, srun: the process is a rank already, its environment says which. ``--nproc-per-node``: the ranks
    are spawned here. Plain ``python``: a world of one.
    """
    with Parallel(backend=live_backend(config), nproc_per_node=config.nproc_per_node) as parallel:
        parallel.run(main, config)


def live_backend(config: Config) -> str | None:
    """Return the backend asked for, else the one that fits this process; ``None`` for a world of one."""
    if config.backend == "none":
        return None
    if config.backend != "auto":
        return config.backend
    if "WORLD_SIZE" not in os.environ and config.nproc_per_node is None:
        return None
    return "nccl" if torch.cuda.is_available() else "gloo"


def parallelize(model: nn.Module) -> nn.Module:
    """Return `model` on this rank's device, its gradients averaged over all ranks.

    Collective where there are several ranks: DistributedDataParallel sends rank 0's parameters to all.
    """
    here = device()
    model = model.to(here)
    if get_world_size() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[here.index] if here.type == "cuda" else None)
