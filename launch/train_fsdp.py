"""Train a small transformer whose state is sharded, by FSDP2 and tensor parallelism, on any number of ranks.

    SCRIPT=launch/train_fsdp.py bash launch/torchrun.sh                             # FSDP2 on two ranks
    NPROC_PER_NODE=4 SCRIPT=launch/train_fsdp.py bash launch/torchrun.sh --tp 2     # two shards, each split in two
    PYTHONPATH=. python launch/train_fsdp.py --resume                               # continue in one process, unsharded
    python launch/accuracy.py runs/fsdp/latest_checkpoint_12.pt                     # open the file without any of it

It is train_digits.py with another model. Engines, handlers and resume are the same; none of them handles shards.
All ranks write one checkpoint file together, with whole tensors. Any number of ranks, with any ``--tp``, loads it.
"""

import sys

import launchers
import options
import torch
import train_digits
from options import Config
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import Optimizer
from transformer import HEAD_WIDTH, WIDTH, Block, Transformer

from distckpt import backend, device, get_rank, get_world_size

NUM_HEADS = WIDTH // HEAD_WIDTH


class Shards:
    """Each rank has a shard of each tensor. Ranks of one tensor-parallel group train the same samples.

    Collective. Without a process group, the one process has the whole network.

    Args:
        config: the command line's.
    """

    def __init__(self, config: Config) -> None:
        if backend() in ("horovod", "xla"):
            sys.exit(f"train_fsdp.py shards with torch.distributed, but the backend is {backend()!r}")
        world_size = get_world_size()
        if world_size % config.tp or NUM_HEADS % config.tp:
            sys.exit(f"--tp should divide the {world_size} ranks and the {NUM_HEADS} heads, but given {config.tp}")
        self.data_rank, self.data_world_size = get_rank() // config.tp, world_size // config.tp
        self.name = f"FSDP2 x {self.data_world_size}" + (f", TP x {config.tp}" if config.tp > 1 else "")
        self.mesh: DeviceMesh | None = None
        if torch.distributed.is_initialized():
            shape = (self.data_world_size, config.tp)
            self.mesh = init_device_mesh(device().type, shape, mesh_dim_names=("data", "tensor"))

    def build(self, config: Config) -> tuple[nn.Module, nn.Module, Optimizer]:
        """Return the model, sharded in place, twice, as it has no wrapper; and the optimizer. Collective."""
        model = launchers.initial(Transformer, config.seed).to(device())
        if self.mesh is not None:
            shard(model, self.mesh)
        return model, model, torch.optim.AdamW(model.parameters(), lr=config.lr, fused=True)

    def state_of(self, net: nn.Module) -> dict[str, Tensor]:
        """Return the whole tensors of the network's state. Collective."""
        state = net.state_dict().items()
        return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state}

    def spread(self, tensor: Tensor) -> Tensor:
        """Return a tensor of which each rank has a shard. Collective."""
        if self.mesh is None:
            return tensor
        return distribute_tensor(tensor.to(device()), self.mesh, [Shard(0), Replicate()])


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a transformer in place over a mesh with the dimensions "data" and "tensor". Collective."""
    for block in model.modules():
        if isinstance(block, Block):
            if mesh["tensor"].size() > 1:
                parallelize_module(block, mesh["tensor"], PLAN)
            fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])


PLAN = {
    "attend.query": ColwiseParallel(),
    "attend.key": ColwiseParallel(),
    "attend.value": ColwiseParallel(),
    "attend.project": RowwiseParallel(),
    "widen": ColwiseParallel(),
    "narrow": RowwiseParallel(),
}
"""How tensor parallelism splits the layers of a block."""


def main(local_rank: int, config: Config) -> None:
    """Train on this rank. Collective: every rank of the job calls it, with the same `config`."""
    train_digits.main(local_rank, config, Shards)


if __name__ == "__main__":
    launchers.run(main, options.parse(program="train_fsdp.py"))
