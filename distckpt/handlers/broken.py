"""Whether an exception tells of a peer that is gone.

Owns the words by which that is known.
"""

import torch.distributed as dist

__all__ = ["is_of_a_broken_collective"]

# What Gloo, NCCL, Horovod and the store say when a peer is gone; they raise bare RuntimeErrors.
_WORDS_OF_A_BROKEN_COLLECTIVE = (
    "gloo",
    "nccl",
    "peer",
    "connection",
    "socket",
    "process group",
    "timed out",
    "horovod",
)


def is_of_a_broken_collective(error: BaseException) -> bool:
    """Tell whether an exception is what a runtime raises when a peer is gone."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _WORDS_OF_A_BROKEN_COLLECTIVE)
