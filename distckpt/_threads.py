"""How many threads of a rank may work on its bytes while training stands still.

Owns that number. Must not know what they do.
"""

import os

import torch

__all__ = ["num_threads"]

_MOST_THREADS = 4
"""More do not make a memory faster."""


def num_threads(world_size: int) -> int:
    """Return how many threads a rank may use: torch's, or its part of the CPUs.

    Launchers give each rank one thread of torch's (``OMP_NUM_THREADS=1``), however many CPUs there are.

    Args:
        world_size: how many ranks the job has; the launcher may tell how many of them are on this machine.

    Example:
        >>> 1 <= num_threads(10_000) <= num_threads(1) <= 4
        True
    """
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    num_here = int(told) if told.isdecimal() and 0 < int(told) <= world_size else world_size
    own = len(os.sched_getaffinity(0)) // max(num_here, 1)
    return min(max(torch.get_num_threads(), own), _MOST_THREADS)
