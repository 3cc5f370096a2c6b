"""The training job of ``bench_save.py --sharded``: the same small GPT under FSDP2."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ci.savebench.job import Job

MODULUS = 2**64


class ShardedJob(Job):
    """Each rank has a shard of each parameter and of its optimizer state.

    The engine's step is the optimizer's, with the gradients of a real one: over the loopback, gathering the parameters
    takes longer than the saves that are measured.
    """

    is_sharded: ClassVar[bool] = True

    def parallelize(self) -> nn.Module:
        """Collective. Return the module, sharded in place."""
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        for block in self.module.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.module, mesh=mesh)
        return self.module

    def step(self, *_: Any) -> float:
        """Take the optimizer's step."""
        with self.step_guard():
            self.optimizer.step()
        self.num_steps += 1
        return 0.0

    def local_tensors(self) -> Iterator[torch.Tensor]:
        """Yield what this rank holds of every tensor."""
        for _, tensor in self.tensors():
            yield tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def fingerprint(self) -> int:
        """Collective. Return a checksum of the whole state: the same for every number of ranks."""
        total = 0
        for number, (_, tensor) in enumerate(self.tensors()):
            if isinstance(tensor, DTensor):
                _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
                total += (2 * number + 1) * _checksum(tensor.to_local(), first_row=offset[0])
            elif self.rank == 0:
                total += (2 * number + 1) * _checksum(tensor.view(1), first_row=0)
        totals: list[int] = self.meeting.gather(total % MODULUS)
        return sum(totals) % MODULUS


def _checksum(rows: torch.Tensor, *, first_row: int) -> int:
    """Return the sum of all rows' bits, each row multiplied by its index in the whole tensor; modulo 2**64."""
    bits = rows.detach().contiguous().view(torch.int32)
    sums = bits.reshape(len(rows), -1).sum(dim=1, dtype=torch.int64) if rows.numel() else bits.new_zeros(0)
    factors = torch.arange(first_row, first_row + len(rows), device=rows.device) * 2 + 1
    values: list[int] = (sums * factors).tolist()
    return sum(values) % MODULUS
