"""How host values travel between the ranks: what a runtime has to offer for a host group.

Owns the contract between :class:`~distckpt.backends.control_group.ControlGroup`, which waits and explains, and the
runtimes, which carry.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

import torch

from distckpt.backends.base import KeyValueStore, TensorOp

__all__ = ["MaxWork", "NullKeyValueStore", "Transport", "Work"]


class Work(Protocol):
    """An operation under way, as torch.distributed's: every rank has one."""

    def wait(self, timeout: timedelta = ...) -> object:
        """Wait for the end.

        Raises:
            RuntimeError: it has not ended within `timeout`, or it failed; :meth:`is_completed` tells which.
        """

    def is_completed(self) -> bool:
        """Tell whether it has ended, well or not."""


class MaxWork(Work, Protocol):
    """A reduction under way."""

    @property
    def values(self) -> list[int]:
        """The result, once it is done."""

    def is_done(self) -> bool:
        """Tell whether the result is here, without waiting; False also where that is not known."""


class Transport(ABC):
    """One rank's end of what carries host values. All operations are collective, one at a time, in one order.

    Attributes:
        shares_memory: whether what is small and frequent may go through memory that the ranks share instead.
        passthrough_errors: exceptions of the runtime's own that have to reach its user as they are.
    """

    shares_memory: bool = False
    passthrough_errors: tuple[type[BaseException], ...] = ()

    @abstractmethod
    def connect(self, timeout_s: float) -> None:
        """Collective. Connect the ranks; all have come.

        Raises:
            RuntimeError: they cannot be connected.
        """

    @abstractmethod
    def reduce(self, result: torch.Tensor, op: TensorOp, timeout_s: float) -> Work:
        """Reduce a CPU tensor in place. What it was is lost, also when the operation fails."""

    @abstractmethod
    def gather(self, result: Sequence[torch.Tensor], mine: torch.Tensor, timeout_s: float) -> Work:
        """Fill `result` with every rank's `mine`: uint8 (n,), n the same on all ranks and not 0."""

    @abstractmethod
    def broadcast(self, result: torch.Tensor, src: int, timeout_s: float) -> Work:
        """Fill `result`, uint8 (n,), with that of rank `src`; n the same on all ranks and not 0."""

    @abstractmethod
    def maximum(self, values: list[int], timeout_s: float) -> MaxWork:
        """Reduce twelve int64 with MAX. Nothing is waited for here."""

    def withdraw(self, work: Work) -> bool:
        """Let this rank's part in an operation be undone, if it still can; False where all ranks have come by now."""
        del work
        return True

    def close(self) -> None:  # noqa: B027 - not every runtime has something to end
        """Let go of threads and connections of the transport's own. Rank-local; does nothing the second time."""


class NullKeyValueStore(KeyValueStore):
    """What stands for the board where the job has none: nothing is written, and everybody is taken to be there."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size

    def set(self, key: str, text: str, *, limit_s: float) -> None:
        """Write nothing."""

    def set_default(self, key: str, text: str, *, limit_s: float) -> str:
        """Return `text`."""
        del key, limit_s
        return text

    def get_many(self, keys: Sequence[str], *, limit_s: float) -> list[str | None]:
        """Find nothing."""
        del limit_s
        return [None] * len(keys)

    def add(self, key: str, amount: int, *, limit_s: float) -> int:
        """Return the number of ranks."""
        del key, amount, limit_s
        return self._world_size

    def is_open(self) -> bool:
        """Return True."""
        return True

    def host(self) -> str:
        """Return an empty text: nowhere."""
        return ""
