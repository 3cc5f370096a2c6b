"""A world of one: every collective is the identity.

Owns the backend of a job without a distributed runtime.
"""

import torch

from distckpt.backends.base import Backend, ReduceOp, TensorOp

__all__ = ["SerialBackend"]


class SerialBackend(Backend):
    """The only rank of a job. Nothing is ever waited for."""

    name = "serial"

    @property
    def rank(self) -> int:
        """0."""
        return 0

    @property
    def world_size(self) -> int:
        """1."""
        return 1

    @property
    def local_rank(self) -> int:
        """0."""
        return 0

    @property
    def node(self) -> int:
        """0."""
        return 0

    def device(self) -> torch.device:
        """Return the current CUDA device if there is one, else the CPU."""
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    def reduce_host(self, values: torch.Tensor, op: ReduceOp, *, what: object, timeout_s: float | None) -> torch.Tensor:
        """Return a copy of `values`."""
        del op, what, timeout_s
        return values.clone()

    def gather_host(self, data: bytes, num_bytes: int, *, what: object, timeout_s: float | None) -> list[bytes]:
        """Return `data`, alone."""
        del num_bytes, what, timeout_s
        return [data]

    def reduce_tensor(self, tensor: torch.Tensor, op: TensorOp) -> torch.Tensor:
        """Return a copy of `tensor`."""
        del op
        return tensor.detach().clone()

    def gather_tensor(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return a copy of `tensor`, alone."""
        return [tensor.detach().clone()]

    def broadcast_tensor(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """Return a copy of `tensor`."""
        del src
        return tensor.detach().clone()

    def take_ticket(self, kind: str) -> str | None:
        """Return None: there is nobody to compare with."""
        del kind
        return None

    def post_note(self, ticket: str, text: str) -> None:
        """Leave nothing: there is nobody to read it."""
        del ticket, text

    def roll_call(self, name: str, *, watch: str | None, timeout_s: float | None) -> str | None:
        """Return at once: everybody is here."""
        del name, watch, timeout_s
        return None
