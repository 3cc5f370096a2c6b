"""The training batches: each rank's share of them, in an order that continues on any number of ranks."""

import torch
from digits import Samples
from torch.utils.data import DataLoader

from distckpt import ResumableSampler


class TrainBatches(DataLoader[Samples]):
    """One rank's share of each batch, in an order that depends on seed and epoch alone.

    The batch size is that of the whole job: with more ranks each takes fewer samples. A run may go on with another
    number of ranks, in the middle of an epoch too, and sees each sample of it once.

    Args:
        samples: all training samples.
        batch_size: samples of one step over all ranks; what does not divide by the ranks is left out, and so is an
            epoch's last, incomplete batch.
        seed: with the epoch, it fixes the order.
        rank: whose share.
        world_size: among how many ranks.

    Raises:
        ValueError: there is not one whole batch, or not one sample of it for each rank.
    """

    def __init__(self, samples: Samples, *, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        if not world_size <= batch_size <= len(samples):
            given = f"a sample for each of {world_size} ranks, at most {len(samples)}, but given {batch_size}"
            raise ValueError(f"batch_size should be at least {given}")
        super().__init__(
            range(len(samples)),  # type: ignore[arg-type]  # the numbers of the samples; a batch is taken at once
            batch_size // world_size,
            sampler=ResumableSampler(len(samples), num_replicas=world_size, rank=rank, seed=seed, drop_last=True),
            collate_fn=lambda numbers: samples.take(torch.tensor(numbers, device=samples.labels.device)),
            drop_last=True,
        )
