"""Transports carry the host values of a control group (:mod:`distckpt.backends.control_group`) over a runtime.

The group waits for the operations and explains their failures.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from distckpt.backends.base import TensorOp


class TensorMaxWork:
    """A MAX reduction of int64 in progress, by an operation that fills a tensor.

    Args:
        work: the operation, with the methods of torch.distributed's works.
        result: int64 (n,); holds the result after the end.
    """

    def __init__(self, work: Any, result: torch.Tensor) -> None:
        self.work = work
        self.wait = work.wait
        self.is_completed = work.is_completed
        self._result = result

    @property
    def values(self) -> list[int]:
        """The result, after the end."""
        values: list[int] = self._result.tolist()
        return values

    def is_done(self) -> bool:
        """Return False: it has to be waited for."""
        return False


class Transport(ABC):
    """One rank's connection to the others. All operations are collective, one at a time, in the same order.

    An operation returns its work. ``wait(timeout)`` raises RuntimeError if it has not ended within the limit, or has
    failed. ``is_completed()`` returns True if it has ended, well or not.

    Attributes:
        can_share_memory: whether frequent small operations may go through memory that the ranks share instead.
        passthrough_errors: the runtime's own exceptions, which have to reach the user unchanged.
    """

    can_share_memory: bool = False
    passthrough_errors: tuple[type[BaseException], ...] = ()

    def connect(self, timeout_s: float) -> None:  # noqa: B027 - many runtimes have connected their ranks before
        """Collective. Connect the ranks, after all have arrived.

        Raises:
            RuntimeError: they cannot be connected.
        """

    @abstractmethod
    def reduce(self, result: torch.Tensor, op: TensorOp, timeout_s: float) -> Any:
        """Reduce a CPU tensor in place. Its values are lost if the operation fails."""

    @abstractmethod
    def gather(self, result: Sequence[torch.Tensor], mine: torch.Tensor, timeout_s: float) -> Any:
        """Fill `result` with every rank's `mine`: uint8 (n,), the same n > 0 on all ranks."""

    @abstractmethod
    def broadcast(self, result: torch.Tensor, src: int, timeout_s: float) -> Any:
        """Fill `result` with that of rank `src`: uint8 (n,), the same n > 0 on all ranks."""

    @abstractmethod
    def start_max(self, values: list[int], timeout_s: float) -> TensorMaxWork:
        """Start to reduce twelve int64 with MAX. Does not wait."""

    def withdraw(self, work: Any) -> bool:
        """Take back this rank's arrival at an operation; return False if all ranks have arrived by now."""
        return True

    def close(self) -> None:  # noqa: B027 - not every runtime has something to close
        """Close the transport's threads and connections. Rank-local; a second call does nothing."""


def to_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a CPU tensor of any dtype, uint8 (n,). Shares memory with it, if it can."""
    flat = tensor.detach().contiguous().reshape(-1)
    return (torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).view(torch.uint8)


def from_bytes(data: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return bytes as a tensor of the same dtype and shape as `like`."""
    return data.view(like.dtype).reshape(like.shape)
